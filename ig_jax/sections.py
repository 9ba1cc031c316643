"""The sections of a config, and the config as a whole. What `models/` and `diffusion/` configure is
declared there; here is what configures the rooms above. Defaults are SiT's recipe."""

from __future__ import annotations

import dataclasses
import functools

from ig_jax import checks, fields
from ig_jax.checks import Limits
from ig_jax.diffusion import samplers
from ig_jax.diffusion.guidance import RULES, SCHEDULES, SOURCES, GuidanceOptions
from ig_jax.diffusion.loss import LossOptions
from ig_jax.errors import InputError
from ig_jax.fields import field
from ig_jax.models.options import DTYPES, ModelOptions

LABELS = ("random", "balanced")

# What does not alter what is learned.
_free = functools.partial(field, resume="free")
_SEVERAL = Limits(2, 2**31 - 1, whole=True)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What is learned from."""

    name: str = field("latents", "what kind of data set")
    path: str = _free(
        "",
        "prepared latents (to sample converted weights, their latents_stats.pt "
        "alone), a folder of class/image files, TFDS' data directory, or the place for own samples",
        path=True,
    )
    tfds_name: str = field("", "the data set's name in TFDS, such as cifar10")
    image_size: int = field(
        256, "height and width of the pictures", limits=Limits(1, 2**16, whole=True)
    )
    images: str = _free(
        "", "pictures that --mode=prepare encodes: a folder, or tfds:imagenet2012", path=True
    )
    autoencoder: str = field("sd-vae-ft-ema", "autoencoder of latents; empty for pixels")
    autoencoder_path: str = _free(
        "", "its weights (.safetensors or .pt), to prepare and to decode", path=True
    )
    flip: bool = field(False, "mirror pictures at random")
    num_validation: int = field(1024, "examples kept for validation", limits=checks.COUNT_OR_NONE)
    # Each is a process with a copy of the data set's index.
    num_workers: int = _free(
        0, "processes that read; 0 for threads alone", limits=Limits(0, 256, whole=True)
    )
    skip_damaged: bool = field(
        False, "train on without shards that are damaged, instead of stopping with their names"
    )


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """The optimiser, its learning rate, and which parameters it trains.

    Attributes:
        num_steps: length of the cosine schedule, warm-up included: `config.train.num_steps`.

    Raises:
        InputError: a field that is not what it should be.
    """

    name: str = field(
        "adamw",
        "muon: Muon on all matrices, Adam on biases and norm weights",
        choices=("adamw", "muon"),
    )
    learning_rate: float = field(1e-4, "peak learning rate", limits=checks.POSITIVE)
    schedule: str = field(
        "constant",
        "of the learning rate after the warm-up; cosine: to zero at train.num_steps",
        choices=("constant", "cosine"),
    )
    warmup_steps: int = field(0, "steps of linear warm-up from zero", limits=checks.COUNT_OR_NONE)
    b1: float = field(0.9, "AdamW, or the Adam group of muon", limits=checks.MEMORY)
    b2: float = field(0.999, "AdamW, or the Adam group of muon", limits=checks.MEMORY)
    eps: float = field(1e-8, "AdamW, or the Adam group of muon", limits=checks.POSITIVE)
    weight_decay: float = field(
        0.0, "decoupled decay of AdamW, or of the Adam group of muon", limits=checks.WEIGHT
    )
    clip_norm: float = field(
        1.0, "bound on the gradients' global norm; 0 for no clipping", limits=checks.WEIGHT
    )
    momentum: float = field(0.95, "Muon's momentum", limits=checks.MEMORY)
    muon_weight_decay: float = field(0.01, "decoupled decay of Muon's group", limits=checks.WEIGHT)
    newton_schulz_steps: int = field(
        5, "Newton–Schulz iterations of Muon", limits=Limits(1, 100, whole=True)
    )
    newton_schulz_dtype: str = field(
        "auto",
        "operands of their products; auto: bfloat16 on accelerators, float32 on CPU",
        choices=DTYPES,
    )
    adam_learning_rate_scale: float = field(
        1.0, "learning rate of the Adam group of muon over that of Muon", limits=checks.POSITIVE
    )
    trainable: str = field(
        "all",
        "auxiliary_head: train a fresh head on a frozen network",
        choices=("all", "auxiliary_head"),
    )
    num_steps: int = 0

    def __post_init__(self) -> None:
        fields.check(self)
        if self.schedule == "cosine" and self.num_steps <= self.warmup_steps:
            raise InputError(
                f"num_steps is {self.num_steps}: a cosine schedule needs more than its "
                f"warmup_steps, {self.warmup_steps}"
            )


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How long is trained, and what is kept and shown meanwhile."""

    batch_size: int = field(256, "examples a step, over all devices", limits=checks.BATCH)
    num_steps: int = _free(
        400_000,
        "steps in all; fixed too where the learning rate depends on it",
        limits=checks.COUNT,
    )
    ema_decay: float = field(0.9999, "decay per step of the averaged weights", limits=checks.SHARE)
    accumulate: int = field(
        1, "microbatches that a batch is split into, to save memory", limits=checks.BATCH
    )
    log_every: int = _free(100, "steps between log lines", limits=checks.COUNT)
    validate_every: int = _free(
        5_000, "steps between validation losses; 0: never", limits=checks.COUNT_OR_NONE
    )
    sample_every: int = _free(
        10_000, "steps between sample grids; 0: never", limits=checks.COUNT_OR_NONE
    )
    checkpoint_every: int = _free(5_000, "steps between checkpoints", limits=checks.COUNT)
    max_to_keep: int = _free(3, "newest checkpoints kept, besides the best", limits=checks.COUNT)
    verify_checkpoints: bool = _free(
        True, "compare checksums of weights that are read (0.5 s a GiB); else sizes alone"
    )
    profile_at: int = _free(
        0, "step at which a profile is recorded; 0: never", limits=checks.COUNT_OR_NONE
    )
    not_finite: str = _free(
        "stop",
        "at a loss, gradient or update that is not finite: stop, or skip the update and count",
        choices=("stop", "skip"),
    )
    allow_changes: str = _free(
        "", "sections, as in optimizer,loss, that may change though they stay; they are recorded"
    )
    wandb: str = _free("", "project at Weights & Biases to log to as well (pip extra wandb)")
    init_from: str = field(
        "", "a workdir whose EMA weights training starts from (fine-tuning)", path=True
    )


