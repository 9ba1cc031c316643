"""Pictures for people: where each sample stands, and that they can be read on any page."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ig_jax import pictures

SIDE, GAP, TALL = 64, 4, 20  # of a cell, between cells, of a line of text with its gap


def shades(count, size=8, channels=1):
    """Pictures, each of one shade of its own: 10, 20, …"""
    values = 10 * np.arange(1, count + 1, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, size, size, channels))


def found(picture, top=0, left=0):
    """The shades in the middle of the cells, 0 for an empty one."""
    middles = np.asarray(picture)[top + SIDE // 2 :, left + SIDE // 2 :]
    cells = middles[:: SIDE + GAP, :: SIDE + GAP]
    return np.where(cells[..., 3] > 0, cells[..., 0], 0).tolist()


def test_columns_follow_classes():
    grid = pictures.labelled_grid(shades(7), ["2", "10", "2", "1", "10", "2", "1"])
    assert found(grid, top=TALL) == [[40, 10, 20], [70, 30, 50], [0, 60, 0]]


@pytest.mark.parametrize("titles", [["a", "b", "c", "d"], [""] * 4])
def test_others_stand_in_rows(titles):
    grid = pictures.labelled_grid(shades(4, channels=3), titles)
    assert found(grid)[0] == [10, 20] and grid.height == 2 * (SIDE + GAP + TALL * any(titles)) - GAP


def test_a_row_has_one_title():
    cells = shades(6).reshape(2, 3, 8, 8, 1)
    grid = pictures.picture_table(cells, rows=["w = 0", "w = 1.25"])
    margin = grid.width - 3 * (SIDE + GAP) + GAP
    assert found(grid, left=margin) == [[10, 20, 30], [40, 50, 60]]
    ink = np.asarray(grid)[:, :margin, 3] > 0
    assert ink[:SIDE].any() and ink[SIDE + GAP :].any() and not ink[SIDE : SIDE + GAP].any()


def test_names_are_not_cut():
    name = "Pembroke_Welsh_corgi_of_the_queen"
    alone = pictures.labelled_grid(shades(1), [name])
    ink = np.asarray(alone)[SIDE + 1 :, :, 3] > 0
    columns = np.flatnonzero(ink.any(0))
    assert alone.width > 3 * SIDE and columns[-1] - columns[0] > 0.9 * alone.width
    two_lines = pictures.labelled_grid(shades(1), ["golden retriever"])
    assert two_lines.width < 2 * SIDE and two_lines.height > alone.height


def test_nothing_needs_a_light_page(tmp_path):
    """No ground, and neither black nor white ink, in tables and in figures."""
    figure = pictures.make_figure(3, 2)
    axes = figure.subplots()
    axes.plot([1, 2], [1, 2], "k*", label="winner")
    axes.set(xlabel="x", ylabel="y", title="title")
    axes.legend(frameon=False)
    figure.suptitle("all")
    pictures.save_figure(tmp_path / "a.png", figure)
    pictures.save_figure(tmp_path / "few.png", figure, colours=32)
    with Image.open(tmp_path / "few.png") as few:
        assert few.mode == "P"
        few = few.convert("RGBA")
    table = pictures.picture_table([[np.full((8, 8, 1), 128, np.uint8)]], ["row"], ["column"])
    for picture in (Image.open(tmp_path / "a.png"), few, table):
        pixels = np.asarray(picture).astype(int)
        assert picture.mode == "RGBA" and pixels[0, 0, 3] == 0
        inked = pixels[pixels[..., 3] > 250][:, :3]
        assert len(inked) and inked.min() > 60 and inked.max() < 200
