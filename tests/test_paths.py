"""Paths as people type them, for every flag, config field and function that takes one."""

import errno
import functools
import os
import pathlib

import jax.numpy as jnp
import pytest

import ig_jax
from ig_jax import config as config_lib
from ig_jax import paths
from ig_jax.convert import inception, workdir
from ig_jax.data import images, latents
from ig_jax.errors import InputError
from ig_jax.evaluation import images as image_sets
from ig_jax.evaluation import report, statistics
from ig_jax.storage import weight_files
from ig_jax.storage.checkpoints import Checkpoints, Score, find_step, find_workdir, saved_config
from ig_jax.training.state import TrainState
from tests.common import tiny_config


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder that is also the current one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


TYPED = ("runs/a", "./runs/a", "runs/a/", "runs//a/.", "~/runs/a", "~/runs/a/", "x/../runs/a")


@pytest.mark.parametrize("typed", TYPED)
def test_one_path_however_it_is_typed(home, typed):
    expected = str(home / "runs" / "a")
    assert os.fspath(paths.resolve(typed)) == expected
    assert os.fspath(paths.resolve(pathlib.Path(typed))) == expected
    assert paths.resolve(expected) == paths.resolve(paths.resolve(typed))


def test_here_home_and_links(home):
    assert os.fspath(paths.resolve(".")) == os.fspath(paths.resolve("~")) == str(home)
    (home / "far" / "away").mkdir(parents=True)
    (home / "link").symlink_to(home / "far" / "away")
    assert os.fspath(paths.resolve("link/a")) == str(home / "link" / "a")
    assert os.fspath(paths.resolve("link/../a")) == str(home / "far" / "a")


def test_buckets_are_left_alone(home):
    assert os.fspath(paths.resolve("gs://bucket/runs/a")) == "gs://bucket/runs/a"
    with pytest.raises(InputError, match="hdfs://a/b: expected a local path"):
        paths.resolve("hdfs://a/b")
    with pytest.raises(InputError, match="path is empty"):
        paths.resolve("")


# Config fields.

TEXTS = {"data.tfds_name", "data.autoencoder", "mesh.topology"}
TEXTS |= {"guidance.ig_schedule", "guidance.cfg_schedule", "train.wandb", "train.allow_changes"}


def test_every_field_without_a_default_text_is_a_path_or_known_to_be_none():
    """A new field for a path does not go unresolved."""
    found = {
        f"{section}.{name}"
        for section, values in config_lib.default_config().items()
        if hasattr(values, "items")
        for name, value in values.items()
        if value == "" or (isinstance(value, str) and name.endswith("path"))
    }
    assert found - {"loss.path"} - TEXTS == set(config_lib.PATH_FIELDS)


@pytest.mark.parametrize("field", config_lib.PATH_FIELDS)
@pytest.mark.parametrize("typed", TYPED)
def test_config_fields(home, field, typed):
    config = tiny_config()
    section, name = field.split(".")
    config[section][name] = typed
    resolved = config_lib.resolve_paths(config)
    assert resolved[section][name] == str(home / "runs" / "a")
    assert config_lib.differences(resolved, config) == []
    resolved[section][name] = config[section][name]
    assert resolved == config  # nothing else has changed


def test_config_fields_that_are_no_local_paths():
    config = tiny_config()
    config.data.images, config.data.path = "tfds:imagenet2012@train[:1%]", "gs://bucket/latents/"
    config.evaluation.samples = ""
    resolved = config_lib.resolve_paths(config)
    assert resolved.data.images == config.data.images and resolved.evaluation.samples == ""
    assert resolved.data.path == "gs://bucket/latents"


# Functions: what is wrong with a file is found, so the file is.

READERS = {
    "weights.safetensors": (
        ig_jax.from_pytorch,
        ig_jax.autoencoder_from_pytorch,
        weight_files.read_checkpoint,
        lambda path: ig_jax.from_pretrained("sit-xl-2", weights=path),
        lambda path: ig_jax.load_decoder("sd-vae-ft-ema", weights=path),
    ),
    "inception.pth": (inception.load_inception,),
    "scores.json": (report.load,),
    "set.npz": (image_sets.open_images, statistics.load_statistics),
    "latents/index.json": (lambda path: latents.open_latents(os.path.dirname(path)),),
    "images/class.txt": (lambda path: images.ImageFolder(os.path.dirname(path)),),
}


