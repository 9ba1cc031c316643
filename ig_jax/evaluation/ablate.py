"""`--mode=ablate`: small questions put to small networks. Trains what the config's questions name,
draws from common noise, and writes a table a question, and what became of what was expected.

Trainings and scores lie in the workdir and are shared between questions, so that a stopped run goes
on, and a new question costs only what is new about it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError, check_choice
from ig_jax.evaluation import answers, report
from ig_jax.evaluation.metrics import METRICS
from ig_jax.evaluation.questions import (
    MAIN,
    START,
    Arm,
    Changes,
    Question,
    Values,
    choose,
    questions,
    trainings,
)
from ig_jax.evaluation.report import Result
from ig_jax.evaluation.run import Evaluator
from ig_jax.experiment import Experiment
from ig_jax.parallel import hosts
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.record import Weights
from ig_jax.sampling.engine import Engine
from ig_jax.sampling.labels import label_rule
from ig_jax.sampling.run import make_engine, open_weights
from ig_jax.storage import files
from ig_jax.storage.checkpoints import FOLDER, find_step, saved_config
from ig_jax.training import run as training
from ig_jax.training.setup import Programs, compile_ahead

# What a result's record calls the forward passes per sample.
COST = "forward_passes"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What draws an arm's samples of one seed.

    Attributes:
        experiment: the config, with the arm's guidance and sampler, and its parts.
        weights: the network's.
        engine: the sampler, with the weaker network if the arm has one.
        guidance: the setting.
    """

    experiment: Experiment
    weights: Weights
    engine: Engine
    guidance: GuidanceOptions


