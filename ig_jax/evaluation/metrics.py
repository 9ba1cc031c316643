"""The numbers that pictures are scored by: a table, from which evaluation, the guidance search and
evaluation during training take their columns, and the definitions behind its rows.

The paper's five are defined as in ADM's evaluator (Dhariwal & Nichol 2021). Moments and scores are
float64 on the host; the pairwise distances of precision and recall run on the device in blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import streams
from ig_jax.data import toy2d
from ig_jax.errors import InputError
from ig_jax.evaluation.features import FeatureSet
from ig_jax.evaluation.statistics import GaussianStatistics, ReferenceStatistics

# Of precision and recall.
NEIGHBOURS = 3
# Of KID, as its users have it: how many subsets, and of how many rows at the most.
SUBSETS, SUBSET_SIZE = 100, 1000
# Of MIND.
DIRECTIONS = 1000


class FewSamplesWarning(UserWarning):
    """A Fréchet distance from fewer samples than features, so biased upwards."""


def few_samples(count: int | None, width: int) -> str | None:
    """Returns a line of warning if `count` vectors cannot fill a covariance of `width`, or None."""
    if count is None or count > width:
        return None
    return (
        f"Fréchet distance from {count} samples with {width} features: the covariance is singular "
        "and the number biased upwards; compare it only with numbers from as many samples"
    )


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """`‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2·(Σ_a Σ_b)^½)` (Heusel et al. 2017), symmetric.

    The trace of the square root is the sum of the singular values of `L_aᵀ L_b`, with `Σ = L Lᵀ`.
    It needs no square root of a non-symmetric matrix and holds for singular covariances, where
    ADM's `sqrtm` needs an offset. A few seconds at width 2048.

    Warns:
        FewSamplesWarning: if either side is known to have fewer samples than features.

    Raises:
        InputError: if the widths differ.
    """
    _check_widths(a, b)
    for statistics in (a, b):
        message = few_samples(statistics.count, statistics.mean.size)
        if message:
            warnings.warn(message, FewSamplesWarning, stacklevel=2)
    return _distance(a, b)


def kernel_distance(samples: np.ndarray, reference: np.ndarray) -> float:
    """Unbiased MMD² with the kernel `(x·y/D + 1)³` over all pairs (Bińkowski et al. 2018, §4).

    Unlike a Fréchet distance it has the same mean for any number of samples; it may fall below 0.

    Args:
        samples: (N, D) features, N ≥ 2.
        reference: (M, D) features, M ≥ 2.

    Raises:
        InputError: if shapes do not fit, or values are not finite.
    """
    x, y = _feature_pair(samples, reference, 2)
    return _mean_kernel(x) + _mean_kernel(y) - 2 * _mean_kernel(x, y)


def kid(samples: np.ndarray, reference: np.ndarray) -> float:
    """Kernel Inception Distance: `kernel_distance` averaged over random subsets (ibid.).

    The mean over all subsets is the value of all pairs, so where those are no more than the pairs
    in `SUBSETS` subsets of `SUBSET_SIZE` rows (up to 10,000 rows on both sides), it is that value.
    The subsets are the same for every set of as many rows. Arguments, errors: `kernel_distance`.
    """
    x, y = _feature_pair(samples, reference, 2)
    size = min(SUBSET_SIZE, len(x), len(y))
    if len(x) ** 2 + len(x) * len(y) + len(y) ** 2 <= 3 * SUBSETS * SUBSET_SIZE**2:
        return kernel_distance(x, y)
    generator = streams.numpy_stream(0, "KID subsets")
    pairs = (
        [rows[generator.choice(len(rows), size, replace=False)] for rows in (x, y)]
        for _ in range(SUBSETS)
    )
    return float(np.mean([kernel_distance(*pair) for pair in pairs]))


def mind(samples: np.ndarray, reference: np.ndarray, directions: np.ndarray | None = None) -> float:
    """Monge Inception Distance (Berthet et al. 2026, arXiv 2605.06797): a sliced Wasserstein-2².

    3·D times the mean over directions of the squared W₂ between the projections: for as many rows
    on both sides that of sorted values; otherwise quantile functions are compared, which is exact
    as well. It falls with the number of rows, so compare it at equal numbers only.

    Args:
        samples: (N, D) features.
        reference: (M, D) features.
        directions: (K, D) unit vectors; `DIRECTIONS` random ones, always the same, if None.

    Raises:
        InputError: if shapes do not fit, or values are not finite.
    """
    x, y = _feature_pair(samples, reference, 1)
    width = x.shape[1]
    if directions is None:
        directions = streams.numpy_stream(0, "MIND directions").standard_normal((DIRECTIONS, width))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # Both quantile functions are constant between these multiples of 1/(N·M).
    ends = np.union1d(np.arange(1, len(x) + 1) * len(y), np.arange(1, len(y) + 1) * len(x))
    shares = np.diff(ends, prepend=0) / (len(x) * len(y))
    at_x, at_y = (ends - 1) // len(y), (ends - 1) // len(x)
    total = 0.0
    for part in np.array_split(directions, -(-len(directions) // 64)):  # to bound the memory
        gaps = np.sort(x @ part.T, 0)[at_x] - np.sort(y @ part.T, 0)[at_y]
        total += float((shares @ gaps**2).sum())
    return 3 * width * total / len(directions)


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """Mean over splits of `exp(E[KL(p(y|x) ‖ p(y))])` (Salimans et al. 2016).

    Args:
        probabilities: (N, classes), each row a distribution; split in order, as ADM does, so the
            last split may be shorter.
        split_size: rows per split (ten splits of 50,000 samples).

    Raises:
        InputError: if the rows are not distributions, or `split_size` is below 1.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if probabilities.ndim != 2 or len(probabilities) == 0:
        raise InputError(f"probabilities: shape {probabilities.shape}, expected (N ≥ 1, classes)")
    if split_size < 1:
        raise InputError(f"split_size: {split_size}, expected at least 1")
    sums = probabilities.sum(1)
    if not (np.all(probabilities >= 0) and np.allclose(sums, 1, atol=1e-3)):
        raise InputError(
            f"probabilities: rows sum to {sums.min():.4g}…{sums.max():.4g} with minimum "
            f"{probabilities.min():.4g}, expected distributions"
        )
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size]
        marginal = part.mean(0, keepdims=True)
        positive = part > 0  # 0·log 0 = 0
        ratio = np.divide(part, marginal, out=np.ones_like(part), where=positive)
        scores.append(np.exp((part * np.log(ratio)).sum(1).mean()))
    return float(np.mean(scores))


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]: samples inside the reference manifold, references inside the samples'."""

    precision: float
    recall: float


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = NEIGHBOURS, block_size: int = 2048
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019), as ADM computes them.

    A set's manifold is the union of balls about its vectors, each reaching to the k-th nearest
    other vector. Distances are float32 on the default device, `block_size` rows at a time against
    all columns, so 10,000 × 10,000 needs 82 MB for a block besides the features. ADM rounds
    distances to float16, these are exact: the shares differ from ADM's by up to 2e-3, depending on
    the features (not at all on the golden ones).

    Args:
        reference: (M, D) features, M > k.
        samples: (N, D) features, N > k.

    Raises:
        InputError: if shapes do not fit, values are not finite, or a set has no k-th neighbour.
    """
    samples, reference = _feature_pair(samples, reference, k + 1, np.float32)
    if k < 1 or block_size < 1:
        raise InputError(f"k: {k}, block_size: {block_size}, expected at least 1")
    # Distances do not change under a shift, but float32 loses fewer digits near the origin.
    centre = reference.mean(0, dtype=np.float64).astype(np.float32)
    reference, samples = reference - centre, samples - centre
    return PrecisionRecall(
        precision=_share_inside(samples, reference, k, block_size),
        recall=_share_inside(reference, samples, k, block_size),
    )


def _feature_pair(
    samples: np.ndarray, reference: np.ndarray, least: int, dtype: type = np.float64
) -> tuple[np.ndarray, np.ndarray]:
    """Both in one type, checked to be finite, (N ≥ least, D), and of one width."""
    pair = np.asarray(samples, dtype), np.asarray(reference, dtype)
    for name, features in zip(("samples", "reference"), pair, strict=True):
        if features.ndim != 2 or len(features) < least:
            raise InputError(
                f"{name}: features of shape {features.shape}, expected (N, D) with N ≥ {least}"
            )
        if not np.all(np.isfinite(features)):
            raise InputError(f"{name}: features have NaN or infinite values")
    widths = [features.shape[1] for features in pair]
    if widths[0] != widths[1]:
        raise InputError(f"samples: {widths[0]} features, but reference has {widths[1]}")
    return pair


def _mean_kernel(x: np.ndarray, y: np.ndarray | None = None, block_size: int = 1024) -> float:
    """Mean of KID's kernel over pairs of rows: of `x` and `y`, or of different rows of `x`."""
    others, width = (x if y is None else y), x.shape[1]
    total = 0.0
    for start in range(0, len(x), block_size):
        products = x[start : start + block_size] @ others.T / width + 1
        total += float((products * products * products).sum())
    if y is not None:
        return total / (len(x) * len(y))
    itself = float(((np.einsum("nd,nd->n", x, x) / width + 1) ** 3).sum())
    return (total - itself) / (len(x) * (len(x) - 1))


