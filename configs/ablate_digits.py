"""Claims of the internal guidance paper, and what its users ask, put to a small digits network by
--mode=ablate: under an hour on two CPU cores, with --fast in minutes.

Each question lists what is compared, and, as it was stated before the first run, what is expected:
`better` than `than` `by` at least that share.
"""

from ig_jax.config import default_config

# To choose from, where an arm is tuned: w, s, or both.
TUNED_W = {"guidance.ig_scale": (1.25, 1.5, 2.0, 2.5)}
TUNED_S = {"guidance.cfg_scale": (1.25, 1.5, 2.0)}
TUNED_BOTH = {"guidance.ig_scale": (1.25, 1.75), "guidance.cfg_scale": (1.25, 1.75)}
SHALLOW = {"guidance.cfg_source": "shallow"}
# The main network's own EMA after half of the training.
OLDER = {"weak": "main", "guidance.weak_step": "250"}

# Another weak prediction of the same labels, at the scale s, beside the auxiliary head's at w.
BESIDE_IG = {"guidance.ig_source": "auxiliary", "guidance.cfg_source": "weaker"}

TRAININGS = (
    {"name": "plain", "model.auxiliary_depth": 0},
    *({"name": f"head_{k}", "model.auxiliary_depth": k} for k in (1, 4, 5)),
    {"name": "heads_124", "model.auxiliary_depth": (1, 2, 4)},
    {"name": "lambda_0.25", "loss.auxiliary_weight": 0.25},
    {"name": "lambda_1", "loss.auxiliary_weight": 1.0},
    *(
        {
            "name": f"omega_{target}",
            "loss.guided_target": target,
            "loss.guided_target_scale": 0.3,
            "loss.guided_target_start": 125,
        }
        for target in ("auxiliary", "null", "segmented")
    ),
    {
        "name": "raev2",
        "loss.prediction": "data",
        "loss.weight": "velocity",
        "loss.times": "lognormal",
        "loss.auxiliary_weight": 1.0,
    },
    {"name": "muon", "optimizer.name": "muon"},
    {"name": "plain_muon", "optimizer.name": "muon", "model.auxiliary_depth": 0},
    *(
        {
            "name": f"head_on_{data}",
            "train.init_from": "plain",
            "optimizer.trainable": "auxiliary_head",
            "data.name": name,
        }
        for data, name in (("digits", "digits"), ("own_samples", "samples"))
    ),
    {
        "name": "small",
        "model.auxiliary_depth": 0,
        "model.width": 32,
        "model.depth": 3,
        "train.num_steps": 250,
    },
)
# Only of the main network anybody asks what it was like half-way.
TRAININGS = tuple({**training, "train.checkpoint_every": 500} for training in TRAININGS)


def _by_w(label, **arm):
    """Two arms of one network: without guidance, and at the best scale."""
    return (
        {"name": f"{label}, w = 1", **arm},
        {"name": f"{label}, best w", "tune": TUNED_W, **arm},
    )


def _expect(better, than, by=0.0, since="IG paper", **more):
    return {"better": better, "than": than, "by": by, "since": since, **more}


_SCALE = {
    "name": "scale",
    "asks": "Does internal guidance help, and how much of it?",
    "arms": tuple(
        {"name": f"w = {w:g}", "guidance.ig_scale": w} for w in (0.0, 1.0, 1.25, 1.5, 2.0, 2.5, 4.0)
    ),
    "expect": (
        _expect("w = 1", "w = 0", 0.2, "IG paper, Fig. 3: the auxiliary head alone is poor"),
        _expect("w = 1.5", "w = 1", 0.1, "IG paper: SiT-B/2, 30.60 to 19.02 at w 1.5"),
        _expect("w = 2", "w = 4", 0.1, "every extrapolation overshoots at last"),
    ),
}

