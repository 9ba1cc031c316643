"""A long run: 20,000 steps with checkpoints, evaluations and TensorBoard grow nothing."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from ig_jax.training.callbacks import Callback
from tests.common import tiny_config

STEPS, EVERY = 20_000, 1_000


def config():
    """The least work a step; everything beside the steps happens before the first sight."""
    config = tiny_config(
        num_steps=STEPS,
        batch_size=8,
        log_every=100,
        validate_every=EVERY,
        sample_every=EVERY,
        checkpoint_every=EVERY,
    )
    config.model.update(width=16, depth=2, heads=1, patch_size=4)
    config.sampler.update(num_samples=8, batch_size=8, num_steps=2)
    config.evaluation.update(every=EVERY, train_samples=64)
    return config


class Watch(Callback):
    """Sees what the process holds, every so many steps.

    Attributes:
        seen: of each time: the step, resident bytes, threads, open files and programs compiled.
    """

    def __init__(self):
        import jax

        self.seen, self._compiled = [], 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event, *_, **__):
        self._compiled += event == "/jax/core/compile/backend_compile_duration"

    def due(self, step, saving):
        return step % EVERY == 0

    def on_due(self, moment):
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE")
        held = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        self.seen.append((moment.step, resident, *held, self._compiled))


def main(workdir):
    from ig_jax import startup
    from ig_jax.evaluation import training as evaluations
    from ig_jax.training import loop, run
    from ig_jax.training.setup import Setup

    startup.keep_freed_memory()
    setup, watch = Setup.from_config(config(), workdir), Watch()
    loop.train(setup, [*run.callbacks(setup, evaluations.callbacks), watch])
    print(json.dumps(watch.seen))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_run_grows_nothing(tmp_path, record_property):
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import main; main({str(tmp_path / 'w')!r})"],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, *_, last = seen = json.loads(done.stdout.splitlines()[-1])
    assert [step for step, *_ in seen] == list(range(EVERY, STEPS + 1, EVERY))
    grown = last[1] / first[1] - 1
    # Libraries start the threads of their pools when first needed; one or two come and go. What
    # every evaluation or checkpoint left behind would be ten more in the second half.
    half = len(seen) // 2
    early, late = (np.max(part, axis=0) for part in (seen[:half], seen[half:]))
    held = f"threads {early[2]} and {late[2]}, open files {early[3]} and {late[3]} in its halves"
    record_property(
        "tried",
        f"long run: {STEPS} steps, memory {first[1] >> 20} MiB and {grown:+.1%}, {held}, "
        f"{last[4] - first[4]} programs compiled after step {EVERY}",
    )
    assert grown < 0.03
    assert (late[2:4] <= early[2:4] + 2).all(), seen
    assert last[4] == first[4]
    assert list((tmp_path / "w").glob("events.out.tfevents.*"))
