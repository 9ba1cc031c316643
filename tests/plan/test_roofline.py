"""The bound of a step: operations are those of the formula, loops in full; parts are seconds."""

import jax

from ig_jax.experiment import Experiment
from ig_jax.plan import fit, roofline, topology
from tests import meshes

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


def narrow_config(depth):
    config = meshes.wide_config()
    config.model.update(width=256, heads=4, depth=depth, auxiliary_depth=2, input_size=16)
    config.train.batch_size = 64
    return config


def test_operations_are_those_of_the_formula_at_any_depth():
    """A scanned step is counted in full, though the compiler takes its loops' bodies once."""
    found = {}
    for depth in (6, 12):
        work = roofline.step_work(
            narrow_config(depth),
            jax.devices()[:1],
            lambda one: fit.lower_train_step(one).compile({"xla_backend_optimization_level": 0}),
            {},
        )
        found[depth] = work.flops / work.model_flops
    # Attention is computed once more in the backward pass; the rest is norms and the optimiser.
    assert all(0.97 < ratio < 1.1 for ratio in found.values()), found


def test_a_network_that_is_no_trunk_has_no_bound(monkeypatch):
    monkeypatch.setattr(Experiment, "from_config", lambda config, devices: Spec)
    assert roofline.step_work(narrow_config(6), jax.devices(), None, {}) is None


class Spec:
    spec = object()
