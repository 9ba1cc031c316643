"""Kills: what SIGKILL, SIGTERM and Ctrl-C interrupt at random moments, and a full disk at the worst
one, continues bit for bit.

The commands run in processes forked from one that has imported everything, several at a time; what
they compile is kept for the next. Each test prints how many interruptions it tried.
"""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from ig_jax.data import digits
from ig_jax.errors import Exit
from ig_jax.experiment import Experiment
from ig_jax.storage.checkpoints import Checkpoints
from tests.common import golden, seeded_weights, tiny_config

pytestmark = pytest.mark.slow

SIDE_BY_SIDE = 3
# How a run may end that gets a signal before it is complete.
ENDS = {
    signal.SIGKILL: (-signal.SIGKILL,),
    signal.SIGTERM: (-signal.SIGTERM, 128 + signal.SIGTERM, Exit.STOPPED),
    signal.SIGINT: (Exit.INTERRUPTED, Exit.STOPPED),
}
IMPORTS = ("ig_jax.main", "ig_jax.training.run", "ig_jax.sampling.run", "ig_jax.evaluation.sweep")


def _child(arguments: list[str], log: pathlib.Path, largest: int) -> None:
    """The command line as a process of its own has it."""
    os.environ["XLA_FLAGS"] = ""  # one device, as on a user's machine
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    output = os.open(log, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    from ig_jax import stops
    from ig_jax.main import main

    sys.argv = ["ig_jax", *arguments]
    stops.watch(sys.argv)
    sys.exit(main())


class Command:
    """A command line that is run in a workdir of its own, with its whole output in one log.

    Args:
        log: where its output goes.
        arguments: of the program.
    """

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clu.metric_writers", *IMPORTS, __name__])

    def __init__(self, log: pathlib.Path, *arguments: str):
        self.log, self.arguments, self.codes = log, list(arguments), []

    def run(
        self,
        kill: signal.Signals | None = None,
        after: float = 0.0,
        largest: int = resource.RLIM_INFINITY,
    ) -> int:
        """Runs it to its end, or sends a signal after some seconds; returns the exit code.

        No file may grow beyond the `largest` number of bytes.
        """
        process = self.context.Process(target=_child, args=(self.arguments, self.log, largest))
        process.start()
        if kill is not None:
            process.join(after)
            if process.exitcode is None:
                os.kill(process.pid, kill)
        process.join(120)
        assert process.exitcode is not None, f"{self.arguments} hangs: {self.said()}"
        self.codes.append(process.exitcode)
        return process.exitcode

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def finish(self) -> None:
        assert self.run() == Exit.COMPLETE, self.said()
        assert "Traceback" not in self.log.read_text(errors="replace"), self.said()


def timed(command: Command) -> float:
    """Runs a command undisturbed; returns the seconds that it takes."""
    command.finish()
    begun = time.monotonic()
    shutil.rmtree(command.workdir)
    command.finish()
    return time.monotonic() - begun


def side_by_side(work, cases) -> list:
    with concurrent.futures.ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(pool.map(work, cases))


def train_config():
    config = tiny_config(num_steps=40, checkpoint_every=4, validate_every=0, log_every=5)
    config.sampler.update(num_samples=48, batch_size=8, num_steps=4)
    config.evaluation.update(num_samples=64)
    config.sweep.update(
        ig_scales=(1.0, 1.5), ig_intervals=(0.0, 1.0), num_samples=64, budget=256, bootstrap=5
    )
    return config


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A config as a person writes it."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    values = json.dumps(train_config().to_dict())
    path.write_text(
        "import json\nfrom ig_jax.config import from_json\n\n\n"
        f"def get_config():\n    return from_json(json.loads({values!r}))\n"
    )
    return path


def train(folder, config_file) -> Command:
    command = Command(folder / "log.txt", f"--config={config_file}", f"--workdir={folder / 'w'}")
    command.workdir = folder / "w"
    return command


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory):
    """A finished training, and the seconds that it takes."""
    command = train(tmp_path_factory.mktemp("undisturbed"), config_file)
    seconds = timed(command)
    return command.workdir, seconds


