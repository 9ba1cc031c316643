"""Metrics against ADM's numbers, statistics against NumPy, and both at their edges."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
import scipy.linalg

from ig_jax.errors import InputError
from ig_jax.evaluation import metrics, race, statistics
from ig_jax.evaluation.statistics import GaussianStatistics, RunningStatistics, gaussian_statistics
from tests.common import golden

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def adm() -> dict[str, np.ndarray]:
    return golden("adm_metrics_small")


def correlated(count: int, width: int, seed: int, offset: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, width)) @ generator.standard_normal((width, width)) + (
        offset
    )


def adm_frechet(a: GaussianStatistics, b: GaussianStatistics, offset: float = 0.0) -> float:
    """ADM's formula: the trace of the matrix square root of the product."""
    eye = offset * np.eye(a.mean.size)
    root = scipy.linalg.sqrtm((a.covariance + eye) @ (b.covariance + eye)).real
    difference = a.mean - b.mean
    return difference @ difference + np.trace(a.covariance + b.covariance) - 2 * np.trace(root)


class TestFrechet:
    def test_golden(self, adm):
        distance = metrics.frechet_distance(
            gaussian_statistics(adm["inputs/reference"]), gaussian_statistics(adm["inputs/samples"])
        )
        assert distance == pytest.approx(float(adm["outputs/fid"]), rel=1e-6)

    def test_equals_square_root_and_is_symmetric(self):
        a = gaussian_statistics(correlated(500, 24, 0))
        b = gaussian_statistics(correlated(400, 24, 1, offset=0.3))
        assert metrics.frechet_distance(a, b) == pytest.approx(adm_frechet(a, b), rel=1e-9)
        forth, back = metrics.frechet_distance(a, b), metrics.frechet_distance(b, a)
        assert forth == pytest.approx(back, rel=1e-12)

    def test_commuting_covariances_have_a_closed_form(self):
        a = GaussianStatistics(np.zeros(3), np.diag([4.0, 1.0, 0.0]))
        b = GaussianStatistics(np.ones(3), np.diag([1.0, 9.0, 4.0]))
        assert metrics.frechet_distance(a, b) == pytest.approx(3 + 1 + 4 + 4)

    @pytest.mark.filterwarnings("ignore::ig_jax.evaluation.metrics.FewSamplesWarning")
    def test_singular_covariances(self):
        """Rank 9 against rank 14 in 64 dimensions; the square root agrees once it is regular."""
        a = gaussian_statistics(correlated(10, 64, 0))
        b = gaussian_statistics(correlated(15, 64, 1))
        distance = metrics.frechet_distance(a, b)
        low_rank = metrics.frechet_distance(
            GaussianStatistics(a.mean, a.covariance + 1e-12 * np.eye(64)),
            GaussianStatistics(b.mean, b.covariance + 1e-12 * np.eye(64)),
        )
        assert distance == pytest.approx(low_rank, rel=1e-6)
        assert distance == pytest.approx(adm_frechet(a, b, offset=1e-6), rel=1e-4)
        assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * np.trace(a.covariance))

    def test_empty_dimensions_do_not_count(self):
        """Five-dimensional features, turned into 200 dimensions, are as far apart as before."""
        x, y = correlated(500, 5, 0), correlated(500, 5, 1, offset=0.2)
        turn = np.linalg.qr(np.random.default_rng(2).standard_normal((200, 5)))[0].T
        narrow = metrics.frechet_distance(gaussian_statistics(x), gaussian_statistics(y))
        wide = metrics.frechet_distance(
            gaussian_statistics(x @ turn), gaussian_statistics(y @ turn)
        )
        assert wide == pytest.approx(narrow, rel=1e-10)

    def test_orthogonal_supports_have_no_cross_term(self):
        """Rounding in the empty directions must not look like shared spread."""
        turn = np.linalg.qr(np.random.default_rng(2).standard_normal((200, 10)))[0].T
        a = gaussian_statistics(correlated(500, 5, 0) @ turn[:5])
        b = gaussian_statistics(correlated(500, 5, 1) @ turn[5:])
        expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance)
        assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)

    def test_zero_covariance(self):
        point = GaussianStatistics(np.zeros(4), np.zeros((4, 4)))
        cloud = GaussianStatistics(np.ones(4), 2 * np.eye(4))
        assert metrics.frechet_distance(point, cloud) == pytest.approx(12)
        assert metrics.frechet_distance(point, point) == 0

    def test_few_samples_warn_with_counts(self):
        few, many = (gaussian_statistics(correlated(n, 20, 0)) for n in (20, 21))
        with pytest.warns(metrics.FewSamplesWarning, match="from 20 samples with 20 features"):
            metrics.frechet_distance(few, many)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            metrics.frechet_distance(many, many)

    def test_widths_must_agree(self):
        a, b = (gaussian_statistics(correlated(50, width, 0)) for width in (3, 4))
        with pytest.raises(InputError, match="widths 3 and 4"):
            metrics.frechet_distance(a, b)

    def test_bootstrap_spread_is_that_of_fresh_samples(self):
        reference = gaussian_statistics(correlated(5000, 6, 0))
        pool = correlated(60 * 400, 6, 0, offset=0.5).reshape(60, 400, 6)
        fresh = [metrics.frechet_distance(gaussian_statistics(x), reference) for x in pool]
        drawn = [
            metrics.frechet_distance(gaussian_statistics(pool[0][rows]), reference)
            for rows in race.resamples(400, 60, seed=0)
        ]
        assert len(drawn) == 60 and 0.5 < np.std(drawn) / np.std(fresh) < 2

    def test_negative_variance_is_refused(self):
        """A damaged file must not score 0 against everything."""
        good = GaussianStatistics(np.zeros(3), np.eye(3))
        with pytest.raises(InputError, match="eigenvalues down to -1, expected none below 0"):
            metrics.frechet_distance(good, GaussianStatistics(np.zeros(3), -np.eye(3)))


