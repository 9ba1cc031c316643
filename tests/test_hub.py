"""Published weights: the real hub client against a small server in place of the Hugging Face hub,
with random checkpoints of a few thousand parameters."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants, file_download

import ig_jax
from ig_jax import hub, recipes
from ig_jax.convert import inception as convert_inception
from ig_jax.convert.workdir import save_workdir
from ig_jax.diffusion.guidance import (
    Auxiliary,
    Guidance,
    Interval,
    Projected,
    ShallowNull,
    Term,
)
from ig_jax.errors import InputError
from ig_jax.evaluation import reproduce
from ig_jax.evaluation.extractors import EXTRACTORS, Features
from ig_jax.models.autoencoder import AUTOENCODERS, AutoencoderSpec, PublishedAutoencoder
from ig_jax.recipes import RECIPES, Recipe, Result
from ig_jax.storage import weight_files
from tests.common import golden, seeded_weights
from tests.release import random_weights, release_shapes

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPEC = ig_jax.DiTSpec.of(
    "sit", "s", width=32, depth=3, heads=2, auxiliary_depths=(1,), input_size=4, num_classes=10
)
LIGHT = dataclasses.replace(
    ig_jax.DiTSpec.of("lightningdit", "s", width=32, depth=2, heads=2, auxiliary_depths=(1,)),
    input_size=4,
    channels=4,
    num_classes=10,
)
VAE = AutoencoderSpec(32, (1, 2), 2, 4, (1,))


def weights(spec):
    """Random weights of `spec` under the release's names."""
    shapes = release_shapes(
        width=spec.width,
        depth=spec.depth,
        heads=spec.heads,
        patch=spec.patch_size,
        channels=spec.channels,
        tokens=spec.tokens,
        classes=spec.num_classes,
        lightning=spec.rope,
    )
    return random_weights(shapes)


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of the hub's interface that the client makes to read and to write."""

    def _answer(self, body: bool) -> None:
        path, files_ = self.path.split("?")[0], self.server.files
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/") and path.endswith("/tree/main"):
            repository = path.removeprefix("/api/models/").removesuffix("/tree/main")
            content = json.dumps(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for (where, name), data in files_.items()
                    if where == repository
                ]
            ).encode()
            headers = {"Content-Type": "application/json"}
        elif path.endswith("/revision/main"):  # older clients ask how the repository stores files
            content = json.dumps({"id": path, "sha": COMMIT, "xetEnabled": False}).encode()
            headers = {"Content-Type": "application/json"}
        else:
            repository, _, name = path[1:].partition("/resolve/main/")
            content = files_.get((repository, name))
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            digest = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_POST(self):
        path = self.path.split("?")[0]
        self.server.requests.append(f"POST {path}")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        code, answer = 200, {}
        if path == "/api/repos/create":
            asked = json.loads(content)
            repository = f"{asked['organization']}/{asked['name']}"
            self.server.made[repository] = asked.get("private", asked.get("visibility"))
            answer = {"url": f"/{repository}"}
            if not self.headers["Authorization"]:
                code, answer = 401, {"error": "Invalid username or password."}
        elif path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif path.endswith("/preupload/main"):
            files = json.loads(content)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"], **plain} for file in files]}
        elif path.endswith("/commit/main"):
            repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    data = base64.b64decode(line["value"]["content"])
                    self.server.files[repository, line["value"]["path"]] = data
            answer = {"commitUrl": f"/{repository}/commit/{COMMIT}", "commitOid": COMMIT}
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Bytes of the weight files that the server offers."""
    folder = tmp_path_factory.mktemp("published")
    contents = {}
    for name, arrays in {
        "sit": weights(SPEC),
        "light": weights(LIGHT),
        "vae": seeded_weights(json.loads(str(golden("vae_ldm_small")["shapes_json"]))),
        "statistics": {
            "mean": np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1),
            "std": np.full((1, 4, 1, 1), 2, np.float32),
        },
    }.items():
        weight_files.write_safetensors(folder / f"{name}.safetensors", arrays)
        contents[name] = (folder / f"{name}.safetensors").read_bytes()
    return contents


@pytest.fixture
def server(checkpoints, monkeypatch, tmp_path):
    """A hub with one SiT, one LightningDiT and their autoencoders, and an empty cache."""
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    running.requests, running.made = [], {}
    running.files = {
        ("lab/ig", "README.md"): b"# weights",
        ("lab/ig", "SiT/0400000.safetensors"): checkpoints["sit"],
        ("lab/ig", "Light/last.safetensors"): checkpoints["light"],
        ("lab/vae", "vae.safetensors"): checkpoints["vae"],
        ("lab/vae", "statistics.safetensors"): checkpoints["statistics"],
    }
    threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{running.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for place in (constants, file_download):  # where clients before 1.0 keep a copy
        monkeypatch.setattr(place, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    for name, shift, scale in (("sd-small", 0.5, 4.0), ("va-small", None, None)):
        published = PublishedAutoencoder(VAE, "lab/vae", "vae.safetensors", shift, scale)
        monkeypatch.setitem(AUTOENCODERS, name, published)
    monkeypatch.setitem(hub.STATISTICS, "va-small", "statistics.safetensors")
    guidance = ig_jax.Guidance(1.4)
    for name, file, spec, vae in (
        ("sit-small-ig", "SiT/", SPEC, "sd-small"),
        ("light-small-ig", "Light/last.safetensors", LIGHT, "va-small"),
    ):
        published = hub.Published("lab/ig", file, spec, vae, 80, guidance, 5.31)
        monkeypatch.setitem(hub.PUBLISHED, name, published)
    yield running
    running.shutdown()
    running.server_close()


def test_downloads_once_and_then_needs_no_network(server, checkpoints, monkeypatch):
    found = ig_jax.from_pretrained("sit-small-ig")
    assert found.sha256 == hashlib.sha256(checkpoints["sit"]).hexdigest()
    assert found.file.endswith("SiT/0400000.safetensors")
    assert (
        found.model.spec == SPEC
        and found.published.guidance.record() == ig_jax.Guidance(1.4).record()
    )
    expected = weights(SPEC)
    for name, array in ig_jax.to_pytorch(found.model).items():
        np.testing.assert_array_equal(array, expected[name])
    assert (found.decoder.shift, found.decoder.scale) == (0.5, 4.0)
    pictures = ig_jax.sample(
        found.model,
        [1, 2],
        guidance=found.published.guidance,
        decoder=found.decoder,
        sampler="euler",
        num_steps=2,
    )
    assert pictures.shape == (2, 8, 8, 3) and pictures.dtype == jnp.uint8

    asked = len(server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = ig_jax.from_pretrained("sit-small-ig", decoder=found.decoder)
    assert (again.file, again.sha256) == (found.file, found.sha256)
    assert len(server.requests) == asked


def test_va_vae_latents_have_statistics_per_channel(server):
    found = ig_jax.from_pretrained("light-small-ig")
    assert found.model.spec == LIGHT
    assert found.decoder.shift.tolist() == [0, 1, 2, 3]
    assert found.decoder.scale.tolist() == [2, 2, 2, 2]


def test_local_files_need_no_hub(server, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("sit", "vae", "statistics"):
        (tmp_path / f"{name}.safetensors").write_bytes(checkpoints[name])
    decoder = ig_jax.load_decoder(
        "va-small",
        weights=tmp_path / "vae.safetensors",
        statistics=tmp_path / "statistics.safetensors",
    )
    path = tmp_path / "sit.safetensors"
    found = ig_jax.from_pretrained("sit-small-ig", weights=path, decoder=decoder)
    assert found.decoder is decoder and found.file == str(path)
    plain = ig_jax.from_pretrained("sit-small-ig", weights=path, decoder=False, verify=False)
    assert plain.decoder is None and plain.sha256 is None
    with pytest.raises(InputError, match=r'needs huggingface_hub: pip install "ig_jax\[hub\]"'):
        ig_jax.from_pretrained("sit-small-ig")


def test_bad_input_gets_one_line(server, checkpoints, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="did you mean sit-xl-2-ig"):
        ig_jax.from_pretrained("sit-xl-2-gi")
    with pytest.raises(InputError, match="did you mean sd-vae-ft-ema"):
        ig_jax.load_decoder("sd-vae-ft-emma")
    with pytest.raises(InputError, match="no such file"):
        ig_jax.from_pretrained("sit-small-ig", weights=tmp_path / "nothing.safetensors")
    (tmp_path / "light.safetensors").write_bytes(checkpoints["light"])
    with pytest.raises(InputError, match="not a sit checkpoint"):
        ig_jax.from_pretrained("sit-small-ig", weights=tmp_path / "light.safetensors")
    with pytest.raises(InputError, match="expected none, sd-small has one scale"):
        ig_jax.load_decoder("sd-small", statistics=tmp_path / "light.safetensors")
    (tmp_path / "sit.safetensors").write_bytes(checkpoints["sit"])
    other = dataclasses.replace(hub.PUBLISHED["sit-small-ig"], spec=dataclasses.replace(
        SPEC, num_classes=1000
    ))  # fmt: skip
    monkeypatch.setitem(hub.PUBLISHED, "other", other)
    with pytest.raises(InputError, match="not other: found num_classes 10, expected 1000"):
        ig_jax.from_pretrained("other", weights=tmp_path / "sit.safetensors")


def test_hub_with_other_files_than_expected(server):
    server.files["lab/ig", "SiT/0800000.pt"] = b"another"
    with pytest.raises(InputError, match=r"SiT/ holds SiT/0400000.*, SiT/0800000.pt: expected one"):
        ig_jax.from_pretrained("sit-small-ig")
    del server.files["lab/ig", "SiT/0800000.pt"], server.files["lab/ig", "SiT/0400000.safetensors"]
    with pytest.raises(InputError, match="SiT/ holds no weight file: expected one"):
        ig_jax.from_pretrained("sit-small-ig")
    del server.files["lab/ig", "Light/last.safetensors"]
    with pytest.raises(InputError, match="cannot be downloaded from .*EntryNotFound") as caught:
        ig_jax.from_pretrained("light-small-ig")
    assert "\n" not in str(caught.value)


def test_a_damaged_download_is_refused(server, monkeypatch):
    path = pathlib.Path(hub.fetch("lab/ig", "SiT/"))
    blob = path.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(InputError, match="has SHA-256 .*: expected .*; delete it"):
        ig_jax.from_pretrained("sit-small-ig", decoder=False)


def test_a_cache_with_other_files_of_the_repository_does_not_have_it(server, monkeypatch):
    hub.fetch("lab/ig", "Light/last.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch("lab/ig", "Light/").endswith("Light/last.safetensors")
    for file in ("SiT/", "SiT/0400000.safetensors", "Lig/"):
        with pytest.raises(InputError, match=f"lab/ig/{file}: the cache .*HF_HUB_OFFLINE is set"):
            hub.fetch("lab/ig", file)


# Publishing.

GUIDANCE = Guidance.of(
    Term(Auxiliary(), 1.4, when=Interval(0.3, 1.0), rule=Projected(eta=0.5)),
    Term(ShallowNull(), 1.3, null_scale=1.0, channels=3),
)
PIXELS = dataclasses.replace(SPEC, channels=1, input_size=8, num_classes=3)


def network(spec):
    return ig_jax.from_pytorch(
        weights(spec), family=spec.family, heads=spec.heads, auxiliary_depth=spec.auxiliary_depths
    )


def test_published_and_read_back(server):
    model = network(PIXELS)
    address = ig_jax.push_to_hub(
        model, "me/small", guidance=GUIDANCE, scores={"FID": 5.5, "recall": 0.6}, private=True
    )
    assert COMMIT in address and list(server.made) == ["me/small"]
    assert server.made["me/small"] in (True, "private")

    found = ig_jax.from_pretrained("me/small")
    assert found.model.spec == PIXELS
    for name, array in ig_jax.to_pytorch(found.model).items():
        np.testing.assert_array_equal(array, ig_jax.to_pytorch(model)[name])
    published = found.published
    assert published.guidance.record() == GUIDANCE.record()
    assert (published.fid, published.scores["recall"]) == (5.5, 0.6)
    assert published.recipe["loss"]["path"] == "linear"
    assert published.recipe["data"]["image_size"] == 8
    assert found.sha256 and found.decoder.autoencoder is None

    text = server.files["me/small", "README.md"].decode()
    card = huggingface_hub.ModelCard(text)
    assert card.data.library_name == "ig_jax" and "sit" in card.data.tags
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == published.scores
    assert "auxiliary, scale 1.4, projected(eta=0.5), when interval(low=0.3)" in text
    assert "| FID | 5.5 |" in text and "| loss.path | linear |" in text
    [program] = re.findall("```python\n(.*?)```", text, re.DOTALL)
    shown = {}
    exec(program.replace("decoder=", "sampler='euler', num_steps=2, decoder="), shown)
    assert shown["pictures"].shape == (3, 8, 8, 1)


def test_published_from_a_workdir(server, tmp_path):
    """With its own config, but no path of the machine that trained it."""
    save_workdir(network(PIXELS), str(tmp_path / "run"), "digits")
    ig_jax.push_to_hub(tmp_path / "run", "me/run")
    content = server.files["me/run", "config.json"].decode()
    assert json.loads(content)["recipe"]["data"]["name"] == "digits"
    assert str(tmp_path) not in content and "path" not in json.loads(content)["recipe"]["data"]
    found = ig_jax.from_pretrained("me/run").published
    assert found.guidance.record() == [] and found.scores == {} and found.fid is None


@pytest.mark.parametrize(
    "spec", [SPEC, dataclasses.replace(LIGHT, channels=32)], ids=["sit", "lightningdit"]
)
def test_published_latents_name_their_autoencoder(server, spec):
    ig_jax.push_to_hub(network(spec), "me/latents")
    found = ig_jax.from_pretrained("me/latents", decoder=False)
    assert found.model.spec == spec
    assert (
        found.published.autoencoder == recipes.FAMILIES[spec.family].config["data"]["autoencoder"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 1.5}, "model is 1.5: expected a network"),
        ({"model": nnx.Linear(1, 1, rngs=nnx.Rngs(0))}, "model is a Linear: expected a SiT"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"repository": "small"}, "repository is 'small': expected 'user/name'"),
        ({"guidance": 1.5}, "guidance is 1.5: expected ig_jax.Guidance"),
        ({"guidance": Guidance.of(Term(Auxiliary(1), 2.0))}, "needs auxiliary head 1"),
        ({"guidance": Guidance(2.0, weak=lambda x, t, y: x)}, "guidance by a weaker network"),
        ({"scores": 1.5}, "scores is 1.5: expected numbers by name"),
        ({"scores": {"FID": float("nan")}}, "score FID is nan: expected a finite number"),
    ],
)
def test_publishing_refuses_before_it_asks_the_hub(server, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        ig_jax.push_to_hub(**{"model": network(PIXELS), "repository": "me/small"} | changes)
    assert "\n" not in str(caught.value) and not server.requests


def test_publishing_without_a_login(server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(InputError, match=r"me/small: cannot be published \(.*`hf auth login`") as c:
        ig_jax.push_to_hub(network(PIXELS), "me/small")
    assert "\n" not in str(c.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        ig_jax.push_to_hub(network(PIXELS), "me/small")


def test_repositories_of_others_are_refused(server):
    server.files["lab/ig", "config.json"] = b'{"model_type": "bert"}'
    with pytest.raises(InputError, match="lab/ig: its config.json is not one that ig_jax.push_to"):
        ig_jax.from_pretrained("lab/ig")
    with pytest.raises(InputError, match="nobody/nothing/config.json: .*cannot be downloaded"):
        ig_jax.from_pretrained("nobody/nothing")


OFFLINE = """\
import ig_jax
for name in ("sit-xl-2-ig", "lightningdit-xl-1-ig"):
    try:
        ig_jax.from_pretrained(name)
    except ig_jax.InputError as error:
        print(error)
