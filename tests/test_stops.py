"""Signals to the program: never lost, answered at once in one line, with a documented exit code.

The programs here are in the middle of what Python's own way of handling signals does not survive.
"""

import signal
import subprocess
import sys

import pytest

from ig_jax.errors import Exit

SIGNALS = {
    signal.SIGINT: ("Ctrl-C", Exit.INTERRUPTED),
    signal.SIGTERM: ("SIGTERM", Exit.TERMINATED),
}
START = """
import hashlib, sys, time
from ig_jax import stops
stops.watch(sys.argv)
stops.listen()
"""
# While it is imported, there is no thread yet.
BEFORE = START.replace("stops.listen()", "")
READY = "print('ready', flush=True)\n"
# Code that swallows every exception, as some libraries' imports do.
SWALLOWS = f"""
{READY}
while True:
    try:
        time.sleep(0.01)
    except BaseException:
        pass
"""
# Native code that never returns to Python, as when XLA compiles.
NATIVE = READY + "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
REQUEST = f"""
with stops.request() as stop:
    stop.defer()
    {READY}
    while not stop.asked:
        time.sleep(0.01)
    print('saving', flush=True)
    time.sleep(60 * (len(sys.argv) == 1))
print('saved')
"""


def start(*arguments, **options):
    """A program that has said that it is ready; shells may have it ignore Ctrl-C."""
    child = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )
    assert child.stdout.readline() == "ready\n", child.communicate()[1]
    return child


def end(child, number):
    """Sends a signal and waits for the end; returns the exit code and what was said since."""
    child.send_signal(number)
    try:
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    return child.returncode, out, err


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("program", [BEFORE + SWALLOWS, START + SWALLOWS, START + NATIVE])
def test_whatever_the_program_is_doing_it_ends_with_one_line(program, number):
    code = SIGNALS[number][1]
    line = f"ig_jax: {code.name.lower()}\n"
    assert end(start("-c", program, "--mode=sample"), number) == (code, "", line)


@pytest.mark.parametrize("number", SIGNALS)
def test_training_that_has_nothing_to_save_yet_is_to_be_started_again(number):
    line = f"ig_jax: {SIGNALS[number][0]}: nothing to save, the same command continues\n"
    for mode in ([], ["--mode=train"], ["--mode", "train"]):
        assert end(start("-c", START + NATIVE, *mode), number) == (Exit.STOPPED, "", line)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_request_is_answered_at_once_and_granted_in_time(number):
    said = f"ig_jax: {SIGNALS[number][0]}: stopping once a checkpoint is saved (again: at once)\n"
    assert end(start("-c", START + REQUEST, "x"), number) == (0, "saving\nsaved\n", said)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_at_once(number):
    child = start("-c", START + "stops._SAME_S = 0" + REQUEST)
    child.send_signal(number)
    assert child.stdout.readline() == "saving\n"
    code, out, err = end(child, number)
    assert (code, out) == (SIGNALS[number][1], "")
    assert err.splitlines()[1:] == [
        "ig_jax: ended at once: the same command continues from what is saved"
    ]


def test_one_key_press_that_comes_twice_is_one():
    child = start("-c", START + "stops._SAME_S = 60" + REQUEST, "x")
    child.send_signal(signal.SIGINT)
    assert end(child, signal.SIGINT)[:2] == (0, "saving\nsaved\n")


@pytest.mark.parametrize("module", ["ig_jax", "ig_jax.main"])
def test_the_program_is_watched_from_its_start(tmp_path, module):
    """While the config is imported, before there are flags."""
    config = tmp_path / "slow.py"
    config.write_text("import time\n" + SWALLOWS)
    child = start("-m", module, f"--config={config}", f"--workdir={tmp_path}/w", "--mode=sample")
    assert end(child, signal.SIGINT) == (Exit.INTERRUPTED, "", "ig_jax: interrupted\n")
    assert [p.name for p in tmp_path.iterdir() if p.suffix] == ["slow.py"]