class Laboratory:
    """Networks of several seeds, trained when first asked for, and scores of their samples.

    Args:
        config: the main network's, with the questions in `config.ablation`.
        workdir: networks go to its folder `trained`, scores to `scores`.

    Attributes:
        questions: what is asked.
        seeds: of training, labels and noise: common to all that is compared.
        metrics: names of the metrics that are shown, the one that decides first.

    Raises:
        InputError: before anything is written or compiled: a question that names what there is
            not, a setting that its network cannot do, or a config that does not fit the data.
    """

    def __init__(self, config: ConfigDict, workdir: str):
        self.questions, self._trainings = questions(config), trainings(config)
        config_lib.check_choice(config, "ablation.metrics", METRICS)
        if not config.ablation.metrics:
            raise InputError("config.ablation.metrics is empty: expected at least one metric")
        self.metrics = config.ablation.metrics
        self.seeds = tuple(range(config.seed, config.seed + config.ablation.seeds))
        self._folder = resolve(workdir)
        self._base = config.copy_and_resolve_references()
        self._base.ablation.update(questions=(), trainings=())
        # An arm says all of its guidance; networks without a head are trained, too.
        self._base.guidance.update(dataclasses.asdict(GuidanceOptions()))
        self._base.train.sample_every = 0
        self._base.evaluation.update(ig_scales=(), every=0, at_end=False)
        for arm in (arm for question in self.questions for arm in question.arms):
            for changes in arm.candidates():
                config_lib.validate(self.config(arm, changes, self.seeds[0]))
        self._experiment = Experiment.from_config(self.config(Arm(MAIN), {}, self.seeds[0]))
        self._source = self._experiment.open_data()
        self._models: dict[tuple[str, int], tuple[Experiment, Weights]] = {}
        self._engines: dict[str, Engine] = {}
        self._programs: dict[str, Programs] = {}  # of all seeds of a training
        self._compiling: dict[str, futures.Future[Programs]] = {}

    def config(self, arm: Arm, changes: Changes, seed: int) -> ConfigDict:
        """The config of an arm's network of a seed, sampled with some changes."""
        config = self._base.copy_and_resolve_references()
        config.seed = seed
        with config.ignore_type():  # a field may be of several; `validate` looks
            for path, value in {**self._trainings[arm.train], **changes}.items():
                section, name = path.split(".")
                config[section][name] = value
        if start := self._trainings[arm.train].get(START):
            config.train.init_from = self._workdir(start, seed)
        if config.data.name == "samples":  # its own, drawn before it is trained
            config.data.path = str(resolve(self._workdir(arm.train, seed)) / "own")
        if arm.weak:
            config.guidance.weak = self._workdir(arm.weak, seed)
        return config

    def _workdir(self, name: str, seed: int) -> str:
        return str(self._folder / "trained" / f"{name}-{seed}")

    def train(self, name: str, seed: int) -> str:
        """The workdir of a training, which is run, or finished, unless that is done.

        Raises `InputError` for a workdir that holds another training.
        """
        if start := self._trainings[name].get(START):
            self.train(start, seed)
        workdir, config = self._workdir(name, seed), self.config(Arm(name, name), {}, seed)
        if not hosts.primary_says(self._is_trained(name, seed)):
            if name in self._compiling:
                self._programs[name] = self._compiling.pop(name).result()
            trained = training.train(config, workdir, programs=self._programs.get(name))
            self._programs[name] = trained.programs
        return workdir

    def _is_trained(self, name: str, seed: int) -> bool:
        workdir, config = self._workdir(name, seed), self.config(Arm(name, name), {}, seed)
        there = (resolve(workdir) / FOLDER).exists() and find_step(workdir)
        if there and there > config.train.num_steps:
            raise InputError(
                f"{workdir} holds step {there}: expected at most {config.train.num_steps}, which "
                f"the training {name!r} has here (another workdir, or remove this one)"
            )
        same = there and not config_lib.differences(config, saved_config(workdir))
        return bool(same and there == config.train.num_steps)

    @contextlib.contextmanager
    def compiling_ahead(self) -> Iterator[None]:
        """Inside, a thread compiles what is still to be trained, in the order of the questions.

        That takes one core most of the time, and small networks' steps take little of the others.
        """
        pool = futures.ThreadPoolExecutor(1, "compiling")
        try:
            for name in self._to_train():
                self._compiling[name] = pool.submit(self._compiled, name)
            yield
        finally:
            pool.shutdown(cancel_futures=True)
            self._compiling.clear()

    def _compiled(self, name: str) -> Programs:
        config = self.config(Arm(name, name), {}, self.seeds[0])
        return compile_ahead(Experiment.from_config(config))

    def _to_train(self) -> Iterator[str]:
        """What is not trained yet, in the order of the questions; a training on own samples is left
        out, since those are still to be drawn."""
        arms = [arm for question in self.questions for arm in question.arms]
        asked = [name for arm in arms for name in (arm.train, arm.weak) if name]
        starts = [(self._trainings[name].get(START, name), name) for name in asked]
        for name in dict.fromkeys(name for pair in starts for name in pair):
            done = hosts.primary_says(all(self._is_trained(name, seed) for seed in self.seeds))
            own = self.config(Arm(name, name), {}, self.seeds[0]).data.name == "samples"
            if not done and not own:
                yield name

    def _model(self, name: str, seed: int) -> tuple[Experiment, Weights]:
        if (name, seed) not in self._models:
            workdir = self.train(name, seed)
            experiment = Experiment.from_config(self.config(Arm(name, name), {}, seed))
            self._models[name, seed] = experiment, open_weights(experiment, workdir)
        return self._models[name, seed]

    def drawing(self, arm: Arm, changes: Changes, seed: int) -> Drawing:
        """What draws an arm's samples of a seed; trains what is not trained yet."""
        experiment, weights = self._model(arm.train, seed)
        if arm.weak:
            self.train(arm.weak, seed)
        config = self.config(arm, changes, seed)
        experiment = dataclasses.replace(experiment, config=config)
        if not config.sampler.ema:
            weights = open_weights(experiment, self._workdir(arm.train, seed))
        weak = config.guidance.weak, config.guidance.weak_step
        key = files.json_digest([arm.train, seed, *weak, config_lib.to_json(config)["sampler"]])
        if key not in self._engines:
            self._engines[key] = make_engine(experiment)
        guidance = GuidanceOptions.of(config.guidance)
        return Drawing(experiment, weights, self._engines[key], guidance)

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        """Scores all samples alike, against the main network's data set."""
        counts = {"evaluation.num_samples": self._base.evaluation.num_samples}
        found = Evaluator.create(self._experiment, self._source, counts, self._folder)
        for name in self.metrics:
            check_choice("config.ablation.metrics", name, found.scorer.metrics)
        return found

    def _facts(self, arm: Arm, changes: Changes, seed: int) -> dict[str, Any]:
        """What an arm's samples depend on, in plain values: not where that lies."""
        values = config_lib.to_json(self.config(arm, changes, seed))
        values["data"]["path"] = values["train"]["init_from"] = values["guidance"]["weak"] = ""
        facts = {k: v for k, v in values.items() if k not in ("ablation", "sweep", "mesh")}
        others = {"weak": arm.weak, "start": self._trainings[arm.train].get(START)}
        named = {k: self._facts(Arm(name, name), {}, seed) for k, name in others.items() if name}
        return facts | named

    def result(self, arm: Arm, changes: Changes, seed: int) -> Result:
        """The scores of an arm's samples of a seed: drawn now, or read if they were before."""
        scorer = self._evaluator.scorer
        facts = [
            self._facts(arm, changes, seed),
            sorted(self.metrics),
            scorer.extractor.fingerprint,
            scorer.reference.metadata["hash"],
        ]
        file = self._folder / "scores" / f"{files.json_digest(facts)[:16]}.json"
        # The primary's view decides: the others must not draw what it reads, or wait for it.
        if hosts.primary_says(file.exists()):
            return report.load(file)[0]
        result = self._score(self.drawing(arm, changes, seed))
        if is_primary():
            report.save(file, [result])
        return result

    def _score(self, drawing: Drawing) -> Result:
        experiment, engine = drawing.experiment, drawing.engine
        evaluator = dataclasses.replace(self._evaluator, experiment=experiment, engine=engine)
        config = experiment.config
        rule = label_rule(config, self._source.class_names)
        count = config.evaluation.num_samples
        result = evaluator.result(
            drawing.weights, drawing.guidance, rule, config.seed, count, names=self.metrics
        )
        cost = engine.forward_passes(experiment.spec, drawing.guidance.build(engine.weaker))
        return dataclasses.replace(result, protocol=result.protocol | {COST: cost})

    def values(self, arm: Arm, advance: Callable[..., None] = lambda *_: None) -> Values:
        """An arm's values by seed; of one that is tuned those of what the other seeds chose."""
        candidates, found = arm.candidates(), []
        for changes in candidates:
            found.append([])
            for seed in self.seeds:
                found[-1].append(self.result(arm, changes, seed))
                advance()
        first = self.metrics[0]
        deciding = np.array([[r.metrics[first] for r in row] for row in found])
        picks = choose(deciding, METRICS[first].better)
        chosen = [found[pick][i] for i, pick in enumerate(picks)]
        return Values(
            metrics={n: np.array([r.metrics[n] for r in chosen]) for n in chosen[0].metrics},
            cost=np.array([r.protocol[COST] for r in chosen]),
            chosen=tuple({k: candidates[pick][k] for k in arm.tune} for pick in picks),
        )

    def answer(self, question: Question) -> answers.Answer:
        """The values of all arms of a question, and what became of what was expected."""
        total = len(self.seeds) * sum(len(arm.candidates()) for arm in question.arms)
        with console.progress_bar(total, question.name) as advance:
            values = {arm.name: self.values(arm, advance) for arm in question.arms}
        return answers.Answer.of(question, values, self.metrics)


