"""Fuzz: any config is refused by `validate` or trains and samples; files that were changed at
random are read as what they say, or refused in one line that names them.

Formats with checksums (ArrayRecord, `.npz`, our `index.json`) must give the very same arrays. The
others cannot tell a number that was changed from one that was written: there a reader of another
hand decides what the file says.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import fields
from ig_jax.data import latents
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError
from ig_jax.evaluation import extractors, metrics, statistics
from ig_jax.sampling.labels import label_rule
from ig_jax.sampling.run import check_weaker, make_engine
from ig_jax.storage import weight_files
from ig_jax.streams import stream
from ig_jax.training.setup import Setup, open_batches
from tests.common import tiny_config
from tests.test_bad_input import LIGHT, NPY, OURS, make_light, make_ours


def tried(examples: int) -> settings:
    """The same examples in every run."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[*slow, HealthCheck.function_scoped_fixture],
    )


# Configs.

# Fields that fix how much work a step is → what is small, beside what is wrong.
SMALL = {
    "model.width": (0, 32, 48),
    "model.depth": (2, 3, 4),
    "model.heads": (0, 1, 2, 3),
    "model.size": ("s",),
    "model.input_size": (4, 8, 16),
    "model.num_classes": (0, 1, 10, 11),
    "train.batch_size": (8, 12, 16, 64),
    "train.accumulate": (1, 2, 3),
    "sampler.batch_size": (8, 12, 16),
    "sampler.num_steps": (1, 2, 3),
    "sampler.num_samples": (1, 8),
    "data.num_workers": (0,),
    "data.image_size": (4, 8, 16),
    "optimizer.newton_schulz_steps": (1, 5),
}
# What is elsewhere: on disk, on the network or on other devices.
ELSEWHERE = {"imports", "train.wandb", "data.tfds_name", "mesh.topology"}
WRONG = (-1, 0, 1, 2**31 - 1, 2**31, 2**32, 10**20, 1.5, float("nan"), float("inf"), True, None)
TEXTS = ("", "x", "auto", "linear", "linear(x=1)", "interval(low=0.5)", "207", "__import__('os')")


def values(path: str) -> st.SearchStrategy:
    """Values of a field: its own kind at the bounds and beyond them, and other kinds."""
    field = config_lib.FIELDS[path]
    right: list[Any] = [field.default]
    if field.choices is not None:
        right += field.choices
    elif field.table is not None:
        right += [*field.table, *(f"{name}()" for name in field.table)]
    elif path in SMALL:
        right += SMALL[path]
    elif field.limits is not None:
        low, high = field.limits.low, field.limits.high
        right += [v for v in (low, high, 2, 4, 0.5, 1e-6) if abs(v) < 2**31]
        right += [low - 1, high + 1, low + 1]
    elif field.kind is bool:
        right += [True, False]
    wrong = [
        v for v in WRONG if path not in SMALL or not isinstance(v, int) or v in (-1, 0, 10**20)
    ]
    one = st.sampled_from(right) | st.sampled_from(right) | st.sampled_from([*wrong, *TEXTS])
    return one | st.lists(one, max_size=3).map(tuple) if fields._is_list(field.kind) else one


FUZZED = [path for path in config_lib.FIELDS if path not in ELSEWHERE]


@st.composite
def configs(draw) -> ConfigDict:
    """The tiny config with a few fields of other values."""
    plain = tiny_config().to_dict()
    for path in draw(st.lists(st.sampled_from(FUZZED), min_size=1, max_size=4, unique=True)):
        section, _, name = path.rpartition(".")
        (plain[section] if section else plain)[name] = draw(values(path))
    return ConfigDict(plain)


def prepared(config: ConfigDict) -> Setup | None:
    """A training as `ig_jax.main` would start it, or None if it is refused in one line."""
    try:
        config_lib.validate(config)
        extractors.check_name(config)
        metrics.check_name(config)
        setup = Setup.from_config(config_lib.resolve_paths(config), "/nowhere/at/all")
        label_rule(setup.config, setup.source.class_names)
        check_weaker(setup.experiment)
        return setup
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        assert re.search("config|the data set|no checkpoint in", str(error)), error
        return None


