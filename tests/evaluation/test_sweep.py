"""The guidance search: its plan, its race, its stops, and what it writes."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from ig_jax import config as config_lib
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError
from ig_jax.evaluation import metrics, race, sweep
from ig_jax.evaluation import run as evaluation
from ig_jax.evaluation.extractors import DigitsExtractor, digits_images
from ig_jax.evaluation.features import FeatureSet
from ig_jax.evaluation.metrics import METRICS, Metric
from ig_jax.evaluation.race import Entry, Round
from ig_jax.evaluation.statistics import gaussian_statistics
from ig_jax.experiment import Experiment
from ig_jax.record import Weights
from ig_jax.sampling.run import open_weights
from tests.evaluation.common import STEP, save_checkpoint, tiny_config, tiny_params

FILES = ("best.json", "sweep.csv", "sweep.json")


def changed(**fields):
    config = tiny_config()
    config.sweep.update(fields)
    return config


class TestSettings:
    def test_all_combinations(self):
        config = changed(
            ig_scales=(1.5, 2.0),
            ig_intervals=(0.0, 1.0, 0.3, 1.0),
            cfg_scales=(1.2, 1.4),
            cfg_intervals=(0.0, 0.5, 0.0, 0.7),
        )
        settings = sweep.settings_of(config)
        assert len(settings) == len(set(settings)) == 16
        assert GuidanceOptions(2.0, (0.3, 1.0), 1.4, (0.0, 0.7)) in settings

    def test_intervals_mean_nothing_at_scale_one(self):
        config = changed(
            ig_scales=(1.0, 2.0),
            ig_intervals=(0.0, 1.0, 0.3, 1.0),
            cfg_scales=(1.0,),
            cfg_intervals=(0.0, 0.5, 0.0, 0.7),
        )
        assert sweep.settings_of(config) == [
            GuidanceOptions(1.0),
            GuidanceOptions(2.0),
            GuidanceOptions(2.0, (0.3, 1.0)),
        ]

    def test_rules_sources_and_ramps(self):
        config = changed(
            ig_scales=(1.0, 2.0),
            ig_intervals=(0.3, 1.0),
            ig_schedules=("ramp(start=0.3)",),
            ig_sources=("auxiliary", "weaker"),
            ig_rules=("linear", "projected(eta=0.5)"),
            cfg_scales=(1.5,),
            cfg_sources=("null", "shallow"),
            cfg_rules=("zero_star",),
            cfg_schedules=("ramp",),
            cfg_intervals=(),
        )
        config_lib.validate(config)
        settings = sweep.settings_of(config)
        cfg = dict(cfg_scale=1.5, cfg_rule="zero_star", cfg_schedule="ramp")
        # 2 sources x 2 rules x (interval, ramp) at scale 2 and one setting without IG, twice.
        assert len(settings) == len(set(settings)) == 2 * (2 * 2 * 2 + 1)
        assert GuidanceOptions(**cfg) in settings
        assert (
            GuidanceOptions(
                2.0, (0.3, 1.0), ig_source="weaker", ig_rule="projected(eta=0.5)", **cfg
            )
            in settings
        )
        ramp = dict(ig_source="auxiliary", ig_schedule="ramp(start=0.3)", cfg_source="shallow")
        assert GuidanceOptions(2.0, **ramp, **cfg) in settings

    def test_what_is_not_listed_is_the_configs(self):
        config = changed(ig_scales=(2.0,), ig_intervals=(0.0, 1.0, 0.3, 1.0))
        config.guidance.update(ig_rule="zero_star", ig_schedule="ramp", cfg_source="shallow")
        own = dict(ig_rule="zero_star", ig_schedule="ramp", cfg_source="shallow")
        assert sweep.settings_of(config) == [GuidanceOptions(2.0, **own)]


class TestPlan:
    @pytest.mark.parametrize("settings", [2, 3, 7, 22, 60, 300])
    @pytest.mark.parametrize("num_samples", [2048, 10_000])
    @pytest.mark.parametrize("batch_size", [64, 256])
    def test_fits_the_budget(self, settings, num_samples, batch_size):
        share = 0.3 if settings > 15 else 1.6
        budget = int(share * settings * num_samples)
        rounds = race.plan_rounds(settings, num_samples, budget, batch_size)
        assert race.cost(rounds, num_samples) <= budget
        assert rounds[0].settings == settings
        assert rounds[-1].settings == 2 or len(rounds) == 1
        assert rounds[-1].samples == num_samples
        for a, b in zip(rounds, rounds[1:], strict=False):
            assert a.settings > b.settings and a.samples < b.samples
            assert a.samples % batch_size == 0 or a.samples == num_samples

    def test_cost_counts_every_sample_once(self):
        assert race.cost([Round(10, 100), Round(2, 300)], 50) == 10 * 100 + 2 * 200 + 50

    def test_more_budget_begins_with_more_samples(self):
        small, large = (race.plan_rounds(20, 4096, b, 256) for b in (25_000, 60_000))
        assert large[0].samples > small[0].samples

    def test_a_large_budget_makes_it_the_full_grid(self):
        assert race.plan_rounds(22, 2048, 23 * 2048, 256) == [Round(22, 2048)]

    def test_small_grids_need_no_budget(self):
        """Three settings cannot do with 30 % of their grid; nobody who named no budget is told."""
        rounds = race.plan_rounds(3, 1024, 0, 256)
        assert rounds == [Round(3, 256), Round(2, 1024)]
        assert race.plan_rounds(1, 1024, 0, 256) == [Round(1, 1024)]

    def test_thirty_percent_without_a_budget(self):
        rounds = race.plan_rounds(22, 2048, 0, 256)
        assert rounds == race.plan_rounds(22, 2048, int(0.3 * 22 * 2048), 256)

    def test_impossible(self):
        with pytest.raises(InputError, match=r"budget is 100 samples.*at least \d+"):
            race.plan_rounds(20, 1024, 100, 64)


class TestRace:
    SETTINGS = [GuidanceOptions(1 + i / 10) for i in range(20)]
    ROUNDS = [Round(20, 100), Round(7, 400), Round(2, 1600)]

    def run(self, sign, metric):
        asked = []

        def measure(guidance, count):
            asked.append((guidance, count))
            # A bias by the number of samples, the same for all, as a Fréchet distance has.
            return {metric: sign * ((guidance.ig_scale - 1.72) ** 2 + 100 / count)}

        return race.race(self.SETTINGS, self.ROUNDS, measure, metric), asked

    @pytest.mark.parametrize("sign, metric", [(1, "fid"), (-1, "inception_score")])
    def test_finds_the_best(self, sign, metric):
        entries, asked = self.run(sign, metric)
        order = sorted(self.SETTINGS, key=lambda g: abs(g.ig_scale - 1.72))
        assert [entry.guidance for entry in entries] == order
        assert len(asked) == 20 + 7 + 2

    def test_few_samples_on_poor_settings(self):
        entries, _ = self.run(1, "fid")
        assert [entry.samples for entry in entries] == [
            *[(100, 400, 1600)] * 2,
            *[(100, 400)] * 5,
            *[(100,)] * 13,
        ]


class TestOnDistances:
    """Races on Fréchet distances of distorted real digits, whose best setting lies inside."""

    SETTINGS = [GuidanceOptions(1 + i / 10) for i in range(24)]

    @pytest.fixture(scope="class")
    def distance(self):
        real = DigitsExtractor()(digits_images()[0]).pool
        reference = gaussian_statistics(real)

        def measure(guidance, count, seed):
            generator = np.random.default_rng(seed)
            rows = real[generator.integers(len(real), size=2048)][:count]
            noise = generator.standard_normal((2048, real.shape[1]))[:count]
            # Sharper with scale, as guidance makes samples, and a little off everywhere.
            spread = 1.15 - 0.1 * guidance.ig_scale
            drawn = reference.mean + spread * (rows - reference.mean) + 0.05 * noise
            return metrics.frechet_distance(gaussian_statistics(drawn), reference)

        return measure

    def test_as_good_as_the_full_grid_for_thirty_percent(self, distance):
        rounds = race.plan_rounds(len(self.SETTINGS), 2048, 0, 256)
        assert race.cost(rounds, 2048) <= 0.3 * len(self.SETTINGS) * 2048
        regrets = []
        for seed in range(6):

            def measure(guidance, count, seed=seed):
                return {"fid": distance(guidance, count, seed)}

            winner = race.race(self.SETTINGS, rounds, measure, "fid")[0].guidance
            grid = {guidance: distance(guidance, 2048, 100 + seed) for guidance in self.SETTINGS}
            best = min(grid.values())
            assert np.median(list(grid.values())) > 1.5 * best  # there is something to find
            regrets.append(grid[winner] / best - 1)
        # Also the full grid's own winner is now and then not the best on fresh noise.
        assert np.mean(regrets) < 0.015 and max(regrets) < 0.06


class Stop(Exception):
    """Stands for the moment at which a search is stopped."""


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return Experiment.from_config(tiny_config())


@pytest.fixture(scope="module")
def trained(experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    save_checkpoint(experiment, tiny_params(experiment), folder)
    return folder


@pytest.fixture(scope="module")
def finished(experiment, trained):
    """A workdir with a finished search, and the last line that it printed."""
    return trained, sweep.run(experiment.config, str(trained))


def count_draws(monkeypatch, stop_after=None):
    """Records every draw of samples; optionally raises once there were `stop_after`."""
    drawn = []
    original = evaluation.Evaluator.sample_features

    def counted(self, params, guidance, indices, *rest, **options):
        if len(drawn) == stop_after:
            raise Stop
        drawn.append((guidance, indices))
        return original(self, params, guidance, indices, *rest, **options)

    monkeypatch.setattr(evaluation.Evaluator, "sample_features", counted)
    return drawn


class TestSearch:
    def test_results(self, finished, experiment):
        workdir, line = finished
        best = json.loads((workdir / "sweep" / "best.json").read_text())
        rows = list(csv.DictReader((workdir / "sweep" / "sweep.csv").open()))
        settings = sweep.settings_of(experiment.config)
        assert len(rows) == len(settings) == 7
        assert [row["rank"] for row in rows] == [str(i + 1) for i in range(7)]
        assert float(rows[0]["ig_scale"]) == best["guidance"]["ig_scale"]
        assert float(rows[0]["standard_error"]) > 0 and rows[-1]["standard_error"] == ""
        assert int(rows[0]["samples"]) == 256 > int(rows[-1]["samples"])
        assert best["samples_drawn"] <= experiment.config.sweep.budget
        assert best["fresh"]["protocol"]["seed"] == experiment.config.sweep.seed + 1
        assert best["fresh"]["protocol"]["checkpoint_step"] == STEP
        assert (workdir / "sweep" / "sweep.png").stat().st_size > 10_000
        assert "best: IG" in line and "on fresh noise" in line

    def test_the_best_is_the_grids(self, finished, experiment):
        """The winner's value is that of scoring it directly, and no finalist's is lower."""
        workdir, _ = finished
        table = json.loads((workdir / "sweep" / "sweep.json").read_text())["settings"]
        best = sweep.load_best(workdir)
        config = copy.deepcopy(experiment.config)
        config.seed = config.sweep.seed
        config.evaluation.update(num_samples=256, ig_scales=(best.ig_scale,))
        config.guidance.update(ig_interval=best.ig_interval)
        again = Experiment.from_config(config)
        (result,) = evaluation.evaluate(again, Weights(tiny_params(again)), again.open_data())
        assert result.metrics["fid"] == pytest.approx(table[0]["fid"], rel=1e-6)
        assert table[0]["fid"] <= table[1]["fid"]

    def test_stopped_and_continued_equals_uninterrupted(
        self, finished, experiment, monkeypatch, tmp_path
    ):
        workdir, _ = finished
        shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
        with monkeypatch.context() as patch:
            drawn = count_draws(patch, stop_after=8)
            with pytest.raises(Stop):
                sweep.run(experiment.config, str(tmp_path))
        assert not (tmp_path / "sweep" / "best.json").exists()
        before = len(drawn)
        # What a full disk or a copy may leave is drawn once more.
        next((tmp_path / "sweep").rglob("*.npz")).write_bytes(b"")
        drawn = count_draws(monkeypatch)
        sweep.run(experiment.config, str(tmp_path))
        table = json.loads((workdir / "sweep" / "sweep.json").read_text())
        pieces = sum(row["rounds"] for row in table["settings"])
        # And the damaged piece, and the winner on fresh noise.
        assert before + len(drawn) == pieces + 2
        for name in FILES:
            assert (tmp_path / "sweep" / name).read_text() == (workdir / "sweep" / name).read_text()

    def test_a_larger_search_begins_with_what_is_there(self, finished, experiment, monkeypatch):
        workdir, _ = finished
        search = self.search(experiment, workdir)
        drawn = count_draws(monkeypatch)
        search.race()
        assert drawn == []
        search.measure(GuidanceOptions(1.7), 128)
        assert len(drawn) == 1

    def test_other_weights_and_labels_draw_anew(self, finished, experiment):
        workdir, _ = finished
        search = self.search(experiment, workdir)
        config = copy.deepcopy(experiment.config)
        config.sampler.labels = "balanced"
        balanced = self.search(Experiment.from_config(config), workdir)
        raw = self.search(experiment, workdir, scale=0.5)
        folders = {s.draws._folder for s in (search, balanced, raw)}
        assert len(folders) == 3 and search.draws._folder.exists()

    def search(self, experiment, workdir, scale=1.0):
        weights = open_weights(experiment, workdir)
        params = {**weights.params, "position": weights.params["position"] * scale}
        weights = dataclasses.replace(weights, params=params)
        return sweep.Search(experiment, weights, str(workdir))

    def test_one_program_for_all_scales_and_intervals(self, experiment, trained, tmp_path):
        """Seven settings with two intervals, several rounds: the same forward passes throughout."""
        search = sweep.Search(experiment, open_weights(experiment, trained), str(tmp_path))
        search.race()
        assert len(search.settings) == 7
        assert len({setting.ig_interval for setting in search.settings}) == 2
        assert search.evaluator.engine._draw._cache_size() == 1

    def test_uncertainty_of_other_metrics(self, experiment, trained):
        config = copy.deepcopy(experiment.config)
        config.sweep.metric = "label_accuracy"
        search = self.search(Experiment.from_config(config), trained)
        entries = search.race()
        found = search.uncertainty(entries[:2])
        accuracy, count = entries[0].values[-1]["label_accuracy"], entries[0].samples[-1]
        expected = np.sqrt(accuracy * (1 - accuracy) / count)
        assert expected / 2 < found[0].standard_error < expected * 2
        assert sum(u.wins for u in found) == pytest.approx(1)

    @pytest.mark.parametrize("metric", ["kid", "mind"])
    def test_distances_for_fewer_samples_decide(self, finished, experiment, metric):
        workdir, _ = finished
        config = copy.deepcopy(experiment.config)
        config.sweep.update(metric=metric, num_samples=64, budget=0)
        search = self.search(Experiment.from_config(config), workdir)
        assert set(search.measured) == {"fid", "label_accuracy", metric}
        entries = search.race()
        found = [entry.values[-1][metric] for entry in entries[:2]]
        assert found[0] <= found[1]
        rows, reference = search.draws(entries[0].guidance, 64), search.scorer.reference
        assert found[0] == METRICS[metric].compute(FeatureSet.of_rows(rows), reference, None)

    def test_a_metric_from_outside_decides(self, finished, experiment, monkeypatch):
        """A row of the table is all that it takes; it sees the pictures if it says so."""
        brightness = Metric(
            "brightness",
            lambda samples, reference, labels: samples.rows["images"].mean(),
            needs=("images",),
            rows=("images",),
            better=1,
        )
        monkeypatch.setitem(METRICS, "brightness", brightness)
        workdir, _ = finished
        config = copy.deepcopy(experiment.config)
        config.sweep.update(metric="brightness", num_samples=64, budget=0)
        search = self.search(Experiment.from_config(config), workdir)
        entries = search.race()
        values = [entry.values[-1]["brightness"] for entry in entries]
        assert values[0] == max(values) > 0
        assert set(entries[0].values[-1]) == {"fid", "label_accuracy", "brightness"}
        fresh = search.fresh(entries[0].guidance)
        assert "brightness" in fresh.metrics and "brightness" in sweep.report.line(fresh)

    def test_first_round_below_the_number_of_features_is_noted(self, experiment, trained):
        config = copy.deepcopy(experiment.config)
        assert self.search(experiment, trained).rounds[0].samples == 128
        assert self.search(experiment, trained).notes() == []
        config.sweep.budget = 5 * 256
        (note,) = self.search(Experiment.from_config(config), trained).notes()
        assert "first round: Fréchet distance from 64 samples with 64 features" in note

    def test_plot(self, finished, experiment):
        workdir, _ = finished
        search = self.search(experiment, workdir)
        entries = search.race()
        figure = sweep.plot("fid", entries, search.fresh(entries[0].guidance))
        left, right = figure.axes
        assert "IG scale" in left.get_xlabel() and "Fréchet" in left.get_ylabel()
        assert "label accuracy" in right.get_xlabel()
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert set(labels[:2]) == {"IG", "IG on [0.4, 1]"}
        assert not right.lines[:-1] and len(right.collections) == 2  # points and the star
        # The title tells the drawn value of the winner from that on fresh samples.
        (_, drawn) = left.lines[-1].get_xydata()[0]
        assert f"{drawn:.4g} here" in figure.get_suptitle()
        # w = 1 is part of both lines.
        assert [line.get_xdata()[1] for line in left.lines[:2]] == [1.0, 1.0]

    def test_of_many_lines_the_best_are_told_apart(self, finished, experiment):
        """21 lines, of a rule, a source or a time each: the legend names eight and the winner."""
        config = copy.deepcopy(experiment.config)
        config.sweep.update(
            ig_scales=(1.0, 2.0, 1.5), ig_rules=("linear", "zero_star", "rescaled(phi=0.5)"),
            ig_sources=("auxiliary", "shallow"), ig_schedules=("ramp", "ramp(start=0.5)"),
            ig_intervals=(0.0, 1.0),
        )  # fmt: skip
        settings = sweep.settings_of(config)
        values = ({"fid": float(i), "label_accuracy": 0.5} for i in range(len(settings)))
        entries = [
            Entry(setting, (64,), (value,)) for setting, value in zip(settings, values, strict=True)
        ]
        search = self.search(experiment, finished[0])
        figure = sweep.plot("fid", entries, search.fresh(entries[0].guidance))
        left = figure.axes[0]
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert len(labels) == 9 and "IG on ramp from auxiliary by zero_star" in labels
        drawn = [line for line in left.lines if len(line.get_xdata()) == 3]
        assert len(drawn) == 18 and all(line.get_xdata()[0] == 1 for line in drawn)


class TestBest:
    def test_load_and_apply(self, finished, experiment):
        workdir, _ = finished
        best = sweep.load_best(workdir)
        config = copy.deepcopy(experiment.config)
        sweep.apply_best(config, workdir)
        assert config.guidance.ig_scale == best.ig_scale
        assert tuple(config.guidance.ig_interval) == best.ig_interval
        Experiment.from_config(config)

    def test_a_rule_and_a_ramp_win_and_are_applied(self, experiment, trained, tmp_path):
        """From the flags of a search to the guidance that samples and scores use."""
        shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
        config = copy.deepcopy(experiment.config)
        config.sweep.update(
            ig_scales=(2.0,), ig_intervals=(), ig_schedules=("ramp(stop=0.8)",),
            ig_rules=("zero_star", "projected(eta=0.5)"), num_samples=64, budget=0,
        )  # fmt: skip
        line = sweep.run(config, str(tmp_path))
        sweep.apply_best(config, tmp_path)
        rule = config.guidance.ig_rule
        assert rule in config.sweep.ig_rules and config.guidance.ig_schedule == "ramp(stop=0.8)"
        assert f"best: IG 2 on ramp(stop=0.8) by {rule}" in line
        rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
        assert rows[0]["ig_rule"] == rule and {r["ig_rule"] for r in rows} == {
            *config.sweep.ig_rules
        }


class TestBadInput:
    @pytest.mark.parametrize(
        "fields, message",
        [
            (dict(metric="fit"), "config.sweep.metric is 'fit'.*did you mean fid"),
            (dict(ig_intervals=(0.0, 1.0, 0.3)), "config.sweep.ig_intervals.*expected pairs"),
            (dict(cfg_intervals=(0.7, 0.3)), "config.sweep.cfg_intervals.*low <= high"),
            (dict(ig_scales=()), "config.sweep.ig_scales is empty"),
            (dict(cfg_intervals=()), "config.sweep.cfg_intervals is .*expected pairs"),
            (dict(ig_rules=("zerostar",)), "config.sweep.ig_rules is 'zerostar'.*mean zero_star"),
            (dict(ig_sources=("weaker",)), "ig_scale is 0.0: expected 1, since .* none was given"),
            (
                dict(metric="inception_score"),
                "it needs probabilities; digits-mlp gives pool, ",
            ),
            (dict(metric="sfid"), "it needs spatial, the reference's spatial; digits-mlp gives"),
            (dict(num_samples=3, budget=0), "num_samples is 3: expected at least 4 for precision"),
            (dict(budget=10), "config.sweep.budget is 10"),
        ],
    )
    def test_fields(self, trained, tmp_path, fields, message):
        shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
        config = changed(**fields)
        with pytest.raises(InputError, match=message):
            sweep.run(config, str(tmp_path))
        assert not (tmp_path / "sweep").exists()

    def test_no_checkpoint(self, experiment, tmp_path):
        with pytest.raises(InputError, match="no checkpoint"):
            sweep.run(experiment.config, str(tmp_path))