@pytest.fixture(scope="module")
def kid_mind() -> dict[str, np.ndarray]:
    return golden("kid_mind_small")


class TestKernelDistance:
    def test_golden(self, kid_mind):
        first = len(kid_mind["inputs/reference"])
        pair = kid_mind["inputs/samples"][:first], kid_mind["inputs/reference"]
        expected = float(kid_mind["outputs/kid_first_rows"])
        for function in (metrics.kernel_distance, metrics.kid):
            assert function(*pair) == pytest.approx(expected, rel=1e-10)

    def test_blocks_equal_all_at_once(self, kid_mind):
        x, y = (kid_mind[f"inputs/{name}"].astype(np.float64) for name in ("samples", "reference"))
        for other in (None, y):
            whole = metrics._mean_kernel(x, other)
            assert metrics._mean_kernel(x, other, block_size=7) == pytest.approx(whole, rel=1e-12)

    def test_is_unbiased(self):
        """Over many small draws from one distribution the mean is zero, so some are below it."""
        draws = np.random.default_rng(0).standard_normal((400, 2, 6, 3))
        found = [metrics.kid(*pair) for pair in draws]
        assert min(found) < 0 < max(found)
        assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))

    def test_subsets_of_larger_sets(self, kid_mind, monkeypatch):
        """Their mean is near the value of all pairs, whose mean it is, and always the same."""
        pair = kid_mind["inputs/samples"], kid_mind["inputs/reference"]
        every = metrics.kid(*pair)
        monkeypatch.setattr(metrics, "SUBSET_SIZE", 20)
        assert metrics.SUBSETS * 3 * 20**2 < 260**2 + 260 * 300 + 300**2
        found = metrics.kid(*pair)
        assert found == metrics.kid(*pair) != every
        assert found == pytest.approx(every, rel=0.3)
        monkeypatch.setattr(metrics, "SUBSETS", 1)
        assert abs(metrics.kid(*pair) - every) > abs(found - every)


