"""Sampling as a library function, for other people's programs: a model and labels in, pictures out.

Pure: it can be called inside `jax.jit`, with traced labels, guidance scales and seeds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import checkify

from ig_jax import checks, recipes
from ig_jax.diffusion import interpolant, samplers
from ig_jax.diffusion.guidance import Guidance
from ig_jax.diffusion.samplers import Sampler
from ig_jax.errors import InputError
from ig_jax.models import functional
from ig_jax.models.autoencoder import Autoencoder, check_latents
from ig_jax.models.dit import DiT
from ig_jax.models.functional import Params
from ig_jax.models.pixels import Pixels, to_uint8
from ig_jax.sampling.engine import Settings, draw

_OTHER_STEPS = 50

# Latents decoded at once: 256×256 activations of more would not fit beside a large model.
_DECODED_AT_ONCE = 4


@flax.struct.dataclass
class Samples:
    """Samples and how they came about.

    Attributes:
        samples: what `sample` returns without `trajectory=True`, (B, …).
        trajectory: (N + 1, B, H, W, C) float32 in model space, from the initial noise to the last
            step.
        times: (N + 1,) float32 path times of the trajectory.
    """

    samples: jax.Array
    trajectory: jax.Array
    times: jax.Array


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Turns samples in model space into pictures; pure, so it also runs inside `jax.jit`.

    Attributes:
        autoencoder: whose decoder makes pictures of latents, or None for a model of pixels.
        shift, scale: () or (C,), the latents are `x·scale + shift`. SD-VAE: 0 and 1/0.18215;
            VA-VAE: mean and standard deviation of each channel.
    """

    autoencoder: Autoencoder | None = None
    shift: np.ndarray | float = 0.0
    scale: np.ndarray | float = 1.0

    def __call__(self, x: jax.Array) -> jax.Array:
        """Decodes a few pictures at a time, so that any batch fits into memory.

        Inside `jit` nothing can be raised: there a sample that is not finite fails under
        `jax.experimental.checkify.checkify` only, and else its pixels mean nothing.

        Args:
            x: (B, h, w, C) float32 samples in model space.

        Returns:
            (B, H, W, 3) uint8; of a model of pixels (B, h, w, C) uint8.

        Raises:
            InputError: if the channels of `x` are not the autoencoder's, or without one not those
                of pictures.
            NotFiniteError: if samples are not finite.
        """
        latents = jnp.asarray(x) * self.scale + self.shift
        if self.autoencoder is None:
            if latents.shape[-1:] not in ((1,), (3,)):
                raise InputError(
                    f"pixels to show: found shape {latents.shape}, expected 1 or 3 channels last "
                    "(latents need a decoder with an autoencoder: ig_jax.load_decoder)"
                )
            pixels = to_uint8(latents)
        else:
            check_latents(self.autoencoder.spec, latents.shape)
            pixels = _decode(*functional.split(self.autoencoder), latents)
        pictures: jax.Array = pixels.values
        if _traced(pixels.finite):
            checkify.debug_check(pixels.finite.all(), "pictures are not finite")
        else:
            pixels.checked()
        return pictures


@functools.partial(jax.jit, static_argnums=0)
def _decode(graphdef: nnx.GraphDef[Any], params: Params, latents: jax.Array) -> Pixels:
    autoencoder = functional.merge(graphdef, params)

    def one(z: jax.Array) -> Pixels:
        pixels = to_uint8(autoencoder.decode(z[None]))
        return Pixels(pixels.values[0], pixels.finite[0])

    decoded: Pixels = jax.lax.map(one, latents, batch_size=_DECODED_AT_ONCE)
    return decoded


Labels = Sequence[int] | np.ndarray | jax.Array


class _Options(TypedDict, total=False):
    """What `sample` takes in either of its two forms, for editors and type checkers."""

    guidance: Guidance | None
    sampler: str | None
    num_steps: int | None
    time_shift: float | None
    seed: int | jax.Array
    first_index: int | jax.Array
    decoder: Callable[[jax.Array], jax.Array] | None
    path: str | None
    prediction: str | None


@overload
def sample(
    model: DiT, labels: Labels, *, trajectory: Literal[False] = ..., **options: Unpack[_Options]
) -> jax.Array: ...


@overload
def sample(
    model: DiT, labels: Labels, *, trajectory: Literal[True], **options: Unpack[_Options]
) -> Samples: ...


