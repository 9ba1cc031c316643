"""Drawing samples in batches over the mesh: sample i of a run depends on (seed, i) and its label
alone, whatever the batch size, the number of devices or the process that draws it."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, pictures
from ig_jax.diffusion import interpolant, sampler
from ig_jax.diffusion.guidance import Guidance, GuidedVelocity
from ig_jax.errors import InputError
from ig_jax.experiment import Experiment, make_to_images
from ig_jax.models.functional import Params, merge
from ig_jax.training import sharding
from ig_jax.training.checkpoint import Checkpoints


def choose_labels(
    kind: str, indices: np.ndarray, num_classes: int, seed: int, classes: tuple[int, ...] = ()
) -> np.ndarray:
    """Labels of the samples with these indices; label i depends on (seed, i) alone.

    Args:
        kind: "random", "balanced" (0, 1, … in turn), or "given" (`classes` in turn).
        indices: (N,) sample indices.
        num_classes: number of classes; 0 (an unconditional model) gives label 0, its ∅.
        seed: of random labels.
        classes: labels for "given", each below `num_classes`.

    Returns:
        (N,) int32. Raises `InputError` for a label out of range.
    """
    if num_classes == 0:
        return np.zeros(len(indices), np.int32)
    if kind == "given":
        for label in classes:
            if not 0 <= label < num_classes:
                raise InputError(f"label {label} is out of range: expected 0…{num_classes - 1}")
        return np.asarray(classes, np.int32)[indices % len(classes)]
    if kind == "balanced":
        return (indices % num_classes).astype(np.int32)
    stream = np.random.default_rng([seed, 1]).integers(num_classes, size=int(indices.max()) + 1)
    return stream[indices].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Drawer:
    """A compiled sampler for one network on one mesh.

    Attributes:
        graphdef: of the network.
        path, prediction: what it was trained on.
        null_label: the label ∅.
        shape: (H, W, C) of a sample.
        batch_size: samples drawn at once over all devices.
        mesh: the devices.
        arguments: keyword arguments of `diffusion.sampler.sample`.
        weak: graph definition of Autoguidance's network, or None.
    """

    graphdef: nnx.GraphDef
    path: interpolant.Interpolant
    prediction: str
    null_label: int
    shape: tuple[int, int, int]
    batch_size: int
    mesh: Mesh
    arguments: dict[str, Any]
    weak: nnx.GraphDef | None = None

    @functools.cached_property
    def _draw(self) -> Callable[..., jax.Array]:
        def draw(
            params: Params,
            weak_params: Params | None,
            scales: tuple[jax.Array, jax.Array],
            seed: jax.Array,
            indices: jax.Array,
            labels: jax.Array,
            guidance: Guidance,
        ) -> jax.Array:
            ig_scale, cfg_scale = scales
            # A CFG scale of exactly 1 stays a Python number, since it removes the ∅ branch.
            cfg_scale = 1.0 if guidance.cfg_scale == 1 else cfg_scale
            guidance = guidance.replace(ig_scale=ig_scale, cfg_scale=cfg_scale)
            weak = None if self.weak is None else merge(self.weak, weak_params)
            field = GuidedVelocity(
                merge(self.graphdef, params),
                labels,
                self.null_label,
                self.path,
                self.prediction,
                weak,
            )
            keys = sampler.sample_keys(seed, indices)
            return sampler.sample(field, keys, self.shape, guidance, **self.arguments)[0]

        def draw_all(*arguments: Any, guidance: Guidance) -> jax.Array:
            # Weights are gathered once a batch, not at each of its hundreds of evaluations.
            rows = functools.partial(draw, guidance=guidance)
            return sharding.by_rows(self.mesh, rows, whole=4)(*arguments)

        return jax.jit(
            draw_all,
            static_argnames="guidance",
            out_shardings=sharding.batch_sharding(self.mesh),
        )

    def batches(
        self,
        params: Params,
        guidance: Guidance,
        seed: int,
        indices: np.ndarray,
        labels: np.ndarray,
        weak_params: Params | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Draws samples batch by batch; each process gets its own rows of every batch.

        Args:
            params: the network's parameters, placed on the mesh.
            guidance: scales and intervals; new scales do not recompile.
            seed: of the samples.
            indices, labels: (N,) sample indices and their labels.
            weak_params: parameters of the weak network, if there is one.

        Yields:
            (positions, samples): which of the N samples these are, (n,), and (n, H, W, C) float32
            in model space. The next batch is computed while the caller works on this one.
        """
        place = functools.partial(
            jax.make_array_from_process_local_data, sharding.batch_sharding(self.mesh)
        )
        share = self.batch_size // jax.process_count()
        rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        # Scales travel as arrays, so that new ones are new arguments and not a new program.
        scales = (np.float32(guidance.ig_scale), np.float32(guidance.cfg_scale))
        static = guidance.replace(ig_scale=1.0, cfg_scale=1.0 if scales[1] == 1 else 0.0)
        pending = None
        for start in range(0, len(indices), self.batch_size):
            positions = np.arange(start, start + self.batch_size)
            # The last batch is filled up with copies of its first sample, so that one program and
            # one batch size serve all of them.
            safe = np.where(positions < len(indices), positions, start)[rows]
            drawn = self._draw(
                params,
                weak_params,
                scales,
                np.uint32(seed),
                place(indices[safe].astype(np.int32)),
                place(labels[safe].astype(np.int32)),
                guidance=static,
            )
            if pending is not None:
                yield _local(*pending, len(indices))
            pending = positions[rows], drawn
        if pending is not None:
            yield _local(*pending, len(indices))

    def draw(self, *arguments: Any, **keywords: Any) -> np.ndarray:
        """As `batches`, but all of this process's samples at once, in order: (n, H, W, C)."""
        return np.concatenate([x for _, x in self.batches(*arguments, **keywords)])


