"""A detector in Python: image(s) in, detections out.

from models.load import load
model = load("best.pt")
results = model("image.jpg")           # or an array, a PIL image, a tensor, or a list of those
results.xyxy[0]                        # (boxes, 6): x1, y1, x2, y2, confidence, class
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from models.backend import Backend, TorchBackend, load_backend, suppress
from models.combined import combine
from utils.boxes import scale_boxes
from utils.detections import Detections
from utils.devices import select_device
from utils.downloads import download, file_name
from utils.errors import UserError
from utils.images import letterbox, read_image
from utils.timing import Stopwatch

Source = Any  # a path, web address, PIL image, array or tensor


def load(
    weights: str | Path | Sequence[str | Path],
    device: str = "",
    half: bool = False,
    data: str | Path | None = None,
    **settings: Any,
) -> Detector:
    """Loads a detector.

    Args:
        weights: a checkpoint (YOLOv5's or ours), an exported file, or several of them as an ensemble.
        device: '' (the first GPU if there is one), 'cpu', '0', 'mps'.
        half: 16-bit floats, on CUDA only.
        data: data set YAML with the class names, for files that hold none.
        settings: attributes of ``Detector``: conf, iou, max_det, classes, agnostic, multi_label, augment.

    Raises:
        UserError: a file that is absent or no detector.
    """
    files = [weights] if isinstance(weights, str | Path) else list(weights)
    chosen = select_device(device)
    backends = [load_backend(file, chosen, data, half and chosen.type == "cuda") for file in files]
    return Detector(backends, **settings)


class Detector:
    """Backends with everything around them: reading, letterboxing, suppression, boxes in the image's own pixels.

    Attributes (all may be changed between calls):
        conf: confidence threshold.
        iou: overlap above which the less confident box is dropped.
        max_det: boxes kept per image.
        classes: list of class indices to keep, or None for all.
        agnostic: boxes suppress each other across classes.
        multi_label: a box may have several classes.
        augment: three passes, mirrored and smaller too (checkpoints only).

    A file that suppresses boxes itself (``export.py --nms``) does so with its own iou, agnostic and multi_label.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        conf: float = 0.25,
        iou: float = 0.45,
        max_det: int = 1000,
        classes: list[int] | None = None,
        agnostic: bool = False,
        augment: bool = False,
        multi_label: bool = False,
    ) -> None:
        self.backends = list(backends)
        self.conf, self.iou, self.max_det = conf, iou, max_det
        self.classes, self.agnostic, self.multi_label, self.augment = classes, agnostic, multi_label, augment
        self.backend = combine(self.backends, augment=False)

    @property
    def names(self) -> dict[int, str]:
        """Class index -> name."""
        return self.backend.names

    @property
    def stride(self) -> int:
        """The sides of what the network sees are multiples of it (pixels)."""
        return self.backend.stride

    def to(self, device: str | torch.device) -> Detector:
        """Computes on ``device`` from now on; returns itself, as modules do.

        Raises:
            UserError: no such device here, or an exported file, which stays where it was loaded.
        """
        chosen = select_device(str(device))
        for backend in self.backends:
            if not isinstance(backend, TorchBackend):
                raise UserError(
                    f"{backend.path}: an exported file stays where it is: load(..., device={str(device)!r})"
                )
        for backend in self.backends:
            backend.model.to(chosen)
            backend.device = chosen
        self.backend = combine(self.backends, augment=False)
        return self

    def cpu(self) -> Detector:
        """``to("cpu")``."""
        return self.to("cpu")

    def cuda(self, device: int = 0) -> Detector:
        """``to`` this GPU."""
        return self.to(str(device))

    def eval(self) -> Detector:
        """Returns itself: it is never in training mode. So that programs written for YOLOv5 run."""
        return self

    @torch.inference_mode()
    def __call__(
        self, images: Source | Sequence[Source], size: int = 640, augment: bool | None = None, download: bool = False
    ) -> Detections:
        """Finds objects.

        Args:
            images: one image or a list. A path; a web address (only with ``download``); a PIL image; an array
                (height, width), (height, width, 3 or 4) or (3, height, width), RGB uint8; a tensor (3, H, W) or
                (B, 3, H, W), RGB in 0..1 or uint8.
            size: longer side in pixels at which the network looks; a file of fixed size has its own.
            augment: in place of the attribute.
            download: fetch web addresses.

        Raises:
            UserError: what is no image, or a web address without ``download``.
        """
        watches = {name: Stopwatch(self.backend.device) for name in ("preprocess", "inference", "nms")}
        with watches["preprocess"]:
            pictures, files = read_sources(images, download)
            if not pictures:
                return Detections([], [], self.names, [])
            batch, paddings = self._batch(pictures, size)
        with watches["inference"]:
            augmented = self.augment if augment is None else augment
            backend = combine(self.backends, augment=True) if augmented else self.backend
            decoded, _ = backend(batch)
        with watches["nms"]:
            own = backend.suppression
            several = {} if own else {"multi_label": self.multi_label}
            found = suppress(decoded, own, self.conf, self.iou, self.classes, self.agnostic, self.max_det, **several)
            for rows, picture, padding in zip(found, pictures, paddings, strict=True):
                rows[:, :4] = scale_boxes(batch.shape[2:], rows[:, :4], picture.shape[:2], padding)
        speed = {name: watch.total / len(pictures) * 1e3 for name, watch in watches.items()}
        return Detections(pictures, found, self.names, files, speed)

    def _batch(self, pictures: Sequence[np.ndarray], size: int) -> tuple[Tensor, list]:
        """RGB arrays -> (B, 3, H, W) in 0..1, padded as little as they allow together; what scales boxes back."""
        shape = self.backend.fixed_size
        if shape is None:
            scaled = np.array([picture.shape[:2] for picture in pictures]) * 1.0
            scaled *= size / scaled.max(1, keepdims=True)
            shape = tuple(int(side) for side in np.ceil(scaled.max(0).round(3) / self.stride) * self.stride)
        planes, paddings = [], []
        for picture in pictures:
            boxed, ratios, padding = letterbox(picture, shape, auto=False)
            planes.append(torch.from_numpy(np.ascontiguousarray(boxed.transpose(2, 0, 1))))
            paddings.append((ratios[::-1], padding))
        return torch.stack(planes).to(self.backend.device).float() / 255, paddings