def sample(
    model: DiT,
    labels: Labels,
    *,
    guidance: Guidance | None = None,
    sampler: str | None = None,
    num_steps: int | None = None,
    time_shift: float | None = None,
    seed: int | jax.Array = 0,
    first_index: int | jax.Array = 0,
    decoder: Callable[[jax.Array], jax.Array] | None = None,
    trajectory: bool = False,
    path: str | None = None,
    prediction: str | None = None,
) -> jax.Array | Samples:
    """Draws samples with internal guidance, classifier-free guidance, both or neither.

    What is not given follows the published recipe of `model.spec.family`. New labels,
    scales and seeds do not compile again; a new batch size or interval does. Inside another `jit`
    labels, scales, `seed` and `first_index` may be traced.

    Args:
        model: from `from_pretrained`, `from_pytorch`, `load_workdir` or a training of yours.
        labels: (B,) class labels, `num_classes` for none (∅); they fix the number of samples.
        guidance: scales and intervals, such as `Guidance(ig_scale=1.4)`; none by default. Its
            `weak` network, if any, takes the auxiliary head's place (Autoguidance).
        sampler: a row of `ig_jax.diffusion.samplers.SAMPLERS`, with options: "dopri5(rtol=1e-4)".
        num_steps: as the authors of that sampler count (`diffusion.samplers.time_grid`); 50 for one
            that is not the recipe's.
        time_shift: s of `t ← s·t/(1 + (s − 1)·t)` on the sampler's grid; 1 for none.
        seed: 0…2³² − 1. Sample i depends on (seed, first_index + i) and its label alone, not on
            the batch it is drawn in, and is the one that `--mode=sample` draws.
        first_index: index of the first sample, to go on where an earlier call ended.
        decoder: makes pictures of the samples, such as a `Decoder`.
        trajectory: whether to return every step too (not with the adaptive sampler).
        path, prediction: what the model was trained on, where it is not its family's path and
            prediction (names of `diffusion.interpolant`).

    Returns:
        (B, H, W, C) float32 in model space (latents, or pixels in [−1, 1]), or what `decoder`
        makes of it: (B, H', W', 3) uint8. With `trajectory=True` a `Samples` that holds this, every
        step (N + 1, B, H, W, C) and its times.

    Raises:
        InputError: an argument of another kind, such as `guidance=1.5`; a label out of range or
            labels that are not (B,) integers; an unknown sampler or path; no steps; an IG scale
            other than 1, or the sampler `reuse`, for a model without an auxiliary head; CFG for an
            unconditional model; a scale that is not finite.
    """
    guidance = Guidance() if guidance is None else guidance
    check_kinds(model, guidance, decoder)
    spec = model.spec
    guidance.check(len(spec.auxiliary_depths), spec.num_classes)
    trained = recipes.family(spec.family).config["loss"]
    graphdef, params = functional.split(model)
    chosen, num_steps, time_shift = _recipe(spec.family, sampler, num_steps, time_shift)
    chosen.check(len(spec.auxiliary_depths))
    settings = Settings(
        graphdef=graphdef,
        path=interpolant.get(path or trained["path"]),
        prediction=_check_prediction(prediction or trained["prediction"]),
        null_label=spec.null_label,
        heads=len(spec.auxiliary_depths),
        shape=spec.shape,
        sampler=chosen,
        num_steps=num_steps,
        time_shift=time_shift,
    )
    grid = settings.grid
    labels = _check_labels(labels, spec.num_classes)
    branches, guidance = settings.prepare(guidance)
    x, visited = _draw(
        settings,
        branches,
        trajectory,
        params,
        guidance,
        jnp.uint32(_checked("seed", seed, checks.SEED)),
        _checked("first_index", first_index, checks.COUNT_OR_NONE)
        + np.arange(len(labels), dtype=np.int32),
        labels,
    )
    pictures = x if decoder is None else decoder(x)
    if not trajectory:
        return pictures
    return Samples(pictures, visited, jnp.asarray(grid, jnp.float32))


_draw = jax.jit(draw, static_argnums=(0, 1, 2))


def _recipe(
    family: str, name: str | None, num_steps: int | None, time_shift: float | None
) -> tuple[Sampler, int, float]:
    """What was asked for, completed by the family's recipe."""
    own = recipes.family(family).config["sampler"]
    sampler = samplers.make(name or own["name"])
    if num_steps is None:
        num_steps = own["num_steps"] if sampler == samplers.make(own["name"]) else _OTHER_STEPS
    return sampler, num_steps, own["time_shift"] if time_shift is None else time_shift


def _check_prediction(prediction: str) -> str:
    if prediction not in interpolant.PREDICTIONS:
        raise InputError(
            f"unknown prediction {prediction!r}: expected one of "
            f"{', '.join(interpolant.PREDICTIONS)}"
        )
    return prediction


def _check_labels(labels: Labels, num_classes: int) -> jax.Array:
    """(B,) int32; labels that are known must be in range, traced ones are taken as they are."""
    values: Any = labels if _traced(labels) else np.asarray(labels)
    if values.ndim != 1 or not jnp.issubdtype(values.dtype, jnp.integer) or not len(values):
        raise InputError(
            f"labels are {values.dtype} of shape {values.shape}: expected (B,) integers, B ≥ 1"
        )
    checks.BATCH.check("the number of labels", len(values))
    if not _traced(labels):
        outside = values[(values < 0) | (values > num_classes)]
        if outside.size:
            raise InputError(
                f"label {outside[0]} is out of range: expected 0…{num_classes} "
                f"({num_classes} is no class)"
            )
    return jnp.asarray(labels, jnp.int32)


def check_kinds(model: Any, guidance: Any, decoder: Any) -> None:
    """Refuses what is mistaken for a network, for guidance or for a decoder."""
    for name, value, fits, expected in (
        ("model", model, isinstance(model, nnx.Module), "a network, such as load_workdir(…)"),
        ("guidance", guidance, isinstance(guidance, Guidance), "ig_jax.Guidance(ig_scale=…)"),
        ("decoder", decoder, decoder is None or callable(decoder), "ig_jax.Decoder(…) or None"),
    ):
        if not fits:
            known = isinstance(value, bool | int | float | str)
            found = repr(value) if known else f"of type {type(value).__name__}"
            raise InputError(f"{name} is {found}: expected {expected}")


def _checked(name: str, value: Any, limits: checks.Limits) -> Any:
    """The value, which must be within the limits where it is known: inside `jit` it may not be."""
    dtype, shape = getattr(value, "dtype", np.dtype(int)), getattr(value, "shape", ())
    if shape != () or jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise InputError(
            f"{name} is an array of {dtype} of shape {shape}: expected an integer {limits} (no key "
            "of jax.random: samples are numbered by seed and index)"
        )
    if not _traced(value):
        # A concrete array without axes is as good as a number.
        scalar = hasattr(value, "dtype") and value.ndim == 0
        limits.check(name, value.item() if scalar else value)
    return value


def _traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)