def trained(workdir) -> list[np.ndarray]:
    """All weights of the last checkpoint."""
    shapes = Experiment.from_config(train_config()).abstract_params()
    checkpoints = Checkpoints(workdir, read_only=True)
    assert checkpoints.step() == train_config().train.num_steps
    import jax

    trees = [checkpoints.weights(shapes, "last", ema) for ema in (True, False)]
    checkpoints.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trees)]


def assert_trained_alike(workdir, expected) -> None:
    for found, wanted in zip(trained(workdir), trained(expected), strict=True):
        np.testing.assert_array_equal(found, wanted)


def interrupted(command: Command, kinds, seconds: float, seed: int) -> list[int]:
    """Sends each signal at a random moment of a run; tries again where it came too late."""
    rng, codes = random.Random(seed), []
    for kind in kinds:
        for _ in range(4):
            code = command.run(kind, rng.uniform(0.0, 1.1 * seconds))
            if code != Exit.COMPLETE:
                break
            shutil.rmtree(command.workdir)
        assert code in (Exit.COMPLETE, *ENDS[kind]), (code, command.said())
        codes.append(code)
    return codes


def test_training_killed_25_times(undisturbed, config_file, tmp_path, record_property):
    workdir, seconds = undisturbed

    def chain(seed):
        folder = tmp_path / str(seed)
        folder.mkdir()
        command = train(folder, config_file)
        codes = interrupted(command, [signal.SIGKILL] * 5, seconds, seed)
        command.finish()
        return command.workdir, codes.count(-signal.SIGKILL)

    found = side_by_side(chain, range(5))
    for other, _ in found:
        assert_trained_alike(other, workdir)
    killed = sum(count for _, count in found)
    record_property("tried", f"kills: {killed} SIGKILLs in train, 5 runs end bit-equal")
    assert killed >= 20


def test_training_stopped_12_times(undisturbed, config_file, tmp_path, record_property):
    workdir, seconds = undisturbed

    def chain(seed):
        folder = tmp_path / str(seed)
        folder.mkdir()
        command = train(folder, config_file)
        codes = interrupted(command, [signal.SIGTERM, signal.SIGINT] * 2, seconds, seed)
        command.finish()
        return command.workdir, codes

    found = side_by_side(chain, range(3))
    for other, _ in found:
        assert_trained_alike(other, workdir)
    codes = sorted(code for _, codes in found for code in codes)
    record_property(
        "tried", f"stops: SIGTERM and SIGINT at {len(codes)} moments of train, codes {codes}"
    )


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """What a command left, but for times of day and the pictures of plots."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "features" not in path.name
    }


def sampling(folder, workdir, mode) -> Command:
    """A command on a copy of a training's workdir; what it makes is in a folder of its own."""
    shutil.copytree(workdir, folder / "w")
    command = Command(folder / "log.txt", f"--mode={mode}", f"--workdir={folder / 'w'}")
    command.workdir = folder / "w" / {"sample": "samples", "sweep": "sweep"}[mode]
    return command


