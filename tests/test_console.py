"""What a program says of its work, and its environment: what it can print, which devices JAX is let
look for."""

import os
import subprocess
import sys
import time

import jax
import pytest

from ig_jax import console


def run(code, **environment):
    """Output bytes of a program in another environment."""
    done = subprocess.run(
        [sys.executable, *code], env=os.environ | environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


PRINTS = """
from ig_jax import console
console.forgive_output()
print("Fréchet 0.12 ± 0.01 – 32×32 …")
print("caf\\udce9 \\u4f60")
console.print_table("a – b", ["é", "n"], [["…", "1"], ["caf\\udce9", "2"]])
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed(encoding):
    lines = run(["-c", PRINTS], PYTHONIOENCODING=encoding).splitlines()
    spoken = {
        "ascii": "Frechet 0.12 +- 0.01 - 32x32 ...",
        "latin-1": "Fréchet 0.12 ± 0.01 - 32×32 ...",
    }
    assert lines[0] == spoken.get(encoding, "Fréchet 0.12 ± 0.01 – 32×32 …").encode(encoding)
    # Bytes of a name that is no text arrive as they are.
    assert lines[1] == b"caf\xe9 " + ("你" if encoding == "utf-8" else "?").encode()
    assert len(lines) > 5 and any(b"caf\xe9" in line for line in lines[2:])


@pytest.mark.parametrize("module", ["ig_jax.main", "ig_jax.convert"])
def test_help_on_an_ascii_terminal(module):
    assert b"--workdir" in run(["-m", module, "--help"], PYTHONIOENCODING="ascii")


PLOTS = """
import sys
from ig_jax import pictures
figure = pictures.make_figure(2, 2)
figure.subplots().plot([1, 2], label="…")
pictures.save_figure(sys.argv[1], figure)
print("matplotlib.pyplot" in sys.modules)
"""


@pytest.mark.parametrize("backend", ["nowhere", "module://nowhere.backend", "TkAgg"])
def test_figures_need_no_backend(tmp_path, backend):
    file = tmp_path / "a.png"
    assert run(["-c", PLOTS, str(file)], MPLBACKEND=backend).strip() == b"False"
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "plugins,tpu,platforms",
    [([], False, "cpu"), (["xla_cuda13"], False, None), ([], True, None)],
)
def test_only_a_machine_without_plugins_is_put_on_the_cpu(monkeypatch, plugins, tpu, platforms):
    """Under WSL2 a GPU has no /dev/nvidiactl; that its plugin is installed says enough."""
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda p: not str(p).startswith("/dev/") and exists(p))
    monkeypatch.setattr(console.importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(console, "_may_have_tpu", lambda: tpu)
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    console.quiet_libraries()
    assert os.environ.get("JAX_PLATFORMS") == platforms


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Watched:
    """A speaker whose time passes in quarters of a second; lines come with the time of each."""

    def __init__(self, moment=console._LONG_S):
        self.clock, self.lines = Clock(), []
        self.speaker = console.Speaker(self._write, moment, self.clock)

    def _write(self, line):
        self.lines.append((self.clock.now, line))

    def wait(self, seconds):
        for _ in range(round(4 * seconds)):
            self.clock.now += 0.25
            self.speaker.tick()


def test_counted_work_says_done_rate_and_time_left():
    watched = Watched()
    with watched.speaker.stage("training", total=1000, done=100) as stage:
        watched.wait(20)  # compilation, which is no part of the rate
        for _ in range(200):
            watched.wait(0.25)
            watched.speaker.advance(stage, 1, "loss 0.1, rate 1e-4")
        watched.wait(1000)
    times, lines = zip(*watched.lines, strict=True)
    assert times[:3] == (15.0, 45.0, 75.0) and lines[0].startswith("training 100 of 1,000 (10%) …")
    assert lines[1] == "training 199 of 1,000 (20%), 4/s, 3 min 20 s left; loss 0.1, rate 1e-4 …"
    assert lines[-1] == "training 300 of 1,000: took 17 min 50 s; loss 0.1, rate 1e-4"


def test_slow_units_and_few_of_them():
    watched = Watched()
    with watched.speaker.stage("compiling", total=3) as stage:
        for _ in range(2):
            watched.wait(100)
            watched.speaker.advance(stage, 1, "")
        watched.wait(31)
    assert "compiling 1 of 3 (33%) …" in dict(watched.lines).values()
    assert watched.lines[-2][1] == "compiling 2 of 3 (67%), 1 min 40 s each, 1 min 40 s left …"


def test_what_comes_all_at_once_has_no_rate():
    """A device takes the first steps into its queue before the first one is computed."""
    watched = Watched()
    with watched.speaker.stage("training", total=300) as stage:
        for _ in range(2):
            watched.speaker.advance(stage, 1, "")
            watched.clock.now += 1e-4
        watched.wait(16)
    assert dict(watched.lines)[15.0002] == "training 2 of 300 (1%) …"


@pytest.mark.parametrize("moment", [1.0, 15.0])
def test_a_stage_is_named_and_how_long_it_took(moment):
    watched = Watched(moment)
    for _ in range(2):
        with watched.speaker.stage("loading"):
            watched.wait(20)
    named = watched.lines[0]
    assert named[0] == moment and named[1].startswith("loading")
    assert watched.lines[1] == (20.0, "loading: took 20 s")
    assert len(watched.lines) == 2  # the second time it is no news
    with watched.speaker.stage("quick"):
        watched.wait(0.5)
    with pytest.raises(KeyError), watched.speaker.stage("broken"):
        watched.wait(20)
        raise KeyError
    assert not any("quick" in line or "broken: took" in line for _, line in watched.lines)


def test_no_silence_is_long_whatever_happens():
    watched = Watched()
    watched.wait(100)
    with watched.speaker.stage("training", total=5), watched.speaker.stage("compiling step"):
        watched.wait(200)
        watched.speaker.say("a warning")
        watched.wait(29)
    watched.wait(40)
    times = [0.0, *(now for now, _ in watched.lines), watched.clock.now]
    assert max(b - a for a, b in zip(times, times[1:], strict=False)) <= console._SILENCE_S
    lines = [line for _, line in watched.lines]
    assert lines[0] == "at work for 30 s …"
    assert "training 0 of 5 (0%) > compiling step, 15 s so far …" in lines


def test_a_bar_speaks_for_itself_and_what_is_inside_is_named():
    watched = Watched(moment=1.0)
    with watched.speaker.stage("training", total=5, bar=True) as bar:
        watched.wait(100)
        assert bar.has_bar and not watched.lines
        with watched.speaker.stage("evaluating", total=5, bar=True) as inner:
            assert not inner.has_bar  # one is drawn at a time
            watched.wait(2)
    lines = [line for _, line in watched.lines]
    assert lines == ["evaluating 0 of 5 (0%) …", "evaluating 0 of 5: took 2 s"]


@pytest.mark.parametrize(
    "seconds,words",
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (408, "6 min 48 s"), (11100, "3 h 05 min")]
    + [(86400 * 2 + 4 * 3600, "2 d 04 h")],
)
def test_durations(seconds, words):
    assert console.duration(seconds) == words


def test_compilations_are_stages(monkeypatch):
    watched = Watched()
    monkeypatch.setattr(console, "_speaker", watched.speaker)
    monkeypatch.setattr(console.Speaker, "end", lambda self, stage: self._stages.remove(stage))
    seen, begin = [], console.Speaker.begin
    monkeypatch.setattr(
        console.Speaker, "begin", lambda self, name: (seen.append(name), begin(self, name))[1]
    )
    console.name_compilations()

    @jax.jit
    def a_training_step(x):
        return jax.jit(lambda y: y + 1)(x)

    a_training_step(1.0)
    names = [f"{what} a training step" for what in ("tracing", "lowering", "compiling")]
    assert [name for name in seen if "training" in name] == names
    assert not watched.speaker._stages and not any("lambda" in name for name in seen)


SPEAKS = """
import logging, sys, time
from ig_jax import console
console._SILENCE_S, console._LONG_S = 0.5, 0.2
console.log_lines()
with console.speaking(), console.progress_bar(8, "drawing") as advance:
    logging.getLogger("ig_jax").warning("look out")
    for i in range(8):
        advance(1, "loss 1", "rate 2")
        time.sleep(0.25)
"""


def test_a_program_in_a_pipe_speaks():
    done = subprocess.run([sys.executable, "-c", SPEAKS], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and not done.stdout
    assert all(time.strptime(line[:8], "%H:%M:%S") for line in lines)
    assert lines[0][9:] == "warning: look out"
    assert any("of 8" in line and "s left; loss 1, rate 2 …" in line for line in lines), lines
    assert "drawing 8 of 8: took " in lines[-1] and lines[-1].endswith(" s; loss 1, rate 2")


def test_a_terminal_hears_within_two_seconds(monkeypatch):
    """And a log is not told of what is over soon."""
    for terminal, moment in ((True, 1.0), (False, 15.0)):
        monkeypatch.setattr(console, "is_terminal", lambda terminal=terminal: terminal)
        with console.speaking():
            assert console._speaker._moment == moment
        assert moment + console._TICK_S < 2 or not terminal


def test_a_library_is_silent(capsys):
    with console.stage("loading"), console.progress_bar(2, "drawing") as advance:
        advance()
    assert list(console.progress([1, 2], "counting")) == [1, 2]
    assert capsys.readouterr() == ("", "")
