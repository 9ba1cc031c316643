"""A fractal tree of two classes in the plane, drawn as a mixture of Gaussians: the distribution on
which Autoguidance (Karras et al. 2024, §3 and appendix C) and the IG paper (Fig. 2) show what
guidance does. Its density is known, so that outliers can be counted instead of looked for.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from ig_jax.data.source import ArraySource, DataSource, hold_out
from ig_jax.errors import InputError

CLASSES = ("A", "B")
LEVELS = 7
# Branches of the whole tree, both classes.
BRANCHES = len(CLASSES) * (2**LEVELS - 1)
# Karras et al.'s: drawn in this order from this generator it gives their tree, to which their
# scale brings mean 0 and standard deviation 0.5.
_TREE_SEED = 2
# Of the distribution, not of a run: every run sees the same points.
_SEED = 0
_POINTS = 1 << 15
_ORIGIN = np.array([0.0030, 0.0325])
_SCALE = np.array([1.3136, 1.3844])
_ALONG = np.linspace(0.07, 0.93, 8)
# Points whose distances to all Gaussians are in memory at a time.
_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Tree:
    """A mixture of Gaussians in the plane: B branches of P Gaussians.

    Attributes:
        weights: (B, P), which sum to 1.
        means: (B, P, 2).
        covariances: (B, P, 2, 2).
        labels: (B,) int32, the class of each branch, 0 or 1.
    """

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    labels: np.ndarray

    def sample(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws points (count, 2) float32 and their labels (count,) int32."""
        rng = np.random.default_rng(seed)
        flat = rng.choice(self.weights.size, count, p=self.weights.ravel())
        chosen = np.unravel_index(flat, self.weights.shape)
        factors = np.linalg.cholesky(self.covariances)[chosen]
        points = self.means[chosen] + np.einsum("nij,nj->ni", factors, rng.normal(size=(count, 2)))
        return points.astype(np.float32), self.labels[chosen[0]]

    def joint(self, points: np.ndarray) -> np.ndarray:
        """p(x, branch) at points (N, 2), (N, B) float64; its sum over branches is the density."""
        precisions = np.linalg.inv(self.covariances)
        logs = np.log(self.weights) + 0.5 * np.linalg.slogdet(precisions)[1] - np.log(2 * np.pi)
        pulls = np.einsum("bpij,bpj->bpi", precisions, self.means)
        # log p(x, Gaussian) is linear in (1, x, y, x², 2xy, y²): one matrix product.
        linear = np.stack(
            [
                logs - 0.5 * np.einsum("bpi,bpi->bp", pulls, self.means),
                *np.moveaxis(pulls, -1, 0),
                *(-0.5 * precisions[..., i, j] for i, j in ((0, 0), (0, 1), (1, 1))),
            ]
        ).reshape(6, -1)
        parts = []
        for start in range(0, len(points), _BLOCK):
            x, y = np.float64(points[start : start + _BLOCK]).T
            terms = np.stack([np.ones_like(x), x, y, x * x, 2 * x * y, y * y], axis=1)
            each = np.exp(terms @ linear).reshape(len(x), *self.weights.shape)
            parts.append(each.sum(2))
        return np.concatenate(parts)

    def density(self, points: np.ndarray) -> np.ndarray:
        """p(x) at points (N, 2), (N,) float64."""
        return self.joint(points).sum(1)

    def by_class(self, joint: np.ndarray) -> np.ndarray:
        """p(class | x), (N, 2), from (N, B) `joint`; even where no Gaussian reaches."""
        found = np.stack([joint[:, self.labels == k].sum(1) for k in range(len(CLASSES))], axis=1)
        total = found.sum(1, keepdims=True)
        return np.where(total > 0, found / np.where(total > 0, total, 1), 1 / len(CLASSES))


@functools.cache
def tree() -> Tree:
    """The paper's tree: a branch of length ℓ at depth d is 8 Gaussians of weight ∝ ℓ·0.5^d, 0.06·ℓ
    long and 0.012·0.8^d wide, and has two children (Karras et al. 2024, appendix C)."""
    rng = np.random.RandomState(_TREE_SEED)
    weights: list[float] = []
    means: list[np.ndarray] = []
    axes: list[np.ndarray] = []

    def grow(depth: int, start: np.ndarray, angle: float) -> None:
        if depth == LEVELS:
            return
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-along[1], along[0]])
        length = 0.292 * 0.8**depth * (1 + 0.2 * rng.randn())
        weights.append(length * 0.5**depth)
        means.append(_SCALE * (start + np.outer(_ALONG * length, along)))
        sides = np.stack([0.06 * length * along, 0.06 * 0.2 * 0.8**depth * across], axis=1)
        axes.append(_SCALE[:, None] * sides)
        for turn in (1, -1):
            bend = turn * 0.7**depth * (1 + 0.2 * rng.randn())
            grow(depth + 1, start + length * along, angle + bend)

    for quarter in (np.pi / 4, 5 * np.pi / 4):
        grow(0, _ORIGIN, quarter)
    covariances = np.stack(axes) @ np.stack(axes).swapaxes(1, 2)
    shares = np.repeat(weights, len(_ALONG)).reshape(BRANCHES, len(_ALONG))
    return Tree(
        weights=shares / shares.sum(),
        means=np.stack(means),
        covariances=np.repeat(covariances[:, None], len(_ALONG), axis=1),
        labels=np.repeat(np.arange(len(CLASSES), dtype=np.int32), BRANCHES // len(CLASSES)),
    )


@functools.cache
def outlier_density() -> float:
    """The density that 1 % of the data lie below: where it is lower, a sample is an outlier."""
    points, _ = tree().sample(1 << 14, _SEED + 1)
    return float(np.quantile(tree().density(points), 0.01))


def open_toy2d(num_validation: int = 1024, flip: bool = False) -> DataSource:
    """Opens 32,768 points of the tree, the same ones always.

    Args:
        num_validation: number of held-out points, below 32,768.
        flip: refused: a mirrored tree is another one.

    Returns:
        A `DataSource` of shape (2,) with 2 classes. Raises `InputError`.
    """
    if flip:
        raise InputError("config.data.flip is True: expected False, points do not mirror")
    points, labels = tree().sample(_POINTS, _SEED)
    train, validation = hold_out(ArraySource(points, labels), num_validation)
    return DataSource(
        train=train,
        validation=validation,
        shape=(2,),
        num_classes=len(CLASSES),
        class_names=CLASSES,
        shift=np.zeros(1, np.float32),
        scale=np.ones(1, np.float32),
        autoencoder=None,
    )
