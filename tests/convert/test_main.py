"""The conversion command: a file becomes a workdir, and a workdir a file, without a loss."""

from __future__ import annotations

import numpy as np
import pytest

from ig_jax.convert.__main__ import main
from ig_jax.storage import weight_files
from ig_jax.storage.checkpoints import saved_config
from tests.common import golden
from tests.release import random_weights, release_shapes, rope_buffers

WEIGHTS = "lightningdit_params_qknorm_noshift"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "weights.safetensors"
    weight_files.write_safetensors(path, golden(WEIGHTS) | rope_buffers(4, 8))
    return path


def test_there_and_back(source, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main([str(source), f"--workdir={workdir}", "--auxiliary_depth=2"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(
        "lightningdit, 4 blocks of width 32, 4 heads, patch 1, input 4×4×8, 10 classes, "
        "auxiliary head after block 2, "
    )
    assert said.out.count("\n") == 1 and not said.err

    out = tmp_path / "out.safetensors"
    assert main([f"--workdir={workdir}", f"--to_pytorch={out}"]) == 0
    actual = weight_files.read_checkpoint(out)
    # The rotary buffers are made anew: a workdir holds nothing but parameters.
    assert set(actual) == set(weight_files.read_checkpoint(source))
    for name, array in rope_buffers(4, 8).items():
        np.testing.assert_allclose(actual[name], array, atol=2e-6)
    for name, array in golden(WEIGHTS).items():
        assert actual[name].tobytes() == array.tobytes(), name


def test_guessed_family_is_said(tmp_path, capsys):
    shape = dict(width=24, depth=3, heads=2, patch=2, channels=3, tokens=9, classes=5)
    weights = random_weights(release_shapes(**shape, auxiliary=False, learned_sigma=True))
    weight_files.write_safetensors(tmp_path / "a.safetensors", weights)
    source = str(tmp_path / "a.safetensors")
    assert main([source, f"--workdir={tmp_path}/run", "--heads=2"]) == 0
    said = capsys.readouterr()
    assert "no auxiliary head" in said.out
    assert "taken for a DiT, which predicts noise" in said.err and said.err.count("\n") == 1
    config = saved_config(f"{tmp_path}/run")
    assert (config.model.family, config.model.auxiliary_depth) == ("dit", 0)
    assert (config.loss.path, config.loss.prediction) == ("vp", "noise")
    assert main([source, f"--workdir={tmp_path}/sit", "--heads=2", "--family=sit"]) == 0
    assert not capsys.readouterr().err
    assert saved_config(f"{tmp_path}/sit").loss.prediction == "velocity"


def test_what_is_left_out_is_said_in_one_line(tmp_path, capsys):
    weights = golden(WEIGHTS) | {"projectors.0.0.weight": np.ones((4, 32), np.float32)}
    weight_files.write_safetensors(tmp_path / "repa.safetensors", weights)
    source = f"{tmp_path}/repa.safetensors"
    assert main([source, f"--workdir={tmp_path}/run", "--auxiliary_depth=2"]) == 0
    assert capsys.readouterr().err == (
        f"ig_jax: {source}: left out projectors.* (1 weights), a head that only training needs\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: --workdir"),
        (["--workdir={tmp}/run"], "expected either a SOURCE to convert, or --to_pytorch=FILE"),
        (["{source}", "--workdir={tmp}/run"], "give auxiliary_depth, 1…3"),
        (["{source}", "--workdir={tmp}/run", "--heads=four"], "--heads: invalid int value: 'four'"),
        (["{source}", "--workdir={tmp}/run", "--head=4"], "unrecognized arguments: --head=4"),
        (["{source}", "--workdir={tmp}/run", "--raw"], "--raw has no meaning here: leave it out"),
        (["{tmp}/none.pt", "--workdir={tmp}/run"], "none.pt: found no such file"),
        (["--workdir={tmp}/run", "--to_pytorch={tmp}/a.safetensors"], "no checkpoint in"),
        (["--workdir={tmp}/run", "--to_pytorch=a", "--heads=4"], "leave it out with --to_pytorch"),
        (["--workdir={tmp}/run", "--to_pytorch=a.pt"], "'a.pt': expected a .safetensors file"),
        (
            ["--workdir={tmp}/run", "--to_pytorch=a.safetensors", "--step=x"],
            "--step is 'x': expected",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(source, tmp_path, capsys, arguments, message):
    assert main([a.format(source=source, tmp=tmp_path) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("ig_jax: ")
    assert not list(tmp_path.iterdir())
