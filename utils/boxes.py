"""Box formats and the way back from a letterboxed image to its file; NumPy arrays and torch tensors alike.

Formats, always in the last dimension of size 4: ``xyxy`` = left, top, right, bottom; ``xywh`` = centre x, centre y,
width, height; a name ending in ``n`` is normalised by the image's width and height, the others are in pixels.
Every function returns a new array of the kind it was given and leaves its input alone.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

Boxes = TypeVar("Boxes", np.ndarray, torch.Tensor)

RatioPad = tuple[Sequence[float], Sequence[float]]
CROP_MARGIN = 1.02, 10  # a cropped object keeps a little of its surroundings: factor and pixels


def _stack(columns: list) -> Boxes:
    return torch.stack(columns, -1) if isinstance(columns[0], torch.Tensor) else np.stack(columns, -1)


def _columns(boxes: Boxes) -> list:
    return [boxes[..., i] for i in range(4)]


def xyxy_to_xywh(boxes: Boxes) -> Boxes:
    """Corners (..., 4) to centre and size (..., 4)."""
    left, top, right, bottom = _columns(boxes)
    return _stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])


def xywh_to_xyxy(boxes: Boxes) -> Boxes:
    """Centre and size (..., 4) to corners (..., 4)."""
    x, y, width, height = _columns(boxes)
    return _stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def xyxy_to_ltwh(boxes: Boxes) -> Boxes:
    """Corners (..., 4) to left, top, width, height (..., 4): COCO's JSON format."""
    left, top, right, bottom = _columns(boxes)
    return _stack([left, top, right - left, bottom - top])


def xywhn_to_xyxy(
    boxes: Boxes, width: float = 640, height: float = 640, pad_width: float = 0, pad_height: float = 0
) -> Boxes:
    """Normalised centre and size to corners in pixels of a (possibly padded) image.

    Args:
        boxes: (..., 4), relative to the image without its padding.
        width, height: the image's size in pixels without padding.
        pad_width, pad_height: pixels of padding at the left and at the top.
    """
    x, y, w, h = _columns(boxes)
    return _stack(
        [
            width * (x - w / 2) + pad_width,
            height * (y - h / 2) + pad_height,
            width * (x + w / 2) + pad_width,
            height * (y + h / 2) + pad_height,
        ]
    )


def xyxy_to_xywhn(
    boxes: Boxes, width: float = 640, height: float = 640, clip: bool = False, margin: float = 0.0
) -> Boxes:
    """Corners in pixels to normalised centre and size.

    With ``clip`` the corners are first limited to ``[0, width - margin]`` and ``[0, height - margin]``. The data
    pipeline uses a margin of 1e-3 so that a box centre never falls on the first pixel outside of the image.
    """
    if clip:
        boxes = clip_boxes(boxes, (height - margin, width - margin))
    left, top, right, bottom = _columns(boxes)
    return _stack(
        [(left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height]
    )


def clip_boxes(boxes: Boxes, shape: Sequence[float]) -> Boxes:
    """Limits corners (..., 4) to an image of ``shape`` (height, width)."""
    height, width = shape[:2]
    limits = [width, height, width, height]
    if isinstance(boxes, torch.Tensor):
        return torch.stack([boxes[..., i].clamp(0, limits[i]) for i in range(4)], -1)
    return np.stack([boxes[..., i].clip(0, limits[i]) for i in range(4)], -1)


def scale_boxes(
    from_shape: Sequence[int], boxes: Boxes, to_shape: Sequence[int], ratio_pad: RatioPad | None = None
) -> Boxes:
    """Corners found on a letterboxed image to corners on the image it was made from, clipped to it.

    Args:
        from_shape: (height, width) of the letterboxed image; only read when ``ratio_pad`` is None.
        boxes: (..., 4) xyxy in pixels of the letterboxed image.
        to_shape: (height, width, ...) of the original image.
        ratio_pad: ``((ratio_h, ratio_w), (pad_w, pad_h))`` as the data loader returns it. Each axis has its own ratio
            because resized sizes are whole pixels; YOLOv5 uses the height's for both, 3 % off on a 37 x 211 image.
    """
    if ratio_pad is None:
        gain_y = gain_x = min(from_shape[0] / to_shape[0], from_shape[1] / to_shape[1])
        pad_width = (from_shape[1] - to_shape[1] * gain_x) / 2
        pad_height = (from_shape[0] - to_shape[0] * gain_y) / 2
    else:
        gain_y, gain_x = ratio_pad[0]
        pad_width, pad_height = ratio_pad[1]
    left, top, right, bottom = _columns(boxes)
    native = _stack(
        [
            (left - pad_width) / gain_x,
            (top - pad_height) / gain_y,
            (right - pad_width) / gain_x,
            (bottom - pad_height) / gain_y,
        ]
    )
    return clip_boxes(native, to_shape)


def split_by_image(rows: torch.Tensor, images: int) -> list[torch.Tensor]:
    """The rows of each image, without column 0: (n, k) rows with an image's index in front -> per image (n_i, k - 1).

    One sort for all images; a search for each one's rows would be quadratic in the batch.
    """
    index = rows[:, 0].long()
    counts = torch.bincount(index, minlength=images)
    return list(rows[index.argsort(stable=True), 1:].split(counts.tolist()))


def crop_region(box: Sequence[float], shape: Sequence[int]) -> tuple[slice, slice]:
    """Rows and columns of an image of ``shape`` (height, width) that show a box (xyxy) and a little around it; at least
    one of each."""
    gain, margin = CROP_MARGIN
    left, top, right, bottom = box
    extra_x, extra_y = ((right - left) * (gain - 1) + margin) / 2, ((bottom - top) * (gain - 1) + margin) / 2
    rows = slice(int(max(top - extra_y, 0)), int(min(bottom + extra_y, shape[0])) or 1)
    return rows, slice(int(max(left - extra_x, 0)), int(min(right + extra_x, shape[1])) or 1)
