"""Tests run on the CPU, which pretends to be eight devices."""

import fcntl
import gc
import importlib.util
import os
import pathlib
import signal
import tempfile
import threading

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA ends the process when a simulated device keeps the others waiting for 40 seconds, which a busy
# machine may need (programs that wait for each other are `sharding.wait_if_simulated`'s business).
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600 "
    # Most of the tests' time would be LLVM's, which makes small programs hardly faster.
    "--xla_backend_optimization_level=0",
)
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Many tests build the same small programs: each is compiled once a session, subprocesses and
# pytest-xdist's workers included, which inherit the first process's environment.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="ig_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"


def pytest_configure():
    from ig_jax import console, startup

    # A shell's background jobs inherit that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console.quiet_libraries()
    startup.compile_quickly()


def pytest_runtest_setup(item):
    """What may lack is marked, and skipped there: PyTorch is no part of the test extra, and
    TensorFlow has no wheels for the newest Python."""
    for name in ("torch", "tensorflow"):
        if item.get_closest_marker(name) is None or importlib.util.find_spec(name):
            continue
        if name == "torch" and os.environ.get("IG_JAX_TESTS_NEED_TORCH"):
            pytest.fail("IG_JAX_TESTS_NEED_TORCH is set, and it is not installed", pytrace=False)
        pytest.skip(f"{name} is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Tests marked `alone` take turns, whichever worker runs them."""
    if item.get_closest_marker("alone") is None:
        return (yield)
    with open(pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"], "alone.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return (yield)


@pytest.fixture(autouse=True)
def _as_it_was():
    """A test leaves the answers to signals, the folder and the lock's threads as it found them."""

    def found():
        numbers = (signal.SIGINT, signal.SIGTERM)
        locks = [thread for thread in threading.enumerate() if thread.name == "lock"]
        return [signal.getsignal(number) for number in numbers], os.getcwd(), locks

    before = found()
    yield
    assert found() == before


@pytest.fixture(scope="module", autouse=True)
def _free_programs():
    """What a module compiled is not kept in memory until the end; the cache on disk has it."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


def pytest_terminal_summary(terminalreporter):
    """Harnesses say how many cases they tried (`record_property("tried", …)`)."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "tried":
                terminalreporter.write_line(value)
