"""Guidance as a tuple of terms: each says where its weak prediction comes from, by which rule it
extrapolates from weak to strong, with what scale, and when.

Terms apply innermost first. Internal guidance (IG paper, §3.2) inside classifier-free guidance is
`(Term(Auxiliary(), w), Term(Null(), s))`: both labels' predictions are extrapolated away from their
own intermediate head, and then the conditional one away from that of ∅. What is off is not there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ig_jax import checks, tables
from ig_jax.errors import InputError
from ig_jax.fields import field
from ig_jax.models import functional
from ig_jax.models.network import Heads, Network

Bounds = tuple[float, float]
Scale = jax.Array | float

# Bounds are inclusive, also for grid points that arithmetic put an ulp beside them.
_TOLERANCE = 1e-6


# --- what is weak -------------------------------------------------------------------------------


class Pass(NamedTuple):
    """A forward pass that an evaluation needs.

    Attributes:
        network: name of a weaker network, or "" for the network itself.
        null: at the null label ∅ instead of the wanted labels.
        upto: index of the auxiliary head to stop at, or None for the whole depth.
    """

    network: str = ""
    null: bool = False
    upto: int | None = None


Passes = frozenset[Pass]


class Source(Protocol):
    """Where a weak prediction comes from: a row of `SOURCES`, a pytree.

    Attributes:
        place: what the term changes. Several may extrapolate from weak predictions of the same
            labels, one after the other; two at the null label are a mistake.
    """

    place: ClassVar[str]

    def passes(self, null: bool, inner: Callable[[], Passes]) -> Passes:
        """Forward passes needed besides that of the strong prediction at label ∅ (or not).

        Args:
            null: whether the strong prediction is the one at ∅.
            inner: gives the passes of the terms inside this one, at ∅.
        """
        ...

    def weak(
        self, heads: Mapping[Pass, Heads], null: bool, inner: Callable[[], jax.Array]
    ) -> jax.Array:
        """The weak prediction, from the heads of the passes and the inner terms' result at ∅."""
        ...

    def check(self, heads: int, num_classes: int) -> None:
        """Raises `InputError` if a network of so many auxiliary heads and classes has no such."""
        ...

    def networks(self) -> dict[str, Network]:
        """Networks that passes name."""
        ...


def _check_head(head: int, heads: int, use: str) -> None:
    if not 0 <= head < heads:
        there = f"it has {heads}" if heads else "it has no auxiliary head"
        raise InputError(
            f"{use} needs auxiliary head {head} of this model: {there} (`add_auxiliary_head` adds "
            "one to train; a weaker network, `Guidance(weak=…)`, does without)"
        )


@flax.struct.dataclass
class Auxiliary:
    """Internal guidance: `D_i`, an intermediate head of the same forward pass (IG paper, eq. 6).

    Attributes:
        head: which auxiliary head, counted from the shallowest.
    """

    head: int = flax.struct.field(pytree_node=False, default=0)
    place: ClassVar[str] = "the weak prediction of the same labels"

    def passes(self, null: bool, inner: Callable[[], Passes]) -> Passes:
        return frozenset()

    def weak(
        self, heads: Mapping[Pass, Heads], null: bool, inner: Callable[[], jax.Array]
    ) -> jax.Array:
        return heads[Pass(null=null)].auxiliary[self.head]

    def check(self, heads: int, num_classes: int) -> None:
        _check_head(self.head, heads, "internal guidance")

    def networks(self) -> dict[str, Network]:
        return {}


