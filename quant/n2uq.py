"""N2UQ: nonuniform-to-uniform quantization (arXiv 2111.14826), with an integer output offset for SiLU.

Activations: learned thresholds T_i, uniform output levels. With n = 2**bits - 1 interval widths a_i > 0, start b, input
scale c and output step d (the paper's D * beta2, D = 2 / n; its widths and start are D times ours):

    e_0 = b,  e_i = e_{i-1} + a_i,   T_i = (e_{i-1} + e_i) / 2
    q = #{i: T_i <= c x},   y = d (q + qmin - z)
    R(v) = sum_i clip((v - e_{i-1}) / a_i, 0, 1)                                  the ramp under the staircase

Backward (generalised straight-through estimator): y is differentiated as d (R(c x) + qmin - z), so with k the segment
that holds c x, and nothing outside [e_0, e_n],

    dy/dx = d c / a_k,   dy/dc = d x / a_k,   dy/db = -d / a_k
    dy/da_k = -d (c x - e_{k-1}) / a_k**2,   dy/da_j = -d / a_k for j < k, 0 for j > k
    dy/dd = q + qmin - z, inside and outside

The offset z is an integer, fixed by the calibration: SiLU's negative side (minimum -0.2785) needs it, the paper's
networks learn shifts in front of a non-negative grid instead.

Weights: w' = clip(w / f, -1, 1) with f proportional to m = mean|w| of the output channel. The paper's f, which keeps
entropy, m (2**bits - 1) / 2**(bits-1), gives w' the mean magnitude of a grid whose levels are used equally often; ours,
the default, has the ratio f / m of the smallest squared error, searched once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant import kernels, native
from quant.blocks import Buffer, equalized, pieces
from quant.layouts import dense, same_layout
from quant.lsq import LSQ
from quant.primitives import (
    SMALLEST_STEP,
    Grid,
    activation_grid,
    from_codes,
    per_channel,
    step_gradient_scale,
    to_codes,
    to_odd_codes,
    weight_grid,
)
from quant.quantizer import IntegerForm, MethodOptions, Quantizer
from quant.ranges import search_affine_range, search_symmetric_step

# Smallest interval in steps: it bounds the gradient's gain at 16. The paper's 1e-3 (in units of D) allows 133 at 4 bit.
SMALLEST_WIDTH = 1 / 16
PAPER_WIDTH = 1e-3
# The thresholds learn at a tenth of the other parameters' rate, the ratio of the paper's recipe.
THRESHOLD_RATE = 0.1
# The paper has 2 to 4 bits. Its clip, at 1.5 deviations of Gaussian weights, costs 0.046 of their energy whatever the
# width; rounding at 5 bits costs 0.003, so above 4 the clip comes from a search in any case. The paper trains 128
# epochs on ImageNet; a few epochs of fine-tuning do not win back what its clip takes from a trained network: circuit
# boards, w4a4, 94 optimizer steps, mAP50 0.000 calibrated and 0.524 trained, with the searched clip 0.404 and 0.646.
ENTROPY_BITS = 4


# --- the staircase as a table -----------------------------------------------------------------------------------------
#
# Counting thresholds is a search (torch.bucketize: 27 ns a value at 4 bits), so x is located in narrow cells of equal
# width first and a table says the code of a cell. Thresholds therefore stand on cell borders, at most 1/270 of the mean
# interval from the parameters' at 4 bits (1/64 at 8). CPU time of forward and backward in units of LSQ's, 4 bits,
# (16, 64, 40, 40), one thread of a loaded machine:
#     one torch.where pair a threshold, by autograd       66
#     bucketize, table, bincount                           9.3
#     cell, then an exact comparison inside it             3.8
#     cell only                                            1.75, and 1.3 for a whole training step of yolov5n
# What is left is one table lookup each way and one bincount, 1 to 2 ns a value each.
# The cell of each value is all that the backward pass needs, 2 bytes: half of an activation copy.


class Staircase(NamedTuple):
    """The parameters of one grid in use.

    Attributes:
        step: d, (1,).
        scale: c, (1,).
        start: b, (1,).
        widths: a_i, (levels - 1,).
    """

    step: Tensor
    scale: Tensor
    start: Tensor
    widths: Tensor


class _Cells:
    """Cells of x: number 1 reaches from -inf to below the first edge, the last one from above the last edge to inf.

    Their width is a power of two and their borders are its multiples, so ``x / width + offset`` is rounded once, with
    or without a fused multiply-add, and the thresholds can be stated exactly. Cell 0 is left to NaN, which converts
    to 0.

    Args:
        stairs: the parameters, detached.

    Attributes:
        count: number of the last cell.
        edges: (levels,) e_i in x.
        width, offset: (1,).
        edge_cells: (levels,) numbers of the first cells whose centres are not below the edges.
        rise_cells: (levels - 1,) the same for the thresholds: there the code rises by one.
    """

    def __init__(self, stairs: Staircase) -> None:
        levels = stairs.widths.numel() + 1
        self.count = max(4096, 64 * levels)  # at most 16,384: int16 holds them
        self.edges = torch.cat([stairs.start, stairs.start + stairs.widths.cumsum(0)]) / stairs.scale
        first, last = self.edges[:1], self.edges[-1:]
        # Four cells more than the ramp fills: NaN's, the two outside, and one because its ends stand inside cells.
        exponent = torch.frexp((last - first) / (self.count - 4)).exponent
        self.width = torch.ldexp(torch.ones_like(first), exponent)
        self.offset = 2 - torch.floor(first / self.width)
        middles = (self.edges[:-1] + self.edges[1:]) / 2
        cells = torch.ceil(torch.cat([self.edges, middles]) / self.width - 0.5) + self.offset
        cells = cells.long().clamp_(2, self.count)  # in this order: NaN becomes the smallest integer
        self.edge_cells, self.rise_cells = cells[:levels], cells[levels:]

    def passed(self, cells: Tensor) -> Tensor:
        """(count + 1,) how many of ``cells`` are at or below each cell, an integer tensor."""
        marks = torch.zeros(self.count + 1, dtype=torch.long, device=cells.device)
        return marks.scatter_add_(0, cells, torch.ones_like(cells)).cumsum(0)

    def centres(self) -> Tensor:
        """(count + 1,) centres of the cells in x."""
        numbers = torch.arange(self.count + 1, dtype=self.width.dtype, device=self.width.device)
        return (numbers - (self.offset - 0.5)) * self.width

    def thresholds(self) -> Tensor:
        """The smallest float32 values of x that reach ``rise_cells``."""
        border = self.rise_cells.double()
        # fl(x / width + offset) reaches a border from half a float32 spacing below it; the tie rounds up, as an integer
        # below 2**23 has an even mantissa.
        below = torch.nextafter(border.float(), torch.zeros_like(border, dtype=torch.float32)).double()
        exact = ((border + below) / 2 - self.offset.double()) * self.width.double()
        rounded = exact.float()
        infinity = torch.full_like(rounded, torch.inf)
        return torch.where(rounded.double() < exact, torch.nextafter(rounded, infinity), rounded)

    def positions(self, x: Tensor) -> Tensor:
        """Cell numbers of ``x`` before truncation, floats of 1 .. count, or NaN."""
        inverse = 1 / self.width
        if x.device.type == "cpu":  # one pass instead of two; on an accelerator .item() would make the host wait
            return torch.add(self.offset.reshape(()), x, alpha=inverse.item()).clamp_(1, self.count)
        return (x * inverse).add_(self.offset).clamp_(1, self.count)


def _cell_sums(cells: Tensor, gradient: Tensor, count: int) -> Tensor:
    """(count,) sums of ``gradient`` over the values in each cell."""
    if cells.device.type == "cpu":
        return torch.bincount(cells, gradient, count)  # 0.8 ns a value; scatter_add_ 1.3, and it wants int64
    return gradient.new_zeros(count).index_add_(0, cells.int(), gradient)  # bincount would make the host wait


class _NonuniformQuantize(torch.autograd.Function):
    """The staircase forward, the ramp backward (file header). Saved are the cell numbers, tables and parameters, or
    with compiled kernels x in place of the cell numbers.

    In the gradients of the thresholds a value counts as standing at the centre of its cell.
    """

    @staticmethod
    def forward(ctx, x, step, scale, start, widths, zero_point, qmin, rate, factors):
        x = dense(x)
        cells = _Cells(Staircase(step, scale, start, widths))
        ctx.cells, ctx.first, ctx.example = cells, qmin - zero_point, torch.empty_like(x, device="meta")
        ctx.factors = factors
        native_kernels = kernels.native_active(x)
        if not native_kernels and kernels.active(x, step, widths.numel()):
            ctx.save_for_backward(x, None, step, scale, widths, rate)
            return kernels.run(kernels.thresholds_passed, [x], step, ctx.first, cells.thresholds())[0]
        values = from_codes(cells.passed(cells.rise_cells).float() + qmin, step, zero_point)
        values[0] = torch.nan
        if native_kernels:
            y, numbers = native.cell_values(x, cells.width, cells.offset, values, factors)
        else:
            y, numbers = _table_forward(cells, equalized(x, factors), values)
        ctx.save_for_backward(numbers, values, step, scale, widths, rate)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        kept, values, step, scale, widths, rate = ctx.saved_tensors
        cells = ctx.cells
        segment = cells.passed(cells.edge_cells)  # 0 and levels are outside
        slopes = torch.nn.functional.pad(step * scale / widths, (1, 1)).index_select(0, segment)
        gradient_x, sums = _table_backward(cells, kept, same_layout(gradient, ctx.example), slopes, ctx.factors)
        if values is None:
            values = (cells.passed(cells.rise_cells) + ctx.first) * step
        by_step = torch.dot(sums[1:], values[1:]) / step * rate
        by_ramp = _ramp_gradients(cells, segment, sums, scale, widths)
        return gradient_x, by_step, *(by * (step * rate * THRESHOLD_RATE) for by in by_ramp), *[None] * 4


def _table_forward(cells: _Cells, x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What ``native.cell_values`` gives, piece by piece."""
    y, buffer = torch.empty_like(x), Buffer()
    numbers = torch.empty(x.numel(), dtype=torch.int16, device=x.device)
    for part, found, out in pieces(x, numbers, y):
        found.copy_(cells.positions(part.float()))  # int16 first: it makes NaN 0, int32 the smallest integer
        value = buffer.like(out)
        torch.index_select(values, 0, found.int(), out=value)
        if value is not out:
            out.copy_(value)
    return y, numbers


