"""The table of recipes: everything that quotes it quotes it right, and every row of it runs."""

from __future__ import annotations

import pathlib
import re

import pytest

from ig_jax import config as config_lib
from ig_jax import hub, recipes
from ig_jax.errors import InputError
from ig_jax.models import families
from ig_jax.sampling import sample

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = {
    match[1]: path
    for path in sorted((ROOT / "configs").glob("*.py"))
    if (match := re.search(r'published_config\("(.*)"\)', path.read_text()))
}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_row_and_every_setting_that_figures_belong_to_is_valid(name):
    recipe = recipes.RECIPES[name]
    config_lib.validate(config_lib.published_config(name))
    for result in recipe.results:
        config = config_lib.published_config(name, result.changes)
        config_lib.validate(config)
        for field, value in result.changes.items():
            section, field = field.split(".")
            assert config[section][field] == value
    assert bool(recipe.repository) == (name in hub.PUBLISHED)


def test_configs_quote_the_figures_of_their_row():
    with_head = {name for name, recipe in recipes.RECIPES.items() if name.endswith("-ig")}
    assert set(CONFIGS) == with_head
    for name, path in CONFIGS.items():
        text = path.read_text()
        for result in recipes.RECIPES[name].results:
            numbers = (result.fid, result.sfid)
            quoted = [f"{number:.2f}" for number in numbers if number is not None]
            quoted += [f"IS {result.inception_score}"] * (result.inception_score is not None)
            assert all(re.search(rf"\b{re.escape(n)}\b", text) for n in quoted), (name, quoted)


def test_the_readme_quotes_the_figures_of_the_table():
    text = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"\| \| epochs \| FID \| config \|\n((?:\|.*\n)+)", text)
    known = {
        f"{result.fid:.2f}" for recipe in recipes.RECIPES.values() for result in recipe.results
    }
    quoted = re.findall(r"\b\d+\.\d\d\b", "".join(row.split("|")[3] for row in table.splitlines()))
    assert len(quoted) >= 6 and set(quoted) <= known


@pytest.mark.parametrize("name", [*recipes.FAMILIES, "somebody's"])
def test_the_library_samples_as_a_familys_config_does(name, monkeypatch):
    monkeypatch.setitem(families.NETWORKS, "somebody's", families.NETWORKS["mlp"])
    config = config_lib.default_config(name, "s")
    sampler, num_steps, time_shift = sample._recipe(name, None, None, None)
    assert config_lib.sampler(config) == sampler
    assert (config.sampler.num_steps, config.sampler.time_shift) == (num_steps, time_shift)
    trained = recipes.family(name).config["loss"]
    assert (config.loss.path, config.loss.prediction) == (trained["path"], trained["prediction"])


def test_every_family_with_a_recipe_is_a_network_and_unknown_names_are_refused():
    assert set(recipes.FAMILIES) <= set(families.NETWORKS)
    for name in recipes.FAMILIES:
        config_lib.validate(config_lib.default_config(name, "s"))
    with pytest.raises(
        InputError, match="unknown published recipe 'sit-x2': .*did you mean sit-xl-2"
    ):
        config_lib.published_config("sit-x2")
    with pytest.raises(InputError, match="'lightningdot': expected one of sit.* mean lightningdit"):
        config_lib.default_config("lightningdot", "s")