@flax.struct.dataclass
class Mixed(Auxiliary):
    """Internal guidance by several heads of the same forward pass at once: their weighted mean.

    Attributes:
        head: the first of them, counted from the shallowest.
        weights: of that head and the next ones; they need not sum to 1.
    """

    weights: tuple[float, ...] = flax.struct.field(pytree_node=False, default=(1.0, 1.0))

    def weak(
        self, heads: Mapping[Pass, Heads], null: bool, inner: Callable[[], jax.Array]
    ) -> jax.Array:
        several = heads[Pass(null=null)].auxiliary[self.head :]
        mixed = [w * weak for w, weak in zip(self.weights, several, strict=False)]
        return sum(mixed[1:], mixed[0]) / sum(self.weights)

    def check(self, heads: int, num_classes: int) -> None:
        """Raises `InputError` also for weights that no mean can be taken with."""
        given = self.weights if isinstance(self.weights, tuple) else ()
        if not all(isinstance(weight, int | float) for weight in given) or sum(given) <= 0:
            raise InputError(
                f"mixed weights are {self.weights}: expected numbers with a sum above 0"
            )
        for offset in range(len(given)):
            _check_head(self.head + offset, heads, "internal guidance")


@flax.struct.dataclass
class Null:
    """Classifier-free guidance (Ho & Salimans 2022): the prediction at ∅, guided by inner terms."""

    place: ClassVar[str] = "the prediction at the null label"

    def passes(self, null: bool, inner: Callable[[], Passes]) -> Passes:
        return inner()

    def weak(
        self, heads: Mapping[Pass, Heads], null: bool, inner: Callable[[], jax.Array]
    ) -> jax.Array:
        return inner()

    def check(self, heads: int, num_classes: int) -> None:
        """Raises `InputError` for an unconditional model, which has no ∅."""
        if num_classes == 0:
            raise InputError(
                "classifier-free guidance needs a null label ∅: this model is unconditional"
            )

    def networks(self) -> dict[str, Network]:
        return {}


@flax.struct.dataclass
class ShallowNull(Null):
    """Classifier-free guidance whose ∅ branch stops at an auxiliary head: `D_i(∅)`.

    A partial forward pass instead of a whole one, so about 1.3 in all where CFG costs 2.

    Attributes:
        head: where it stops, counted from the shallowest.
    """

    head: int = flax.struct.field(pytree_node=False, default=0)

    def _pass(self) -> Pass:
        return Pass(null=True, upto=self.head)

    def passes(self, null: bool, inner: Callable[[], Passes]) -> Passes:
        return frozenset({self._pass()})

    def weak(
        self, heads: Mapping[Pass, Heads], null: bool, inner: Callable[[], jax.Array]
    ) -> jax.Array:
        return heads[self._pass()].auxiliary[self.head]

    def check(self, heads: int, num_classes: int) -> None:
        super().check(heads, num_classes)
        _check_head(self.head, heads, "shallow guidance")


@flax.struct.dataclass
class Weaker:
    """Autoguidance (Karras et al. 2024): the final head of a separate, worse network, or of an
    older EMA of the same one.

    Attributes:
        params: the network's parameters, if it is a module.
        graph: its graph definition; or a function `network(x, t, y) -> Heads`, without parameters.
    """

    params: functional.Params | None = None
    graph: Any = flax.struct.field(pytree_node=False, default=None)
    place: ClassVar[str] = Auxiliary.place

    @classmethod
    def of(cls, network: Network) -> Weaker:
        """The source that runs a module or a function."""
        if isinstance(network, nnx.Module):
            graph, params = functional.split(network)
            return cls(params, graph)
        return cls(None, network)

    def passes(self, null: bool, inner: Callable[[], Passes]) -> Passes:
        return frozenset({Pass("weaker", null)})

    def weak(
        self, heads: Mapping[Pass, Heads], null: bool, inner: Callable[[], jax.Array]
    ) -> jax.Array:
        return heads[Pass("weaker", null)].strong

    def check(self, heads: int, num_classes: int) -> None:
        """Raises `InputError` if there is no network."""
        if self.graph is None:
            raise InputError("guidance by a weaker network needs one: none was given")

    def networks(self) -> dict[str, Network]:
        if self.params is None:
            return {"weaker": self.graph}
        return {"weaker": functional.merge(self.graph, self.params)}


SOURCES: dict[str, type] = {
    "auxiliary": Auxiliary,
    "mixed": Mixed,
    "weaker": Weaker,
    "null": Null,
    "shallow": ShallowNull,
}