def _table_backward(
    cells: _Cells, kept: Tensor, gradient: Tensor, slopes: Tensor, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and the sums of ``gradient`` over each cell, piece by piece.

    Args:
        kept: cell numbers of x, int16, or x itself.
        slopes: dy/dx in each cell.
        factors: of x's channels, or None.
    """
    if not kept.is_floating_point() and kernels.native_active(gradient):
        return native.cell_backward(gradient, kept, slopes, factors)
    gradient_x = torch.empty_like(gradient)
    sums = torch.zeros(len(slopes), device=gradient.device)
    buffer = Buffer()
    for found, upstream, out in pieces(kept, gradient, gradient_x):
        upstream, slope = upstream.float(), buffer.like(out)
        if found.is_floating_point():
            found = cells.positions(found.float()).short()
        torch.index_select(slopes, 0, found.int(), out=slope)
        slope.mul_(upstream)
        if slope is not out:
            out.copy_(slope)
        sums += _cell_sums(found, upstream, len(slopes))
    return equalized(gradient_x, factors), sums


def _ramp_gradients(cells: _Cells, segment: Tensor, sums: Tensor, scale: Tensor, widths: Tensor) -> tuple[Tensor, ...]:
    """Gradients of d R with respect to scale (1,), start (1,) and widths (levels - 1,), for d = 1.

    Args:
        segment: number k of each cell's segment; 0 and levels are outside the ramp.
        sums: sums of dL/dy over the values in each cell.
    """
    by_segment = sums.new_zeros(2, widths.numel() + 2)
    by_segment.index_add_(1, segment, torch.stack([sums, sums * cells.centres()]))
    above, moment = by_segment[:, 1:-1] / widths  # sums of dL/dy / a_k and of x dL/dy / a_k
    total = above.sum()
    within = (moment - cells.edges[:-1] * above) * scale / widths
    return moment.sum().reshape(1), -total.reshape(1), above.cumsum(0) - total - within


# --- activations ------------------------------------------------------------------------------------------------------


@dataclass
class N2UQOptions(MethodOptions):
    """Options of N2UQ.

    Attributes:
        weights: ``symmetric``, the narrow grid with zero, or ``half``, the paper's 2**bits levels at odd multiples of
            half a step (up to 7 bits; 8-bit layers keep ``symmetric``). ``paper`` implies ``half``.
        clip: where weights are clipped at up to 4 bits: ``searched``, at the smallest squared error, ``entropy``, the
            paper's, or ``auto``: searched on the symmetric grid, entropy on the half-level one.
    """

    weights: str = "symmetric"
    clip: str = "auto"

    def validate(self) -> None:
        if self.weights not in ("symmetric", "half"):
            raise ValueError(f"weights: {self.weights!r} is not possible; choose symmetric or half")
        if self.clip not in ("auto", "searched", "entropy"):
            raise ValueError(f"clip: {self.clip!r} is not possible; choose auto, searched or entropy")


class N2UQ(Quantizer):
    """Activations with learned thresholds and uniform levels; ``for_weights`` gives ``EntropyWeights``.

    All parameters are relative to ``unit``, the step that the calibration found, so that Adam's updates of fixed size
    mean the same for an 8-bit grid as for a 2-bit one: ``output_scale`` and ``input_scale`` (1,) start at 1, ``start``
    (1,) and ``widths`` (levels - 1,) count steps. Under SGD their gradients are scaled as if they were in units of x,
    with LSQ's factor 1 / sqrt(N Qp), those of the thresholds (input scale, start, widths) with a tenth of it.

    Widths are ``|parameter|`` plus a floor, so the thresholds rise whatever an optimizer does.

    Args: see ``Quantizer``.
        paper: the paper's first range [0, 2], not looking at data, and its floor for widths.
    """

    any_precision = True
    takes_factors = True
    Options = N2UQOptions
    ema_copied = ("unit", "zero_point")  # constants of the calibration

    def __init__(self, bits: int, grid: Grid, scheme: str, channels: int | None = None, *, paper: bool = False) -> None:
        super().__init__(bits, grid, scheme, channels)
        self.paper = paper
        intervals = grid.levels - 1
        self.smallest_width = PAPER_WIDTH * intervals / 2 if paper else SMALLEST_WIDTH
        self.output_scale = nn.Parameter(torch.ones(1))
        self.input_scale = nn.Parameter(torch.ones(1))
        self.start = nn.Parameter(torch.zeros(1))
        self.widths = nn.Parameter(torch.full((intervals,), 1 - self.smallest_width))
        self.register_buffer("unit", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1))

    @classmethod
    def for_weights(cls, bits: int, channels: int | None, options: MethodOptions) -> Quantizer:
        half = (options.paper or options.weights == "half") and bits <= 7
        grid = Grid(-(2**bits - 1), 2**bits - 1) if half else weight_grid(bits)
        searched = options.clip == "searched" or (options.clip == "auto" and not half)
        return EntropyWeights(bits, grid, "signed", channels, half=half, searched=searched or bits > ENTROPY_BITS)

    @classmethod
    def for_activations(cls, bits: int, scheme: str, options: MethodOptions) -> Quantizer:
        """``N2UQ``, or at 8 bits ``LSQ``: 255 thresholds cost 200 times a QuantizeLinear in the exported file, and the
        paper leaves its first and last layers, which have 8 bits here, in float."""
        scheme = "unsigned" if options.paper else scheme
        if bits == 8:
            return LSQ(bits, activation_grid(bits, scheme), scheme)
        return cls(bits, activation_grid(bits, scheme), scheme, paper=options.paper)

    def set_range(self, x: Tensor) -> None:
        # For levels of equal distance the thresholds of the smallest squared error are the midpoints between them, so
        # the best start is the uniform grid; what unequal intervals are good for only the loss can say.
        self.output_scale.fill_(1.0)
        self.input_scale.fill_(1.0)
        self.widths.fill_(1 - self.smallest_width)
        self.zero_point.zero_()
        if self.paper:
            self.unit.fill_(2 / (self.grid.levels - 1))
        elif self.scheme == "affine":
            unit, zero_point = search_affine_range(x, self.grid, self.range_rule)
            self.unit.copy_(unit)
            self.zero_point.copy_(zero_point)
        else:
            self.unit.copy_(search_symmetric_step(x, self.grid, None, self.range_rule))
        self.start.copy_(self.grid.qmin - self.zero_point)

    def current_step(self) -> Tensor:
        """Distance of two levels, at least ``SMALLEST_STEP``."""
        return (self.output_scale.abs() * self.unit).clamp_min(SMALLEST_STEP)

    def stairs(self) -> Staircase:
        """The parameters in use: positive, and bounded so that a diverging optimizer cannot make them infinite."""
        levels = self.grid.levels
        return Staircase(
            step=self.current_step(),
            scale=self.input_scale.abs().clamp(2**-10, 2**10) / self.unit,
            start=self.start.clamp(-4 * levels, 4 * levels),
            widths=self.widths.abs().clamp_max(4 * levels) + self.smallest_width,
        )

    def quantize(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        samples = max(x.shape[0], 1) if x.dim() else 1
        # A dead layer's unit is 2**-20; its square must not become a factor of 1e12.
        rate = step_gradient_scale(x.numel() // samples, self.grid.qmax) / self.unit.clamp_min(2**-10) ** 2
        return _NonuniformQuantize.apply(x, *self.stairs(), self.zero_point, self.grid.qmin, rate, factors)

    @torch.no_grad()
    def integer(self) -> IntegerForm:
        stairs = self.stairs()
        return IntegerForm(
            step=stairs.step.clone(),
            zero_point=round(float(self.zero_point)),
            grid=self.grid,
            thresholds=_Cells(stairs).thresholds(),
        )


# --- weights ----------------------------------------------------------------------------------------------------------


class _ClippedStraightThrough(torch.autograd.Function):
    """Returns ``quantized``; the gradient goes to ``weights`` where |weights| < limit.

    The public code omits the factor f and the clip from its gradient, which is then 1 / f (about 10) everywhere: that
    asks for Adam, and lets clipped weights wander off while they change nothing. This is the gradient of what is
    computed, f * clip(w / f, -1, 1), with f taken as constant as the paper does.
    """

    @staticmethod
    def forward(ctx, weights, quantized, limit):
        ctx.save_for_backward(weights.abs() < limit)
        return quantized

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


class EntropyWeights(Quantizer):
    """Weights scaled in proportion to their mean magnitude (file header); nothing is learned but the weights.

    The step follows the weights in training and stands still in eval mode, as a buffer that the EMA averages: so the
    integer form is known without the weights.

    Args: see ``Quantizer``.
        half: ``grid`` is a half-level grid; only its odd codes occur.
        searched: the ratio of clip to mean magnitude is that of the smallest squared error, else the paper's.
    """

    def __init__(
        self,
        bits: int,
        grid: Grid,
        scheme: str,
        channels: int | None = None,
        *,
        half: bool = False,
        searched: bool = False,
    ) -> None:
        super().__init__(bits, grid, scheme, channels)
        self.half_levels, self.searched = half, searched
        self.register_buffer("step", torch.ones(channels or 1))
        self.register_buffer("clip", torch.full((channels or 1,), (2**bits - 1) / 2 ** (bits - 1)))  # f / mean|w|

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(self.channels or 1, -1)

    def _step_of(self, x: Tensor) -> Tensor:
        return (self._rows(x).abs().mean(1) * self.clip / self.grid.qmax).clamp_min(SMALLEST_STEP)

    def set_range(self, x: Tensor) -> None:
        if self.searched:
            grid, mean = weight_grid(self.bits), self._rows(x).abs().mean(1)
            searched = search_symmetric_step(x, grid, self.channels) * grid.qmax / mean
            self.clip.copy_(torch.where(mean > 0, searched, self.clip))
        self.step.copy_(self._step_of(x))

    def quantize(self, x: Tensor) -> Tensor:
        step = self.step
        if self.training:
            step = self._step_of(x.detach())
            self.step.copy_(step)
        step = per_channel(step, x)
        with torch.no_grad():
            codes = to_odd_codes(x, step, self.grid) if self.half_levels else to_codes(x, step, 0, self.grid)
            quantized = from_codes(codes, step, 0)
        return _ClippedStraightThrough.apply(x, quantized, step * self.grid.qmax)

    def current_step(self) -> Tensor:
        return self.step

    def integer(self) -> IntegerForm:
        return IntegerForm(self.step.clone(), 0, self.grid, odd=self.half_levels)
