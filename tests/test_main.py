import inspect
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from absl import flags
from absl.testing import flagsaver

from ig_jax import config as config_lib
from ig_jax import main
from ig_jax.errors import EXIT_CODES, Exit, InputError, NotFiniteError, Stopped
from ig_jax.evaluation import run as evaluation
from ig_jax.evaluation import sweep
from ig_jax.sampling import run as sampling
from ig_jax.training import run as training
from tests.common import tiny_config
from tests.test_paths import save


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ig_jax.main", *arguments], capture_output=True, text=True
    )


def test_without_arguments_it_shows_how_to_start():
    done = run()
    assert done.returncode == 0
    assert "--config=digits_ig --workdir=" in done.stdout and not done.stderr


def test_help_lists_every_mode():
    done = run("--help")
    assert done.returncode == 0
    for mode, (line, _) in main.MODES.items():
        assert f"  {mode} " in done.stdout and line in done.stdout
    assert set(EXIT_CODES) == set(Exit)
    for code, meaning in EXIT_CODES.items():
        assert f"{int(code):5}  {meaning}\n" in done.stdout


def test_the_readme_has_the_table_of_exit_codes():
    readme = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    for code, meaning in EXIT_CODES.items():
        assert f"| {int(code)} | {meaning} |\n" in readme


CONFIG = "--config=configs/digits_ig.py"


SHOW = """
import json, sys
from ig_jax import main

def show(config, workdir):
    print(json.dumps({"workdir": workdir, **config.to_dict()}))
    return "done"

main.MODES["train"] = ("", show)
sys.exit(main.main(sys.argv))
"""


