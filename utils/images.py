"""Reading image files and fitting images into the network's input."""

import io
import math
import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".dng", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp", ".pfm"})
VIDEO_SUFFIXES = frozenset(
    {".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".wmv"},
)
PADDING_VALUE = 114  # the grey around a letterboxed image, part of what official weights were trained with


def is_image(path: str | Path) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def is_video(path: str | Path) -> bool:
    return os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES


def decode_image(encoded: bytes | np.ndarray) -> np.ndarray | None:
    """Bytes of an image file to BGR uint8 (height, width, 3), upright by its EXIF orientation; None if unreadable.

    Grayscale becomes three equal channels, 16 bits become the upper 8, an alpha channel is dropped.
    """
    buffer = np.frombuffer(encoded, np.uint8)
    if not buffer.size:
        return None
    try:
        # IMREAD_COLOR does all of the above, except for floating-point files, which it leaves in their own type or, in
        # OpenCV 5, does not read.
        image = cv2.imdecode(buffer, cv2.IMREAD_COLOR)
        if image is None:
            image = cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if image is None:
        return None
    if image.dtype != np.uint8:
        image = _to_uint8(image)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return image[..., :3] if image.shape[2] >= 3 else cv2.cvtColor(image[..., 0], cv2.COLOR_GRAY2BGR)


def is_cut_off(encoded: bytes) -> bool:
    """Whether a JPEG or PNG ends too early: some versions of OpenCV then invent a grey or black rest without a word.

    Only a file without the mark of an end at its end is looked at closely, by Pillow, which says so.
    """
    jpeg, png = encoded.startswith(b"\xff\xd8"), encoded.startswith(b"\x89PNG")
    if not (jpeg and not encoded.endswith(b"\xff\xd9")) and not (png and b"IEND" not in encoded[-16:]):
        return False
    try:
        Image.open(io.BytesIO(encoded)).load()
    except (OSError, SyntaxError) as error:
        return "truncated" in str(error)
    except Exception:  # a kind of file that OpenCV reads and Pillow does not
        return False
    return False


def _to_uint8(image: np.ndarray) -> np.ndarray:
    if np.issubdtype(image.dtype, np.floating):
        image = np.nan_to_num(image)
        top = image.max(initial=0)
        return np.clip(image * (255 / top if top > 0 else 1), 0, 255).astype(np.uint8)
    return (image >> (8 * (image.dtype.itemsize - 1))).astype(np.uint8)


def read_image(path: str | Path) -> np.ndarray:
    """An image file as BGR uint8 (height, width, 3); see ``decode_image`` for what is converted.

    The file is read by NumPy and decoded from memory, because OpenCV's own file access fails on paths with letters
    outside of ASCII on some systems.

    Raises:
        UserError: the file cannot be read or is not an image that OpenCV decodes.
    """
    try:
        encoded = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from None
    image = decode_image(encoded)
    if image is None:
        raise UserError(f"{path}: is not an image that can be decoded. Remove it or replace it.")
    return image


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Writes BGR uint8 (height, width, 3) in the format of the path's suffix.

    Raises:
        UserError: the suffix is no image format, or the file cannot be written.
    """
    path = Path(path)
    try:
        encoded = cv2.imencode(path.suffix, image)[1]
    except cv2.error:
        raise UserError(f"{path}: {path.suffix or 'no suffix'} is no image format that OpenCV writes.") from None
    try:
        encoded.tofile(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from None


def letterbox(
    image: np.ndarray,
    new_shape: int | tuple[int, int] = 640,
    color: tuple[int, int, int] = (PADDING_VALUE,) * 3,
    auto: bool = True,
    scale_fill: bool = False,
    scale_up: bool = True,
    stride: int = 32,
) -> tuple[np.ndarray, tuple[float, float], tuple[float, float]]:
    """Scales an image into ``new_shape``, keeping its proportions, and fills the rest with ``color``.

    Args:
        image: (height, width, 3).
        new_shape: (height, width), or one number for both.
        auto: pad only up to the next multiple of ``stride`` instead of the whole ``new_shape``.
        scale_fill: stretch to ``new_shape`` without padding; proportions change.
        scale_up: when false a smaller image is not enlarged, which validation asks for.

    Returns:
        The image, the ratios (width, height) it was scaled by, and the padding (left, top) in pixels, of which the
        halves are kept: (16.0, 10.5) stands for 10 pixels at the top and 11 at the bottom.
    """
    height, width = image.shape[:2]
    target_height, target_width = (new_shape, new_shape) if isinstance(new_shape, int) else new_shape
    ratio = min(target_height / height, target_width / width)
    if not scale_up:
        ratio = min(ratio, 1.0)
    ratios = (ratio, ratio)
    scaled_width, scaled_height = round(width * ratio), round(height * ratio)
    pad_width, pad_height = target_width - scaled_width, target_height - scaled_height
    if auto:
        pad_width, pad_height = pad_width % stride, pad_height % stride
    elif scale_fill:
        pad_width = pad_height = 0
        scaled_width, scaled_height = target_width, target_height
        ratios = (target_width / width, target_height / height)
    pad_width, pad_height = pad_width / 2, pad_height / 2
    if (width, height) != (scaled_width, scaled_height):
        image = cv2.resize(image, (scaled_width, scaled_height), interpolation=cv2.INTER_LINEAR)
    # An odd padding gives its extra pixel to the bottom and the right.
    top, bottom = round(pad_height - 0.1), round(pad_height + 0.1)
    left, right = round(pad_width - 0.1), round(pad_width + 0.1)
    if top or bottom or left or right:
        image = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=color)
    return image, ratios, (pad_width, pad_height)


def shape_at_long_side(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) after ``resize_to_long_side``."""
    ratio = size / max(height, width)
    return min(math.ceil(height * ratio), size), min(math.ceil(width * ratio), size)


def resize_to_long_side(image: np.ndarray, size: int, smooth: bool = True) -> np.ndarray:
    """Scales an image so that its longer side is ``size`` pixels; the shorter one is rounded up, as in YOLOv5 since
    December 2022 (with the v7.0 tag's rounding down, mAP50 of yolov5n at 320 pixels falls by 0.004).

    Args:
        smooth: shrink by area averaging (validation). Augmented training images are shrunk bilinearly instead.
    """
    height, width = image.shape[:2]
    ratio = size / max(height, width)
    if ratio == 1:
        return image
    interpolation = cv2.INTER_AREA if smooth and ratio < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, shape_at_long_side(height, width, size)[::-1], interpolation=interpolation)
