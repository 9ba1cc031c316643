import contextlib
import os
import re
import struct
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from ig_jax import pictures
from ig_jax.data import images
from ig_jax.errors import InputError
from ig_jax.evaluation import images as image_sets
from ig_jax.experiment import Experiment
from ig_jax.sampling.folder import PictureFolder
from tests.common import tiny_config
from tests.data.common import SIZE, add_irregular, encoded, make_tree, photo, strew


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


@pytest.mark.parametrize("turn", range(1, 9))
def test_photographs_stand_upright(tmp_path, turn):
    """As Pillow would show them; pictures from TFDS lie as ADM takes them."""
    exif = Image.Exif()
    exif[274] = turn
    photo().resize((40, 24)).save(tmp_path / "a.png", exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    shown = images.center_crop(Image.fromarray(shown), SIZE)
    x = images.open_folder(str(tmp_path), SIZE).train[0]["x"]
    np.testing.assert_array_equal(x, shown)
    lying = images.decode((tmp_path / "a.png").read_bytes(), SIZE, turned=False).pixels
    assert np.array_equal(lying, shown) == (turn == 1)
    assert images.ImageFolder(str(tmp_path)).turned and not images.TfdsImages.turned


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_white_shows_where_a_picture_is_transparent(mode):
    grey = Image.new("L", (SIZE, SIZE), 100)
    if mode in ("RGBA", "LA"):
        image = grey.convert(mode)
        alpha = np.repeat(np.uint8([[255], [0]]), SIZE // 2, 0).repeat(SIZE, 1)
        image.putalpha(Image.fromarray(alpha))
        more = {}
    else:
        image = grey.convert(mode)
        image.paste(Image.new(mode, (SIZE, SIZE // 2), 0), (0, SIZE // 2))
        more = {"transparency": (0, 0, 0) if mode == "RGB" else image.getpixel((0, SIZE - 1))}
    picture = images.decode(encoded(image, **more), SIZE)
    assert picture.converted == f"{mode}, on white"
    np.testing.assert_array_equal(np.unique(picture.pixels[: SIZE // 2]), 100)
    np.testing.assert_array_equal(np.unique(picture.pixels[SIZE // 2 :]), 255)


def test_training_on_pixels_reports_what_is_irregular(tree, caplog):
    caplog.set_level("INFO", "ig_jax")
    images.open_folder(tree[0], SIZE)
    (said,) = (r.getMessage() for r in caplog.records if "looked at" in r.getMessage())
    assert said.startswith("of 26 images looked at: ") and "1 enlarged (odd/tiny.png)" in said
    for mode, name in (("CMYK", "cmyk.jpg"), ("L", "grey.jpg"), ("RGBA", "transparent.png")):
        assert f"1 converted from {mode} (odd/{name})" in said
    assert "1 put on white (odd/transparent.png)" in said
    caplog.clear()
    regular = images.ImageFolder(tree[0])
    regular._labels, regular._names = regular._labels[:9], regular._names[:9]
    assert images.survey(regular, SIZE) == ""


def test_a_wrong_size_names_the_flags(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "b.png")
    config = tiny_config()
    config.model.update(channels=3, num_classes=0, input_size=16)
    config.data.update(name="folder", path=str(tmp_path), image_size=8, num_validation=0)
    message = (
        "config.data.image_size is 8: the network takes 16×16 .--config.data.image_size=16 crops "
        "to that, or --config.model.input_size=8"
    )
    with pytest.raises(InputError, match=message):
        Experiment.from_config(config).open_data()


def tiff(values, bits):
    """A greyscale TIFF of (8, 8) integers whose samples have `bits` bits, packed."""
    packed = int("".join(f"{v:0{bits}b}" for v in values.ravel()), 2).to_bytes(8 * bits, "big")
    fields = {256: 8, 257: 8, 258: bits, 259: 1, 262: 1, 273: 130, 277: 1, 278: 8, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(fields)) + entries
    return head.ljust(130, b"\0") + packed


RAMP = np.linspace(0, 255, 64).round().reshape(8, 8)  # 8-bit levels


@pytest.mark.parametrize(
    ("mode", "data"),
    [
        ("F", encoded(Image.fromarray(np.float32(RAMP / 255)), "TIFF")),
        ("F", encoded(Image.fromarray(np.float32(RAMP)), "TIFF")),
        ("F", encoded(Image.fromarray(np.float32(RAMP / 255 * 1.04 - 0.02)), "TIFF")),
        ("I;16", encoded(Image.fromarray(np.uint16(RAMP * 257)), "TIFF")),
        ("I", encoded(Image.fromarray(np.uint16(RAMP * 257)), "PPM")),
        ("I;16", tiff((RAMP * 16.0588).astype(int), 12)),
    ],
)
def test_more_than_eight_bits_keep_their_range(mode, data):
    picture = images.decode(data, 8)
    assert picture.converted == mode
    np.testing.assert_allclose(picture.pixels, RAMP[..., None] + np.zeros(3), atol=6)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.float32(RAMP / 127.5 - 1), r"floating-point values from -1 to 1, expected \[0, 1\] or"),
        (np.float32(RAMP / 64), "floating-point values from 0 to 3.98438"),
        (np.float32(RAMP * 257), "floating-point values from 0 to 65535"),
        (np.float32(np.where(RAMP > 9, RAMP, np.nan)), "values from nan to nan"),
        (np.float32(np.where(RAMP > 9, RAMP, np.inf)), "values from .* to inf"),
        (np.int32(RAMP), "integers of 32 bits, from 0 to 255: expected 8 or 16 bits"),
        (np.int32(RAMP * 2**20), "integers of 32 bits"),
    ],
)
def test_an_unknown_range_is_skipped_with_a_reason(values, reason):
    with pytest.raises(images.UnreadableImage, match=reason):
        images.decode(encoded(Image.fromarray(values), "TIFF"), 8)


Image.init()
KINDS = {"PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "AVIF"} & set(Image.SAVE)


@pytest.mark.parametrize("kind", sorted(KINDS))  # AVIF came with Pillow 11.3
def test_whatever_a_damaged_file_raises_is_a_reason(kind):
    whole = encoded(photo().resize((24, 24)), kind)
    assert images.decode(whole, SIZE).pixels.shape == (SIZE, SIZE, 3)
    for size in (0, 9, len(whole) // 2):
        with pytest.raises(images.UnreadableImage, match="."):
            images.decode(whole[:size], SIZE)
    for start in range(0, len(whole), 8):
        with contextlib.suppress(images.UnreadableImage):
            images.decode(whole[:start] + bytes(8) + whole[start + 8 :], SIZE)


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


def in_training(folder):
    return len(images.ImageFolder(str(folder)))


def in_evaluation(folder):
    return len(image_sets.open_images(folder).files)


def in_sampling(folder):
    return len(PictureFolder(folder).done())


@pytest.mark.parametrize("read", [in_training, in_evaluation, in_sampling])
def test_what_is_no_picture_counts_nowhere(read, tmp_path):
    for i in range(3):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i:06d}.png")
    (tmp_path / "000003.png").symlink_to(tmp_path / "000000.png")  # a link that leads to one
    strew(tmp_path)
    (tmp_path / "000004.png").mkdir()
    (tmp_path / "000005.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "._00006.png").write_bytes(b"")
    assert read(tmp_path) == 4


def test_what_is_no_class_shifts_no_label(tmp_path):
    root = make_tree(tmp_path / "tree", per_class=2)
    before = images.ImageFolder(root)
    strew(root, "")
    strew(f"{root}/china")
    os.symlink(f"{root}/china", tmp_path / "linked")
    after = images.ImageFolder(root)
    assert (after.class_names, after.describe()) == (before.class_names, before.describe())
    os.rename(tmp_path / "linked", f"{root}/grapes")
    assert images.ImageFolder(root).class_names == ("china", "flower", "grapes")


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert list(pictures.walk_files(tmp_path)) == ["a/0.png"]


def test_buckets_have_the_same_rule(monkeypatch):
    class Bucket:
        def __init__(self, path):
            self._path = path

        def walk(self):
            if self._path == "gs://bucket":  # an empty folder yields nothing
                yield self._path, ["sub/", ".hidden/", "empty/"], ["b.png", ".a.png", "a.png"]
            elif self._path == "gs://bucket/sub":
                yield self._path, [], ["c.png"]

    monkeypatch.setattr(pictures, "resolve", Bucket)
    assert list(pictures.walk_files("gs://bucket")) == ["a.png", "b.png", "sub/c.png"]


@pytest.mark.parametrize("suffix", pictures.SUFFIXES)
def test_endings(tmp_path, suffix):
    """In any case; that Pillow goes by the content is its own business."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"0{suffix}").write_bytes(b"")
        (tmp_path / name / f"1{suffix.upper()}").write_bytes(b"")
    assert len(images.ImageFolder(str(tmp_path))) == 4
    assert {".jpg", ".jpeg", ".jpe", ".jfif"} < set(pictures.SUFFIXES)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("", "found nothing"),
        ("notes.txt", "found notes.txt"),
        (".hidden.png", "found only hidden files or dangling links"),
        ("deeper/0.png", "its images lie one level deeper, such as deeper/0.png"),
    ],
)
def test_a_class_without_images_is_refused(tmp_path, file, reason):
    root = make_tree(tmp_path / "tree", per_class=1)
    path = tmp_path / "tree" / "empty" / file
    (path if not file else path.parent).mkdir(parents=True)
    if file:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=f"class folder empty has no images: {reason}; expected"):
        images.ImageFolder(root)
    os.mkdir(f"{root}/void")
    with pytest.raises(InputError, match=r"class folder empty has no images \(nor do 1 others\)"):
        images.ImageFolder(root)


def test_images_beside_the_classes_are_named(tmp_path, caplog):
    root = make_tree(tmp_path / "tree", per_class=1)
    (tmp_path / "tree" / "loose.png").write_bytes(b"")
    assert len(images.ImageFolder(root)) == 2
    assert "1 images lie beside the classes' folders, such as loose.png" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="file systems that take UTF-8 only")
def test_any_name_becomes_text(tmp_path):
    names = [b"a\\b", b"caf\xe9", "café".encode(), b"new\nline", "\u3000 wide".encode()]
    for name in names:
        os.mkdir(os.fsencode(tmp_path) + b"/" + name)
        with open(os.fsencode(tmp_path) + b"/" + name + b"/\xff.png", "wb") as file:
            file.write(encoded(photo().resize((20, 20))))
    folder = images.ImageFolder(str(tmp_path))
    expected = (r"a\\b", "café", r"caf\udce9", r"new\nline", "\u3000 wide")
    assert folder.class_names == expected
    for text in (*folder.class_names, *map(folder.name, range(5))):
        text.encode()
    assert folder.name(2) == r"caf\udce9/\udcff.png"
    assert images.decode(folder[2][0], 20).pixels.shape == (20, 20, 3)
    # No other name looks the same.
    assert pictures.printable(r"caf\udce9") == r"caf\\udce9"


def test_a_file_that_vanishes_is_replaced_in_training(tmp_path, caplog):
    make_tree(tmp_path / "tree", per_class=2)
    train = images.open_folder(str(tmp_path / "tree"), SIZE).train
    (tmp_path / "tree" / "china" / "000.png").unlink()
    np.testing.assert_array_equal(train[0]["x"], train[1]["x"])
    assert "china/000.png: [Errno 2] No such file" in caplog.text


def test_imagenet_ids_become_words():
    ids = [f"n{i:08d}" for i in range(1000)]
    names = images.readable_names(ids)
    assert names[1] == "goldfish, Carassius auratus" and "golden retriever" in names[207]
    assert images.readable_names(["n00000001", "cat"]) == ("n00000001", "cat")


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    """A TFDS image classification set of ten pictures, prepared with random access and without."""
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


@pytest.mark.tensorflow
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


@pytest.mark.tensorflow
def test_tfds_bad_input(tfds_directory, tmp_path):
    with pytest.raises(InputError, match="no split 'valid': expected one of train"):
        images.TfdsImages("tiny_pictures", "valid", tfds_directory)
    with pytest.raises(InputError, match="is stored as tfrecord, expected array_record.*tfds conv"):
        images.TfdsImages("tiny_pictures", "train", f"{tfds_directory}/old")
    with pytest.raises(InputError, match="TFDS tiny_pictures is not in .*: expected a prep") as c:
        images.TfdsImages("tiny_pictures", "train", str(tmp_path))
    [program] = re.findall('python -c "(.*)"', str(c.value))
    exec(program, {})  # what the message asks for mends it
    assert len(images.TfdsImages("tiny_pictures", "train", str(tmp_path))) == 10
    with pytest.raises(InputError, match="no data set 'cifar11'.*did you mean cifar10"):
        images.TfdsImages("cifar11", "train", str(tmp_path))


def test_tfds_without_tensorflow(monkeypatch):
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="TFDS cifar10 needs TensorFlow, .* images as a folder"):
        images.open_images("tfds:cifar10")


def test_a_folder_without_classes_is_unlabelled(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "b.png")
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "a.png")
    source = images.open_folder(str(tmp_path), 8)
    assert (source.num_classes, source.class_names) == (0, ())
    assert [int(source.train[i]["label"]) for i in range(2)] == [0, 0]
    assert source.train[0]["x"][0, 0].tolist() == [0, 0, 255]


def test_images_without_labels_are_for_unconditional_models(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    config = tiny_config()
    config.model.channels = 3
    config.data.update(name="folder", path=str(tmp_path), num_validation=0)
    with pytest.raises(InputError, match="num_classes is 10: the data set 'folder' has no labels"):
        Experiment.from_config(config).open_data()
    config.model.num_classes = 0
    assert Experiment.from_config(config).open_data().num_classes == 0


def test_a_folder_without_readable_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "picture.jpg").write_bytes(b"")
    source = images.open_folder(str(tmp_path), SIZE)
    with pytest.raises(InputError, match="not one of the images can be decoded"):
        source.train[0]