@pytest.mark.parametrize("prefix,suffix", [("", ""), ("~/", "/")])
def test_paths_as_typed(tmp_path, prefix, suffix):
    """Every flag that takes a path, from a folder that is also the home."""
    (tmp_path / "my.py").write_text("from tests.common import tiny_config as get_config\n")
    typed = {field: f"{prefix}{field}{suffix}" for field in ("w", *config_lib.PATH_FIELDS)}
    fields = [f"--config.{name}={typed[name]}" for name in config_lib.PATH_FIELDS]
    done = subprocess.run(
        [sys.executable, "-c", SHOW, f"--config={prefix}my.py", f"--workdir={typed['w']}", *fields],
        cwd=tmp_path,
        env=os.environ
        | {"HOME": str(tmp_path), "PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    values, last_line = done.stdout.splitlines()
    values = json.loads(values)
    assert last_line == "done" and values["workdir"] == str(tmp_path / "w")
    for field in config_lib.PATH_FIELDS:
        section, name = field.split(".")
        assert values[section][name] == str(tmp_path / field)
    assert [p.name for p in tmp_path.iterdir()] == ["my.py"]


@pytest.fixture
def called(monkeypatch):
    """What the rooms are called with, in their place; flags are as before afterwards."""
    calls = []

    def replace(room):
        names = inspect.signature(room.run)

        def stand_in(*arguments):
            values = dict(names.bind(*arguments).arguments)
            del values["config"]
            calls.append(values)
            return ""

        monkeypatch.setattr(room, "run", stand_in)

    for room in (training, sampling, evaluation, sweep):
        replace(room)
    with flagsaver.flagsaver():
        yield calls


def call(mode, *arguments, **evaluation):
    config = tiny_config()
    config.evaluation.update(evaluation)
    flags.FLAGS(["ig_jax", *arguments])
    return main.run_mode(mode, config)


@pytest.mark.parametrize("mode", ["sample", "evaluate", "sweep"])
@pytest.mark.parametrize(
    "step,found", [((), 9), (("--step=last",), 9), (("--step=best",), 4), (("--step=7",), 7)]
)
def test_step(called, tmp_path, mode, step, found):
    save(tmp_path, 2, 4, 7, 9, scores={4: 0.1, 7: 0.2})
    call(mode, f"--workdir={tmp_path}/checkpoints/", *step)
    assert called == [{"workdir": str(tmp_path), "which": found}]


@pytest.mark.parametrize(
    "error,code,line",
    [
        (Stopped("stopped at step 3"), Exit.STOPPED, "ig_jax: stopped at step 3"),
        (InputError("x is 1"), Exit.BAD_INPUT, "ig_jax: x is 1"),
        (NotFiniteError("the loss is"), Exit.NOT_FINITE, "ig_jax: the loss is"),
        (KeyboardInterrupt(), Exit.INTERRUPTED, "ig_jax: interrupted"),
    ],
)
def test_how_a_mode_ends(called, tmp_path, monkeypatch, capsys, error, code, line):
    def ends(*_):
        raise error

    monkeypatch.setattr(training, "run", ends)
    try:
        ended = call("train", f"--workdir={tmp_path}")
    except SystemExit as leaving:
        ended = leaving.code
    assert ended == code
    assert capsys.readouterr() == ("", f"{line}\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_training_is_no_success(tmp_path, number):
    """`train && evaluate` does not go on, and the same command does."""
    (tmp_path / "tiny.py").write_text("from tests.common import tiny_config as get_config\n")
    checkpoints = tmp_path / "w" / "checkpoints"
    command = [sys.executable, "-m", "ig_jax.main", f"--config={tmp_path}/tiny.py"]
    command += [f"--workdir={tmp_path}/w", "--config.train.checkpoint_every=2"]
    child = subprocess.Popen(
        [*command, "--config.train.num_steps=1000000"], stderr=subprocess.PIPE, text=True
    )
    try:
        while child.poll() is None and not (checkpoints / "2").exists():
            time.sleep(0.1)
        child.send_signal(number)
        _, stderr = child.communicate()
    finally:
        child.kill()
    assert child.returncode == Exit.STOPPED, stderr
    last = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    assert f"ig_jax: stopped at step {last}, checkpoint saved; the same command cont" in stderr
    done = run(*command[3:], f"--config.train.num_steps={last + 1}")
    assert done.returncode == Exit.COMPLETE, done.stderr
    assert f"trained {last + 1} steps" in done.stdout


TINY = [
    "--config.model.width=32",
    "--config.model.depth=3",
    "--config.model.heads=2",
    "--config.model.auxiliary_depth=1",
    "--config.train.num_steps=4",
    "--config.train.batch_size=16",
    "--config.train.checkpoint_every=4",
    "--config.train.sample_every=4",
    "--config.train.log_every=2",
    "--config.sampler.num_steps=3",
    "--config.sampler.num_samples=16",
    "--config.sampler.batch_size=64",
    "--config.evaluation.num_samples=128",
    "--config.sweep.num_samples=512",
]


@pytest.mark.slow
def test_the_readmes_commands_on_a_tiny_model(tmp_path):
    """Train, sample, evaluate, search and use what was found, as a user would type it."""
    workdir = f"--workdir={tmp_path}"
    commands = {
        "train": ([CONFIG, workdir, *TINY], "trained 4 steps"),
        "sample": (["--mode=sample", workdir, "--config.guidance.ig_scale=1.5"], "16 samples"),
        "evaluate": (["--mode=evaluate", workdir], "scores with their protocol"),
        "sweep": (["--mode=sweep", workdir], "best: IG"),
        "best": (["--mode=sample", workdir, "--guidance=best"], "16 samples"),
    }
    for name, (arguments, expected) in commands.items():
        done = run(*arguments)
        assert done.returncode == 0, (name, done.stderr[-2000:])
        assert expected in done.stdout.replace("\n", " "), (name, done.stdout[-2000:])
    assert (tmp_path / "samples" / "scales.png").exists()
    results = sorted((tmp_path / "evaluation").glob("step_*.json"))
    done = run("--mode=evaluate", "--compare", str(results[0]), str(results[-1]))
    assert done.returncode == 0, done.stderr
