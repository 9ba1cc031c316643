"""What a forward pass costs against size: all operations are counted, and grow as the formula's."""

import json

import pytest
from PIL import Image

from ig_jax.errors import InputError
from ig_jax.plan import sizes
from tests.common import tiny_config


@pytest.mark.slow
def test_costs_grow_as_the_formula_says(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sizes, "NAMES", ("s", "b"))
    monkeypatch.setattr(sizes, "ROUNDS", 1)
    last = sizes.run(tiny_config(), str(tmp_path / "w"))
    found = json.loads((tmp_path / "w" / "sizes.json").read_text())["sizes"]
    expected = [("s", 16), ("b", 16), ("s", 64), ("b", 64)]
    assert [(cost["size"], cost["tokens"]) for cost in found] == expected
    for cost in found:
        # Blocks are scanned, and yet counted one by one.
        assert 0.97 < cost["compiled"] / cost["formula"] < 1.03, cost
        # Every weight is read; those of the label table that are not asked for are few.
        assert cost["memory"] > 4 * 0.9 * cost["parameters"] and cost["seconds"] > 0
    assert last.startswith("powers of the formula's FLOPs that grow alike: FLOPs as 1.0")
    assert "sit, float32, cpu" in capsys.readouterr().out
    with Image.open(tmp_path / "w" / "sizes.png") as picture:
        assert picture.width > 2 * picture.height


def test_a_network_without_published_sizes_is_refused():
    config = tiny_config()
    config.model.family = "mlp"
    with pytest.raises(InputError, match="config.model.family is 'mlp': expected one of .*sit"):
        sizes.costs(config)


def test_growth_is_a_power():
    found = [sizes.Cost("s", 1, 1, flops, 0.0, 0.0, 3.0 * flops**0.5) for flops in (1, 10, 100)]
    assert sizes.growth(found, lambda cost: cost.seconds) == pytest.approx(0.5)
