"""Pictures for a report: samples in a grid, one row for each class, and curves."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

GAP = 2  # pixels between tiles
MARGIN = 8  # pixels around the grid
TILE = 48  # pixels to which small images are enlarged, about
CAPTIONED = 128  # the same, of images with a caption
MAX_ROWS = 20
BACKGROUND, INK = (255, 255, 255), (60, 60, 60)


def sample_grid(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    columns: int = 10,
    scale: int | None = None,
    classes: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    path: str | os.PathLike | None = None,
) -> 'Image.Image':
    """The first images of each class side by side, one row for each class, its label at the left.

    Args:
      images: uint8 `[N, H, W, C]`, C = 1 or 3.
      labels: `[N]`; without, the images fill rows in their order, unlabelled.
      columns: images in a row. A class with fewer leaves the rest empty.
      scale: integer enlargement without smoothing; for None, as brings the tiles near 48 pixels.
      classes: the rows; for None the classes that occur, at most 20 of them, evenly spaced.
      names: the text for class c is `names[c]`, for None c itself.
      path: where to write the picture, as PNG.

    Returns an RGB PIL image. Tile (row, column) starts at pixel x = width - MARGIN - (columns - column) (W scale + GAP)
    + GAP, y = MARGIN + row (H scale + GAP). Raises ValueError for images that are not uint8 of 1 or 3 channels.
    """
    from PIL import Image, ImageDraw

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f'A grid shows uint8 [N, H, W, 1 or 3], not {images.dtype} {list(images.shape)}.')
    rows, texts = _rows(len(images), labels, columns, classes, names)
    height, width = images.shape[1:3]
    scale = scale or max(1, round(TILE / max(height, width)))
    tile_height, tile_width = height * scale, width * scale
    font = _font(min(18, max(11, tile_height * 2 // 5)))
    text_width = max((int(np.ceil(font.getlength(text))) for text in texts), default=0)
    left = MARGIN + (text_width + MARGIN if text_width else 0)
    size = (
        left + columns * (tile_width + GAP) - GAP + MARGIN,
        2 * MARGIN + len(rows) * (tile_height + GAP) - GAP,
    )
    grid = Image.new('RGB', size, BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for row, (indices, text) in enumerate(zip(rows, texts)):
        top = MARGIN + row * (tile_height + GAP)
        draw.text((left - MARGIN, top + tile_height / 2), text, fill=INK, font=font, anchor='rm')
        for column, index in enumerate(indices):
            tile = np.broadcast_to(images[index], (height, width, 3)).repeat(scale, 0).repeat(scale, 1)
            grid.paste(Image.fromarray(np.ascontiguousarray(tile)), (left + column * (tile_width + GAP), top))
    if path is not None:
        grid.save(path, format='PNG')
    return grid


def captioned_grid(
    images: np.ndarray, captions: Sequence[str], *, columns: int = 5, path: str | os.PathLike | None = None
) -> 'Image.Image':
    """Images side by side, each above its own text, whose lines are broken by '\\n' alone.

    Args:
      images: uint8 `[N, H, W, C]`, C = 1 or 3; enlarged to `CAPTIONED` pixels, about.
      captions: N of them.

    Returns an RGB PIL image. Image i starts at x = MARGIN + (i % columns) * (width + GAP), where `width` is that of the
    enlarged image or of the longest line. Raises ValueError for other images, and for captions of another number.
    """
    from PIL import Image, ImageDraw

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or len(images) != len(captions):
        raise ValueError(
            f'Captioned images are uint8 [N, H, W, 1 or 3], each with a caption, not {images.dtype} '
            f'{list(images.shape)} with {len(captions)}.'
        )
    font = _font(13)
    scale = max(1, round(CAPTIONED / max(images.shape[1:3])))
    height, text_height = images.shape[1] * scale, 16 * max((text.count('\n') + 1 for text in captions), default=0)
    lines = [line for text in captions for line in text.split('\n')]
    width = max([images.shape[2] * scale, *(int(np.ceil(font.getlength(line))) for line in lines)])
    columns = min(columns, max(len(images), 1))
    num_rows, step = -(-len(images) // columns), (width + GAP, height + text_height + MARGIN)
    grid = Image.new('RGB', (2 * MARGIN + columns * step[0] - GAP, MARGIN + num_rows * step[1]), BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for i, (image, text) in enumerate(zip(images, captions)):
        left, top = MARGIN + i % columns * step[0], MARGIN + i // columns * step[1]
        tile = np.broadcast_to(image, (*image.shape[:2], 3)).repeat(scale, 0).repeat(scale, 1)
        grid.paste(Image.fromarray(np.ascontiguousarray(tile)), (left, top))
        draw.multiline_text((left, top + height + 2), text, fill=INK, font=font, spacing=2)
    if path is not None:
        grid.save(path, format='PNG')
    return grid


def _rows(num_images, labels, columns, classes, names) -> tuple[list[np.ndarray], list[str]]:
    """The indices of the images in each row, and its text."""
    if labels is None:
        return [np.arange(i, min(i + columns, num_images)) for i in range(0, num_images, columns)], [''] * (
            -(-num_images // columns)
        )
    if classes is None:
        present = np.unique(labels)
        classes = present[np.linspace(0, len(present) - 1, min(len(present), MAX_ROWS)).round().astype(int)]
    texts = [str(names[c]) if names is not None else str(c) for c in classes]
    return [np.flatnonzero(np.asarray(labels) == c)[:columns] for c in classes], texts


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def line_plot(
    path: str | os.PathLike,
    curves: Mapping[str, Sequence[Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    xscale: str = 'linear',
    yscale: str = 'linear',
) -> None:
    """Write a plot of curves as PNG.

    Args:
      curves: label -> (x, y) or (x, y, standard error), sequences of equal length; the error is drawn as a band of two
        standard errors to each side. A curve labelled '' has no legend.
      xscale, yscale: 'linear' or 'log'.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout='constrained')
    FigureCanvasAgg(figure)  # no window, no global state
    axes = figure.subplots()
    for label, (x, y, *error) in curves.items():
        x, y = np.asarray(x, float), np.asarray(y, float)
        (line,) = axes.plot(x, y, label=label or None, linewidth=1.5, marker='.' if len(x) <= 50 else None)
        if error:
            band = 2 * np.asarray(error[0], float)
            axes.fill_between(x, y - band, y + band, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale)
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
    if any(curves):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120, format='png')