"""


def test_without_network_it_says_so_at_once(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=environment
    )
    assert not done.stderr, done.stderr
    sit, light = done.stdout.splitlines()
    assert sit.startswith("CVLUESTC/Internal-Guidance/SiT/: the cache ")
    assert "HF_HUB_OFFLINE is set" in sit and sit.endswith("or a local file in its place")
    assert light.startswith("CVLUESTC/Internal-Guidance/Lightningdit/: the cache ")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_host_is_no_network(server, monkeypatch):
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    with pytest.raises(InputError, match=r"from https://hub.invalid \(no network\)"):
        ig_jax.from_pretrained("sit-small-ig")
    assert not server.requests


def test_the_table_is_the_papers():
    """Every entry is a published architecture with its recipe and the FID of the paper."""
    rows = {
        name: (
            p.fid,
            p.cfg_fid,
            [t["scale"] for t in p.guidance.record()],
            p.spec.auxiliary_depths,
            p.epochs,
        )
        for name, p in hub.PUBLISHED.items()
    }
    assert rows == {
        "sit-xl-2-ig": (1.75, 1.46, [1.4], (8,), 800),
        "lightningdit-xl-1-ig": (1.34, 1.19, [1.7], (8,), 680),
        "sit-xl-2": (8.61, None, [], (), 1400),
        "lightningdit-xl-1": (2.17, None, [], (), 800),
    }
    for published in hub.PUBLISHED.values():
        vae = AUTOENCODERS[published.autoencoder]
        assert vae.spec.latent_channels == published.spec.channels
        assert (vae.shift is None) == (published.autoencoder in hub.STATISTICS)
    cfg = hub.PUBLISHED["lightningdit-xl-1-ig"].cfg_guidance
    expected = ig_jax.Guidance(1.4, cfg_scale=1.45, cfg_interval=(0.19, 1.0))
    assert cfg.record() == expected.record()


class Pixels:
    """Pictures as they are, under Inception's name, opened from the file that was downloaded."""

    name, gives, width, spatial_width = "inception-stand-in", ("pool",), 192, None
    resize = fingerprint = "none"

    def __init__(self, evaluation, mesh):
        assert pathlib.Path(evaluation.inception_path).read_bytes() == b"inception"

    def __call__(self, images):
        return Features(images.reshape(len(images), -1).astype("float32"))


