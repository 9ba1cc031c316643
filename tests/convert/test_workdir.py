"""Converted weights as workdirs: what sampling and training read there, and the way back."""

from __future__ import annotations

import tracemalloc

import jax
import numpy as np
import pytest

from ig_jax import config as config_lib
from ig_jax.convert.pytorch import from_pytorch, to_pytorch
from ig_jax.convert.workdir import config_for, load_workdir, save_workdir
from ig_jax.errors import InputError
from ig_jax.models import families, functional, network
from ig_jax.models.dit import DiTSpec
from ig_jax.storage import files
from ig_jax.storage.checkpoints import Checkpoints, Score, saved_config
from ig_jax.training import optimizer as optimizer_lib
from ig_jax.training import state as state_lib
from tests.common import golden
from tests.release import random_weights, release_shapes

GOLDEN = ("sit_params_small", "lightningdit_params_qknorm_noshift")


@pytest.fixture(scope="module", params=GOLDEN)
def converted(request, tmp_path_factory):
    """A model and the workdir written of it."""
    model = from_pytorch(golden(request.param), heads=4, auxiliary_depth=2)
    workdir = str(tmp_path_factory.mktemp("run"))
    save_workdir(model, workdir, data="digits")
    return model, workdir


def test_config_describes_the_network(converted):
    model, workdir = converted
    config = saved_config(workdir)
    config_lib.validate(config)
    assert config_lib.model_spec(config) == model.spec
    recipe = config_lib.default_config(model.spec.family)
    for section in ("loss", "optimizer", "sampler", "train"):
        assert config[section] == recipe[section]
    assert config.data.name == "digits"


@pytest.mark.parametrize("ema", [True, False])
def test_weights_come_back(converted, ema):
    model, workdir = converted
    loaded = load_workdir(workdir, ema=ema)
    assert loaded.spec == model.spec
    actual, expected = to_pytorch(loaded), to_pytorch(model)
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].tobytes() == array.tobytes(), name


def test_training_state_is_that_of_a_first_step(converted):
    """The optimiser state equals the one that training makes, under both published optimisers."""
    model, workdir = converted
    options = config_lib.optimizer_options(saved_config(workdir))
    graphdef, params = functional.split(model)
    layout = network.layout(graphdef, params)
    expected = state_lib.create(params, optimizer_lib.make_optimizer(options, layout))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), expected
    )
    checkpoints = Checkpoints(workdir, read_only=True)
    restored = checkpoints.restore(shapes)
    checkpoints.close()
    assert restored.data == {}
    jax.tree.map(np.testing.assert_array_equal, restored.state, expected)


def test_the_fresh_optimiser_state_takes_no_memory(tmp_path):
    """It is as large as the network twice over, and Orbax copies what it saves."""
    shape = dict(width=256, depth=3, heads=2, patch=2, channels=3, tokens=9, classes=5)
    model = from_pytorch(random_weights(release_shapes(**shape)), heads=2, auxiliary_depth=1)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(functional.split(model)[1]))
    tracemalloc.start()  # it sees what NumPy asks for, though not whether it is ever written
    save_workdir(model, str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    blocks = 3 * files._BLOCK  # of which checksums are made
    assert 2 * size < peak < 3 * size + blocks


def test_workdir_is_not_overwritten(converted):
    model, workdir = converted
    with pytest.raises(InputError, match="holds checkpoints already: expected a new workdir"):
        save_workdir(model, workdir)


def test_best_and_numbered_steps(tmp_path):
    model = from_pytorch(golden(GOLDEN[0]), heads=4, auxiliary_depth=2)
    config = config_for(model.spec)
    _, shapes = functional.split(families.abstract(model.spec))
    checkpoints = Checkpoints(str(tmp_path))

    def full(value):
        return jax.tree.map(lambda a: np.full(a.shape, value, np.float32), shapes)

    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.3)):
        state = state_lib.TrainState(np.int32(step), full(-step), full(step), {"n": np.zeros(1)})
        checkpoints.save(state, step, config, {}, Score("validation_loss", loss))
        checkpoints.wait()
    checkpoints.close()
    for which, ema, value in (("last", True, 3), ("best", True, 2), (1, True, 1), (3, False, -3)):
        weights = to_pytorch(load_workdir(str(tmp_path), which, ema))
        assert {float(array.flat[0]) for array in weights.values()} == {value}
    with pytest.raises(InputError, match="no checkpoint of step 4.*there are 1, 2, 3"):
        load_workdir(str(tmp_path), 4)


@pytest.mark.parametrize("family", ["sit", "dit", "lightningdit"])
def test_published_networks_get_their_recipe(family):
    expected = config_lib.default_config(family, "xl")
    expected.model.auxiliary_depth = 8
    assert config_for(DiTSpec.of(family, "xl")) == expected


def test_larger_pictures_and_no_head():
    config = config_for(DiTSpec.of("sit", "b", input_size=64, auxiliary_depths=()))
    assert (config.model.size, config.model.width, config.model.auxiliary_depth) == ("b", 0, 0)
    assert (config.data.image_size, config.data.autoencoder) == (512, "sd-vae-ft-ema")


def test_other_channels_have_no_autoencoder():
    config = config_for(DiTSpec.of("sit", "s", input_size=8, channels=1, width=128, heads=4))
    assert (config.model.width, config.model.depth, config.model.heads) == (128, 12, 4)
    assert (config.data.image_size, config.data.autoencoder) == (8, "")


def test_what_no_config_describes_is_refused(tmp_path):
    shape = dict(width=24, depth=3, heads=2, patch=1, channels=3, tokens=9, classes=5)
    weights = random_weights(release_shapes(**shape, lightning=True))
    model = from_pytorch(
        {name: array for name, array in weights.items() if "norm" not in name},
        heads=2,
        auxiliary_depth=1,
    )
    message = "no config describes this lightningdit: it has norm 'layer', expected 'rms'"
    with pytest.raises(InputError, match=message):
        save_workdir(model, str(tmp_path / "run"))
    with pytest.raises(InputError, match="config.data.name is 'digit': expected one of digits"):
        config_for(DiTSpec.of("sit", "s"), data="digit")
    assert not list(tmp_path.iterdir())
