import contextlib
import dataclasses
import functools
import itertools
import json
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax import stops
from ig_jax.data import pipeline
from ig_jax.diffusion import interpolant
from ig_jax.diffusion import loss as loss_lib
from ig_jax.errors import InputError, NotFiniteError, Stopped
from ig_jax.experiment import Experiment
from ig_jax.parallel import sharding
from ig_jax.storage.checkpoints import Checkpoints, Score, saved_config
from ig_jax.training import logs, loop, run
from ig_jax.training import setup as setup_lib
from ig_jax.training import state as state_lib
from ig_jax.training.callbacks import Callback, Profile
from ig_jax.training.setup import Setup
from ig_jax.training.validation import Validation, held_out_batches
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
    run.train(config, str(workdir))
    return workdir


def with_step(setup, wrap):
    """The setup with another training step, made of its own."""
    programs = dataclasses.replace(setup.programs, step=wrap(setup.programs.step))
    return dataclasses.replace(setup, programs=programs)


class Signal(Callback):
    """SIGTERM, as a cluster sends it, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, moment):
        if moment.step == self.step:
            signal.raise_signal(signal.SIGTERM)


LONGER = [pytest.param(stop_at, marks=pytest.mark.slow) for stop_at in (1, 5)]


@pytest.mark.parametrize("stop_at", [3, *LONGER])
def test_a_stopped_run_continues_bit_for_bit(uninterrupted, tmp_path, stop_at):
    """Stopped by a signal at any step, also between regular checkpoints."""
    setup = Setup.from_config(tiny_config(), tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"^stopped at step {stop_at}, checkpoint saved; the same"):
        loop.train(setup, [Signal(stop_at), Validation(setup)])
    assert signal.getsignal(signal.SIGTERM) is handler
    assert Checkpoints(str(tmp_path), read_only=True).steps()[-1] == stop_at
    run.train(tiny_config(), str(tmp_path))
    for ema in (True, False):
        assert_equal(
            weights(tmp_path, tiny_config(), ema=ema),
            weights(uninterrupted, tiny_config(), ema=ema),
        )


class LongEvaluation(Callback):
    """Takes so long that it ends before its time when a stop is asked for."""

    saves = True

    def due(self, step, saving):
        return step == 2

    def on_due(self, moment):
        assert not stops.asked()
        signal.raise_signal(signal.SIGINT)
        assert stops.asked()
        raise Stopped


def test_a_stop_that_is_asked_for_during_an_evaluation_need_not_wait_for_it(tmp_path):
    setup = Setup.from_config(tiny_config(), tmp_path)
    with pytest.raises(Stopped, match="^stopped at step 2, checkpoint saved"):
        loop.train(setup, [LongEvaluation()])
    assert Checkpoints(tmp_path, read_only=True).steps() == [2]
    assert not stops.asked()


def test_a_signal_before_the_first_step_is_the_programs(tmp_path):
    """Nothing is there to be saved, and compiling may take minutes."""

    def step(*_):
        signal.raise_signal(signal.SIGINT)

    setup = with_step(Setup.from_config(tiny_config(), tmp_path), lambda _: step)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.train(setup)
    finally:
        signal.signal(signal.SIGINT, before)


def test_checkpoints_keep_the_last_ones_and_the_best(uninterrupted):
    checkpoints = Checkpoints(str(uninterrupted), read_only=True)
    assert checkpoints.steps() == [3, 6]
    assert checkpoints.step("best") in (3, 6)
    expected = tiny_config()
    expected.data.path = NOT_UTF8
    assert saved_config(str(uninterrupted)).to_dict() == expected.to_dict()
    with pytest.raises(InputError, match="no checkpoint of step 4.*there are 3, 6"):
        checkpoints.step(4)


def test_training_learns(tmp_path):
    config = tiny_config(num_steps=60, checkpoint_every=60, validate_every=0)
    setup = Setup.from_config(config, tmp_path)
    initial = setup.programs.init(jax.random.key(0)).params
    held_out = Validation(setup)
    assert held_out.loss(loop.train(setup).ema) < 0.9 * held_out.loss(initial)


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
    programs = setup_lib.make_programs(experiment, source)
    state = programs.init(jax.random.key(1))
    batches = setup_lib.open_batches(experiment.config, source, experiment.mesh)
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
    batch = next(setup_lib.open_batches(experiment.config, source, experiment.mesh))

    def gradient(accumulate):
        options = setup_lib.step_options(tiny_config(accumulate=accumulate), 10, source)
        bind = functools.partial(sharding.network, experiment.mesh, experiment.graphdef)
        return jax.jit(state_lib.make_gradient(bind, options))(params, batch, jax.random.key(0), 0)

    whole, parts = gradient(1), gradient(4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())


def test_initialisation_and_steps_share_no_key(tmp_path):
    setup, keys = Setup.from_config(tiny_config(), tmp_path), {}

    def init(key):
        keys["initialisation"] = key
        return setup.programs.init(key)

    def step(state, batch, key):
        keys["training"] = key
        raise KeyboardInterrupt

    programs = dataclasses.replace(setup.programs, init=init, step=step)
    with pytest.raises(KeyboardInterrupt):
        loop.train(dataclasses.replace(setup, programs=programs))
    steps = jax.vmap(jax.random.fold_in, (None, 0))(keys["training"], jnp.arange(1000))
    used = jax.random.key_data(steps).tolist()
    assert jax.random.key_data(keys["initialisation"]).tolist() not in used


@pytest.mark.parametrize("batch_size", [4, 8, 32])
def test_validation_sees_every_time_at_any_batch_size(batch_size):
    source = experiment_on((1, 1)).open_data()
    count = len(source.validation)
    for path in interpolant.INTERPOLANTS.values():
        batches = list(held_out_batches(source, path, batch_size))
        fields = ("index", "time", "weight")
        rows = {name: np.concatenate([getattr(b, name) for b in batches]) for name in fields}
        kept = rows["weight"] > 0
        assert rows["index"][kept].tolist() == list(range(count))
        times = rows["time"][kept]
        expected = path.training_time((jnp.arange(count) + 0.5) / count)
        # Up to a step of the VP path, whose numbers are rounded there.
        np.testing.assert_allclose(np.sort(times), expected, atol=1.01e-3)
        # Examples may be sorted by class: no run of them sees one part of the times alone.
        for part in np.split(times[: count // 10 * 10], 10):
            assert part.min() < 0.5 < part.max()
        if path.name == "vp":
            np.testing.assert_allclose(times * 1000, np.round(times * 1000), atol=1e-3)


def test_validation_loss_does_not_depend_on_the_batch_size(tmp_path):
    found = []
    for batch_size in (4, 8, 32):
        experiment = experiment_on((1, 1), batch_size=batch_size)
        source = experiment.open_data()
        programs = setup_lib.make_programs(experiment, source)
        held_out = Validation(Setup(experiment, source, programs, tmp_path))
        found.append(held_out.loss(random_params(experiment)))
    np.testing.assert_allclose(found, found[0], rtol=1e-5)


def test_another_config_is_refused_and_nothing_is_written(uninterrupted):
    before = sorted(str(p) for p in uninterrupted.rglob("*"))
    config = tiny_config()
    config.optimizer.learning_rate = 2e-3
    with pytest.raises(InputError, match="optimizer.learning_rate is 0.002, the checkpoint has"):
        run.train(config, str(uninterrupted))
    assert sorted(str(p) for p in uninterrupted.rglob("*")) == before


def poisoned_at(number):
    """Makes a training step that meets a batch of NaN the `number`-th time."""

    def wrap(step):
        taken = itertools.count(1)

        def poisoned(state, batch, key):
            bad = next(taken) == number
            return step(state, batch | {"x": batch["x"] * np.nan} if bad else batch, key)

        return poisoned

    return wrap


def test_a_loss_that_is_not_finite_stops_and_its_advice_works(tmp_path):
    config = tiny_config(num_steps=9)
    setup = with_step(Setup.from_config(config, tmp_path), poisoned_at(5))
    message = (
        r"^the loss is not finite at step 5, nor is \w+(\.\w+)+: training stopped; checkpoint 3 in"
    )
    with pytest.raises(NotFiniteError, match=message) as caught:
        loop.train(setup)
    assert not isinstance(caught.value, InputError)  # nobody typed anything wrong
    assert Checkpoints(str(tmp_path), read_only=True).steps() == [3]
    leaves = jax.tree.leaves(weights(tmp_path, config))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert "--config.train.allow_changes=optimizer" in str(caught.value)
    config.optimizer.learning_rate /= 2
    with pytest.raises(InputError, match="config.optimizer.learning_rate is 0.0005"):
        run.train(config, str(tmp_path))
    config.train.allow_changes = "optimizer"
    run.train(config, str(tmp_path))
    kept = json.loads((tmp_path / loop.CHANGES).read_text())
    line = "config.optimizer.learning_rate is 0.0005, the checkpoint has 0.001"
    assert kept == [{"step": 3, "changes": [line]}]
    assert saved_config(str(tmp_path)).optimizer.learning_rate == 0.0005


def test_no_state_that_is_not_finite_is_saved_even_before_its_loss_shows_it(tmp_path):
    """An update that overflows while loss and gradient are fine, saved at every step."""
    config = tiny_config(checkpoint_every=1, validate_every=0)
    config.optimizer.learning_rate = 3e38
    config.optimizer.clip_norm = 0.0
    setup = Setup.from_config(config, tmp_path)
    with pytest.raises(NotFiniteError, match="the (update|gradient|loss) is not finite at step"):
        loop.train(setup)
    for step in Checkpoints(tmp_path, read_only=True).steps():
        for ema in (True, False):
            leaves = jax.tree.leaves(weights(tmp_path, config, step, ema))
            assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_updates_that_are_not_finite_can_be_skipped_and_are_counted(tmp_path, caplog, monkeypatch):
    config = tiny_config(not_finite="skip", log_every=3, validate_every=0)
    setup = with_step(Setup.from_config(config, tmp_path), poisoned_at(2))
    written = []
    monkeypatch.setattr(logs.Logs, "write_scalars", lambda self, *row: written.append(row))
    with caplog.at_level("WARNING", "ig_jax"):
        loop.train(setup)
    assert [(step, v["train/skipped_updates"]) for step, v in written] == [(3, 1), (6, 0)]
    assert all(np.isfinite(v["train/loss"]) for _, v in written)
    (line,) = (r.getMessage() for r in caplog.records if r.name == "ig_jax")
    assert line.startswith("the loss is not finite at step 2, nor is") and "1 updates" in line
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights(tmp_path, config)))


def test_a_run_all_of_whose_updates_are_skipped_stops(tmp_path):
    config = tiny_config(num_steps=10, log_every=10, validate_every=0, not_finite="skip")

    def always(step):
        return lambda state, batch, key: step(state, batch | {"x": batch["x"] * np.nan}, key)

    with pytest.raises(NotFiniteError, match="the loss is not finite at step 10"):
        loop.train(with_step(Setup.from_config(config, tmp_path), always))


def test_a_spike_of_the_loss_is_warned_of(tmp_path, caplog):
    def spiking(step):
        taken = itertools.count(1)

        def spiked(state, batch, key):
            state, metrics = step(state, batch, key)
            factor = 10.0 if next(taken) == 5 else 1.0
            return state, metrics.replace(loss=metrics.loss * factor)

        return spiked

    config = tiny_config(validate_every=0)
    with caplog.at_level("WARNING", "ig_jax"):
        loop.train(with_step(Setup.from_config(config, tmp_path), spiking))
    (line,) = (r.getMessage() for r in caplog.records if r.name == "ig_jax")
    assert line.startswith("loss spike before step 6: ")


class Files:
    """A source of files, of which one may be damaged."""

    def __init__(self, source, damaged=None):
        self.source, self.damaged = source, damaged

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        example = self.source[i]
        return example | {"x": example["x"] * np.float32(np.nan if i == self.damaged else 1)}

    def where(self, i):
        return f"file-{i}.npy"


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_example_that_is_not_finite_is_named(in_memory, tmp_path):
    """Where the data is at fault, the line says which example it is."""
    setup = Setup.from_config(tiny_config(num_steps=4, checkpoint_every=9), tmp_path)
    arrays = setup.source.train
    whole = dataclasses.replace(setup.source, train=arrays if in_memory else Files(arrays))
    batches = setup_lib.open_batches(setup.config, whole, setup.experiment.mesh)
    seen = [next(batches)["x"] for _ in range(3)][2]
    batches.close()
    index = int(np.flatnonzero((arrays.x == np.asarray(seen)[7]).all((1, 2, 3)))[0])
    file = "" if in_memory else f", file-{index}.npy"
    damaged = Files(arrays, index)
    if in_memory:
        x = arrays.x.copy()
        x[index] = np.nan
        damaged = dataclasses.replace(arrays, x=x)
    source = dataclasses.replace(setup.source, train=damaged)
    with pytest.raises(NotFiniteError) as caught:
        loop.train(dataclasses.replace(setup, source=source))
    expected = f"(x of example {index}{file} is not finite in the data)"
    assert "at step 3" in str(caught.value) and expected in str(caught.value)


class Raising(Callback):
    """An error of a callback's own, in the second step."""

    def on_step(self, moment):
        if moment.step == 2:
            raise KeyError("callback")