_DEPTH = {
    "name": "depth",
    "asks": "After which of 6 blocks should the auxiliary head be?",
    "arms": (
        {"name": "no head", "train": "plain"},
        *(
            arm
            for k in (1, 2, 4, 5)
            for arm in _by_w(f"block {k}", train="main" if k == 2 else f"head_{k}")
        ),
    ),
    "expect": (
        _expect("block 2, w = 1", "no head", 0.03, "IG paper: 33.02 to 30.60 by training alone"),
        _expect("no head", "block 5, w = 1", 0.0, "IG paper: 33.02 against 38.05, late heads hurt"),
        _expect("block 2, best w", "block 5, best w", 0.05, "IG paper: late heads hurt"),
        _expect("block 2, best w", "no head", 0.2, "IG paper: 33.02 to 17.38 at w 1.9"),
    ),
}

_LAMBDA = {
    "name": "lambda",
    "asks": "How much should the auxiliary loss weigh (λ)?",
    "arms": tuple(
        arm
        for name, train in (("0.25", "lambda_0.25"), ("0.5", "main"), ("1", "lambda_1"))
        for arm in _by_w(f"λ = {name}", train=train)
    ),
    "expect": (
        _expect("λ = 0.5, best w", "λ = 1, best w", 0.0, "IG paper: λ up to 0.5 is good"),
        _expect("λ = 0.25, best w", "λ = 0.5, best w", -0.1, "IG paper: both are its values"),
    ),
}

_INTERVAL = {
    "name": "interval",
    "asks": "At which noise levels should IG act (w = 2)?",
    "arms": tuple(
        {
            "name": f"[{low:g}, {high:g}]",
            "guidance.ig_scale": 2.0,
            "guidance.ig_interval": (low, high),
        }
        for low, high in ((0.0, 1.0), (0.3, 1.0), (0.6, 1.0), (0.0, 0.7), (0.0, 0.3))
    ),
    "expect": (
        _expect("[0.3, 1]", "[0, 1]", 0.0, "IG paper: 17.38 to 16.19 with (0.3, 1)"),
        _expect("[0.3, 1]", "[0, 0.3]", 0.05, "IG paper: IG works at high and middle noise"),
    ),
}

# A second look, asked after the answer to the first one was known.
_INTERVAL_MOVED = {
    "name": "interval_moved",
    "asks": "The interval [0.3, 1] of 4,096 dimensions is about [0.05, 1] of 64: better (w = 2)?",
    "arms": tuple(
        {
            "name": f"[{low:g}, 1]",
            "guidance.ig_scale": 2.0,
            "guidance.ig_interval": (low, 1.0),
        }
        for low in (0.0, 0.05, 0.1, 0.3)
    ),
    "expect": (
        _expect("[0.05, 1]", "[0, 1]", 0.0, "RAEv2 shifts times by the root of the dimensions"),
        _expect("[0.05, 1]", "[0.3, 1]", 0.0, "RAEv2 shifts times by the root of the dimensions"),
    ),
}

_TARGET = {
    "name": "target",
    "asks": "Guidance in the training target (ω = 0.3), in place of sampling or with it?",
    "arms": (
        *_by_w("plain target"),
        *_by_w("ω, auxiliary head", train="omega_auxiliary"),
        *_by_w("ω, null label", train="omega_null"),
        *_by_w("ω, segmented", train="omega_segmented"),
    ),
    "expect": (
        _expect("ω, auxiliary head, w = 1", "plain target, w = 1", 0.1, "IG paper, discussion"),
        _expect("ω, null label, w = 1", "plain target, w = 1", 0.1, "arXiv 2502.12154"),
        _expect("ω, segmented, w = 1", "ω, auxiliary head, w = 1", 0.0, "arXiv 2603.20584"),
        _expect("ω, auxiliary head, best w", "plain target, best w", 0.0, "IG paper, discussion"),
    ),
}

