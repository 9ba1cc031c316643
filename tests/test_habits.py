"""Files that people and services read beside the code: they parse, and what they name exists."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

import ig_jax

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
YAML = sorted([*ROOT.glob(".github/**/*.yml"), *ROOT.glob(".*.yaml"), *ROOT.glob("*.cff")])
# Installed by the person or job that wants it, or there on every machine: no part of the tests.
ELSEWHERE = {"pre-commit", "uv", "gh", "grep"}


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def commands():
    """(where, words) of every command of the workflows, the hooks and CONTRIBUTING.md."""
    for path in ROOT.glob(".github/workflows/*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            for step in job["steps"]:
                for line in step.get("run", "").splitlines():
                    yield path.name, shlex.split(line)
    for repository in read(".pre-commit-config.yaml")["repos"]:
        for hook in repository["hooks"]:
            yield hook["id"], shlex.split(hook["entry"])
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    for line in "".join(blocks).splitlines():
        yield "CONTRIBUTING.md", shlex.split(line)


def is_there(program):
    if program in ELSEWHERE or program in PROJECT["scripts"]:
        return True
    beside = pathlib.Path(sys.executable).parent
    return (ROOT / program).is_file() or shutil.which(program, path=beside)


def test_commands_exist():
    seen = {}
    for where, (program, *words) in commands():
        assert is_there(program), f"{where}: {program} is not there"
        for word in words:
            for extra in re.findall(r"^\.\[([\w,]+)\]$", word):
                assert set(extra.split(",")) <= set(PROJECT["optional-dependencies"]), where
            if re.fullmatch(r"[\w.]+/[\w./]+", word):
                assert (ROOT / word).exists(), f"{where}: {word} is not there"
        seen.setdefault(program, where)
    lint = {"ruff", "lint-imports", "mypy", "shellcheck", "hadolint"}
    assert lint | {"pip", "pytest", "mkdocs", "ig-jax", ".ci/run"} <= set(seen)
    assert not is_there("ruf")


def workflow(name):
    content = read(f".github/workflows/{name}.yml")
    return content | {"on": content[True]}  # YAML reads "on" as a boolean


@pytest.mark.parametrize("name", ["tests", "docs", "release"])
def test_workflows_ask_for_little(name):
    """No rights but those that a job needs, an end in time, and actions of known versions."""
    assert workflow(name)["permissions"] == {"contents": "read"}
    for job in workflow(name)["jobs"].values():
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1"))
        if "write" in job.get("permissions", {}).values():
            assert workflow(name)["on"].keys() == {"push"} or "push" in job["if"]


def test_ci_runs_both_ends_of_what_is_admitted():
    jobs = workflow("tests")["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["versions"] == ["lowest-direct", "highest"]
    assert any("${{ matrix.versions }}" in s.get("run", "") for s in jobs["tests"]["steps"])
    assert not set(jobs["lint"]["steps"][-1]) - {"run"}
    assert jobs["lint"]["steps"][-1]["run"].startswith("pre-commit run --all-files")


def test_a_release_is_a_tag_of_this_version():
    release = workflow("release")
    assert release["on"] == {"push": {"tags": ["v*"]}}
    checks = [s["run"] for s in release["jobs"]["build"]["steps"] if "grep" in s.get("run", "")]
    for tag, code in ((f"v{ig_jax.__version__}", 0), ("v9.9.9", 1)):
        for check in checks:
            done = subprocess.run(["bash", "-c", check], cwd=ROOT, env={"GITHUB_REF_NAME": tag})
            assert done.returncode == code, check
    assert len(checks) == 2 and release["jobs"]["publish"]["needs"] == "build"


def test_hooks_check_every_file_of_their_kind():
    """What a hook's pattern misses would never be checked."""
    hooks = {hook["id"]: hook for hook in read(".pre-commit-config.yaml")["repos"][0]["hooks"]}
    kinds = {"hadolint": "launch/*Dockerfile*", "notebook": "**/*.ipynb", "mypy": "ig_jax/**/*.py"}
    for name, pattern in kinds.items():
        files = [str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)]
        assert files and all(re.search(hooks[name]["files"], file) for file in files), name


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_parses(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_ci_runs_the_versions_that_are_promised():
    matrix = read(".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    low, past = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    expected = [f"3.{minor}" for minor in range(int(low), int(past))]
    assert matrix == expected
    prefix = "Programming Language :: Python :: "
    assert [c.removeprefix(prefix) for c in PROJECT["classifiers"] if prefix in c] == expected


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_issue_forms(name):
    """GitHub shows a form only if it has these keys, and at least one field that asks."""
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    assert all(item["type"] in ("markdown", "textarea", "input") for item in form["body"])
    assert all(item["attributes"]["label"] for item in form["body"])
    ids = [item["id"] for item in form["body"]]
    assert len(set(ids)) == len(ids) > 0


def test_the_citation_is_the_readmes():
    citation, readme = read("CITATION.cff"), (ROOT / "README.md").read_text()
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == ig_jax.__version__ and citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    names = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    assert f"title     = {{{paper['title']}}}" in readme
    assert f"author    = {{{' and '.join(names)}}}" in readme
    assert (
        paper["url"].rpartition("/")[2] in readme and f"year      = {{{paper['year']}}}" in readme
    )


def test_the_changelog_ends_in_this_version_or_what_follows():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert released[0].split()[0] == ig_jax.__version__
    assert headings.index(released[0]) <= 1