def steps(setup: Setup, count: int = 2) -> None:
    """Takes steps and draws a batch of samples."""
    state = setup.programs.init(stream(setup.config.seed, "initialisation"))
    batches = open_batches(setup.config, setup.source, setup.experiment.mesh)
    key = stream(setup.config.seed, "training")
    for _ in range(count):
        state, found = setup.programs.step(state, next(batches), key)
    batches.close()
    jax.block_until_ready(found)
    engine, rule = make_engine(setup.experiment), label_rule(setup.config, setup.source.class_names)
    guidance = GuidanceOptions.of(setup.config.guidance).build(engine.weaker)
    indices = np.arange(8)
    x = engine.draw(state.ema, guidance, setup.config.seed, indices, rule(indices))
    assert x.shape == (8, *setup.experiment.sample_shape)


def traced(setup: Setup) -> None:
    """Traces a step, which finds all that running it would, but for its numbers."""
    batches = open_batches(setup.config, setup.source, setup.experiment.mesh)
    batch = next(batches)
    batches.close()
    jax.eval_shape(setup.programs.step, setup.programs.shapes, batch, jax.random.key(0))


@tried(40)
@given(configs())
def test_a_config_is_refused_or_can_be_trained(config):
    setup = prepared(config)
    if setup is not None:
        traced(setup)


@pytest.mark.slow
@tried(15)
@given(configs())
def test_a_config_is_refused_or_trains_and_samples(config):
    setup = prepared(config)
    assume(setup is not None)
    steps(setup)


# Files.


@st.composite
def mutated(draw, content: bytes) -> bytes:
    """The content with some bytes changed, lost, repeated or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        size = len(data)
        if not size:
            break
        # The header and the end say what there is.
        near = st.integers(0, min(size - 1, 256)) | st.integers(max(0, size - 256), size - 1)
        at = draw(near | st.integers(0, size - 1))
        count = draw(st.sampled_from((1, 1, 4, 8, 64, size)))
        match draw(st.sampled_from(["flip", "flip", "set", "cut", "drop", "insert", "repeat"])):
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                data[at : at + count] = draw(st.sampled_from((b"\x00", b"\xff", b"9", b"-")))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + count]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "repeat":
                data[at:at] = data[at : at + count]
    return bytes(data)


@st.composite
def restructured(draw, content: bytes) -> bytes:
    """JSON of which a value is another, is lost, or has a neighbour."""
    value = json.loads(content)
    place, key = None, None
    inside = value
    while isinstance(inside, dict | list) and inside:
        place = inside
        keys = sorted(inside) if isinstance(inside, dict) else range(len(inside))
        key = draw(st.sampled_from(list(keys)))
        inside = inside[key]
        if draw(st.booleans()):
            break
    other = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    other |= st.just([]) | st.just({}) | st.sampled_from((10**12, -1, "../x", "/etc/passwd"))
    if place is None or draw(st.sampled_from((True, False, False, False))):
        return json.dumps(draw(other)).encode()
    if draw(st.booleans()):
        place[key] = draw(other)
    else:
        del place[key]
    return json.dumps(value).encode()


def make_npy_folder(folder: pathlib.Path) -> None:
    (folder / "00000").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [NPY.format(i) for i in range(3)]
    for name in names:
        np.save(folder / name, rng.uniform(0, 1, (2, 3, 2)).astype(np.float32))
    entries = [[name, i] for i, name in enumerate(names)]
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))


def make_older_index(folder: pathlib.Path) -> None:
    make_ours(folder)
    index = json.loads((folder / "index.json").read_text())
    del index["digest"]
    (folder / "index.json").write_text(json.dumps(index))


def make_pytorch(folder: pathlib.Path) -> None:
    import torch

    folder.mkdir()
    torch.save({"ema": {"w": torch.arange(6.0).reshape(2, 3)}, "steps": 3}, folder / "w.pt")


def make_weights(folder: pathlib.Path) -> None:
    folder.mkdir()
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.asarray(3)}
    (folder / "w.safetensors").write_bytes(safetensors.numpy.save(arrays))


def make_archives(folder: pathlib.Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.savez(folder / "s.npz", mean=np.arange(4.0), std=np.ones(4))
    found = statistics.gaussian_statistics(rng.standard_normal((20, 4)))
    statistics.save_statistics(folder / "r.npz", statistics.ReferenceStatistics(found))
    np.savez(folder / "p.npz", rng.integers(0, 255, (5, 4, 4, 3), np.uint8))


def examples(folder: pathlib.Path) -> list[np.ndarray]:
    """Everything that opened latents give."""
    source = latents.open_latents(str(folder))
    found = [source.shift, source.scale, np.asarray(source.num_classes)]
    for i in range(len(source.train)):
        example = source.train[i]
        found += [np.asarray(example[name]) for name in sorted(example)]
    return found


def arrays(name: str, folder: pathlib.Path) -> list[np.ndarray]:
    weights = weight_files.read_weights(folder / name)
    return [weights[name] for name in sorted(weights)]


def reference(folder: pathlib.Path) -> list[np.ndarray]:
    found = statistics.load_statistics(folder / "r.npz")
    return [found.pool.mean, found.pool.covariance, np.asarray(found.pool.count)]


def by_numpy(file: pathlib.Path) -> list[np.ndarray]:
    """Moments as NumPy reads them, in the order of `examples`."""
    found = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
    mean, std = np.split(np.moveaxis(found, 0, -1), 2, axis=-1)
    return [mean, std]


def by_safetensors(file: pathlib.Path) -> list[np.ndarray]:
    found = safetensors.numpy.load(file.read_bytes())
    return [found[name] for name in sorted(found)]


def by_torch(file: pathlib.Path) -> list[np.ndarray]:
    import torch

    found = torch.load(io.BytesIO(file.read_bytes()), weights_only=True)
    return [leaf.numpy() for leaf in jax.tree.leaves(found) if isinstance(leaf, torch.Tensor)]


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        make: makes a folder with it.
        file: its name there.
        read: what the package reads in that folder.
        says: what another reader finds in the file, where nothing tells that it was changed: a part
            of what `read` gives.
        change: another way to change it than byte by byte.
    """

    make: Callable[[pathlib.Path], object]
    file: str
    read: Callable[[pathlib.Path], list[np.ndarray]]
    says: Callable[[pathlib.Path], list[np.ndarray]] | None = None
    change: Callable[[bytes], st.SearchStrategy[bytes]] = mutated


