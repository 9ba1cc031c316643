"""What numbers may be: the command line (through its config) and the library refuse the same."""

import math
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

import ig_jax
import ig_jax.sampling.sample
from ig_jax import checks
from ig_jax import config as config_lib
from ig_jax.errors import InputError
from tests.common import tiny_config
from tests.test_sample import model_with

NAN, INFINITE = float("nan"), float("inf")


def with_field(field, value):
    """The tiny config as plain values with one field replaced, of whatever type."""
    plain = tiny_config().to_dict()
    *sections, name = field.split(".")
    section = plain
    for part in sections:
        section = section[part]
    section[name] = value
    return ConfigDict(plain)


def refusal(function, *arguments, **options):
    """What follows the name in the line that refuses; None if it is accepted."""
    try:
        function(*arguments, **options)
    except InputError as error:
        assert "\n" not in str(error)
        return str(error).partition(" is ")[2]
    return None


def leaves(section, prefix=""):
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


FIELDS = dict(leaves(tiny_config()))
LIMITS = {name: f.limits for name, f in config_lib.FIELDS.items() if f.limits is not None}
NUMBERS = {k: v for k, v in FIELDS.items() if type(v) in (int, float)}


class TestBothEntrances:
    """Every number that both can be given, at its bounds and beyond."""

    # config field → how the library is told the same.
    OPTIONS = {
        "seed": lambda v: dict(seed=v),
        "sampler.num_steps": lambda v: dict(num_steps=v),
        "sampler.time_shift": lambda v: dict(time_shift=v),
        "guidance.ig_scale": lambda v: dict(guidance=ig_jax.Guidance(ig_scale=v)),
        "guidance.cfg_scale": lambda v: dict(guidance=ig_jax.Guidance(cfg_scale=v)),
    }

    @pytest.fixture(scope="class")
    def model(self):
        return model_with()

    @pytest.fixture(autouse=True)
    def nothing_is_drawn(self, monkeypatch):
        monkeypatch.setattr(ig_jax.sampling.sample, "_draw", lambda *_: (np.zeros(1), None))

    def ask_library(self, model, field, value):
        return ig_jax.sample(model, [1], **(dict(sampler="euler") | self.OPTIONS[field](value)))

    @pytest.mark.parametrize("field", OPTIONS)
    def test_refuse_and_accept_the_same(self, model, field):
        limits = LIMITS[field]
        good = [1, *(v for v in (limits.low, limits.high) if math.isfinite(v))]
        beyond = [v for v in (limits.low - 1, limits.high + 1) if math.isfinite(v)]
        bad = [*beyond, NAN, INFINITE, -INFINITE, "x", True, *([1.0] if limits.whole else [])]
        for value in good + bad:
            config = with_field(field, value)
            config.sampler.name = "euler"
            by_config = refusal(config_lib.validate, config)
            by_library = refusal(self.ask_library, model, field, value)
            expected = any(value is v for v in bad)
            assert (by_config is not None) == (by_library is not None) == expected, value
            if value in beyond:
                assert by_config == by_library == f"{value}: expected {limits}"

    def test_batches(self, model):
        too_many = LIMITS["sampler.batch_size"].high + 1
        expected = f"{too_many}: expected 1…{too_many - 1}"
        assert refusal(ig_jax.sample, model, np.ones(too_many, int)) == expected
        config = with_field("sampler.batch_size", too_many)
        assert refusal(config_lib.validate, config) == expected

    def test_first_index(self, model):
        for index in (-1, 2**31, 1.5, NAN):
            assert refusal(ig_jax.sample, model, [1], first_index=index) is not None
        assert refusal(ig_jax.sample, model, [1], first_index=np.int64(3)) is None


class TestConfig:
    def test_every_number_has_limits(self):
        # A number or a list of them, which the network checks.
        assert set(NUMBERS) - {"model.auxiliary_depth"} == set(LIMITS)

    @pytest.mark.parametrize(
        "field", [k for k, v in FIELDS.items() if type(v) in (float, tuple) and k != "imports"]
    )
    @pytest.mark.parametrize("bad", [NAN, INFINITE, -INFINITE])
    def test_numbers_that_are_not_finite_are_refused_everywhere(self, field, bad):
        listed = type(FIELDS[field]) is tuple
        with pytest.raises(InputError) as caught:
            config_lib.validate(with_field(field, (0.0, bad) if listed else bad))
        assert str(caught.value).startswith(f"config.{field} is ")
        # Not every list is one of numbers.
        expected = (
            "(finite numbers|a list of (strings|dicts|numbers))" if listed else "finite number"
        )
        assert re.search(f"{expected}$", str(caught.value))

    @pytest.mark.parametrize("field", LIMITS)
    def test_bounds_are_named(self, field):
        limits, kind = LIMITS[field], type(NUMBERS[field])
        assert limits.whole == (kind is int)
        for value in (limits.low - 1, limits.high + 1):
            if math.isfinite(value):
                with pytest.raises(InputError) as caught:
                    config_lib.validate(with_field(field, kind(value)))
                expected = f"config.{field} is {kind(value)}: expected {limits}"
                assert str(caught.value) == expected


@pytest.mark.parametrize("value", [2**31, -(2**31), 10**400])
def test_a_whole_number_of_more_than_32_bits_needs_a_decimal_point(value):
    """JAX takes whole numbers for int32, and float64 ends before Python's integers do."""
    number = checks.Limits()
    with pytest.raises(
        InputError, match=rf"^a is {value}: expected a whole number below 2147483648 "
    ):
        number.check("a", value)
    number.check("a", float(2**31))
    number.check("a", 2**31 - 1)
    with pytest.raises(InputError, match=r"expected 1…2147483647$"):
        checks.COUNT.check("a", abs(value))
