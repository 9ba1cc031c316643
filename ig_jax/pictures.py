"""Pictures for people: labelled sample grids and plots, written as PNG through any file system."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

_MIN_SIDE = 64


def labelled_grid(
    images: np.ndarray, titles: Sequence[str], columns: int | None = None
) -> Image.Image:
    """Arranges pictures in rows with a title under each.

    Args:
        images: (N, H, W, C) uint8, C of 1 or 3. Small ones are enlarged without smoothing.
        titles: N short texts.
        columns: pictures in a row; about √N if None.
    """
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


def from_array(image: np.ndarray) -> Image.Image:
    """A picture from (H, W, 1 or 3) uint8."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def read_image(path: epath.PathLike) -> np.ndarray:
    """Reads a PNG as (H, W, 1 or 3) uint8."""
    with Image.open(io.BytesIO(epath.Path(path).read_bytes())) as picture:
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
    epath.Path(path).write_bytes(buffer.getvalue())


def save_figure(path: epath.PathLike, figure: Any) -> None:
    """Writes a matplotlib figure as PNG and closes it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    epath.Path(path).write_bytes(buffer.getvalue())
