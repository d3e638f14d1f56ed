"""Several answers made one: test-time augmentation of a network, and ensembles of networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.backend import Backend, TorchBackend, is_exported, load_backend
from utils.errors import UserError
from utils.log import LOGGER

SCALES = (1.0, 0.83, 0.67)
FLIPPED = (False, True, False)  # left to right
PADDING = 0.447  # mean of COCO's images, 114 / 255


def rescale(images: Tensor, factor: float, stride: int) -> Tensor:
    """Images (B, 3, H, W) scaled by ``factor`` and padded at the right and the bottom to multiples of ``stride``."""
    if factor == 1:
        return images
    height, width = images.shape[2:]
    scaled = nn.functional.interpolate(images, (int(height * factor), int(width * factor)), mode="bilinear")
    padded = (math.ceil(side * factor / stride) * stride for side in (height, width))
    bottom, right = (whole - part for whole, part in zip(padded, scaled.shape[2:], strict=True))
    return nn.functional.pad(scaled, (0, right, 0, bottom), value=PADDING)


class AugmentedBackend(Backend):
    """``--augment``: the rows of three passes together, over the image, its mirror image at 0.83 and itself at 0.67 of
    the size.

    The largest objects of the first pass and the smallest ones of the last are left out: the other passes see them
    better.

    Args:
        backend: a PyTorch network; files of other kinds take one size only.

    Raises:
        UserError: another kind of file.
    """

    def __init__(self, backend: Backend) -> None:
        if not isinstance(backend, TorchBackend):
            raise UserError(f"--augment runs PyTorch checkpoints (.pt) only, not {backend.path}")
        super().__init__(backend.path, backend.stride, backend.names, backend.device)
        self.backend, self.is_pt = backend, True

    def run(self, images: Tensor) -> tuple[Tensor, None]:
        """Images (B, 3, H, W) -> (rows (B, N, 5 + classes) in pixels of the image, None)."""
        detect = self.backend.model.detect
        passes = []
        for number, (scale, flipped) in enumerate(zip(SCALES, FLIPPED, strict=True)):
            view = rescale(images.flip(3) if flipped else images, scale, self.stride)
            rows = self.backend(view)[0].clone()
            counts = [detect.na * math.prod(side // int(s) for side in view.shape[2:]) for s in detect.stride.tolist()]
            rows[..., :4] /= scale
            if flipped:
                rows[..., 0] = images.shape[3] - rows[..., 0]
            if number == 0:
                rows = rows[:, : sum(counts[:-1])]
            elif number == len(SCALES) - 1:
                rows = rows[:, counts[0] :]
            passes.append(rows)
        return torch.cat(passes, 1), None


class Ensemble(Backend):
    """Several weights files at once: the rows of all of them go into one suppression.

    Raises:
        UserError: their classes differ, or none takes the sizes of the others.
    """

    def __init__(self, members: Sequence[Backend]) -> None:
        first = members[0]
        for member in members:
            if member.suppression:
                raise UserError(f"--weights: {member.path} suppresses boxes itself, so it cannot be joined with others")
        for member in members[1:]:
            if member.names != first.names:
                raise UserError(f"--weights {first.path} {member.path}: their classes differ, so they cannot be joined")
        fixed = {member.fixed_size for member in members if member.fixed_size}
        if len(fixed) > 1:
            raise UserError(f"--weights: the files take images of different sizes ({', '.join(map(str, fixed))})")
        super().__init__(first.path, math.lcm(*(member.stride for member in members)), first.names, first.device)
        self.members = list(members)
        self.fixed_size = next(iter(fixed), None)
        self.fixed_batch = next((member.fixed_batch for member in members if member.fixed_batch), None)
        self.is_pt = all(member.is_pt for member in members)

    def run(self, images: Tensor) -> tuple[Tensor, None]:
        """Images (B, 3, H, W) -> (rows (B, N of all members, 5 + classes), None)."""
        return torch.cat([member(images)[0] for member in self.members], 1), None


def combine(backends: Sequence[Backend], augment: bool) -> Backend:
    """One backend of those of all ``--weights``, with ``--augment`` where that is asked for."""
    members = [AugmentedBackend(backend) for backend in backends] if augment else list(backends)
    return members[0] if len(members) == 1 else Ensemble(members)


def open_weights(
    files: Sequence[str | Path],
    device: torch.device,
    data: str | Path | None = None,
    half: bool = False,
    augment: bool = False,
) -> Backend:
    """The detector of ``--weights``: one file, or an ensemble of several.

    Args:
        half: 16-bit floats, on CUDA and in exported files; elsewhere float32 is used and a warning says so.

    Raises:
        UserError: a file cannot be read, or not be combined so.
    """
    backends = []
    for file in files:
        can = device.type == "cuda" or is_exported(file)
        if half and not can:
            LOGGER.warning(f"--half needs CUDA; {file} computes in float32 on {device}")
        backends.append(load_backend(file, device, data=data, half=half and can))
    return combine(backends, augment)
