"""A detector small enough for export tests: every kind of block the neck of YOLOv5 has, on two levels."""

import copy
from functools import cache
from pathlib import Path

import torch
from torch import nn

from models.yolo import DetectionModel
from quant.calibrate import calibrate
from quant.config import FusionConfig, QuantConfig
from quant.gabfusion import GABFusion
from quant.prepare import prepare
from utils.checkpoint import save_checkpoint

SIZE = 64
NAMES = {0: "ring", 1: "the 'second'", 2: "dréi"}
SMALL = {
    "nc": 3,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[5, 6, 8, 14, 15, 11], [20, 24, 40, 30, 50, 60]],
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C3", [16]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 2, "C3", [16]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "SPPF", [32, 5]],
    ],
    "head": [
        [-1, 1, "Conv", [16, 1, 1]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]],
        [-1, 1, "C3", [16, False]],
        [-1, 1, "Conv", [16, 3, 2]],
        [[-1, 7], 1, "Concat", [1]],
        [-1, 1, "C3", [32, False]],
        [[10, 13], 1, "Detect", ["nc", "anchors"]],
    ],
}


def float_detector(config: dict | str = SMALL, seed: int = 0) -> DetectionModel:
    """Random weights and batch norms that look trained: gains of both signs, one of them zero."""
    torch.manual_seed(seed)
    model = DetectionModel(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            module.weight.data[::5] *= -1
            module.weight.data[1] = 0
            nn.init.normal_(module.bias, 0.0, 0.5)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.1, 0.5)
    if model.nc == len(NAMES):
        model.names = dict(NAMES)
    return model


def images(count: int, height: int = SIZE, width: int = SIZE, seed: int = 1) -> torch.Tensor:
    """(count, 3, height, width) in steps of 1/255, smooth enough to have structure at every level."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 8, width // 8, generator=generator)
    fine = 0.2 * torch.rand(count, 3, height, width, generator=generator)
    mixed = nn.functional.interpolate(coarse, (height, width), mode="bilinear") + fine
    return mixed.clamp(0, 1).mul(255).round() / 255


def quantized_detector(bits: int = 4, gabfusion: bool = False) -> DetectionModel:
    """Calibrated, not trained; with GABFusion the branch weights are away from 1 and the schedule has ended."""
    return copy.deepcopy(_quantized_detector(bits, gabfusion))


@cache
def _quantized_detector(bits: int, gabfusion: bool) -> DetectionModel:
    model = float_detector()
    config = QuantConfig(gabfusion=FusionConfig(enabled=gabfusion))
    config.weight.bits = config.activation.bits = bits
    prepare(model, config)
    calibrate(model, [images(4, seed=2)])
    for module in model.modules():
        if isinstance(module, GABFusion):
            module.set_strength(0.0)
            module.logits.data.copy_(torch.tensor([0.4, -0.2]))
    return model.eval()


def save(model: DetectionModel, path: Path, **options) -> Path:
    """Writes a checkpoint as training does."""
    checkpoint = {
        "model_yaml": model.yaml,
        "names": model.names,
        "stride": model.stride.tolist(),
        "model": model.state_dict(),
        "ema": None,
        "quantization": getattr(model, "quantization", None),
        "options": {"imgsz": SIZE, **options},
    }
    save_checkpoint(checkpoint, path)
    return path
