"""The quantized convolution, and the batch norm behind it. Imports only torch and the quantizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant.quantizer import Quantizer


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` wherever ``old`` is a child: a module may stand in several places of a network."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


class QuantConv2d(nn.Conv2d):
    """A convolution that multiplies fake-quantized weights with a fake-quantized input.

    The float parameters keep their names, so a float state_dict loads as it is; the quantizers add keys below
    ``weight_quantizer`` and ``input_quantizer``.

    Attributes:
        weight_quantizer: symmetric, one step per output channel (or one for all).
        input_quantizer: None where the tensor comes quantized, from the slot of the block around (``quant.prepare``).
        output_quantizer: None, or the quantizer of the result where no batch norm follows (``activation.output``).
    """

    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None
    output_quantizer: Quantizer | None

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
        layer.output_quantizer = None
        layer.training = conv.training
        return layer

    def forward(self, input: Tensor) -> Tensor:  # torch's name: some call with keywords
        """(B, I, H, W) -> (B, O, H', W')."""
        x = input if self.input_quantizer is None else self.input_quantizer(input)
        x = self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)
        return x if self.output_quantizer is None else self.output_quantizer(x)


class QuantBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose result is quantized: folded, it is the end of the convolution in front of it.

    Parameters and statistics keep their names; the quantizer adds keys below ``output_quantizer``.
    """

    output_quantizer: Quantizer

    @classmethod
    def from_float(cls, norm: nn.BatchNorm2d, output_quantizer: Quantizer) -> QuantBatchNorm2d:
        """Wraps the very parameters and statistics of ``norm`` (no copy)."""
        with torch.device("meta"):
            layer = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(layer, name, getattr(norm, name))
        layer.output_quantizer = output_quantizer
        layer.training = norm.training
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.output_quantizer(super().forward(input))
