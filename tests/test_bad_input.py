"""Bad input: one table of what people get wrong, each case with the one line that answers it.

Every case is a command line as typed, run in this process: it ends with the exit code 2 and that
line, without a traceback, and no file has appeared or changed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import flagsaver
from ml_collections import ConfigDict
from PIL import Image

from ig_jax import config as config_lib
from ig_jax import main
from ig_jax.data import samples, shards
from ig_jax.errors import Exit, InputError
from ig_jax.experiment import Experiment
from ig_jax.storage.checkpoints import Checkpoints
from ig_jax.training.state import TrainState
from tests.common import golden, seeded_weights, tiny_config

TINY = "from tests.common import tiny_config as get_config\n"
NPY, LIGHT = "00000/img-latents-{:08d}.npy", "latents_rank00_shard000.safetensors"
OURS = "latents-00001-of-00002.arrayrecord"
SHAPE = (8, 8, 1)


def run(arguments: list[str]) -> int:
    """The exit code of a command line; flags are as before afterwards."""
    with flagsaver.flagsaver():
        try:
            return main.main(["ig_jax", *arguments])
        except SystemExit as leaving:
            return leaving.code


def tree(folder: pathlib.Path) -> dict[str, tuple]:
    """Every file and folder: what it is, when it was changed, how long."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        found[str(path)] = (stat.st_mode, stat.st_mtime_ns if path.is_file() else 0, stat.st_size)
    return found


# What cases start from.


def make_npy(folder: pathlib.Path) -> None:
    """Latents in SiT's layout, of a posterior that is one point."""
    (folder / "00000").mkdir(parents=True)
    names = [NPY.format(i) for i in range(40)]
    for name in names:
        np.save(folder / name, np.zeros((2, 8, 8), np.float32))
    labels = [[name, i % 10] for i, name in enumerate(names)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def make_light(folder: pathlib.Path) -> None:
    """Latents in LightningDiT's layout."""
    folder.mkdir()
    tensors = {"latents": np.zeros((40, 1, 8, 8), np.float32), "labels": np.arange(40) % 10}
    (folder / LIGHT).write_bytes(safetensors.numpy.save(tensors))
    statistics = {"mean": np.zeros(1, np.float32), "std": np.ones(1, np.float32)}
    np.savez(folder / "latents_stats.npz", **statistics)


def make_ours(folder: pathlib.Path) -> None:
    """Latents in shards of our own."""
    folder.mkdir()
    plan = {
        "format": shards.FORMAT,
        "images": {"kind": "folder", "count": 40},
        "image_size": 8,
        "autoencoder": "pooling",
        "fingerprint": "abc",
        "twins": False,
        "examples_per_shard": 20,
        "class_names": [str(i) for i in range(10)],
    }
    shards.write_json(str(folder / shards.PLAN), plan)
    notes = {"skipped": [], "converted": [], "enlarged": []}
    for shard in range(2):
        with shards.ShardWriter(str(folder), shard, 2) as writer:
            writer.add([i % 10 for i in range(20)], [np.zeros((20, *SHAPE), np.float32)] * 2)
            writer.finish(**notes)
    markers = [
        shards.Marker(**shards.read_json(str(folder / shards.marker_name(i, 2)))) for i in range(2)
    ]
    shards.write_json(str(folder / shards.INDEX), shards.make_index(plan, markers))


def make_own(folder: pathlib.Path, source: dict) -> None:
    """A network's own samples."""
    folder.mkdir()
    samples.save_piece(folder / "0.npz", np.zeros((200, *SHAPE), np.float32), np.arange(200) % 10)
    samples.save_index(folder, ["0.npz"], source, {})


def png(mode: str = "L", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size)).save(buffer, "PNG")
    return buffer.getvalue()


def make_pictures(folder: pathlib.Path) -> None:
    """What `--mode=sample` leaves: numbered pictures, their labels and their protocol."""
    (folder / "images").mkdir(parents=True)
    for i in range(4):
        (folder / "images" / f"{i:06d}.png").write_bytes(png())
    (folder / "labels.txt").write_text("".join(f"{i:06d} {i} {i}\n" for i in range(4)))


def make_classes(folder: pathlib.Path) -> None:
    """Pictures of two classes."""
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(3):
            (folder / name / f"{i}.png").write_bytes(png("RGB"))


def make_trained(folder: pathlib.Path) -> dict:
    """A workdir with a checkpoint of step 4; returns the facts of its data."""
    config = tiny_config()
    experiment = Experiment.from_config(config)
    weights = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), experiment.abstract_params())
    state = TrainState(np.int32(4), weights, weights, {"count": np.int32(4)})
    facts = experiment.open_data().facts()
    checkpoints = Checkpoints(folder)
    checkpoints.save(state, 4, config, {"step": 4}, source=facts)
    checkpoints.close()
    (folder / "sweep").mkdir()
    return facts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a config, a trained workdir, data in every layout, and weights."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.py").write_text(TINY)
    facts = make_trained(folder / "trained")
    make_npy(folder / "npy")
    make_light(folder / "light")
    make_ours(folder / "ours")
    make_own(folder / "own", facts)
    make_pictures(folder / "pictures")
    make_classes(folder / "classes")
    (folder / "empty").mkdir()
    shapes = json.loads(str(golden("vae_ldm_small")["shapes_json"]))
    small = seeded_weights(shapes)
    (folder / "small.safetensors").write_bytes(safetensors.numpy.save(small))
    return folder


# What is done to a copy of it.

Damage = Callable[[pathlib.Path], object]
# In place of the value of a field that is taken away.
GONE = object()


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(name: str, count: int = 4) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - count)


