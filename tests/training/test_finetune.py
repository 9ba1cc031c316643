"""Adding internal guidance to a network that was trained without it."""

import jax
import numpy as np
import pytest

from ig_jax.errors import InputError
from ig_jax.experiment import Experiment
from ig_jax.storage.checkpoints import Checkpoints
from ig_jax.training import loop, run
from ig_jax.training import setup as setup_lib
from ig_jax.training.validation import Validation
from tests.common import tiny_config


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("headless")
    config = tiny_config(num_steps=4, validate_every=0)
    config.model.auxiliary_depth = 0
    run.train(config, str(workdir))
    experiment = Experiment.from_config(config)
    return workdir, Checkpoints(str(workdir), read_only=True).weights(experiment.abstract_params())


def finetune(headless, workdir, trainable, steps=4, depths=1):
    config = tiny_config(num_steps=steps, validate_every=0, init_from=str(headless[0]))
    config.model.auxiliary_depth = depths
    config.optimizer.update(trainable=trainable, learning_rate=1e-2)
    return run.train(config, str(workdir))


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), y), a, b)))


def trunk(params):
    """Parameters of everything but the auxiliary heads, with the blocks as one stack."""
    params = {k: v for k, v in jax.device_get(params).items() if not k.startswith("auxiliary")}
    stacks = [params.pop(name) for name in ("before", "between_1", "after") if name in params]
    return params | {"blocks": jax.tree.map(lambda *a: np.concatenate(a), *stacks)}


def test_the_heads_alone(headless, tmp_path):
    trained = finetune(headless, tmp_path, "auxiliary_head", depths=(1, 2))
    assert equal(trunk(trained.ema), trunk(headless[1]))
    for name in ("auxiliary_head", "auxiliary_head_2"):
        leaves = jax.tree.leaves(jax.device_get(trained.ema[name]))
        assert max(np.abs(leaf).max() for leaf in leaves) > 0


def test_everything(headless, tmp_path):
    trained = finetune(headless, tmp_path, "all")
    assert not equal(trunk(trained.ema), trunk(headless[1]))
    # A continued run needs no `init_from` lookup: its own checkpoint is newer.
    again = finetune(headless, tmp_path, "all", steps=5)
    assert not equal(trunk(again.ema), trunk(trained.ema))


def test_a_trained_head_lowers_its_loss(headless, tmp_path):
    config = tiny_config(num_steps=40, validate_every=0, init_from=str(headless[0]))
    config.optimizer.update(trainable="auxiliary_head", learning_rate=1e-2)
    setup = setup_lib.Setup.from_config(config, tmp_path)
    fresh = setup.programs.init(jax.random.key(0)).params
    before = setup_lib.initial_weights(setup.experiment, fresh)
    held_out = Validation(setup)
    assert held_out.loss(loop.train(setup).ema) < held_out.loss(before) - 0.05


def test_another_architecture_is_refused(headless, tmp_path):
    config = tiny_config(init_from=str(headless[0]))
    config.model.width = 64
    with pytest.raises(InputError, match="init_from is .* has width 32: this config has 64"):
        run.train(config, str(tmp_path / "new"))
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_a_network_trained_on_another_mesh(tmp_path):
    """Its mesh says where it was trained: fsdp 8 there, a single device here."""
    config = tiny_config(num_steps=2, validate_every=0, checkpoint_every=2)
    config.mesh.update(data=1, fsdp=8)
    trained = run.train(config, str(tmp_path)).ema
    config = tiny_config(init_from=str(tmp_path))
    here = Experiment.from_config(config, jax.devices()[:1])
    found = setup_lib.initial_weights(here, trained)
    assert equal(found, jax.device_get(trained))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(found)} == {1}
