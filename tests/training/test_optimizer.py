import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ig_jax.convert.pytorch import from_pytorch, to_pytorch
from ig_jax.diffusion.loss import LossOptions, losses_at
from ig_jax.errors import InputError
from ig_jax.models.dit import DiTSpec
from ig_jax.models.families import abstract
from ig_jax.models.functional import merge, split
from ig_jax.models.network import Parameter, layout
from ig_jax.training.optimizer import (
    OptimizerOptions,
    ema_update,
    gradient_norm,
    learning_rate_schedule,
    make_optimizer,
    orthogonalize,
    parameter_groups,
)
from tests.common import golden, nhwc, relative_error

ADAMW = OptimizerOptions(learning_rate=1e-3)
MUON = OptimizerOptions(name="muon", learning_rate=2e-3, b2=0.95, newton_schulz_dtype="float32")


def golden_model(name):
    return from_pytorch(golden(name), heads=4, auxiliary_depth=2)


def train(model, run, optimizer_options, loss_options):
    """Repeats a golden training run; returns its record, the trained weights and their EMA."""
    graphdef, params = split(model)
    facts = layout(graphdef, params)
    optimizer = make_optimizer(optimizer_options, facts)

    @jax.jit
    def step(params, ema, state, x, t, y, noise):
        def total(params):
            losses = losses_at(merge(graphdef, params), x, y, noise, t, loss_options)
            return losses.total.mean(), losses

        gradients, losses = jax.grad(total, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        norm = gradient_norm(optimizer_options, facts, gradients)
        record = jax.tree.map(jnp.mean, losses), norm
        return params, ema_update(ema, params, 0.9), state, record

    ema, state, records = params, optimizer.init(params), []
    for i in range(len(run["inputs/t"])):
        x, noise = (jnp.asarray(nhwc(run[f"inputs/{name}"][i])) for name in ("x", "noise"))
        y = jnp.asarray(run["inputs/y"][i], jnp.int32)
        params, ema, state, record = step(params, ema, state, x, run["inputs/t"][i], y, noise)
        records.append(record)
    return records, to_pytorch(merge(graphdef, params)), to_pytorch(merge(graphdef, ema))


def worst_error(actual, run, prefix, initial=None):
    """Largest relative error over all weights, or over their changes since `initial`."""
    expected = {key.removeprefix(prefix): run[key] for key in run if key.startswith(prefix)}
    assert set(actual) == set(expected)
    start = initial or dict.fromkeys(expected, 0)
    return max(
        relative_error(actual[name] - start[name], expected[name] - start[name])
        for name in expected
    )


def test_adamw_training_equals_the_release():
    run = golden("sit_train_small")
    records, trained, ema = train(golden_model("sit_params_small"), run, ADAMW, LossOptions())
    losses = [(loss.final, 0.5 * loss.auxiliary) for loss, _ in records]
    assert relative_error(losses, run["outputs/losses"]) < 1e-5
    assert relative_error([norm for _, norm in records], run["outputs/grad_norms"]) < 1e-5
    assert worst_error(trained, run, "outputs/trained/") < 1e-4
    assert worst_error(ema, run, "outputs/ema/") < 1e-4


@pytest.mark.parametrize("variant", ["small", "qknorm_noshift"])
def test_muon_training_equals_the_release(variant):
    run, initial = golden(f"lightningdit_train_{variant}"), golden(f"lightningdit_params_{variant}")
    options = LossOptions(path="linear_reversed", cosine_weight=1.0)
    model = golden_model(f"lightningdit_params_{variant}")
    records, trained, _ = train(model, run, MUON, options)
    losses = [(loss.final + 0.5 * loss.auxiliary, loss.cosine) for loss, _ in records]
    assert relative_error(losses, run["outputs/losses"]) < 1e-5
    assert relative_error([norm for _, norm in records], run["outputs/grad_norms"]) < 1e-4
    assert worst_error(trained, run, "outputs/trained/", initial) < 1e-3


@pytest.fixture(scope="module")
def network():
    return split(golden_model("lightningdit_params_qknorm_noshift"))


@pytest.fixture(scope="module")
def params(network):
    return network[1]


@pytest.fixture(scope="module")
def facts(network):
    return layout(*network)


def gradients_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)


def apply(options, params, facts, steps=2):
    """Updates with random gradients; returns the parameters and the last optimiser state."""
    optimizer = make_optimizer(options, facts)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for seed in range(steps):
        params, state = step(params, state, gradients_like(params, seed))
    return params, state