@pytest.fixture
def reproducible(server, monkeypatch, tmp_path):
    """The stand-in hub with a recipe, Inception and a reference: `run(*flags)` of the command."""
    small = dict(width=32, depth=3, heads=2, auxiliary_depth=1, input_size=4, num_classes=10)
    recipe = Recipe(
        "sit",
        "s",
        config=dict(
            model=small,
            data=dict(autoencoder="sd-small", image_size=8),
            guidance=dict(ig_scale=1.4),
            sampler=dict(name="euler", num_steps=2, batch_size=16),
        ),
        results=(
            Result(40, 9.0),
            Result(80, 5.31, inception_score=147.7),
            Result(80, 4.5, changes={"guidance.cfg_scale": 1.5}),
        ),
        repository="lab/ig",
        file="SiT/",
        epochs=80,
    )
    monkeypatch.setitem(RECIPES, "sit-small-ig", recipe)
    monkeypatch.setitem(hub.PUBLISHED, "sit-small-ig", hub._published("sit-small-ig", recipe))
    monkeypatch.setitem(EXTRACTORS, "inception", Pixels)
    pictures = np.random.default_rng(0).integers(256, size=(40, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "VIRTUAL_imagenet8.npz", arr_0=pictures)
    reference = (tmp_path / "VIRTUAL_imagenet8.npz").read_bytes()
    server.files["lab/vae", "pt_inception.pth"] = b"inception"
    server.files["lab/vae", "VIRTUAL_imagenet8.npz"] = reference
    where = f"{constants.ENDPOINT}/lab/vae/resolve/main/"
    monkeypatch.setattr(convert_inception, "URL", f"{where}pt_inception.pth")
    monkeypatch.setattr(reproduce, "REFERENCE", f"{where}VIRTUAL_imagenet8.npz")

    def run(**changes):
        config = reproduce.starting_config("sit-small-ig")
        config.sampler.num_samples = 40
        config.update_from_flattened_dict(changes)
        return reproduce.run(config, str(tmp_path / "run"), "sit-small-ig")

    return run


def test_one_command_from_nothing_to_the_number_beside_the_papers(
    server, reproducible, tmp_path, capsys, monkeypatch
):
    line = reproducible().splitlines()[-1]
    fid, deviation = map(float, re.search(r"FID ([\d.e+]+) ± ([\d.e+]+) \(over 10", line).groups())
    assert fid > 0 and 0 < deviation < fid
    assert line.endswith("the paper reports 5.31")
    printed = capsys.readouterr().out
    assert "paper" in printed and "5.31" in printed and "1.68" in printed
    (stored,) = (tmp_path / "run" / "evaluation").glob("*.json")
    (result,) = json.loads(stored.read_text())["results"]
    assert result["protocol"]["num_samples"] == 40 and result["protocol"]["ig_scale"] == 1.4
    # Again, with a picture missing: nothing is downloaded, and one batch is drawn.
    (picture,) = (tmp_path / "run" / "samples").glob("*/images/000020.png")
    content = picture.read_bytes()
    picture.unlink()
    server.requests.clear()
    monkeypatch.setattr(reproduce, "save_workdir", None)
    assert reproducible().splitlines()[-1] == line
    assert server.requests == [] and picture.read_bytes() == content
    # Another setting is another row of the paper, or none.
    cfg = reproducible(**{"guidance.cfg_scale": 1.5}).splitlines()[-1]
    assert cfg.endswith("the paper reports 4.5")
    none = reproducible(**{"guidance.ig_scale": 1.7}).splitlines()[-1]
    assert none.endswith("the paper reports none for this")


def test_what_cannot_be_downloaded_is_one_line(server, reproducible, tmp_path):
    del server.files["lab/vae", "VIRTUAL_imagenet8.npz"]
    with pytest.raises(InputError, match="VIRTUAL_imagenet8.npz cannot be downloaded .HTTP Error"):
        reproducible()
    assert [path.name for path in (tmp_path / "run").rglob("*.*")] == ["pt_inception.pth"]


def test_reproduce_names_what_is_missing(monkeypatch, capsys):
    for flags, message in (
        ([], "--mode=reproduce: expected --name=NAME"),
        (["--name=sit-xl-2-gi"], "did you mean sit-xl-2-ig"),
        (["--name=sit-xl-2-ig"], "--workdir=DIR expected"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ig_jax.main", "--mode=reproduce", *flags],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.split("\n")) == 2
