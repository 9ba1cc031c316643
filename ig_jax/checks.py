"""What numbers may be: the command line and the library refuse the same ones."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

from ig_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Limits:
    """A kind of number, such as a seed.

    Attributes:
        low, high: the bounds, both allowed; a number is finite whatever they are.
        whole: whether it is an integer.
        excluded: a bound that is not allowed after all.
    """

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    excluded: float | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises `InputError`, a line that starts with `name`, unless `value` is of this kind."""
        kind = numbers.Integral if self.whole else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{name} is {value!r}: expected {self.noun}")
        if isinstance(value, numbers.Integral):
            if not self.whole and abs(value) >= 2**31:  # which JAX would take for an int32
                raise InputError(
                    f"{name} is {value}: expected a whole number below {2**31} in size, or one "
                    "with a decimal point"
                )
        elif not math.isfinite(value):
            raise InputError(f"{name} is {value}: expected a finite number")
        if not self.low <= value <= self.high or value == self.excluded:
            raise InputError(f"{name} is {value}: expected {self}")

    @property
    def noun(self) -> str:
        """What it is, without the bounds."""
        return "an integer" if self.whole else "a number"

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a finite number"
        if self.excluded is not None:
            below = f" and less than {self.high}" if self.high < math.inf else ""
            return f"{'more than' if self.excluded == self.low else 'at least'} {self.low}{below}"
        return f"{self.low}…{self.high}" if self.high < math.inf else f"at least {self.low}"


# Counters are int32 on the devices, and keys are made of a seed of 32 bits.
SEED = Limits(0, 2**32 - 1, whole=True)
COUNT = Limits(1, 2**31 - 1, whole=True)
COUNT_OR_NONE = Limits(0, 2**31 - 1, whole=True)
# A mistyped batch must not end in hours of allocation; published ones are 256 to 4096.
BATCH = Limits(1, 2**20, whole=True)
SAMPLER_STEPS = Limits(1, 100_000, whole=True)
SHARE = Limits(0, 1)
WEIGHT = Limits(0)
POSITIVE = Limits(0, excluded=0)
# Of an average over steps; 1 would never see anything new.
MEMORY = Limits(0, 1, excluded=1)
SCALE = Limits()
TIME_SHIFT = Limits(1e-3, 1000)
# Below float32's resolution no step of an adaptive solver is ever accepted.
TOLERANCE = Limits(1e-8, 1)
