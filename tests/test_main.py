import subprocess
import sys

import pytest

from ig_jax import main


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ig_jax.main", *arguments], capture_output=True, text=True
    )


def test_without_arguments_it_shows_how_to_start():
    done = run()
    assert done.returncode == 0
    assert "--config=configs/digits_ig.py --workdir=" in done.stdout and not done.stderr


def test_help_lists_every_mode():
    done = run("--help")
    assert done.returncode == 0
    for mode, (line, _) in main.MODES.items():
        assert f"  {mode} " in done.stdout and line in done.stdout


CONFIG = "--config=configs/digits_ig.py"


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--mode=train"], "--config=FILE (and --workdir=DIR) expected"),
        (["--config=nowhere.py"], "--config is 'nowhere.py': expected an existing file"),
        ([CONFIG], "--workdir=DIR expected"),
        ([CONFIG, "--workdir={}", "--mode=smaple"], "did you mean sample"),
        ([CONFIG, "--workdir={}", "--config.train.num_stps=1"], "did you mean num_steps?"),
        (
            [CONFIG, "--workdir={}", "--config.train.num_steps=abc"],
            "config.train.num_steps is 'abc': expected a value like",
        ),
        (
            [CONFIG, "--workdir={}", "--config.guidance.ig_interval=(0.9,0.1)"],
            "config.guidance.ig_interval is (0.9, 0.1): expected",
        ),
        (["--mode=sample", "--workdir={}"], "no checkpoint in"),
        (
            [CONFIG, "--workdir={}", "--mod=train"],
            "Unknown command line flag 'mod'. Did you mean: mode",
        ),
    ],
)
def test_bad_flags_get_one_line(arguments, message, tmp_path):
    done = run(*(a.format(tmp_path / "w") for a in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("ig_jax: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "w").exists()


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