class TestMind:
    def test_golden(self, kid_mind):
        first = len(kid_mind["inputs/reference"])
        found = metrics.mind(
            kid_mind["inputs/samples"][:first],
            kid_mind["inputs/reference"],
            kid_mind["inputs/directions"],
        )
        assert found == pytest.approx(float(kid_mind["outputs/mind_first_rows"]), rel=1e-10)

    def test_other_numbers_of_rows_by_hand(self):
        """In one dimension: quantiles 0, 6 in halves against 1, 3, 5 in thirds."""
        x, y = np.array([[6.0], [0.0]]), np.array([[1.0], [5.0], [3.0]])
        squares = 1 / 3 * 1 + 1 / 6 * 9 + 1 / 6 * 9 + 1 / 3 * 1
        for directions in ([[1.0]], [[-1.0]]):
            found = metrics.mind(x, y, np.asarray(directions))
            assert found == pytest.approx(3 * squares)

    def test_repeated_rows_change_nothing(self, kid_mind):
        x, y = kid_mind["inputs/samples"], kid_mind["inputs/reference"]
        directions = kid_mind["inputs/directions"]
        once = metrics.mind(x, y, directions)
        assert metrics.mind(np.repeat(x, 3, 0), y, directions) == pytest.approx(once, rel=1e-12)

    def test_random_directions(self, kid_mind):
        """Near the value of others, the same every time; a shift by δ adds 3·‖δ‖²."""
        x, y = kid_mind["inputs/samples"], kid_mind["inputs/reference"]
        found = metrics.mind(x, y)
        assert found == metrics.mind(x, y)
        assert found == pytest.approx(metrics.mind(x, y, kid_mind["inputs/directions"]), rel=0.3)
        assert metrics.mind(x, x) == 0
        assert metrics.mind(x, x + 1) == pytest.approx(3 * 24, rel=0.1)


@pytest.mark.parametrize("function", [metrics.kid, metrics.mind])
def test_features_that_do_not_fit(function):
    with pytest.raises(InputError, match="samples: 5 features, but reference has 4"):
        function(np.zeros((9, 5)), np.zeros((9, 4)))
    with pytest.raises(InputError, match=r"reference: features of shape \(4,\), expected \(N, D\)"):
        function(np.zeros((9, 4)), np.zeros(4))


class TestInceptionScore:
    def test_golden(self, adm):
        score = metrics.inception_score(adm["inputs/probabilities"], int(adm["inputs/split_size"]))
        assert score == pytest.approx(float(adm["outputs/inception_score"]), rel=1e-6)

    def test_bounds(self):
        assert metrics.inception_score(np.full((12, 5), 0.2)) == pytest.approx(1)
        one_hot = np.eye(5)[np.arange(20) % 5]
        assert metrics.inception_score(one_hot) == pytest.approx(5)
        assert metrics.inception_score(one_hot, split_size=1) == pytest.approx(1)

    def test_bad_input(self):
        with pytest.raises(InputError, match="rows sum to 0.5…1 .* expected distributions"):
            metrics.inception_score(np.array([[0.5, 0.5], [0.25, 0.25]]))
        with pytest.raises(InputError, match="shape"):
            metrics.inception_score(np.ones(3))
        with pytest.raises(InputError, match="split_size: 0"):
            metrics.inception_score(np.full((2, 2), 0.5), split_size=0)


