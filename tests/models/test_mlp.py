"""The network of vectors: what it shares with the transformer, and that it learns."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ig_jax.diffusion import loss
from ig_jax.errors import InputError
from ig_jax.models import families, functional, network
from ig_jax.parallel import sharding
from ig_jax.training.optimizer import OptimizerOptions, make_optimizer

QUICK = {"xla_backend_optimization_level": 0}
OPTIONS = dict(channels=2, width=32, depth=4, num_classes=2, auxiliary_depths=(1, 3), patch_size=2)
SPEC = families.make_spec("mlp", OPTIONS)


@pytest.fixture(scope="module")
def model():
    """A network whose weights, heads included, are all random."""
    graphdef, params = functional.split(families.abstract(SPEC))
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(0.2 * rng.standard_normal(p.shape), jnp.float32)  # noqa: E731
    return graphdef, jax.tree.map(draw, params)


def points(count):
    x = jax.random.normal(jax.random.key(1), (count, 2))
    return x, jnp.linspace(0, 1, count), jnp.arange(count) % 3


def test_every_head_predicts_vectors_and_passes_stop(model):
    graphdef, params = model

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, x, t, y):
        network = functional.merge(graphdef, params)
        return network(x, t, y), network(x, t, y, upto=0)

    heads, stopped = run(params, *points(6))
    assert heads.final.shape == (6, 2) and [a.shape for a in heads.auxiliary] == [(6, 2)] * 2
    assert stopped.final is None and len(stopped.auxiliary) == 1
    np.testing.assert_allclose(stopped.auxiliary[0], heads.auxiliary[0], rtol=1e-5, atol=1e-6)
    outputs = [heads.final, *heads.auxiliary]
    assert all(np.abs(a - b).max() > 1e-3 for a in outputs for b in outputs if a is not b)
    with pytest.raises(InputError, match=r"input has shape \(3,\): this model expects \(2,\)"):
        functional.merge(graphdef, params)(jnp.ones((6, 3)), jnp.ones(6), jnp.zeros(6, jnp.int32))


def test_it_learns_which_class_is_where():
    """Two classes, a point each: the velocity's error falls far below that of the mean."""
    graphdef, shapes = functional.split(families.abstract(SPEC))
    init = jax.jit(lambda: functional.split(families.make(SPEC, rngs=nnx.Rngs(0)))[1])
    params = init.lower().compile(QUICK)()
    transform = make_optimizer(OptimizerOptions("adamw", 3e-3), network.layout(graphdef, shapes))
    centres = jnp.array([[1.0, 0.0], [-1.0, 0.0]])

    def objective(params, key):
        labels = jax.random.randint(jax.random.fold_in(key, 1), (64,), 0, 2)
        model = functional.merge(graphdef, params)
        found = loss.losses(model, centres[labels], labels, key, loss.LossOptions(), 2)
        return found.total.mean(), found.final.mean()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, state, key):
        gradients, final = jax.grad(objective, has_aux=True)(params, key)
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, final

    state, finals = transform.init(params), []
    for key in jax.random.split(jax.random.key(0), 150):
        params, state, final = step(params, state, key)
        finals.append(float(final))
    assert np.mean(finals[-20:]) < 0.5 * np.mean(finals[:5])


def test_devices_share_it_like_any_network(model, monkeypatch):
    """On a mesh whose devices hold pieces, gathered layer by layer, it predicts the same."""
    monkeypatch.setattr(sharding, "_SMALL", 2**10)
    graphdef, params = model
    mesh = sharding.make_mesh(2, 4)
    places = sharding.state_sharding(mesh, params, network.layout(graphdef, params))
    assert any("fsdp" in place.spec for place in jax.tree.leaves(places))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, x, t, y):
        network = sharding.network(mesh, graphdef, params)
        return network(x, t, y), network(x, t, y, upto=1)

    found = run(jax.device_put(params, places), *points(8))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def alone(params, x, t, y):
        network = functional.merge(graphdef, params)
        return network(x, t, y), network(x, t, y, upto=1)

    expected = alone(params, *points(8))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


def test_flops_are_those_that_the_compiler_counts():
    graphdef, shapes = functional.split(families.abstract(SPEC, scan_blocks=False))
    run = jax.jit(lambda params, *args: functional.merge(graphdef, params)(*args))
    flops = run.lower(shapes, *points(6)).cost_analysis()["flops"]
    assert 1 < flops / (6 * SPEC.forward_flops()) < 1.25


def test_rows_of_the_table_take_the_options_that_they_have_fields_for():
    assert (SPEC.family, SPEC.shape, SPEC.null_label) == ("mlp", (2,), 2)
    with pytest.raises(InputError, match=r"auxiliary_depths is \(4,\): expected increasing .*1…3"):
        families.make_spec("mlp", OPTIONS | dict(auxiliary_depths=(4,)))
    with pytest.raises(InputError, match="unknown model 'mpl': expected one of sit, .* mean mlp"):
        families.make_spec("mpl", OPTIONS)
