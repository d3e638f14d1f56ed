"""Equalization: channels of a convolution's input that differ in size share its few codes better if they are divided by
a factor each, which the weights take back.

    conv(W, x) = conv(W * e, x / e),   e_j = max(|x_j|)^a,  a = 0.5    (j: channel; geometric mean of e: 1)

This is SmoothQuant's idea (arXiv 2211.10438, equations 3 and 4), there for language models at 8 bits. Its factors also
fall with the weights' largest magnitudes, which gained nothing here (w4a4, calibrated only, circuit boards: 73.3 / 28.4
with, 73.1 / 34.1 without, 52.9 / 22.1 unequalized). It hides the division in the normalisation in front; SiLU stands
between here, so it stays, as one multiplication by a constant.

One quantizer serves all convolutions that read a tensor. Left alone are inputs of 8 bits, which lose nothing, tensors
that something else than plain convolutions reads in their quantized form (the shortcut of a Bottleneck), grouped
convolutions, weights that meet several tensors, and what SPP and SPPF join: their pools run on the codes of one tensor
in the exported file, and different factors would make them different codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.common import C3, SPP, SPPF, Bottleneck, BottleneckCSP, CrossConv
from quant.layers import QuantConv2d
from quant.lsq import FixedGrid
from quant.quantizer import Quantizer
from quant.trace import has_input_slot

MOST_BITS = 7
QUANTILE = 0.999  # of a channel's magnitudes, in place of their maximum: one pixel decides nothing
RANGE = 16.0  # a factor is at most this many times the mean one, or this many times smaller


@torch.no_grad()
def quantizer_readers(model: nn.Module, example: Tensor) -> dict[Quantizer, list[QuantConv2d]]:
    """Input quantizer -> the convolutions that read what it made, found by one run on ``example`` (B, 3, H, W)."""
    found: dict[Quantizer, list[QuantConv2d]] = {}
    made_by: dict[int, Quantizer] = {}
    alive: list[Tensor] = []  # an identity is only unique while its tensor exists

    def note(quantizer: Quantizer, _inputs: tuple, output: Tensor) -> None:
        alive.append(output)
        made_by[id(output)] = quantizer

    def read(conv: QuantConv2d, inputs: tuple) -> None:
        quantizer = conv.input_quantizer or made_by.get(id(inputs[0]))
        if quantizer is not None and conv not in found.setdefault(quantizer, []):
            found[quantizer].append(conv)

    slots = [module for module in model.modules() if has_input_slot(module) and module.input_quantizer is not None]
    handles = [block.input_quantizer.register_forward_hook(note) for block in slots]
    handles += [m.register_forward_pre_hook(read) for m in model.modules() if isinstance(m, QuantConv2d)]
    was_training = model.training
    model.eval()
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return found


def insert_equalizers(model: nn.Module, example: Tensor) -> None:
    """Gives every quantizer that can have them a factor for each channel of its input, 1 until the calibration.

    Args:
        model: with ``QuantConv2d``.
        example: input (B, 3, H, W).
    """
    slots: dict[Quantizer, list[nn.Module]] = {}
    for module in model.modules():
        if has_input_slot(module) and isinstance(module.input_quantizer, Quantizer):
            slots.setdefault(module.input_quantizer, []).append(module)
    readers = quantizer_readers(model, example)
    owners: dict[int, set[Quantizer]] = {}  # weights, which convolutions may share -> the quantizers in front of them
    for quantizer, convolutions in readers.items():
        for conv in convolutions:
            owners.setdefault(id(conv.weight), set()).add(quantizer)
    pooled = {block.cv2.conv for block in model.modules() if isinstance(block, (SPP, SPPF))}
    for quantizer, convolutions in readers.items():
        plain = (
            all(conv.groups == 1 and len(owners[id(conv.weight)]) == 1 for conv in convolutions)
            and len({c.in_channels for c in convolutions}) == 1
        )
        plain &= not pooled.intersection(convolutions)
        alone = all(_only_convolutions_read(block) for block in slots.get(quantizer, ()))
        if plain and alone and quantizer.bits <= MOST_BITS and not isinstance(quantizer, FixedGrid):
            quantizer.add_equalizer(convolutions[0].in_channels)


def _only_convolutions_read(block: nn.Module) -> bool:
    """Whether nothing but convolutions reads the tensor that ``block`` quantizes in its slot."""
    if isinstance(block, (Bottleneck, CrossConv)):
        return not block.add
    return isinstance(block, (C3, BottleneckCSP))


@torch.no_grad()
def equalize(model: nn.Module, batches: Iterable[Tensor], exponent: float) -> None:
    """Sets all factors from what passes on ``batches``, and multiplies the weights by them.

    Until then, and with all quantizers off, the network computes what it did before.

    Args:
        model: prepared; its quantizers are off (``set_enabled``), it is in eval mode.
        batches: images (B, 3, H, W).
        exponent: a, 0 to 1: how much of the inputs' differences goes into the weights.
    """
    batches = list(batches)
    readers = quantizer_readers(model, batches[0][:1])
    readers = {quantizer: convs for quantizer, convs in readers.items() if quantizer.inverse_equalizer is not None}
    largest: dict[Quantizer, Tensor] = {}

    def measure(quantizer: Quantizer, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().float().abs().transpose(0, 1).flatten(1)
        high = rows.kthvalue(max(round(QUANTILE * rows.shape[1]), 1), 1).values
        largest[quantizer] = high + largest.get(quantizer, 0.0)

    handles = [quantizer.register_forward_pre_hook(measure) for quantizer in readers]
    try:
        for images in batches:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    for quantizer, convolutions in readers.items():
        before = quantizer.inverse_equalizer.reshape(-1)
        factors = equalizing_factors(largest[quantizer] / len(batches), exponent)
        change = (factors * before).reshape(1, -1, 1, 1)  # a second calibration takes the first one's factors back
        for weight in {id(conv.weight): conv.weight for conv in convolutions}.values():
            weight.mul_(change.to(weight.dtype))
        quantizer.inverse_equalizer.copy_((1 / factors).reshape(-1, 1, 1))


def equalizing_factors(magnitudes: Tensor, exponent: float) -> Tensor:
    """Factors e (C,), geometric mean 1 before they are limited, from each channel's largest magnitude (C,)."""
    alive = magnitudes > 0
    logarithms = magnitudes.clamp_min(torch.finfo(torch.float32).tiny).log() * exponent
    centre = logarithms[alive].mean() if bool(alive.any()) else logarithms.new_zeros(())
    limit = math.log(RANGE)
    return torch.where(alive, logarithms - centre, 0.0).clamp(-limit, limit).exp()
