"""What every data set turns into: random access to examples, and the facts a model needs of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from ig_jax.errors import InputError

Example = dict[str, Any]


class RandomAccess(Protocol):
    """Examples by index (Grain's random-access protocol).

    An example holds "label" (int32) and either "x", (H, W, C) float32 or uint8 pixels or (D,)
    float32, or "mean" and "std", (H, W, C) float32 of an autoencoder's posterior. Mirrored twins,
    where stored, carry the suffix "_flip".
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Examples held in memory: x (N, …) and labels (N,) int32."""

    x: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int | np.ndarray) -> Example:
        """An example; or, of indices (B,), a batch of them at once."""
        return {"x": self.x[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some examples of a source, in the order of `indices` (N,)."""

    source: RandomAccess
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]


def where(source: RandomAccess, index: int) -> str:
    """An example's index and, of sources that say it (`where(index)`), its file."""
    if isinstance(source, Subset):
        return where(source.source, int(source.indices[index]))
    file = f", {source.where(index)}" if hasattr(source, "where") else ""
    return f"example {index}{file}"


@dataclasses.dataclass(frozen=True)
class DataSource:
    """An opened data set.

    Attributes:
        train: training examples; None where only the facts below are known (sampling).
        validation: held-out examples, or None.
        shape: (H, W, C) of one model input, or (D,).
        num_classes: number of labels.
        class_names: a name a class, in label order.
        shift, scale: (C,) or (1,) float32; the model sees `(latent − shift)/scale`. For SD-VAE
            shift is 0 and scale is 1/0.18215.
        autoencoder: name of the autoencoder whose latents these are, or None for pixels.
    """

    train: RandomAccess | None
    validation: RandomAccess | None
    shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    shift: np.ndarray
    scale: np.ndarray
    autoencoder: str | None

    def facts(self) -> dict[str, Any]:
        """Everything but the examples, as JSON values: what sampling needs to know of the data."""
        return {
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "shift": [float(v) for v in self.shift],
            "scale": [float(v) for v in self.scale],
            "autoencoder": self.autoencoder,
        }

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> DataSource:
        """A source without examples, from `facts`."""
        return cls(
            train=None,
            validation=None,
            shape=tuple(facts["shape"]),
            num_classes=facts["num_classes"],
            class_names=tuple(facts["class_names"]),
            shift=np.asarray(facts["shift"], np.float32),
            scale=np.asarray(facts["scale"], np.float32),
            autoencoder=facts["autoencoder"],
        )


def hold_out(source: RandomAccess, num_validation: int) -> tuple[RandomAccess, RandomAccess | None]:
    """Splits a source into training and held-out examples, the same ones on every call.

    Args:
        source: at least `num_validation + 1` examples.
        num_validation: number of examples to hold out, drawn evenly from all of them.

    Returns:
        (training, held-out or None if `num_validation` is 0), each in the source's order.

    Raises:
        InputError: nothing would be left to train on.
    """
    if not len(source):
        raise InputError("the data set is empty: expected at least one example")
    if not 0 <= num_validation < len(source):
        raise InputError(
            f"config.data.num_validation is {num_validation}: expected 0…{len(source) - 1}, "
            f"the data set has {len(source)} examples"
        )
    if num_validation == 0:
        return source, None
    order = np.random.default_rng(0).permutation(len(source))
    held_out, train = map(np.sort, np.split(order, [num_validation]))
    if isinstance(source, ArraySource):
        return ArraySource(*source[train].values()), ArraySource(*source[held_out].values())
    return Subset(source, train), Subset(source, held_out)