@pytest.mark.parametrize(
    "file,read", [(file, read) for file, readers in READERS.items() for read in readers]
)
def test_functions(home, monkeypatch, file, read):
    def message(path):
        with pytest.raises((InputError, OSError)) as error:
            read(path)
        return str(error.value).replace(str(home), "~")

    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    (home / file).parent.mkdir(parents=True, exist_ok=True)
    (home / file).write_bytes(b"not what it should be")
    monkeypatch.chdir(elsewhere)
    missing, found = message(f"~/missing/{file}"), message(str(home / file))
    assert found != missing.replace("missing/", "")
    assert message(f"~/{file}") == found
    assert message(f"../{file}") in (found, found.replace("~/", "../", 1))


# Workdirs.


def save(directory, *steps, scores=None):
    """Checkpoints of a tiny state; their configs tell the steps by the seed."""
    state = TrainState(jnp.int32(0), {"w": jnp.ones(2)}, {"w": jnp.ones(2)}, {"n": jnp.ones(1)})
    checkpoints = Checkpoints(directory, max_to_keep=9)
    for step in steps:
        config = tiny_config()
        config.seed = step
        score = scores and step in scores and Score("loss", scores[step])
        checkpoints.save(state, step, config, {}, score or None)
    checkpoints.close()


@pytest.mark.parametrize("typed", ["runs/a", "~/runs/a/"])
def test_checkpoints_in_a_workdir_as_typed(home, typed):
    save(typed, 3)
    assert (home / "runs" / "a" / "checkpoints" / "3").exists()
    assert [p.name for p in home.iterdir()] == ["runs"]
    assert Checkpoints(typed, read_only=True).steps() == [3]


def test_workdir_one_level_too_deep(home):
    save("a", 3, 7)
    for path in ("a", "a/checkpoints", "a/checkpoints/"):
        assert os.fspath(find_workdir(path)) == str(home / "a")
        assert saved_config(path).seed == find_step(path) == 7
        assert Checkpoints(path, read_only=True).steps() == [3, 7]
    line = f"expected the workdir, as in --workdir={home}/a --step=3$"
    with pytest.raises(InputError, match=line):
        saved_config("a/checkpoints/3")
    # What is called so and holds something else is a workdir like any other.
    for path in ("checkpoints", "a/checkpoints/11", "b/checkpoints"):
        assert os.fspath(find_workdir(path)) == str(home / path)
    save("checkpoints", 5)
    assert find_step("checkpoints") == 5


@pytest.mark.parametrize("folder", ["new", "new/er", "old", "."])
def test_writable_folders(home, folder):
    (home / "old").mkdir()
    paths.check_workdir(folder)
    paths.check_workdir("gs://bucket/run")
    assert [p.name for p in home.iterdir()] == ["old"]


@pytest.mark.parametrize(
    "folder,message",
    [
        ("file", "the workdir is .*/file: .*/file is a file, expected a folder"),
        ("file/a/b", "the workdir is .*/file/a/b: .*/file is a file, expected a folder"),
        ("dangling/a", "dangling is a link to nothing, expected a folder"),
        ("n" * 300, "expected names of at most 255 bytes, one has 300"),
        ("ü" * 128 + "/a", "expected names of at most 255 bytes, one has 256"),
        ("locked/a", r"locked cannot be written to \(Read-only file system\), expected a writable"),
        ("locked", r"locked cannot be written to \(Read-only file system\), expected a writable"),
        ("runs [1]/a", r"expected a path without \[ and \]"),
        ("caf\udce9", r"the workdir is 'caf\\udce9': expected a path that is UTF-8"),
    ],
)
def test_folders_that_cannot_be_written(home, monkeypatch, folder, message):
    (home / "file").write_text("")
    (home / "dangling").symlink_to(home / "nowhere")
    (home / "locked").mkdir()
    make = paths.tempfile.mkdtemp

    def mkdtemp(prefix, dir):
        if dir == paths.resolve("locked"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))
        return make(prefix=prefix, dir=dir)

    monkeypatch.setattr(paths.tempfile, "mkdtemp", mkdtemp)
    before = sorted(home.rglob("*"))
    with pytest.raises(InputError, match=message) as error:
        paths.check_workdir(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    for use in (functools.partial(workdir.save_workdir, None), saved_config):
        with pytest.raises(InputError):
            use(folder)
    assert sorted(home.rglob("*")) == before
