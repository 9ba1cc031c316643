"""The defaults every experiment starts from, one `validate`, and the typed values a config stands
for. Sections declare their own fields (`sections.py`); here is what fields mean together."""

from __future__ import annotations

import contextlib
import json
import os
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FieldReference

from ig_jax import errors, fields, recipes, tables
from ig_jax.diffusion import interpolant, loss, samplers
from ig_jax.diffusion.guidance import GuidanceOptions, Weaker, check_bounds
from ig_jax.errors import InputError, UnknownNameError, look_up, suggest
from ig_jax.models import families
from ig_jax.models.network import Spec
from ig_jax.paths import resolve
from ig_jax.sections import Config, OptimizerOptions

# Every field by path, such as "guidance.ig_scale".
FIELDS = fields.every(Config)
# Sections that say how is learned; the others say what.
CHANGEABLE = ("optimizer", "loss", "train", "data")


def default_config(family: str = "sit", size: str = "xl") -> ConfigDict:
    """Returns a complete config with the recipe that a family's authors published.

    Args:
        family: a name of `models.families.NETWORKS`.
        size: a name of `recipes.SIZES`.

    Raises:
        InputError: an unknown family.
    """
    values = {name: field.default for name, field in fields.declared(Config).items()}
    for name, section in fields.sections(Config).items():
        values[name] = {key: field.default for key, field in fields.declared(section).items()}
    families.family(family)
    for name, section in recipes.family(family).config.items():
        values[name].update(section)
    values["model"].update(family=family, size=size)
    return _config(values)


