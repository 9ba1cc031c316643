"""`--mode=reproduce`: from nothing to a published number, in one command that may be stopped.

Weights, autoencoder, Inception and ADM's reference are downloaded, 50,000 pictures are drawn and
scored, and the result stands beside the paper's. What is there already is not made again.
"""

from __future__ import annotations

import os
import shutil
import urllib.parse
import urllib.request

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, hub, recipes
from ig_jax.convert import inception
from ig_jax.convert.workdir import save_workdir
from ig_jax.errors import InputError, look_up
from ig_jax.evaluation import race, report
from ig_jax.evaluation import run as evaluation
from ig_jax.evaluation.features import FeatureSet
from ig_jax.experiment import Experiment
from ig_jax.models.autoencoder import AUTOENCODERS
from ig_jax.parallel import hosts
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.recipes import Result
from ig_jax.sampling import run as sampling
from ig_jax.storage import files
from ig_jax.storage.checkpoints import FOLDER, find_step, saved_config

REFERENCE = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
# Resamples of the pictures' features, over which the deviation is taken.
RESAMPLES = 10
# Fields of `config.model` that say how a network computes and not what it is.
_EXECUTION = ("dtype", "remat", "scan_blocks")


def starting_config(name: str) -> ConfigDict:
    """The config of published weights, to sample as they were; raises `InputError`."""
    look_up(hub.PUBLISHED, name, "published model")
    config = config_lib.published_config(name)
    config.sampler.num_samples = 50_000
    return config


def run(config: ConfigDict, workdir: str, name: str) -> str:
    """`--mode=reproduce --name=NAME`: draws, scores, and prints ours beside the paper's.

    Args:
        config: of `starting_config`, with what was overridden; local files that it names are not
            downloaded.
        workdir: where everything goes: weights, downloads, pictures, scores.
        name: a name of `hub.PUBLISHED`.

    Returns:
        The last line to print. Raises `InputError`, for a file that cannot be had for one.
    """
    fetch_files(config, workdir)
    if is_primary() and not (resolve(workdir) / FOLDER).exists():
        save_workdir(hub.from_pretrained(name, decoder=False).model, workdir)
    hosts.wait_for_all("published weights")
    # Whether there is a variance, for one, shows in the weights alone.
    execution = {field: config.model[field] for field in _EXECUTION}
    config.model.update(saved_config(workdir).model.to_dict() | execution)
    drawn = sampling.draw_pictures(config, workdir, find_step(workdir))
    config.evaluation.samples = os.fspath(drawn.directory)
    scored = evaluation.score_files(Experiment.from_config(config), None, workdir)
    where = report.report([scored.result], workdir)
    values = [
        scored.scorer.values(["fid"], FeatureSet.of_rows({"pool": scored.pool[rows]}), None)["fid"]
        for rows in race.resamples(len(scored.pool), RESAMPLES, config.seed)
    ]
    deviation = float(np.std(values, ddof=1))
    paper = reported(name, config)
    if is_primary():
        _print(scored.result, deviation, paper)
    ours = f"FID {scored.result.metrics['fid']:.3f} ± {deviation:.2g}"
    theirs = f"the paper reports {paper.fid:g}" if paper else "the paper reports none for this"
    return f"{where}\n{name}: {ours} (over {RESAMPLES} resamples), {theirs}"


def fetch_files(config: ConfigDict, workdir: str) -> None:
    """Downloads what the config does not name, and puts the paths into it; raises `InputError`."""
    data, published = config.data, AUTOENCODERS[config.data.autoencoder]
    if not data.autoencoder_path:
        data.autoencoder_path = hub.fetch(published.repository, published.file)
    if data.autoencoder in hub.STATISTICS and not data.path:
        data.path = hub.fetch(published.repository, hub.STATISTICS[data.autoencoder])
    folder = resolve(workdir) / "downloads"
    for field, url in (("inception_path", inception.URL), ("reference", REFERENCE)):
        if not config.evaluation[field]:
            config.evaluation[field] = os.fspath(download(url, folder))
    hosts.wait_for_all("downloads")


def download(url: str, folder: epath.Path) -> epath.Path:
    """The file of an address in a folder, downloaded by the primary process if it is not there.

    Raises:
        InputError: it cannot be had.
    """
    file = folder / os.path.basename(urllib.parse.urlsplit(url).path)
    if not is_primary() or file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            console.progress_bar(1, f"downloading {file.name}") as advance,
            urllib.request.urlopen(url, timeout=60) as answer,
            files.write_atomically(file) as partial,
            partial.open("wb") as stream,
        ):
            shutil.copyfileobj(answer, stream, 1 << 22)
            advance()
    except OSError as error:
        raise InputError(
            f"{url} cannot be downloaded ({error}): expected a network, or the file as {file}"
        ) from error
    return file


def reported(name: str, config: ConfigDict) -> Result | None:
    """The paper's row that a config stands for: the weights' epochs, this guidance and labels."""
    recipe = recipes.RECIPES[name]
    for result in recipe.results:
        theirs = config_lib.published_config(name, result.changes)
        same = theirs.sampler.labels == config.sampler.labels
        if result.epochs == recipe.epochs and same and theirs.guidance == config.guidance:
            return result
    return None


def _print(result: evaluation.Result, deviation: float, paper: Result | None) -> None:
    rows = []
    for name in ("fid", "sfid", "inception_score"):
        if name in result.metrics:
            spread = f"{deviation:.2g}" if name == "fid" else ""
            theirs = getattr(paper, name, None)
            shown = "" if theirs is None else f"{theirs:g}"
            title = report.title(name, result.protocol)
            rows.append([title, report.shown(name, result.metrics[name]), spread, shown])
    console.print_table("reproduction", ["", "ours", "std. deviation", "paper"], rows)
