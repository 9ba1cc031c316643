"""Picture files: which ones in a folder count, for every reader alike; and pictures for people,
labelled sample grids and plots, written as PNG through any file system."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from ig_jax.errors import InputError
from ig_jax.paths import resolve

# Endings of pictures, in lower case; a file's own may be in any.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif"),
    *(".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)

_MIN_SIDE = 64
# What text files and terminals cannot carry: control characters, line breaks, and the surrogates
# that stand for bytes which are not UTF-8. The backslash, so that escapes can be told from names.
_UNPRINTABLE = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def list_folder(folder: epath.PathLike) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders that count in a folder, each in order of their bytes.

    Hidden names (`.ipynb_checkpoints`, `._0.png`), links that lead nowhere, and what is neither a
    file nor a folder (a FIFO, a socket) do not count; a link counts as what it leads to.

    Args:
        folder: local or `gs://`.

    Raises:
        InputError: the folder cannot be read.
    """
    files: list[str] = []
    folders: list[str] = []
    try:
        if "://" in os.fspath(folder):  # buckets hold neither links nor special files
            _, folders, files = next(resolve(folder).walk(), ("", [], []))
            folders = [name.rstrip("/") for name in folders]
        else:
            for entry in os.scandir(folder):
                with contextlib.suppress(OSError):  # a link that leads to itself
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file():
                        files.append(entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror or error})") from error
    files, folders = (
        sorted((name for name in names if not name.startswith(".")), key=os.fsencode)
        for names in (files, folders)
    )
    return files, folders


def walk_files(folder: epath.PathLike) -> Iterator[str]:
    """Yields the files that count in a folder and, after them, in the folders that count in it.

    Args:
        folder: local or `gs://`.

    Yields:
        Paths relative to `folder`, with "/" between their parts. Raises `InputError` for a folder
        that cannot be read.
    """
    seen: set[str] = set()

    def visit(place: str, prefix: str) -> Iterator[str]:
        real = os.path.realpath(place) if "://" not in place else place
        if real in seen:  # reached through a link before; links may even form a circle
            return
        seen.add(real)
        files, folders = list_folder(place)
        yield from (prefix + name for name in files)
        for name in folders:
            yield from visit(f"{place}/{name}", f"{prefix}{name}/")

    yield from visit(os.fspath(folder), "")


def is_picture(name: str) -> bool:
    """Whether a file's ending is that of a picture."""
    return name.lower().endswith(SUFFIXES)


def printable(name: str) -> str:
    """A file's or folder's name as text that JSON, text files and terminals can carry.

    Reversible: control characters and bytes that are not UTF-8 become `\\n` and `\\udce9`, a
    backslash two of them; every other name stays as it is, whatever the locale.
    """
    text = os.fsencode(name).decode("utf-8", "surrogateescape")
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def labelled_grid(
    images: np.ndarray, titles: Sequence[str], columns: int | None = None
) -> Image.Image:
    """Arranges pictures in rows with a title under each; vectors are points, a colour a title.

    Args:
        images: (N, H, W, C) uint8, C of 1 or 3. Small ones are enlarged without smoothing. Or
            vectors (N, D ≥ 2) floats, of which the first two components are shown.
        titles: N short texts.
        columns: pictures in a row; about √N if None.
    """
    if images.ndim == 2:
        return _scatter(images, titles)
    count, height, width, _ = images.shape
    columns = columns or max(1, round(count**0.5))
    zoom = max(1, -(-_MIN_SIDE // height))
    font = ImageFont.load_default(size=13)
    text_height, gap = 18, 4
    cell = (width * zoom + gap, height * zoom + text_height + gap)
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        left, top = gap + i % columns * cell[0], gap + i // columns * cell[1]
        picture = from_array(image).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        canvas.paste(picture.convert("RGB"), (left, top))
        middle = (left + width * zoom / 2, top + height * zoom + 1)
        draw.text(middle, _fit(title, font, cell[0] - gap), "black", font, anchor="ma")
    return canvas


def _scatter(points: np.ndarray, titles: Sequence[str]) -> Image.Image:
    """A plot of points (N, D ≥ 2), those of one title in one colour."""
    figure = make_figure(5, 5)
    axes = figure.subplots()
    names = np.asarray(titles)
    for name in dict.fromkeys(titles):
        axes.scatter(*points[names == name, :2].T, s=4, linewidths=0, label=name or None)
    axes.set_aspect("equal")
    if any(titles):
        axes.legend(markerscale=3)
    return rendered(figure)


def from_array(image: np.ndarray) -> Image.Image:
    """A picture from (H, W, 1 or 3) uint8."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def read_image(path: epath.PathLike) -> np.ndarray:
    """Reads a PNG as (H, W, 1 or 3) uint8."""
    with Image.open(io.BytesIO(resolve(path).read_bytes())) as picture:
        array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array


def _fit(text: str, font: Any, width: int) -> str:
    """Cuts a title to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def save_image(path: epath.PathLike, image: Image.Image) -> None:
    """Writes a picture as PNG, to a local path or a bucket."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    resolve(path).write_bytes(buffer.getvalue())


def make_figure(width: float, height: float) -> Any:
    """Returns an empty matplotlib figure (sides in inches) that needs no screen.

    matplotlib refuses to load where `MPLBACKEND` names what is not installed, as a notebook's
    variable does in a shell started from it; nothing here draws with that backend.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(figsize=(width, height), layout="constrained")


def rendered(figure: Any) -> Image.Image:
    """A matplotlib figure as an RGB picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    return Image.open(buffer).convert("RGB")


def save_figure(path: epath.PathLike, figure: Any) -> None:
    """Writes a matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    resolve(path).write_bytes(buffer.getvalue())