def published_config(name: str, changes: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config of a published network.

    Args:
        name: a name of `recipes.RECIPES`, such as "sit-xl-2-ig".
        changes: fields, "section.field", in which a setting differs (`recipes.Result.changes`).

    Returns:
        The config. Raises `InputError` for an unknown name.
    """
    recipe = look_up(recipes.RECIPES, name, "published recipe")
    config = default_config(recipe.family, recipe.size)
    for section, values in recipe.config.items():
        config[section].update(values)
    config.update_from_flattened_dict(changes or {})
    return config


def _config(values: dict[str, Any]) -> ConfigDict:
    """A config of nested plain values, whose flags take whatever its fields may be."""
    config = ConfigDict(values)
    for path, field in FIELDS.items():
        if isinstance(field.kind, types.UnionType):
            section, name = path.split(".")
            value = values[section][name]
            config[section][name] = FieldReference(value, field_type=object)
    return config


def find_field(path: str) -> fields.Field:
    """The field "train.num_steps"; raises `InputError` if there is none, or it is a section."""
    section, _, name = path.partition(".")
    inside = fields.sections(Config)
    if path in inside:
        first = next(iter(fields.declared(inside[path])))
        raise InputError(
            f"config.{path} is a section: expected one of its fields, such as config.{path}.{first}"
        )
    if path not in FIELDS:
        known = fields.declared(inside[section]) if section in inside else FIELDS.keys() | inside
        closest = suggest(name if section in inside else section, sorted(known))
        raise InputError(f"unknown config field config.{path}{closest}")
    return FIELDS[path]


def describe(topic: str, known: Mapping[str, Collection[str]]) -> str:
    """What there is in "config", or in a section such as "config.guidance".

    Args:
        topic: either.
        known: names for fields whose tables are in rooms above, by path.

    Returns:
        Lines. Raises `InputError` for an unknown section.
    """
    inside = {f"config.{name}": section for name, section in fields.sections(Config).items()}
    errors.check_choice("--help", topic, ("config", *inside))
    if topic in inside:
        return fields.describe(inside[topic], topic, known)
    listed = [f"  --help={name:18} {fields.summary(inside[name])}" for name in inside]
    return "\n".join([fields.describe(Config, "config", known), "", *listed])


def validate(config: ConfigDict) -> None:
    """Checks every field and every combination that needs no data and no devices.

    Raises:
        InputError: one line naming the field, its value and what was expected.
    """
    with naming_imports(config.get("imports", ())):
        fields.check_values(Config, config, "config")
    for name in _allowed_changes(config):
        errors.check_choice("config.train.allow_changes", name, CHANGEABLE)
    time_grid(config)
    _check_sweep(config)
    spec = model_spec(config)
    optimizer_options(config)
    check_guidance(config, [GuidanceOptions.of(config.guidance)])
    _check_target(config, spec)
    if not spec.auxiliary_depths:
        _check_no_auxiliary(config)
    if config.train.batch_size % config.train.accumulate:
        raise InputError(
            f"config.train.batch_size is {config.train.batch_size}: expected a multiple of "
            f"config.train.accumulate, {config.train.accumulate}"
        )


@contextlib.contextmanager
def naming_imports(imports: Sequence[str]) -> Iterator[None]:
    """Adds to the line on an unknown name which files of a config were not imported."""
    try:
        yield
    except UnknownNameError as error:
        missing = [f"--import={file}" for file in imports if file not in tables.IMPORTED]
        made = f" (this workdir was made with {' '.join(missing)})" if missing else ""
        raise UnknownNameError(f"{error}{made}") from None


def check_choice(config: ConfigDict, path: str, known: Collection[str]) -> None:
    """Raises `InputError` unless a field is a known name, or a list of such: for tables of the
    rooms above."""
    value = at(config, path)
    with naming_imports(config.imports):
        for name in value if isinstance(value, tuple) else (value,):
            errors.check_choice(f"config.{path}", name, known)


@contextlib.contextmanager
def _naming(section: str) -> Iterator[None]:
    """Puts the path before what the value that a section stands for says of its own fields."""
    try:
        yield
    except InputError as error:
        named = f"{section}.{str(error).split()[0]}" in FIELDS
        raise InputError(f"config.{section}{'.' if named else ': '}{error}") from None


def _check_sweep(config: ConfigDict) -> None:
    for name in ("ig", "cfg"):
        if not config.sweep[f"{name}_scales"]:
            raise InputError(f"config.sweep.{name}_scales is empty: expected at least one scale")
        if config.sweep[f"{name}_intervals"] or not config.sweep[f"{name}_schedules"]:
            interval_pairs(f"config.sweep.{name}_intervals", config.sweep[f"{name}_intervals"])


def interval_pairs(field: str, values: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """Splits (low, high, low, high, …) into checked intervals; raises `InputError`."""
    if not values or len(values) % 2:
        raise InputError(
            f"{field} is {tuple(values)}: expected pairs (low, high, low, high, …), at least one"
        )
    pairs = tuple(zip(values[::2], values[1::2], strict=True))
    for pair in pairs:
        check_bounds(field, pair)
    return pairs


def _check_target(config: ConfigDict, spec: Spec) -> None:
    row = tables.make(loss.TARGETS, config.loss.guided_target, "guided_target")
    needs = getattr(row, "needs", ()) if config.loss.guided_target_scale else ()
    if "auxiliary" in needs and not spec.auxiliary_depths:
        raise InputError(
            "config.loss.guided_target_scale needs an auxiliary head: "
            "expected config.model.auxiliary_depth of at least 1"
        )
    if "null" in needs and not spec.num_classes:
        raise InputError(
            f"config.loss.guided_target is {config.loss.guided_target!r}, which needs a null label "
            "∅: expected 'auxiliary', since this model is unconditional"
        )


def _check_no_auxiliary(config: ConfigDict) -> None:
    if config.optimizer.trainable != "all":
        raise InputError(
            f"config.optimizer.trainable is {config.optimizer.trainable!r}: expected 'all', this "
            "model has no auxiliary head (config.model.auxiliary_depth is 0)"
        )


def check_training(config: ConfigDict) -> None:
    """Raises `InputError` for what can be sampled from but not be trained."""
    if config.model.learned_sigma and config.optimizer.trainable == "all":
        raise InputError(
            "config.model.learned_sigma is True: expected False to train, since the variance "
            "channels have no loss here (or config.optimizer.trainable='auxiliary_head')"
        )
    if config.data.flip and config.data.name == "latents":
        raise InputError(
            "config.data.flip is True: expected False for latents, which do not mirror as pictures "
            "do (--mode=prepare stores latents of mirrored pictures, and those are always used)"
        )


def check_devices(config: ConfigDict, devices: int) -> None:
    """Raises `InputError` unless mesh and batch sizes divide evenly over `devices`."""
    sizes_ = [config.mesh.data, config.mesh.fsdp]
    if sizes_.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes_):
        raise InputError(
            f"config.mesh is data={sizes_[0]}, fsdp={sizes_[1]}: expected positive sizes, at most "
            "one of them -1 (the rest of the devices)"
        )
    fixed = sizes_[0] * sizes_[1] * (-1 if -1 in sizes_ else 1)
    if devices % fixed or (-1 not in sizes_ and fixed != devices):
        raise InputError(
            f"config.mesh is data={sizes_[0]}, fsdp={sizes_[1]}: "
            f"expected a product that {'divides' if -1 in sizes_ else 'is'} "
            f"the number of devices, {devices}"
        )
    microbatch = config.train.batch_size // config.train.accumulate
    for field, batch in (
        ("config.train.batch_size / config.train.accumulate", microbatch),
        ("config.sampler.batch_size", config.sampler.batch_size),
    ):
        if batch % devices:
            raise InputError(
                f"{field} is {batch}: expected a multiple of the number of devices, {devices}"
            )


# `data.images` may name a TFDS set instead.
PATH_FIELDS = tuple(path for path, field in FIELDS.items() if field.path)


def resolve_paths(config: ConfigDict) -> ConfigDict:
    """Returns a copy whose paths are absolute, so that they mean the same from any folder."""
    config = config.copy_and_resolve_references()
    for field in PATH_FIELDS:
        section, name = field.split(".")
        path = config.get(section, {}).get(name)
        if path and not path.startswith("tfds:"):
            config[section][name] = os.fspath(resolve(path))
    return config


def compute_dtype(name: str) -> jnp.dtype:
    """Turns "auto", "float32" or "bfloat16" into a dtype for the present devices."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def model_spec(config: ConfigDict) -> Spec:
    """The architecture that `config.model` describes; raises `InputError` if impossible."""
    model = config.model
    size = recipes.size(model.size)
    options = dict(model.items()) | dict(
        width=model.width or size.width,
        depth=model.depth or size.depth,
        heads=model.heads or size.heads,
        auxiliary_depths=_auxiliary_depths(model.auxiliary_depth, size.auxiliary_depth),
        shift=model.adaln_shift,
    )
    with _naming("model"):
        return families.make_spec(model.family, options)


def _auxiliary_depths(field: int | Sequence[int], published: int) -> tuple[int, ...]:
    """The depths that `config.model.auxiliary_depth` stands for."""
    if isinstance(field, tuple | list):
        return tuple(field)
    return {-1: (published,), 0: ()}.get(field, (field,))


def model_options(config: ConfigDict) -> dict[str, Any]:
    """Keyword arguments of a network besides its spec: precision and compilation."""
    model = config.model
    return dict(dtype=compute_dtype(model.dtype), scan_blocks=model.scan_blocks, remat=model.remat)


def loss_options(config: ConfigDict) -> loss.LossOptions:
    """The training loss that `config.loss` describes."""
    return loss.LossOptions(**config.loss)


def optimizer_options(config: ConfigDict) -> OptimizerOptions:
    """The optimiser that `config.optimizer` describes; raises `InputError`."""
    with _naming("optimizer"):
        return OptimizerOptions(**config.optimizer, num_steps=config.train.num_steps)


def check_guidance(config: ConfigDict, settings: Iterable[GuidanceOptions]) -> None:
    """Raises `InputError` if a setting needs a head or label that the config's model lacks."""
    spec = model_spec(config)
    weaker = Weaker(graph=config.guidance.weak) if config.guidance.weak else None
    with _naming("guidance"):
        for options in settings:
            options.check(len(spec.auxiliary_depths), spec.num_classes, weaker)


def sampler(config: ConfigDict) -> samplers.Sampler:
    """The sampler that `config.sampler` names, with its options."""
    s = config.sampler
    return samplers.make(s.name, "name", rtol=s.rtol, atol=s.atol)


def time_grid(config: ConfigDict) -> Any:
    """The sampler's time grid, (N + 1,) float64; raises `InputError` if it has no interval."""
    s, heads = config.sampler, len(model_spec(config).auxiliary_depths)
    with _naming("sampler"):
        path, chosen = interpolant.get(config.loss.path), sampler(config)
        chosen.check(heads, "name")
        return samplers.time_grid(chosen, s.num_steps, path, s.time_shift)


def to_json(config: ConfigDict) -> dict[str, Any]:
    """A config as nested plain values."""
    return json.loads(config.to_json())


def from_json(values: dict[str, Any], origin: str = "the saved config") -> ConfigDict:
    """Rebuilds a config from `to_json`'s values; lists become tuples, as in the defaults.

    Fields that an older version did not have get their defaults: a new field's default means what
    was done before there was the field, so that no saved run changes its meaning.

    Args:
        values: nested plain values.
        origin: whose they are, for the message.

    Raises:
        InputError: a field that this version does not know.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return tuple(value) if isinstance(value, list) else value

    def complete(found: dict, defaults: dict, prefix: str) -> dict:
        for name in found.keys() - defaults.keys():
            raise InputError(
                f"{origin} has a field {prefix}.{name}, unknown to this version of ig_jax: "
                "expected what this version or an older one saved (a newer ig_jax reads it)"
            )
        return {
            name: complete(found.get(name, {}), default, f"{prefix}.{name}")
            if isinstance(default, dict)
            else found.get(name, default)
            for name, default in defaults.items()
        }

    values = plain(values)
    family = values.get("model", {}).get("family", "sit")
    with naming_imports(values.get("imports", ())):
        defaults = default_config(family).to_dict()
    return _config(complete(values, defaults, "config"))


def differences(config: ConfigDict, saved: ConfigDict) -> list[str]:
    """Lists the fields that forbid continuing `saved`'s training with `config`, one line each.

    Both are complete (`from_json` completes a saved one). A field says itself whether it is free.
    """
    allowed, lines = _allowed_changes(config), _changes(config, saved)
    return [line for path, line in lines.items() if path.partition(".")[0] not in allowed]


def allowed_changes(config: ConfigDict, saved: ConfigDict) -> list[str]:
    """As `differences`, the fields that `config.train.allow_changes` allows to differ."""
    allowed, lines = _allowed_changes(config), _changes(config, saved)
    return [line for path, line in lines.items() if path.partition(".")[0] in allowed]


def _changes(config: ConfigDict, saved: ConfigDict) -> dict[str, str]:
    """A line on each field that is fixed and differs, by path."""
    # An older version saved paths as they were typed.
    config, saved = resolve_paths(config), resolve_paths(saved)
    fixed = [path for path, field in FIELDS.items() if field.resume == "fixed"]
    if config.data.name == "latents":
        # Older versions mirrored latents; such a run may go on without.
        fixed.remove("data.flip")
    lines, length = {}, "train.num_steps"
    # So that a finished run can be prolonged, its length is free unless the rate depends on it.
    for path in (*fixed, *([length] if config.optimizer.schedule != "constant" else [])):
        value, old = at(config, path), at(saved, path)
        if value != old:
            lines[path] = f"config.{path} is {value!r}, the checkpoint has {old!r}"
    if length in lines:
        lines[length] += (
            ": the learning rate depends on it (config.optimizer.schedule is "
            f"{config.optimizer.schedule!r})"
        )
    return lines


def _allowed_changes(config: ConfigDict) -> list[str]:
    """The sections that `config.train.allow_changes` names."""
    return [name.strip() for name in config.train.allow_changes.split(",") if name.strip()]


def at(config: ConfigDict, path: str) -> Any:
    """The value of a field by its path."""
    section, _, name = path.rpartition(".")
    return config[section][name] if section else config[name]
