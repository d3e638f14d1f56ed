"""What every quantizer is: the contract between a method's file and the rest of ``quant``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant import kernels
from quant.blocks import equalized
from quant.primitives import Grid, activation_grid, from_codes, per_channel, to_codes, to_odd_codes, weight_grid
from utils.log import LOGGER


@dataclass(frozen=True)
class IntegerForm:
    """The integer arithmetic that equals a quantizer's forward pass in eval mode, code for code.

    ``codes = clip(round(x / step) + zero_point, qmin, qmax)`` and ``values = (codes - zero_point) * step``. With
    ``thresholds`` the codes are ``qmin + (number of thresholds <= x)``; with ``odd`` only odd codes occur.

    Attributes:
        step: float32, one value or one a channel (dimension 0 of the weights).
        zero_point: an integer inside the container, 0 for weights.
        grid: smallest and largest code.
        thresholds: None, or ``grid.levels - 1`` non-decreasing float32 values of x at which the code rises by one
            (activations only).
        odd: a half-level grid, which has no zero: codes are the odd integers of an odd ``qmin .. qmax`` (weights only).
    """

    step: Tensor
    zero_point: int
    grid: Grid
    thresholds: Tensor | None = None
    odd: bool = False

    def codes(self, x: Tensor) -> Tensor:
        """Codes of ``x`` (any shape; with several steps, channels first) as a float tensor."""
        if self.thresholds is not None:
            return torch.bucketize(x, self.thresholds.to(x.device), right=True).to(x.dtype) + self.grid.qmin
        step = per_channel(self.step, x)
        if self.odd:
            return to_odd_codes(x, step, self.grid)
        return to_codes(x, step, self.zero_point, self.grid)

    def values(self, codes: Tensor) -> Tensor:
        """Values of ``codes``."""
        return from_codes(codes, per_channel(self.step, codes), self.zero_point)


@dataclass
class MethodOptions:
    """What a recipe's ``options:`` may hold; a method with more derives its own ``Options`` from this.

    Attributes:
        paper: the method as its paper has it (unsigned activations, its weight grid and initialisation), for
            comparison; off, it is what works on a network with SiLU.
    """

    paper: bool = False

    def validate(self) -> None:
        """Raises ValueError naming the option that is impossible and what is possible."""


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

    no_weight_decay = True  # read by utils.optim: decay would pull steps to zero, and steps once turned negative
    Options: type[MethodOptions] = MethodOptions
    _warned = False  # once in a process is enough
    range_rule = "mse"  # how ``set_range`` finds a range, see ``quant.ranges``; the calibration sets activations' own
    any_precision = False  # whether ``quantize`` takes bfloat16 and float16 and does float32 arithmetic with them
    # Whether ``quantize`` takes ``inverse_equalizer`` as a second argument on a CPU. Without, each product and each
    # gradient is one more pass through memory: a training step took 1.05 to 1.07 times as long.
    takes_factors = False
    schemes: tuple[str, ...] = ("affine", "unsigned", "signed")  # of activations, that a recipe may ask for

    def __init__(self, bits: int, grid: Grid, scheme: str, channels: int | None = None) -> None:
        super().__init__()
        self.bits, self.grid, self.scheme, self.channels = bits, grid, scheme, channels
        self.enabled = True
        self.ready = False  # ``initialised`` on the host: reading the buffer would make it wait for the device
        # Saved, so that a checkpoint of an uncalibrated model is recognised.
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self.register_buffer("inverse_equalizer", None)

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        owner = next(base for base in cls.__mro__ if "quantize" in vars(base))
        if "takes_factors" not in vars(owner):
            cls.takes_factors = False  # a method of its own, derived from one of ours

    def add_equalizer(self, channels: int) -> None:
        """From now on what is quantized is the input (B, C, H, W) times ``inverse_equalizer`` (C, 1, 1), ones at
        first; ``quant.equalize`` sets them and the weights behind."""
        self.inverse_equalizer = torch.ones(channels, 1, 1)

    def equalized(self, x: Tensor) -> Tensor:
        """``x`` as the grid sees it, which is ``x`` itself without equalization."""
        return equalized(x, self.inverse_equalizer)

    @classmethod
    def for_weights(cls, bits: int, channels: int | None, options: MethodOptions) -> Quantizer:
        """The quantizer of a convolution's weights, on the narrow symmetric grid unless a method has its own.

        Args:
            bits: 2 to 8.
            channels: number of output channels for a step each, or None for one step.
            options: an instance of ``cls.Options``.
        """
        return cls(bits, weight_grid(bits), "signed", channels)

    @classmethod
    def for_activations(cls, bits: int, scheme: str, options: MethodOptions) -> Quantizer:
        """The quantizer of a tensor that convolutions read; under ``options.paper`` its scheme is ``unsigned``."""
        scheme = "unsigned" if options.paper else scheme
        return cls(bits, activation_grid(bits, scheme), scheme)

    def penalty(self) -> Tensor | None:
        """A term for the training loss, or None. It is added once a batch, times the batch size, as the task's is."""
        return None

    def initialise(self, x: Tensor) -> None:
        """Sets the ranges from a sample of the values that will be quantized.

        Args:
            x: the weights (O, I, h, w), or any number of activation values in any shape.

        Raises:
            ValueError: ``x`` is empty or not finite.
        """
        finite = int(torch.isfinite(x).sum())
        if finite < max(x.numel(), 1):
            raise ValueError(f"cannot set a quantization range from {x.numel()} values of which {finite} are finite")
        with torch.no_grad():
            self.set_range(x.detach().float())
        self.initialised.fill_(True)
        self.ready = True

    def set_range(self, x: Tensor) -> None:
        """Sets the parameters from finite float32 values ``x``."""
        raise NotImplementedError

    def quantize(self, x: Tensor) -> Tensor:
        """Fake-quantized values of ``x`` (float32, or any type under ``any_precision``), of its shape and type."""
        raise NotImplementedError

    def current_step(self) -> Tensor:
        """The positive step in use, one value or one a channel."""
        raise NotImplementedError

    def integer(self) -> IntegerForm:
        """The integer form of the present state."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized values of ``equalized(x)``, in the type of ``x``, or that itself while not ``enabled``.

        The arithmetic is float32 under autocast too. Its result is shortened to the type of a bfloat16 or float16
        ``x``, as the convolution behind would do.
        """
        fused = self.takes_factors and self.has_factors_for(x) and kernels.native_active(x)
        if not self.enabled or not fused:
            x = self.equalized(x)
        if not self.enabled:
            return x
        if self.training and not self.ready:  # a trace in eval mode may pass before the calibration
            self._warn()
        with torch.autocast(x.device.type, enabled=False):
            if fused:
                return self.quantize(x, self.inverse_equalizer)
            if self.any_precision:
                return self.quantize(x)
            return self.quantize(x.float()).to(x.dtype)

    def has_factors_for(self, x: Tensor) -> bool:
        """Whether there is a factor for each channel of ``x`` (B, C, H, W); broadcasting sees to what is different."""
        factors = self.inverse_equalizer
        return factors is not None and x.dim() == 4 and x.shape[1] == factors.numel()

    def in_own_scale(self, x: Tensor) -> Tensor:
        """Fake-quantized values of ``x`` (B, C, H, W), as near to it as they come: ``forward``, with factors undone."""
        y = self(x)
        return y if self.inverse_equalizer is None else y / self.inverse_equalizer.to(y.dtype)

    def _warn(self) -> None:
        if not Quantizer._warned:
            Quantizer._warned = True
            LOGGER.warning(
                "WARNING: a quantizer without a range is in use: its step is 1 whatever the values are. Call "
                "quant.calibrate(model, batches) after prepare, or load a state_dict"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.ready = self.ready or bool(self.initialised)

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
