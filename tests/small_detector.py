"""Detectors small enough for export tests: every kind of block the neck of YOLOv5 has, on two levels, or on one."""

import copy
from functools import cache
from pathlib import Path

import torch
from torch import nn

from models.yolo import DetectionModel
from quant.calibrate import calibrate
from quant.config import FusionConfig, QuantConfig
from quant.fold import fold
from quant.gabfusion import GABFusion, fusion_nodes, set_strength
from quant.onnx_graph import ExportedGraph, build, trace, traceable
from quant.prepare import prepare
from quant.verify import Verification, references, verify
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
TINY_SIDE = 32
# One block of every kind that grids are moved through, and a Concat of two branches.
TINY = {
    "nc": 3,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[5, 6, 8, 14, 15, 11]],
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "SPPF", [8, 5]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 0], 1, "Concat", [1]],
        [-1, 1, "C3", [8]],
        [[5], 1, "Detect", ["nc", "anchors"]],
    ],
}


def randomise_norm(norm: nn.BatchNorm2d, shift: float, every: int) -> None:
    """Moves a batch norm away from the identity; every so many gammas are negative."""
    norm.running_mean.normal_(0, shift)
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 1.5)
    norm.weight.data[::every] *= -1


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


def confident(model: DetectionModel) -> DetectionModel:
    """Gives the head biases of objectness and classes with which an untrained detector finds something."""
    for convolution in model.detect.m:
        convolution.bias.data.view(model.detect.na, -1)[:, 4:] = 0.5
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


def tiny_detector(method: str = "lsq", bits: int = 4, training_steps: int = 0, **keys) -> DetectionModel:
    """The tiny network, calibrated, trained for some steps, with the factors of GABFusion, if any, away from 1."""
    keys = {"method": method, "weight": {"bits": bits}, "activation": {"bits": bits}} | keys
    model = prepare(float_detector(TINY), QuantConfig.from_dict(keys))
    calibrate(model, [images(4, TINY_SIDE, TINY_SIDE, seed=2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(training_steps):
        loss = sum(level.square().mean() for level in model.train()(images(2, TINY_SIDE, TINY_SIDE)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for node in fusion_nodes(model).values():
        node.logits.data.copy_(torch.tensor([0.4, -0.2]))
    set_strength(model, 0.0)
    return model.eval()


def folded_and_file(model: DetectionModel, int4_weights: bool = False) -> tuple[nn.Module, ExportedGraph]:
    """The folded tiny detector and what the exporter makes of it."""
    folded = fold(model)
    folded.model[-1].export = True
    traced = trace(traceable(folded), torch.zeros(1, 3, TINY_SIDE, TINY_SIDE))
    opset = 21 if int4_weights else 17
    return folded, build(traced, opset, int4_weights, model.quantization["target"])


def assert_verified(model: DetectionModel, int4_weights: bool = False) -> tuple[nn.Module, ExportedGraph, Verification]:
    """Exports the tiny detector and asserts that the file computes what the network computes."""
    folded, file = folded_and_file(model, int4_weights)
    result = verify(folded, file, references(folded, list(images(1, TINY_SIDE, TINY_SIDE)), trained=model))
    assert result.holds, result.table()
    assert result.quantizers.compared > 1000 and result.layers.compared > 1000
    return folded, file, result


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
