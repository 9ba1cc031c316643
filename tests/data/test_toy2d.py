"""The fractal tree: its density, points and posterior agree with each other, and with the paper."""

import numpy as np
import pytest

from ig_jax.data import toy2d
from ig_jax.data.sets import DATA_SETS
from ig_jax.errors import InputError
from ig_jax.sections import DataOptions


@pytest.fixture(scope="module")
def tree():
    return toy2d.tree()


@pytest.fixture(scope="module")
def points(tree):
    return tree.sample(20_000, seed=3)


def test_it_has_the_papers_branches_and_moments(tree):
    assert tree.weights.shape == (toy2d.BRANCHES, 8) == (254, 8)
    assert tree.weights.sum() == pytest.approx(1)
    mean = np.einsum("bp,bpi->i", tree.weights, tree.means)
    apart = tree.means - mean
    squares = tree.covariances + apart[..., :, None] * apart[..., None, :]
    covariance = np.einsum("bp,bpij->ij", tree.weights, squares)
    # Karras et al. chose origin and scale so that the data have mean 0 and deviation 0.5.
    np.testing.assert_allclose(mean, 0, atol=1e-3)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), 0.5, atol=1e-3)


def test_the_first_branches_start_at_the_origin_in_opposite_directions(tree):
    for label, quarter in ((0, 1), (1, 5)):
        first = tree.means[label * 127] / toy2d._SCALE
        direction = first[-1] - first[0]
        np.testing.assert_allclose(
            np.arctan2(direction[1], direction[0]) % (2 * np.pi), quarter * np.pi / 4
        )
        start = first[0] - 0.07 * direction / 0.86
        np.testing.assert_allclose(start, toy2d._ORIGIN, atol=1e-12)


def test_the_density_integrates_to_one(tree):
    """Over one point in each cell of a mesh, wide enough to hold all of the tree."""
    side, reach = 150, 1.9
    rng = np.random.default_rng(0)
    cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
    mesh = (cells + rng.uniform(size=cells.shape)) * 2 * reach / side - reach
    integral = tree.density(mesh).mean() * (2 * reach) ** 2
    assert integral == pytest.approx(1, abs=0.1)


def test_points_follow_the_density(tree, points):
    x, labels = points
    assert x.shape == (20_000, 2) and x.dtype == np.float32 and labels.dtype == np.int32
    np.testing.assert_allclose(x.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(x.std(0), 0.5, atol=0.02)
    expected = [tree.weights[tree.labels == label].sum() for label in (0, 1)]
    np.testing.assert_allclose(np.bincount(labels) / len(labels), expected, atol=0.02)
    # As many are in a piece of the trunk as the integral of the density over it says.
    ends = tree.means[0, [2, 5]]
    inside = ((x > ends[0]) & (x < ends[1])).all(1)
    lines = [np.linspace(low, high, 100) for low, high in ends.T]
    mesh = np.stack(np.meshgrid(*lines), -1).reshape(-1, 2)
    share = tree.density(mesh).mean() * np.prod(ends[1] - ends[0])
    assert share > 0.02 and inside.mean() == pytest.approx(share, rel=0.15)


def test_the_density_is_that_of_the_gaussians(tree):
    """Term by term, as the formula of a normal density has it."""
    x = np.float64([[0.3, 0.4], *tree.means[::60, 3]])
    apart = x[:, None, None] - tree.means
    squares = np.einsum("nbpi,bpij,nbpj->nbp", apart, np.linalg.inv(tree.covariances), apart)
    heights = tree.weights / (2 * np.pi * np.sqrt(np.linalg.det(tree.covariances)))
    joint = (heights * np.exp(-0.5 * squares)).sum(2)
    np.testing.assert_allclose(tree.joint(x), joint, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(tree.density(x), joint.sum(1), rtol=1e-8)


def test_the_posterior_is_that_of_the_points(tree, points):
    x, labels = points[0][:4000], points[1][:4000]
    joint = tree.joint(x)
    posterior = tree.by_class(joint)
    np.testing.assert_allclose(posterior.sum(1), 1)
    assert posterior[:, 1].mean() == pytest.approx(labels.mean(), abs=0.01)  # calibrated
    assert (posterior.argmax(1) == labels).mean() > 0.99
    np.testing.assert_array_equal(tree.by_class(tree.joint(np.full((1, 2), 1e3))), [[0.5, 0.5]])
    # Branches are drawn as often as their weights say.
    shares = np.bincount(joint.argmax(1), minlength=254) / len(x)
    assert np.abs(shares - tree.weights.sum(1)).max() < 0.02


def test_the_data_set_is_the_same_always():
    source = DATA_SETS["toy2d"](DataOptions(num_validation=1000), (2,), 2)
    again = toy2d.open_toy2d(1000)
    assert (source.shape, source.num_classes, source.class_names) == ((2,), 2, ("A", "B"))
    assert len(source.train) + len(source.validation) == 32_768 and len(source.validation) == 1000
    for index in (0, 17):
        example, same = source.train[index], again.train[index]
        assert example["x"].shape == (2,) and example["label"].dtype == np.int32
        np.testing.assert_array_equal(example["x"], same["x"])
    with pytest.raises(InputError, match="num_validation is 32768: expected 0…32767"):
        toy2d.open_toy2d(32_768)
    with pytest.raises(InputError, match="config.data.flip is True: expected False"):
        toy2d.open_toy2d(flip=True)
