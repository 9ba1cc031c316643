import dataclasses
import os

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from ig_jax.diffusion.guidance import Guidance, GuidanceOptions
from ig_jax.errors import InputError, NotFiniteError
from ig_jax.experiment import Experiment
from ig_jax.models import dit
from ig_jax.models.functional import split
from ig_jax.parallel import sharding
from ig_jax.sampling import run as sampling
from ig_jax.sampling.engine import Engine
from ig_jax.sampling.labels import choose_labels
from ig_jax.sampling.run import make_engine
from ig_jax.training import run as training
from tests.common import tiny_config


@pytest.fixture(scope="module")
def setup():
    experiment = Experiment.from_config(tiny_config())
    model = dit.DiT(experiment.spec, rngs=nnx.Rngs(0))
    _, params = split(model)
    # The heads start at zero: give every array some noise, so that both matter.
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
    return make_engine(experiment), params


def draw(engine, params, count=16, guidance=None, first=0):
    guidance = guidance or Guidance(1.5)
    indices = first + np.arange(count)
    labels = choose_labels("random", indices, 10, 0)
    return engine.draw(params, guidance, 0, indices, labels)


def test_samples_do_not_depend_on_batch_or_devices(setup):
    engine, params = setup
    x = draw(engine, params, 24)
    assert x.shape == (24, 8, 8, 1) and np.isfinite(x).all()
    np.testing.assert_allclose(draw(engine, params, 5, first=19), x[19:], atol=1e-5)
    larger = dataclasses.replace(engine, batch_size=24)
    np.testing.assert_allclose(draw(larger, params, 24), x, atol=1e-5)
    alone = dataclasses.replace(
        engine, batch_size=8, mesh=sharding.make_mesh(devices=jax.devices()[:1])
    )
    host = jax.device_get(params)
    np.testing.assert_allclose(draw(alone, host, 24), x, atol=1e-5)


def test_new_scales_do_not_recompile(setup):
    engine, params = setup
    sizes = []
    for guidance in (Guidance(1.1), Guidance(1.9), Guidance(0.0)):
        draw(engine, params, guidance=guidance)
        sizes.append(engine._draw._cache_size())
    assert len(set(sizes)) == 1
    a = draw(engine, params, guidance=Guidance(1.5, cfg_scale=1.2))
    compiled = engine._draw._cache_size()
    b = draw(engine, params, guidance=Guidance(1.5, cfg_scale=2.2))
    assert engine._draw._cache_size() == compiled
    assert not np.allclose(a, b)


def test_labels():
    indices = np.arange(1000)
    random = choose_labels("random", indices, 10, 0)
    tail = choose_labels("random", indices[500:], 10, 0)
    np.testing.assert_array_equal(random[500:], tail)
    assert set(random) == set(range(10))
    balanced = choose_labels("balanced", indices, 10, 0)
    assert np.bincount(balanced).tolist() == [100] * 10
    given = choose_labels("given", indices[:5], 10, 0, (3, 7))
    assert given.tolist() == [3, 7, 3, 7, 3]
    assert choose_labels("random", indices, 0, 0).tolist() == [0] * 1000
    with pytest.raises(InputError, match="label 10 is out of range: expected 0…9"):
        choose_labels("given", indices, 10, 0, (10,))


def test_sample_mode_writes_pictures_and_npz(tmp_path):
    config = tiny_config(num_steps=2)
    training.train(config, str(tmp_path))
    config.sampler.num_samples = 10
    line = sampling.run(config, str(tmp_path))
    assert "10 samples of step 2" in line
    (samples,) = (tmp_path / "samples").iterdir()
    assert samples.name.startswith("step2_ig1_cfg1_heun3_seed0_")
    with np.load(samples / "samples.npz") as file:
        assert file.files == ["arr_0"]
        found = file["arr_0"]
    assert found.shape == (10, 8, 8, 1) and found.dtype == np.uint8
    assert len((samples / "labels.txt").read_text().splitlines()) == 10
    with Image.open(samples / "samples.png") as picture:
        assert picture.size[0] > 3 * 64

    # Stopped in the middle (some pictures missing, one half written) and started again.
    for index in (3, 7):
        (samples / "images" / f"{index:06d}.png").unlink()
    (samples / "images" / "000003.png.partial").write_bytes(b"half")
    # What a machine that lost power leaves, or a copy; and what belongs to somebody else.
    (samples / "images" / "000001.png").write_bytes(b"")
    os.truncate(samples / "images" / "000002.png", 40)
    (samples / "images" / "abcdef.png").write_bytes(b"")
    assert "4 drawn now" in sampling.run(config, str(tmp_path))
    with np.load(samples / "samples.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], found)
    config.sampler.num_samples = 12
    assert "2 drawn now" in sampling.run(config, str(tmp_path))

    # Another request has a folder of its own.
    config.guidance.ig_scale = 2.5
    assert "12 drawn now" in sampling.run(config, str(tmp_path))
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_samples_that_are_not_finite_are_no_pictures(tmp_path, caplog, monkeypatch):
    """In the grids of training, which goes on, and in the sampling mode, which ends."""

    def diverged(self, params, guidance, seed, indices, labels):
        x = np.zeros((len(indices), *self.settings.shape), np.float32)
        x[3, 2, 1] = np.nan
        yield np.arange(len(indices)), x

    monkeypatch.setattr(Engine, "batches", diverged)
    config = tiny_config(num_steps=1, sample_every=1, validate_every=0)
    training.train(config, str(tmp_path))
    assert "no sample grid: 1 of 16 pictures at step 1 are not finite (3)" in caplog.text
    config.guidance.ig_scale = 1.7
    with pytest.raises(NotFiniteError, match=r"1 of 16 pictures at IG 1.7 are not finite \(3\)"):
        sampling.run(config, str(tmp_path))
    assert not [path for path in (tmp_path / "samples").rglob("*") if path.is_file()]


def test_autoguidance_uses_another_workdirs_network_or_an_older_ema(tmp_path, setup):
    config = tiny_config(num_steps=2, validate_every=0, checkpoint_every=1)
    training.train(config, str(tmp_path))
    config.guidance.update(weak=str(tmp_path), ig_scale=2.0)
    engine = make_engine(Experiment.from_config(config))
    _, params = setup
    options = GuidanceOptions(2.0)
    guided = draw(engine, params, guidance=options.build(engine.weaker))
    own = draw(*setup, guidance=options.build())
    assert not np.allclose(guided, own)
    plain = draw(engine, params, guidance=Guidance(1.0))
    np.testing.assert_allclose(plain, draw(*setup, guidance=Guidance(1.0)), atol=1e-5)
    config.guidance.weak_step = "1"
    older = make_engine(Experiment.from_config(config))
    pairs = zip(*(jax.tree.leaves(e.weaker.params) for e in (engine, older)), strict=True)
    assert any(not np.array_equal(last, first) for last, first in pairs)
    config.guidance.weak_step = "7"
    with pytest.raises(InputError, match="no checkpoint of step 7 .*there are 1, 2"):
        make_engine(Experiment.from_config(config))
    config.guidance.weak_step = "older"
    with pytest.raises(InputError, match="config.guidance.weak_step is 'older': expected last"):
        make_engine(Experiment.from_config(config))
    config.guidance.weak_step = "last"
    config.loss.path = "cosine"
    with pytest.raises(InputError, match="loss.path is linear: expected cosine"):
        make_engine(Experiment.from_config(config))


def test_an_empty_workdir_is_refused(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in .*expected a workdir that --mode=train"):
        sampling.run(tiny_config(), str(tmp_path))
    assert list(tmp_path.iterdir()) == []