# --- how to extrapolate -------------------------------------------------------------------------


class Rule(Protocol):
    """`rule(weak, strong, scale) -> guided`, all of one shape (B, …): a row of `RULES`.

    A frozen dataclass, its fields being its options. Scale 1 gives `strong`. Rules act on what the
    network predicts (velocity, noise or data); for all but the linear one that makes a difference.
    """

    def __call__(self, weak: jax.Array, strong: jax.Array, scale: Scale) -> jax.Array: ...


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Scalar product over a whole sample, (B, 1, …)."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdims=True)


@dataclasses.dataclass(frozen=True)
class Linear:
    """`weak + scale·(strong − weak)` (IG paper, eq. 6; Ho & Salimans 2022, eq. 6)."""

    def __call__(self, weak: jax.Array, strong: jax.Array, scale: Scale) -> jax.Array:
        # Written so that scale 1 returns `strong` bit for bit.
        return strong + (scale - 1) * (strong - weak)


@dataclasses.dataclass(frozen=True)
class Projected:
    """Adaptive projected guidance (Sadat et al. 2024), without its momentum over steps.

    The difference strong − weak is clipped to a norm and split at `strong`; its parallel part,
    which oversaturates, is damped: `strong + (scale − 1)·(Δ⊥ + eta·Δ∥)`.

    Attributes:
        eta: share of the parallel part that is kept.
        norm: largest norm of a sample's difference; 0 for no limit.
    """

    eta: float = 0.0
    norm: float = 0.0

    def __call__(self, weak: jax.Array, strong: jax.Array, scale: Scale) -> jax.Array:
        difference = strong - weak
        if self.norm:
            length = jnp.sqrt(_dot(difference, difference))
            difference *= jnp.minimum(1.0, self.norm / jnp.maximum(length, 1e-12))
        share = _dot(difference, strong) / jnp.maximum(_dot(strong, strong), 1e-24)
        return strong + (scale - 1) * (difference - (1 - self.eta) * share * strong)


@dataclasses.dataclass(frozen=True)
class ZeroStar:
    """CFG-Zero* (Fan et al. 2025, eq. 8): linear from the weak prediction scaled to fit best."""

    def __call__(self, weak: jax.Array, strong: jax.Array, scale: Scale) -> jax.Array:
        fit = _dot(strong, weak) / (_dot(weak, weak) + 1e-8)
        return Linear()(fit * weak, strong, scale)


@dataclasses.dataclass(frozen=True)
class Tangential:
    """Tangential damping (TCFG, Kwon et al. 2025): linear from the weak prediction's projection on
    the first right singular vector of the pair [strong; weak]."""

    def __call__(self, weak: jax.Array, strong: jax.Array, scale: Scale) -> jax.Array:
        # The singular vector is cos θ·strong + sin θ·weak up to length, where the 2×2 Gram matrix
        # has 2θ as the angle of (⟨s, s⟩ − ⟨w, w⟩, 2⟨s, w⟩); the projection needs only that angle.
        x = _dot(strong, strong) - _dot(weak, weak)
        y = 2 * _dot(strong, weak)
        radius = jnp.maximum(jnp.sqrt(x * x + y * y), 1e-24)
        projected = 0.5 * (y / radius) * strong + 0.5 * (1 - x / radius) * weak
        return Linear()(projected, strong, scale)


@dataclasses.dataclass(frozen=True)
class Rescaled:
    """Linear, brought back to strong's standard deviation (Lin et al. 2023, §3.4).

    Attributes:
        phi: share of the rescaled prediction in the result.
    """

    phi: float = 0.7

    def __call__(self, weak: jax.Array, strong: jax.Array, scale: Scale) -> jax.Array:
        axes = tuple(range(1, strong.ndim))
        guided = Linear()(weak, strong, scale)
        ratio = strong.std(axes, keepdims=True) / jnp.maximum(
            guided.std(axes, keepdims=True), 1e-12
        )
        return guided * (self.phi * ratio + 1 - self.phi)