@dataclasses.dataclass(frozen=True)
class GuidanceSection(GuidanceOptions):
    """How samples are guided."""

    weak: str = _free(
        "", "a workdir whose network replaces the auxiliary head (Autoguidance)", path=True
    )
    weak_step: str = _free("last", "its checkpoint: last, best or a step; an older EMA is weaker")


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How samples are drawn."""

    name: str = _free("euler_maruyama", "the sampler", table=samplers.SAMPLERS)
    num_steps: int = _free(
        250, "steps, as the authors of the family count them", limits=checks.SAMPLER_STEPS
    )
    time_shift: float = _free(
        1.0, "s of t ← s·t/(1 + (s − 1)·t); 1 for none", limits=checks.TIME_SHIFT
    )
    rtol: float = _free(1e-3, "relative tolerance of adaptive samplers", limits=checks.TOLERANCE)
    atol: float = _free(1e-6, "absolute tolerance of adaptive samplers", limits=checks.TOLERANCE)
    num_samples: int = _free(64, "samples that --mode=sample draws", limits=checks.COUNT)
    batch_size: int = _free(64, "samples drawn at a time, over all devices", limits=checks.BATCH)
    labels: str = _free("random", 'random, balanced, or class numbers and names: "207,tench"')
    ema: bool = _free(True, "sample from the EMA weights, or from the raw ones")


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """How work is split over devices."""

    data: int = _free(
        -1,
        "devices that batches are split over; -1: the rest",
        limits=Limits(-1, 2**31 - 1, whole=True),
    )
    fsdp: int = _free(
        1,
        "devices that parameters are split over; -1: the rest",
        limits=Limits(-1, 2**31 - 1, whole=True),
    )
    topology: str = _free("", "the TPU that --mode=compile compiles for, such as v5e:4x4")


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """How samples are scored."""

    features: str = _free(
        "auto",
        "a feature extractor; auto: a classifier on digits and photos, Inception on pictures",
    )
    inception_path: str = _free("", "Inception's weights", path=True)
    dinov2_path: str = _free(
        "", "DINOv2's weights (.pth or .safetensors), where features is dinov2", path=True
    )
    reference: str = _free(
        "", "ADM's reference .npz, a statistics file of ours, or empty for the data set", path=True
    )
    samples: str = _free(
        "",
        "an .npz, a folder of PNGs or one of --mode=sample to score instead of sampling",
        path=True,
    )
    num_samples: int = _free(50_000, "samples to score", limits=_SEVERAL)
    ig_scales: tuple[float, ...] = _free((), "IG scales to score; empty: the config's guidance")
    fid_targets: tuple[float, ...] = _free(
        (), "k of `epochs to FID <= k`, read from the log of a training that evaluated"
    )
    every: int = _free(
        0, "steps between evaluations during training; 0: never", limits=checks.COUNT_OR_NONE
    )
    train_samples: int = _free(5_000, "samples of each of those", limits=_SEVERAL)
    at_end: bool = _free(False, "evaluate when training is done")


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """Which guidance --mode=sweep searches: every combination of what is listed here.

    What is not listed is as in `config.guidance`. Intervals are pairs (low, high, low, high, …) of
    path times; schedules are tried beside them. By default IG acts everywhere, or at high and
    middle noise only. Repeat a flag to list names: `--config.sweep.ig_rules=linear
    --config.sweep.ig_rules=zero_star`.
    """

    ig_scales: tuple[float, ...] = _free((1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2), "IG scales to try")
    ig_intervals: tuple[float, ...] = _free((0.0, 1.0, 0.3, 1.0), "pairs low, high of path times")
    ig_schedules: tuple[str, ...] = _free((), "besides the intervals", table=SCHEDULES)
    ig_sources: tuple[str, ...] = _free((), "what is weak", table=SOURCES)
    ig_rules: tuple[str, ...] = _free((), "how to extrapolate", table=RULES)
    cfg_scales: tuple[float, ...] = _free((1.0,), "CFG scales to try")
    cfg_intervals: tuple[float, ...] = _free((0.0, 1.0), "pairs low, high of path times")
    cfg_schedules: tuple[str, ...] = _free((), "besides the intervals", table=SCHEDULES)
    cfg_sources: tuple[str, ...] = _free((), "what is weak", table=SOURCES)
    cfg_rules: tuple[str, ...] = _free((), "how to extrapolate", table=RULES)
    metric: str = _free("fid", "what is searched for; any metric that the features suffice for")
    num_samples: int = _free(10_000, "samples of each setting in the last round", limits=_SEVERAL)
    budget: int = _free(
        0,
        "samples of all settings together; 0: 30 % of num_samples of each",
        limits=checks.COUNT_OR_NONE,
    )
    seed: int = _free(
        1000,
        "of the search's noise and labels; the winner is measured again on the next",
        limits=Limits(0, checks.SEED.high - 1, whole=True),
    )
    bootstrap: int = _free(
        50,
        "resamples from which the uncertainty is estimated",
        limits=Limits(2, 100_000, whole=True),
    )


@dataclasses.dataclass(frozen=True)
class AblationOptions:
    """What --mode=ablate asks. Its lists of dicts are data of a config file; see ablate_digits.py.

    Trainings and questions are those of `evaluation.questions`.
    """

    questions: tuple[dict, ...] = _free((), "what is compared and expected")
    trainings: tuple[dict, ...] = _free((), "named changes of the config: other networks to train")
    seeds: int = _free(3, "seeds of training, labels and noise", limits=Limits(1, 1000, whole=True))
    metrics: tuple[str, ...] = _free(("fid",), "what is shown; the first one decides")
    fast: tuple[int, ...] = _free((2, 100, 256), "with --fast: seeds, training steps, samples")


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment."""

    seed: int = field(0, "of everything random", limits=checks.SEED)
    imports: tuple[str, ...] = _free((), "files given to --import, which add rows to the tables")
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    loss: LossOptions = LossOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    train: TrainOptions = TrainOptions()
    guidance: GuidanceSection = GuidanceSection()
    sampler: SamplerOptions = SamplerOptions()
    mesh: MeshOptions = MeshOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    sweep: SweepOptions = SweepOptions()
    ablation: AblationOptions = AblationOptions()