def muon_reference(weights, gradients, lr=0.02, decay=0.1):
    """Trains one (out, in) matrix in float64, step by step as the release does."""
    m = np.zeros_like(weights)
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        u = 0.05 * g + 0.95 * m
        tall = u.shape[0] > u.shape[1]
        x = u.T if tall else u
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            s = x @ x.T
            x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
        rows, columns = u.shape
        u = (x.T if tall else x) * np.sqrt(max(1, rows / columns)) * 0.2 * np.sqrt(max(u.shape))
        weights = weights * (1 - lr * decay) - lr * u
    return weights


def test_muon_treats_stacks_layer_by_layer_and_knows_kernels_from_tables_by_declaration():
    facts = {
        "before": {
            "fc": {
                "kernel": Parameter((3, 6, 16), stacked=True),
                "bias": Parameter((3, 16), stacked=True),
            }
        },
        "tower": {"kernel": Parameter((2, 16, 6), stacked=True)},
        "names": {"embedding": Parameter((12, 8), table=True)},
        "label_embed": {"kernel": Parameter((12, 8))},
    }
    params = gradients_like(facts, 9)
    options = dataclasses.replace(
        MUON, learning_rate=0.02, muon_weight_decay=0.1, clip_norm=0.0, b2=0.999
    )
    trained, _ = apply(options, params, facts, steps=3)
    history = [gradients_like(params, seed) for seed in range(3)]

    def check(get):
        reference = muon_reference(np.float64(get(params)), [np.float64(get(g)) for g in history])
        assert relative_error(get(trained), reference) < 1e-5

    for i in range(3):
        check(lambda tree: tree["before"]["fc"]["kernel"][i].T)  # noqa: B023
    for i in range(2):
        check(lambda tree: tree["tower"]["kernel"][i].T)  # noqa: B023
    check(lambda tree: tree["names"]["embedding"])
    check(lambda tree: tree["label_embed"]["kernel"].T)