RULES: dict[str, type] = {
    "linear": Linear,
    "projected": Projected,
    "zero_star": ZeroStar,
    "tangential": Tangential,
    "rescaled": Rescaled,
}


# --- when ---------------------------------------------------------------------------------------


class Schedule(Protocol):
    """`schedule(t) -> factor` in [0, 1], path times t being numpy or JAX: a row of `SCHEDULES`.

    A pytree, so that its numbers may be traced. A term acts with scale `1 + factor·(scale − 1)`,
    and where the factor is 0 not at all.
    """

    def __call__(self, t: Any) -> Any: ...


def check_bounds(name: str, bounds: Sequence[Scale]) -> None:
    """Raises `InputError` unless `bounds` is (low, high) with 0 ≤ low ≤ high ≤ 1."""
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1:
        raise InputError(
            f"{name} is {tuple(bounds)}: expected (low, high) with 0 <= low <= high <= 1"
        )


def _concrete(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


@flax.struct.dataclass
class Interval:
    """1 at path times within [low, high], both ends included, 0 elsewhere (Kynkäänniemi et al.
    2024)."""

    low: Scale = 0.0
    high: Scale = 1.0

    def __post_init__(self) -> None:
        if _concrete(self.low, self.high):
            check_bounds("interval", (self.low, self.high))

    def __call__(self, t: Any) -> Any:
        return ((t >= self.low - _TOLERANCE) & (t <= self.high + _TOLERANCE)) * 1.0


@flax.struct.dataclass
class Ramp:
    """Rises evenly with path time from 0 at `start` to 1 at `stop`; falls where stop < start."""

    start: Scale = 0.0
    stop: Scale = 1.0

    def __post_init__(self) -> None:
        if _concrete(self.start, self.stop) and (
            self.start == self.stop or not all(0 <= v <= 1 for v in (self.start, self.stop))
        ):
            raise InputError(
                f"ramp is ({self.start}, {self.stop}): expected two different times in [0, 1]"
            )

    def __call__(self, t: Any) -> Any:
        return ((t - self.start) / (self.stop - self.start)).clip(0.0, 1.0)


SCHEDULES: dict[str, type] = {"interval": Interval, "ramp": Ramp}


# --- terms and their composition ----------------------------------------------------------------


@flax.struct.dataclass
class Term:
    """One extrapolation from a weak prediction to the strong one.

    Attributes:
        source: where the weak prediction comes from.
        scale: 1 is no guidance, 0 the weak prediction (for the linear rule); may be traced.
        when: schedule over path times; None for always.
        null_scale: scale at the null label, if it is another than `scale`.
        rule: how to extrapolate.
        channels: guide only so many channels and leave the rest strong; None for all. The
            published samplers of DiT and LightningDiT guide 3.
    """

    source: Source
    scale: Scale = 1.0
    when: Schedule | None = None
    null_scale: Scale | None = None
    rule: Rule = flax.struct.field(pytree_node=False, default=Linear())
    channels: int | None = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        for name in ("scale", "null_scale"):
            value = getattr(self, name)
            if isinstance(value, numbers.Real):
                checks.SCALE.check(f"guidance {name}", value)

    def factor(self, t: Any) -> Any:
        """The schedule's factor at path times t."""
        return np.ones_like(t) if self.when is None else self.when(t)

    def apply(self, weak: jax.Array, strong: jax.Array, t: jax.Array, null: bool) -> jax.Array:
        """Extrapolates (B, …) predictions at path times t, () or (B,)."""
        scale = self.scale if self.null_scale is None or not null else self.null_scale
        if self.when is not None:
            factor = jnp.asarray(self.when(t))
            factor = factor.reshape(factor.shape + (1,) * (strong.ndim - factor.ndim))
            scale = jnp.where(factor == 1, scale, 1 + factor * (scale - 1))
        part = slice(None) if self.channels is None else slice(self.channels)
        guided = self.rule(weak[..., part], strong[..., part], scale)
        if self.channels is not None:
            guided = jnp.concatenate([guided, strong[..., self.channels :]], axis=-1)
        return guided if self.when is None else jnp.where(factor == 0, strong, guided)


def needed(terms: Sequence[Term], null: bool = False) -> Passes:
    """The forward passes that an evaluation of these terms makes."""
    found = frozenset({Pass(null=null)})
    for i, term in enumerate(terms):
        found |= term.source.passes(null, functools.partial(needed, terms[:i], null=True))
    return found


def combine(
    terms: Sequence[Term], heads: Mapping[Pass, Heads], t: jax.Array, null: bool = False
) -> jax.Array:
    """The guided prediction (B, …) at path times t, () or (B,), from the heads of `needed`."""
    guided = heads[Pass(null=null)].strong
    for i, term in enumerate(terms):
        inner = functools.partial(combine, terms[:i], heads, t, null=True)
        weak = term.source.weak(heads, null, inner)
        guided = term.apply(weak, guided, t, null)
    return guided


def _off(scale: Any) -> bool:
    """Whether a scale that somebody typed stands for no guidance."""
    return not isinstance(scale, jax.core.Tracer) and np.ndim(scale) == 0 and float(scale) == 1


def _when(name: str, bounds: Bounds) -> Interval | None:
    check_bounds(name, bounds)
    return None if tuple(bounds) == (0, 1) else Interval(*map(float, bounds))


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Guidance:
    """A tuple of terms, innermost first. Scales, and the numbers of schedules, may be traced.

    `Guidance(ig_scale=1.4, cfg_scale=1.35)` is the short form for internal guidance inside
    classifier-free guidance; `Guidance.of(term, …)` takes any terms.

    Args:
        ig_scale: w of internal guidance, `D_i + w·(D_f − D_i)`; 0 samples from the auxiliary head.
        ig_interval: (low, high) path times, inclusive, within [0, 1]; outside it w = 1.
        cfg_scale: s of classifier-free guidance, `D(∅) + s·(D(c) − D(∅))`.
        cfg_interval: (low, high), inclusive; outside it the ∅ branch is not computed at all.
        weak: a separate, worse network used in place of the auxiliary head (Autoguidance, Karras
            et al. 2024), or None.

    Attributes:
        terms: what is on.
    """

    terms: tuple[Term, ...]

    def __init__(
        self,
        ig_scale: Scale = 1.0,
        ig_interval: Bounds = (0.0, 1.0),
        cfg_scale: Scale = 1.0,
        cfg_interval: Bounds = (0.0, 1.0),
        weak: Network | None = None,
    ):
        ig_when, cfg_when = _when("ig_interval", ig_interval), _when("cfg_interval", cfg_interval)
        source = Auxiliary() if weak is None else Weaker.of(weak)
        named = (
            ("ig_scale", ig_scale, source, ig_when),
            ("cfg_scale", cfg_scale, Null(), cfg_when),
        )
        terms = []
        for name, scale, where, when in named:
            if not isinstance(scale, jax.core.Tracer):
                checks.SCALE.check(name, np.asarray(scale).item() if np.ndim(scale) == 0 else scale)
            if not _off(scale):
                terms.append(Term(where, scale, when))
        object.__setattr__(self, "terms", tuple(terms))

    @classmethod
    def of(cls, *terms: Term) -> Guidance:
        """Guidance of these terms, innermost first.

        Raises:
            InputError: two terms at the null label.
        """
        if [term.source.place for term in terms].count(Null.place) > 1:
            raise InputError(f"two guidance terms claim {Null.place}: expected one at most")
        return cls.tree_unflatten(None, (tuple(terms),))

    def tree_flatten(self) -> tuple[tuple[tuple[Term, ...]], None]:
        """The terms, for JAX."""
        return (self.terms,), None

    @classmethod
    def tree_unflatten(cls, metadata: None, children: tuple[Any]) -> Guidance:
        """The guidance of the terms in `children`, unchecked, for JAX; `metadata` is none."""
        guidance = object.__new__(cls)
        object.__setattr__(guidance, "terms", children[0])
        return guidance

    def __repr__(self) -> str:
        return f"Guidance.of({', '.join(map(repr, self.terms))})"

    def check(self, heads: int, num_classes: int) -> None:
        """Raises `InputError` for a term that needs what the network lacks.

        Args:
            heads: number of its auxiliary heads.
            num_classes: number of its classes; 0 for an unconditional one, which has no ∅.
        """
        for term in self.terms:
            term.source.check(heads, num_classes)

    def canonical(self, heads: int) -> Guidance:
        """The same guidance in the form in which new numbers compile nothing.

        Internal guidance costs nothing, so where a network has a head it is always there, at scale
        1 if it is off; terms that always act get an interval; numbers become float32 arrays.

        Args:
            heads: number of the network's auxiliary heads.
        """
        terms = self.terms
        if heads and Auxiliary.place not in [term.source.place for term in terms]:
            terms = (Term(Auxiliary(), 1.0), *terms)
        terms = tuple(
            dataclasses.replace(term, when=Interval(0.0, 1.0)) if term.when is None else term
            for term in terms
        )
        numeric: Guidance = jax.tree.map(
            lambda leaf: np.float32(leaf) if isinstance(leaf, int | float) else leaf,
            Guidance.of(*terms),
        )
        return numeric

    def branches(self, times: np.ndarray) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Decides, before compiling, which terms take part in which evaluation.

        A term takes part if it acts there, or if it needs no forward pass that the others do not
        make; its factor then decides. So programs differ only where their forward passes do.

        Args:
            times: (N, S) path times that decide, of N steps with S evaluations each.

        Returns:
            N × S tuples of indices of terms; hashable. All of them where schedules are traced.
        """
        every = tuple(range(len(self.terms)))
        leaves = jax.tree.leaves([term.when for term in self.terms])
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return ((every,) * times.shape[1],) * len(times)
        factors = np.stack([np.asarray(t.factor(times)) for t in self.terms] or [times * 0])
        return tuple(
            tuple(self._taking_part(column) for column in row.T) for row in factors.swapaxes(0, 1)
        )

    def _taking_part(self, factors: np.ndarray) -> tuple[int, ...]:
        acting = [term for term, factor in zip(self.terms, factors, strict=False) if factor != 0]
        passes = needed(acting)
        chosen: list[int] = []
        for i in range(len(self.terms)):
            if needed([self.terms[j] for j in (*chosen, i)]) <= passes:
                chosen.append(i)
        return tuple(chosen)

    @classmethod
    def of_record(cls, terms: Iterable[Mapping[str, Any]]) -> Guidance:
        """The guidance whose `record` is `terms`; raises `InputError` for rows that are unknown."""
        return cls.of(
            *(
                Term(
                    source=tables.make(SOURCES, term["source"], "source"),
                    scale=term["scale"],
                    when=tables.make(SCHEDULES, term["when"], "when") if "when" in term else None,
                    null_scale=term.get("null_scale"),
                    rule=tables.make(RULES, term["rule"], "rule"),
                    channels=term.get("channels"),
                )
                for term in terms
            )
        )

    def record(self) -> list[dict[str, Any]]:
        """Every term in plain JSON values, for records; what is a default is left out."""
        return [_term_record(term) for term in self.terms]


def _term_record(term: Term) -> dict[str, Any]:
    """A term in plain values. A weaker network is named only; its weights have a hash elsewhere."""
    source = "weaker" if isinstance(term.source, Weaker) else tables.spell(SOURCES, term.source)
    values = {"source": source, "rule": tables.spell(RULES, term.rule), "scale": float(term.scale)}
    if term.when is not None:
        numbers = jax.tree.map(float, term.when)
        values["when"] = tables.spell(SCHEDULES, numbers)
    if term.null_scale is not None:
        values["null_scale"] = float(term.null_scale)
    if term.channels is not None:
        values["channels"] = term.channels
    return values


# Guidance does not alter what is learned.
_field = functools.partial(field, resume="free")


@dataclasses.dataclass(frozen=True)
class GuidanceOptions:
    """Guidance as plain values: `config.guidance`, a setting of a search, a record."""

    ig_scale: float = _field(
        1.0, "w of internal guidance, D_i + w·(D_f − D_i); 1 for none", limits=checks.SCALE
    )
    ig_interval: Bounds = _field((0.0, 1.0), "low, high path times; outside it w = 1")
    cfg_scale: float = _field(
        1.0, "s of classifier-free guidance, D(∅) + s·(D(c) − D(∅))", limits=checks.SCALE
    )
    cfg_interval: Bounds = _field((0.0, 1.0), "low, high path times; outside it ∅ costs nothing")
    ig_source: str = _field(
        "auto",
        "what is weak: auxiliary(head=1); auto: the network that config.guidance.weak names, else "
        "the first auxiliary head",
        table=SOURCES,
    )
    ig_rule: str = _field("linear", "how to extrapolate: projected(eta=0.5)", table=RULES)
    ig_schedule: str = _field("", "in place of the interval: ramp(stop=0.5)", table=SCHEDULES)
    ig_null_scale: str = _field("same", "w where the label is ∅, or same")
    cfg_source: str = _field(
        "null",
        "what is weak: shallow, or one more of IG's: auxiliary(head=1), weaker",
        table=SOURCES,
    )
    cfg_rule: str = _field("linear", "how to extrapolate", table=RULES)
    cfg_schedule: str = _field("", "in place of the interval", table=SCHEDULES)
    cfg_channels: int = _field(
        0, "guide only so many channels by CFG; 0 for all", limits=checks.COUNT_OR_NONE
    )

    @classmethod
    def of(cls, section: Mapping[str, Any], **changes: Any) -> GuidanceOptions:
        """The options in a section such as `config.guidance`, which may hold more.

        Args:
            section: values by name.
            **changes: values to take instead.
        """
        return cls(**{f.name: section[f.name] for f in dataclasses.fields(cls)} | changes)

    def build(self, weaker: Weaker | None = None) -> Guidance:
        """The terms that these values stand for.

        Args:
            weaker: the network that "weaker" stands for, and "auto" too, if there is one.

        Returns:
            The guidance. Raises `InputError` for what cannot be.
        """
        return Guidance.of(*(term for _, term in self._terms(weaker)))

    def _terms(self, weaker: Weaker | None) -> Iterator[tuple[str, Term]]:
        """What is on, each under the name of its scale."""
        null_scale = None if self.ig_null_scale == "same" else _number(self.ig_null_scale)
        parts = (("ig", null_scale, None), ("cfg", None, self.cfg_channels or None))
        for name, at_null, channels in parts:
            scale, bounds, source, rule, schedule = (
                getattr(self, f"{name}_{part}")
                for part in ("scale", "interval", "source", "rule", "schedule")
            )
            when = _when(f"{name}_interval", bounds)
            if schedule:
                when = tables.make(SCHEDULES, schedule, f"{name}_schedule")
            if source == "auto":
                source = "auxiliary" if weaker is None else "weaker"
            weak: Source = tables.make(SOURCES, source, f"{name}_source")
            if isinstance(weak, Weaker):
                weak = weaker or weak
            rule = tables.make(RULES, rule, f"{name}_rule")
            if not (_off(scale) and at_null in (None, 1.0)):
                yield f"{name}_scale", Term(weak, scale, when, at_null, rule, channels)

    def check(self, heads: int, num_classes: int, weaker: Weaker | None = None) -> None:
        """Raises `InputError`, naming the field, for what a network cannot do; see `Guidance`."""
        for name, term in self._terms(weaker):
            try:
                term.source.check(heads, num_classes)
            except InputError as error:
                raise InputError(f"{name} is {term.scale}: expected 1, since {error}") from None
        self.build(weaker)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"ig_null_scale is {text!r}: expected 'same' or a finite number")
    return value
