"""Dampening of oscillating weights (arXiv 2203.11086): latent weights are drawn to the middle of their codes.

Near a rounding boundary a weight's code flips back and forth from step to step, and what the batch norms have seen is
not what is deployed. With w_q the quantized weights and n, p the ends of the grid,

    loss = factor * sum (w_q - clip(w, n, p))^2        no gradient to w_q, nor beyond the ends

The factor rises along a cosine from 0 at a quarter of the epochs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quant.layers import QuantConv2d
from quant.primitives import per_channel

START = 0.25  # share of the epochs


def dampening_factor(progress: float, largest: float) -> float:
    """The factor at ``progress`` (0..1) of the quantized epochs."""
    share = (progress - START) / (1 - START)
    return largest * (1 - math.cos(math.pi * min(share, 1))) / 2 if share > 0 else 0.0


def dampening(model: nn.Module) -> Tensor:
    """The sum over all quantized convolutions' weights, a scalar without the factor."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for layer in model.modules():
        if isinstance(layer, QuantConv2d):
            weight = layer.weight.float()
            with torch.no_grad():
                form = layer.weight_quantizer.integer()
                quantized = form.values(form.codes(weight))
                step = per_channel(form.step, weight)
            clipped = weight.clamp(step * form.grid.qmin, step * form.grid.qmax)
            total = total + (quantized - clipped).square().sum()
    return total