_CELLS = tuple(
    (f"{optimizer}, {average}", head, plain, {"sampler.ema": ema})
    for optimizer, head, plain in (("AdamW", "main", "plain"), ("Muon", "muon", "plain_muon"))
    for average, ema in (("raw", False), ("EMA", True))
)
_APART = {
    "name": "apart",
    "asks": "What is IG's part, what Muon's, and what the EMA's?",
    "arms": tuple(
        arm
        for cell, head, plain, changes in _CELLS
        for arm in (
            {"name": f"{cell}, no head", "train": plain, **changes},
            {"name": f"{cell}, IG", "train": head, "tune": TUNED_W, **changes},
        )
    ),
    "expect": (
        *(
            _expect(f"{cell}, IG", f"{cell}, no head", 0.1, "IG's gain is its own")
            for cell, *_ in _CELLS
        ),
        _expect("Muon, EMA, no head", "AdamW, EMA, no head", 0.05, "public criticism of the paper"),
        _expect("AdamW, EMA, no head", "AdamW, raw, no head", 0.1, "common knowledge"),
    ),
}

_METHODS = {
    "name": "methods",
    "asks": "Internal guidance, CFG, Autoguidance, an older EMA, and their pairs (equal steps)?",
    "arms": (
        {"name": "none"},
        {"name": "IG", "tune": TUNED_W},
        {"name": "CFG", "tune": TUNED_S},
        {"name": "Autoguidance", "weak": "small", "tune": TUNED_W},
        {"name": "older EMA", **OLDER, "tune": TUNED_W},
        {"name": "IG + CFG", "tune": TUNED_BOTH},
        {"name": "Autoguidance + CFG", "weak": "small", "tune": TUNED_BOTH},
        {"name": "older EMA + CFG", **OLDER, "tune": TUNED_BOTH},
        {"name": "IG + Autoguidance", "weak": "small", **BESIDE_IG, "tune": TUNED_BOTH},
        {"name": "IG + older EMA", **OLDER, **BESIDE_IG, "tune": TUNED_BOTH},
    ),
    "expect": (
        _expect("IG", "none", 0.1),
        _expect("CFG", "none", 0.05, "Ho & Salimans 2022"),
        _expect("Autoguidance", "none", 0.05, "Karras et al. 2024"),
        _expect("older EMA", "none", 0.0, "Karras et al. 2024: an under-trained guide helps"),
        _expect("IG", "Autoguidance", 0.0, "IG paper, Table 4"),
        _expect("IG + CFG", "IG", 0.0, "IG paper: 1.75 to 1.46"),
        _expect("IG + Autoguidance", "IG", 0.0, "two weak predictions say more than one"),
        _expect("CFG", "none", 0.01, "Ho & Salimans 2022", metric="label_accuracy"),
    ),
}

_SHALLOW_QUESTION = {
    "name": "shallow",
    "asks": "Can the null branch of CFG stop at the auxiliary head, and need it IG?",
    "arms": (
        {"name": "CFG", "tune": TUNED_S},
        {"name": "shallow", **SHALLOW, "tune": TUNED_S},
        {"name": "IG + CFG", "tune": TUNED_BOTH},
        {"name": "IG + shallow", **SHALLOW, "tune": TUNED_BOTH},
        {
            "name": "IG + CFG, null without IG",
            "guidance.ig_null_scale": "1",
            "tune": TUNED_BOTH,
        },
    ),
    "expect": (
        _expect("shallow", "CFG", -0.1, "asked of the authors (issue 2 of their repository)"),
        _expect("IG + shallow", "IG + CFG", -0.1, "asked of the authors"),
        _expect("IG + CFG, null without IG", "IG + CFG", -0.1, "RAEv2 gives it its own scale"),
    ),
}

_SOURCES = (
    ("head", "ig", {}),
    ("null", "cfg", {}),
    ("shallow", "cfg", SHALLOW),
    ("weaker", "ig", {"weak": "small"}),
)
_RULES = {
    "name": "rules",
    "asks": "Which rule of extrapolation for which weak source (scale 1.5)?",
    "arms": tuple(
        {
            "name": f"{source}, {rule}",
            **changes,
            f"guidance.{part}_scale": 1.5,
            f"guidance.{part}_rule": rule,
        }
        for source, part, changes in _SOURCES
        for rule in ("linear", "projected", "zero_star", "tangential", "rescaled")
    ),
    "expect": (
        _expect("head, projected", "head, linear", 0.0, "nobody has tried; Sadat et al. 2024"),
        _expect("head, zero_star", "head, linear", 0.0, "nobody has tried; Fan et al. 2025"),
        _expect("null, projected", "null, linear", 0.0, "Sadat et al. 2024, at high scales"),
        _expect("null, zero_star", "null, linear", 0.0, "Fan et al. 2025"),
    ),
}