def in_place_of(name: str, make: Callable) -> Damage:
    """Another kind of thing under a file's name: a folder or a pipe."""

    def damage(folder: pathlib.Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def linked(name: str) -> Damage:
    """A link that leads nowhere."""
    return in_place_of(name, lambda path: path.symlink_to("nowhere"))


def edit(name: str, *place: str | int, **changes: object) -> Damage:
    """Changes fields of an object in a JSON file, or takes them away."""

    def damage(folder: pathlib.Path) -> None:
        inside = content = json.loads((folder / name).read_text())
        content.pop("digest", None)  # as if it had been written so
        for key in place:
            inside = inside[key]
        inside |= changes
        for key in [key for key, value in inside.items() if value is GONE]:
            del inside[key]
        (folder / name).write_text(json.dumps(content))

    return damage


def labels(of: Callable[[int], object]) -> Damage:
    """Other labels of the latents in SiT's layout."""
    entries = [[NPY.format(i), of(i)] for i in range(40)]
    return write("dataset.json", json.dumps({"labels": entries}))


def npy(array: np.ndarray, index: int = 0) -> Damage:
    return lambda folder: np.save(folder / NPY.format(index), array)


def npz(name: str, **arrays: object) -> Damage:
    return lambda folder: np.savez(folder / name, **arrays)


def zipped(name: str, member: str, content: bytes) -> Damage:
    def damage(folder: pathlib.Path) -> None:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(member, content)

    return damage


def tensors(name: str, **arrays: np.ndarray) -> Damage:
    return write(name, safetensors.numpy.save(arrays))


def header(content: object, data: bytes = bytes(256)) -> Damage:
    """A safetensors shard with any header."""
    text = json.dumps(content).encode()
    return write(LIGHT, len(text).to_bytes(8, "little") + text + data)


def latents(**changes: object) -> Damage:
    """A safetensors shard of one latent, whose header is changed."""
    entry = {"dtype": "F32", "shape": [1, 1, 8, 8], "data_offsets": [0, 256]} | changes
    return header({"latents": {k: v for k, v in entry.items() if v is not GONE}})


def npy_header(text: str) -> bytes:
    """An `.npy` file that ends after its header."""
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.encode().ljust(117) + b"\n"


# The tables: {d} is the folder `made`, {t} the case's own, {w} a workdir that is not there yet, {f}
# the copy of what a table is of. (…) stands for the reason that a library gives.

TRAIN = "--config={d}/tiny.py --workdir={w}"
TRAINED = "--workdir={d}/trained"

# fmt: off
FLAGS = {
    "--mode=train": "--config=FILE (and --workdir=DIR) expected: see `python -m ig_jax.main`",
    "--config=nowhere.py": "--config is 'nowhere.py': expected an existing file, or one of ablate_digits, cifar10_ig, digits_ig, dit_xl_ig, lightningdit_b_ig, lightningdit_l_ig, lightningdit_xl_ig, photos_ig, sit_b_ig, sit_l_ig, sit_xl_ig, toy2d_ig",
    "--config={d} --workdir={w}": "--config is '{d}': a folder, expected an existing file, or one of ablate_digits, cifar10_ig, digits_ig, dit_xl_ig, lightningdit_b_ig, lightningdit_l_ig, lightningdit_xl_ig, photos_ig, sit_b_ig, sit_l_ig, sit_xl_ig, toy2d_ig",
    "--config={d}/tiny.py:small --workdir={w}": "--config is '{d}/tiny.py:small': its get_config has too many positional arguments, expected --config={d}/tiny.py",
    "--config={d}/tiny.py": "--workdir=DIR expected: where checkpoints and results go",
    "--config={d}/tiny.py --workdir=": "--workdir=DIR expected: where checkpoints and results go",
    "--config={d}/tiny.py --workdir={d}/tiny.py": "the workdir is {d}/tiny.py: {d}/tiny.py is a file, expected a folder",
    "--config={d}/tiny.py --workdir={d}/tiny.py/a": "the workdir is {d}/tiny.py/a: {d}/tiny.py is a file, expected a folder",
    "--config={d}/tiny.py '--workdir={t}/a [1]'": "the workdir is {t}/a [1]: expected a path without [ and ]",
    "--config={d}/tiny.py --workdir=hdfs://a/b": "hdfs://a/b: expected a local path, or one of gs://",
    "--config={d}/tiny.py --workdir={d}/trained/checkpoints/4": "{d}/trained/checkpoints/4 is one checkpoint of a workdir: expected the workdir, as in --workdir={d}/trained --step=4",
    f"{TRAIN} --mode=smaple": "--mode is 'smaple': expected one of train, sample, evaluate, sweep, ablate, toy, reproduce, prepare, benchmark, compile; did you mean sample, compile, ablate?",
    f"{TRAIN} --mode": "Missing value for flag --mode",
    f"{TRAIN} --mod=train": "Unknown command line flag 'mod'. Did you mean: mode ?",
    f"{TRAIN} train": "unexpected argument 'train': options look like --mode=sample",
    f"{TRAIN} --sweep": "--sweep has no meaning with --mode=train: expected it with benchmark, compile only (--mode=sweep searches guidance)",
    f"{TRAIN} --sizes": "--sizes has no meaning with --mode=train: expected it with --mode=benchmark alone",
    f"{TRAIN} --mode=benchmark --sizes --sweep": "--sizes has no meaning with --sweep: expected it with --mode=benchmark alone",
    f"{TRAIN} --fast": "--fast has no meaning with --mode=train: expected it with ablate, toy",
    f"{TRAIN} --step=4": "--step has no meaning with --mode=train: expected it with sample, evaluate, sweep only",
    f"{TRAIN} --name=sit-xl-2-ig": "--name has no meaning with --mode=train: expected --mode=reproduce",
    f"{TRAIN} --cache=maybe": "--cache is 'maybe': expected true or false",
    f"{TRAIN} --xla_preset=fast": "--xla_preset is 'fast': expected none or gpu",
    f"{TRAIN} --guidance=bset": "--guidance is 'bset': expected config or best",
    f"{TRAIN} --guidance=best": "{w}/sweep/best.json: found no such file, expected a workdir in which --mode=sweep finished",
    f"{TRAIN} --import={{t}}/rule.py": "--import is '{t}/rule.py': expected an existing Python file",
    f"{TRAIN} --config.imports=rule.py": "config.imports is 'rule.py': expected --import=FILE, which it records",
    f"{TRAIN} --help=config.gudance": "--help is 'config.gudance': expected one of config, config.model, config.data, config.loss, config.optimizer, config.train, config.guidance, config.sampler, config.mesh, config.evaluation, config.sweep, config.ablation; did you mean config.guidance, config.data, config.train?",
    f"{TRAIN} --mode=prepare": "config.data.path is empty: expected the directory to write latents to",
    f"{TRAIN} --mode=prepare --config.data.path={{t}}/new": "config.data.images is empty: expected a folder of class/name.jpg, or tfds:imagenet2012",
    f"{TRAIN} --mode=ablate": "config.ablation.questions is empty: expected at least one question",
    f"{TRAIN} --mode=toy": "config.data.name is 'digits': expected 'toy2d' for --mode=toy, such as --config=toy2d_ig",
    f"{TRAIN} --mode=reproduce": "--mode=reproduce: expected --name=NAME of published weights (sit-xl-2-ig), whose config is known, and no --config=FILE",
    "--mode=reproduce --workdir={w}": "--mode=reproduce: expected --name=NAME of published weights (sit-xl-2-ig), whose config is known, and no --config=FILE",
    "--mode=reproduce --name=sit --workdir={w}": "unknown published model 'sit': expected one of sit-xl-2-ig, lightningdit-xl-1-ig, sit-xl-2, lightningdit-xl-1; did you mean sit-xl-2?",
    "--compare {d}/tiny.py": "--compare expects two result files: --compare a.json b.json",
    "--compare {t}/a.json {t}/b.json": "{t}/a.json: found no such file, expected a result of --mode=evaluate (.json)",
    "--compare {d}/tiny.py {d}/tiny.py": "{d}/tiny.py: cannot be read as a result of --mode=evaluate, JSON with metrics and protocols (…)",
    "--mode=sample --workdir={w}": "no checkpoint in {w}/checkpoints: expected a workdir that --mode=train wrote",
    f"{TRAINED} --mode=sample --step=5": "no checkpoint of step 5 in {d}/trained/checkpoints: there are 4",
    f"{TRAINED} --mode=sample --step=-1": "--step is '-1': expected last, best, or the number of a step",
    f"{TRAINED} --mode=sweep --step=newest": "--step is 'newest': expected last, best, or the number of a step",
    f"{TRAINED} --mode=evaluate --step=best": "no checkpoint in {d}/trained/checkpoints carries a score: expected a run that validates (config.train.validate_every) or evaluates (config.evaluation.every) to have a best one; there are 4",
    f"{TRAINED} --mode=evaluate --step=4 --config.evaluation.samples=a.npz": "--step has no meaning with --mode=evaluate and --config.evaluation.samples: expected it with sample, evaluate, sweep only",
    f"{TRAINED} --mode=evaluate --guidance=best": "{d}/trained/sweep/best.json: found no such file, expected a workdir in which --mode=sweep finished",
}

# Of training.
FIELDS = {
    "seed=-1": "config.seed is -1: expected 0…4294967295",
    "seed=4294967296": "config.seed is 4294967296: expected 0…4294967295",
    "seed=100000000000000000000": "config.seed is 100000000000000000000: expected 0…4294967295",
    "seed=1.5": "config.seed is '1.5': expected an integer, 0…4294967295",
    "seed=x --config.seed=1": "config.seed is 'x': expected an integer, 0…4294967295",
    "seed=1 --config.seed=x": "config.seed is 'x': expected an integer, 0…4294967295",
    "seed": "Missing value for flag --config.seed",
    "model=5": "config.model is a section: expected one of its fields, such as config.model.family",
    "trian.num_steps=1": "unknown config field config.trian.num_steps; did you mean train, train.wandb?",
    "train.num_stps=1": "unknown config field config.train.num_stps; did you mean num_steps?",
    "train.num_steps=abc": "config.train.num_steps is 'abc': expected an integer, 1…2147483647",
    "train.num_steps=0": "config.train.num_steps is 0: expected 1…2147483647",
    "train.num_steps=2147483648": "config.train.num_steps is 2147483648: expected 1…2147483647",
    "train.batch_size=0": "config.train.batch_size is 0: expected 1…1048576",
    "train.batch_size=1": "config.train.batch_size / config.train.accumulate is 1: expected a multiple of the number of devices, 8",
    "train.batch_size=1000000000000": "config.train.batch_size is 1000000000000: expected 1…1048576",
    "train.ema_decay=1.5": "config.train.ema_decay is 1.5: expected 0…1",
    "train.ema_decay=nan": "config.train.ema_decay is nan: expected a finite number",
    "train.accumulate=5": "config.train.batch_size is 32: expected a multiple of config.train.accumulate, 5",
    "train.log_every=0": "config.train.log_every is 0: expected 1…2147483647",
    "train.profile_at=-5": "config.train.profile_at is -5: expected 0…2147483647",
    "train.not_finite=ignore": "config.train.not_finite is 'ignore': expected one of stop, skip",
    "train.allow_changes=modle": "config.train.allow_changes is 'modle': expected one of optimizer, loss, train, data",
    "train.verify_checkpoints=perhaps": "config.train.verify_checkpoints is 'perhaps': expected true or false",
    "train.init_from={t}/none": "no checkpoint in {t}/none/checkpoints: expected a workdir that --mode=train wrote",
    "train.init_from={d}/trained --config.model.width=64": "config.train.init_from is '{d}/trained', whose network has width 32: this config has 64",
    "model.family=sti": "config.model.family is 'sti': expected one of sit, dit, lightningdit, mlp; did you mean sit?",
    "model.size=xxl": "config.model.size is 'xxl': expected one of s, b, l, xl, 1p0b, 1p6b; did you mean xl, l?",
    "model.width=-32": "config.model.width is -32: expected 0…65536",
    "model.depth=1000000": "config.model.depth is 1000000: expected 0…4096",
    "model.heads=5": "config.model.width 32 is not divisible by heads 5",
    "model.patch_size=0": "config.model.patch_size is 0: expected 1…4096",
    "model.patch_size=3": "config.model: image size 8 is not divisible by patch size 3",
    "model.input_size=16": "config.model.input_size and channels is (16, 16, 1): the data set 'digits' has (8, 8, 1)",
    "model.channels=3": "config.model.input_size and channels is (8, 8, 3): the data set 'digits' has (8, 8, 1)",
    "model.num_classes=-1": "config.model.num_classes is -1: expected 0…16777216",
    "model.num_classes=5": "config.model.num_classes is 5: the data set 'digits' has 10",
    "model.auxiliary_depth=3": "config.model: auxiliary_depths is (3,): expected increasing numbers in 1…2 for 3 blocks (or none, for no auxiliary head)",
    "model.auxiliary_depth=(2,1)": "config.model: auxiliary_depths is (2, 1): expected increasing numbers in 1…2 for 3 blocks (or none, for no auxiliary head)",
    "model.auxiliary_depth=(1.5,)": "config.model.auxiliary_depth is (1.5,): expected an integer, or a list of them",
    "model.auxiliary_depth=two": "config.model.auxiliary_depth is 'two': expected an integer, or a list of them",
    "model.remat=some": "config.model.remat is 'some': expected one of none, full, dots; did you mean none?",
    "model.dtype=float16": "config.model.dtype is 'float16': expected one of auto, float32, bfloat16; did you mean bfloat16, float32?",
    "model.learned_sigma=true": "config.model.learned_sigma is True: expected False to train, since the variance channels have no loss here (or config.optimizer.trainable='auxiliary_head')",
    "data.name=digit": "config.data.name is 'digit': expected one of digits, toy2d, photos, latents, folder, tfds, samples; did you mean digits?",
    "data.image_size=0": "config.data.image_size is 0: expected 1…65536",
    "data.image_size=-8": "config.data.image_size is -8: expected 1…65536",
    "data.image_size=16": "config.data.image_size is 16: expected 8, the size of the pictures of the data set 'digits'",
    "data.num_workers=1000": "config.data.num_workers is 1000: expected 0…256",
    "data.num_validation=-1": "config.data.num_validation is -1: expected 0…2147483647",
    "data.num_validation=1797": "config.data.num_validation is 1797: expected 0…1796",
    "data.flip=true": "config.data.flip is True: expected False, mirrored digits are not digits",
    "data.name=latents --config.data.flip=true": "config.data.flip is True: expected False for latents, which do not mirror as pictures do (--mode=prepare stores latents of mirrored pictures, and those are always used)",
    "data.name=folder": "config.data.path is empty: expected a folder of class/name.jpg",
    "data.name=folder --config.data.path={t}/none": "{t}/none: no such folder, expected images as class/name.jpg",
    "data.name=folder --config.data.path={d}/tiny.py": "{d}/tiny.py: no such folder, expected images as class/name.jpg",
    "data.name=samples": "config.data.path is empty: expected the folder to keep own samples in",
    "data.name=tfds": "config.data.tfds_name is empty: expected a name such as cifar10",
    "data.path=hdfs://a": "hdfs://a: expected a local path, or one of gs://",
    "loss.path=liner": "config.loss.path is 'liner': expected one of linear, cosine, linear_reversed, vp; did you mean linear, cosine, linear_reversed?",
    "loss.prediction=score": "config.loss.prediction is 'score': expected one of velocity, noise, data",
    "loss.times=lognormal(shft=8)": "config.loss.times is 'lognormal(shft=8)': lognormal has no option 'shft', its options are shift; did you mean shift?",
    "loss.times=lognormal(shift=0)": "config.loss.times is 'lognormal(shift=0)': shift is 0: expected 0.001…1000",
    "loss.times=lognormal(shift=1e999)": "config.loss.times is 'lognormal(shift=1e999)': shift is inf: expected a finite number",
    "loss.weight=speed": "config.loss.weight is 'speed': expected one of even, velocity",
    "loss.label_dropout=2": "config.loss.label_dropout is 2.0: expected 0…1",
    "loss.auxiliary_weight=-1": "config.loss.auxiliary_weight is -1.0: expected at least 0",
    "loss.guided_target=nul": "config.loss.guided_target is 'nul': expected one of auxiliary, null, segmented; did you mean null?",
    "loss.guided_target_scale=inf": "config.loss.guided_target_scale is inf: expected a finite number",
    "loss.guided_target_start=-10": "config.loss.guided_target_start is -10: expected 0…2147483647",
    "optimizer.name=sgd": "config.optimizer.name is 'sgd': expected one of adamw, muon",
    "optimizer.learning_rate=0": "config.optimizer.learning_rate is 0.0: expected more than 0",
    "optimizer.learning_rate=nan": "config.optimizer.learning_rate is nan: expected a finite number",
    "optimizer.learning_rate=1e999": "config.optimizer.learning_rate is inf: expected a finite number",
    "optimizer.b2=1": "config.optimizer.b2 is 1.0: expected at least 0 and less than 1",
    "optimizer.weight_decay=-1": "config.optimizer.weight_decay is -1.0: expected at least 0",
    "optimizer.schedule=cosine --config.optimizer.warmup_steps=10": "config.optimizer: num_steps is 6: a cosine schedule needs more than its warmup_steps, 10",
    "optimizer.newton_schulz_steps=0": "config.optimizer.newton_schulz_steps is 0: expected 1…100",
    "optimizer.trainable=auxiliary_head --config.model.auxiliary_depth=0": "config.optimizer.trainable is 'auxiliary_head': expected 'all', this model has no auxiliary head (config.model.auxiliary_depth is 0)",
    "sampler.name=huen": "config.sampler.name is 'huen': expected one of euler, heun, heun2, rk4, ab2, reuse, euler_maruyama, ddpm, dopri5; did you mean heun, heun2?",
    "sampler.name=reuse --config.model.auxiliary_depth=0 --config.guidance.ig_scale=1": "config.sampler.name is 'reuse': expected a model with an auxiliary head, where most of its steps stop; this one has none",
    "'sampler.name=reuse(every=0)'": "config.sampler.name is 'reuse(every=0)': every is 0: expected 1…100000",
    "'sampler.name=reuse(order=2)'": "config.sampler.name is 'reuse(order=2)': order is 2: expected 0…1",
    "sampler.num_steps=1000000000": "config.sampler.num_steps is 1000000000: expected 1…100000",
    "sampler.time_shift=inf": "config.sampler.time_shift is inf: expected a finite number",
    "sampler.time_shift=0": "config.sampler.time_shift is 0.0: expected 0.001…1000",
    "sampler.rtol=0": "config.sampler.rtol is 0.0: expected 1e-08…1",
    "sampler.num_samples=0": "config.sampler.num_samples is 0: expected 1…2147483647",
    "sampler.batch_size=12": "config.sampler.batch_size is 12: expected a multiple of the number of devices, 8",
    "sampler.labels=zebra": "config.sampler.labels is 'zebra': class 'zebra' does not exist: expected a number 0…9 or a name",
    "sampler.labels=10": "config.sampler.labels is '10': class 10 does not exist: expected 0…9",
    "sampler.labels=": "config.sampler.labels is '': no class named: expected class numbers or names, separated by commas",
    "sampler.labels=3 --config.model.num_classes=0": "config.sampler.labels is '3': expected random, this model is unconditional",
    "guidance.ig_scale=nan": "config.guidance.ig_scale is nan: expected a finite number",
    "guidance.ig_scale=1.5 --config.model.auxiliary_depth=0": "config.guidance.ig_scale is 1.5: expected 1, since internal guidance needs auxiliary head 0 of this model: it has no auxiliary head (`add_auxiliary_head` adds one to train; a weaker network, `Guidance(weak=…)`, does without)",
    "guidance.cfg_scale=2 --config.model.num_classes=0": "config.guidance.cfg_scale is 2.0: expected 1, since classifier-free guidance needs a null label ∅: this model is unconditional",
    "guidance.ig_interval=(0.7,0.3)": "config.guidance.ig_interval is (0.7, 0.3): expected (low, high) with 0 <= low <= high <= 1",
    "guidance.cfg_interval=(0,1.5)": "config.guidance.cfg_interval is (0, 1.5): expected (low, high) with 0 <= low <= high <= 1",
    "guidance.ig_rule=projcted": "config.guidance.ig_rule is 'projcted': expected one of linear, projected, zero_star, tangential, rescaled; did you mean projected, rescaled?",
    "guidance.ig_source=other": "config.guidance.ig_source is 'other': expected one of auxiliary, mixed, weaker, null, shallow",
    "guidance.weak={t}/none": "no checkpoint in {t}/none/checkpoints: expected a workdir that --mode=train wrote",
    "guidance.weak={d}/trained --config.guidance.weak_step=5": "no checkpoint of step 5 in {d}/trained/checkpoints: there are 4",
    "guidance.weak={d}/trained --config.guidance.weak_step=older": "config.guidance.weak_step is 'older': expected last, best, or the number of a step",
    "guidance.weak={d}/trained --config.loss.path=cosine": "config.guidance.weak is '{d}/trained', where loss.path is linear: expected cosine",
    "mesh.data=3": "config.mesh is data=3, fsdp=1: expected a product that is the number of devices, 8",
    "mesh.fsdp=0": "config.mesh is data=-1, fsdp=0: expected positive sizes, at most one of them -1 (the rest of the devices)",
    "mesh.fsdp=-1": "config.mesh is data=-1, fsdp=-1: expected positive sizes, at most one of them -1 (the rest of the devices)",
    "evaluation.features=incption": "config.evaluation.features is 'incption': expected one of auto, digits, photos, toy2d, dinov2, inception; did you mean inception?",
    "evaluation.every=-1": "config.evaluation.every is -1: expected 0…2147483647",
    "evaluation.ig_scales=(1,inf)": "config.evaluation.ig_scales is ('(1,inf)',): expected a list of numbers",
    "evaluation.at_end=true --config.evaluation.num_samples=3": "config.evaluation.num_samples is 3: expected at least 4 for precision",
    "evaluation.at_end=true --config.evaluation.reference={t}/none.npz": "{t}/none.npz: found no such file, expected a reference .npz, or no path for the data set",
    "evaluation.every=2 --config.evaluation.reference={t}/none.npz": "{t}/none.npz: found no such file, expected a reference .npz, or no path for the data set",
    "evaluation.at_end=true --config.evaluation.reference={d}/empty": "{d}/empty: holds no .png files; expected a folder of PNGs",
    "evaluation.at_end=true --config.evaluation.features=dinov2": "config.evaluation.dinov2_path is empty: expected the DINOv2 weights, downloaded from https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "evaluation.at_end=true --config.evaluation.features=inception": "config.evaluation.inception_path is empty: expected the Inception weights, downloaded from https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "evaluation.every=2 --config.evaluation.features=inception" " --config.evaluation.inception_path={t}/none.pth": "{t}/none.pth: Inception weights not found; download https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth (its SHA-256 starts with 6726825d)",
    "evaluation.at_end=true --config.model.auxiliary_depth=0": "config.guidance.ig_scale is 0.0: expected 1, since internal guidance needs auxiliary head 0 of this model: it has no auxiliary head (`add_auxiliary_head` adds one to train; a weaker network, `Guidance(weak=…)`, does without)",
    "sweep.metric=fidd": "config.sweep.metric is 'fidd': expected one of fid, kid, mind, sfid, inception_score, precision, recall, label_accuracy, outlier_rate, coverage; did you mean fid, sfid, kid?",
    "sweep.ig_intervals=(0.1,)": "config.sweep.ig_intervals is (0.1,): expected pairs (low, high, low, high, …), at least one",
    "sweep.ig_rules=foo": "config.sweep.ig_rules is 'foo': expected one of linear, projected, zero_star, tangential, rescaled",
    "sweep.seed=-1": "config.sweep.seed is -1: expected 0…4294967294",
    "ablation.metrics=fidd": "config.ablation.metrics is 'fidd': expected one of fid, kid, mind, sfid, inception_score, precision, recall, label_accuracy, outlier_rate, coverage; did you mean fid, sfid, kid?",
}

# Of sampling from a checkpoint, and of what else reads one.
SAMPLING = {
    "--mode=sample --config.model.width=64": "config.model has width 64: the checkpoint of step 4 in {d}/trained has 32, expected the same (--mode=train makes another network)",
    "--mode=sample --config.model.depth=4": "config.model has depth 4: the checkpoint of step 4 in {d}/trained has 3, expected the same (--mode=train makes another network)",
    "--mode=sample --config.model.heads=4": "config.model has heads 4: the checkpoint of step 4 in {d}/trained has 2, expected the same (--mode=train makes another network)",
    "--mode=sample --config.model.patch_size=4": "config.model has patch_size 4: the checkpoint of step 4 in {d}/trained has 2, expected the same (--mode=train makes another network)",
    "--mode=sample --config.model.auxiliary_depth=2": "config.model has auxiliary_depths (2,): the checkpoint of step 4 in {d}/trained has (1,), expected the same (--mode=train makes another network)",
    "--mode=sample --config.model.family=lightningdit": "config.model has family lightningdit: the checkpoint of step 4 in {d}/trained has sit, expected the same (--mode=train makes another network)",
    "--mode=sample --config.model.num_classes=5": "config.model.num_classes is 5: the data set 'digits' has 10",
    "--mode=evaluate --config.model.width=64": "config.model has width 64: the checkpoint of step 4 in {d}/trained has 32, expected the same (--mode=train makes another network)",
    "--mode=sweep --config.model.width=64": "config.model has width 64: the checkpoint of step 4 in {d}/trained has 32, expected the same (--mode=train makes another network)",
    "--mode=train --config.model.width=64": "{d}/trained holds checkpoints of another config: config.model.width is 64, the checkpoint has 32",
    "--mode=train --config.optimizer.learning_rate=0.5": "{d}/trained holds checkpoints of another config: config.optimizer.learning_rate is 0.5, the checkpoint has 0.001",
    "--mode=sample --config.sampler.labels=zebra": "config.sampler.labels is 'zebra': class 'zebra' does not exist: expected a number 0…9 or a name",
    "--mode=sample --config.sampler.batch_size=12": "config.sampler.batch_size is 12: expected a multiple of the number of devices, 8",
    "--mode=sample --config.guidance.weak={t}/none": "no checkpoint in {t}/none/checkpoints: expected a workdir that --mode=train wrote",
    "--mode=sample --config.guidance.ig_scale=inf": "config.guidance.ig_scale is inf: expected a finite number",
    "--mode=sweep --config.sweep.budget=1": "config.sweep.budget is 1 samples: 13 settings with 10000 in the last round need at least 30176 in batches of 16 (lower config.sweep.num_samples or config.sampler.batch_size, or name fewer settings)",
}

CONFIGS = {
    "def get_config(:\n": "{f}/my.py, line 1: SyntaxError: invalid syntax",
    "import nothing\n\n\ndef get_config():\n    pass\n": "{f}/my.py, line 1: ModuleNotFoundError: No module named 'nothing'",
    "from ig_jax.config import nothing\n": "{f}/my.py, line 1: ImportError: cannot import name 'nothing' from 'ig_jax.config' (…)",
    "x = 1\n": "{f}/my.py: no function get_config(), expected one as in configs/",
    "def get_config():\n    return 5\n": "{f}/my.py: get_config() returned int, expected a ConfigDict (ig_jax.config.default_config() and changes to it)",
    "def get_config():\n    return 1 / 0\n": "{f}/my.py, line 2: ZeroDivisionError: division by zero",
    "def get_config(name):\n    return name\n": "--config is '{f}/my.py': its get_config has missing a required argument: 'name', expected --config={f}/my.py:ARGUMENT",
    "raise SystemExit(3)\n": "{f}/my.py, line 1: SystemExit: 3",
    "from ml_collections import ConfigDict as get_config\n": "missing config field config.seed: expected an integer",
    f"{TINY}\n\ndef tiny():\n    pass\n\n\nget_config = tiny\n": "{f}/my.py: get_config() returned NoneType, expected a ConfigDict (ig_jax.config.default_config() and changes to it)",
    "from tests.common import tiny_config\n\n\ndef get_config():\n" "    config = tiny_config()\n    config.train.nothing = 1\n    return config\n": "unknown config field config.train.nothing; did you mean not_finite?",
    "from tests.common import tiny_config\n\n\ndef get_config():\n" "    config = tiny_config()\n    del config.sampler\n    return config\n": "missing config field config.sampler: expected a section with fields",
    "from tests.common import tiny_config\n\n\ndef get_config():\n" "    config = tiny_config()\n    config.train.num_steps = 'x'\n    return config\n": "{f}/my.py, line 6: TypeError: Could not override field 'num_steps' (reference). x is of original type <class 'str'> and cannot be casted to type <class 'int'>",
}
# fmt: on

X = np.zeros((40, 1, 8, 8), np.float32)
Y = np.arange(40) % 10
MOMENTS = np.zeros((2, 8, 8), np.float32)
OF_LATENTS = (
    f"{TRAIN} --config.data.name=latents --config.data.num_validation=8 --config.data.path={{f}}"
)
OF_FOLDER = (
    f"{TRAIN} --config.data.name=folder --config.data.path={{f}} --config.model.channels=3 "
    "--config.data.num_validation=0 --config.train.batch_size=8"
)
SCORED = "--mode=evaluate --config={d}/tiny.py --workdir={w}"
PREPARED = (
    "--mode=prepare --config={d}/tiny.py --config.data.autoencoder=small "
    "--config.data.image_size=16 --config.data.images={d}/classes"
)
SMALL = "--config.data.autoencoder_path={d}/small.safetensors"
WIDTH = 64  # of the digits' features
EYE = np.eye(WIDTH)

# Longer parts of lines.
WORDS = {
    "{again}": "; the other 0 of 1 shards are whole: copy or encode it again to replace it",
    "{example}": '{"labels": [["00000/img-latents-00000000.npy", 12], …]}',
}

# fmt: off
# What is copied, and the command line on it → what is done to the copy, and the line.
FILES: dict[tuple[str, str], list[tuple[Damage, str]]] = {
    ("npy", OF_LATENTS): [
        (write("dataset.json", "{"), "{f}/dataset.json: cannot be read as a JSON file (…)"),
        (write("dataset.json", b"\xff"), "{f}/dataset.json: cannot be read as a JSON file (…)"),
        (write("dataset.json", "[" * 100_000), "{f}/dataset.json: cannot be read as a JSON file (…)"),
        (write("dataset.json", "[]"), "{f}/dataset.json: found no labels, expected {example}"),
        (write("dataset.json", "3"), "{f}/dataset.json: found no labels, expected {example}"),
        (write("dataset.json", '"x"'), "{f}/dataset.json: found no labels, expected {example}"),
        (write("dataset.json", '{"labels": "abc"}'), "{f}/dataset.json: found no labels, expected {example}"),
        (write("dataset.json", '{"labels": [1]}'), "{f}/dataset.json: found other entries than expected, {example} (…)"),
        (labels(lambda i: None), "{f}/dataset.json: its labels are null, so that these latents have no labels: config.model.num_classes is 10, expected 0 (an unconditional model), or labels"),
        (labels(lambda i: 10**12), "{f}/dataset.json: found other entries than expected, {example} (label 1000000000000, expected a whole number below 2**31)"),
        (labels(lambda i: 2**32), "{f}/dataset.json: found other entries than expected, {example} (label 4294967296, expected a whole number below 2**31)"),
        (labels(lambda i: math.inf), "{f}/dataset.json: found other entries than expected, {example} (…)"),
        (labels(lambda i: math.nan), "{f}/dataset.json: found other entries than expected, {example} (…)"),
        (labels(lambda i: 1.7), "{f}/dataset.json: found other entries than expected, {example} (label 1.7, expected a whole number below 2**31)"),
        (labels(lambda i: True), "{f}/dataset.json: found other entries than expected, {example} (label True, expected a whole number below 2**31)"),
        (labels(lambda i: -1), "{f}/dataset.json: found label -1, expected labels from 0 on"),
        (labels(lambda i: 10), "{f}/dataset.json: found label 10, expected labels below 10 (config.model.num_classes)"),
        (write("dataset.json", json.dumps({"labels": [[NPY.format(0), 1]]})), "{f}/dataset.json: has no label for 39 of 40 files, such as 00000/img-latents-00000001.npy; did you mean 00000/img-latents-00000000.npy?"),
        (lambda folder: shutil.rmtree(folder / "00000"), "{f}: holds no .npy files, expected latents beside dataset.json"),
        (in_place_of("dataset.json", os.mkdir), "{f}/dataset.json: found a folder, expected a JSON file"),
        (in_place_of("dataset.json", os.mkfifo), "{f}/dataset.json: found a pipe or device, expected a JSON file"),
        (remove("dataset.json"), "{f}/dataset.json: no such file, so that these latents have no labels: config.model.num_classes is 10, expected 0 (an unconditional model), or labels"),
        (remove(NPY.format(3)), "{f}/dataset.json: labels 1 files that are not there, such as 00000/img-latents-00000003.npy: expected all latents to be copied"),
        (write(NPY.format(3), b""), "{f}/00000/img-latents-00000003.npy: cannot be read as a NumPy file (…)"),
        (write(NPY.format(3), b"garbage"), "{f}/00000/img-latents-00000003.npy: cannot be read as a NumPy file (…)"),
        (write(NPY.format(3), npy_header("{'descr': '<f4', 'shape': (2, 8, 8), }")), "{f}/00000/img-latents-00000003.npy: cannot be read as a NumPy file (…)"),
        (cut(NPY.format(3)), "{f}/00000/img-latents-00000003.npy: cannot be read as a NumPy file (…)"),
        (npy(np.zeros((2, 4, 4), np.float32), 3), "{f}/00000/img-latents-00000003.npy: found shape (2, 4, 4), expected (2, 8, 8) as {f}/00000/img-latents-00000000.npy has"),
        (npy(np.zeros((4, 8, 8), np.float32), 39), "{f}/00000/img-latents-00000039.npy: found shape (4, 8, 8), expected (2, 8, 8) as {f}/00000/img-latents-00000000.npy has"),
        (npy(np.zeros((3, 8, 8), np.float32)), "{f}/00000/img-latents-00000000.npy: found shape (3, 8, 8), expected (2·C, H, W), mean and then std"),
        (npy(np.zeros((2, 8, 8), "U3")), "{f}/00000/img-latents-00000000.npy: cannot be read as a NumPy file (…)"),
        (npy(np.array([{}])), "{f}/00000/img-latents-00000000.npy: cannot be read as a NumPy file (…)"),
        (npy(MOMENTS - 1), "{f}/00000/img-latents-00000000.npy: found a std of -1.0, expected none below 0 (the first half of the channels is the mean, the second the std)"),
        (npy(MOMENTS + np.nan), "{f}/00000/img-latents-00000000.npy: found a std of nan, expected none below 0 (the first half of the channels is the mean, the second the std)"),
    ],
    ("light", OF_LATENTS): [
        (write(LIGHT, b""), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (write(LIGHT, b"garbage, and nothing else"), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (cut(LIGHT), "{f}/latents_rank00_shard000.safetensors: truncated, 10700 of 10704 bytes{again}"),
        (header([]), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (header("x"), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (header({}), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (header({"latents": 3}), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (header({"latents": "x"}), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (latents(data_offsets=GONE), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (latents(shape=GONE), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (latents(dtype=GONE), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (latents(data_offsets=[-64, 192]), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (latents(data_offsets=[0, 512]), "{f}/latents_rank00_shard000.safetensors: truncated, 342 of 598 bytes{again}"),
        (latents(data_offsets=[0, 128]), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (latents(data_offsets=[256, 0]), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (latents(data_offsets="0"), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (latents(shape=[-1, -1, 8, 8]), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (latents(dtype="F99"), "{f}/latents_rank00_shard000.safetensors: cannot be read as a safetensors file (…){again}"),
        (latents(dtype="F64", shape=[1, 1, 8, 4]), "{f}/latents_rank00_shard000.safetensors: latents is of type F64, expected F32, F16, BF16, I64, I32{again}"),
        (header({"latents": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)), "{f}/latents_rank00_shard000.safetensors: latents has shape [], expected [N, C, H, W]{again}"),
        (latents(shape=[64]), "{f}/latents_rank00_shard000.safetensors: latents has shape [64], expected [N, C, H, W]{again}"),
        (tensors(LIGHT, other=X), "{f}/latents_rank00_shard000.safetensors: found other, expected latents, and perhaps labels and latents_flip{again}"),
        (tensors(LIGHT, latents=X[:0], labels=Y[:0]), "{f}: the shards are empty, expected latents"),
        (tensors(LIGHT, latents=X), "{f}/latents_rank00_shard000.safetensors: holds no labels, so that these latents have no labels: config.model.num_classes is 10, expected 0 (an unconditional model), or labels"),
        (tensors(LIGHT, latents=X, labels=Y[:39]), "{f}/latents_rank00_shard000.safetensors: found {'latents': 40, 'labels': 39}, expected as many labels as latents{again}"),
        (tensors(LIGHT, latents=X, labels=np.zeros((40, 2), np.int64)), "{f}/latents_rank00_shard000.safetensors: labels has shape [40, 2], expected [N]{again}"),
        (tensors(LIGHT, latents=X, labels=Y + 1), "{f}/latents_rank00_shard000.safetensors: found label 10, expected labels below 10 (config.model.num_classes)"),
        (tensors(LIGHT, latents=X, labels=Y - 1), "{f}/latents_rank00_shard000.safetensors: found label -1, expected labels from 0 on"),
        (tensors(LIGHT, latents=X, labels=Y + 2**32), "{f}/latents_rank00_shard000.safetensors: found label 4294967296, expected whole numbers below 2**31"),
        (tensors(LIGHT, latents=X, labels=np.float32(Y + 0.5)), "{f}/latents_rank00_shard000.safetensors: found label 0.5, expected whole numbers below 2**31"),
        (tensors(LIGHT, latents=X, labels=np.int8(Y)), "{f}/latents_rank00_shard000.safetensors: labels is of type I8, expected F32, F16, BF16, I64, I32{again}"),
        (tensors(LIGHT, latents=X[..., :4].copy(), labels=Y), "{f}: holds latents of shape (8, 4, 1), expected (8, 8, 1) (config.model.input_size and channels)"),
        (write("latents_stats.npz", b""), "{f}/latents_stats.npz: cannot be read as statistics in an .npz file (…)"),
        (write("latents_stats.npz", bytes(100)), "{f}/latents_stats.npz: cannot be read as statistics in an .npz file (…)"),
        (npz("latents_stats.npz", mean=np.array([{}]), std=[1.0]), "{f}/latents_stats.npz: cannot be read as statistics in an .npz file (…)"),
        (npz("latents_stats.npz", mean=["x"], std=[1.0]), "{f}/latents_stats.npz: cannot be read as numbers of mean and std (…)"),
        (npz("latents_stats.npz", mean=[0.0]), "{f}/latents_stats.npz: found mean, expected mean and std"),
        (npz("latents_stats.npz", mean=[0.0, 0.0], std=[1.0, 1.0]), "{f}/latents_stats.npz: found 2 values of mean and 2 of std, expected one a channel, 1"),
        (npz("latents_stats.npz", mean=[0.0], std=[-1.0]), "{f}/latents_stats.npz: found mean [0.0] and std [-1.0], expected finite numbers and std above 0"),
        (npz("latents_stats.npz", mean=[math.nan], std=[1.0]), "{f}/latents_stats.npz: found mean [nan] and std [1.0], expected finite numbers and std above 0"),
        (write("latents_stats.safetensors", b"garbage"), "{f}/latents_stats.safetensors: cannot be read as a safetensors file (…)"),
        (tensors("latents_stats.safetensors", mean=X[0, 0, 0, :1]), "{f}/latents_stats.safetensors: found mean, expected mean and std"),
    ],
    ("ours", OF_LATENTS): [
        (write("index.json", "{"), "{f}/index.json: cannot be read as a JSON file (…)"),
        (write("index.json", "[]"), "{f}/index.json: found a list, expected an object with fields"),
        (write("index.json", "{}"), "{f}/index.json: found format None, expected 'ig_jax latents 1'"),
        (edit("index.json", shards=GONE), "{f}/index.json: cannot be read as an index of latents (…)"),
        (edit("index.json", shards=[]), "{f}/index.json: names no shards with examples, expected at least one"),
        (edit("index.json", fields=GONE), "{f}/index.json: cannot be read as an index of latents (…)"),
        (edit("index.json", fields=["mean"]), "{f}/index.json: fields is ['mean'], expected mean, std"),
        (edit("index.json", statistics=GONE), "{f}/index.json: cannot be read as an index of latents (…)"),
        (edit("index.json", statistics={"mean": [0], "std": ["x"]}), "{f}/index.json: cannot be read as an index of latents (…)"),
        (edit("index.json", statistics={"mean": [0], "std": [0]}), "{f}/index.json: std of statistics is [0.0], expected a number for each of 1 channels, above 0"),
        (edit("index.json", shape=[8, 8]), "{f}/index.json: shape is [8, 8], expected [H, W, C]"),
        (edit("index.json", shape=[8, 8, -1]), "{f}/index.json: shape is [8, 8, -1], expected [H, W, C]"),
        (edit("index.json", shape=[4, 4, 4]), "{f}/index.json: mean of statistics is [0.0], expected a number for each of 4 channels"),
        (edit("index.json", class_names=[]), "{f}/index.json: names no classes, so that these latents have no labels: config.model.num_classes is 10, expected 0 (an unconditional model), or labels"),
        (edit("index.json", class_names=["a", "b"]), "config.model.num_classes is 10: the data set 'latents' has 2"),
        (edit("index.json", "shards", 1, file="../x"), "{f}/index.json: names the shard '../x', expected a file of this folder"),
        (edit("index.json", "shards", 1, file="/etc/passwd"), "{f}/index.json: names the shard '/etc/passwd', expected a file of this folder"),
        (edit("index.json", "shards", 1, file="a/../../x"), "{f}/index.json: names the shard 'a/../../x', expected a file of this folder"),
        (edit("index.json", "shards", 1, file=".."), "{f}/index.json: names the shard '..', expected a file of this folder"),
        (edit("index.json", "shards", 1, file=5), "{f}/index.json: cannot be read as an index of latents (…)"),
        (edit("index.json", "shards", 1, bytes=GONE), "{f}/index.json: cannot be read as an index of latents (…)"),
        (edit("index.json", "shards", 1, examples=10**9), "{f}/index.json: latents-00001-of-00002.arrayrecord has 1000000000 examples in 131072 bytes, expected 516 bytes or more for each"),
        (edit("index.json", "shards", 1, examples="x"), "{f}/index.json: latents-00001-of-00002.arrayrecord has 'x' examples in 131072 bytes, expected 516 bytes or more for each"),
        (remove("index.json"), "{f}: found 2 of 2 shards, expected all of them: preparing was not finished, run the same --mode=prepare command again and it continues"),
        (remove(OURS), "{f}/latents-00001-of-00002.arrayrecord: missing; the other 1 of 2 shards are whole: run --mode=prepare again to replace it"),
        (cut(OURS), "{f}/latents-00001-of-00002.arrayrecord: truncated, 131068 of 131072 bytes; the other 1 of 2 shards are whole: run --mode=prepare again to replace it"),
    ],
    ("empty", OF_LATENTS): [
        (lambda folder: None, "config.data.path is '{f}': it holds nothing, expected prepared latents (to sample from converted weights, latents_stats.pt is enough). Prepare them with `python -m ig_jax.main --mode=prepare --config=sit_xl_ig --config.data.images=/path/to/imagenet --config.data.path=/path/to/latents --config.data.autoencoder_path=/path/to/weights`, or train without any data: `python -m ig_jax.main --config=digits_ig --workdir=…`"),
        (os.rmdir, "config.data.path is '{f}': there is no such directory, expected prepared latents (to sample from converted weights, latents_stats.pt is enough). Prepare them with `python -m ig_jax.main --mode=prepare --config=sit_xl_ig --config.data.images=/path/to/imagenet --config.data.path=/path/to/latents --config.data.autoencoder_path=/path/to/weights`, or train without any data: `python -m ig_jax.main --config=digits_ig --workdir=…`"),
        (write("plan.json", "[]"), "{f}/plan.json: found a list, expected an object with fields"),
        (write("plan.json", "{}"), "{f}/plan.json: cannot be read as a plan of latents (…)"),
    ],
    ("classes", f"{OF_FOLDER} --config.model.num_classes=2"): [
        (shutil.rmtree, "{f}: no such folder, expected images as class/name.jpg"),
        (lambda folder: os.mkdir(folder / "c"), "{f}: class folder c has no images: found nothing; expected some in every folder, since labels follow the folders' order: add them, or move the folder elsewhere"),
        (lambda folder: os.makedirs(folder / "c" / "dir.png"), "{f}: class folder c has no images: found dir.png; expected some in every folder, since labels follow the folders' order: add them, or move the folder elsewhere"),
        (linked("c/x.png"), "{f}: class folder c has no images: found only hidden files or dangling links; expected some in every folder, since labels follow the folders' order: add them, or move the folder elsewhere"),
        (in_place_of("c/x.png", os.mkfifo), "{f}: class folder c has no images: found only hidden files or dangling links; expected some in every folder, since labels follow the folders' order: add them, or move the folder elsewhere"),
        (lambda folder: (folder / "a").rename(folder / "b" / "a"), "config.model.num_classes is 2: the data set 'folder' has 1"),
        (lambda folder: [path.unlink() for path in folder.glob("?/*")], "{f}: found a, b, expected a folder for each class with images in it (class/name.jpg, one of .jpg .jpeg .jpe .jfif .png .webp .avif .bmp .gif .tif .tiff .ppm .pgm), or unlabelled images"),
    ],
    ("classes", f"{OF_FOLDER} --config.model.num_classes=3"): [
        (lambda folder: None, "config.model.num_classes is 3: the data set 'folder' has 2"),
    ],
    ("classes", f"{OF_FOLDER} --config.model.num_classes=2 --config.data.image_size=16"): [
        (lambda folder: None, "config.data.image_size is 16: the network takes 8×8 (--config.data.image_size=8 crops to that, or --config.model.input_size=16 makes another network)"),
    ],
    ("own", f"{TRAIN} --config.data.name=samples --config.data.path={{f}} " "--config.train.init_from={d}/trained"): [
        (write("samples.json", "{"), "{f}/samples.json: cannot be read as an index of samples (…)"),
        (write("samples.json", "[]"), "{f}/samples.json: cannot be read as an index of samples (…)"),
        (edit("samples.json", source={}), "{f}/samples.json: cannot be read as an index of samples (…)"),
        (edit("samples.json", pieces=[]), "{f}/samples.json: cannot be read as an index of samples (…)"),
        (edit("samples.json", pieces=["../own/0.npz"]), "{f}/samples.json: names the file '../own/0.npz', expected one of this folder"),
        (edit("samples.json", pieces=["1.npz"]), "{f}/1.npz: found no such file, expected samples in an .npz file"),
        (write("0.npz", b""), "{f}/0.npz: cannot be read as samples in an .npz file (…)"),
        (cut("0.npz", 500), "{f}/0.npz: cannot be read as samples in an .npz file (…)"),
        (npz("0.npz", x=np.zeros((200, 4, 4, 1), np.float32), labels=np.zeros(200, int)), "{f}/0.npz: found float32 (200, 4, 4, 1) with 200 labels, expected float32 ('N', 8, 8, 1)"),
        (npz("0.npz", x=np.zeros((200, *SHAPE), np.float32), labels=np.full(200, 10)), "{f}/0.npz: found labels 10…10 of type int64, expected 0…9"),
        (npz("0.npz", x=np.array([{}]), labels=np.zeros(1, int)), "{f}/0.npz: cannot be read as samples in an .npz file (…)"),
    ],
    ("pictures", f"{SCORED} --config.evaluation.samples={{f}}/images"): [
        (lambda folder: shutil.rmtree(folder / "images"), "{f}/images: no such file or folder; expected an .npz or a folder of PNGs"),
        (write("images/000001.png", b""), "{f}/images/000001.png: cannot be read as a PNG (…)"),
        (write("images/000001.png", b"garbage"), "{f}/images/000001.png: cannot be read as a PNG (…)"),
        (write("images/000001.png", png("RGBA")), "{f}/images/000001.png: PNG of mode RGBA, expected 8-bit grey (L) or RGB"),
        (write("images/000001.png", png(size=4)), "{f}/images/000001.png: picture of shape (4, 4, 1), expected (8, 8, 1) as 000000.png has"),
        (write("images/abcdef.png", b"garbage"), "{f}/images/abcdef.png: cannot be read as a PNG (…)"),
        (write("labels.txt", b"\xff\x00"), "{f}/labels.txt: cannot be read as lines of index, label and name (…)"),
        (write("labels.txt", "0\n"), "{f}/labels.txt: cannot be read as lines of index, label and name (…)"),
        (write("protocol.json", "["), "{f}/protocol.json: cannot be read as JSON with num_samples and a protocol of model, weights, weights_hash, checkpoint_step, precision, sampler, sampler_kind, num_steps, time_shift, ig_scale, ig_interval, cfg_scale, cfg_interval, weak_model, labels, seed, autoencoder, autoencoder_hash (…)"),
        (write("protocol.json", b"\xff"), "{f}/protocol.json: cannot be read as JSON with num_samples and a protocol of model, weights, weights_hash, checkpoint_step, precision, sampler, sampler_kind, num_steps, time_shift, ig_scale, ig_interval, cfg_scale, cfg_interval, weak_model, labels, seed, autoencoder, autoencoder_hash (…)"),
        (write("protocol.json", "{}"), "{f}/protocol.json: cannot be read as JSON with num_samples and a protocol of model, weights, weights_hash, checkpoint_step, precision, sampler, sampler_kind, num_steps, time_shift, ig_scale, ig_interval, cfg_scale, cfg_interval, weak_model, labels, seed, autoencoder, autoencoder_hash (…)"),
    ],
    ("empty", f"{SCORED} --config.evaluation.samples={{f}}"): [
        (lambda folder: None, "{f}: holds no .png files; expected a folder of PNGs"),
    ],
    ("empty", f"{SCORED} --config.evaluation.samples={{f}}/x.npz"): [
        (lambda folder: None, "{f}/x.npz: no such file or folder; expected an .npz or a folder of PNGs"),
        (write("x.npz", b""), "{f}/x.npz: cannot be read as an .npz of pictures (…)"),
        (npz("x.npz", other=[0.0]), "{f}/x.npz: holds other.npy; expected arr_0.npy"),
        (npz("x.npz", arr_0=np.array([{}])), "{f}/x.npz: arr_0 holds pickled Python objects, refused; expected plain numbers"),
        (npz("x.npz", arr_0=np.zeros((4, 8, 8, 1), np.float32)), "{f}/x.npz: arr_0 is float32 (4, 8, 8, 1), expected uint8 (N, height, width, channels)"),
        (npz("x.npz", arr_0=np.zeros((4, 8, 8), np.uint8)), "{f}/x.npz: arr_0 is uint8 (4, 8, 8), expected uint8 (N, height, width, channels)"),
        (npz("x.npz", arr_0=np.zeros((0, 8, 8, 1), np.uint8)), "the number of pictures in {f}/x.npz is 0: expected at least 2 for Fréchet distance"),
        (npz("x.npz", arr_0=np.zeros((4, 16, 16, 1), np.uint8)), "samples are 16x16: reference digits data set has 8x8, expected the same resolution"),
        (zipped("x.npz", "arr_0", b""), "{f}/x.npz: holds arr_0; expected arr_0.npy"),
        (zipped("x.npz", "arr_0.npy", b"garbage"), "{f}/x.npz: cannot be read as an .npz of pictures (…)"),
        (zipped("x.npz", "arr_0.npy", npy_header("{'descr': '|u1', 'shape': (-4, 8, 8, 1), }")), "{f}/x.npz: cannot be read as an .npz of pictures (…)"),
        (in_place_of("x.npz", os.mkfifo), "{f}/x.npz: found a pipe or device, expected an .npz file"),
    ],
    ("empty", f"{SCORED} --config.evaluation.samples={{d}}/pictures/images " "--config.evaluation.reference={f}/x.npz"): [
        (lambda folder: None, "{f}/x.npz: found no such file, expected a reference .npz, or no path for the data set"),
        (write("x.npz", b"garbage"), "{f}/x.npz: cannot be read as an .npz file (…)"),
        (npz("x.npz", other=[0.0]), "{f}/x.npz: holds other.npy; expected arr_0.npy"),
        (npz("x.npz", mu=np.zeros(WIDTH)), "{f}/x.npz: holds mu, expected mu and sigma (and mu_s, sigma_s)"),
        (npz("x.npz", mu=np.array([{}]), sigma=EYE), "{f}/x.npz: mu holds pickled Python objects, refused; expected plain numbers"),
        (npz("x.npz", mu=["x"] * WIDTH, sigma=EYE), "{f}/x.npz: cannot be read as statistics in an .npz file (…)"),
        (npz("x.npz", mu=np.zeros(WIDTH), sigma=np.eye(3)), "{f}/x.npz: mu, sigma: statistics: mean has shape (64,) and covariance (3, 3), expected (D,) and (D, D)"),
        (npz("x.npz", mu=np.zeros(5), sigma=np.eye(5)), "{f}/x.npz: statistics of 5 features, expected 64 of digits-mlp"),
        (npz("x.npz", mu=np.full(WIDTH, np.nan), sigma=EYE), "{f}/x.npz: mu, sigma: statistics: mean or covariance has NaN or infinite values"),
        (npz("x.npz", mu=np.zeros(WIDTH), sigma=-EYE), "{f}/x.npz: mu, sigma: statistics: the covariance has eigenvalues down to -1, expected none below 0"),
        (npz("x.npz", mu=np.zeros(WIDTH), sigma=EYE * 1j), "{f}/x.npz: cannot be read as statistics in an .npz file (…)"),
        (npz("x.npz", mu=np.zeros(WIDTH), sigma=EYE, count="x"), "{f}/x.npz: cannot be read as statistics in an .npz file (…)"),
        (npz("x.npz", mu=np.zeros(WIDTH), sigma=EYE, metadata="{"), "{f}/x.npz: cannot be read as statistics in an .npz file (…)"),
        (npz("x.npz", mu=np.zeros(WIDTH), sigma=EYE, metadata='{"extractor": 5}'), "{f}/x.npz: statistics of another feature extractor (5), expected digits-mlp (…)"),
        (npz("x.npz", mu=np.zeros(WIDTH), sigma=EYE, features=np.zeros((3, 5))), "{f}/x.npz: features is float64 (3, 5), expected floats (N, 64)"),
        (npz("x.npz", mu=np.zeros(WIDTH), sigma=EYE, mu_s=np.zeros(3), sigma_s=EYE), "{f}/x.npz: mu_s, sigma_s: statistics: mean has shape (3,) and covariance (64, 64), expected (D,) and (D, D)"),
    ],
    ("empty", f"{SCORED} --config.evaluation.samples={{d}}/pictures --config.evaluation.reference=" "{d}/pictures --config.evaluation.features=inception " "--config.evaluation.inception_path={f}/w.safetensors"): [
        (lambda folder: None, "{f}/w.safetensors: Inception weights not found; download https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth (its SHA-256 starts with 6726825d)"),
        (write("w.safetensors", b"garbage"), "{f}/w.safetensors: SHA-256 starts with 795b6904, expected 6726825d; damaged or another file, download https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"),
        (tensors("w.safetensors", other=Y), "{f}/w.safetensors: SHA-256 starts with 932a43fc, expected 6726825d; damaged or another file, download https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"),
    ],
    ("empty", f"{PREPARED} --config.data.path={{t}}/out " "--config.data.autoencoder_path={f}/w.safetensors"): [
        (lambda folder: None, "{f}/w.safetensors: found no such file, expected a weight file"),
        (write("w.safetensors", b"garbage"), "{f}/w.safetensors: cannot be read as a safetensors file (…)"),
        (tensors("w.safetensors", other=Y), "{f}/w.safetensors: found no weights of an autoencoder, such as encoder.conv_in.weight; top-level keys: other"),
        (in_place_of("w.safetensors", os.mkfifo), "{f}/w.safetensors: found a pipe or device, expected a weight file"),
    ],
    ("empty", f"{PREPARED} {SMALL} --config.data.path={{f}}"): [
        (write("mine.txt", ""), "{f}: found mine.txt, expected an empty directory or one that --mode=prepare began"),
        (write("plan.json", "["), "{f}/plan.json: cannot be read as a JSON file (…)"),
    ],
    ("empty", f"{PREPARED} {SMALL} --config.data.path={{t}}/out --config.data.images={{f}}"): [
        (lambda folder: None, "{f}: found nothing, expected a folder for each class with images in it (class/name.jpg, one of .jpg .jpeg .jpe .jfif .png .webp .avif .bmp .gif .tif .tiff .ppm .pgm), or unlabelled images"),
        (os.rmdir, "{f}: no such folder, expected images as class/name.jpg"),
    ],
    ("trained", "--mode=sample --workdir={f} --guidance=best"): [
        (write("sweep/best.json", ""), "{f}/sweep/best.json: cannot be read as a result of --mode=sweep (…)"),
        (write("sweep/best.json", b"\xff"), "{f}/sweep/best.json: cannot be read as a result of --mode=sweep (…)"),
        (write("sweep/best.json", "[]"), "{f}/sweep/best.json: cannot be read as a result of --mode=sweep (…)"),
        (write("sweep/best.json", '{"guidance": {"ig_scale": "x"}}'), "{f}/sweep/best.json: cannot be read as a result of --mode=sweep (…)"),
    ],
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line and the line that answers it; `damage` is done to a copy of `name` first."""

    arguments: str
    line: str
    name: str = ""
    damage: Damage | None = None


CASES = [
    *(Case(arguments, line) for arguments, line in FLAGS.items()),
    *(Case(f"{TRAIN} --config.{field}", line) for field, line in FIELDS.items()),
    *(Case(f"{TRAINED} {arguments}", line) for arguments, line in SAMPLING.items()),
    *(
        Case("--config={f}/my.py --workdir={w}", line, "empty", write("my.py", text))
        for text, line in CONFIGS.items()
    ),
    *(
        Case(arguments, line, name, damage)
        for (name, arguments), cases in FILES.items()
        for damage, line in cases
    ),
]


def answer(case: Case, made: pathlib.Path, own: pathlib.Path, capsys) -> tuple:
    """The exit code of a case, its lines with paths as in the tables, whether nothing changed."""
    copy = own / case.name
    if case.damage is not None:
        shutil.copytree(made / case.name, copy)
        case.damage(copy)
    paths = {"{w}": own / "new", "{t}": own, "{d}": made}
    if case.name:
        paths = {"{f}": copy} | paths
    arguments = case.arguments
    for name, path in paths.items():
        arguments = arguments.replace(name, str(path))
    before = tree(made), tree(own)
    code = run(shlex.split(arguments))
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err, err
    for name, said in (paths | WORDS).items():
        err = err.replace(str(said), name)
    lines = [line for line in err.splitlines() if line.startswith("ig_jax: ")]
    return code, lines, (tree(made), tree(own)) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.arguments[-60:])
def test_bad_input(case, made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    code, lines, untouched = answer(case, made, tmp_path, capsys)
    expected = re.escape(f"ig_jax: {case.line}").replace(re.escape("(…)"), r"\(.+\)")
    assert len(lines) == 1 and re.fullmatch(expected, lines[0]), (lines, case.line)
    assert code == Exit.BAD_INPUT
    assert untouched


def test_the_table_is_long():
    assert len({(case.arguments, case.name, case.damage) for case in CASES}) == len(CASES) >= 150


@pytest.mark.parametrize(
    "flag,line",
    [
        ("--mode=smaple", "--mode is 'smaple': expected one of "),
        (
            "--config.mesh.fsdp=2",
            "config.mesh is data=-1, fsdp=2: expected a product that divides ",
        ),
    ],
)
def test_as_a_program_of_its_own(flag, line, made, tmp_path):
    """On one device, as most people have."""
    command = [sys.executable, "-m", "ig_jax.main", f"--config={made}/tiny.py", flag]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}/new"],
        env=os.environ | {"XLA_FLAGS": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (Exit.BAD_INPUT, "")
    assert done.stderr.startswith(f"ig_jax: {line}") and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("path", config_lib.FIELDS)
def test_no_field_takes_a_number_that_is_not_finite(path):
    plain = tiny_config().to_dict()
    section, _, name = path.rpartition(".")
    place = plain[section] if section else plain
    for value in NOT_FINITE:
        for wrong in (value, (value,), (1.0, value)):
            place[name] = wrong
            with pytest.raises(InputError, match=f"^config.{path} is ") as caught:
                config_lib.validate(ConfigDict(plain))
            assert "\n" not in str(caught.value)