def test_muon_on_every_shape_equals_the_release():
    """Also convolutions with a patch of 2, whose second factor leaves the positions out."""
    numbers = golden("muon_shapes")
    names = [key.removeprefix("outputs/weight/") for key in numbers if key.startswith("outputs/")]
    assert len(names) == 6

    def ours(name, array):
        """(out, in, p, p) as our network stores it: flattened (p·p·in, out)."""
        if name == "table":
            return array
        return array.transpose(*range(2, array.ndim), 1, 0).reshape(-1, array.shape[0])

    def fact(name):
        shape = numbers[f"inputs/weight/{name}"].shape
        unflattened = (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else None
        stored = ours(name, numbers[f"inputs/weight/{name}"]).shape
        return Parameter(stored, table=name == "table", unflattened=unflattened)

    facts = {name: fact(name) for name in names}
    optimizer = make_optimizer(dataclasses.replace(MUON, clip_norm=0.0), facts)
    start = {name: ours(name, numbers[f"inputs/weight/{name}"]) for name in names}
    params, state = start, optimizer.init(start)
    for i in range(3):
        gradients = {name: ours(name, numbers[f"inputs/gradient_{i}/{name}"]) for name in names}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    for name in names:
        change = ours(name, numbers[f"outputs/weight/{name}"]) - start[name]
        assert relative_error(params[name] - start[name], change) < 1e-3, name


@pytest.mark.parametrize("patch", [1, 2])
def test_the_network_declares_its_patch_embedding_a_convolution(patch):
    spec = DiTSpec.of("sit", "s", width=16, depth=1, heads=2, input_size=4, auxiliary_depths=())
    spec = dataclasses.replace(spec, patch_size=patch)
    facts = layout(*split(abstract(spec)))["patch_embed"]["kernel"]
    assert (facts.shape, facts.unflattened) == ((4 * patch**2, 16), (patch, patch, 4, 16))


def test_a_convolution_that_is_not_flattened_is_treated_like_one_that_is():
    kernel = jax.random.normal(jax.random.key(0), (2, 2, 16, 48))
    moved = {}
    for shape, unflattened in ((kernel.shape, None), ((64, 48), kernel.shape)):
        optimizer = make_optimizer(MUON, {"k": Parameter(shape, unflattened=unflattened)})
        params = {"k": kernel.reshape(shape)}
        moved[shape], _ = optimizer.update(params, optimizer.init(params), params)
    one, other = (tree["k"].reshape(kernel.shape) for tree in moved.values())
    assert relative_error(one, other) < 1e-5


def adam_reference(weights, gradients, lr, b1, b2, eps, decay):
    """Trains one array as `torch.optim.AdamW` documents it, in float64."""
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    for i, g in enumerate(gradients, 1):
        weights = weights * (1 - lr * decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        weights = weights - lr * (m / (1 - b1**i)) / (np.sqrt(v / (1 - b2**i)) + eps)
    return weights


@pytest.mark.parametrize("name, lr", [("adamw", 0.02), ("muon", 0.01)])
def test_adam_is_decoupled_and_has_its_own_rate_beside_muon(name, lr):
    facts = {"fc": {"bias": Parameter((3, 4), stacked=True)}}
    params = {"fc": {"bias": jnp.linspace(-1, 1, 12).reshape(3, 4)}}
    options = OptimizerOptions(
        name, 0.02, b1=0.8, b2=0.9, eps=0.1, weight_decay=0.3, clip_norm=0,
        adam_learning_rate_scale=0.5,
    )  # fmt: skip
    trained, _ = apply(options, params, facts, steps=3)
    leaf = lambda tree: np.float64(tree["fc"]["bias"])  # noqa: E731
    history = [leaf(gradients_like(params, seed)) for seed in range(3)]
    expected = adam_reference(leaf(params), history, lr, 0.8, 0.9, 0.1, 0.3)
    assert relative_error(leaf(trained), expected) < 1e-5


def test_groups_follow_the_axes_that_the_release_has(facts):
    groups = parameter_groups(MUON, facts)
    block = groups["before"]
    assert block["attention"]["qkv"] == {"kernel": "muon", "bias": "adam"}
    assert block["attention"]["q_norm"] == {"weight": "adam"}
    assert block["modulation"] == {"kernel": "muon", "bias": "adam"}
    assert groups["auxiliary_head"]["linear"] == {"kernel": "muon", "bias": "adam"}
    assert groups["label_embed"] == {"embedding": "muon"}
    assert groups["patch_embed"] == {"kernel": "muon", "bias": "adam"}
    assert groups["position"] == "decay"
    assert parameter_groups(ADAMW, facts)["position"] == "frozen"


@pytest.mark.parametrize("options", [ADAMW, MUON], ids=["adamw", "muon"])
def test_the_position_table_only_decays_and_the_state_is_float32(params, facts, options):
    options = dataclasses.replace(options, weight_decay=0.1)
    trained, state = apply(options, params, facts)
    factor = (1 - 2e-3 * 0.01) ** 2 if options.name == "muon" else 1.0
    np.testing.assert_allclose(trained["position"], factor * params["position"], rtol=3e-7)
    if options.name == "adamw":
        np.testing.assert_array_equal(trained["position"], params["position"])
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    # Muon: one buffer for each matrix; Adam: two moments; nothing for the table.
    groups = parameter_groups(options, facts)
    buffers = {"muon": 1, "adam": 2, "decay": 0, "frozen": 0}
    sizes = jax.tree.map(lambda group, p: buffers[group] * p.size, groups, params)
    assert sum(leaf.size for leaf in leaves) == sum(jax.tree.leaves(sizes))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_the_head_alone_keeps_every_other_bit(params, facts, name):
    options = OptimizerOptions(name, 0.02, weight_decay=0.1, trainable="auxiliary_head")
    signed = jax.tree.map(lambda p: p.at[..., 0].set(-0.0), params)
    trained, state = apply(options, signed, facts)
    for key in params:
        for before, after in zip(*map(jax.tree.leaves, (signed[key], trained[key])), strict=True):
            same = np.asarray(before).tobytes() == np.asarray(after).tobytes()
            assert same == (key != "auxiliary_head"), key
    head = sum(leaf.size for leaf in jax.tree.leaves(params["auxiliary_head"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) <= 2 * head


def test_clip_and_norm_see_the_trainable_gradients_alone(params, facts):
    some = ("position", "final_head", "auxiliary_head")
    params, facts = ({key: tree[key] for key in some} for tree in (params, facts))
    gradients = gradients_like(params, 0)
    options = OptimizerOptions(trainable="auxiliary_head")
    norm = float(gradient_norm(options, facts, gradients))
    assert norm == pytest.approx(float(optax.global_norm(gradients["auxiliary_head"])), rel=1e-6)
    everything = float(gradient_norm(OptimizerOptions(), facts, gradients))
    seen = {key: value for key, value in gradients.items() if key != "position"}
    assert everything == pytest.approx(float(optax.global_norm(seen)), rel=1e-6)
    # Adam's second moment after one step holds the squares of the clipped gradients.
    for clip, expected in ((0.5, 0.5), (0, norm), (2 * norm, norm)):
        options = dataclasses.replace(options, clip_norm=clip)
        optimizer = make_optimizer(options, facts)
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        moment = optax.tree.get(state, "nu")
        total = sum(float(leaf.sum()) for leaf in jax.tree.leaves(moment)) / (1 - options.b2)
        assert math.sqrt(total) == pytest.approx(expected, rel=1e-4)


def test_schedules():
    steps = jnp.arange(12)
    constant = learning_rate_schedule(OptimizerOptions(learning_rate=0.5))
    assert [float(constant(i)) for i in (0, 7)] == [0.5, 0.5]
    warm = learning_rate_schedule(OptimizerOptions(learning_rate=0.5, warmup_steps=4))
    np.testing.assert_allclose(jax.vmap(warm)(steps), 0.5 * np.minimum(steps / 4, 1), rtol=1e-6)
    options = OptimizerOptions(learning_rate=0.5, schedule="cosine", warmup_steps=2, num_steps=10)
    decay = 0.25 * (1 + np.cos(np.pi * np.clip((steps - 2) / 8, 0, 1)))
    expected = np.where(steps < 2, 0.25 * steps, decay)
    np.testing.assert_allclose(
        jax.vmap(learning_rate_schedule(options))(steps), expected, atol=1e-7
    )
    options = dataclasses.replace(options, warmup_steps=0)
    cold = learning_rate_schedule(options)
    assert [float(cold(i)) for i in (0, 5, 10)] == pytest.approx([0.5, 0.25, 0], abs=1e-7)


def test_the_schedule_drives_every_group(params, facts):
    options = dataclasses.replace(MUON, warmup_steps=3)
    params, facts = (
        {key: tree[key] for key in ("position", "final_head")} for tree in (params, facts)
    )
    still, _ = apply(options, params, facts, steps=1)
    jax.tree.map(np.testing.assert_array_equal, still, params)
    moved, _ = apply(options, params, facts, steps=2)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), moved, params)
    assert all(jax.tree.leaves(changed))


def test_bfloat16_newton_schulz_is_near_float32_and_safe_at_the_edges():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 24, 64)), jnp.float32)
    exact, rounded = orthogonalize(x, dtype=jnp.float32), orthogonalize(x, dtype=jnp.bfloat16)
    assert exact.dtype == rounded.dtype == jnp.float32
    assert 0 < relative_error(rounded, exact) < 0.06
    values = jnp.linalg.svd(rounded, compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    np.testing.assert_allclose(orthogonalize(x.mT, dtype=jnp.float32), exact.mT, atol=1e-5)
    # Rank one, as the first gradients of zero-initialised heads are, and zero.
    rank_one = orthogonalize(x[:, :, :1] * x[:, :1])
    assert np.isfinite(rank_one).all()
    assert float(jnp.linalg.svd(rank_one, compute_uv=False).max()) < 1.3
    assert not orthogonalize(jnp.zeros((2, 8, 8))).any()


def test_ema_moves_by_one_minus_decay_and_rests_on_constant_weights():
    rng = np.random.default_rng(0)
    a, b = ({"w": jnp.asarray(rng.standard_normal(1000), jnp.float32)} for _ in range(2))
    expected = 0.9999 * np.float64(a["w"]) + 0.0001 * np.float64(b["w"])
    assert relative_error(ema_update(a, b, 0.9999)["w"], expected) < 1e-7
    np.testing.assert_array_equal(ema_update(a, a, 0.9995)["w"], a["w"])
    low = {"w": b["w"].astype(jnp.bfloat16)}
    assert ema_update(a, low, 0.9)["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "muno"}, "name is 'muno': expected one of adamw, muon; did you mean muon?"),
        ({"schedule": "step"}, "schedule is 'step': expected one of constant, cosine"),
        ({"trainable": "head"}, "trainable is 'head': expected one of all, auxiliary_head"),
        ({"newton_schulz_dtype": "float16"}, "newton_schulz_dtype is 'float16': expected one of"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: expected more than 0"),
        ({"learning_rate": "1e-4"}, "learning_rate is '1e-4': expected a number"),
        ({"learning_rate": math.nan}, "learning_rate is nan: expected a finite number"),
        ({"b2": 1.0}, "b2 is 1.0: expected at least 0 and less than 1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1: expected at least 0"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0: expected at least 0"),
        ({"warmup_steps": 1.5}, "warmup_steps is 1.5: expected an integer"),
        ({"newton_schulz_steps": 0}, "newton_schulz_steps is 0: expected 1…100"),
        (
            {"schedule": "cosine", "warmup_steps": 5, "num_steps": 5},
            "num_steps is 5: a cosine schedule needs more than its warmup_steps, 5",
        ),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(InputError, match=message):
        OptimizerOptions(**changes)


def test_training_an_absent_head_is_refused(facts):
    headless = {key: value for key, value in facts.items() if key != "auxiliary_head"}
    with pytest.raises(InputError, match="no auxiliary head"):
        make_optimizer(OptimizerOptions(trainable="auxiliary_head"), headless)
