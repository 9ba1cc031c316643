import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from ig_jax import config as config_lib
from ig_jax.errors import InputError
from ig_jax.experiment import Experiment
from ig_jax.models import families, network
from ig_jax.models.functional import merge, split
from ig_jax.models.network import Parameter
from ig_jax.parallel import sharding
from ig_jax.plan import fit
from ig_jax.plan.hlo import collectives
from ig_jax.storage.checkpoints import Checkpoints
from ig_jax.training import optimizer as optimizer_lib
from ig_jax.training import state as state_lib
from ig_jax.training.setup import make_programs
from tests import meshes

ADAMW = optimizer_lib.OptimizerOptions()
SHAPES = [(8, 1), (4, 2), (1, 8)]
# Of those for which a training is compiled, the one of both axes is not slow.
TRAINED = [pytest.param(shape, marks=pytest.mark.slow) if 1 in shape else shape for shape in SHAPES]


def mesh_of(data, fsdp):
    return sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])


@functools.cache
def initial():
    experiment = meshes.experiment_on(meshes.wide_config(), mesh_of(1, 8))
    programs = make_programs(experiment, experiment.open_data())
    return jax.device_get(programs.init(jax.random.key(1)))


@functools.cache
def trained(data, fsdp):
    return meshes.train_and_draw(meshes.wide_config(), mesh_of(data, fsdp), initial())


# One model on any mesh.


@pytest.mark.parametrize("shape", TRAINED)
def test_meshes_learn_and_draw_the_same(shape):
    one, many = trained(1, 1), trained(*shape)
    assert one.losses[-1, 0] < 0.8 * one.losses[0, 0]
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(many.samples, one.samples, atol=1e-4)


