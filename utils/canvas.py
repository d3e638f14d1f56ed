"""Tiles on a canvas of which only the part that is looked at is drawn.

A mosaic has four times the pixels of the image that is cut from it; at scales from 0.5 to 1.5 that image shows a third
of them in the mean. So tiles are placed first, and those that it shows are loaded, and copied as far as it shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from utils.errors import UserError
from utils.images import PADDING_VALUE


@dataclass(frozen=True)
class Tile:
    """An image at a place of a canvas.

    Attributes:
        load: returns the image, BGR uint8 (height, width, 3); called only if the tile is seen, and not written to.
        width, height: of the image, in pixels.
        left, top: pixels from the canvas' corner; may be negative.
        name: the image's file, for messages.
    """

    load: Callable[[], np.ndarray]
    width: int
    height: int
    left: int = 0
    top: int = 0
    name: str = "image"

    def at(self, left: int, top: int) -> Tile:
        """The same image elsewhere."""
        return replace(self, left=left, top=top)


@dataclass(frozen=True)
class Canvas:
    """Tiles in the order in which they cover one another, cut off at ``width`` x ``height``; the rest is grey."""

    tiles: Sequence[Tile]
    width: int
    height: int

    @classmethod
    def of(cls, image: np.ndarray) -> Canvas:
        """A canvas that is just one image."""
        height, width = image.shape[:2]
        return cls((Tile(lambda: image, width, height),), width, height)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    def draw(self, left: int, top: int, width: int, height: int) -> np.ndarray:
        """The part of ``width`` x ``height`` pixels from (left, top), which may reach beyond the canvas.

        Returns:
            BGR uint8 (height, width, 3). It may be a part of a tile's own memory: do not write to it.

        Raises:
            UserError: an image does not have the size that its tile announced: its file has changed.
        """
        seen = [tile for tile in self.tiles if self._overlap(tile, left, top, width, height)]
        if len(seen) == 1 and self._overlap(seen[0], left, top, width, height) == (left, top, width, height):
            x, y = left - seen[0].left, top - seen[0].top
            return _image_of(seen[0])[y : y + height, x : x + width]
        region = np.full((height, width, 3), PADDING_VALUE, np.uint8)
        for tile in seen:
            x, y, across, down = self._overlap(tile, left, top, width, height)
            part = _image_of(tile)[y - tile.top : y - tile.top + down, x - tile.left : x - tile.left + across]
            region[y - top : y - top + down, x - left : x - left + across] = part
        return region

    def _overlap(self, tile: Tile, left: int, top: int, width: int, height: int) -> tuple[int, int, int, int] | None:
        """Left, top, width, height of what a view shows of a tile, in pixels of the canvas; None if nothing."""
        x1, y1 = max(tile.left, left, 0), max(tile.top, top, 0)
        x2 = min(tile.left + tile.width, left + width, self.width)
        y2 = min(tile.top + tile.height, top + height, self.height)
        return (x1, y1, x2 - x1, y2 - y1) if x1 < x2 and y1 < y2 else None


def _image_of(tile: Tile) -> np.ndarray:
    image = tile.load()
    if image.shape[:2] != (tile.height, tile.width):
        raise UserError(
            f"{tile.name}: is {image.shape[1]}x{image.shape[0]} pixels after scaling where {tile.width}x{tile.height} "
            "were expected: the file has changed since the start. Start again."
        )
    return image
