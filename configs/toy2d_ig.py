"""Internal guidance on points of the plane: a fractal tree of two classes, as in the IG paper's
Fig. 2, where every sample can be seen and the density is known. --mode=toy draws the figure."""

from ig_jax.config import default_config


def get_config():
    """Returns the config of the toy: a residual MLP with an auxiliary head, SiT's loss."""
    config = default_config("mlp", "s")
    config.model.update(width=64, depth=4, auxiliary_depth=1, channels=2, num_classes=2)
    config.model.scan_blocks = False  # a quarter faster on a CPU, and four blocks compile soon
    # The tree's branches are a hundredth of its width: what counts happens at little noise.
    config.loss.times = "lognormal(shift=0.1)"
    config.data.update(name="toy2d", num_validation=1024, autoencoder="")
    config.optimizer.update(learning_rate=5e-3, schedule="cosine", warmup_steps=50, b2=0.99)
    config.train.update(
        batch_size=1024,
        num_steps=1000,
        ema_decay=0.99,
        log_every=100,
        validate_every=0,
        sample_every=1000,
        checkpoint_every=1000,
    )
    config.guidance.update(ig_scale=W, cfg_scale=1.5)
    config.sampler.update(
        name="heun", num_steps=16, time_shift=0.1, num_samples=4096, batch_size=4096
    )
    config.sampler.labels = "balanced"
    config.evaluation.update(num_samples=4096, ig_scales=(0.0, 1.0, 1.5, 2.0, 2.5, 3.0))
    config.ablation.update(
        seeds=5,
        metrics=("outlier_rate", "label_accuracy", "coverage"),
        trainings=(SMALLER,),
        questions=(METHODS, REUSE),
        fast=(2, 200, 1024),
    )
    return config


# Autoguidance's network: narrower, shallower, and trained for less.
SMALLER = {
    "name": "smaller",
    "model.auxiliary_depth": 0,
    "model.width": 32,
    "model.depth": 2,
    "train.num_steps": 400,
    "train.checkpoint_every": 400,
}

W, S = 3.0, 1.5
_SINCE = "IG paper, Fig. 2"
METHODS = {
    "name": "methods",
    "asks": f"What does guidance do to points of the tree (w = {W:g}, CFG {S:g})?",
    "arms": (
        {"name": "final head"},
        {"name": "auxiliary head", "guidance.ig_scale": 0.0},
        {"name": "CFG", "guidance.cfg_scale": S},
        {"name": "IG", "guidance.ig_scale": W},
        {"name": "IG + CFG", "guidance.ig_scale": W, "guidance.cfg_scale": S},
        {"name": "Autoguidance", "guidance.ig_scale": W, "weak": "smaller"},
    ),
    "expect": (
        {"better": "IG", "than": "final head", "by": 0.2, "since": _SINCE},
        {"better": "final head", "than": "auxiliary head", "by": 0.1, "since": _SINCE},
        {"better": "IG + CFG", "than": "CFG", "by": 0.2, "since": _SINCE},
        {"better": "Autoguidance", "than": "final head", "by": 0.2, "since": "Karras et al. 2024"},
        {
            "better": "CFG",
            "than": "final head",
            "since": _SINCE,
            "metric": "label_accuracy",
        },
        {
            "better": "final head",
            "than": "CFG",
            "since": "IG paper, Fig. 2: CFG costs diversity",
            "metric": "coverage",
        },
        {
            "better": "IG",
            "than": "final head",
            "by": -0.02,
            "since": "IG paper, Fig. 2: IG keeps it",
            "metric": "coverage",
        },
    ),
}

# 31 evaluations, as the 16 steps of Heun's method make.
_EVALUATIONS = 31
REUSE = {
    "name": "reuse",
    "asks": f"Can most steps stop at the auxiliary head and reuse its last difference (w = {W:g})?",
    "arms": tuple(
        {"name": name, "guidance.ig_scale": W, "sampler.name": sampler, "sampler.num_steps": steps}
        for name, sampler, steps in (
            ("Euler, 31 steps", "euler", _EVALUATIONS),
            ("Euler, 20 steps", "euler", 20),
            ("ab2, 20 steps", "ab2", 20),
            ("reuse, 1 of 2", "reuse(every=2)", _EVALUATIONS),
            ("order 1, 1 of 2", "reuse(every=2, order=1)", _EVALUATIONS),
        )
    ),
    "expect": (
        {
            "better": "reuse, 1 of 2",
            "than": "Euler, 31 steps",
            "by": -0.05,
            "since": "the difference changes slowly",
        },
        {
            "better": "reuse, 1 of 2",
            "than": "Euler, 20 steps",
            "since": "arXiv 2503.06923, at equal cost",
        },
        {
            "better": "order 1, 1 of 2",
            "than": "reuse, 1 of 2",
            "since": "arXiv 2503.06923: forecast, not reuse",
        },
        {
            "better": "reuse, 1 of 2",
            "than": "ab2, 20 steps",
            "since": "or else a better solver does it",
        },
    ),
}
