"""The Dockerfiles and the manifest for Kubernetes: well-formed, and what they name is there.
Built and applied where there is an engine and a cluster; here is neither."""

import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import jsonschema
import pytest
import yaml

from ig_jax import extensions, fields, sections
from ig_jax.errors import Exit

ROOT = pathlib.Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
DOCKERFILES = sorted((ROOT / "launch").glob("*.Dockerfile"))
SCHEMA = json.loads((pathlib.Path(__file__).parent / "jobset_schema.json").read_text())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(path):
    hadolint = shutil.which("hadolint", path=pathlib.Path(sys.executable).parent)
    done = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()]
    assert copied == ["pyproject.toml", "README.md", "LICENSE", "ig_jax", "configs"]
    assert all((ROOT / name).exists() for name in copied)
    [extras] = re.findall(r'"\.\[(.*)\]"', text)
    assert set(extras.split(",")) <= set(EXTRAS)
    assert f"-f launch/{path.name}" in text and 'ENTRYPOINT ["ig-jax"]' in text
    for config in re.findall(r"--config=(\S+)", text):
        assert config in extensions.built_in_configs()


def manifest():
    return yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())


def test_jobset_fits_its_schema():
    jsonschema.validate(manifest(), SCHEMA)
    wrong = manifest()
    wrong["spec"]["failurePolicy"]["rules"][0]["action"] = "Fail"
    with pytest.raises(jsonschema.ValidationError, match="'Fail' is not one of"):
        jsonschema.validate(wrong, SCHEMA)


def test_jobset_means_what_it_says():
    [job] = manifest()["spec"]["replicatedJobs"]
    hosts = job["template"]["spec"]
    pod = hosts["template"]["spec"]
    [container] = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert hosts["parallelism"] == hosts["completions"] == chips // per_host
    [rule] = hosts["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [Exit.BAD_INPUT, Exit.NOT_FINITE]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    reason, _ = manifest()["spec"]["failurePolicy"]["rules"]
    assert reason["onJobFailureReasons"] == ["PodFailurePolicy"]
    known = fields.every(sections.Config)
    for argument in container["args"]:
        name, _, value = argument.removeprefix("--").partition("=")
        assert name in ("config", "workdir") or name.removeprefix("config.") in known, argument
        assert name != "config" or value in extensions.built_in_configs()
