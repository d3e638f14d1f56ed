"""LSQ: Learned Step Size Quantization (arXiv 1902.08153), with the affine activation grid of LSQ+ (arXiv 2004.09576).

By name: ``lsq`` takes any activation scheme (affine by default), ``lsq+`` only the affine one, which makes it LSQ+.

    v = x / s,   y = s * clip(round(v), qmin - z, qmax - z)
    dy/ds = round(v) - v inside the range, qmin - z below, qmax - z above        (LSQ eq. 3)
    dy/dx = 1 inside, 0 outside                                                   (LSQ eq. 5)
    dy/dz = 0 inside, -s outside
    gradients of s and z are scaled by 1 / sqrt(N * Qp)                           (LSQ section 2.2)

Different from LSQ+: its offset beta is a real number, which QuantizeLinear cannot carry, so an integer zero point is
learned instead, by rounding with a straight-through estimator. SiLU's negative side (minimum -0.2785) needs it: at 4
bit the relative squared error of SiLU(N(0, 1)) is 0.010 with it and 0.066 without.

First steps are those of the smallest mean squared error. Under ``paper``: LSQ's activations are unsigned and all its
first steps s = 2 <|v|> / sqrt(Qp) (section 2.1); LSQ+ searches activations as we do and starts weights at
s = max(|mean - 3 sigma|, |mean + 3 sigma|) / 2**(bits - 1); both have the full signed weight grid
-2**(bits - 1) .. 2**(bits - 1) - 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quant.primitives import (
    SMALLEST_STEP,
    Grid,
    activation_grid,
    step_gradient_scale,
    uniform_fake_quantize,
    usable_zero_point,
    weight_grid,
)
from quant.quantizer import IntegerForm, MethodOptions, Quantizer
from quant.ranges import search_affine_range, search_symmetric_step


class LSQ(Quantizer):
    """Uniform quantizer with a learned step, and with a learned integer zero point under the ``affine`` scheme.

    Args: see ``Quantizer``; ``paper`` starts from the paper's steps. Parameters are ``step`` (channels,) or (1,) and,
    if affine, ``zero_point`` (1,).
    """

    any_precision = True
    takes_factors = True

    def __init__(self, bits: int, grid: Grid, scheme: str, channels: int | None = None, paper: bool = False) -> None:
        super().__init__(bits, grid, scheme, channels)
        self.paper = paper
        self.keep_output = True  # False for output quantizers: the activation function behind may work in place
        self.step = nn.Parameter(torch.ones(channels or 1))
        self.zero_point = nn.Parameter(torch.zeros(1)) if scheme == "affine" else None

    @classmethod
    def for_weights(cls, bits: int, channels: int | None, options: MethodOptions) -> Quantizer:
        """On the narrow symmetric grid, or under ``options.paper`` on the full one (that of signed activations)."""
        grid = activation_grid(bits, "signed") if options.paper else weight_grid(bits)
        return cls(bits, grid, "signed", channels, options.paper)

    @classmethod
    def for_activations(cls, bits: int, scheme: str, options: MethodOptions) -> Quantizer:
        """Under ``options.paper`` its scheme is ``unsigned``."""
        scheme = "unsigned" if options.paper else scheme
        return cls(bits, activation_grid(bits, scheme), scheme, paper=options.paper)

    def current_step(self) -> Tensor:
        """The step in use: magnitude of the parameter, never under ``SMALLEST_STEP``, so no update can turn it over."""
        return self.step.abs().clamp_min(SMALLEST_STEP)

    def set_range(self, x: Tensor) -> None:
        if self.scheme == "affine":
            step, zero_point = search_affine_range(x, self.grid, self.range_rule)
            self.zero_point.copy_(zero_point)
        elif self.paper:
            step = self.paper_step(x.reshape(self.channels or 1, -1)).clamp_min(SMALLEST_STEP)
        else:
            step = search_symmetric_step(x, self.grid, self.channels, self.range_rule)
        self.step.copy_(step)

    def paper_step(self, rows: Tensor) -> Tensor:
        """LSQ's first steps ``2 <|v|> / sqrt(Qp)``, (C,), of values (C, N)."""
        return 2 * rows.abs().mean(1) / math.sqrt(self.grid.qmax)

    def quantize(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        samples = 1 if self.channels else max(x.shape[0], 1)
        count = x.numel() // (self.channels or samples)
        scale = step_gradient_scale(count, self.grid.qmax)
        return uniform_fake_quantize(x, self.step, self.zero_point, self.grid, scale, self.keep_output, factors)

    @torch.no_grad()
    def integer(self) -> IntegerForm:
        return IntegerForm(
            step=self.current_step().detach().clone(),
            zero_point=int(usable_zero_point(self.zero_point, self.grid)),
            grid=self.grid,
        )


class LSQPlus(LSQ):
    """LSQ+ (arXiv 2004.09576): LSQ whose activations are affine. A recipe that asks for another scheme is refused."""

    schemes = ("affine",)

    @classmethod
    def for_activations(cls, bits: int, scheme: str, options: MethodOptions) -> Quantizer:
        """Affine, under ``options.paper`` too."""
        return cls(bits, activation_grid(bits, "affine"), "affine", paper=options.paper)

    def paper_step(self, rows: Tensor) -> Tensor:
        """LSQ+'s first weight steps ``max(|mean - 3 sigma|, |mean + 3 sigma|) / 2**(bits - 1)``, (C,)."""
        extent = rows.mean(1).abs() + 3 * rows.std(1, correction=0)
        extent = extent.minimum(4 * rows.abs().amax(1))  # never more, but that squares of huge values overflow
        return extent / 2 ** (self.bits - 1)


class FixedGrid(Quantizer):
    """A grid that never learns: the image's. 0 and 1 are codes, with zero point 0.

    Args:
        bits: 8 gives step 1/255; under ``signed``, where half of the codes lie below zero, 1/127.
        scheme: ``unsigned`` or ``signed``.
    """

    any_precision = True

    def __init__(self, bits: int = 8, scheme: str = "unsigned") -> None:
        super().__init__(bits, activation_grid(bits, scheme), scheme)
        self.register_buffer("step", torch.tensor([1.0 / self.grid.qmax]))
        self.ready = True  # nothing to calibrate

    def set_range(self, x: Tensor) -> None:
        pass

    def quantize(self, x: Tensor) -> Tensor:
        return uniform_fake_quantize(x, self.step, None, self.grid)

    def current_step(self) -> Tensor:
        return self.step

    def integer(self) -> IntegerForm:
        return IntegerForm(self.step.clone(), 0, self.grid)
