"""From pictures to latents to training, and from samples back to pictures, at small size."""

import json
import os
import sys
import types

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from ig_jax import config as config_lib
from ig_jax import experiment
from ig_jax.data import digits
from ig_jax.errors import InputError
from ig_jax.evaluation import run as evaluation
from ig_jax.evaluation import scoring
from ig_jax.sampling import run as sampling
from ig_jax.storage import weight_files
from ig_jax.training import run as training
from ig_jax.training.setup import Setup
from tests.common import golden, seeded_weights, tiny_config

SIZE, PER_CLASS = 16, 24
# A folder's name that is not UTF-8, and what becomes of it.
TEMPLE, TEMPLE_TEXT = os.fsdecode(b"temp\xe9"), r"temp\udce9"
if sys.platform != "linux":  # file systems that take UTF-8 only
    TEMPLE = TEMPLE_TEXT = "temple"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Crops of scikit-learn's two photographs, and digits: three classes of real images."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, photo in zip((TEMPLE, "flower"), load_sample_images().images, strict=True):
        (root / name).mkdir()
        for i in range(PER_CLASS):
            top, left = rng.integers(0, photo.shape[0] - 96), rng.integers(0, photo.shape[1] - 96)
            crop = photo[top : top + 96, left : left + 80]
            Image.fromarray(crop).save(root / name / f"{i:03d}.jpg", quality=95)
    (root / "digit").mkdir()
    for i, image in enumerate(digits.load()[0][:PER_CLASS]):
        grey = Image.fromarray(np.uint8((image[..., 0] + 1) * 127.5))
        grey.resize((24, 24)).save(root / "digit" / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A small autoencoder with LDM's names, halving the resolution, 4 latent channels."""
    shapes = json.loads(str(golden("vae_ldm_small")["shapes_json"]))
    path = tmp_path_factory.mktemp("autoencoder") / "small.safetensors"
    weight_files.write_safetensors(path, seeded_weights(shapes))
    return path


def make_config(family, pictures, autoencoder, latents):
    config = config_lib.default_config(family, "s")
    small = tiny_config(num_steps=4, validate_every=2, sample_every=4, checkpoint_every=4)
    config.model.update(
        width=32, depth=3, heads=2, auxiliary_depth=1, input_size=8, channels=4, num_classes=3
    )
    config.data.update(
        name="latents",
        path=str(latents),
        images=str(pictures),
        image_size=SIZE,
        autoencoder="small",
        autoencoder_path=str(autoencoder),
        num_validation=8,
    )
    config.train.update(small.train)
    config.sampler.update(num_steps=4, num_samples=8, batch_size=8)
    return config


@pytest.fixture(scope="module")
def latents(pictures, autoencoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "small"
    line = experiment.run_prepare(make_config("sit", pictures, autoencoder, path), None)
    assert str(3 * PER_CLASS) in line
    return path


@pytest.mark.parametrize("family", ["sit", pytest.param("lightningdit", marks=pytest.mark.slow)])
def test_pictures_to_pictures(family, pictures, autoencoder, latents, tmp_path):
    config = make_config(family, pictures, autoencoder, latents)
    training.train(config, str(tmp_path))
    source = Setup.from_config(config, tmp_path).source
    assert source.class_names == ("digit", "flower", TEMPLE_TEXT)
    assert len(source.train) == 3 * PER_CLASS - 8
    with Image.open(tmp_path / "samples" / "step_0000004.png") as grid:
        assert grid.mode == "RGBA"

    # Sampling needs the checkpoint and the decoder, not the latents.
    config.data.path = "/nowhere"
    config.sampler.labels = "flower,0,2"
    sampling.run(config, str(tmp_path))
    (samples,) = (p for p in (tmp_path / "samples").iterdir() if p.is_dir())
    with np.load(samples / "samples.npz") as file:
        assert file["arr_0"].shape == (8, SIZE, SIZE, 3) and file["arr_0"].dtype == np.uint8
    lines = (samples / "labels.txt").read_text().splitlines()
    assert lines[:3] == ["000000 1 flower", "000001 0 digit", f"000002 2 {TEMPLE_TEXT}"]
    with Image.open(samples / "images" / "000007.png") as picture:
        assert picture.size == (SIZE, SIZE)

    config.sampler.labels = "flowr"
    with pytest.raises(InputError, match="flowr.*did you mean flower"):
        sampling.run(config, str(tmp_path))


def test_a_run_loads_its_decoder_once(pictures, autoencoder, latents, tmp_path, monkeypatch):
    """Though its sample grids, its evaluations and the one at the end all need it."""
    loaded, load = [], experiment.load_autoencoder
    monkeypatch.setattr(experiment, "load_autoencoder", lambda c: loaded.append(c) or load(c))
    opened = types.SimpleNamespace(scorer=lambda: None)
    monkeypatch.setattr(scoring, "open_for_samples", lambda *_: opened)
    config = make_config("sit", pictures, autoencoder, latents)
    config.evaluation.at_end = True
    setup = Setup.from_config(config, tmp_path)
    assert len(training.callbacks(setup)) == 3
    for _ in range(2):
        evaluation.Evaluator.create(setup.experiment, setup.source, {}, tmp_path, object())
    assert len(loaded) == 1


@pytest.mark.parametrize("due", [{"train.sample_every": 4}, {"evaluation.at_end": True}])
def test_training_without_a_decoder_says_so_at_once(due, pictures, autoencoder, latents, tmp_path):
    config = make_config("sit", pictures, autoencoder, latents)
    config.train.sample_every = 0
    config.update_from_flattened_dict(due)
    config.data.autoencoder_path = ""
    with pytest.raises(InputError, match="config.data.autoencoder_path is empty: expected"):
        training.train(config, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_a_published_config_without_data_says_how_to_prepare_it(tmp_path):
    config = config_lib.default_config("sit", "xl")
    with pytest.raises(InputError, match="--mode=prepare.*--config=digits_ig "):
        training.train(config, str(tmp_path / "w"))