def _local(positions: np.ndarray, drawn: jax.Array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """This process's rows of a batch on the host, without the filling."""
    shards = sorted(drawn.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    x = np.concatenate([jax.device_get(shard.data) for shard in shards])
    kept = positions < count
    return positions[kept], x[kept]


def make_drawer(experiment: Experiment) -> Drawer:
    """The compiled sampler that a config describes."""
    config = experiment.config
    return Drawer(
        graphdef=experiment.graphdef,
        path=experiment.path,
        prediction=config.loss.prediction,
        null_label=experiment.spec.null_label,
        shape=experiment.sample_shape,
        batch_size=config.sampler.batch_size,
        mesh=experiment.mesh,
        arguments=config_lib.sampler_arguments(config),
    )


def labels_for(config: ConfigDict, indices: np.ndarray, class_names: tuple[str, ...]) -> np.ndarray:
    """The labels that `config.sampler.labels` asks for: random, balanced, or classes in turn."""
    wanted, num_classes = config.sampler.labels, config.model.num_classes
    if wanted in config_lib.LABELS:
        return choose_labels(wanted, indices, num_classes, config.seed)
    from ig_jax.data import latents

    classes = latents.resolve_classes(wanted, class_names)
    return choose_labels("given", indices, num_classes, config.seed, classes)


def run(config: ConfigDict, workdir: str) -> str:
    """`--mode=sample`: draws `config.sampler.num_samples` pictures into `workdir/samples`.

    Writes `samples.npz` (`arr_0` uint8 (N, H, W, C), as evaluators expect, and `labels`) and a
    labelled grid of the first 100, `samples.png`. Raises `InputError` on an empty workdir.
    """
    experiment = Experiment.from_config(config)
    source = experiment.open_data()
    indices = np.arange(config.sampler.num_samples)
    labels = labels_for(config, indices, source.class_names)
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.step()
    params = checkpoints.weights(experiment.abstract_params(), ema=config.sampler.ema)
    checkpoints.close()
    to_images = make_to_images(experiment, source)
    drawer = make_drawer(experiment)
    images = []
    with console.progress_bar(len(indices), "sampling") as advance:
        guidance = config_lib.guidance(config)
        for positions, x in drawer.batches(params, guidance, config.seed, indices, labels):
            images.append(to_images(x))
            advance(len(positions))
    pixels = np.concatenate(images)
    directory = epath.Path(workdir) / "samples"
    directory.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=pixels, labels=labels)
    (directory / "samples.npz").write_bytes(buffer.getvalue())
    names = [source.class_names[i] if config.model.num_classes else "" for i in labels[:100]]
    grid = pictures.labelled_grid(pixels[:100], names)
    pictures.save_image(directory / "samples.png", grid)
    return f"{len(pixels)} samples of step {step}: {directory}/samples.png and samples.npz"