class TestPrecisionRecall:
    @pytest.mark.parametrize("block_size", [7, 100, 2048])
    def test_golden_for_any_block_size(self, adm, block_size):
        result = metrics.precision_recall(
            adm["inputs/reference"], adm["inputs/samples"], block_size=block_size
        )
        assert result.precision == float(adm["outputs/precision"])
        assert result.recall == float(adm["outputs/recall"])

    def test_no_hidden_transfers(self, adm):
        with jax.transfer_guard("disallow"):
            metrics.precision_recall(adm["inputs/reference"], adm["inputs/samples"], block_size=64)

    def test_by_hand(self):
        """On a line with k = 1: balls of radius 1 about 0, 1 and of radius 4 about 5."""
        reference = np.array([[0.0], [1.0], [5.0]])
        samples = np.array([[0.5], [2.5], [9.5], [30.0]])
        result = metrics.precision_recall(reference, samples, k=1)
        assert result.precision == 2 / 4  # 2.5 is within 4 of 5; 9.5 is not
        assert result.recall == 3 / 3

    def test_does_not_change_under_a_far_shift(self, adm):
        near = metrics.precision_recall(adm["inputs/reference"], adm["inputs/samples"])
        far = metrics.precision_recall(adm["inputs/reference"] + 64, adm["inputs/samples"] + 64)
        assert abs(far.precision - near.precision) <= 1 / 300
        assert abs(far.recall - near.recall) <= 1 / 200

    def test_same_and_disjoint_sets(self):
        x = correlated(60, 8, 0)
        assert metrics.precision_recall(x, x) == metrics.PrecisionRecall(1.0, 1.0)
        assert metrics.precision_recall(x, x + 1e3) == metrics.PrecisionRecall(0.0, 0.0)

    def test_blocks_bound_the_memory(self):
        """No array of the compiled step is larger than a block by all columns."""
        rows, columns = (np.zeros((n, 8), np.float32) for n in (32, 4096))
        lowered = metrics._block_radii.lower(rows, columns, 3)
        memory = lowered.compile().memory_analysis()
        assert memory.temp_size_in_bytes < 6 * 32 * 4096 * 4

    def test_bad_input(self):
        x = np.zeros((10, 4))
        with pytest.raises(InputError, match=r"samples: features of shape \(3, 4\).*N ≥ 4"):
            metrics.precision_recall(x, x[:3])
        with pytest.raises(InputError, match="samples: 3 features, but reference has 4"):
            metrics.precision_recall(x, x[:, :3])
        with pytest.raises(InputError, match="reference: features have NaN"):
            metrics.precision_recall(np.full((10, 4), np.nan), x)