_HEADS = {
    "name": "heads",
    "asks": "Several heads (after blocks 1, 2, 4): which one guides best, at which noise?",
    "arms": (
        *(
            {
                "name": f"block {k}{where}",
                "train": "heads_124",
                "guidance.ig_source": f"auxiliary(head={i})",
                "guidance.ig_interval": interval,
                "tune": TUNED_W,
            }
            for where, interval in (
                ("", (0.0, 1.0)),
                (" on [0.5, 1]", (0.5, 1.0)),
                (" on [0, 0.5]", (0.0, 0.5)),
            )
            for i, k in enumerate((1, 2, 4))
        ),
        {
            "name": "blocks 1 and 4",
            "train": "heads_124",
            "guidance.ig_source": "auxiliary(head=0)",
            "guidance.cfg_source": "auxiliary(head=2)",
            "tune": TUNED_BOTH,
        },
    ),
    "expect": (
        _expect("block 2", "block 4", 0.0, "IG paper: late heads hurt"),
        _expect("blocks 1 and 4", "block 2", 0.0, "two weak predictions say more than one"),
        _expect("block 1 on [0.5, 1]", "block 4 on [0.5, 1]", 0.0, "high noise needs few blocks"),
        _expect("block 4 on [0, 0.5]", "block 1 on [0, 0.5]", 0.0, "low noise needs many"),
    ),
}

_FAMILIES = {
    "no guidance": {},
    "IG": {"guidance.ig_scale": 1.5},
    "CFG": {"guidance.cfg_scale": 1.5},
    "shallow": {"guidance.cfg_scale": 1.5, **SHALLOW},
    "Autoguidance": {"guidance.ig_scale": 1.5, "weak": "small"},
    "older EMA": {"guidance.ig_scale": 1.5, **OLDER},
    "IG + CFG": {"guidance.ig_scale": 1.5, "guidance.cfg_scale": 1.25},
    "IG + shallow": {"guidance.ig_scale": 1.5, "guidance.cfg_scale": 1.25, **SHALLOW},
}
_COST = {
    "name": "cost",
    "asks": "What is the best use of so many forward passes (w 1.5; s 1.5, or 1.25 with IG)?",
    "arms": tuple(
        {"name": f"{name}, {n} steps", "family": name, "sampler.num_steps": n, **changes}
        for name, changes in _FAMILIES.items()
        for n in (4, 8, 16)
    ),
    "expect": (
        _expect("IG, 16 steps", "CFG, 8 steps", 0.1, "IG paper: IG costs no pass"),
        _expect("IG, 16 steps", "Autoguidance, 16 steps", 0.0, "IG paper, and cheaper"),
        _expect("IG, 16 steps", "IG + CFG, 8 steps", 0.0, "steps matter at this cost"),
        _expect("IG, 8 steps", "no guidance, 16 steps", 0.0, "IG is worth more than steps"),
    ),
}

# From noise to data in 16 intervals, of which every other or third runs the whole network.
_REUSE = {
    "name": "reuse",
    "asks": "Can most steps stop at the auxiliary head and reuse its last difference (w = 1.5)?",
    "arms": tuple(
        {"name": name, "guidance.ig_scale": 1.5, "sampler.name": sampler, "sampler.num_steps": n}
        for name, sampler, n in (
            ("Euler, 16 steps", "euler", 16),
            ("Euler, 11 steps", "euler", 11),
            ("Euler, 9 steps", "euler", 9),
            ("ab2, 11 steps", "ab2", 11),
            ("reuse, 1 of 2", "reuse(every=2)", 16),
            ("reuse, 1 of 3", "reuse(every=3)", 16),
            ("order 1, 1 of 2", "reuse(every=2, order=1)", 16),
        )
    ),
    "expect": (
        _expect("reuse, 1 of 2", "Euler, 16 steps", -0.05, "the difference changes slowly"),
        _expect("reuse, 1 of 2", "Euler, 11 steps", 0.0, "arXiv 2503.06923, at equal cost"),
        _expect("reuse, 1 of 3", "Euler, 9 steps", 0.0, "arXiv 2503.06923, at equal cost"),
        _expect("order 1, 1 of 2", "reuse, 1 of 2", 0.0, "arXiv 2503.06923: forecast, not reuse"),
        _expect("reuse, 1 of 2", "ab2, 11 steps", 0.0, "or else a better solver does it"),
    ),
}

