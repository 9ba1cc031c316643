"""Files that people and services read beside the code: they parse, and what they name exists."""

import pathlib
import re
import shlex
import shutil
import sys
import tomllib

import pytest
import yaml

import ig_jax

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
YAML = sorted([*ROOT.glob(".github/**/*.yml"), *ROOT.glob(".*.yaml"), *ROOT.glob("*.cff")])
# Installed by the person who wants it: it is no part of the tests.
BY_HAND = {"pre-commit"}


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
    beside = pathlib.Path(sys.executable).parent
    return (ROOT / program).is_file() or shutil.which(program, path=beside) or program in BY_HAND


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
    assert {"pip", "pytest", "ruff", "lint-imports", "shellcheck", ".ci/run"} <= set(seen)
    assert not is_there("ruf")


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