FORMATS = {
    "npy": Format(make_npy_folder, NPY.format(0), examples, by_numpy),
    "dataset.json": Format(make_npy_folder, "dataset.json", examples, lambda file: []),
    "dataset.json values": Format(
        make_npy_folder, "dataset.json", examples, lambda file: [], restructured
    ),
    "npz of statistics": Format(
        make_archives, "s.npz", lambda f: list(latents.read_statistics(f / "s.npz", 4))
    ),
    "npz of a reference": Format(make_archives, "r.npz", reference),
    "npz of pictures": Format(
        make_archives, "p.npz", lambda f: list(statistics.NpzImages(f / "p.npz").chunks(2))
    ),
    "safetensors": Format(
        make_weights, "w.safetensors", functools.partial(arrays, "w.safetensors"), by_safetensors
    ),
    "safetensors of latents": Format(make_light, LIGHT, examples, lambda file: []),
    "ArrayRecord": Format(make_ours, OURS, examples),
    "index.json": Format(make_ours, "index.json", examples),
    "index.json values": Format(make_ours, "index.json", examples, None, restructured),
    "index.json of older versions": Format(
        make_older_index, "index.json", examples, lambda file: [], restructured
    ),
    "pt": Format(make_pytorch, "w.pt", functools.partial(arrays, "w.pt"), by_torch),
}
KINDS = [pytest.param(name, marks=pytest.mark.torch) if name == "pt" else name for name in FORMATS]


def equal(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(found) == len(expected) and all(
        a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        for a, b in zip(found, expected, strict=True)
    )


def check(kind: str, count: int) -> None:
    """Reads so many changed files of a kind."""
    how = FORMATS[kind]
    outcomes = dict.fromkeys(("same", "as it says", "refused"), 0)
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / "made"
        how.make(folder)
        file = folder / how.file
        content, expected = file.read_bytes(), how.read(folder)

        @tried(count)
        @given(how.change(content))
        def reads(changed):
            file.write_bytes(changed)
            try:
                found = how.read(folder)
            except InputError as error:
                outcomes["refused"] += 1
                assert "\n" not in str(error), error
                # An index that says something else of a shard is a shard that is not as it says.
                assert str(file if how.change is mutated else folder) in str(error), error
                return
            if equal(found, expected):
                outcomes["same"] += 1
                return
            assert how.says is not None, "other arrays than those that were written"
            outcomes["as it says"] += 1
            for said in how.says(file):
                assert any(
                    equal([said.astype(x.dtype)], [x]) for x in found if x.shape == said.shape
                )

        reads()
    assert outcomes["refused"], outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files(kind):
    check(kind, 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_changed_files(kind):
    check(kind, 800)
