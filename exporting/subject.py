"""What is exported: a checkpoint's network as it was trained, and as it is written."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from exporting.description import describe
from models.backend import load_network
from models.yolo import DetectionModel
from quant.fold import fold
from utils.checkpoint import Weights
from utils.errors import UserError
from utils.log import LOGGER


@dataclass
class Subject:
    """A checkpoint that is exported.

    Attributes:
        trained: its network in evaluation mode, before folding.
        folded: what files are written of: batch norms and GABFusion folded, the head returns decoded rows only.
        size: (height, width) in pixels that files are written for.
    """

    path: Path
    weights: Weights
    trained: DetectionModel
    folded: nn.Module
    size: tuple[int, int]

    @property
    def quantized(self) -> bool:
        return self.weights.quantization is not None

    @property
    def target(self) -> str:
        """Whose rules the integer graph follows: the recipe's ``target``."""
        return (self.weights.quantization or {}).get("target", "onnxruntime")

    @property
    def quantized_results(self) -> bool:
        """Whether convolutions' results are quantized too (``activation.output``)."""
        return bool((self.weights.quantization or {}).get("activation", {}).get("output"))

    @property
    def metadata(self) -> dict[str, str]:
        return describe(self.trained, self.weights)


def read_subject(path: Path, sides: list[int] | None, device: torch.device) -> Subject:
    """Reads a checkpoint and folds its network, which then lies on ``device``.

    Raises:
        UserError: not a checkpoint, one that cannot be folded, or sides that are no size.
    """
    trained, weights = load_network(path)
    trained.eval()
    folded = fold(trained) if weights.quantization is not None else copy.deepcopy(trained).fuse()
    folded = folded.eval().to(device)
    folded.model[-1].export = True
    return Subject(path, weights, trained, folded, image_size(sides, weights, trained.image_stride))


def image_size(given: list[int] | None, weights: Weights, stride: int) -> tuple[int, int]:
    """(height, width) in pixels: as given, else what the checkpoint was trained on, else 640; multiples of the stride.

    Raises:
        UserError: not one or two positive numbers.
    """
    sides = list(given or [weights.trained_with("imgsz") or 640])
    if len(sides) > 2 or min(sides) < 1:
        raise UserError(f"--imgsz {' '.join(map(str, sides))}: give one side, or height and width, in pixels")
    height, width = (-(-side // stride) * stride for side in (sides[0], sides[-1]))
    if [height, width] != [sides[0], sides[-1]]:
        LOGGER.warning(f"--imgsz: sides must be multiples of {stride}; exporting {height}x{width}")
    return height, width
