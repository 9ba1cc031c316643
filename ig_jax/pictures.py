"""Picture files: which ones in a folder count, for every reader alike; and pictures for people,
labelled sample grids and plots, written as PNG through any file system."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from ig_jax.errors import InputError, reading
from ig_jax.paths import resolve

# Endings of pictures, in lower case; a file's own may be in any.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif"),
    *(".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)

# Of text and lines: readable on a white page and on a dark one, as the ground is transparent.
INK = "#767c86"
_MIN_SIDE = 64
_MAX_COLUMNS = 16
_GAP, _LINE = 4, 16
_FONT = ImageFont.load_default(size=13)
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


def labelled_grid(images: np.ndarray, titles: Sequence[str]) -> Image.Image:
    """Arranges pictures by their titles; vectors are points, a colour a title.

    Pictures that share a few titles stand in columns, one a title; others in rows, each above its
    own title.

    Args:
        images: (N, H, W, C) uint8, C of 1 or 3. Small ones are enlarged without smoothing. Or
            vectors (N, D ≥ 2) floats, of which the first two components are shown.
        titles: N short texts.
    """
    if images.ndim == 2:
        return _scatter(images, titles)
    names = sorted(set(titles), key=lambda name: (int(name) if name.isdigit() else 0, name))
    if 1 < len(names) <= min(_MAX_COLUMNS, len(titles) - 1):
        columns = [
            [x for x, title in zip(images, titles, strict=True) if title == n] for n in names
        ]
        return picture_table(list(itertools.zip_longest(*columns)), columns=names)
    width = max(1, round(len(images) ** 0.5))
    rows = [list(images[i : i + width]) for i in range(0, len(images), width)]
    captions = [list(titles[i : i + width]) for i in range(0, len(images), width)]
    return picture_table(rows, captions=captions)


def picture_table(
    cells: Sequence[Sequence[np.ndarray | None]],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Pictures in rows and columns, on a transparent ground in colours for light and dark pages.

    Args:
        cells: pictures (H, W, C) uint8, C of 1 or 3, a sequence a row; None leaves a place empty.
        rows: a text on the left of each row.
        columns: a text above each column.
        captions: a text under each picture.
    """
    height, width, _ = next(x for row in cells for x in row if x is not None).shape
    zoom = max(1, -(-_MIN_SIDE // height))
    size = (width * zoom, height * zoom)
    texts = [*columns, *itertools.chain.from_iterable(captions)]
    words = itertools.chain.from_iterable(map(str.split, texts))
    wide = max([size[0], *(math.ceil(_FONT.getlength(word)) for word in words)])
    margin = max([0, *(math.ceil(_FONT.getlength(text)) + 2 * _GAP for text in rows)])
    under = [_height(_wrapped(text, wide) for text in row) for row in captions] or [0] * len(cells)
    top = _height(_wrapped(text, wide) for text in columns)
    count = max(len(row) for row in cells)
    tall = top + sum(size[1] + _GAP + extra for extra in under)
    canvas = Image.new("RGBA", (margin + count * (wide + _GAP) - _GAP, tall - _GAP))
    draw = ImageDraw.Draw(canvas)

    def write(x: float, y: float, text: str, anchor: str) -> None:
        place = {"font": _FONT, "anchor": anchor, "align": "center", "spacing": 2}
        draw.multiline_text((x, y), text, INK, **place)

    for j, text in enumerate(columns):
        middle = margin + j * (wide + _GAP) + wide / 2
        write(middle, top - _GAP, _wrapped(text, wide), "md")
    y = top
    for i, row in enumerate(cells):
        if rows:
            write(margin - 2 * _GAP, y + size[1] / 2, rows[i], "rm")
        for j, x in enumerate(row):
            left = margin + j * (wide + _GAP)
            if x is not None:
                picture = from_array(x).resize(size, Image.Resampling.NEAREST)
                canvas.paste(picture.convert("RGBA"), (left + (wide - size[0]) // 2, y))
            if captions and j < len(captions[i]):
                text = _wrapped(captions[i][j], wide)
                write(left + wide / 2, y + size[1] + _GAP / 2, text, "ma")
        y += size[1] + _GAP + under[i]
    return canvas


def _wrapped(text: str, width: int) -> str:
    """Text broken between words so that lines fit in a width in pixels, if its words do."""
    lines: list[str] = []
    for word in text.split():
        if lines and _FONT.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def _height(texts: Iterable[str]) -> int:
    """Pixels that the tallest of some texts needs with the gap beside it; 0 without text."""
    lines = max((text.count("\n") + 1 for text in texts if text), default=0)
    return lines * _LINE + (_GAP if lines else 0)


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
    """Reads a PNG as (H, W, 1 or 3) uint8; raises `InputError`, also for one of another mode."""
    with reading(path, "a PNG"), resolve(path).open("rb") as file, opened(file) as picture:
        if picture.mode not in ("L", "RGB"):
            raise InputError(f"{path}: PNG of mode {picture.mode}, expected 8-bit grey (L) or RGB")
        array = np.asarray(picture, np.uint8)
    return array[..., None] if array.ndim == 2 else array


def opened(file: IO[bytes]) -> Image.Image:
    """A picture whose header is read; Pillow's own line names the buffer, not the problem."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        raise ValueError("not an image, or of a kind that Pillow does not read") from None


def on_white(image: Image.Image) -> Image.Image:
    """RGB of a picture of any mode; where it is transparent, white shows."""
    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


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


def save_figure(path: epath.PathLike, figure: Any, colours: int = 0) -> None:
    """Writes a matplotlib figure as PNG, on a transparent ground.

    What matplotlib draws in black (text, axes, ticks) becomes `INK`, so that it can be read on
    light and dark pages.

    Args:
        path: local or `gs://`.
        figure: of `make_figure`.
        colours: of a palette, up to 256, which makes the file small; 0 for all.
    """
    from matplotlib.colors import same_color

    for artist in figure.findobj():
        for part in ("color", "edgecolor", "markeredgecolor", "markerfacecolor"):
            read, change = (getattr(artist, f"{verb}_{part}", None) for verb in ("get", "set"))
            if read and change and isinstance(read(), str | tuple) and same_color(read(), "k"):
                change(INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", transparent=True)
    if not colours:
        resolve(path).write_bytes(buffer.getvalue())
        return
    with Image.open(buffer) as image:
        save_image(path, image.quantize(colours, Image.Quantize.FASTOCTREE))
