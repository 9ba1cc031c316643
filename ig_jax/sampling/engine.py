"""The one sampling engine: batches over a mesh.

Sample i of a run depends on (seed, i) and its label alone, whatever the batch size, the number of
devices or the process that draws it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ig_jax.diffusion import interpolant, samplers
from ig_jax.diffusion.field import GuidedVelocity
from ig_jax.diffusion.guidance import Guidance, Pass, Passes, Weaker, needed
from ig_jax.models.functional import Params, merge
from ig_jax.models.network import Spec
from ig_jax.parallel import hosts, sharding


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that a compiled sampler is fixed to, besides the structure of guidance.

    Attributes:
        graphdef: of the network.
        path, prediction: what it was trained on.
        null_label: the label ∅.
        heads: number of the network's auxiliary heads.
        shape: (H, W, C) of a sample.
        sampler, num_steps, time_shift: see `samplers.time_grid`.
    """

    graphdef: nnx.GraphDef
    path: interpolant.Interpolant
    prediction: str
    null_label: int
    heads: int
    shape: tuple[int, ...]
    sampler: samplers.Sampler
    num_steps: int
    time_shift: float = 1.0

    @property
    def grid(self) -> np.ndarray:
        """The sampler's times; raises `InputError` if there are none."""
        return samplers.time_grid(self.sampler, self.num_steps, self.path, self.time_shift)

    def prepare(self, guidance: Guidance) -> tuple[samplers.Branches, Guidance]:
        """What `draw` takes: which terms take part where (static), and the terms (arrays)."""
        guidance = guidance.canonical(self.heads)
        return guidance.branches(samplers.stage_times(self.sampler, self.grid)), guidance

    def passes(self, guidance: Guidance) -> list[Passes]:
        """The forward passes of each evaluation that a sample takes, at a fixed grid."""
        branches, guidance = self.prepare(guidance)
        evaluations = [
            needed([guidance.terms[i] for i in taking_part])
            if self.sampler.whole(index)
            else frozenset({Pass(upto=0)})
            for index, stages in enumerate(branches)
            for taking_part in stages
        ]
        if self.sampler.plain_end(self.path):
            del evaluations[1 - len(branches[-1]) or len(evaluations) :]
        return evaluations