def xl_state(family, fsdp):
    """Shapes, with shardings, of the XL model's training state."""
    config = config_lib.default_config(family, "xl")
    graphdef, params = split(families.abstract(config_lib.model_spec(config)))
    layout = network.layout(graphdef, params)
    options = dataclasses.replace(
        config_lib.optimizer_options(config), newton_schulz_dtype="float32"
    )
    transform = optimizer_lib.make_optimizer(options, layout)
    shapes = jax.eval_shape(lambda p: state_lib.create(p, transform), params)
    mesh = AbstractMesh((256 // fsdp, fsdp), sharding.AXES)
    places = sharding.state_sharding(mesh, shapes, layout)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )


@pytest.mark.parametrize("family", ["sit", "lightningdit"])
def test_state_of_a_device_falls_as_one_over_fsdp(family):
    whole = xl_state(family, 1)
    for fsdp in (2, 4, 16, 64, 128):
        split_ = xl_state(family, fsdp)
        for part in ("params", "ema", "optimizer"):
            bytes_, total = (
                sharding.bytes_per_device(getattr(state, part)) for state in (split_, whole)
            )
            assert total / fsdp <= bytes_ <= 1.05 * total / fsdp, (part, fsdp)


def test_what_is_split():
    spec = functools.partial(sharding.parameter_spec, fsdp=8)
    assert spec((256, 512)) == P(None, "fsdp")
    assert spec((512, 256)) == P("fsdp")
    assert spec((512, 512)) == P(None, "fsdp")
    assert spec((1001, 128)) == P(None, "fsdp")
    # Layers stay together, even where their number is the largest axis.
    assert spec((1024, 64, 64), stacked=True) == P(None, None, "fsdp")
    assert spec((64, 64)) == P()  # small
    assert spec((1001, 129)) == P()  # indivisible
    assert sharding.parameter_spec((512, 512), 1) == P()


def test_layers_stay_together_wherever_the_state_holds_them():
    """Names decide nothing: what the network declares is found inside the optimiser's state too."""
    shapes = {"tower": {"kernel": (1024, 64, 64)}, "kernel": (1024, 64, 64)}
    layout = {
        "tower": {"kernel": Parameter((1024, 64, 64), stacked=True)},
        "kernel": Parameter((1024, 64, 64)),
    }
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    state = jax.eval_shape(optimizer_lib.make_optimizer(ADAMW, layout).init, params)
    places = sharding.state_sharding(AbstractMesh((1, 8), sharding.AXES), (params, state), layout)
    found = {
        ("tower" in jax.tree_util.keystr(path), place.spec)
        for path, place in jax.tree_util.tree_leaves_with_path(places)
        if "kernel" in jax.tree_util.keystr(path)
    }
    assert found == {(True, P(None, None, "fsdp")), (False, P("fsdp"))}


# What devices exchange.


def sizes(state):
    """Bytes of parameters: all, those split over fsdp, and those gathered layer by layer."""
    total = split_ = scanned = 0
    layout = Experiment.from_config(meshes.wide_config()).layout
    for parameter, leaf in zip(*map(jax.tree.leaves, (layout, state.params)), strict=True):
        if parameter.fixed:  # no gradient
            continue
        total += leaf.nbytes
        if "fsdp" in leaf.sharding.spec:
            split_ += leaf.nbytes
            large = leaf.nbytes // leaf.shape[0] >= 2**16
            scanned += leaf.nbytes if parameter.stacked and large else 0
    return total, split_, scanned


def check_plan(hlo, state, data, fsdp):
    """Fails unless a step's exchanges are those of its parameters, byte for byte."""
    total, split_, scanned = sizes(state)
    found = collectives(hlo)
    scalars = 1024  # losses and the gradient norm
    expected = {}
    if fsdp > 1:
        # Scanned matrices forward and again backward, all else once.
        expected["all-gather"] = split_ + scanned
        expected["reduce-scatter"] = split_
    expected["all-reduce"] = total - split_ + (split_ // fsdp if data > 1 else 0)
    assert set(found) == set(expected)
    for kind, size in expected.items():
        assert size <= found[kind].bytes <= size + scalars, (kind, found[kind].bytes, size)


@pytest.mark.parametrize("shape", TRAINED)
def test_a_step_exchanges_parameters_and_gradients_and_nothing_else(shape):
    result = trained(*shape)
    check_plan(result.hlo, result.state, *shape)


def test_a_gather_of_activations_would_be_noticed(monkeypatch):
    """XLA's own partitioning, without the plan of `sharding.network`, moves activations."""
    monkeypatch.setattr(sharding, "network", lambda mesh, graphdef, params: merge(graphdef, params))
    experiment = meshes.experiment_on(meshes.wide_config(), mesh_of(1, 8))
    step = fit.lower_train_step(experiment).compile(meshes.QUICKLY)
    with pytest.raises(AssertionError):
        check_plan(step.as_text(), trained(1, 8).state, 1, 8)


def test_training_a_head_alone_costs_a_forward_pass():
    """The backward pass of the frozen network, and its gradients' exchange, are not compiled."""
    config = meshes.wide_config()
    config.optimizer.trainable = "auxiliary_head"
    config.model.scan_blocks = False  # XLA counts the operations of a loop's body once
    experiment = meshes.experiment_on(config, mesh_of(2, 4))
    step = fit.lower_train_step(experiment).compile(meshes.QUICKLY)
    images = config.train.batch_size // 8
    assert step.cost_analysis()["flops"] < 1.25 * images * experiment.spec.forward_flops()
    found = collectives(step.as_text())
    parameters = jax.tree.leaves(experiment.layout)
    head = sum(4 * math.prod(p.shape) for p in parameters if p.head is not None)
    assert "reduce-scatter" not in found and found["all-reduce"].bytes <= head + 1024


def test_a_sampler_gathers_parameters_once_and_exchanges_nothing_else():
    experiment = meshes.experiment_on(meshes.wide_config(), mesh_of(2, 4))
    found = collectives(fit.lower_sampler(experiment).compile().as_text())
    _, split_, _ = sizes(trained(1, 8).state)
    assert set(found) == {"all-gather"}
    assert split_ <= found["all-gather"].bytes <= 1.05 * split_


# Muon.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers", [3, 20])
def test_layers_shared_out_over_devices_are_exact(shape, layers):
    """Newton–Schulz on 3 or 20 layers over 8 devices equals one device."""
    mesh = mesh_of(*shape)
    x = np.random.default_rng(0).standard_normal((layers, 64, 128)).astype(np.float32)
    iterate = functools.partial(optimizer_lib.orthogonalize, dtype=jnp.float32)
    layout = {"stack": Parameter(x.shape, stacked=True)}
    place = sharding.state_sharding(mesh, {"stack": x}, layout)["stack"]
    assert ("fsdp" in place.spec) == (shape[1] > 1)
    run = jax.jit(functools.partial(sharding.share_layers, mesh, iterate), out_shardings=place)
    found = run(jax.device_put(x, place))
    np.testing.assert_allclose(found, jax.jit(iterate)(x), atol=1e-5)
    text = run.lower(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)).compile().as_text()
    exchanged = set(collectives(text))
    assert exchanged <= {"all-to-all", "all-gather"}
    assert ("all-to-all" in exchanged) == (shape[1] > 1)


def test_muon_on_eight_devices_equals_one():
    """Three steps on given gradients: parameters within 1e-5 of those of one device."""
    experiment = Experiment.from_config(meshes.wide_config())
    options = optimizer_lib.OptimizerOptions(
        name="muon", learning_rate=1e-2, newton_schulz_dtype="float32"
    )
    some = ("before", "label_embed", "position")
    shapes, layout = (
        {name: tree[name] for name in some} for tree in (experiment.shapes, experiment.layout)
    )
    stream = np.random.default_rng(0)
    draw = functools.partial(
        jax.tree.map, lambda s: stream.standard_normal(s.shape).astype(np.float32)
    )
    params, *gradients = (draw(shapes) for _ in range(4))

    def train(mesh):
        transform = optimizer_lib.make_optimizer(
            options, layout, functools.partial(sharding.share_layers, mesh)
        )
        places = sharding.state_sharding(mesh, params, layout)
        place = functools.partial(jax.device_put, device=places)
        update = jax.jit(transform.update, compiler_options=meshes.QUICKLY)
        moved, state = place(params), transform.init(place(params))
        for gradient in gradients:
            updates, state = sharding.wait_if_simulated(update(place(gradient), state, moved))
            moved = jax.tree.map(jnp.add, moved, updates)
        return jax.device_get(moved)

    one, many = train(mesh_of(1, 1)), train(mesh_of(4, 2))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), many, one)


