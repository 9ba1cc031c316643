"""`python -m ig_jax.convert`: a PyTorch checkpoint into a workdir that `ig_jax.main` starts from,
and a workdir's weights back into a file that PyTorch reads."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import NoReturn

from ig_jax import stops

if __name__ == "__main__":  # before the imports, which take a while
    stops.watch()

from ig_jax import console

console.quiet_libraries()
# Converting computes nothing, and must not take an accelerator that a run is using.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from ig_jax.convert import pytorch, workdir  # noqa: E402
from ig_jax.data.sets import DATA_SETS  # noqa: E402
from ig_jax.errors import InputError  # noqa: E402
from ig_jax.models import functional  # noqa: E402
from ig_jax.models.dit import PUBLISHED_FAMILIES, DiT  # noqa: E402
from ig_jax.paths import check_writable, resolve  # noqa: E402
from ig_jax.storage import weight_files  # noqa: E402
from ig_jax.storage.checkpoints import parse_step  # noqa: E402

EPILOG = """\
examples
  python -m ig_jax.convert 0400000.pt --workdir=/tmp/sit
      then: python -m ig_jax.main --mode=sample --workdir=/tmp/sit
      or fine-tune: python -m ig_jax.main --config=FILE --workdir=NEW \\
          --config.train.init_from=/tmp/sit
  python -m ig_jax.convert --workdir=/tmp/sit --to_pytorch=sit.safetensors
      EMA weights under the authors' names, for load_state_dict(safetensors.torch.load_file(...))
"""


def _depths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m ig_jax.convert",
        description="SiT, DiT and LightningDiT checkpoints into workdirs and back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="PyTorch checkpoint: .safetensors, .pt, …")
    add("--workdir", required=True, help="directory to write; to read with --to_pytorch")
    add("--to_pytorch", metavar="FILE", help="write the workdir's weights to this .safetensors")
    into = parser.add_argument_group("into a workdir")
    add = into.add_argument
    families = ", ".join(PUBLISHED_FAMILIES)
    add("--family", help=f"{families}; SiT and DiT have the same weight names")
    add("--heads", type=int, help="number of attention heads; needed for unpublished widths")
    add(
        "--auxiliary_depth",
        type=_depths,
        help="blocks before the auxiliary head, if there is one; of several: 4,8",
    )
    add("--data", help=f"config.data.name: {', '.join(DATA_SETS)} (latents if left out)")
    back = parser.add_argument_group("back to PyTorch")
    add = back.add_argument
    add("--step", help='"last", "best" or a number (last if left out)')
    add("--raw", action="store_true", help="the raw weights instead of the EMA")
    return parser


def _describe(model: DiT) -> str:
    spec = model.spec
    count = functional.parameter_count(functional.split(model)[1])
    side = spec.input_size
    depths = " and ".join(map(str, spec.auxiliary_depths))
    head = f"auxiliary head after block {depths}" if depths else "no auxiliary head"
    return (
        f"{spec.family}, {spec.depth} blocks of width {spec.width}, {spec.heads} heads, patch "
        f"{spec.patch_size}, input {side}×{side}×{spec.channels}, {spec.num_classes} classes, "
        f"{head}, {count:,} parameters"
    )


def _check(args: argparse.Namespace) -> None:
    """Raises `InputError` unless the arguments ask for one direction and belong to it."""
    if (args.source is None) == (args.to_pytorch is None):
        raise InputError("expected either a SOURCE to convert, or --to_pytorch=FILE")
    into, back = ("family", "heads", "auxiliary_depth", "data"), ("step", "raw")
    for name in into if args.source is None else back:
        if getattr(args, name):
            other = "--to_pytorch" if args.source is None else "a SOURCE"
            raise InputError(f"--{name} has no meaning here: leave it out with {other}")
    if args.to_pytorch and not args.to_pytorch.endswith(".safetensors"):
        raise InputError(f"--to_pytorch is {args.to_pytorch!r}: expected a .safetensors file")


def _into_workdir(args: argparse.Namespace) -> str:
    workdir.check_empty(args.workdir)
    with console.progress_bar(2, "converting") as advance:
        model = pytorch.from_pytorch(
            args.source, family=args.family, heads=args.heads, auxiliary_depth=args.auxiliary_depth
        )
        advance(text="writing")
        workdir.save_workdir(model, args.workdir, args.data or "latents")
        advance()
    return f"{_describe(model)}: {args.workdir}"


def _to_pytorch(args: argparse.Namespace) -> str:
    step = parse_step(args.step or "last")
    check_writable(resolve(args.to_pytorch).parent, "the folder of --to_pytorch")
    with console.progress_bar(2, "converting") as advance:
        model = workdir.load_workdir(args.workdir, step, ema=not args.raw)
        advance(text="writing")
        # With the rotary buffers, so that PyTorch's strict loading accepts the file.
        weights = pytorch.to_pytorch(model, rope_buffers=model.spec.rope)
        weight_files.write_safetensors(args.to_pytorch, weights)
        advance()
    return f"{_describe(model)}: {args.to_pytorch}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (see `errors.Exit`)."""
    console.forgive_output()
    stops.listen()
    try:
        args = _parser().parse_args(argv)
        _check(args)
        with console.speaking(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            last_line = (_into_workdir if args.to_pytorch is None else _to_pytorch)(args)
    except InputError as error:
        print(f"ig_jax: {error}", file=sys.stderr)
        return error.exit_code
    for warning in caught:
        if "ig_jax" in warning.filename:
            print(f"ig_jax: {warning.message}", file=sys.stderr)
    print(last_line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