def draw(
    settings: Settings,
    branches: samplers.Branches,
    trajectory: bool,
    params: Params,
    guidance: Guidance,
    seed: jax.Array,
    indices: jax.Array,
    labels: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Draws samples: the one function under every way to sample. Pure; the first three are static.

    Args:
        settings: what the program is fixed to.
        branches, guidance: of `settings.prepare`; the guidance's numbers may be traced.
        trajectory: whether to return every step too.
        params: the network's parameters.
        seed, indices, labels: () and (B,); sample i depends on (seed, i) and its label alone.

    Returns:
        (B, …) float32 samples in model space; and (N + 1, B, …) from the noise on, or None.
    """
    field = GuidedVelocity(
        merge(settings.graphdef, params),
        labels,
        settings.null_label,
        settings.path,
        settings.prediction,
        guidance,
    )
    keys = samplers.sample_keys(seed, indices)
    noise = samplers.initial_noise(keys, settings.shape)
    steps = samplers.step_noise(keys, settings.shape)
    x, visited = settings.sampler.solve(field, noise, settings.grid, branches, steps, trajectory)
    return x, (jnp.concatenate([noise[None], visited]) if trajectory else None)


@functools.lru_cache(maxsize=64)
def _program(settings: Settings, mesh: Mesh) -> Callable[..., jax.Array]:
    """Draws a batch over a mesh; one program for all engines that differ in weights only."""

    def sample_batch(branches: samplers.Branches, *arguments: Any) -> jax.Array:
        def rows(*arguments: Any) -> jax.Array:
            return draw(settings, branches, False, *arguments)[0]

        # Weights are gathered once a batch, not at each of its hundreds of evaluations.
        return sharding.map_over_devices(mesh, rows, whole=3)(*arguments)

    return jax.jit(sample_batch, static_argnums=0, out_shardings=sharding.batch_sharding(mesh))


@dataclasses.dataclass(frozen=True)
class Engine:
    """Draws samples of one network in batches over a mesh.

    Attributes:
        settings: what its programs are fixed to.
        batch_size: samples drawn at once over all devices.
        mesh: the devices.
        weaker: Autoguidance's network, or None.
    """

    settings: Settings
    batch_size: int
    mesh: Mesh
    weaker: Weaker | None = None

    @property
    def _draw(self) -> Callable[..., jax.Array]:
        return _program(self.settings, self.mesh)

    def forward_passes(self, spec: Spec, guidance: Guidance) -> float:
        """Forward passes of the whole network that a sample takes, at a fixed grid.

        One that stops at an auxiliary head counts as its share of the blocks, one of another
        network as its share of the FLOPs.

        Args:
            spec: the network's.
            guidance: the terms.
        """
        weaker = self.weaker and merge(self.weaker.graph, self.weaker.params).spec

        def cost(one: Pass) -> float:
            if one.network:
                return weaker.forward_flops() / spec.forward_flops()
            return 1.0 if one.upto is None else spec.auxiliary_depths[one.upto] / spec.depth

        return sum(cost(one) for passes in self.settings.passes(guidance) for one in passes)

    def batches(
        self,
        params: Params,
        guidance: Guidance,
        seed: int,
        indices: np.ndarray,
        labels: np.ndarray,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Draws samples batch by batch; each process gets its own rows of every batch.

        Args:
            params: the network's parameters, placed on the mesh.
            guidance: the terms; new numbers in them do not recompile.
            seed: of the samples.
            indices, labels: (N,) sample indices and their labels.

        Yields:
            (positions, samples): which of the N samples these are, (n,), and (n, …) float32 in
            model space. The next batch is computed while the caller works on this one.
        """
        place = functools.partial(
            jax.make_array_from_process_local_data, sharding.batch_sharding(self.mesh)
        )
        share = self.batch_size // jax.process_count()
        rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        branches, guidance = self.settings.prepare(guidance)
        pending = None
        for start in range(0, len(indices), self.batch_size):
            positions = np.arange(start, start + self.batch_size)
            # The last batch is filled up with copies of its first sample, so that one program and
            # one batch size serve all of them.
            safe = np.where(positions < len(indices), positions, start)[rows]
            drawn = self._draw(
                branches,
                params,
                guidance,
                np.uint32(seed),
                place(indices[safe].astype(np.int32)),
                place(labels[safe].astype(np.int32)),
            )
            if pending is not None:
                yield _local(*pending, len(indices))
            pending = positions[rows], sharding.wait_if_simulated(drawn)
        if pending is not None:
            yield _local(*pending, len(indices))

    def draw(
        self,
        params: Params,
        guidance: Guidance,
        seed: int,
        indices: np.ndarray,
        labels: np.ndarray,
    ) -> np.ndarray:
        """As `batches`, but all samples at once, in order, on every process: (N, …)."""
        parts = self.batches(params, guidance, seed, indices, labels)
        positions, samples = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return hosts.in_order(samples, positions, len(indices))

    def lower(self, params: Params, guidance: Guidance) -> jax.stages.Lowered:
        """The program that draws one batch, from parameters' shapes alone."""
        rows = jax.ShapeDtypeStruct(
            (self.batch_size,), np.int32, sharding=sharding.batch_sharding(self.mesh)
        )
        branches, guidance = self.settings.prepare(guidance)
        return self._draw.lower(branches, params, guidance, np.uint32(0), rows, rows)


def _local(positions: np.ndarray, drawn: jax.Array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """This process's rows of a batch on the host, without the filling."""
    shards = sorted(drawn.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    x = np.concatenate([jax.device_get(shard.data) for shard in shards])
    kept = positions < count
    return positions[kept], x[kept]
