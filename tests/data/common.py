"""A tree of small pictures, regular and not, and an encoder of a few lines."""

import io
import os
import pathlib

import numpy as np
from PIL import Image

SIZE = 16
# Of `prepare`: six shards of the tree below.
OPTIONS = dict(
    autoencoder="pooling",
    fingerprint="abc",
    image_size=SIZE,
    batch_size=3,
    examples_per_shard=5,
    num_threads=2,
)


def photo(name="china.jpg"):
    """A photograph that ships with scikit-learn, 427×640."""
    from sklearn.datasets import load_sample_image  # slow to import

    return Image.fromarray(load_sample_image(name))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_tree(root, per_class=9):
    """Writes `class/name.png`, crops of photographs: 2 classes of `per_class` regular pictures."""
    for k, name in enumerate(("china", "flower")):
        image = photo(f"{name}.jpg")
        folder = pathlib.Path(root) / name
        folder.mkdir(parents=True)
        for i in range(per_class):
            left = 10 * i + k
            crop = image.crop((left, i, left + 40 + i, 36 + i))
            (folder / f"{i:03d}.png").write_bytes(encoded(crop))
    return str(root)


def add_irregular(root):
    """Adds pictures that need a rule, and files that are none; returns their names by rule."""
    small = photo().resize((32, 24))
    folder = pathlib.Path(root) / "odd"
    folder.mkdir()
    jpeg = encoded(small, "JPEG")
    sixteen = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    see_through = small.convert("RGBA")
    see_through.putpixel((0, 0), (0, 0, 0, 0))
    files = {
        "broken.jpg": jpeg[: len(jpeg) // 2],
        "cmyk.jpg": encoded(small.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(small.convert("L"), "JPEG"),
        "long.png": encoded(small.resize((600, 2))),
        "sixteen.png": encoded(sixteen),
        "text.jpg": b"no picture",
        "tiny.png": encoded(small.resize((7, 5))),
        "transparent.png": encoded(see_through),
        "notes.txt": b"ignored",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {
        "skipped": ["odd/broken.jpg", "odd/long.png", "odd/text.jpg"],
        "converted": ["odd/cmyk.jpg", "odd/grey.jpg", "odd/sixteen.png", "odd/transparent.png"],
        "enlarged": ["odd/tiny.png"],
    }


def encode(x):
    """An autoencoder of a kind: 4×4 means of the pixels, with a fourth channel."""
    assert x.dtype == np.float32 and x.shape[1:] == (SIZE, SIZE, 3) and abs(x).max() <= 1
    mean = x.reshape(len(x), 4, 4, 4, 4, 3).mean((2, 4))
    mean = np.concatenate([mean, mean[..., :1] - mean[..., 1:2]], axis=-1)
    return mean, 0.1 + abs(mean)


def strew(folder, suffix=".png"):
    """Adds everything that a folder may hold under a picture's name, or beside, and that is none;
    and a folder that is hidden, with a picture in it."""
    folder = pathlib.Path(folder)
    picture = encoded(photo().resize((20, 20)))
    hidden = folder / ".ipynb_checkpoints"
    hidden.mkdir()
    for path in (hidden / f"a{suffix}", folder / f"._0{suffix}", folder / f".hidden{suffix}"):
        path.write_bytes(picture)
    (folder / f"dangling{suffix}").symlink_to(folder / "nowhere")
    (folder / f"circle{suffix}").symlink_to(folder / f"circle{suffix}")
    os.mkfifo(folder / f"fifo{suffix}")