def _check_widths(a: GaussianStatistics, b: GaussianStatistics) -> None:
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"statistics: widths {a.mean.size} and {b.mean.size} differ "
            "(features of different extractors or layers)"
        )


def _distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    difference = a.mean - b.mean
    product = a.factor.T @ b.factor  # has no entries if either covariance is zero
    cross = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    # Equal statistics differ by rounding only, which may come out below zero.
    return max(float(difference @ difference + trace - 2 * cross), 0.0)


def _blocks(features: np.ndarray, block_size: int) -> Iterator[tuple[jax.Array, int]]:
    """Yields (rows of `block_size` on the device, how many are real); the last block is padded."""
    block_size = min(block_size, len(features))
    for start in range(0, len(features), block_size):
        block = features[start : start + block_size]
        padded = np.pad(block, ((0, block_size - len(block)), (0, 0)))
        yield jax.device_put(padded), len(block)


def _squared_distances(rows: jax.Array, columns: jax.Array) -> jax.Array:
    product = jnp.dot(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sum(rows**2, 1)[:, None] - 2 * product + jnp.sum(columns**2, 1)[None]
    return jnp.maximum(norms, 0)


@functools.partial(jax.jit, static_argnums=2)
def _block_radii(rows: jax.Array, features: jax.Array, k: int) -> jax.Array:
    # The nearest is the vector itself, so the k-th neighbour has the (k + 1)-th smallest distance.
    # Striking out k minima is 15 times faster on CPU than `jax.lax.top_k`, which sorts.
    distances, row = _squared_distances(rows, features), jnp.arange(len(rows))
    for _ in range(k):
        distances = distances.at[row, jnp.argmin(distances, 1)].set(jnp.inf)
    return distances.min(1)


@jax.jit
def _block_inside(rows: jax.Array, centres: jax.Array, radii: jax.Array) -> jax.Array:
    return jnp.any(_squared_distances(rows, centres) <= radii[None], axis=1)


def _share_inside(features: np.ndarray, centres: np.ndarray, k: int, block_size: int) -> float:
    """Share of vectors that lie in the manifold of `centres`."""
    on_device = jax.device_put(centres)
    radii = jax.device_put(
        np.concatenate(
            [
                jax.device_get(_block_radii(rows, on_device, k))[:real]
                for rows, real in _blocks(centres, block_size)
            ]
        )
    )
    inside = sum(
        int(jax.device_get(_block_inside(rows, on_device, radii))[:real].sum())
        for rows, real in _blocks(features, block_size)
    )
    return inside / len(features)


Labels = np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that pictures are scored by: a row of `METRICS`.

    Attributes:
        title: what tables and plots call it.
        compute: `compute(samples, reference, labels) -> number`, `labels` (N,) being those that
            were asked for.
        needs: what it reads of the samples: names of `extractors.Features` that the extractor must
            give, or "images". Without any of these the metric is left out.
        rows: which of them it reads picture by picture (`FeatureSet.rows`).
        reference: the attribute of `ReferenceStatistics` that it reads, if any.
        labels: whether it reads labels.
        better: 1 if larger is better, -1 if smaller.
        least: pictures, on either side, that it needs at the least.
        format: of its values.
        unit: axis label of plots; metrics of one unit share a panel.
        raced: whether a search shows it for every setting also where another metric decides (not
            if it costs more than a glance at the features).
        titles: its names for features of an extractor whose name begins so.
    """

    title: str
    compute: Callable[[FeatureSet, ReferenceStatistics, Labels], float]
    needs: tuple[str, ...] = ("pool",)
    rows: tuple[str, ...] = ()
    reference: str = ""
    labels: bool = False
    better: int = -1
    least: int = 2
    format: str = ".4g"
    unit: str = "distance (lower is better)"
    raced: bool = True
    titles: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def title_for(self, extractor: str) -> str:
        """Its title for features of the extractor of this name."""
        found = (title for start, title in self.titles.items() if extractor.startswith(start))
        return next(found, self.title)


def label_accuracy(readings: np.ndarray, labels: np.ndarray) -> float:
    """Share of (N, classes) readings that are the (N,) labels."""
    return float(np.mean(readings.argmax(1) == labels))


def outlier_rate(joint: np.ndarray) -> float:
    """Share of points, by (N, branches) densities p(x, branch), beyond `toy2d.outlier_density`."""
    return float(np.mean(joint.sum(1) < toy2d.outlier_density()))


def coverage(joint: np.ndarray) -> float:
    """Share of the tree's branches that a point reaches that is no outlier; grows with N."""
    reached = joint[joint.sum(1) >= toy2d.outlier_density()].argmax(1)
    return len(np.unique(reached)) / joint.shape[1]


def _precision_recall(samples: FeatureSet, reference: ReferenceStatistics) -> PrecisionRecall:
    key = ("precision_recall", id(reference))
    if key not in samples.memo:
        samples.memo[key] = precision_recall(reference.features, samples.rows["pool"])
    return samples.memo[key]


_SHARE = "share of pictures"

METRICS: dict[str, Metric] = {
    "fid": Metric(
        "Fréchet distance",
        lambda samples, reference, labels: _distance(samples.pool, reference.pool),
        reference="pool",
        titles={"inception": "FID", "dinov2": "FD-DINOv2"},
    ),
    "kid": Metric(
        "kernel distance",
        lambda samples, reference, labels: kid(samples.rows["pool"], reference.features),
        rows=("pool",),
        reference="features",
        unit="kernel distance (lower is better)",
        raced=False,
        titles={"inception": "KID"},
    ),
    "mind": Metric(
        "sliced distance",
        lambda samples, reference, labels: mind(samples.rows["pool"], reference.features),
        rows=("pool",),
        reference="features",
        unit="sliced distance (lower is better)",
        raced=False,
        titles={"inception": "MIND"},
    ),
    "sfid": Metric(
        "sFID",
        lambda samples, reference, labels: _distance(samples.spatial, reference.spatial),
        needs=("spatial",),
        reference="spatial",
        raced=False,
    ),
    "inception_score": Metric(
        "IS",
        lambda samples, reference, labels: inception_score(samples.rows["probabilities"]),
        needs=("probabilities",),
        rows=("probabilities",),
        better=1,
        unit="Inception Score",
    ),
    "precision": Metric(
        "precision",
        lambda samples, reference, labels: _precision_recall(samples, reference).precision,
        rows=("pool",),
        reference="features",
        better=1,
        least=NEIGHBOURS + 1,
        format=".3f",
        unit=_SHARE,
        raced=False,
    ),
    "recall": Metric(
        "recall",
        lambda samples, reference, labels: _precision_recall(samples, reference).recall,
        rows=("pool",),
        reference="features",
        better=1,
        least=NEIGHBOURS + 1,
        format=".3f",
        unit=_SHARE,
        raced=False,
    ),
    "label_accuracy": Metric(
        "label accuracy",
        lambda samples, reference, labels: label_accuracy(samples.rows["readings"], labels),
        needs=("readings",),
        rows=("readings",),
        labels=True,
        better=1,
        format=".1%",
        unit=_SHARE,
    ),
    "outlier_rate": Metric(
        "outliers",
        lambda samples, reference, labels: outlier_rate(samples.rows["joint"]),
        needs=("joint",),
        rows=("joint",),
        format=".1%",
        unit=_SHARE,
    ),
    "coverage": Metric(
        "branches reached",
        lambda samples, reference, labels: coverage(samples.rows["joint"]),
        needs=("joint",),
        rows=("joint",),
        better=1,
        format=".1%",
        unit=_SHARE,
    ),
}


def check_name(config: ConfigDict) -> str:
    """The row of `METRICS` that `config.sweep.metric` names.

    Raises:
        InputError: it names none, or `config.ablation.metrics` does not.
    """
    config_lib.check_choice(config, "sweep.metric", METRICS)
    config_lib.check_choice(config, "ablation.metrics", METRICS)
    return config.sweep.metric
