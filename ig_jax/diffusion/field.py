"""The guided velocity field that samplers integrate: a network, labels and a guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from ig_jax.diffusion import interpolant as interpolants
from ig_jax.diffusion.guidance import Guidance, Pass, Passes, combine, needed
from ig_jax.models.network import Heads, Network


@flax.struct.dataclass
class Velocity:
    """A guided velocity and what the same forward pass also gave.

    Attributes:
        velocity: guided, (B, …).
        variance: the variance channels, if the network has them.
        auxiliary: the velocity of the first auxiliary head, unguided, if there is one.
    """

    velocity: jax.Array
    variance: jax.Array | None = None
    auxiliary: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class GuidedVelocity:
    """`field(x, t) -> Velocity`: what samplers integrate. They know nothing of guidance.

    Attributes:
        network: `network(x, t, y) -> Heads`.
        labels: (B,) int32.
        null_label: the label ∅.
        path, prediction: what the network was trained on (`interpolant`).
        guidance: the terms.
    """

    network: Network
    labels: jax.Array
    null_label: int
    path: interpolants.Interpolant
    prediction: str
    guidance: Guidance = dataclasses.field(default_factory=Guidance)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        at: jax.Array | None = None,
        taking_part: Sequence[int] | None = None,
    ) -> Velocity:
        """Evaluates the field.

        Args:
            x: (B, …) noisy samples.
            t: (B,) path times.
            at: () or (B,) path times at which schedules are read, if not t: some samplers decide on
                guidance once for all evaluations of a step.
            taking_part: indices of the terms to compute (`Guidance.branches`); None for all.
        """
        terms = self.guidance.terms
        if taking_part is not None:
            terms = tuple(terms[i] for i in taking_part)
        heads = self._run(needed(terms), x, t)
        output = combine(terms, heads, t if at is None else at)
        own = heads[Pass()]
        auxiliary = self._velocity(own.auxiliary[0], x, t) if own.auxiliary else None
        return Velocity(self._velocity(output, x, t), own.variance, auxiliary)

    def shallow(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """The velocity (B, …) of the first auxiliary head, by a pass that stops there."""
        one = Pass(upto=0)
        return self._velocity(self._run(frozenset({one}), x, t)[one].auxiliary[0], x, t)

    def _velocity(self, output: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        return interpolants.velocity_from(self.path, self.prediction, output, x, t)

    def anywhere(self, x: jax.Array, t: jax.Array) -> Velocity:
        """As a call, at (B,) times that are known only while it runs: an adaptive sampler's.

        Terms that need a forward pass of their own are computed while some sample needs them.
        """
        terms = self.guidance.terms
        free = tuple(i for i, term in enumerate(terms) if needed((term,)) == needed(()))
        costly = [term for i, term in enumerate(terms) if i not in free]
        if not costly or any(term.when is None for term in costly):
            return self(x, t)
        wanted = jnp.stack([jnp.asarray(term.factor(t) != 0) for term in costly]).any()
        found: Velocity = jax.lax.cond(
            wanted, lambda: self(x, t), lambda: self(x, t, taking_part=free)
        )
        return found

    def _run(self, passes: Passes, x: jax.Array, t: jax.Array) -> dict[Pass, Heads]:
        """Makes the forward passes; those of one network to one depth ride in one batch."""
        networks = {"": self.network}
        for term in self.guidance.terms:
            networks |= term.source.networks()
        groups: dict[tuple[str, int | None], list[Pass]] = {}
        for one in sorted(passes, key=lambda p: (p.network, str(p.upto), p.null)):
            groups.setdefault((one.network, one.upto), []).append(one)
        network_t = self.path.network_time(t)
        found: dict[Pass, Heads] = {}
        for (name, upto), group in groups.items():
            labels = [
                jnp.full_like(self.labels, self.null_label) if p.null else self.labels
                for p in group
            ]
            options = {} if upto is None else {"upto": upto}
            heads = networks[name](
                jnp.concatenate([x] * len(group)),
                jnp.concatenate([network_t] * len(group)),
                jnp.concatenate(labels),
                **options,
            )
            for i, one in enumerate(group):
                rows = slice(i * len(x), (i + 1) * len(x))
                found[one] = jax.tree.map(lambda a, rows=rows: a[rows], heads)
        return found
