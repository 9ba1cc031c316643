"""Published weights by name: a table of files on the Hugging Face hub and how the paper samples
from them, and repositories of anyone's, which `publish` fills and `from_pretrained` reads.

Files are downloaded once into the hub's own cache, and found there without a network.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ig_jax import config as config_lib
from ig_jax import console, recipes
from ig_jax.convert.pytorch import from_pytorch
from ig_jax.data.latents import read_statistics
from ig_jax.diffusion.guidance import Guidance, GuidanceOptions
from ig_jax.errors import InputError, look_up
from ig_jax.models.autoencoder import AUTOENCODERS
from ig_jax.models.dit import DiT, DiTSpec
from ig_jax.paths import resolve
from ig_jax.sampling.sample import Decoder
from ig_jax.storage import weight_files
from ig_jax.storage.autoencoders import autoencoder_from_pytorch
from ig_jax.storage.files import file_digest


@dataclasses.dataclass(frozen=True)
class Published:
    """Published weights: where they are, what they are, and how to sample from them.

    A row of `recipes.RECIPES` whose weights can be had, or a repository that `push_to_hub` filled.
    A row's figures are the paper's, ImageNet 256×256, FID-50K with random labels; guidance is of
    all latent channels, as IG's release samples. The CFG scales that DiT, SiT and LightningDiT
    publish themselves are of samplers that guide the first three channels only
    (`Term(channels=3)`), and do not carry over.

    Attributes:
        repository: hub id.
        file: the weights in the repository; a folder, ending in "/", holds one weight file whose
            name is asked of the hub.
        spec: the network.
        autoencoder: a name of `models.autoencoder.AUTOENCODERS`; empty for a model of pixels.
        epochs: length of the training; None if it is not said.
        guidance, fid: without CFG: the recommended setting, and the FID reported for it (or None).
        cfg_guidance, cfg_fid: with CFG, or None where there is no such figure.
        scores: what else is reported, by name.
        recipe: what it was trained with, the fields of a config by section; empty for the paper's.
    """

    repository: str
    file: str
    spec: DiTSpec
    autoencoder: str
    epochs: int | None
    guidance: Guidance
    fid: float | None
    cfg_guidance: Guidance | None = None
    cfg_fid: float | None = None
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    recipe: recipes.Sections = dataclasses.field(default_factory=dict)


def _published(name: str, recipe: recipes.Recipe) -> Published:
    """The weights of a recipe, with what is reported for them without and with CFG."""
    config = config_lib.published_config(name)
    own = [result for result in recipe.results if result.epochs == recipe.epochs]

    def first(cfg: bool) -> tuple[Guidance, float] | None:
        found = [result for result in own if ("guidance.cfg_scale" in result.changes) == cfg]
        if not found:
            return None
        setting = config_lib.published_config(name, found[0].changes)
        return GuidanceOptions.of(setting.guidance).build(), found[0].fid

    spec, plain = config_lib.model_spec(config), first(cfg=False)
    assert isinstance(spec, DiTSpec) and plain is not None
    guidance, fid = plain
    cfg_guidance, cfg_fid = first(cfg=True) or (None, None)
    return Published(
        repository=recipe.repository,
        file=recipe.file,
        spec=spec,
        autoencoder=config.data.autoencoder,
        epochs=recipe.epochs,
        guidance=guidance,
        fid=fid,
        cfg_guidance=cfg_guidance,
        cfg_fid=cfg_fid,
    )


PUBLISHED: dict[str, Published] = {
    name: _published(name, recipe) for name, recipe in recipes.RECIPES.items() if recipe.repository
}

# Autoencoders whose latents are normalised by statistics in a file of their repository.
STATISTICS = {"va-vae-f16d32": "latents_stats.pt"}

# What `publish.push_to_hub` writes.
WEIGHTS, CONFIG = "model.safetensors", "config.json"

# What shows in names and shapes or is an option that published files differ in.
_FREE_FIELDS = ("learned_sigma", "qk_norm", "zero_auxiliary")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Published weights, loaded.

    Attributes:
        model: `model(x, t, y) -> Heads`, for `ig_jax.sample`.
        decoder: makes pictures of its latents, (B, h, w, C) to (B, H, W, 3) uint8; None if not
            asked for.
        published: recommended guidance, reported scores.
        file: the weight file that was read.
        sha256: of that file, in hex; None if it was not computed.
    """

    model: DiT
    decoder: Decoder | None
    published: Published
    file: str
    sha256: str | None


