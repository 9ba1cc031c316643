import json
import pickle
import shutil
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from ig_jax import config as config_lib
from ig_jax import experiment
from ig_jax.data import images, latents, pipeline, prepare, shards
from ig_jax.data.sets import DATA_SETS
from ig_jax.errors import InputError
from tests.data.common import OPTIONS, encode, make_tree, strew

COUNT = 18
STATISTICS = (".safetensors", ".npz", pytest.param(".pt", marks=pytest.mark.torch))
NAMES = ("golden retriever", "tench, Tinca tinca", "tiger shark")


def without_noise(x):
    """An encoder whose posterior is one point, so that a sample is the mean."""
    mean, std = encode(x)
    return mean, 0 * std


def write_statistics(file, mean, std):
    """Per-channel statistics in the format of the file's ending; None is left out."""
    values = {k: np.asarray(v) for k, v in (("mean", mean), ("std", std)) if v is not None}
    if file.suffix == ".npz":
        np.savez(file, **values)
    elif file.suffix == ".safetensors":
        file.write_bytes(safetensors.numpy.save(values))
    else:
        import torch

        torch.save({k: torch.tensor(v) for k, v in values.items()}, file)


def write_npy(path, examples):
    """The SiT/REPA/EDM2 layout; labels in another order than the files."""
    (path / "vae-sd" / "00000").mkdir(parents=True)
    labels = []
    for i, example in enumerate(examples):
        name = f"00000/img-latents-{i:08d}.npy"
        moments = np.concatenate([example["mean"], example["std"]], axis=-1)
        np.save(path / "vae-sd" / name, np.ascontiguousarray(moments.transpose(2, 0, 1)))
        labels.append([name, int(example["label"])])
    (path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))