_SINCE_SSG = "arXiv 2607.29122: own samples are better than real ones"
_OWN = {
    "name": "own",
    "asks": "Of a trained network's head alone: learn from real digits, or from its own samples?",
    "arms": (
        {"name": "no head", "train": "plain"},
        {"name": "trained together, best w", "tune": TUNED_W},
        {"name": "on real digits, best w", "train": "head_on_digits", "tune": TUNED_W},
        {"name": "on own samples, best w", "train": "head_on_own_samples", "tune": TUNED_W},
    ),
    "expect": (
        _expect("on own samples, best w", "on real digits, best w", 0.0, _SINCE_SSG),
        _expect("on real digits, best w", "no head", 0.1, "a head needs no part in the training"),
        _expect("trained together, best w", "on real digits, best w", 0.0, "IG paper: it helps"),
    ),
}

_RECIPE = {
    "name": "recipe",
    "asks": "RAEv2's recipe: data predicted, errors as velocity, lognormal times, λ = 1?",
    "arms": (*_by_w("SiT's recipe"), *_by_w("RAEv2's", train="raev2")),
    "expect": (
        _expect("RAEv2's, best w", "SiT's recipe, best w", 0.0, "arXiv 2605.18324, on features"),
        _expect("RAEv2's, best w", "RAEv2's, w = 1", 0.1, "arXiv 2605.18324: w 1.78 without CFG"),
    ),
}

_LABELS = {
    "name": "labels",
    "asks": "Do balanced labels flatter the distance (w = 2)?",
    "arms": tuple(
        {"name": name, "guidance.ig_scale": 2.0, "sampler.labels": name}
        for name in ("balanced", "random")
    ),
    "expect": (_expect("balanced", "random", 0.0, "IG paper: 1.19 random, 1.07 balanced"),),
}

QUESTIONS = (
    _SCALE,
    _METHODS,
    _COST,
    _REUSE,
    _SHALLOW_QUESTION,
    _INTERVAL,
    _INTERVAL_MOVED,
    _DEPTH,
    _APART,
    _TARGET,
    _RULES,
    _LAMBDA,
    _HEADS,
    _OWN,
    _RECIPE,
    _LABELS,
)


def get_config():
    """Returns the config of the main network, with the questions."""
    config = default_config("sit", "s")
    config.model.update(
        width=64,
        depth=6,
        heads=4,
        auxiliary_depth=2,
        input_size=8,
        channels=1,
        patch_size=4,
        num_classes=10,
    )
    config.data.update(name="digits", image_size=8, num_validation=180, autoencoder="")
    config.optimizer.update(learning_rate=4e-3, schedule="cosine", warmup_steps=50)
    config.train.update(
        batch_size=64,
        num_steps=500,
        ema_decay=0.99,
        log_every=100,
        validate_every=0,
        sample_every=0,
        checkpoint_every=250,
        max_to_keep=2,
    )
    # As many own samples as there are digits, 180 of them to validate with.
    config.sampler.update(name="ab2", num_steps=10, num_samples=1797, batch_size=256)
    config.sampler.labels = "balanced"
    config.evaluation.num_samples = 768
    config.ablation.update(
        trainings=TRAININGS,
        questions=QUESTIONS,
        metrics=("fid", "label_accuracy", "precision", "recall"),
        fast=(2, 24, 128),
    )
    return config
