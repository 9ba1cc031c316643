"""The program `ig-jax`, and `python -m ig_jax`: watched for signals before anything is imported."""

import sys

from ig_jax import stops


def run() -> int:
    """Runs `ig_jax.main`; returns its exit code."""
    stops.watch(sys.argv)
    from ig_jax.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
