"""The quantized convolution. Imports only torch and the quantizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant.quantizer import Quantizer


class QuantConv2d(nn.Conv2d):
    """A convolution that multiplies fake-quantized weights with a fake-quantized input.

    The float parameters keep their names, so a float state_dict loads as it is; the quantizers add keys below
    ``weight_quantizer`` and ``input_quantizer``.

    Attributes:
        weight_quantizer: symmetric, one step per output channel (or one for all).
        input_quantizer: None where the tensor comes quantized, from the slot of the block around (``quant.prepare``).
    """

    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None

    @classmethod
    def from_float(cls, conv: nn.Conv2d, weight_quantizer: Quantizer, input_quantizer: Quantizer | None) -> QuantConv2d:
        """Wraps the very parameters of ``conv`` (no copy)."""
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding mode {conv.padding_mode!r} cannot be quantized: padding must be zeros")
        with torch.device("meta"):
            layer = cls(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                conv.bias is not None,
            )
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.weight_quantizer, layer.input_quantizer = weight_quantizer, input_quantizer
        layer.training = conv.training
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W')."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)
