"""Optimisers of the published recipes: AdamW for SiT and DiT, Muon with Adam for LightningDiT, with
gradient clipping, learning rate schedules, training of the auxiliary head alone, and the EMA."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ig_jax.config import compute_dtype
from ig_jax.errors import InputError
from ig_jax.models.functional import Params
from ig_jax.models.network import Layout, Parameter
from ig_jax.sections import OptimizerOptions

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Makes a Muon update about as large as an AdamW update (Liu et al. 2025, "Muon is Scalable for LLM
# Training", eq. 4).
ADAMW_RMS = 0.2


def learning_rate_schedule(options: OptimizerOptions) -> optax.Schedule:
    """Returns `step -> learning rate` (of the Muon group for "muon"); the first step is 0."""
    peak, warmup = options.learning_rate, options.warmup_steps
    if options.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, options.num_steps - warmup)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def parameter_groups(options: OptimizerOptions, layout: Layout) -> Any:
    """Names the rule that updates each parameter.

    Args:
        options: see `OptimizerOptions`.
        layout: what the network declares of its parameters (`network.layout`).

    Returns:
        The same tree of strings: "adam", "muon", "decay" (shrinks only) or "frozen".
    """

    def group(parameter: Parameter) -> str:
        if options.trainable == "auxiliary_head" and parameter.head is None:
            return "frozen"
        if parameter.fixed:
            # The release's Muon decays the position table, which gets no gradient, all the same,
            # and its published weights carry the result; its AdamW never sees the table.
            return "decay" if options.name == "muon" else "frozen"
        return "muon" if options.name == "muon" and parameter.is_matrix else "adam"

    return jax.tree.map(group, layout)


def gradient_norm(options: OptimizerOptions, layout: Layout, gradients: Params) -> jax.Array:
    """Global norm (a float32 scalar) of the trainable gradients, as the clip measures it.

    Frozen parameters' gradients are left out, so that a compiled step need not compute them.
    """
    groups = parameter_groups(options, layout)
    kept = jax.tree.map(lambda group, g: None if group == "frozen" else g, groups, gradients)
    return optax.tree.norm(kept)


# map_matrices(function, x): the function's value at stacked matrices x, whoever computes it.
MapMatrices = Callable[[Callable[[jax.Array], jax.Array], jax.Array], jax.Array]


def _here(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return function(x)


def make_optimizer(
    options: OptimizerOptions, layout: Layout, map_matrices: MapMatrices = _here
) -> optax.GradientTransformation:
    """Builds the optimiser of a recipe; apply its updates with `optax.apply_updates`.

    Args:
        options: see `OptimizerOptions`.
        layout: what the network declares of its float32 parameters (`network.layout`).
        map_matrices: how Muon's iteration reaches the devices, such as `sharding.share_layers`.

    Returns:
        Clip by global norm, then the rule of each parameter group. The state is float32; frozen
        and fixed parameters have none. Raises `InputError` if the auxiliary head is to be trained
        and there is none.
    """
    groups = parameter_groups(options, layout)
    used = set(jax.tree.leaves(groups))
    if used == {"frozen"}:
        raise InputError("trainable is 'auxiliary_head' but the model has no auxiliary head")
    rate = learning_rate_schedule(options)
    adam_rate = rate
    if options.name == "muon" and options.adam_learning_rate_scale != 1:
        adam_rate = lambda step: options.adam_learning_rate_scale * rate(step)  # noqa: E731
    decayed_step = scale_by_decayed_step(rate, options.muon_weight_decay)
    muon = scale_by_muon(
        options.momentum,
        options.newton_schulz_steps,
        compute_dtype(options.newton_schulz_dtype),
        layout,
        map_matrices,
    )
    rules = {
        "adam": optax.adamw(
            adam_rate, options.b1, options.b2, options.eps, weight_decay=options.weight_decay
        ),
        "muon": optax.chain(muon, decayed_step),
        "decay": optax.chain(optax.set_to_zero(), decayed_step),
        "frozen": optax.stateless(_keep),
    }
    update = optax.partition({name: rules[name] for name in rules if name in used}, groups)
    if not options.clip_norm:
        return update
    trainable = jax.tree.map(lambda group: group != "frozen", groups)
    return optax.chain(
        optax.masked(optax.clip_by_global_norm(options.clip_norm), trainable), update
    )


def scale_by_decayed_step(
    learning_rate: optax.Schedule, decay: float
) -> optax.GradientTransformation:
    """Decoupled decay in the release's own arithmetic: `p ← p·(1 − lr·decay) − lr·u`.

    `optax.add_decayed_weights` is the same formula, but the release rounds the factor to float32,
    where 1 − 2e-6 decays 1.3 % too fast, and published position tables have gone through that.

    Args:
        learning_rate: the schedule.
        decay: strength of the decay.

    Returns:
        A transformation that turns directions `u` into updates; it needs the parameters.
    """

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(
        directions: optax.Updates, state: optax.ScaleByScheduleState, params: optax.Params
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        rate = jnp.asarray(learning_rate(state.count), jnp.float32)
        factor = 1 - rate * decay
        updates = jax.tree.map(lambda u, p: (factor * p - p) - rate * u, directions, params)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


class MuonState(NamedTuple):
    """Muon's momentum buffer, shaped like its parameters."""

    momentum: optax.Updates


