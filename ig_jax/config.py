"""The defaults every experiment starts from, one `validate`, and the typed values a config stands
for. This is the only file that knows the names of config fields and what they mean together."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FieldReference

from ig_jax import checks
from ig_jax.checks import Limits
from ig_jax.diffusion import interpolant, loss, samplers
from ig_jax.diffusion.guidance import GuidanceOptions, Weaker, check_bounds
from ig_jax.errors import InputError, suggest
from ig_jax.models import families, sizes, trunk
from ig_jax.models.network import Spec
from ig_jax.paths import resolve
from ig_jax.training.optimizer import OptimizerOptions

LABELS = ("random", "balanced")
FEATURES = ("auto", "digits", "inception")
SWEEP_METRICS = ("fid", "inception_score", "label_accuracy")


def default_config(family: str = "sit", size: str = "xl") -> ConfigDict:
    """Returns a complete config with the recipe that a family's authors published.

    Args:
        family: "sit", "dit" or "lightningdit".
        size: a name of `models.sizes.SIZES`.
    """
    options = sizes.family(family)
    light = family == "lightningdit"
    return ConfigDict(
        dict(
            seed=0,
            model=dict(
                family=family,
                size=size,
                # 0: taken from the size.
                width=0,
                depth=0,
                heads=0,
                # Blocks before the auxiliary head, or before each of several, as in 4,8; 0 for no
                # head, -1 for the published place.
                auxiliary_depth=FieldReference(-1, field_type=object),
                input_size=options.input_size,
                channels=options.channels,
                patch_size=options.patch_size,
                num_classes=1000,
                qk_norm=False,
                adaln_shift=True,
                # Twice-wide final heads of published DiT and early SiT checkpoints.
                learned_sigma=False,
                # "auto": bfloat16 on accelerators, float32 on CPU.
                dtype="auto",
                scan_blocks=True,
                remat="none",
            ),
            data=dict(
                name="latents",
                # Prepared latents (to sample converted weights, their latents_stats.pt alone), a
                # folder of class/image files, or TFDS' data directory.
                path="",
                tfds_name="",
                image_size=256,
                # Images that --mode=prepare encodes: a folder, or "tfds:imagenet2012".
                images="",
                autoencoder="va-vae-f16d32" if light else "sd-vae-ft-ema",
                # The autoencoder's weights (.safetensors or .pt); needed to prepare and to decode.
                autoencoder_path="",
                flip=False,
                num_validation=1024,
                num_workers=0,
                # Train on without shards that are damaged, instead of stopping with their names.
                skip_damaged=False,
            ),
            loss=dict(
                path=options.path,
                prediction=options.prediction,
                times="uniform",
                auxiliary_weight=0.5,
                label_dropout=0.1,
                cosine_weight=1.0 if light else 0.0,
                # ω of the training acceleration, and the step at which it starts.
                guided_target_scale=0.0,
                guided_target_start=0,
                # What ω pushes away from: the auxiliary head, or the null label ∅.
                guided_target="auxiliary",
                # The error that every head minimises.
                error="squared",
            ),
            optimizer=dict(
                name="muon" if light else "adamw",
                learning_rate=2e-4 if light else 1e-4,
                schedule="constant",
                warmup_steps=0,
                b1=0.9,
                b2=0.95 if light else 0.999,
                eps=1e-8,
                weight_decay=0.0,
                clip_norm=1.0,
                # Muon's own group: every matrix.
                momentum=0.95,
                muon_weight_decay=0.01,
                newton_schulz_steps=5,
                # "auto": bfloat16 on accelerators, float32 on CPU.
                newton_schulz_dtype="auto",
                adam_learning_rate_scale=1.0,
                # "all", or "auxiliary_head" to train a fresh head on a frozen network.
                trainable="all",
            ),
            train=dict(
                batch_size=256,
                num_steps=400_000,
                ema_decay=0.9999,
                accumulate=1,
                log_every=100,
                validate_every=5_000,
                sample_every=10_000,
                checkpoint_every=5_000,
                max_to_keep=3,
                profile_at=0,
                # A workdir whose EMA weights training starts from (fine-tuning).
                init_from="",
            ),
            guidance=dict(
                **dataclasses.asdict(GuidanceOptions()),
                # A workdir whose network replaces the auxiliary head (Autoguidance).
                weak="",
            ),
            sampler=dict(
                name="heun2" if light else "ddpm" if family == "dit" else "euler_maruyama",
                num_steps=125 if light else 250,
                time_shift=0.3 if light else 1.0,
                rtol=1e-3,
                atol=1e-6,
                num_samples=64,
                batch_size=64,
                # "random", "balanced", or class numbers and names: "207,golden retriever".
                labels="random",
                # Sample from the EMA weights, or from the raw ones.
                ema=True,
            ),
            mesh=dict(data=-1, fsdp=1, topology=""),
            evaluation=dict(
                # "auto": the classifier's features on digits, Inception on pictures.
                features="auto",
                inception_path="",
                # ADM's reference .npz, a statistics file of ours, or empty for the data set.
                reference="",
                # An .npz, a folder of PNGs or one of --mode=sample to score instead of sampling.
                samples="",
                num_samples=50_000,
                # IG scales to score; empty: the guidance of the config.
                ig_scales=(),
                # Steps between evaluations during training (0: never), with this many samples.
                every=0,
                train_samples=5_000,
                at_end=False,
            ),
            sweep=dict(
                # Every combination is a setting; intervals are pairs (low, high, low, high, …) of
                # path times. By default IG acts everywhere, or at high and middle noise only.
                ig_scales=(1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2),
                ig_intervals=(0.0, 1.0, 0.0, 0.7) if light else (0.0, 1.0, 0.3, 1.0),
                cfg_scales=(1.0,),
                cfg_intervals=(0.0, 1.0),
                # "fid", "inception_score" or (digits) "label_accuracy".
                metric="fid",
                # Samples of each setting in the last round.
                num_samples=10_000,
                # Samples of all settings together; 0: 30 % of num_samples of every setting.
                budget=0,
                # Of the search's noise and labels; the winner is measured again on seed + 1.
                seed=1000,
                # Resamples from which the uncertainty is estimated.
                bootstrap=50,
            ),
        )
    )


# Fields of one number, or of a list of such numbers.
_OR_SEVERAL = ("config.model.auxiliary_depth",)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a number"
    return "a list of numbers" if isinstance(value, tuple | list) else "a string"


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _fits(value: Any, like: Any) -> bool:
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(like, bool)
    if isinstance(like, int):
        return isinstance(value, numbers.Integral)
    if isinstance(like, float):
        return _number(value)
    if isinstance(like, tuple | list):
        return isinstance(value, tuple | list) and all(map(_number, value))
    return isinstance(value, str)


def _check_finite(field: str, value: Any) -> None:
    """Raises `InputError` unless a number, or every number of a list, is finite."""
    listed = value if isinstance(value, tuple | list) else (value,)
    if not all(math.isfinite(v) for v in listed if _number(v)):
        wanted = "finite numbers" if isinstance(value, tuple | list) else "a finite number"
        raise InputError(f"{field} is {value}: expected {wanted}")


def _check_fields(config: ConfigDict, reference: ConfigDict, prefix: str = "config") -> None:
    known = tuple(reference.keys())
    for name in config:
        if name not in reference:
            raise InputError(f"unknown config field {prefix}.{name}{suggest(name, known)}")
    for name, like in reference.items():
        field = f"{prefix}.{name}"
        if name not in config:
            raise InputError(f"missing config field {field}: expected {_kind(like)}")
        value = config[name]
        several = field in _OR_SEVERAL and isinstance(value, tuple | list)
        if isinstance(like, ConfigDict):
            if not isinstance(value, ConfigDict):
                raise InputError(f"{field} is {value!r}: expected a section with fields")
            _check_fields(value, like, field)
        elif not all(_fits(v, like) for v in (value if several else (value,))):
            or_several = ", or a list of them" if field in _OR_SEVERAL else ""
            raise InputError(f"{field} is {value!r}: expected {_kind(like)}{or_several}")
        else:
            _check_finite(field, value)


def check_choice(field: str, value: str, known: tuple[str, ...]) -> None:
    """Raises `InputError` unless `config.{field}` is a known name; the line has the closest."""
    if value not in known:
        raise InputError(
            f"config.{field} is {value!r}: expected one of {', '.join(known)}"
            f"{suggest(value, known)}"
        )


# Of every number but rates and decays of the optimiser, which `OptimizerOptions` checks.
LIMITS: dict[str, Limits] = {
    "seed": checks.SEED,
    "data.image_size": Limits(1, 2**16, whole=True),
    "data.num_validation": checks.COUNT_OR_NONE,
    # Each is a process with a copy of the data set's index.
    "data.num_workers": Limits(0, 256, whole=True),
    "loss.auxiliary_weight": checks.WEIGHT,
    "loss.label_dropout": checks.SHARE,
    "loss.cosine_weight": checks.WEIGHT,
    "loss.guided_target_scale": checks.WEIGHT,
    "loss.guided_target_start": checks.COUNT_OR_NONE,
    # 0 stands for the size's own.
    "model.width": Limits(0, 2**16, whole=True),
    "model.depth": Limits(0, 2**12, whole=True),
    "model.heads": Limits(0, 2**12, whole=True),
    "model.input_size": Limits(1, 2**12, whole=True),
    "model.channels": Limits(1, 2**12, whole=True),
    "model.patch_size": Limits(1, 2**12, whole=True),
    "model.num_classes": Limits(0, 2**24, whole=True),
    "optimizer.warmup_steps": checks.COUNT_OR_NONE,
    "optimizer.newton_schulz_steps": Limits(1, 100, whole=True),
    "train.batch_size": checks.BATCH,
    "train.num_steps": checks.COUNT,
    "train.ema_decay": checks.SHARE,
    "train.accumulate": checks.BATCH,
    "train.log_every": checks.COUNT,
    "train.validate_every": checks.COUNT_OR_NONE,
    "train.sample_every": checks.COUNT_OR_NONE,
    "train.checkpoint_every": checks.COUNT,
    "train.max_to_keep": checks.COUNT,
    "train.profile_at": checks.COUNT_OR_NONE,
    "guidance.cfg_channels": checks.COUNT_OR_NONE,
    "guidance.ig_scale": checks.SCALE,
    "guidance.cfg_scale": checks.SCALE,
    "sampler.num_steps": checks.SAMPLER_STEPS,
    "sampler.time_shift": checks.TIME_SHIFT,
    "sampler.rtol": checks.TOLERANCE,
    "sampler.atol": checks.TOLERANCE,
    "sampler.num_samples": checks.COUNT,
    "sampler.batch_size": checks.BATCH,
    "mesh.data": Limits(-1, 2**31 - 1, whole=True),
    "mesh.fsdp": Limits(-1, 2**31 - 1, whole=True),
    "evaluation.num_samples": Limits(2, 2**31 - 1, whole=True),
    "evaluation.every": checks.COUNT_OR_NONE,
    "evaluation.train_samples": Limits(2, 2**31 - 1, whole=True),
    "sweep.num_samples": Limits(2, 2**31 - 1, whole=True),
    "sweep.budget": checks.COUNT_OR_NONE,
    # The winner is measured again on the next seed.
    "sweep.seed": Limits(0, checks.SEED.high - 1, whole=True),
    "sweep.bootstrap": Limits(2, 100_000, whole=True),
}


def validate(config: ConfigDict) -> None:
    """Checks every field and every combination that needs no data and no devices.

    Raises:
        InputError: one line naming the field, its value and what was expected.
    """
    _check_fields(config, default_config())
    check_choice("model.family", config.model.family, tuple(families.NETWORKS))
    check_choice("model.remat", config.model.remat, tuple(trunk.REMAT_POLICIES))
    check_choice("model.dtype", config.model.dtype, ("auto", "float32", "bfloat16"))
    interpolant.get(config.loss.path)
    check_choice("loss.prediction", config.loss.prediction, interpolant.PREDICTIONS)
    check_choice("loss.times", config.loss.times, interpolant.TIMES)
    check_choice("loss.guided_target", config.loss.guided_target, tuple(loss.TARGETS))
    check_choice("loss.error", config.loss.error, tuple(loss.ERRORS))
    for field, limits in LIMITS.items():
        value: Any = config
        for name in field.split("."):
            value = value[name]
        limits.check(f"config.{field}", value)
    time_grid(config)
    check_choice("evaluation.features", config.evaluation.features, FEATURES)
    _check_sweep(config)
    spec = model_spec(config)
    # Not resolving "auto": that would start the devices, before processes found each other.
    OptimizerOptions(**_optimizer_fields(config, "float32"))
    check_guidance(config, [guidance(config)])
    if not spec.auxiliary_depths:
        _check_no_auxiliary(config)
    if config.train.batch_size % config.train.accumulate:
        raise InputError(
            f"config.train.batch_size is {config.train.batch_size}: expected a multiple of "
            f"config.train.accumulate, {config.train.accumulate}"
        )


def _check_sweep(config: ConfigDict) -> None:
    check_choice("sweep.metric", config.sweep.metric, SWEEP_METRICS)
    for name in ("ig", "cfg"):
        if not config.sweep[f"{name}_scales"]:
            raise InputError(f"config.sweep.{name}_scales is empty: expected at least one scale")
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


def _check_no_auxiliary(config: ConfigDict) -> None:
    if config.loss.guided_target_scale and config.loss.guided_target == "auxiliary":
        raise InputError(
            "config.loss.guided_target_scale needs an auxiliary head: "
            "expected config.model.auxiliary_depth of at least 1"
        )
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
PATH_FIELDS = (
    "data.path",
    "data.images",
    "data.autoencoder_path",
    "train.init_from",
    "guidance.weak",
    "evaluation.inception_path",
    "evaluation.reference",
    "evaluation.samples",
)


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
    depth, width, heads, published = sizes.size(model.size)
    options = dict(model.items()) | dict(
        width=model.width or width,
        depth=model.depth or depth,
        heads=model.heads or heads,
        auxiliary_depths=_auxiliary_depths(model.auxiliary_depth, published),
        shift=model.adaln_shift,
    )
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
    fields = {k: v for k, v in config.loss.items() if k != "guided_target_start"}
    return loss.LossOptions(**fields)


def optimizer_options(config: ConfigDict) -> OptimizerOptions:
    """The optimiser that `config.optimizer` describes; raises `InputError`."""
    return OptimizerOptions(**_optimizer_fields(config, compute_dtype("auto").name))


def _optimizer_fields(config: ConfigDict, automatic: str) -> dict[str, Any]:
    fields = dict(config.optimizer.items(), num_steps=config.train.num_steps)
    if fields["newton_schulz_dtype"] == "auto":
        fields["newton_schulz_dtype"] = automatic
    return fields


def guidance(config: ConfigDict, **changes: Any) -> GuidanceOptions:
    """The guidance that `config.guidance` describes (without the weak network, a file).

    Args:
        config: a config.
        **changes: fields to set instead.
    """
    fields = {f.name: config.guidance[f.name] for f in dataclasses.fields(GuidanceOptions)}
    return dataclasses.replace(GuidanceOptions(**fields), **changes)


def check_guidance(config: ConfigDict, settings: Iterable[GuidanceOptions]) -> None:
    """Raises `InputError` if a setting needs a head or label that the config's model lacks."""
    spec = model_spec(config)
    weaker = Weaker(graph=config.guidance.weak) if config.guidance.weak else None
    for options in settings:
        try:
            options.check(len(spec.auxiliary_depths), spec.num_classes, weaker)
        except InputError as error:
            named = str(error).split()[0] in config.guidance
            raise InputError(f"config.guidance{'.' if named else ': '}{error}") from None


