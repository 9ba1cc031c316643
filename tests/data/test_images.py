import numpy as np
import pytest
from PIL import Image

from ig_jax.data import images
from ig_jax.errors import InputError
from tests.data.common import SIZE, add_irregular, encoded, make_tree, photo


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = make_tree(tmp_path_factory.mktemp("images") / "tree")
    return root, add_irregular(root)


def test_a_crop_of_the_right_size_is_the_image():
    image = photo().crop((0, 0, SIZE, SIZE))
    np.testing.assert_array_equal(images.center_crop(image, SIZE), np.asarray(image))


def test_halving_is_a_mean_of_two_by_two_pixels():
    image = photo().crop((0, 0, 64, 64))
    expected = np.asarray(image, float).reshape(16, 4, 16, 4, 3).mean((1, 3))
    np.testing.assert_allclose(images.center_crop(image, 16), expected, atol=2)


def test_the_middle_is_cut_out():
    columns = np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (16, 1, 3))
    for image in (columns, columns.transpose(1, 0, 2)):
        cropped = images.center_crop(Image.fromarray(image), 16)
        middle = np.arange(12, 28)
        np.testing.assert_array_equal(np.unique(cropped), middle)


@pytest.mark.parametrize("size", [(640, 427), (31, 300), (17, 16), (5, 7), (1, 1)])
def test_any_size_gives_the_target(size):
    assert images.center_crop(photo().resize(size), 24).shape == (24, 24, 3)


def test_modes_become_rgb():
    small = photo().resize((SIZE, SIZE))
    reference = np.asarray(small, float)
    grey = np.asarray(small.convert("L"), float)[..., None] + np.zeros(3)
    wide = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    for image, kind, mode, expected in (
        (small, "PNG", "", reference),
        (small.convert("L"), "PNG", "L", grey),
        (wide, "PNG", "I;16", grey),
        (small.convert("RGBA"), "PNG", "RGBA", reference),
        (small.convert("CMYK"), "TIFF", "CMYK", reference),
    ):
        picture = images.decode(encoded(image, kind), SIZE)
        assert (picture.converted, picture.enlarged) == (mode, False)
        np.testing.assert_allclose(picture.pixels, expected, atol=2)


def test_unreadable_images_say_why(tree):
    root, _ = tree
    for name, reason in (
        ("broken.jpg", "(?i)truncated"),
        ("text.jpg", "not an image"),
        ("long.png", "600×2, a side over 50 times"),
    ):
        with (
            open(f"{root}/odd/{name}", "rb") as file,
            pytest.raises(images.UnreadableImage, match=reason),
        ):
            images.decode(file.read(), SIZE)


def test_a_folder_of_classes(tree):
    folder = images.ImageFolder(tree[0])
    assert folder.class_names == ("china", "flower", "odd")
    assert len(folder) == 26
    assert [folder[i][1] for i in (0, 9, 25)] == [0, 1, 2]
    assert folder.name(10) == "flower/001.png"
    assert folder.describe() == images.ImageFolder(tree[0]).describe()


def test_training_on_pixels_replaces_damaged_files(tree, caplog):
    source = images.open_folder(tree[0], SIZE, num_validation=4)
    assert source.shape == (SIZE, SIZE, 3) and source.num_classes == 3
    assert source.autoencoder is None and source.class_names[2] == "odd"
    assert len(source.train) + len(source.validation) == 26
    everything = images.PixelSource(images.ImageFolder(tree[0]), SIZE)
    example = everything[18]  # odd/broken.jpg, followed by cmyk.jpg
    assert "odd/broken.jpg: " in caplog.text and "the next image is used" in caplog.text
    assert example["x"].shape == (SIZE, SIZE, 3) and example["x"].dtype == np.uint8
    np.testing.assert_array_equal(example["x"], everything[19]["x"])


def test_imagenet_ids_become_words():
    ids = [f"n{i:08d}" for i in range(1000)]
    names = images.readable_names(ids)
    assert names[1] == "goldfish, Carassius auratus" and "golden retriever" in names[207]
    assert images.readable_names(["n00000001", "cat"]) == ("n00000001", "cat")


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    """A TFDS image classification set of ten pictures, as `tfds build` would leave it."""
    import tensorflow_datasets as tfds

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(10):
                yield i, {"image": np.asarray(photo().crop((i, 0, i + 40, 32))), "label": i % 2}

    directory = tmp_path_factory.mktemp("tfds")
    for data_dir, file_format in ((directory, "array_record"), (directory / "old", "tfrecord")):
        builder = TinyPictures(data_dir=str(data_dir), file_format=file_format)
        builder.download_and_prepare()
    return str(directory)


def test_tfds(tfds_directory):
    opened = images.open_images("tfds:tiny_pictures@train[2:]", tfds_directory)
    assert len(opened) == 8 and opened.class_names == ("cat", "dog")
    assert opened.name(3) == "tiny_pictures train[2:][3]"
    assert opened.describe()["name"] == "tiny_pictures/1.0.0"
    source = images.open_tfds("tiny_pictures", SIZE, num_validation=3, data_dir=tfds_directory)
    assert (len(source.train), len(source.validation)) == (7, 3)
    whole = images.PixelSource(images.TfdsImages("tiny_pictures", data_dir=tfds_directory), SIZE)
    found = {whole[i]["x"].tobytes(): int(whole[i]["label"]) for i in range(10)}
    expected = {
        images.center_crop(photo().crop((i, 0, i + 40, 32)), SIZE).tobytes(): i % 2
        for i in range(10)
    }
    assert found == expected


def test_tfds_bad_input(tfds_directory, tmp_path):
    with pytest.raises(InputError, match="no split 'valid': expected one of train"):
        images.TfdsImages("tiny_pictures", "valid", tfds_directory)
    with pytest.raises(InputError, match="is stored as tfrecord, expected array_record.*tfds conv"):
        images.TfdsImages("tiny_pictures", "train", f"{tfds_directory}/old")
    with pytest.raises(
        InputError, match=r"tfds build cifar10 --file_format=array_record --data_dir"
    ):
        images.TfdsImages("cifar10", "train", str(tmp_path))
    with pytest.raises(InputError, match="no data set 'cifar11'.*did you mean cifar10"):
        images.TfdsImages("cifar11", "train", str(tmp_path))


def test_a_folder_without_classes_is_unlabelled(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "b.png")
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "a.png")
    source = images.open_folder(str(tmp_path), 8)
    assert (source.num_classes, source.class_names) == (0, ())
    assert [int(source.train[i]["label"]) for i in range(2)] == [0, 0]
    assert source.train[0]["x"][0, 0].tolist() == [0, 0, 255]


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match="no such folder, expected images as class/name.jpg"):
        images.open_images(str(tmp_path / "none"))
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.raises(InputError, match="found notes.txt, expected a folder for each class"):
        images.open_images(str(tmp_path))
    with pytest.raises(InputError, match="config.data.images is empty"):
        images.open_images("")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "picture.jpg").write_bytes(b"")
    source = images.open_folder(str(tmp_path), SIZE)
    with pytest.raises(InputError, match="not one of the images can be decoded"):
        source.train[0]
