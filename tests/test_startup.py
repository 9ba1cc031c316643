"""Freed memory stays with the program, and compiled programs are found again by the next one."""

import os
import pathlib
import platform
import subprocess
import sys

import jax
import pytest

from ig_jax import main, startup

ROOT = pathlib.Path(__file__).parent.parent

FAULTS = """
import resource, sys, threading
from ig_jax import startup
if sys.argv[1] != "leave":
    startup.keep_freed_memory(one_arena=sys.argv[1] == "keep")
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(10):
        b"x" * (64 << 20)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems allocate otherwise")
def test_freed_memory_is_used_again():
    """Ten times the same 64 MiB are 16,384 pages once, or ten times; on other threads, too."""

    def faults(*arguments, **environment):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    assert faults("leave") > 100_000
    assert faults("keep") < 25_000
    assert faults("apart") > 100_000  # more than an arena of its own may hold
    # The host of an accelerator has threads that would wait for each other's memory.
    assert faults("keep", JAX_PLATFORMS="cuda") > 100_000


@pytest.mark.parametrize(
    "mode, one", [("--mode=ablate", False), ("--mode=toy", False), ("--mode=train", True)]
)
def test_modes_of_small_networks_have_an_arena_a_thread(monkeypatch, mode, one):
    asked = []
    monkeypatch.setattr(startup, "keep_freed_memory", lambda **how: asked.append(how))
    monkeypatch.setattr(main.stops, "listen", lambda: None)
    monkeypatch.setattr(main.console, "leave_full_disks_to_the_program", lambda: None)
    monkeypatch.setattr(main.sys, "argv", ["ig-jax", mode, "--version"])
    assert main.main() == 0
    assert asked == [{"one_arena": one}]


def test_xla_is_told_once_how_to_compile_where_it_knows_the_flags(monkeypatch):
    import jaxlib.version

    def told(version, flags, platform="cpu"):
        monkeypatch.setattr(jaxlib.version, "__version_info__", version)
        monkeypatch.setenv("JAX_PLATFORMS", platform)
        monkeypatch.setenv("XLA_FLAGS", flags)
        startup.compile_quickly()
        startup.compile_quickly()
        return os.environ["XLA_FLAGS"]

    effort, loops = "--xla_backend_optimization_level=1", "--xla_cpu_use_fusion_emitters=false"
    assert told((0, 10, 2), "--a=1") == f"--a=1 {effort} {loops}"
    chosen = "--xla_cpu_use_fusion_emitters=true --xla_backend_optimization_level=3"
    assert told((0, 10, 2), chosen) == chosen
    assert told((0, 11, 0), "") == effort
    assert told((0, 10, 2), "", platform="cuda") == ""


@pytest.fixture
def config(monkeypatch, tmp_path):
    """JAX's, without a cache; it is as before afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_for_each_user_and_processor(config, tmp_path, monkeypatch):
    startup.keep_compiled()
    assert config.jax_compilation_cache_dir == str(startup.cache_folder())
    assert os.fspath(startup.cache_folder().parent) == str(tmp_path / "ig_jax")
    assert startup.cache_folder().is_dir()
    here = startup.cache_folder()
    monkeypatch.setattr(platform, "machine", lambda: "another")
    assert startup.cache_folder() != here


def test_a_cache_of_ones_own_is_left(config, tmp_path):
    config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    startup.keep_compiled()
    assert config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_several_cpu_processes_and_a_home_that_cannot_be_written_to_get_none(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    startup.keep_compiled()
    assert config.jax_compilation_cache_dir is None
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    startup.keep_compiled()
    assert config.jax_compilation_cache_dir is None


COMPILE = """
import sys
import jax
from ig_jax import main

def compile(config, workdir):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.jit(lambda x: x + 1)(1.0)
    return "done"

main.MODES["train"] = ("", compile)
sys.exit(main.main(sys.argv))
"""


@pytest.mark.parametrize("flags", [(), ("--nocache",)])
def test_the_command_line_keeps_programs_unless_told_otherwise(tmp_path, flags):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    run = ["--config=digits_ig", f"--workdir={tmp_path / 'w'}", *flags]
    subprocess.run([sys.executable, "-c", COMPILE, *run], env=environment, check=True)
    assert bool(list(tmp_path.glob("cache/ig_jax/compiled-*/*"))) == (not flags)


PRESET = """
import os, sys
import jax
from ig_jax import main

def show(config, workdir):
    jax.jit(lambda x: x + 1)(1.0)  # XLA ends the program for a flag that it does not know
    print(os.environ.get("XLA_FLAGS", ""), jax.config.jax_optimization_level)
    return "done"

main.MODES["train"] = ("", show)
sys.exit(main.main(sys.argv))
"""


@pytest.mark.parametrize("name", startup.PRESETS)
def test_presets_are_flags_that_xla_knows(name, tmp_path):
    # With a word on both, on CPU nothing is added.
    own = "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": own}
    run = ["--config=digits_ig", f"--workdir={tmp_path / 'w'}", f"--xla_preset={name}"]
    done = subprocess.run(
        [sys.executable, "-c", PRESET, *run], env=environment, capture_output=True, text=True
    )
    flags, level = startup.PRESETS[name]
    assert done.stdout.splitlines()[0] == " ".join((*flags, own, level)), done.stderr
