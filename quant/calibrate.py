"""First ranges from data: weights from themselves, activations from what they are on calibration images."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from quant.equalize import equalize
from quant.gabfusion import calibrate_fusion
from quant.layers import QuantConv2d
from quant.lsq import FixedGrid
from quant.prepare import quantizers, set_enabled
from quant.quantizer import Quantizer
from quant.ranges import SAMPLE_LIMIT
from utils.errors import UserError
from utils.progress import progress


class InputSampler:
    """Collects an evenly spaced sample of a quantizer's inputs, and their extremes, over all batches."""

    def __init__(self, batches: int) -> None:
        self.share = max(SAMPLE_LIMIT // max(batches, 1), 256)
        self.sample: list[Tensor] = []
        self.extremes: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().float()
        values = (module.equalized(values) if isinstance(module, Quantizer) else values).reshape(-1)
        stride = max(values.numel() // self.share, 1)
        # An odd stride, so that the sample does not stand on the same column of every row or channel of every pixel.
        self.sample.append(values[:: stride | 1])
        self.extremes += [values.min().reshape(1), values.max().reshape(1)]

    def values(self, extremes: bool = True) -> Tensor:
        """The sample, one dimension, with the extremes of each batch or, where shares of it count, without."""
        return torch.cat(self.sample + self.extremes if extremes else self.sample)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Initialises every quantizer of a prepared model, and GABFusion's constants.

    Args:
        model: from ``quant.prepare.prepare``.
        batches: images (B, 3, H, W) as floats 0 to 1, letterboxed as in validation; for any other network what it is
            trained on, without augmentation. They all stay in memory.

    Raises:
        UserError: not prepared, no images, images outside the fixed grid, values that are not finite (the message names
            the layer).
    """
    batches = list(batches)
    if not batches or not all(isinstance(batch, Tensor) for batch in batches):
        raise UserError("calibration needs at least one batch of images, each a tensor (B, C, H, W) without its labels")
    if not quantizers(model):
        raise UserError("this model has no quantizers to calibrate: prepare it first")
    was_training = model.training
    model.eval()
    exponent = getattr(model, "quantization", {}).get("activation", {}).get("equalization", 0.0)
    if any(quantizer.inverse_equalizer is not None for quantizer in quantizers(model).values()):
        set_enabled(model, False)
        equalize(model, progress(batches, "equalization"), exponent)
    weight_quantizers = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantConv2d):
            initialise(module.weight_quantizer, module.weight, f"{name}.weight")
            weight_quantizers.add(module.weight_quantizer)
    inputs = {name: q for name, q in quantizers(model).items() if q not in weight_quantizers}
    samplers = {name: InputSampler(len(batches)) for name in inputs}
    handles = [quantizer.register_forward_pre_hook(samplers[name]) for name, quantizer in inputs.items()]
    set_enabled(model, False)
    try:
        calibrate_fusion(model, progress(batches, "calibration"))
    finally:
        for handle in handles:
            handle.remove()
        set_enabled(model, True)
    rule = getattr(model, "quantization", {}).get("calibration", {}).get("range", "mse")
    for name, quantizer in inputs.items():
        quantizer.range_rule = rule
        if isinstance(quantizer, FixedGrid):
            _check_image(samplers[name].values())
        initialise(quantizer, samplers[name].values(extremes=rule != "percentile"), name)
    model.train(was_training)


def initialise(quantizer: Quantizer, values: Tensor, name: str) -> None:
    """Sets the range of ``quantizer``, called ``name``; raises UserError if ``values`` are not finite."""
    try:
        quantizer.initialise(values)
    except ValueError as error:
        raise UserError(f"{name}: {error}. Is the float model sound, and are its inputs?") from None


def _check_image(values: Tensor) -> None:
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low + high):
        raise UserError("the network's input has values that are not finite: look at how the images are made")
    if low < -1e-3 or high > 1 + 1e-3:
        raise UserError(
            f"the network's input has values from {low:.3g} to {high:.3g}, and its fixed 8-bit grid holds 0 to 1: "
            "scale the images, or set activation.image to learned"
        )
