"""What a program asks of the machine when it starts: that freed memory stays with it, and that what
was compiled once is found again."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import sys

from etils import epath

from ig_jax.paths import resolve

# Names of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_EMITTERS = "xla_cpu_use_fusion_emitters"
_EFFORT = "xla_backend_optimization_level"
# What takes less long to compile costs as much to look for.
_WORTH_KEEPING_S = 0.1


# Name → (XLA's flags, JAX's optimisation level). What pays depends on card, network and version, so
# none is the default: measure with `--mode=benchmark` (JAX documentation, "GPU performance tips").
PRESETS: dict[str, tuple[tuple[str, ...], str]] = {
    "none": ((), "UNKNOWN"),
    "gpu": (
        ("--xla_gpu_enable_latency_hiding_scheduler=true", "--xla_gpu_triton_gemm_any=true"),
        "O1",
    ),
}


def use_preset(name: str) -> None:
    """Sets the XLA flags of a row of `PRESETS`; those that are set already stay and come last.

    Call it before the first use of a device.
    """
    import jax

    flags, level = PRESETS[name]
    if flags:
        os.environ["XLA_FLAGS"] = " ".join((*flags, os.environ.get("XLA_FLAGS", ""))).strip()
        jax.config.update("jax_optimization_level", level)


def compile_quickly() -> None:
    """On CPU, has XLA compile in less time what runs as fast and differs in the last bits at most.

    LLVM's highest level takes 4 s for a small network's random weights where its first takes 1.2 s,
    and a training step or a sampler runs no faster. XLA's newer way to write fused loops takes 20
    ms for each of the hundreds of a training step, half of what its compilation takes, and they run
    slower; in jaxlib 0.11 that flag has another name, not tried yet, and XLA ends a process that
    names one it does not know. What is set already stays. Call it before a device is used.
    """
    from jaxlib.version import __version_info__ as version

    if os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    wanted = {_EFFORT: "1"} | ({_EMITTERS: "false"} if version < (0, 11) else {})
    flags = os.environ.get("XLA_FLAGS", "")
    added = [f"--{name}={value}" for name, value in wanted.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join((flags, *added)).strip()


def keep_freed_memory(one_arena: bool = True) -> None:
    """On CPU, keeps freed memory for what comes next instead of giving it back to Linux.

    XLA allocates the temporaries of a program anew each time it runs. By default glibc maps large
    ones afresh, and the kernel then fills every page with zeros: 26,500 page faults a step of the
    digits run, a quarter of its time. Call it before other threads start.

    Args:
        one_arena: whether all threads share one, which larger programs need: the others never grow
            beyond 64 MiB. Small ones are better off with an arena a thread, since a compiler's
            threads wait for each other in a single one, a fifth of the time.
    """
    if sys.platform != "linux" or os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        arenas = ((_M_ARENA_MAX, 1),) if one_arena else ()
        for option, value in (*arenas, (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            mallopt(option, value)


def cache_folder() -> epath.Path:
    """Where this user's compiled programs are kept, apart for each kind of processor.

    Programs for a CPU use the instructions of the one that they were compiled on, which machines
    that share a home need not have.
    """
    base = resolve(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return base / "ig_jax" / f"compiled-{_processor()}"


def _processor() -> str:
    """A short hash of what the processor can do."""
    facts = [platform.machine(), platform.processor()]
    lines: list[str] = []
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = file.read().splitlines()
    for name in ("model name", "flags", "Features"):
        facts += next(([line] for line in lines if line.startswith(name)), [])
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def keep_compiled() -> None:
    """Keeps compiled programs in `cache_folder()`, where the next start finds them.

    Whoever has told JAX of a cache keeps that one. Several processes on CPU get none: the first one
    would compile what others read, and they would wait for each other longer than Gloo allows.
    """
    import jax

    if jax.config.jax_compilation_cache_dir:
        return
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_S)
