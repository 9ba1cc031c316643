"""The wheel, versions, markers and extras, and the program outside a checkout."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

import ig_jax
from ig_jax import extensions, main
from ig_jax.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent
TOML = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def test_every_room_is_packaged():
    rooms = {path.parent.relative_to(ROOT) for path in ROOT.glob("ig_jax/**/*.py")}
    named = {".".join(room.parts) for room in rooms} | {"ig_jax.configs"}
    assert named == set(TOML["tool"]["setuptools"]["packages"])


def test_built_in_configs_go_by_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(extensions.built_in_configs()) == CONFIGS
    by_path = extensions.read_config(f"{ROOT}/configs/digits_ig.py")
    assert extensions.read_config("digits_ig") == by_path
    (tmp_path / "digits_ig").mkdir()  # a workdir of that name is no config
    assert extensions.read_config("digits_ig") == by_path
    known = ", ".join(CONFIGS)
    with pytest.raises(InputError, match=f"one of {known}; did you mean digits_ig"):
        extensions.read_config("configs/digit_ig.py")


def test_messages_name_configs_as_they_are_found_anywhere():
    """Only a checkout has a folder of that name."""
    texts = {path.name: path.read_text() for path in (ROOT / "ig_jax").rglob("*.py")}
    named = {name: re.findall(r"--config=([\w./]+)", text) for name, text in texts.items()}
    named = {name: set(found) - {"FILE"} for name, found in named.items() if found}
    assert {"main.py", "latents.py"} <= set(named)
    assert not [name for name, found in named.items() if not found <= set(CONFIGS)], named


def test_version(capsys):
    assert main.main(["ig-jax", "--version"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"ig_jax {ig_jax.__version__} (jax ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "system,machine,python,expected",
    [
        ("linux", "x86_64", "3.11", ["tensorflow-cpu"]),
        ("linux", "aarch64", "3.13", ["tensorflow"]),
        ("win32", "AMD64", "3.13", ["tensorflow-cpu"]),
        ("darwin", "arm64", "3.12", ["tensorflow"]),
        ("linux", "x86_64", "3.14", []),
        ("darwin", "arm64", "3.14", []),
    ],
)
def test_one_tensorflow_where_there_are_wheels(system, machine, python, expected):
    requirements = map(Requirement, TOML["project"]["dependencies"])
    platform = {"sys_platform": system, "platform_machine": machine, "python_version": python}
    chosen = [
        r.name
        for r in requirements
        if r.name in ("tensorflow", "tensorflow-cpu") and r.marker.evaluate(platform)
    ]
    assert chosen == expected


# As on the newest Python, for which TensorFlow has no wheels.
WITHOUT_TENSORFLOW = """
import importlib.machinery

found = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] == "tensorflow" else found(name, path, target)

importlib.machinery.PathFinder.find_spec = find_spec
"""
SMALL = ("train.num_steps=2", "train.sample_every=0", "evaluation.at_end=False", "model.width=32")
SMALL = tuple(f"--config.{name}" for name in (*SMALL, "model.depth=3", "model.heads=2"))


@pytest.mark.slow
def test_without_tensorflow_the_digits_train_sample_and_evaluate(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TENSORFLOW)

    def run(*command):
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        command = (sys.executable, *command)
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    program = ("-m", "ig_jax.main", "--workdir=w")
    trained = run(*program, "--config=digits_ig", *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert "no TensorBoard files, as TensorFlow is not installed" in trained.stderr
    sampled = run(*program, "--mode=sample", "--config.sampler.num_samples=4")
    assert sampled.returncode == 0, sampled.stderr
    scored = run(*program, "--mode=evaluate", "--config.evaluation.num_samples=32")
    assert scored.returncode == 0, scored.stderr
    files = {path.name.split(".")[0] for path in (tmp_path / "w").iterdir()}
    assert {"metrics", "samples", "evaluation"} <= files and "events" not in files

    refused = run(*program[:2], "--workdir=t", "--config=cifar10_ig")
    assert refused.returncode == 2 and not (tmp_path / "t").exists()
    line = refused.stderr.splitlines()[-1]
    assert line.startswith("ig_jax: TFDS cifar10 needs TensorFlow, which is not installed"), line
    names = "from ig_jax.data.images import imagenet_names as names; print(len(names()))"
    assert run("-c", names).stdout == "1000\n"


SHOW = """
import ig_jax
from ig_jax import config, extensions
print(ig_jax.__file__)
for name in extensions.built_in_configs():
    config.validate(extensions.read_config(name))
    print(name)
"""


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder_has_its_configs(tmp_path):
    """Built from a copy, installed without its dependencies, run far from the checkout."""
    source, place, empty = (tmp_path / name for name in ("source", "place", "empty"))
    empty.mkdir()
    for name in ("ig_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip"]
    flags = ["--quiet", "--no-deps", "--no-index"]
    wheel = [*pip, "wheel", *flags, "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(wheel, check=True, capture_output=True)
    [built] = tmp_path.glob("*.whl")
    assert built.name == f"ig_jax-{ig_jax.__version__}-py3-none-any.whl"
    subprocess.run([*pip, "install", *flags, "--target", place, built], check=True)
    files = {path.relative_to(place / "ig_jax") for path in place.glob("ig_jax/**/*.py")}
    files = {path for path in files if path.parts[0] != "configs"}
    assert files == {path.relative_to(ROOT / "ig_jax") for path in ROOT.glob("ig_jax/**/*.py")}
    assert (place / "ig_jax" / "py.typed").exists()

    def run(*command):
        environment = os.environ | {"PYTHONPATH": str(place)}
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)

    shown = run(sys.executable, "-c", SHOW)
    assert shown.stdout.splitlines() == [f"{place}/ig_jax/__init__.py", *CONFIGS], shown.stderr
    program = place / "bin" / "ig-jax"
    assert run(program, "--version").stdout.startswith(f"ig_jax {ig_jax.__version__} ")
    assert ", ".join(CONFIGS[:3]) in run(program, "--help").stdout
    found = run(program, "--config=digits_ig")
    assert found.returncode == 2 and found.stderr.startswith("ig_jax: --workdir=DIR expected")
    trained = run(program, "--config=digits_ig", "--workdir=w", *SMALL)
    assert trained.returncode == 0 and "trained 2 steps" in trained.stdout, trained.stderr
    assert (empty / "w" / "metrics.jsonl").exists()