# Fields that count steps of training.
_STEPS = (
    "train.num_steps",
    "train.checkpoint_every",
    "optimizer.warmup_steps",
    "loss.guided_target_start",
)


def fast(config: ConfigDict) -> ConfigDict:
    """The config with the seeds, training steps and samples of `config.ablation.fast`.

    Whatever else counts steps shrinks in proportion; of an arm that is tuned the first and the last
    of its values are left to choose from.
    """
    config = config.copy_and_resolve_references()
    seeds, steps, samples = config.ablation.fast
    share = steps / config.train.num_steps

    def shorter(changes: Mapping[str, Any]) -> dict[str, Any]:
        scaled = {n: round(share * v) for n, v in changes.items() if n in _STEPS}
        older = "guidance.weak_step"
        if older in changes:
            scaled[older] = str(round(share * int(changes[older])))
        if "tune" in changes:
            scaled["tune"] = {n: (v[0], v[-1]) for n, v in changes["tune"].items()}
        return {**changes, **scaled}

    config.ablation.update(
        seeds=seeds,
        trainings=tuple(map(shorter, config.ablation.trainings)),
        questions=tuple(
            {**question, "arms": tuple(map(shorter, question["arms"]))}
            for question in config.ablation.questions
        ),
    )
    config.update_from_flattened_dict(shorter({n: config_lib.at(config, n) for n in _STEPS}))
    config.evaluation.num_samples = samples
    # A batch that is not full costs as much as a full one.
    config.sampler.batch_size = min(config.sampler.batch_size, samples)
    return config


def run(config: ConfigDict, workdir: str) -> str:
    """`--mode=ablate`: asks every question of `config.ablation`; writes after each what is known.

    `ablation.md`, `ablation.json` and, at the end, two figures go into the workdir. Raises
    `InputError`, and what `training.run.train` raises.
    """
    laboratory = Laboratory(config, workdir)
    found: list[answers.Answer] = []
    with laboratory.compiling_ahead():
        for question in laboratory.questions:
            found.append(laboratory.answer(question))
            if is_primary():
                answers.print_answer(found[-1])
                answers.save(workdir, found, config)
    if is_primary():
        answers.draw(workdir, found)
    verdicts = [verdict.word for answer in found for verdict in answer.verdicts]
    said = ", ".join(f"{verdicts.count(w)} {w}" for w in ("held", "not held", "undecided"))
    where = f"tables and figures: {workdir}/ablation.md"
    return f"{len(found)} questions, expectations: {said}; {where}"