def preparing(folder, pictures) -> Command:
    command = Command(
        folder / "log.txt",
        "--mode=prepare",
        "--config=sit_xl_ig",
        f"--config.data.images={pictures / 'images'}",
        f"--config.data.path={folder / 'latents'}",
        f"--config.data.autoencoder_path={pictures / 'small.safetensors'}",
        "--config.data.autoencoder=small",
        "--config.data.image_size=16",
        "--config.model.input_size=8",
    )
    command.workdir = folder / "latents"
    return command


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures of two classes, and a small autoencoder."""
    root = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(digits.load()[0][:300]):
        folder = root / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.uint8((image[..., 0] + 1) * 127.5))
        grey.resize((24, 24)).save(folder / f"{i:03d}.png")
    shapes = json.loads(str(golden("vae_ldm_small")["shapes_json"]))
    save_file(seeded_weights(shapes), root / "small.safetensors")
    return root


KILLS = {"prepare": 3, "sample": 4, "sweep": 3}


@pytest.mark.parametrize("mode", KILLS)
def test_other_modes_killed(mode, undisturbed, pictures, tmp_path, record_property):
    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        if mode == "prepare":
            return preparing(folder, pictures)
        return sampling(folder, undisturbed[0], mode)

    whole = make("whole")
    seconds = timed(whole)
    command = make("killed")
    codes = interrupted(command, [signal.SIGKILL] * KILLS[mode], seconds, 0)
    command.finish()
    assert files(command.workdir) == files(whole.workdir)
    killed = codes.count(-signal.SIGKILL)
    record_property("tried", f"kills: {killed} SIGKILLs in {mode}, ends equal")
    assert killed


@pytest.fixture
def disk(tmp_path):
    """A disk of its own that can be made larger and smaller, in KiB; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(kib, how="remount,"):
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={kib}k", "none", str(place)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if sys.platform != "linux" or not resize(50_000, ""):
        pytest.skip("no disk can be mounted here")
    yield place, resize
    subprocess.run(["umount", "-l", str(place)], check=True)


def used(folder: pathlib.Path) -> int:
    return shutil.disk_usage(folder).used >> 10


def assert_one_line_on_the_disk(command: Command, said: str) -> None:
    assert command.codes[-1] == Exit.BAD_INPUT, command.said()
    assert "Traceback" not in command.log.read_text(errors="replace"), command.said()
    lines = [line for line in command.said().splitlines() if line.startswith("ig_jax: ")]
    assert len(lines) == 1 and said in lines[0], command.said()


FULL, LARGE = "No space left on device", "File too large"


def test_training_on_a_full_disk(undisturbed, config_file, disk, tmp_path, record_property):
    """The first checkpoint is whole, the next has no room; with room the same command goes on."""
    place, resize = disk
    command = train(place, config_file)
    command.log = tmp_path / "log.txt"
    size = sum(path.stat().st_size for path in (undisturbed[0] / "checkpoints" / "40").rglob("*"))
    assert resize(int(1.9 * size) >> 10)
    command.run()
    assert_one_line_on_the_disk(command, FULL)
    kept = [path.name for path in (command.workdir / "checkpoints").iterdir()]
    assert "4" in kept, kept
    assert resize(50_000)
    command.finish()
    assert "continuing from step" in command.said()
    assert_trained_alike(command.workdir, undisturbed[0])
    record_property("tried", "full disk: train stops with a line, and ends bit-equal")


def test_sampling_on_a_full_disk(undisturbed, disk, tmp_path):
    place, resize = disk
    (tmp_path / "whole").mkdir()
    whole = sampling(tmp_path / "whole", undisturbed[0], "sample")
    whole.finish()
    command = sampling(place, undisturbed[0], "sample")
    command.log = tmp_path / "log.txt"
    assert resize(used(place) + 40)
    command.run()
    assert_one_line_on_the_disk(command, FULL)
    assert resize(50_000)
    command.finish()
    assert files(command.workdir) == files(whole.workdir)


@pytest.mark.parametrize("mode,largest", [("train", 20_000), ("sample", 3_000)])
def test_files_that_may_not_grow(mode, largest, undisturbed, config_file, tmp_path):
    """A quota on files ends as a full disk does, wherever it can be set."""
    if mode == "train":
        command = train(tmp_path, config_file)
    else:
        command = sampling(tmp_path, undisturbed[0], mode)
    command.run(largest=largest)
    assert_one_line_on_the_disk(command, LARGE)
    command.log.unlink()
    command.finish()
    if mode == "train":
        assert_trained_alike(command.workdir, undisturbed[0])