# Checkpoints move between meshes.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a state spread over 4 × 2 devices."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(str(workdir))
    config = meshes.wide_config()
    checkpoints.save(trained(4, 2).state, meshes.STEPS, config, {"step": meshes.STEPS})
    checkpoints.close()
    return workdir


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_a_checkpoint_opens_on_another_mesh_bit_for_bit(saved, shape):
    found = meshes.restore(str(saved), meshes.wide_config(), mesh_of(*shape))
    expected = jax.device_get(trained(4, 2).state)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# Bad input.


def test_meshes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="data=3, fsdp=2: expected a product of 8, the number of"):
        sharding.make_mesh(3, 2)
    with pytest.raises(InputError, match="data=2, fsdp=3: expected a product of 8"):
        sharding.make_mesh(-1, 3)
    config = meshes.wide_config()
    for changes, message in (
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"data": 0, "fsdp": 1}, "expected positive sizes"),
        ({"data": 4, "fsdp": 4}, "expected a product that is the number of devices, 8"),
    ):
        config.mesh.update(changes)
        with pytest.raises(InputError, match=message):
            Experiment.from_config(config)


def test_batches_that_do_not_divide_over_the_devices_are_refused():
    with pytest.raises(InputError, match="train.accumulate is 12: expected a multiple of the num"):
        Experiment.from_config(meshes.wide_config(batch_size=24, accumulate=2))
    config = meshes.wide_config()
    config.sampler.batch_size = 12
    with pytest.raises(InputError, match="sampler.batch_size is 12: expected a multiple of the nu"):
        Experiment.from_config(config)