class TestRunningStatistics:
    def test_equals_numpy_far_from_the_origin(self):
        features = correlated(3000, 16, 0, offset=1e4)
        result = gaussian_statistics(features)
        assert result.count == 3000
        np.testing.assert_allclose(result.mean, features.mean(0), rtol=1e-12)
        expected = np.cov(features, rowvar=False)
        assert np.linalg.norm(result.covariance - expected) < 1e-10 * np.linalg.norm(expected)

    @pytest.mark.parametrize("chunk", [1, 37, 1024, 2500])
    def test_chunks_equal_all_at_once_exactly(self, chunk):
        features = correlated(2600, 5, 0).astype(np.float32)
        running = RunningStatistics(5)
        for start in range(0, len(features), chunk):
            running.update(features[start : start + chunk])
        whole = gaussian_statistics(features)
        np.testing.assert_array_equal(running.result().mean, whole.mean)
        np.testing.assert_array_equal(running.result().covariance, whole.covariance)

    def test_merging_equals_one_stream(self):
        features = correlated(2600, 5, 0, offset=3)
        parts = [RunningStatistics(5) for _ in range(4)]  # the third sees nothing
        for part, rows in zip(parts, np.split(features, [10, 1500, 1500]), strict=True):
            part.update(rows)
        for part in parts[1:]:
            parts[0].merge(part)
        merged, whole = parts[0].result(), gaussian_statistics(features)
        assert merged.count == 2600
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-11, atol=1e-11)

    def test_reading_the_result_changes_nothing(self):
        features = correlated(1500, 4, 0)
        running = RunningStatistics(4)
        running.update(features[:700])
        running.result()
        running.over_processes()
        running.update(features[700:])
        whole = gaussian_statistics(features)
        np.testing.assert_array_equal(running.result().covariance, whole.covariance)

    def test_bad_input(self):
        running = RunningStatistics(4)
        with pytest.raises(InputError, match=r"shape \(3, 5\), expected \(N, 4\)"):
            running.update(np.zeros((3, 5)))
        with pytest.raises(InputError, match="NaN"):
            running.update(np.full((3, 4), np.inf))
        running.update(np.zeros((1, 4)))
        with pytest.raises(InputError, match="1 feature vectors"):
            running.result()

    def test_two_processes_equal_one(self, tmp_path):
        code = """
import sys
import jax, numpy as np
from ig_jax.evaluation.statistics import RunningStatistics
port, index, out = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
features = np.random.default_rng(0).standard_normal((1700, 300)) + 5
running = RunningStatistics(300)
running.update(features[:600] if index == "0" else features[600:])
total = running.over_processes().result()
np.savez(out, mean=total.mean, covariance=total.covariance, count=total.count)
"""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "",
        }
        outputs = [tmp_path / f"{index}.npz" for index in range(2)]
        children = [
            subprocess.Popen(
                [sys.executable, "-c", code, port, str(index), str(output)],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index, output in enumerate(outputs)
        ]
        try:
            errors = [child.communicate(timeout=120)[1] for child in children]
        finally:
            for child in children:
                child.kill()
        assert [child.returncode for child in children] == [0, 0], errors
        features = np.random.default_rng(0).standard_normal((1700, 300)) + 5
        for output in outputs:
            with np.load(output) as total:
                assert total["count"] == 1700
                np.testing.assert_allclose(total["mean"], features.mean(0), rtol=1e-12)
                expected = np.cov(features, rowvar=False)
                np.testing.assert_allclose(total["covariance"], expected, rtol=1e-10, atol=1e-12)


class TestFiles:
    @pytest.fixture
    def reference(self) -> statistics.ReferenceStatistics:
        features = correlated(40, 6, 0)
        return statistics.ReferenceStatistics(
            pool=gaussian_statistics(features),
            spatial=gaussian_statistics(features[:, :3]),
            features=features.astype(np.float32),
            metadata={"extractor": "test", "images": 40},
        )

    def test_round_trip(self, reference, tmp_path):
        path = tmp_path / "new" / "statistics.npz"
        statistics.save_statistics(path, reference)
        read = statistics.load_statistics(path)
        for name in ("pool", "spatial"):
            ours, theirs = getattr(read, name), getattr(reference, name)
            np.testing.assert_array_equal(ours.mean, theirs.mean)
            np.testing.assert_array_equal(ours.covariance, theirs.covariance)
            assert ours.count == 40
        np.testing.assert_array_equal(read.features, reference.features)
        assert read.metadata == {"extractor": "test", "images": 40}
        assert [p.name for p in path.parent.iterdir()] == ["statistics.npz"]

    def test_adm_reference_file(self, reference, tmp_path):
        path, images = tmp_path / "VIRTUAL_test.npz", np.arange(5 * 48, dtype=np.uint8)
        images = images.reshape(5, 4, 4, 3)
        np.savez(
            path,
            arr_0=images,
            mu=reference.pool.mean,
            sigma=reference.pool.covariance,
            mu_s=reference.spatial.mean,
            sigma_s=reference.spatial.covariance,
        )
        read = statistics.load_statistics(path)
        np.testing.assert_array_equal(read.pool.covariance, reference.pool.covariance)
        np.testing.assert_array_equal(read.spatial.mean, reference.spatial.mean)
        assert read.pool.count is None and read.features is None
        stored = statistics.NpzImages(path)
        assert stored.shape == (5, 4, 4, 3) and len(stored) == 5
        chunks = list(stored.chunks(2))
        assert [len(chunk) for chunk in chunks] == [2, 2, 1]
        np.testing.assert_array_equal(np.concatenate(chunks), images)

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_truncated_and_damaged_files(self, save, tmp_path):
        path = tmp_path / "samples.npz"
        save(path, arr_0=np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3), np.uint8))
        whole = path.read_bytes()
        path.write_bytes(whole[:-400])
        with pytest.raises(InputError, match="samples.npz: cannot be read as an .npz of pictures"):
            statistics.NpzImages(path)
        path.write_bytes(whole[:900] + bytes(50) + whole[950:])
        with pytest.raises(InputError, match="samples.npz: cannot be read as an .npz of pictures"):
            list(statistics.NpzImages(path).chunks(4))
