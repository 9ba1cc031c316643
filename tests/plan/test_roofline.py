"""The bound of a step: operations are those of the formula, loops in full; parts are seconds."""

import jax
import pytest

from ig_jax.config import default_config
from ig_jax.experiment import Experiment
from ig_jax.plan import fit, roofline, topology

CHIP = topology.Chip(16, flops=1e12, memory_rate=1e9, exchange_rate=1e8, source="a data sheet")


def test_the_slowest_part_bounds_the_step():
    work = roofline.Work(flops=2e12, memory=3e9, exchange=1e8, model_flops=1.5e12)
    bound = roofline.Bound(work, CHIP)
    assert bound.parts == {"arithmetic": 2.0, "memory": 3.0, "exchange": 1.0}
    assert bound.seconds == 3.0 and bound.mfu == 0.5
    assert bound.line().startswith(
        "at least 3000 ms, by memory, so MFU at most 50%: arithmetic 2000"
    )
    # Two cores of a chip share what it can do.
    assert roofline.Bound(work, CHIP, cores=2).seconds == 6.0


def published_config(size, side):
    config = default_config("sit", size)
    config.data.name = "latents"
    config.model.input_size, config.train.batch_size = side, 8
    return config


@pytest.mark.parametrize(
    ("size", "side"), [("s", 32), pytest.param("b", 64, marks=pytest.mark.slow)]
)
def test_a_compiled_step_has_the_operations_of_the_formula(size, side):
    """To 3 %, at 256 and at 1,024 tokens. A scanned step is counted in full, though the compiler
    takes its loops' bodies once."""
    config, device = published_config(size, side), jax.devices()[:1]
    spec, batch = Experiment.from_config(config, device).spec, config.train.batch_size
    work = roofline.step_work(
        config,
        device,
        lambda one: fit.lower_train_step(one).compile({"xla_backend_optimization_level": 0}),
        {},
    )
    assert work.model_flops == 3 * batch * spec.forward_flops()
    # The backward pass computes the products of queries and keys once more; beyond the formula are
    # norms, activations and the optimiser.
    scores = 2 * batch * spec.depth * spec.tokens**2 * spec.width
    assert 1 <= work.flops / (work.model_flops + scores) < 1.03


def test_a_network_that_is_no_trunk_has_no_bound(monkeypatch):
    monkeypatch.setattr(Experiment, "from_config", lambda config, devices: Spec)
    assert roofline.step_work(published_config("s", 32), jax.devices(), None, {}) is None


class Spec:
    spec = object()
