"""`python -m ig_jax.main`: trains, samples and evaluates. Flags and modes, nothing else."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

from ig_jax import stops

if __name__ == "__main__":  # before the imports, which take a while
    stops.watch(sys.argv)

from ig_jax import console, startup

console.quiet_libraries()

from absl import app, flags  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

import ig_jax  # noqa: E402
from ig_jax import extensions  # noqa: E402
from ig_jax.errors import (  # noqa: E402
    EXIT_CODES,
    Exit,
    InputError,
    OneLineError,
    Stopped,
    full_disk,
    suggest,
)
from ig_jax.paths import check_workdir  # noqa: E402

START = """\
How to start
  python -m ig_jax.main --config=digits_ig --workdir=/tmp/digits
      trains on handwritten digits (minutes on a CPU), then scores a range of guidance scales
  python -m ig_jax.main --mode=sample --workdir=/tmp/digits --config.guidance.ig_scale=1.5
      draws from the trained model; any --config.field=value overrides what the checkpoint says
  python -m ig_jax.main --help
      lists the modes and flags
"""

FLAGS = """\
Flags
  --config=FILE       experiment: a Python file with get_config(), or the name of one that comes
                      along (below); without it, the workdir's checkpoint's own
  --config.a.b=value  overrides a field; --help=config lists the sections, and
                      --help=config.guidance the fields of one
  --workdir=DIR       checkpoints, logs and results (local or gs://)
  --step=STEP         sample, evaluate or sweep this checkpoint: last, best, or its number (last if
                      left out)
  --import=FILE       a file of yours that adds guidance rules, samplers, networks, …
  --name=NAME         with --mode=reproduce: published weights
  --guidance=best     sample or evaluate with what --mode=sweep found
  --fast              ablate and toy: a look in minutes, with config.ablation.fast's numbers
  --compare A B       with --mode=evaluate: how the protocols of two results differ
  --sweep             with --mode=benchmark or compile: search ways to train
  --sizes             with --mode=benchmark: what a forward pass of each published size costs
  --nocache           compile anew, instead of keeping programs in the user's cache folder
  --xla_preset=gpu    XLA flags that may be faster there: measure with --mode=benchmark
  --version           of this program and of what it stands on
"""


def _room(name: str) -> Any:
    """A module of the package; most of a start is its imports."""
    with console.stage("loading"):
        return importlib.import_module(f"ig_jax.{name}")


def _train(config: ConfigDict, workdir: str) -> str:
    return _room("training.run").run(config, workdir, _room("evaluation.training").callbacks)


def _sample(config: ConfigDict, workdir: str, which: int | str) -> str:
    return _room("sampling.run").run(config, workdir, which)


def _evaluate(config: ConfigDict, workdir: str, which: int | str = "last") -> str:
    return _room("evaluation.run").run(config, workdir, which)


def _prepare(config: ConfigDict, workdir: str) -> str:
    return _room("experiment").run_prepare(config, workdir)


def _sweep(config: ConfigDict, workdir: str, which: int | str) -> str:
    return _room("evaluation.sweep").run(config, workdir, which)


def _ablate(config: ConfigDict, workdir: str) -> str:
    return _room("evaluation.ablate").run(config, workdir)


def _toy(config: ConfigDict, workdir: str) -> str:
    return _room("evaluation.toy").run(config, workdir)


def _benchmark(config: ConfigDict, workdir: str) -> str:
    if _SIZES.value:
        return _room("plan.sizes").run(config, workdir)
    return _room("plan.benchmark").run(config, workdir, _SWEEP.value)


def _reproduce(config: ConfigDict, workdir: str, name: str) -> str:
    from ig_jax.evaluation import reproduce

    return reproduce.run(config, workdir, name)


def _compile(config: ConfigDict, workdir: str) -> str:
    return _room("plan.fit").run(config, workdir, _SWEEP.value)


# mode → (what it does, function(config, workdir) → the last line to print); those that read a
# checkpoint are told which.
MODES: dict[str, tuple[str, Callable[..., str]]] = {
    "train": ("train the config's model; continues by itself in the same workdir", _train),
    "sample": ("draw samples from a workdir: labelled PNG grid and .npz", _sample),
    "evaluate": ("score a workdir's samples, or an existing .npz or folder", _evaluate),
    "sweep": ("search the best guidance for a workdir's model", _sweep),
    "ablate": ("ask a config's questions of small networks: tables and figures", _ablate),
    "toy": ("re-derive the paper's 2-D toy: its figure, and a table over seeds", _toy),
    "reproduce": ("a published number from nothing: --name=sit-xl-2-ig", _reproduce),
    "prepare": ("encode images to latents: --config.data.images and .path", _prepare),
    "benchmark": (
        "time training, sampling, decoding, reading; --sweep, --sizes",
        _benchmark,
    ),
    "compile": ("compile for a TPU topology without one: does it fit?", _compile),
}

# Modes that put questions to networks of their own.
_ASK = ("ablate", "toy")
_READ_CHECKPOINT = ("sample", "evaluate", "sweep")
# Modes that time or weigh what compiling makes.
_COMPILE_ANEW = ("benchmark", "compile")
# Modes that write nothing, or elsewhere.
_NO_WORKDIR = ("prepare", "compile")
_HELP_FLAGS = {"--help", "-h", "-help", "--helpfull", "--helpshort"}
_HELP = "one of: " + "; ".join(f"{name} – {line}" for name, (line, _) in MODES.items())
_MODE = flags.DEFINE_string("mode", "train", _HELP)
_GUIDANCE = flags.DEFINE_enum(
    "guidance", "config", ("config", "best"), "of the config, or what --mode=sweep found best"
)
_COMPARE = flags.DEFINE_string(
    "compare", None, "--mode=evaluate --compare a.json b.json: how two results' protocols differ"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of checkpoints, logs and results (local or gs://)"
)
_FAST = flags.DEFINE_bool(
    "fast", False, "ablate and toy: with the seeds, steps and samples of config.ablation.fast"
)
_NAME = flags.DEFINE_string(
    "name", None, "with --mode=reproduce: the published weights, such as sit-xl-2-ig"
)
_STEP = flags.DEFINE_string(
    "step", "last", "of the checkpoint to sample, evaluate or sweep: last, best, or its number"
)


_CACHE = flags.DEFINE_bool(
    "cache", True, "keep compiled programs in the user's cache folder, for the next start"
)
_PRESET = flags.DEFINE_enum(
    "xla_preset", "none", tuple(startup.PRESETS), "XLA flags by name, not measured yet"
)
_SWEEP = flags.DEFINE_bool(
    "sweep",
    False,
    "--mode=benchmark, compile: search ways to train, and print the best ones' flags",
)
_SIZES = flags.DEFINE_bool(
    "sizes", False, "--mode=benchmark: FLOPs, bytes and time of a forward pass, for each size"
)
flags.DEFINE_multi_string(
    "import", [], "a Python file of yours that adds rows to the tables: rules, samplers, …"
)


def _locate(argv: list[str], name: str) -> tuple[int, int] | None:
    """Where the value of `--name=value` or `--name value` is: argument, and first character."""
    for i, argument in enumerate(argv):
        if argument in (f"--{name}", f"-{name}") and i + 1 < len(argv):
            return i + 1, 0
        if argument.startswith((f"--{name}=", f"-{name}=")):
            return i, argument.index("=") + 1
    return None


def _argument(argv: list[str], name: str) -> str | None:
    """The value of a flag, before flags are parsed."""
    place = _locate(argv, name)
    return None if place is None else argv[place[0]][place[1] :]


def _arguments(argv: list[str], name: str) -> list[str]:
    """All values of a flag that may be repeated, before flags are parsed."""
    values, rest = [], list(argv)
    while (place := _locate(rest, name)) is not None:
        values.append(rest[place[0]][place[1] :])
        rest = rest[place[0] + 1 :]
    return values


def _take(argv: list[str], name: str) -> list[str]:
    """Removes a flag before flags are parsed; returns all its values."""
    values = []
    while (place := _locate(argv, name)) is not None:
        i, start = place
        values.append(argv[i][start:])
        del argv[i if start else i - 1 : i + 1]
    return values


def define_config(argv: list[str]) -> None:
    """Defines the overrides of a config: of the file given, or of the workdir's checkpoint.

    Takes `--config=FILE` out of `argv`.

    Raises:
        InputError: neither a config file nor a workdir with a checkpoint.
    """
    if (typed := _argument(argv, "config.imports")) is not None:
        raise InputError(f"config.imports is {typed!r}: expected --import=FILE, which it records")
    imports = extensions.load(_arguments(argv, "import"))
    workdir, files = _argument(argv, "workdir"), _take(argv, "config")
    if _argument(argv, "mode") == "reproduce":
        from ig_jax.evaluation import reproduce

        if files or not (name := _argument(argv, "name")):
            raise InputError(
                "--mode=reproduce: expected --name=NAME of published weights (sit-xl-2-ig), whose "
                "config is known, and no --config=FILE"
            )
        config = reproduce.starting_config(name)
    elif files:
        config = extensions.read_config(files[-1])
    elif workdir:
        from ig_jax.storage.checkpoints import parse_step, resumed_config, saved_config

        config = None
        if (_argument(argv, "mode") or "train") == "train":
            config = resumed_config(workdir)
        config = config or saved_config(workdir, parse_step(_argument(argv, "step") or "last"))
    else:
        raise InputError("--config=FILE (and --workdir=DIR) expected: see `python -m ig_jax.main`")
    if imports:
        with config.unlocked():
            config.imports = tuple(dict.fromkeys((*config.get("imports", ()), *imports)))
    with _one_line(argv):
        config_flags.DEFINE_config_dict("config", config, sys_argv=argv)


def _run(argv: list[str]) -> Exit:
    console.log_lines()
    if _COMPARE.value is not None:
        if len(argv) != 2:
            raise InputError("--compare expects two result files: --compare a.json b.json")
        from ig_jax.evaluation import compare

        print(compare.compare(_COMPARE.value, argv[1]))
        return Exit.COMPLETE
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: options look like --mode=sample")
    mode = _MODE.value
    if mode not in MODES:
        known = tuple(MODES)
        raise InputError(
            f"--mode is {mode!r}: expected one of {', '.join(known)}{suggest(mode, known)}"
        )
    return run_mode(mode, flags.FLAGS["config"].value)


def run_mode(mode: str, config: ConfigDict) -> Exit:
    """Checks what can be checked before the processes of a run meet, and runs the mode.

    Returns:
        How it ended: complete, or stopped so that the same command continues.

    Raises:
        InputError: what was checked beforehand; later it ends this process and the run's others.
    """
    config_lib, processes = _room("config"), _room("parallel.processes")
    console.name_compilations()
    if _SWEEP.value and mode not in _COMPILE_ANEW:
        raise InputError(
            f"--sweep has no meaning with --mode={mode}: expected it with "
            f"{', '.join(_COMPILE_ANEW)} only (--mode=sweep searches guidance)"
        )
    if _SIZES.value and (mode != "benchmark" or _SWEEP.value):
        other = "--sweep" if _SWEEP.value else f"--mode={mode}"
        raise InputError(
            f"--sizes has no meaning with {other}: expected it with --mode=benchmark alone"
        )
    workdir = _workdir(mode)
    arguments = _which(mode, config, workdir)
    if _FAST.value and mode not in _ASK:
        raise InputError(
            f"--fast has no meaning with --mode={mode}: expected it with {', '.join(_ASK)}"
        )
    if workdir is not None and mode not in _NO_WORKDIR:
        check_workdir(workdir)
    if _GUIDANCE.value == "best":
        _room("evaluation.sweep").apply_best(config, workdir)
    if _FAST.value:
        config = _room("evaluation.ablate").fast(config)
    config_lib.validate(config)
    for table in ("extractors", "metrics"):
        _room(f"evaluation.{table}").check_name(config)
    config = config_lib.resolve_paths(config)
    startup.use_preset(_PRESET.value)
    startup.compile_quickly()
    with console.stage("joining the processes of the run"):
        processes.initialize(config_lib.to_json(config))
    if _CACHE.value and mode not in _COMPILE_ANEW:
        startup.keep_compiled()
    try:
        with console.stage("looking for devices"):
            if not processes.is_primary():
                console.mute()
        with _naming_full_disks(workdir):
            last_line = MODES[mode][1](config, workdir, **arguments)
    except Stopped as stop:
        # All processes come here together, so each may leave as it would when complete.
        if processes.is_primary():
            print(f"ig_jax: {stop}", file=sys.stderr)
        return stop.exit_code
    except OneLineError as error:
        print(f"ig_jax: {error}", file=sys.stderr)
        processes.abandon(error.exit_code)
    except KeyboardInterrupt:
        print("ig_jax: interrupted", file=sys.stderr)
        processes.abandon(Exit.INTERRUPTED)
    if processes.is_primary():
        print(last_line)
    return Exit.COMPLETE


@contextlib.contextmanager
def _naming_full_disks(workdir: str | None) -> Iterator[None]:
    """Raises `InputError` in place of what libraries raise where a disk takes no more."""
    try:
        yield
    except (OneLineError, Stopped):
        raise
    except Exception as error:
        if (reason := full_disk(error)) is None:
            raise
        raise InputError(
            f"{workdir} cannot be written to ({reason}): what was complete is kept; make room, and "
            "the same command continues"
        ) from error


def _workdir(mode: str) -> str | None:
    """The absolute path that `--workdir` means; raises `InputError` if the mode needs one."""
    from ig_jax.storage.checkpoints import find_workdir

    if _WORKDIR.value:
        return os.fspath(find_workdir(_WORKDIR.value))
    if mode in _NO_WORKDIR:
        return None
    raise InputError("--workdir=DIR expected: where checkpoints and results go")


def _which(mode: str, config: ConfigDict, workdir: str | None) -> dict[str, int | str]:
    """The step of the checkpoint to read, or the name, for modes that take one; raises
    `InputError`."""
    from ig_jax.storage.checkpoints import find_step, parse_step

    pictures = mode == "evaluate" and config.evaluation.samples
    if mode in _READ_CHECKPOINT and not pictures:
        return {"which": find_step(workdir, parse_step(_STEP.value))}
    if _STEP.present:
        with_samples = " and --config.evaluation.samples" if pictures else ""
        raise InputError(
            f"--step has no meaning with --mode={mode}{with_samples}: expected it with "
            f"{', '.join(_READ_CHECKPOINT)} only"
        )
    if _NAME.present and mode != "reproduce":
        raise InputError(f"--name has no meaning with --mode={mode}: expected --mode=reproduce")
    return {"name": _NAME.value} if mode == "reproduce" else {}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code, or exits with it (see `errors.Exit`)."""
    console.forgive_output()
    if argv is None:  # a program of its own, and no caller's
        startup.keep_freed_memory(one_arena=_argument(sys.argv, "mode") not in _ASK)
        stops.listen()
        console.leave_full_disks_to_the_program()
    with console.speaking():
        return _main(list(sys.argv if argv is None else argv))


def _main(argv: list[str]) -> int:
    if len(argv) == 1:
        print(START, end="")
        return Exit.COMPLETE
    if "--version" in argv:
        print(_versions())
        return Exit.COMPLETE
    try:
        if topics := [a.removeprefix("--help=") for a in argv if a.startswith("--help=")]:
            extensions.load(_arguments(argv, "import"))
            print(_help(topics[-1]))
            return Exit.COMPLETE
        if _HELP_FLAGS.isdisjoint(argv) and _argument(argv, "compare") is None:
            with console.stage("reading the config"):
                define_config(argv)
        app.run(_run, argv, flags_parser=_parse)
    except OneLineError as error:
        print(f"ig_jax: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("ig_jax: interrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    return Exit.COMPLETE


def _versions() -> str:
    """What `--version` prints."""
    below = [f"{name} {metadata.version(name)}" for name in ("jax", "flax")]
    return f"ig_jax {ig_jax.__version__} ({', '.join(below)}, Python {platform.python_version()})"


def _help(topic: str) -> str:
    """What `--help=config.guidance` prints; raises `InputError` for an unknown section."""
    from ig_jax import config as config_lib

    known = {
        "config.data.name": extensions.table("data set"),
        "config.evaluation.features": ("auto", *extensions.table("feature extractor")),
        "config.sweep.metric": extensions.table("metric"),
    }
    return config_lib.describe(topic, known)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; what ml_collections and absl complain about becomes one clear line."""
    if not _HELP_FLAGS.isdisjoint(argv):
        print(f"{START}\nModes (--mode=…)")
        for name, (line, _) in MODES.items():
            print(f"  {name:10} {line}")
        print(f"\n{FLAGS}\nConfigs")
        names = ", ".join(extensions.built_in_configs())
        print(textwrap.fill(names, 100, initial_indent="  ", subsequent_indent="  "))
        print("\nExit codes")
        for code, meaning in EXIT_CODES.items():
            print(f"  {code:3}  {meaning}")
        raise SystemExit(Exit.COMPLETE)
    with _one_line(argv):
        return flags.FLAGS(argv)


@contextlib.contextmanager
def _one_line(argv: list[str]) -> Iterator[None]:
    """What absl and ml_collections complain of becomes a line that names the config's field."""
    try:
        yield
    except InputError:
        raise
    except (flags.Error, AttributeError, TypeError, KeyError, ValueError) as error:
        raise InputError(_flag_message(argv, str(error))) from None


def _flag_message(argv: list[str], text: str) -> str:
    """What is wrong with an override; raises `InputError` for one of a field that is not there."""
    from ig_jax import config as config_lib

    for argument in argv[1:]:
        path = re.match(r"--?config\.([^=]+)", argument)
        if path:
            config_lib.find_field(path[1])
    if refused := re.match(r"flag --config\.([\w.]+)=(.*?): ", text):
        path, value = refused.groups()
        return f"config.{path} is {value!r}: expected {config_lib.find_field(path).expected}"
    if refused := re.match(r"flag --(\w+)=(.*?): (?:.*<(.*)>|.*boolean)", text):
        name, value, choices = refused.groups("true|false")
        return f"--{name} is {value!r}: expected {choices.replace('|', ' or ')}"
    return text.splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