def sampler(config: ConfigDict) -> samplers.Sampler:
    """The sampler that `config.sampler` names, with its options."""
    s = config.sampler
    return samplers.make(s.name, "name", rtol=s.rtol, atol=s.atol)


def time_grid(config: ConfigDict) -> Any:
    """The sampler's time grid, (N + 1,) float64; raises `InputError` if it has no interval."""
    s = config.sampler
    try:
        path = interpolant.get(config.loss.path)
        return samplers.time_grid(sampler(config), s.num_steps, path, s.time_shift)
    except InputError as error:
        raise InputError(f"config.sampler.{error}") from None


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
    return ConfigDict(complete(values, default_config(family).to_dict(), "config"))


# Fields that a restarted run may change: they do not alter what is learned. `num_steps` is among
# them so that a finished run can be prolonged, where the learning rate does not depend on it.
_FREE = ("guidance", "sampler", "mesh", "evaluation", "sweep")
_FREE_TRAIN = (
    "num_steps",
    "log_every",
    "validate_every",
    "sample_every",
    "checkpoint_every",
    "max_to_keep",
    "profile_at",
)
_FREE_DATA = ("path", "images", "autoencoder_path", "num_workers")
_FREE_MODEL = ("scan_blocks", "remat")


def differences(config: ConfigDict, saved: ConfigDict) -> list[str]:
    """Lists the fields that forbid continuing `saved`'s training with `config`, one line each.

    Both are complete (`from_json` completes a saved one).
    """
    # An older version saved paths as they were typed.
    config, saved = resolve_paths(config), resolve_paths(saved)
    free = {"train": _FREE_TRAIN, "data": _FREE_DATA, "model": _FREE_MODEL}
    if config.data.name == "latents":
        # Older versions mirrored latents; such a run may go on without.
        free["data"] += ("flip",)
    lines = []
    for section, values in config.items():
        if section in _FREE:
            continue
        pairs = values.items() if isinstance(values, ConfigDict) else [("", values)]
        for name, value in pairs:
            old = saved[section][name] if name else saved[section]
            if name in free.get(section, ()) or value == old:
                continue
            field = f"config.{section}.{name}".rstrip(".")
            lines.append(f"{field} is {value!r}, the checkpoint has {old!r}")
    new, old = config.train.num_steps, saved.train.num_steps
    if new != old and config.optimizer.schedule != "constant":
        lines.append(
            f"config.train.num_steps is {new}, the checkpoint has {old}: the learning rate depends "
            f"on it (config.optimizer.schedule is {config.optimizer.schedule!r})"
        )
    return lines
