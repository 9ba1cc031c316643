"""A network's weights are found in whatever a training script wrapped them."""

from __future__ import annotations

import numpy as np
import pytest

from ig_jax.errors import InputError
from ig_jax.storage import weight_files

NETWORK = {name: np.full(2, i, np.float32) for i, name in enumerate(("a.weight", "b.bias", "c"))}
LANDMARKS = tuple(NETWORK)


def prefixed(*prefixes: str, add: float = 0) -> dict[str, np.ndarray]:
    """The network's weights behind prefixes."""
    return {"".join(prefixes) + name: array + add for name, array in NETWORK.items()}


def found(content: dict) -> dict[str, np.ndarray]:
    return weight_files.network_weights(content, LANDMARKS, "a network", "x.pt")


def assert_network(content: dict, add: float = 0) -> None:
    actual = found(content)
    assert list(actual) == list(NETWORK)
    for name, array in NETWORK.items():
        np.testing.assert_array_equal(actual[name], array + add)


PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "net.", "ema_model.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("other", ("", *PREFIXES))
def test_wrapper_prefixes_in_any_order_and_number(prefix: str, other: str) -> None:
    assert_network(prefixed(prefix, other))
    assert_network(prefixed(other, prefix, prefix))
    assert_network({"state_dict": prefixed(other, prefix), "epoch": 3})


def test_wrappers_between_and_names_like_them() -> None:
    inside = ("a._fsdp_wrapped_module.weight", "b._checkpoint_wrapped_module._orig_mod.bias", "c")
    assert_network(dict(zip(inside, NETWORK.values(), strict=True)))
    # Further inside, "model" is the network's own word.
    own = {f"a.{name}": array for name, array in prefixed("model.").items()}
    assert list(weight_files.network_weights(own, list(own), "a network", "x")) == list(own)


@pytest.mark.parametrize(
    "container",
    ["module", "model_state_dict", "state_dict", "net", "model_ema", "ema", "model", "ema_model"],
)
def test_containers(container: str) -> None:
    beside = {"opt": {"state": {0: {"exp_avg": np.ones(2)}}}, "epoch": 7, "best": np.float64(3)}
    assert_network({**beside, container: NETWORK, "rng": np.arange(4)})
    assert_network({container: {"module": prefixed("_orig_mod."), "decay": np.float32(0.9)}})


@pytest.mark.parametrize(
    "content",
    [
        {"model": prefixed(add=1), "ema": NETWORK},
        {"state_dict": prefixed("model.", add=1) | prefixed("ema_model.")},
        {"model": prefixed(add=1), "model_ema": {"module": NETWORK}},
        {"state_dict": prefixed(add=1), "state_dict_ema": NETWORK},
        {"net": prefixed(add=1), "module": {"ema": prefixed("module.")}},
    ],
)
def test_the_ema_is_preferred(content: dict) -> None:
    assert_network(content)


@pytest.mark.parametrize(
    "ema", [{}, None, 0.999, {"decay": np.float32(0.99), "num_updates": np.array(3)}]
)
def test_what_holds_no_weights_is_no_ema(ema) -> None:
    assert_network({"ema": ema, "model": NETWORK})
    assert_network({"ema": ema} | prefixed("net."))


def test_flat_weights_without_what_stands_beside() -> None:
    assert_network(NETWORK | {"epoch": np.int64(3), "opt": {"lr": 0.1}, "sched": {"a": np.ones(2)}})
    # An array that stands among the weights is none of the network's; the caller says so.
    assert "extra" in found(NETWORK | {"extra": np.ones(2)})


def test_top_level_keys_are_named_when_nothing_fits() -> None:
    content = {"weights": NETWORK, "student": {}, "steps": 3, "model": {"d": np.ones(2)}}
    with pytest.raises(InputError) as error:
        found(content)
    assert str(error.value) == (
        "x.pt: found no weights of a network, such as a.weight; "
        "top-level keys: weights (a.weight, b.bias, c), student, steps, model (d)"
    )
    with pytest.raises(InputError, match=r"keys: k0, k1, .*, k7, … \(300\)$"):
        found({f"k{i}": np.ones(1) for i in range(300)})
    with pytest.raises(InputError, match="top-level keys: none"):
        found({})
