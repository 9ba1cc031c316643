import jax
import numpy as np
import pytest

from ig_jax.errors import InputError
from ig_jax.experiment import Experiment
from ig_jax.training import loop, sharding
from ig_jax.training.checkpoint import Checkpoints, saved_config
from tests.common import tiny_config


def weights(workdir, config, which="last", ema=True):
    experiment = Experiment.from_config(config)
    return Checkpoints(str(workdir), read_only=True).weights(
        experiment.abstract_params(), which, ema
    )


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    loop.train(tiny_config(), str(workdir))
    return workdir


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_stopped_run_continues_bit_for_bit(uninterrupted, tmp_path, stop_at, monkeypatch):
    """Stopped by a signal at any step, also between regular checkpoints."""
    trainer = loop.Trainer(tiny_config(), str(tmp_path))
    step, taken = trainer.programs.step, []

    def counting(*arguments):
        taken.append(1)
        trainer._stop = len(taken) == stop_at
        return step(*arguments)

    object.__setattr__(trainer.programs, "step", counting)
    with pytest.raises(loop.Stopped):
        trainer.run()
    assert Checkpoints(str(tmp_path), read_only=True).steps()[-1] == stop_at
    loop.train(tiny_config(), str(tmp_path))
    for ema in (True, False):
        assert_equal(
            weights(tmp_path, tiny_config(), ema=ema),
            weights(uninterrupted, tiny_config(), ema=ema),
        )


def test_checkpoints_keep_the_last_ones_and_the_best(uninterrupted):
    checkpoints = Checkpoints(str(uninterrupted), read_only=True)
    assert checkpoints.steps() == [3, 6]
    assert checkpoints.step("best") in (3, 6)
    assert saved_config(str(uninterrupted)).to_dict() == tiny_config().to_dict()
    with pytest.raises(InputError, match="no checkpoint of step 4.*there are 3, 6"):
        checkpoints.step(4)


def test_seeds_differ_and_training_learns(tmp_path):
    config = tiny_config(num_steps=60, checkpoint_every=60, validate_every=0)
    trainer = loop.train(config, str(tmp_path / "a"))
    before = loop.Trainer(config, str(tmp_path / "b"))
    initial = before.programs.init(jax.random.key(0)).params
    assert trainer._validation_loss(trainer.ema) < 0.9 * before._validation_loss(initial)


def losses(mesh_shape, steps=5, **changes):
    """Losses of the first steps on a mesh of some of the simulated devices."""
    config = tiny_config(**changes)
    experiment = Experiment.from_config(config)
    count = int(np.prod(mesh_shape))
    mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[:count])
    experiment = Experiment(config, experiment.spec, experiment.graphdef, experiment.shapes, mesh)
    source = experiment.open_data()
    programs = loop.make_programs(experiment, source)
    state = programs.init(jax.random.key(1))
    batches = loop.open_batches(config, source, mesh, None)
    found = []
    for _ in range(steps):
        state, metrics = programs.step(state, next(batches), jax.random.key(2))
        found.append([float(metrics.loss_final), float(metrics.loss_auxiliary)])
    return np.asarray(found)


def test_eight_devices_equal_one():
    np.testing.assert_allclose(losses((8, 1)), losses((1, 1)), rtol=1e-5)


def test_accumulation_is_a_mean_over_microbatches():
    """Noise differs between microbatches, so only the data term can be compared: same scale."""
    whole, parts = losses((1, 1), steps=2), losses((1, 1), steps=2, accumulate=4)
    np.testing.assert_allclose(parts, whole, rtol=0.2)
    assert not np.array_equal(parts, whole)


def test_another_config_is_refused_and_nothing_is_written(uninterrupted):
    before = sorted(str(p) for p in uninterrupted.rglob("*"))
    config = tiny_config()
    config.optimizer.learning_rate = 2e-3
    with pytest.raises(InputError, match="optimizer.learning_rate is 0.002, the checkpoint has"):
        loop.train(config, str(uninterrupted))
    assert sorted(str(p) for p in uninterrupted.rglob("*")) == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    config = tiny_config(num_steps=9)
    trainer = loop.Trainer(config, str(tmp_path))
    step, taken = trainer.programs.step, []

    def poisoned(state, batch, key):
        taken.append(1)
        if len(taken) == 5:
            batch = batch | {"x": batch["x"] * np.nan}
        return step(state, batch, key)

    object.__setattr__(trainer.programs, "step", poisoned)
    with pytest.raises(InputError, match="the loss is not finite at step 5: training stopped"):
        trainer.run()
    assert Checkpoints(str(tmp_path), read_only=True).steps() == [3]
    leaves = jax.tree.leaves(weights(tmp_path, config))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_data_that_does_not_fit_the_model():
    config = tiny_config()
    config.model.channels = 3
    with pytest.raises(InputError, match=r"is \(8, 8, 3\): the data set 'digits' has \(8, 8, 1\)"):
        Experiment.from_config(config).open_data()