def from_pretrained(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    decoder: Decoder | bool = True,
    dtype: Any = None,
    verify: bool = True,
) -> Pretrained:
    """Loads published weights by name: from the hub's cache, else from the Hugging Face hub.

    Downloading needs the extra `hub`, and reading `.pt` files (all of the paper's) `convert`:
    `pip install "ig_jax[hub,convert]"`. The cache is the hub's own (`HF_HOME`), and what is in it
    is used without asking the network; `HF_HUB_OFFLINE=1` never asks.

    Args:
        name: a name of `PUBLISHED`, such as "sit-xl-2-ig", or "user/repository" of a model that
            `push_to_hub` published.
        weights: a local weight file to read instead.
        decoder: whether to load the decoder too (`load_decoder`), or one that is loaded already.
        dtype: dtype of matrix products; by default bfloat16 on accelerators, float32 on the CPU.
        verify: whether to compare the file's SHA-256 with what the hub says; it takes some seconds
            for files of several GB.

    Returns:
        The model, its decoder, and the recommended guidance and reported scores.

    Raises:
        InputError: an unknown name; a repository that `push_to_hub` did not fill; no network (or no
            `huggingface_hub`) and nothing cached; a folder of the hub with another number of weight
            files than one; a damaged file, or one that is not this network.
    """
    known = _published_by(name) if "/" in name else None
    published = known or look_up(PUBLISHED, name, "published model")
    dtype = _default_dtype() if dtype is None else dtype
    file = _file(weights, published.repository, published.file)
    digest = _verify(file) if verify else None
    model = from_pytorch(
        file,
        family=published.spec.family,
        heads=published.spec.heads,
        auxiliary_depth=published.spec.auxiliary_depths or None,
        dtype=dtype,
    )
    _check_spec(name, published.spec, model.spec, file)
    latent = bool(published.autoencoder)
    if decoder is True:
        decoder = load_decoder(published.autoencoder, dtype=dtype) if latent else Decoder()
    return Pretrained(model, decoder or None, published, file, digest)


def load_decoder(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    statistics: str | os.PathLike[str] | None = None,
    dtype: Any = None,
) -> Decoder:
    """Loads a published autoencoder as a decoder of samples, from local files or from the hub.

    Args:
        name: "sd-vae-ft-ema", "sd-vae-ft-mse" or "va-vae-f16d32".
        weights: a local weight file to read instead of the hub's.
        statistics: a local `latents_stats.pt`, `{"mean", "std"}` of (1, C, 1, 1), instead of the
            hub's; only VA-VAE has one.
        dtype: bfloat16 or float32; by default bfloat16 on accelerators, float32 on the CPU.

    Returns:
        A function from (B, h, w, C) in model space to (B, H, W, 3) uint8; its `autoencoder` also
        encodes.

    Raises:
        InputError: an unknown name, a file that cannot be had (as `from_pretrained`) or is not that
            autoencoder's.
    """
    published = look_up(AUTOENCODERS, name, "autoencoder")
    if statistics is not None and name not in STATISTICS:
        raise InputError(f"statistics is {statistics}: expected none, {name} has one scale")
    autoencoder = autoencoder_from_pytorch(
        _file(weights, published.repository, published.file),
        dtype=_default_dtype() if dtype is None else dtype,
        preset=name,
    )
    if published.shift is not None and published.scale is not None:
        return Decoder(autoencoder, published.shift, published.scale)
    file = _file(statistics, published.repository, STATISTICS[name])
    channels = published.spec.latent_channels
    return Decoder(autoencoder, *read_statistics(file, channels))


def _file(given: str | os.PathLike[str] | None, repository: str, file: str) -> str:
    """The local file that was given, else the hub's."""
    return fetch(repository, file) if given is None else os.fspath(resolve(given))


