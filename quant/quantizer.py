"""What every quantizer is: the contract between a method's file and the rest of ``quant``. Imports only torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.primitives import Grid


@dataclass(frozen=True)
class IntegerForm:
    """The integer arithmetic that equals a quantizer's forward pass in eval mode, code for code.

    ``codes = clip(round(x / step) + zero_point, qmin, qmax)`` and ``values = (codes - zero_point) * step``.

    Attributes:
        step: float32, one value or one a channel (dimension 0 of the weights).
        zero_point: an integer inside the container, 0 for weights.
        grid: smallest and largest code.
    """

    step: Tensor
    zero_point: int
    grid: Grid


class Quantizer(nn.Module):
    """Base of all quantizers.

    A method derives from it, creates its parameters in the constructor with their final shape (so that an optimizer and
    a state_dict know them from the start), and implements ``initialise``, ``quantize`` and ``integer``.

    Args:
        bits: bit width of the codes, 2 to 8.
        grid: the codes.
        scheme: ``affine`` (learned zero point), ``unsigned`` or ``signed``.
        channels: number of output channels for a step each, or None for one step.
    """

    no_weight_decay = True  # read by utils.optim: decay would pull steps to zero (reference: LSQ turned negative)

    def __init__(self, bits: int, grid: Grid, scheme: str, channels: int | None = None) -> None:
        super().__init__()
        self.bits, self.grid, self.scheme, self.channels = bits, grid, scheme, channels
        self.enabled = True
        # Saved, so that a checkpoint of an uncalibrated model is recognised.
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def initialise(self, x: Tensor) -> None:
        """Sets the ranges from a sample of the values that will be quantized.

        Args:
            x: the weights (O, I, h, w), or any number of activation values in any shape.

        Raises:
            ValueError: ``x`` is empty or not finite.
        """
        if x.numel() == 0 or not bool(torch.isfinite(x).all()):
            raise ValueError(f"cannot set a quantization range from {x.numel()} values, all finite: no")
        with torch.no_grad():
            self.set_range(x.detach().float())
        self.initialised.fill_(True)

    def set_range(self, x: Tensor) -> None:
        """Sets the parameters from finite float32 values ``x``."""
        raise NotImplementedError

    def quantize(self, x: Tensor) -> Tensor:
        """Fake-quantized float32 values of ``x``'s shape."""
        raise NotImplementedError

    def current_step(self) -> Tensor:
        """The positive step in use, one value or one a channel."""
        raise NotImplementedError

    def integer(self) -> IntegerForm:
        """The integer form of the present state."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized values of ``x`` in float32, or ``x`` itself while the quantizer is not ``enabled``."""
        if not self.enabled:
            return x
        with torch.autocast(x.device.type, enabled=False):
            return self.quantize(x.float())

    def _apply(self, fn, recurse: bool = True):
        """Moves between devices like any module but keeps float32: a step below 6.1e-5 would be lost in float16."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            shortened = moved.is_floating_point() and moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device) if shortened else moved

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        shape = f"channels={self.channels}" if self.channels else "one step"
        return f"bits={self.bits}, codes={self.grid.qmin}..{self.grid.qmax}, scheme={self.scheme}, {shape}"
