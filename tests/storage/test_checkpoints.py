"""Which checkpoints are kept, and which one a word stands for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.errors import InputError
from ig_jax.parallel import sharding
from ig_jax.storage.checkpoints import Checkpoints, Score, best_step, saved_config
from ig_jax.training.state import TrainState
from tests.common import tiny_config


@pytest.mark.parametrize(
    "metrics,best",
    [
        ({1: {"loss": 0.3}, 2: {"loss": 0.2}, 3: {"loss": 0.4}}, 2),
        ({1: {"loss": 0.3}, 2: None, 3: {"loss": 0.3}}, 3),
        # A loss of 0.3 is no better than an FID of 40.
        ({1: {"loss": 0.3}, 2: {"fid": 40.0}, 3: {"fid": 50.0}}, 2),
        ({1: {"fid": 40.0}, 2: {"loss": 0.3}, 3: None}, 2),
        # Nor is a number whose name is not known, wherever it comes.
        ({1: {"score": 0.1}, 2: {"loss": 0.3}}, 2),
        ({1: {"loss": 0.3}, 2: {"score": 0.1}}, 1),
        ({1: {"score": 0.2}, 2: {"score": 0.1}}, 2),
        ({1: {"loss": float("nan")}, 2: {"loss": 0.3}, 3: {"loss": float("inf")}}, 2),
        ({1: None, 2: None}, None),
        ({}, None),
    ],
)
def test_only_scores_of_one_name_are_compared(metrics, best):
    assert best_step(metrics) == best


def save(workdir, scores, **options):
    """A workdir of checkpoints with these scores by step; configs tell the steps by their seed."""
    state = TrainState(jnp.int32(0), {"w": jnp.ones(2)}, {"w": jnp.ones(2)}, {"n": jnp.ones(1)})
    checkpoints = Checkpoints(str(workdir), **options)
    for step, score in scores.items():
        config = tiny_config()
        config.seed = step
        checkpoints.save(state, step, config, {}, score)
    checkpoints.close()


def test_the_best_of_the_name_in_use_is_kept(tmp_path):
    losses = {1: Score("loss", 0.3), 2: Score("loss", 0.2), 3: Score("loss", 0.4), 4: None}
    save(tmp_path, losses, max_to_keep=1)
    assert Checkpoints(str(tmp_path), read_only=True).steps() == [2, 4]
    save(tmp_path, {5: Score("fid", 50.0), 6: Score("fid", 60.0)}, max_to_keep=1)
    checkpoints = Checkpoints(str(tmp_path), read_only=True)
    assert checkpoints.steps() == [5, 6]
    assert checkpoints.step("best") == 5 and checkpoints.step() == 6
    assert [saved_config(str(tmp_path), which).seed for which in ("last", "best", 5, "6")] == [
        6,
        5,
        5,
        6,
    ]


def test_scores_that_older_versions_saved_without_a_name(tmp_path):
    save(tmp_path, {1: Score("loss", 0.3), 2: Score("loss", 0.5)})
    (tmp_path / "checkpoints" / "1" / "manifest.json").unlink()
    metrics = tmp_path / "checkpoints" / "1" / "metrics" / "metrics"
    metrics.write_text(json.dumps({"score": 0.3}))
    assert Checkpoints(str(tmp_path), read_only=True).step("best") == 2
    # With one named score, a restarted run lets go of the unnamed one.
    save(tmp_path, {3: None}, max_to_keep=1)
    assert Checkpoints(str(tmp_path), read_only=True).steps() == [2, 3]


@pytest.mark.parametrize(
    "which,message",
    [
        ("best", "carries a score: expected a run that validates .*; there are 1, 2$"),
        (3, "no checkpoint of step 3 in .*: there are 1, 2$"),
        ("bset", "no checkpoint of step bset in .*: there are 1, 2$"),
    ],
)
def test_steps_that_are_not_there_get_one_line(tmp_path, which, message):
    save(tmp_path, {1: None, 2: None})
    checkpoints = Checkpoints(str(tmp_path), read_only=True)
    for ask in (checkpoints.step, lambda w: saved_config(str(tmp_path), w)):
        with pytest.raises(InputError, match=message) as caught:
            ask(which)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count, sliced", [(1 << 16, False), (1 << 21, True)])
def test_devices_share_the_writing_of_large_copies_alone(tmp_path, caplog, count, sliced):
    copies = sharding.replicated(sharding.make_mesh(-1, 1))
    arrays = {"w": jax.device_put(np.arange(count, dtype=np.float32), copies)}
    state = TrainState(jnp.int32(0), arrays, arrays, {"n": jnp.ones(1)})
    checkpoints = Checkpoints(str(tmp_path))
    jax.clear_caches()
    with jax.log_compiles():
        checkpoints.save(state, 1, tiny_config(), {})
    assert sliced == any("slice)" in record.getMessage() for record in caplog.records)
    restored = checkpoints.weights(jax.eval_shape(lambda: arrays))
    checkpoints.close()
    np.testing.assert_array_equal(restored["w"], arrays["w"])
