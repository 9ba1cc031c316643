"""Rot: every file of the newest checkpoint is truncated, flipped, deleted and replaced in turn.

Train, sample and evaluate then give what they would have given, go back to the checkpoint before
with a line, or stop with a line: never a traceback, never silently something else.
"""

import collections
import pathlib
import shutil

import jax
import numpy as np
import pytest

from ig_jax.errors import InputError, OneLineError
from ig_jax.evaluation import run as evaluation
from ig_jax.parallel import sharding
from ig_jax.sampling import run as sampling
from ig_jax.storage.checkpoints import Checkpoints, resumed_config, saved_config
from ig_jax.training import loop
from ig_jax.training.setup import Setup
from tests.common import tiny_config

OLDER, NEWEST = 2, 4


def flip(path):
    content = bytearray(path.read_bytes())
    if not content:
        return False
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    return True


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return bool(content)


def delete(path):
    path.unlink()
    return True


def replace(path):
    """By what another file of its kind holds, as after a copy that went wrong."""
    other = next(p for p in path.parents if p.name == str(NEWEST)).with_name(str(OLDER))
    twins = sorted(other.rglob(path.name)) or sorted(other.rglob("_METADATA"))
    content = twins[0].read_bytes()
    if content == path.read_bytes():
        content = b"\x00" * len(content)
    path.write_bytes(content)
    return True


DAMAGES = (flip, truncate, delete, replace)


@pytest.fixture(scope="module")
def one_device():
    """What is read hundreds of times is placed on one device, which is far faster."""
    with pytest.MonkeyPatch.context() as patch:
        make = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda *_, **__: make(1, 1, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def setup(one_device, tmp_path_factory):
    """A run of four steps with checkpoints of the last and the second."""
    config = tiny_config(num_steps=NEWEST, checkpoint_every=OLDER, validate_every=0)
    config.sampler.update(num_samples=8, batch_size=8, num_steps=2)
    setup = Setup.from_config(config, tmp_path_factory.mktemp("rot") / "w")
    loop.train(setup)
    return setup


@pytest.fixture
def engine(setup, monkeypatch):
    """The modes' own code, but for what is compiled, once, and for the scores."""
    made = sampling.make_engine(setup.experiment)
    monkeypatch.setattr(sampling, "make_engine", lambda experiment: made)
    monkeypatch.setattr(
        evaluation, "evaluate", lambda experiment, weights, *_, **__: [weights.hash]
    )
    monkeypatch.setattr(evaluation.report, "report", lambda results, workdir: results[0])


def train(workdir, setup):
    """What a resumed run starts from: the step, and a hash of all that it restores."""
    assert resumed_config(workdir) is not None
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.resume(setup.programs.shapes)
    checkpoints.close()
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(restored.state)]
    return int(restored.state.step), restored.data, b"".join(leaf.tobytes() for leaf in leaves)


def sample(workdir, setup):
    sampling.run(saved_config(workdir), str(workdir))
    (folder,) = (path for path in (workdir / "samples").iterdir() if path.is_dir())
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def evaluate(workdir, setup):
    return evaluation.run(saved_config(workdir), str(workdir))


MODES = {"train": train, "sample": sample, "evaluate": evaluate}


def outcome(mode, workdir, setup):
    """What a mode does in a workdir, or the line with which it stops."""
    try:
        return MODES[mode](workdir, setup)
    except OneLineError as error:
        assert isinstance(error, InputError) and "\n" not in str(error), error
        assert str(workdir) in str(error), error
        return "line"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_rot(mode, setup, engine, tmp_path, record_property):
    made = pathlib.Path(setup.workdir)

    def copy(name):
        return pathlib.Path(shutil.copytree(made, tmp_path / name))

    expected = outcome(mode, copy("whole"), setup)
    older = copy("older")
    shutil.rmtree(older / "checkpoints" / str(NEWEST))
    allowed = {"same": expected}
    if mode == "train":
        allowed["passed over"] = outcome(mode, older, setup)
        assert allowed["passed over"][0] == OLDER
    newest = pathlib.Path("checkpoints", str(NEWEST))
    files = sorted(p for p in (made / newest).rglob("*") if p.is_file())
    found = collections.Counter()
    for i, (file, damage) in enumerate((f, d) for f in files for d in DAMAGES):
        workdir = copy(str(i))
        name = file.relative_to(made)
        if damage(workdir / name):
            got = outcome(mode, workdir, setup)
            what = [kind for kind, value in allowed.items() if got == value]
            assert what or got == "line", f"{mode}: {damage.__name__} {name} changes the result"
            assert mode != "train" or what, f"{damage.__name__} {name} stops training"
            found[(what or ["line"])[0]] += 1
        shutil.rmtree(workdir)
    assert found["passed over" if mode == "train" else "line"] > 20
    counts = ", ".join(f"{count} {kind}" for kind, count in found.items())
    record_property("tried", f"rot in {mode}: {found.total()} cases ({counts})")
