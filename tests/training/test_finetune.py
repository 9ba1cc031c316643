"""Adding internal guidance to a network that was trained without it."""

import jax
import numpy as np
import pytest

from ig_jax.data import samples
from ig_jax.diffusion.guidance import Guidance
from ig_jax.errors import InputError
from ig_jax.experiment import Experiment
from ig_jax.sampling import own
from ig_jax.sampling.run import make_engine, open_weights
from ig_jax.storage.checkpoints import Checkpoints
from ig_jax.streams import numpy_stream
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


@pytest.mark.slow
def test_everything(headless, tmp_path):
    trained = finetune(headless, tmp_path, "all")
    assert not equal(trunk(trained.ema), trunk(headless[1]))
    # A continued run needs no `init_from` lookup: its own checkpoint is newer.
    again = finetune(headless, tmp_path, "all", steps=5)
    assert not equal(trunk(again.ema), trunk(trained.ema))


@pytest.mark.slow
def test_a_trained_head_lowers_its_loss(headless, tmp_path):
    config = tiny_config(num_steps=40, validate_every=0, init_from=str(headless[0]))
    config.optimizer.update(trainable="auxiliary_head", learning_rate=1e-2)
    setup = setup_lib.Setup.from_config(config, tmp_path)
    fresh = setup.programs.init(jax.random.key(0)).params
    before = setup_lib.initial_weights(setup.experiment, fresh)
    held_out = Validation(setup)
    assert held_out.loss(loop.train(setup).ema) < held_out.loss(before) - 0.05


def on_own_samples(headless, folder, **changes):
    """A config that trains a head on samples of the network without one."""
    config = tiny_config(num_steps=40, validate_every=0, init_from=str(headless[0]))
    config.data.update(name="samples", path=str(folder), num_validation=32)
    config.optimizer.update(trainable="auxiliary_head", learning_rate=1e-2)
    config.sampler.update(num_samples=200, batch_size=64, **changes)
    return config


@pytest.mark.slow
def test_a_head_learns_from_own_samples_or_from_real_data(headless, tmp_path, monkeypatch):
    """SSG (arXiv 2607.29122): the network stays; each of two heads knows its own kind better."""
    own_config = on_own_samples(headless, tmp_path / "drawn")
    real_config = tiny_config(num_steps=40, validate_every=0, init_from=str(headless[0]))
    real_config.optimizer.update(own_config.optimizer)
    trained = {
        kind: run.train(config, str(tmp_path / kind)).ema
        for kind, config in (("own", own_config), ("real", real_config))
    }
    for ema in trained.values():
        assert equal(trunk(ema), trunk(headless[1]))
    losses = {
        kind: {name: held_out.loss(ema) for name, ema in trained.items()}
        for kind, held_out in (
            (kind, Validation(setup_lib.Setup.from_config(config, tmp_path / kind)))
            for kind, config in (("own", own_config), ("real", real_config))
        )
    }
    assert losses["own"]["own"] < losses["own"]["real"]
    assert losses["real"]["real"] < losses["real"]["own"]
    # Another training finds them there.
    monkeypatch.setattr(own, "make_engine", None)
    own.draw_once(own_config)


def test_own_samples_are_the_engines_and_survive_a_stop(headless, tmp_path, monkeypatch):
    monkeypatch.setattr(own, "_PIECE", 80)
    config = on_own_samples(headless, tmp_path, labels="balanced")

    class Stop(Exception):
        pass

    def stop(path, *arrays, save=samples.save_piece):
        save(path, *arrays)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(samples, "save_piece", stop)
        with pytest.raises(Stop):
            own.draw_once(config)
    with pytest.raises(InputError, match="expected a folder with samples.json, a network's own"):
        samples.open_samples(tmp_path)
    (first,) = tmp_path.glob("*.npz")
    written = first.stat().st_mtime_ns
    own.draw_once(config)
    assert first.stat().st_mtime_ns == written and len(list(tmp_path.glob("*.npz"))) == 3
    source = samples.open_samples(tmp_path, 20)
    assert (len(source.train), len(source.validation)) == (180, 20)
    assert source.shape == (8, 8, 1) and source.num_classes == 10
    examples = samples.open_samples(tmp_path).train
    np.testing.assert_array_equal(examples.labels, np.arange(200) % 10)
    # The same as any other way to sample gives, in numbers of the data and not of pictures.
    experiment, step = own._network(config)
    params = open_weights(experiment, str(headless[0]), step).params
    seed = int(numpy_stream(config.seed, "own samples").integers(2**32))
    x = make_engine(experiment).draw(
        params, Guidance(), seed, np.arange(200), np.int32(examples.labels)
    )
    np.testing.assert_allclose(examples.x, x, rtol=1e-5, atol=1e-5)
    first.write_bytes(b"nothing")
    with pytest.raises(InputError, match=f"{first.name}: cannot be read as samples in an .npz"):
        samples.open_samples(tmp_path)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("data.path", "", "config.data.path is empty: expected the folder"),
        ("train.init_from", "", "config.train.init_from is empty: expected the workdir"),
        ("evaluation.at_end", True, "config.evaluation.reference is empty: expected a reference"),
    ],
)
def test_own_samples_that_cannot_be(headless, tmp_path, field, value, message):
    config = on_own_samples(headless, tmp_path / "drawn")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=message):
        run.train(config, str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_another_architecture_is_refused(headless, tmp_path):
    config = tiny_config(init_from=str(headless[0]))
    config.model.width = 64
    with pytest.raises(InputError, match="init_from is .* has width 32: this config has 64"):
        run.train(config, str(tmp_path / "new"))
    assert not (tmp_path / "new" / "checkpoints").exists()


@pytest.mark.slow
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