def scale_by_muon(
    momentum: float,
    steps: int,
    dtype: jnp.dtype,
    layout: Layout,
    map_matrices: MapMatrices = _here,
) -> optax.GradientTransformation:
    """Muon's update direction as the LightningDiT release computes it (Jordan et al. 2024).

    It differs from `optax.contrib.scale_by_muon`, which corrects the bias of the momentum and of
    the gradient before it mixes them (so the first steps mix differently), rounds the iteration's
    coefficients to the gradients' dtype, and knows one of the two scalings at a time.

    Args:
        momentum: β of `m ← β·m + (1 − β)·g` and of the Nesterov mix `u = (1 − β)·g + β·m`.
        steps: number of Newton–Schulz iterations.
        dtype: dtype of the operands of the iteration's matrix products.
        layout: what the network declares of its parameters. Stacked ones are treated layer by
            layer, convolutions as (positions and inputs, outputs).
        map_matrices: applies the iteration to matrices that are stored in pieces.

    Returns:
        A transformation of matrices; updates still await the learning rate.
    """

    iterate = functools.partial(orthogonalize, steps=steps, dtype=dtype)

    def init(params: optax.Params) -> MuonState:
        return MuonState(jax.tree.map(functools.partial(jnp.zeros_like, dtype=jnp.float32), params))

    def direction(parameter: Parameter, u: jax.Array | optax.MaskedNode) -> Any:
        if isinstance(u, optax.MaskedNode):  # another rule's
            return u
        layers = u.shape[: int(parameter.stacked)]
        matrices = u.reshape(*layers, -1, u.shape[-1])
        return _muon_scale(parameter) * map_matrices(iterate, matrices).reshape(u.shape)

    def update(
        gradients: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        mix = functools.partial(
            jax.tree.map, lambda m, g: momentum * m + (1 - momentum) * g.astype(jnp.float32)
        )
        buffer = mix(state.momentum, gradients)
        return jax.tree.map(direction, layout, mix(buffer, gradients)), MuonState(buffer)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: jax.Array, steps: int = 5, dtype: jnp.dtype = jnp.bfloat16) -> jax.Array:
    """Brings the singular values of matrices near 1 by quintic Newton–Schulz (Jordan et al. 2024).

    Only the operands of the matrix products are rounded to `dtype`; products accumulate in float32
    and the iterate stays float32, so bfloat16 errors of one iteration are not fed to the next.

    Args:
        x: (..., M, N) float32 matrices, leading axes are a batch.
        steps: number of iterations.
        dtype: float32 (exact products on every device) or bfloat16.

    Returns:
        (..., M, N) float32, about U·Vᵀ of each x = U·S·Vᵀ; zero where x is zero.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(
            left.astype(dtype),
            right.astype(dtype),
            # GPUs and TPUs would otherwise round float32 operands.
            precision="highest" if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def iterate(_: int, x: jax.Array) -> jax.Array:
        gram = product(x, x.mT)
        return a * x + product(b * gram + c * product(gram, gram), x)

    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    transpose = x.shape[-2] > x.shape[-1]
    # A loop, not its unrolling, which takes a TPU's compiler minutes for a large network.
    x = jax.lax.fori_loop(0, steps, iterate, x.mT if transpose else x)
    return x.mT if transpose else x


def ema_update(ema: Params, params: Params, decay: float | jax.Array) -> Params:
    """Exponential moving average of the weights, `ema ← decay·ema + (1 − decay)·params`.

    Args:
        ema: tree of float32 arrays; it starts as a copy of the parameters.
        params: the same tree of parameters.
        decay: 0.9999 for SiT, 0.9995 for LightningDiT in the paper.

    Returns:
        The new average, float32. It is moved by the difference rather than formed as a weighted
        sum, so that the average of parameters that never change stays bit for bit what it was.
    """
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(jnp.float32) - e), ema, params)


def _muon_scale(parameter: Parameter) -> float:
    """The release's two scalings: Jordan's for the aspect ratio, Liu's for AdamW-sized updates.

    Of a convolution the first takes the flattened matrix; the second, in the release, the first two
    axes of its weight (out, in, …), so that the patch's positions do not count.
    """
    shape = parameter.unflattened or parameter.shape[int(parameter.stacked) :]
    columns, rows = math.prod(shape[:-1]), shape[-1]
    if parameter.table:
        rows, columns = columns, rows
    return math.sqrt(max(1, rows / columns)) * ADAMW_RMS * math.sqrt(max(shape[-2:]))


def _keep(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
    """Updates that keep every bit: adding +0 would turn a stored −0 into +0, adding −0 does not."""
    del params
    return jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)