def read_sources(images: Source | Sequence[Source], fetch: bool = False) -> tuple[list[np.ndarray], list[str]]:
    """Everything that ``Detector`` takes as arrays (height, width, 3) RGB uint8, and their file names.

    Raises:
        UserError: what is no image, or a web address although ``fetch`` is false.
    """
    if isinstance(images, Tensor) and images.ndim == 4:
        images = list(images)
    sources = list(images) if isinstance(images, list | tuple) else [images]
    pictures, files = [], []
    for number, source in enumerate(sources):
        name = getattr(source, "filename", "") or f"image{number}.jpg"  # of a PIL image from a file
        if isinstance(source, str | Path):
            name = file_name(str(source)) if "://" in str(source) else Path(source).name
        pictures.append(_as_array(source, number, fetch))
        files.append(Path(name).name)
    return pictures, files


def _as_array(source: Source, number: int, fetch: bool) -> np.ndarray:
    if isinstance(source, str | Path):
        return cv2.cvtColor(_read(str(source), fetch), cv2.COLOR_BGR2RGB)
    if isinstance(source, Tensor):
        values = source.detach().cpu()
        source = (values.float() * 255).round().clamp(0, 255).byte().numpy() if values.is_floating_point() else values
    elif hasattr(source, "convert"):  # PIL: upright by its EXIF orientation, as files are read
        from PIL import ImageOps

        source = ImageOps.exif_transpose(source).convert("RGB")
    array = np.asarray(source)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
        raise UserError(f"image {number}: expected uint8 of 2 or 3 dimensions, got {array.dtype} {array.shape}")
    if array.ndim == 2:
        return np.repeat(array[..., None], 3, 2)
    if array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):  # channels first
        array = array.transpose(1, 2, 0)
    if array.shape[2] == 1:
        return np.repeat(array, 3, 2)
    if array.shape[2] not in (3, 4):
        raise UserError(f"image {number}: expected 1, 3 or 4 channels, got the shape {array.shape}")
    return np.ascontiguousarray(array[..., :3])


def _read(source: str, fetch: bool) -> np.ndarray:
    if "://" not in source:
        return read_image(source)
    if not fetch:
        raise UserError(f"{source}: is a web address, and nothing is fetched unasked: model(address, download=True)")
    with tempfile.TemporaryDirectory() as folder:
        return read_image(download(source, Path(folder) / file_name(source)))