def write_safetensors(path, examples, statistics, twins):
    """LightningDiT's layout, three shards, statistics in the shape that PyTorch's are."""
    path.mkdir(exist_ok=True)
    for shard, indices in enumerate(np.array_split(np.arange(len(examples)), 3)):
        part = [examples[i] for i in indices]
        tensors = {"labels": np.array([e["label"] for e in part], np.int64)}
        for name, field in (("latents", "mean"), ("latents_flip", "mean_flip")):
            if name == "latents" or twins:
                stacked = np.stack([e[field] for e in part]).transpose(0, 3, 1, 2)
                tensors[name] = np.ascontiguousarray(stacked)
        file = path / f"latents_rank00_shard{shard:03d}.safetensors"
        file.write_bytes(safetensors.numpy.save(tensors))
    values = {k: np.float32(v).reshape(1, -1, 1, 1) for k, v in statistics.items()}
    (path / "latents_stats.safetensors").write_bytes(safetensors.numpy.save(values))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The same latents in three layouts, with and without twins."""
    root = tmp_path_factory.mktemp("layouts")
    tree = images.ImageFolder(make_tree(root / "tree"))
    for name, encoder, twins, autoencoder in (
        ("plain", without_noise, False, "sd-vae-ft-ema"),
        ("noisy", encode, False, "sd-vae-ft-ema"),
        ("twins", without_noise, True, "pooling"),
    ):
        path = root / name / "ours"
        options = OPTIONS | dict(autoencoder=autoencoder)
        prepare.prepare(tree, str(path), encoder, twins=twins, **options)
        index = shards.read_index(str(path))
        source = shards.ShardSource(str(path), index, index["shards"])
        examples = [source[i] for i in range(len(source))]
        write_npy(root / name / "npy", examples)
        write_safetensors(root / name / "light", examples, index["statistics"], twins)
    return root


def batches(source, count=7, **options):
    """Model inputs and labels of the first batches."""
    iterator = pipeline.make_iterator(source.train, batch_size=6, seed=1, **options)
    for step, batch in zip(range(count), iterator, strict=False):
        assert all(array.flags.c_contiguous for array in batch.values())
        key = jax.random.key(step)
        x = pipeline.model_input(batch, key, shift=source.shift, scale=source.scale)
        yield np.asarray(x), batch["label"]


def assert_same_batches(*sources):
    for (x, labels), *others in zip(*map(batches, sources), strict=True):
        for other_x, other_labels in others:
            np.testing.assert_array_equal(labels, other_labels)
            np.testing.assert_array_equal(x, other_x)


def test_three_layouts_give_the_same_batches(root):
    opened = [
        latents.open_latents(
            str(root / "plain" / name), autoencoder="sd-vae-ft-ema", num_validation=5
        )
        for name in ("ours", "npy", "light")
    ]
    for source in opened:
        assert source.shape == (4, 4, 4) and source.num_classes == 2
        assert (len(source.train), len(source.validation)) == (COUNT - 5, 5)
        assert source.shift == [0] and source.scale == np.float32(1 / 0.18215)
    assert_same_batches(*opened)
    for part in zip(*(pipeline.epoch_batches(s.validation, 4) for s in opened), strict=True):
        values = [batch.get("mean", batch.get("x")) for batch in part]
        np.testing.assert_array_equal(values[0], values[1])
        np.testing.assert_array_equal(values[0], values[2])


def test_posteriors_of_two_layouts_give_the_same_samples(root):
    opened = [latents.open_latents(str(root / "noisy" / name)) for name in ("ours", "npy")]
    assert_same_batches(*opened)
    means = latents.open_latents(str(root / "plain" / "ours"))
    first = [next(iter(batches(source, 1)))[0] for source in (opened[0], means)]
    assert abs(first[0] - first[1]).mean() > 0.01


def test_twins_of_two_layouts_give_the_same_batches(root):
    ours = latents.open_latents(str(root / "twins" / "ours"))
    light = latents.open_latents(str(root / "twins" / "light"), autoencoder="pooling")
    np.testing.assert_allclose(ours.shift, light.shift, rtol=1e-6)
    np.testing.assert_allclose(ours.scale, light.scale, rtol=1e-6)
    x = np.concatenate([x for x, _ in batches(ours, 60)])
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=0.1)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=0.1)
    assert_same_batches(ours, light)
    assert set(light.train[0]) == {"x", "x_flip", "label"}


def test_sources_travel_to_worker_processes(root):
    for name in ("ours", "npy", "light"):
        source = latents.open_latents(str(root / "plain" / name)).train
        first = source[3]  # opens files, which must not travel
        copy = pickle.loads(pickle.dumps(source))
        np.testing.assert_equal(copy[3], first)


@pytest.mark.parametrize("suffix", [*STATISTICS, ""])
def test_statistics_of_the_lightningdit_layout(root, tmp_path, suffix):
    path = tmp_path / "light"
    shutil.copytree(root / "twins" / "light", path)
    (path / "latents_stats.safetensors").unlink()
    mean, std = np.arange(4, dtype=np.float32), np.full((1, 4, 1, 1), 2, np.float32)
    if suffix:
        write_statistics(path / f"latents_stats{suffix}", mean, std)
    else:  # none stored: computed
        statistics = shards.read_index(str(root / "twins" / "ours"))["statistics"]
        mean, std = statistics["mean"], statistics["std"]
    source = latents.open_latents(str(path), autoencoder="pooling")
    np.testing.assert_allclose(source.shift, mean, rtol=1e-5)
    np.testing.assert_allclose(source.scale, np.ravel(std), rtol=1e-5)


@pytest.mark.parametrize("suffix", STATISTICS)
@pytest.mark.parametrize("alone", [True, False])
def test_sampling_needs_statistics_only(tmp_path, suffix, alone):
    """Converted weights know no data set: a file of statistics, or a folder with it, will do."""
    config = config_lib.default_config("lightningdit", "s")
    config.model.update(width=32, depth=2, heads=2, auxiliary_depth=1, num_classes=5)
    mean, std = np.arange(32, dtype=np.float32), np.full((1, 32, 1, 1), 2, np.float32)
    write_statistics(tmp_path / f"latents_stats{suffix}", mean, std)
    item = tmp_path / "workdir" / "checkpoints" / "0" / "source"
    item.mkdir(parents=True)
    (item / "metadata").write_text("{}")
    config.data.path = str(tmp_path / f"latents_stats{suffix}" if alone else tmp_path)
    converted = experiment.Experiment.from_config(config)
    source = converted.open_facts(str(tmp_path / "workdir"))
    np.testing.assert_array_equal(source.shift, mean)
    np.testing.assert_array_equal(source.scale, 2 + 0 * mean)
    assert (source.shape, source.num_classes, source.train) == ((16, 16, 32), 5, None)
    found = "it is a file" if alone else f"it holds latents_stats{suffix}"
    with pytest.raises(InputError, match=f"{found}.*expected prepared latents"):
        converted.open_data()
    converted.config.data.path = ""
    with pytest.raises(InputError, match="it is empty.*latents_stats.pt is enough"):
        converted.open_facts(str(tmp_path / "workdir"))


def test_statistics_of_pytorch_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "latents_stats.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"_stats.pt: .* needs PyTorch: pip .*or give a .safetens"):
        latents.known_statistics(str(tmp_path), "", 4)
    write_statistics(tmp_path / "latents_stats.safetensors", np.zeros(4), np.ones(4))
    assert latents.known_statistics(str(tmp_path), "", 4)[1].tolist() == [1] * 4


def test_statistics_of_an_index_alone(root, tmp_path):
    shutil.copy(root / "twins" / "ours" / "index.json", tmp_path)
    mean, std = latents.known_statistics(str(tmp_path), "pooling", 4)
    whole = latents.open_latents(str(root / "twins" / "ours"))
    np.testing.assert_array_equal([mean, std], [whole.shift, whole.scale])
    with pytest.raises(InputError, match="holds latents of pooling, expected va-vae-f16d32"):
        latents.known_statistics(str(tmp_path), "va-vae-f16d32", 4)
    assert latents.known_statistics(str(tmp_path / "none"), "pooling", 4) is None


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_files_as_numpy_writes_them(root, tmp_path, version, order):
    shutil.copytree(root / "noisy" / "npy", tmp_path / "npy")
    file = tmp_path / "npy" / "vae-sd" / "00000" / "img-latents-00000001.npy"
    values = np.random.default_rng(0).standard_normal((8, 4, 4)).astype(">f8")
    values[4:] **= 2  # a std
    with file.open("wb") as stream:
        np.lib.format.write_array(stream, np.asarray(values, order=order), version)
    example = latents.open_latents(str(tmp_path / "npy")).train[1]
    np.testing.assert_allclose(example["mean"], values[:4].transpose(1, 2, 0), rtol=1e-6)
    np.testing.assert_allclose(example["std"], values[4:].transpose(1, 2, 0), rtol=1e-6)
    assert example["std"].dtype == np.float32 and example["std"].dtype.isnative


@pytest.mark.torch
def test_half_precision_shards(tmp_path):
    import torch
    from safetensors.torch import save_file

    values = np.linspace(-1, 1, 2 * 4 * 2 * 2, dtype=np.float32).reshape(2, 4, 2, 2)
    tensors = {"latents": torch.tensor(values).bfloat16(), "labels": torch.tensor([1, 0])}
    save_file(tensors, tmp_path / "latents_rank00_shard000.safetensors")
    train = latents.open_latents(str(tmp_path)).train
    np.testing.assert_allclose(train[1]["x"], values[1].transpose(1, 2, 0), atol=4e-3)
    assert train[0]["label"] == 1 and train[0]["x"].dtype == np.float32


def test_no_data_says_how_to_prepare_it(tmp_path):
    for path, found in (
        ("", "it is empty"),
        (str(tmp_path / "none"), "there is no such directory"),
        (str(tmp_path), "it holds nothing"),
    ):
        with pytest.raises(InputError, match=found) as error:
            latents.open_latents(path)
        assert "--mode=prepare --config=sit_xl_ig --config.data.im" in str(error.value)
        assert "--config.data.autoencoder_path=" in str(error.value)
        assert "--config=digits_ig " in str(error.value) and "\n" not in str(error.value)


def test_latents_of_another_kind(root):
    ours, npy = (str(root / "plain" / name) for name in ("ours", "npy"))
    with pytest.raises(InputError, match="of sd-vae-ft-ema, expected sd-vae-ft-mse"):
        latents.open_latents(ours, autoencoder="sd-vae-ft-mse")
    with pytest.raises(
        InputError, match=r"\(4, 4, 4\), of 32-pixel images, expected \(32, 32, 4\)"
    ):
        latents.open_latents(ours, expected_shape=(32, 32, 4))
    with pytest.raises(InputError, match="of 4 channels, expected 32, as va-vae-f16d32 has"):
        latents.open_latents(npy, autoencoder="va-vae-f16d32")
    with pytest.raises(InputError, match="found label 1, expected labels below 1"):
        latents.open_latents(npy, num_classes=1)
    with pytest.raises(InputError, match="num_validation is 18: expected 0…17"):
        latents.open_latents(ours, num_validation=18)


def without_dataset_json(path):
    (path / "vae-sd" / "dataset.json").unlink()


def with_dataset_json(labels):
    def write(path):
        where = path / "vae-sd" / "dataset.json"
        names = [name for name, _ in json.loads(where.read_text())["labels"]]
        where.write_text(json.dumps(labels(names)))

    return write


def flat(path):
    """Files without folders, and no dataset.json."""
    for file in (path / "vae-sd" / "00000").iterdir():
        file.rename(path / file.name)
    shutil.rmtree(path / "vae-sd")


def without_tensor(path):
    for file in path.glob("latents_rank*.safetensors"):
        tensors = safetensors.numpy.load_file(file)
        del tensors["labels"]
        file.write_bytes(safetensors.numpy.save(tensors))


def without_classes(path):
    index = json.loads((path / "index.json").read_text())
    del index["digest"]
    (path / "index.json").write_text(json.dumps(index | {"class_names": []}))


@pytest.mark.parametrize(
    ("layout", "remove", "found"),
    [
        ("npy", without_dataset_json, "dataset.json: no such file"),
        ("npy", flat, "dataset.json: no such file"),
        ("npy", with_dataset_json(lambda names: {"labels": None}), "its labels are null"),
        ("npy", with_dataset_json(lambda names: {}), "its labels are null"),
        ("npy", with_dataset_json(lambda n: {"labels": [[a, None] for a in n]}), "are null"),
        ("light", without_tensor, "shard000.safetensors: holds no labels"),
        ("ours", without_classes, "index.json: names no classes"),
    ],
)
def test_latents_without_labels_are_for_unconditional_models(root, tmp_path, layout, remove, found):
    shutil.copytree(root / "plain" / layout, tmp_path / layout)
    whole = latents.open_latents(str(root / "plain" / layout)).train
    remove(tmp_path / layout)
    source = latents.open_latents(str(tmp_path / layout), num_validation=2)
    assert (source.num_classes, source.class_names) == (0, ())
    assert (len(source.train), len(source.validation)) == (COUNT - 2, 2)
    unlabelled = latents.open_latents(str(tmp_path / layout)).train
    name = "x" if layout == "light" else "mean"
    for i in range(COUNT):
        np.testing.assert_array_equal(unlabelled[i][name], whole[i][name])
        assert layout == "ours" or unlabelled[i]["label"] == 0
    # The same from the config, which is what a user gives.
    config = config_lib.default_config("sit", "s")
    config.data.update(path=str(tmp_path / layout), num_validation=0)
    config.model.num_classes = 0
    assert DATA_SETS["latents"](config.data, (4, 4, 4), config.model.num_classes).num_classes == 0
    config.model.num_classes = 3
    line = f"{found}, so that these latents have no labels: config.model.num_classes is 3, expected"
    with pytest.raises(InputError, match=f"{line} 0 .an unconditional model., or labels"):
        DATA_SETS["latents"](config.data, (4, 4, 4), config.model.num_classes)


def test_shards_that_lack_labels_which_others_have(root, tmp_path):
    shutil.copytree(root / "plain" / "light", tmp_path / "light")
    (tmp_path / "one").mkdir()
    file = tmp_path / "light" / "latents_rank00_shard001.safetensors"
    file.rename(tmp_path / "one" / file.name)
    without_tensor(tmp_path / "one")
    (tmp_path / "one" / file.name).rename(file)
    with pytest.raises(
        InputError, match=r"shard001.safetensors: holds no labels.*other shards have .2 of 3"
    ):
        latents.open_latents(str(tmp_path / "light"))


@pytest.mark.parametrize(("layout", "suffix"), [("npy", ".npy"), ("light", ".safetensors")])
def test_what_are_no_latents_counts_in_no_layout(root, tmp_path, layout, suffix):
    shutil.copytree(root / "plain" / layout, tmp_path / layout)
    strew(tmp_path / layout, suffix)
    if layout == "npy":
        strew(tmp_path / layout / "vae-sd" / "00000", suffix)
    assert len(latents.open_latents(str(tmp_path / layout)).train) == COUNT


def test_damaged_files_are_named(root, tmp_path):
    path = tmp_path / "npy"
    shutil.copytree(root / "plain" / "npy", path)
    file = path / "vae-sd" / "00000" / "img-latents-00000002.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match="00000002.npy: cannot be read as a NumPy file"):
        latents.open_latents(str(path)).train[2]

    path = tmp_path / "light"
    shutil.copytree(root / "plain" / "light", path)
    file = path / "latents_rank00_shard001.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match="shard001.safetensors: truncated.*the other 2 of 3"):
        latents.open_latents(str(path))
    rest = latents.open_latents(str(path), skip_damaged=True).train
    assert len(rest) == 12
    np.testing.assert_array_equal(
        rest[6]["x"], latents.open_latents(str(root / "plain" / "light")).train[12]["x"]
    )
    file.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="shard001.safetensors: cannot be read as a safetensors"):
        latents.open_latents(str(path))

    path = tmp_path / "ours"
    shutil.copytree(root / "plain" / "ours", path)
    file = path / "latents-00000-of-00004.arrayrecord"
    data = bytearray(file.read_bytes())
    where = data.find(latents.open_latents(str(path)).train[1]["mean"].tobytes())
    assert where > 0
    data[where + 5] ^= 255
    file.write_bytes(data)
    damaged = latents.open_latents(str(path)).train
    with pytest.raises(
        InputError, match="00000-of-00004.arrayrecord: damaged, record of example 1"
    ):
        damaged[1]
    assert damaged[0]["label"] == 0 and len(damaged) == COUNT


def test_classes_by_number_and_name():
    resolve = latents.resolve_classes
    assert resolve("2, golden retriever,Tinca tinca", NAMES) == (2, 0, 1)
    assert resolve([1, "Tiger Shark", np.int64(0)], NAMES) == (1, 2, 0)
    assert resolve("3", ("3", "5")) == (0,)  # names that are numbers come first
    with pytest.raises(InputError, match="'tiger shrak' does not exist.*did you mean tiger shark"):
        resolve("tiger shrak", NAMES)
    with pytest.raises(InputError, match="class 3 does not exist: expected 0…2"):
        resolve("3", NAMES)
    with pytest.raises(InputError, match="no class named"):
        resolve([], NAMES)
    with pytest.raises(InputError, match="no class named"):
        resolve(" , ", NAMES)
    assert latents.class_names(1000)[207] == "golden retriever"
    assert latents.class_names(3) == ("0", "1", "2")


def test_every_imagenet_class_is_found_by_its_whole_name():
    names = latents.class_names(1000)
    assert latents.resolve_classes(names, names) == tuple(range(1000))
    assert latents.resolve_classes(", ".join(names), names) == tuple(range(1000))
    together = f"{names[0]}, 5, {names[2].upper()}, cardigan"  # a garment, and also a dog's part
    assert latents.resolve_classes(together, names) == (0, 5, 2, 474)
    with pytest.raises(InputError, match=r"'panda' is 387 \(lesser panda.*\) or 388 \(giant pand"):
        latents.resolve_classes("panda", names)


def test_a_flipped_bit_of_a_shard_is_noticed(root, tmp_path):
    """ArrayRecord's own hashes find it, at the first use of the record: nothing is read twice."""
    path = tmp_path / "ours"
    shutil.copytree(root / "plain" / "ours", path)
    index = shards.read_index(str(path))
    file = path / index["shards"][1]["file"]
    content = file.read_bytes()

    def read():
        source = shards.ShardSource(str(path), index, index["shards"])
        return [
            shards.encode_record(e["label"], [e["mean"], e["std"]])
            for e in map(source.__getitem__, range(len(source)))
        ]

    good, noticed = read(), 0
    rng = np.random.default_rng(0)
    used = np.flatnonzero(np.frombuffer(content, np.uint8))  # the rest is filling
    for position in rng.choice(used, 60, replace=False):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            assert read() == good
        except InputError as error:
            assert str(file) in str(error)
            noticed += 1
    assert noticed > 50
