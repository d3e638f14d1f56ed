"""A quantized network that only evaluates: its weights are quantized once, not in every batch."""

from __future__ import annotations

import torch
from torch import nn

from quant.layers import QuantConv2d


@torch.no_grad()
def freeze_weights(model: nn.Module) -> nn.Module:
    """Puts the fake-quantized weights in place of the weights and takes the weight quantizers out, in place.

    The results stay the same to the last bit. Batch norms are left alone: folded ones round differently, and at 4 bit
    a single code that flips changes what follows.

    Returns:
        The model, which can no longer be trained, folded or saved as a quantized one.
    """
    for layer in [module for module in model.modules() if isinstance(module, QuantConv2d)]:
        weight = layer.weight_quantizer(layer.weight)
        layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        layer.weight_quantizer = nn.Identity()
    return model
