"""Published weights by name: a table of files on the Hugging Face hub and how the paper samples
from them. Files are downloaded once into the hub's own cache, and found there without a network."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
import socket
import urllib.parse
import urllib.request
from typing import Any

import jax
import jax.numpy as jnp

from ig_jax import console
from ig_jax.convert.autoencoder import autoencoder_from_pytorch
from ig_jax.convert.pytorch import from_pytorch
from ig_jax.data.latents import read_statistics
from ig_jax.diffusion.guidance import Guidance
from ig_jax.errors import InputError, suggest
from ig_jax.library import Decoder
from ig_jax.models.autoencoder import AUTOENCODERS
from ig_jax.models.dit import DiT, DiTSpec
from ig_jax.paths import resolve
from ig_jax.storage import weight_files


@dataclasses.dataclass(frozen=True)
class Published:
    """Published weights: where they are, what they are, and how the paper samples from them.

    The sampler is `library.RECIPES[spec.family]`. All figures are the paper's, ImageNet 256×256,
    FID-50K with random labels.

    Attributes:
        repository: hub id.
        file: the weights in the repository; a folder, ending in "/", holds one weight file whose
            name is asked of the hub.
        spec: the network.
        autoencoder: a name of `models.autoencoder.AUTOENCODERS`.
        epochs: length of the training.
        guidance, fid: without CFG: the recommended setting, and the FID reported for it.
        cfg_guidance, cfg_fid: with CFG, or None where the paper has no such row.
        sha256: of the file, where its authors publish one (the hub's own digest is checked always).
    """

    repository: str
    file: str
    spec: DiTSpec
    autoencoder: str
    epochs: int
    guidance: Guidance
    fid: float
    cfg_guidance: Guidance | None = None
    cfg_fid: float | None = None
    sha256: str | None = None


PUBLISHED: dict[str, Published] = {
    "sit-xl-2-ig": Published(
        repository="CVLUESTC/Internal-Guidance",
        file="SiT/",
        spec=DiTSpec.of("sit", "xl"),
        autoencoder="sd-vae-ft-ema",
        epochs=800,
        guidance=Guidance(1.4),
        fid=1.75,
        cfg_guidance=Guidance(1.4, cfg_scale=1.35, cfg_interval=(0.0, 0.7)),
        cfg_fid=1.46,
    ),
    "lightningdit-xl-1-ig": Published(
        repository="CVLUESTC/Internal-Guidance",
        file="Lightningdit/",
        spec=DiTSpec.of("lightningdit", "xl"),
        autoencoder="va-vae-f16d32",
        epochs=680,
        guidance=Guidance(1.7),
        fid=1.34,
        cfg_guidance=Guidance(1.4, cfg_scale=1.45, cfg_interval=(0.19, 1.0)),
        cfg_fid=1.19,
    ),
    # The paper's baselines, by their own authors: no auxiliary head.
    "sit-xl-2": Published(
        repository="nyu-visionx/SiT-collections",
        file="SiT-XL-2-256.pt",
        spec=DiTSpec.of("sit", "xl", auxiliary_depth=None),
        autoencoder="sd-vae-ft-ema",
        epochs=1400,
        guidance=Guidance(),
        fid=8.61,
    ),
    "lightningdit-xl-1": Published(
        repository="hustvl/lightningdit-xl-imagenet256-800ep",
        file="lightningdit-xl-imagenet256-800ep.pt",
        spec=DiTSpec.of("lightningdit", "xl", auxiliary_depth=None),
        autoencoder="va-vae-f16d32",
        epochs=800,
        guidance=Guidance(),
        fid=2.17,
    ),
}

# Autoencoders whose latents are normalised by statistics in a file of their repository.
STATISTICS = {"va-vae-f16d32": "latents_stats.pt"}

# What shows in names and shapes or is an option that published files differ in.
_FREE_FIELDS = ("learned_sigma", "qk_norm", "zero_auxiliary")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Published weights, loaded.

    Attributes:
        model: `model(x, t, y) -> Prediction`, for `ig_jax.sample`.
        decoder: makes pictures of its latents, (B, h, w, C) to (B, H, W, 3) uint8; None if not
            asked for.
        published: the table's entry: recommended guidance, reported FID.
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
    weights: str | os.PathLike | None = None,
    decoder: Decoder | bool = True,
    dtype: Any = None,
    verify: bool = True,
) -> Pretrained:
    """Loads published weights by name: from the hub's cache, else from the Hugging Face hub.

    Downloading needs the extra `hub`, and reading `.pt` files (all published ones) `convert`:
    `pip install "ig_jax[hub,convert]"`. The cache is the hub's own (`HF_HOME`), and what is in it
    is used without asking the network; `HF_HUB_OFFLINE=1` never asks.

    Args:
        name: a name of `PUBLISHED`, such as "sit-xl-2-ig".
        weights: a local weight file to read instead.
        decoder: whether to load the decoder too (`load_decoder`), or one that is loaded already.
        dtype: dtype of matrix products; by default bfloat16 on accelerators, float32 on the CPU.
        verify: whether to compare the file's SHA-256 with what the hub (or the table) says; it
            takes some seconds for files of several GB.

    Returns:
        The model, its decoder, and the paper's recommended guidance and FID.

    Raises:
        InputError: an unknown name; no network (or no `huggingface_hub`) and nothing cached; a
            folder of the hub with another number of weight files than one; a damaged file, or one
            that is not this network.
    """
    if name not in PUBLISHED:
        known = tuple(PUBLISHED)
        raise InputError(
            f"unknown published model {name!r}: expected one of {', '.join(known)}"
            f"{suggest(name, known)}"
        )
    published = PUBLISHED[name]
    dtype = _default_dtype() if dtype is None else dtype
    if weights is None:
        file, expected = fetch(published.repository, published.file), published.sha256
    else:
        file, expected = os.fspath(resolve(weights)), None
    digest = _verify(file, expected) if verify else None
    model = from_pytorch(
        file,
        family=published.spec.family,
        heads=published.spec.heads,
        auxiliary_depth=published.spec.auxiliary_depth,
        dtype=dtype,
    )
    _check_spec(name, published.spec, model.spec, file)
    if isinstance(decoder, bool):
        decoder = load_decoder(published.autoencoder, dtype=dtype) if decoder else None
    return Pretrained(model, decoder, published, file, digest)


def load_decoder(
    name: str,
    *,
    weights: str | os.PathLike | None = None,
    statistics: str | os.PathLike | None = None,
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
    if name not in AUTOENCODERS:
        known = list(AUTOENCODERS)
        raise InputError(
            f"unknown autoencoder {name!r}: expected one of {', '.join(known)}"
            f"{suggest(name, known)}"
        )
    published = AUTOENCODERS[name]
    file = weights if weights is not None else fetch(published.repository, published.file)
    autoencoder = autoencoder_from_pytorch(
        file, dtype=_default_dtype() if dtype is None else dtype, preset=name
    )
    if name not in STATISTICS:
        if statistics is not None:
            raise InputError(f"statistics is {statistics}: expected none, {name} has one scale")
        return Decoder(autoencoder, published.shift, published.scale)
    if statistics is None:
        statistics = fetch(published.repository, STATISTICS[name])
    return Decoder(autoencoder, *read_statistics(statistics, published.spec.latent_channels))


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
    where = f"{repository}/{file} on {constants.ENDPOINT}"
    if constants.HF_HUB_OFFLINE or not _resolves(constants.ENDPOINT):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no network"
        raise InputError(
            f"{where}: {reason}, and the cache {constants.HF_HUB_CACHE} does not have it; expected "
            "a network, or a local file in its place"
        )
    try:
        if file.endswith("/"):
            names = huggingface_hub.HfApi().list_repo_files(repository)
            file = _only_weights(names, repository, file)
        return huggingface_hub.hf_hub_download(repository, file)
    except InputError:
        raise
    except Exception as error:  # the HTTP library underneath differs between the client's versions
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise InputError(
            f"{where}: cannot be downloaded ({reason}); expected a network, or a local file in its "
            "place"
        ) from error


def _cached(repository: str, file: str) -> str | None:
    """A file of an earlier, complete download: the hub's cache keeps a folder a commit."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repository, repo_type="model")
    root = pathlib.Path(constants.HF_HUB_CACHE) / folder
    reference = root / "refs" / "main"
    if not reference.exists():
        return None
    snapshot = root / "snapshots" / reference.read_text().strip()
    if file.endswith("/"):
        names = [p.relative_to(snapshot).as_posix() for p in sorted(snapshot.rglob("*"))]
        if not any(_is_weights(name, file) for name in names):
            return None
        file = _only_weights(names, repository, file)
    return str(snapshot / file) if (snapshot / file).exists() else None


def _resolves(endpoint: str) -> bool:
    """Whether the hub can be reached at all; the client itself retries for half a minute first."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(endpoint).hostname, None)
    except OSError:
        return False
    return True


def _is_weights(name: str, folder: str) -> bool:
    return name.startswith(folder) and name.endswith(weight_files.SUFFIXES)


def _only_weights(names: list[str], repository: str, folder: str) -> str:
    found = [name for name in names if _is_weights(name, folder)]
    if len(found) != 1:
        raise InputError(
            f"{repository}: {folder} holds {', '.join(found) or 'no weight file'}: expected one; "
            "download the one you want (`hf download`) and give weights=PATH"
        )
    return found[0]


def _verify(file: str, published: str | None) -> str:
    """The file's SHA-256; raises `InputError` if it is not what is published."""
    if not os.path.isfile(file):
        raise InputError(f"{file}: found no such file, expected a weight file")
    # The hub's cache keeps a large file under the SHA-256 that the hub publishes for it.
    blob = os.path.basename(os.path.realpath(file))
    expected = published or (blob if re.fullmatch("[0-9a-f]{64}", blob) else None)
    digest, size = hashlib.sha256(), os.path.getsize(file)
    block_size = 1 << 24
    with (
        open(file, "rb") as stream,
        console.progress_bar(-(-size // block_size), "checking") as advance,
    ):
        while block := stream.read(block_size):
            digest.update(block)
            advance()
    if expected is not None and digest.hexdigest() != expected:
        raise InputError(
            f"{file} has SHA-256 {digest.hexdigest()}: expected {expected}; delete it to download "
            "it again"
        )
    return digest.hexdigest()


def _check_spec(name: str, expected: DiTSpec, found: DiTSpec, file: str) -> None:
    for field in dataclasses.fields(expected):
        theirs, ours = getattr(found, field.name), getattr(expected, field.name)
        if theirs != ours and field.name not in _FREE_FIELDS:
            raise InputError(f"{file}: not {name}: found {field.name} {theirs}, expected {ours}")


def _default_dtype() -> Any:
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