ENDINGS = {
    "at the end": (None, None, None),
    "stopped": (Signal(2), None, Stopped),
    "diverged": (None, poisoned_at(2), NotFiniteError),
    "failed": (Raising(), None, KeyError),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_opened_is_closed_however_a_run_ends(ending, tmp_path, monkeypatch):
    closed = []

    def watch(owner, name):
        close = owner.close
        monkeypatch.setattr(owner, "close", lambda self: (closed.append(name), close(self))[1])

    class Watched(Callback):
        pass

    setup = Setup.from_config(tiny_config(num_steps=3, log_every=1), tmp_path)
    watch(Watched, "callback")
    watch(logs.Logs, "logs")
    watch(Checkpoints, "checkpoints")
    watch(pipeline.BatchIterator, "data")
    callback, wrap, error = ENDINGS[ending]
    setup = with_step(setup, wrap) if wrap else setup
    with pytest.raises(error) if error else contextlib.nullcontext():
        loop.train(setup, [Watched(), *filter(None, [callback])])
    # Of what is not finite the data are opened once more, to name the example.
    assert sorted(set(closed)) == ["callback", "checkpoints", "data", "logs"]


class Evaluation(Callback):
    """Scores of its own every fourth step."""

    saves = True

    def due(self, step, saving):
        return step % 4 == 0

    def on_due(self, moment):
        return Score("mine", float(moment.step))

    def on_end(self, step, ema, writer):
        return f"{len(ema)} parameters"


def test_a_callback_ranks_the_step_that_it_has_saved(tmp_path):
    setup = Setup.from_config(tiny_config(num_steps=5, checkpoint_every=100), tmp_path)
    trained = loop.train(setup, [Validation(setup), Evaluation(), Callback()])
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.steps() == [4, 5] and trained.step == 5
    scores = [
        json.loads((checkpoints.directory / str(step) / "metrics" / "metrics").read_text())
        for step in (4, 5)
    ]
    assert scores[0] == {"mine": 4.0} and list(scores[1]) == ["validation_loss"]
    assert trained.said == (f"{len(trained.ema)} parameters",)


def test_a_profile_is_ended_with_the_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    moments = [types.SimpleNamespace(step=step, metrics=()) for step in range(1, 10)]
    for last, expected in ((9, ["stop"]), (4, []), (2, [])):
        calls.clear()
        profile = Profile(tmp_path, first=3)
        for moment in moments[:last]:
            profile.on_step(moment)
        assert calls[1:] == expected
        profile.close()
        assert calls == ([str(tmp_path), "stop"] if last > 2 else [])


def test_nothing_is_written_where_workers_lack_shared_memory(tmp_path, monkeypatch):
    usage = pipeline.shutil.disk_usage("/")._replace(free=1 << 10)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(pipeline, "SHARED_MEMORY", "/")
    config = tiny_config()
    config.data.num_workers = 1
    with pytest.raises(InputError, match="config.data.num_workers is 1"):
        run.train(config, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()
