import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.data import pipeline
from ig_jax.diffusion import interpolant
from ig_jax.diffusion import loss as loss_lib
from ig_jax.errors import InputError
from ig_jax.experiment import Experiment
from ig_jax.parallel import sharding
from ig_jax.storage.checkpoints import Checkpoints, saved_config
from ig_jax.training import loop
from ig_jax.training import state as state_lib
from tests.common import tiny_config


def weights(workdir, config, which="last", ema=True):
    experiment = Experiment.from_config(config)
    return Checkpoints(str(workdir), read_only=True).weights(
        experiment.abstract_params(), which, ema
    )


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


NOT_UTF8 = "caf\udce9"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    config = tiny_config()
    config.data.path = NOT_UTF8  # of digits nothing is read there
    loop.train(config, str(workdir))
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
    expected = tiny_config()
    expected.data.path = NOT_UTF8
    assert saved_config(str(uninterrupted)).to_dict() == expected.to_dict()
    with pytest.raises(InputError, match="no checkpoint of step 4.*there are 3, 6"):
        checkpoints.step(4)


def test_seeds_differ_and_training_learns(tmp_path):
    config = tiny_config(num_steps=60, checkpoint_every=60, validate_every=0)
    trainer = loop.train(config, str(tmp_path / "a"))
    before = loop.Trainer(config, str(tmp_path / "b"))
    initial = before.programs.init(jax.random.key(0)).params
    assert trainer._validation_loss(trainer.ema) < 0.9 * before._validation_loss(initial)


def experiment_on(mesh_shape, **changes):
    """The tiny experiment on a mesh of some of the simulated devices."""
    mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: int(np.prod(mesh_shape))])
    # Before a batch must divide among all of them: it runs on that mesh alone.
    experiment = dataclasses.replace(Experiment.from_config(tiny_config()), mesh=mesh)
    return dataclasses.replace(experiment, config=tiny_config(**changes))


def random_params(experiment):
    """Weights none of which is zero, as those of fresh heads are."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), s.dtype), experiment.shapes
    )


def losses(mesh_shape, steps=5):
    """Losses of the first steps on a mesh."""
    experiment = experiment_on(mesh_shape)
    source = experiment.open_data()
    programs = loop.make_programs(experiment, source)
    state = programs.init(jax.random.key(1))
    batches = loop.open_batches(experiment.config, source, experiment.mesh, None)
    found = []
    for _ in range(steps):
        state, metrics = programs.step(state, next(batches), jax.random.key(2))
        found.append([float(metrics.loss_final), float(metrics.loss_auxiliary)])
    return np.asarray(found)


def test_eight_devices_equal_one():
    np.testing.assert_allclose(losses((8, 1)), losses((1, 1)), rtol=1e-5)


def test_accumulation_is_a_mean_over_microbatches(monkeypatch):
    """At noise and times that follow from the examples, so that any split sees the same ones."""

    def fixed(network, x, labels, key, options, null_label, omega):
        del key, null_label
        times = jax.nn.sigmoid(x.sum((1, 2, 3)) / 8)
        return loss_lib.losses_at(network, x, labels, jnp.flip(x, 1), times, options, omega)

    monkeypatch.setattr(state_lib.loss_lib, "losses", fixed)
    experiment = experiment_on((1, 1))
    source = experiment.open_data()
    params = random_params(experiment)
    batch = next(loop.open_batches(experiment.config, source, experiment.mesh, None))

    def gradient(accumulate):
        options = loop.step_options(tiny_config(accumulate=accumulate), 10, source)
        bind = functools.partial(sharding.network, experiment.mesh, experiment.graphdef)
        return jax.jit(state_lib.make_gradient(bind, options))(params, batch, jax.random.key(0), 0)

    whole, parts = gradient(1), gradient(4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())


def test_initialisation_and_steps_share_no_key(tmp_path):
    trainer = loop.Trainer(tiny_config(), str(tmp_path))
    keys = {}

    def init(key):
        keys["initialisation"] = key
        raise KeyboardInterrupt

    object.__setattr__(trainer.programs, "init", init)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    steps = jax.vmap(jax.random.fold_in, (None, 0))(trainer.key, jnp.arange(1000))
    used = jax.random.key_data(steps).tolist()
    assert jax.random.key_data(keys["initialisation"]).tolist() not in used


@pytest.mark.parametrize("batch_size", [4, 8, 32])
def test_validation_sees_every_time_at_any_batch_size(batch_size):
    source = experiment_on((1, 1)).open_data()
    count = len(source.validation)
    for path in interpolant.INTERPOLANTS.values():
        batches = list(loop.held_out_batches(source, path, batch_size))
        fields = ("index", "time", "weight")
        rows = {name: np.concatenate([getattr(b, name) for b in batches]) for name in fields}
        kept = rows["weight"] > 0
        assert rows["index"][kept].tolist() == list(range(count))
        times = rows["time"][kept]
        expected = path.training_time((jnp.arange(count) + 0.5) / count)
        # Up to a step of the VP path, whose numbers are rounded there.
        np.testing.assert_allclose(np.sort(times), expected, atol=1.01e-3)
        # Examples may be sorted by class: no run of them sees one part of the times alone.
        for run in np.split(times[: count // 10 * 10], 10):
            assert run.min() < 0.5 < run.max()
        if path.name == "vp":
            np.testing.assert_allclose(times * 1000, np.round(times * 1000), atol=1e-3)


def test_validation_loss_does_not_depend_on_the_batch_size():
    found = []
    for batch_size in (4, 8, 32):
        experiment = experiment_on((1, 1), batch_size=batch_size)
        source = experiment.open_data()
        programs = loop.make_programs(experiment, source)
        params = random_params(experiment)
        found.append(loop.validation_loss(programs, experiment, source, params))
    np.testing.assert_allclose(found, found[0], rtol=1e-5)


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


def test_nothing_is_written_where_workers_lack_shared_memory(tmp_path, monkeypatch):
    usage = pipeline.shutil.disk_usage("/")._replace(free=1 << 10)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(pipeline, "SHARED_MEMORY", "/")
    config = tiny_config()
    config.data.num_workers = 1
    with pytest.raises(InputError, match="config.data.num_workers is 1"):
        loop.run(config, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()
