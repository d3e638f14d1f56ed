"""``--visualize``: pictures of what each layer of a network puts out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor, nn

from utils.images import write_image

MAX_CHANNELS = 32
COLUMNS = 8
TILE = 120  # pixels
GAP = 4


def feature_picture(features: Tensor) -> np.ndarray:
    """The first 32 channels of (C, H, W) as a table of tiles, each from its smallest value to its largest."""
    count = min(len(features), MAX_CHANNELS)
    height, width = features.shape[1:]
    scale = TILE / max(height, width)
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    rows = -(-count // COLUMNS)
    canvas = np.full((rows * (size[0] + GAP), COLUMNS * (size[1] + GAP), 3), 255, np.uint8)
    for channel in range(count):
        values = features[channel].detach().float().cpu().numpy()
        span = values.max() - values.min()
        levels = ((values - values.min()) * (255 / span if span > 0 else 0)).astype(np.uint8)
        tile = cv2.applyColorMap(cv2.resize(levels, size[::-1], interpolation=cv2.INTER_NEAREST), cv2.COLORMAP_VIRIDIS)
        top, left = channel // COLUMNS * (size[0] + GAP), channel % COLUMNS * (size[1] + GAP)
        canvas[top : top + size[0], left : left + size[1]] = tile
    return canvas


@contextmanager
def saved_features(layers: nn.Sequential, folder: Path) -> Iterator[None]:
    """Writes ``stage<i>_<module>_features.png`` and ``.npy`` of every layer that runs in the block but the last one.

    The picture shows up to 32 channels of the first image; the array (C, H, W) holds all of them.

    Args:
        layers: of a ``DetectionModel``.
        folder: is made.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def save(layer: nn.Module, _inputs: tuple, output: Tensor) -> None:
        if output.ndim != 4 or min(output.shape[2:]) < 2:
            return
        stem = f"stage{layer.i}_{type(layer).__name__}_features"
        write_image(folder / f"{stem}.png", feature_picture(output[0]))
        np.save(folder / f"{stem}.npy", output[0].float().cpu().numpy())

    handles = [layer.register_forward_hook(save) for layer in list(layers)[:-1]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
