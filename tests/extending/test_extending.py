"""The test of the house: a rule, a sampler with memory, a network with its own loss, a data set and
a metric, each one file outside the package, trained, sampled, swept and evaluated from the command
line. The files are the examples of docs/extending.md."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from ig_jax import extensions
from ig_jax.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, flags=re.S))
LONGER = {"waves.py": 60}


@pytest.fixture
def tables():
    """Gives the tables back as they were."""
    before = {what: dict(extensions.table(what)) for what in extensions.TABLES}
    yield
    for what, rows in before.items():
        extensions.table(what).clear()
        extensions.table(what).update(rows)


@pytest.fixture
def files(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_every_table_has_an_example_of_a_screenful(files, tables):
    before = {what: set(extensions.table(what)) for what in extensions.TABLES}
    extensions.load([str(files / name) for name in FILES])
    assert all(set(extensions.table(what)) > names for what, names in before.items())
    for name, text in FILES.items():
        assert len(text.strip().splitlines()) <= LONGER.get(name, 40), name


def test_the_package_knows_none_of_them(tables, files):
    before = {what: set(extensions.table(what)) for what in extensions.TABLES}
    extensions.load([str(files / name) for name in FILES])
    new = {name for what, names in before.items() for name in set(extensions.table(what)) - names}
    for path in (ROOT / "ig_jax").rglob("*.py"):
        words = {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant)
        }
        assert not words & new, path


TAKEN = "from ig_jax.diffusion.guidance import RULES\nRULES['linear'] = None\n"


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("missing.py", None, "expected an existing Python file"),
        ("broken.py", "1 / 0\n", "it failed with the error above"),
        ("syntax.py", "def\n", "it failed with the error above"),
        ("taken.py", TAKEN, "registers the guidance rule 'linear', a name that is taken"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path, capsys, tables, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        extensions.load([str(path)])
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    # Its own traceback, that once, where it is the file that failed.
    assert ("Traceback" in capsys.readouterr().err) == ("above" in message)


def run(files, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "ig_jax.main", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done


SMALL = (
    "--config=configs/digits_ig.py --config.model.family=waves "
    "--config.data.name=negative_digits --config.loss.error=log_cosh "
    "--config.model.width=16 --config.model.auxiliary_depth=1 "
    "--config.train.num_steps=3 --config.train.batch_size=8 --config.sampler.name=ab3 "
    "--config.sampler.num_steps=4 --config.sampler.num_samples=8 --config.sampler.batch_size=64 "
    "--config.guidance.ig_rule=clipped(limit=0.5) --config.evaluation.num_samples=64 "
    "--config.evaluation.at_end=False --config.evaluation.features=digits "
    "--config.sweep.num_samples=64 "
    "--config.sweep.metric=mean_shift "
    "--config.sweep.ig_scales=(1.0,1.5,2.0) --config.sweep.ig_intervals=(0.0,1.0) "
    "--config.evaluation.ig_scales=() --config.sweep.bootstrap=2 "
    "--config.evaluation.features=raw_pixels"
)


@pytest.mark.slow
def test_they_train_sample_sweep_and_evaluate_from_the_command_line(files):
    imports = [f"--import={files / name}" for name in FILES]
    workdir = files / "run"
    done = run(files, *imports, *SMALL.split(), f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    pixels = "--config.evaluation.features=raw_pixels"
    for mode, *options in (["sample"], ["sweep", pixels], ["evaluate"]):
        done = run(files, *imports, f"--mode={mode}", f"--workdir={workdir}", *options)
        assert done.returncode == 0, done.stderr
    assert "shift of the mean" in done.stdout
    (record,) = (workdir / "samples").glob("*/protocol.json")
    assert "clipped(limit=0.5)" in record.read_text() and "ab3" in record.read_text()
    best = json.loads((workdir / "sweep" / "sweep.json").read_text())
    assert "mean_shift" in json.dumps(best)
    # Without the imports, what is missing is named, and which file brings it.
    done = run(files, "--mode=sample", f"--workdir={workdir}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--import" in done.stderr and "my_rule.py" in done.stderr