def fetch(repository: str, file: str) -> str:
    """Returns the local path of a file of the Hugging Face hub, downloaded if it is not cached.

    Args:
        repository: hub id.
        file: its name there; ending in "/", the one weight file in that folder.

    Raises:
        InputError: no network, no `huggingface_hub`, no such file, or not one in the folder.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise InputError(
            f"{repository}/{file}: downloading needs huggingface_hub: "
            'pip install "ig_jax[hub]", or give a local file'
        ) from error
    cached = _cached(repository, file)
    if cached is not None:
        return cached
    reason, cause = offline(), None
    if reason is None:
        try:
            if file.endswith("/"):
                names = huggingface_hub.HfApi().list_repo_files(repository)
                file = _only_weights(names, repository, file)
            return huggingface_hub.hf_hub_download(repository, file)
        except InputError:
            raise
        except Exception as error:  # the HTTP library underneath differs between versions
            reason, cause = first_line(error), error
    raise InputError(
        f"{repository}/{file}: the cache {constants.HF_HUB_CACHE} does not have it, and it cannot "
        f"be downloaded from {constants.ENDPOINT} ({reason}); expected a network, or a local file "
        "in its place"
    ) from cause


def _cached(repository: str, file: str) -> str | None:
    """The file in the hub's cache, or None; asks no network."""
    import huggingface_hub

    if file.endswith("/"):
        weights = [f"{file}*{suffix}" for suffix in weight_files.SUFFIXES]
        try:
            snapshot = huggingface_hub.snapshot_download(
                repository, allow_patterns=weights, local_files_only=True
            )
        except FileNotFoundError:
            return None
        paths = sorted(pathlib.Path(snapshot, file).rglob("*"))
        names = [path.relative_to(snapshot).as_posix() for path in paths]
        if not any(name.endswith(weight_files.SUFFIXES) for name in names):
            return None
        file = _only_weights(names, repository, file)
    path = huggingface_hub.try_to_load_from_cache(repository, file)
    return path if isinstance(path, str) else None


def _only_weights(names: list[str], repository: str, folder: str) -> str:
    found = [n for n in names if n.startswith(folder) and n.endswith(weight_files.SUFFIXES)]
    if len(found) != 1:
        raise InputError(
            f"{repository}: {folder} holds {', '.join(found) or 'no weight file'}: expected one; "
            "download the one you want (`hf download`) and give weights=PATH"
        )
    return found[0]


def offline() -> str | None:
    """Why the hub cannot be reached at all, which the client would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return None if urllib.request.getproxies() else "no network"  # a proxy finds hosts itself
    return None


def _verify(file: str) -> str:
    """The file's SHA-256; raises `InputError` if it is not the one that the hub publishes."""
    with console.progress_bar(1, "checking") as advance:
        digest = file_digest(file)
        advance()
    # The hub's cache keeps a large file under the SHA-256 that the hub publishes for it.
    published = os.path.basename(os.path.realpath(file))
    if re.fullmatch("[0-9a-f]{64}", published) and digest != published:
        raise InputError(
            f"{file} has SHA-256 {digest}: expected {published}; delete it to download it again"
        )
    return digest


def _check_spec(name: str, expected: DiTSpec, found: DiTSpec, file: str) -> None:
    for field in dataclasses.fields(expected):
        theirs, ours = getattr(found, field.name), getattr(expected, field.name)
        if theirs != ours and field.name not in _FREE_FIELDS:
            raise InputError(f"{file}: not {name}: found {field.name} {theirs}, expected {ours}")


def _default_dtype() -> Any:
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _published_by(repository: str) -> Published:
    """What `push_to_hub` wrote about its weights."""
    file = fetch(repository, CONFIG)
    try:
        content = json.loads(resolve(file).read_text())
        values = content["spec"]
        spec = DiTSpec(**values | {"auxiliary_depths": tuple(values["auxiliary_depths"])})
        return Published(
            repository=repository,
            file=WEIGHTS,
            spec=spec,
            autoencoder=content["autoencoder"],
            epochs=None,
            guidance=Guidance.of_record(content["guidance"]),
            fid=content["scores"].get("FID"),
            scores=content["scores"],
            recipe=content["recipe"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{repository}: its {CONFIG} is not one that ig_jax.push_to_hub wrote "
            f"({first_line(error)})"
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
