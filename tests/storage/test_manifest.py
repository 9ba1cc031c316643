"""What becomes of checkpoints that are not what was written: noticed, named, passed over, kept."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from ig_jax.errors import InputError
from ig_jax.storage import manifest
from ig_jax.storage.checkpoints import (
    Checkpoints,
    Score,
    find_step,
    resumed_config,
    saved_config,
    saved_source,
)
from ig_jax.storage.manifest import UntrustedError
from ig_jax.training.state import TrainState
from tests.common import tiny_config


def state(value):
    arrays = {"w": jnp.full((2, 3), value)}
    return TrainState(jnp.int32(0), arrays, arrays, {"n": jnp.ones(1)})


PLACE = SingleDeviceSharding(jax.devices()[0])
SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=PLACE), state(0.0))
STEPS = (10, 20, 30)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("made")
    checkpoints = Checkpoints(workdir)
    for step in STEPS:
        config = tiny_config()
        config.seed = step
        score = Score("loss", 1 / step)
        checkpoints.save(state(step), step, config, {"step": step}, score, {"of": step})
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(made, tmp_path):
    return shutil.copytree(made, tmp_path / "w")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def item_files(workdir, item, step=30):
    folder = workdir / "checkpoints" / str(step) / item
    return sorted(path for path in folder.rglob("*") if path.is_file())


def weights(workdir, which="last", **options):
    checkpoints = Checkpoints(workdir, read_only=True, **options)
    return float(checkpoints.weights(SHAPES.params, which)["w"][0, 0])


def resume(workdir):
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.resume(SHAPES)
    checkpoints.close()
    return float(restored.state.params["w"][0, 0]), restored.data["step"]


READS = {
    "ema": weights,
    "config": saved_config,
    "source": saved_source,
    "metrics": lambda workdir: find_step(workdir, "best"),
    "data": lambda workdir: Checkpoints(workdir, read_only=True).restore(SHAPES),
    "params": lambda workdir: Checkpoints(workdir, read_only=True).restore(SHAPES),
    "optimizer": lambda workdir: Checkpoints(workdir, read_only=True).restore(SHAPES),
}


@pytest.mark.parametrize("item", READS)
def test_every_item_is_checked_when_it_is_read(workdir, item):
    READS[item](workdir)
    for path in item_files(workdir, item):
        good = path.read_bytes()
        flip(path)
        where = path.relative_to(workdir / "checkpoints" / "30")
        line = f"checkpoints/30 is not trusted: {where} has another checksum"
        with pytest.raises(UntrustedError, match=line) as caught:
            READS[item](workdir)
        assert "\n" not in str(caught.value)
        path.write_bytes(good)
    READS[item](workdir)


def test_the_line_names_the_flag_for_an_older_step(workdir):
    flip(item_files(workdir, "ema")[0])
    with pytest.raises(UntrustedError, match="older one is taken with --step=N .*are 10, 20$"):
        weights(workdir)
    assert weights(workdir, 20) == 20


def test_training_goes_back_to_the_newest_that_is_whole_and_deletes_nothing(workdir, caplog):
    before = {path.name for path in item_files(workdir, "params")}
    flip(item_files(workdir, "params")[0])
    flip(item_files(workdir, "config", 20)[0])
    assert resumed_config(workdir).seed == 30  # whose config is whole
    with caplog.at_level(logging.WARNING, "ig_jax"):
        assert resume(workdir) == (20.0, 20)
    (line,) = (r.getMessage() for r in caplog.records if r.name == "ig_jax")
    assert "checkpoints/30 is not trusted: params/" in line
    assert "kept as 30.untrusted, continuing from step 20" in line
    kept = workdir / "checkpoints" / "30.untrusted"
    assert {path.name for path in (kept / "params").rglob("*") if path.is_file()} == before
    # The step is free again, and other modes see the same steps.
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state(31.0), 30, tiny_config(), {"step": 30})
    checkpoints.close()
    assert weights(workdir) == 31


def test_training_stops_where_nothing_can_be_trusted(workdir):
    for step in STEPS:
        flip(item_files(workdir, "optimizer", step)[0])
    with pytest.raises(UntrustedError, match="checkpoints/30 is not trusted: optimizer/"):
        resume(workdir)
    assert Checkpoints(workdir, read_only=True).steps() == list(STEPS)


def test_a_copied_checkpoint_is_noticed(workdir):
    checkpoints = workdir / "checkpoints"
    shutil.copytree(checkpoints / "30", checkpoints / "9999")
    for read in (weights, saved_config):
        with pytest.raises(UntrustedError, match="9999 is not trusted: it is a copy of step 30"):
            read(workdir)
    assert resume(workdir) == (30.0, 30)


@pytest.mark.parametrize("data", [{}, {"step": 29}])
def test_the_data_must_be_where_the_step_is(tmp_path, data):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1.0), 30, tiny_config(), data)
    with pytest.raises(UntrustedError, match=r"its data iterator is \{.*\}, expected step 30"):
        checkpoints.restore(SHAPES)


def test_a_checkpoint_without_a_manifest_is_read_with_a_line(workdir, caplog):
    (workdir / "checkpoints" / "30" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING, "ig_jax"):
        assert weights(workdir) == weights(workdir) == 30
    (line,) = (r.getMessage() for r in caplog.records if r.name == "ig_jax")
    assert line.endswith("has no manifest.json, as of older versions: it cannot be verified")
    # What cannot be read is passed over all the same.
    for path in item_files(workdir, "params"):
        path.write_bytes(b"")
    assert resume(workdir) == (20.0, 20)


@pytest.mark.parametrize("change", ["flip", "truncate", "empty", "another"])
def test_a_damaged_manifest_is_noticed(workdir, change):
    path = workdir / "checkpoints" / "30" / "manifest.json"
    content = path.read_bytes()
    if change == "flip":
        flip(path)
    else:
        other = json.dumps(json.loads(content) | {"files": {}}).encode()
        path.write_bytes({"truncate": content[:-9], "empty": b"", "another": other}[change])
    with pytest.raises(UntrustedError, match="30 is not trusted: manifest.json is damaged"):
        weights(workdir)


def test_the_flag_spares_checksums_but_not_sizes(workdir, monkeypatch):
    read = []
    checksum = manifest.files.file_checksum
    monkeypatch.setattr(
        manifest.files, "file_checksum", lambda path: (read.append(path), checksum(path))[1]
    )
    assert weights(workdir, verify=False) == 30 and not read
    assert weights(workdir) == 30 and set(read) == set(item_files(workdir, "ema"))
    path = item_files(workdir, "ema")[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UntrustedError, match="has another size"):
        weights(workdir, verify=False)


def test_strays_are_no_checkpoints_in_any_mode_and_leftovers_are_removed(workdir):
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "30", folder / "00070")
    (folder / "tmp").mkdir()
    (folder / "80").write_text("a file")
    leftover = folder / "90.orbax-checkpoint-tmp"
    shutil.copytree(folder / "30", leftover)
    assert find_step(workdir) == 30 and saved_config(workdir).seed == 30
    assert Checkpoints(workdir, read_only=True).step() == 30 and weights(workdir) == 30
    assert leftover.exists()  # reading removes nothing
    checkpoints = Checkpoints(workdir)
    assert checkpoints.resume(SHAPES).data == {"step": 30}
    checkpoints.save(state(1.0), 31, tiny_config(), {"step": 31})
    checkpoints.close()
    assert not leftover.exists() and (folder / "00070").exists() and (folder / "80").exists()


def test_the_first_save_is_read_back(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(
        checkpoints._manager,
        "item_metadata",
        lambda step: (
            type(checkpoints._manager).item_metadata(checkpoints._manager, step)
            | {"ema": type("Metadata", (), {"tree": {}})}
        ),
    )
    with pytest.raises(InputError, match="1 is not trusted: ema reads back as {}, not {'w': "):
        checkpoints.save(state(1.0), 1, tiny_config(), {"step": 1})


def test_other_arrays_than_the_config_says_are_one_line(workdir):
    other = {"w": jax.ShapeDtypeStruct((5, 7), np.float32, sharding=PLACE)}
    with pytest.raises(InputError, match="cannot be read as ema of this config") as caught:
        Checkpoints(workdir, read_only=True).weights(other)
    assert not isinstance(caught.value, UntrustedError) and "\n" not in str(caught.value)
