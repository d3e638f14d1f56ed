"""First ranges: the step (and zero point) with the smallest mean squared quantization error, or, by other rules, that
whose grid reaches to the extremes of the values or to a percentile of them. Imports only torch."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.primitives import SMALLEST_STEP, Grid

# Candidate ranges, as shares of the largest magnitude: from a fifth of it to all of it. At 4 bit the best share of a
# Gaussian is near 0.6, at 2 bit near 0.35, at 8 bit near 1.
SHARES = torch.linspace(0.2, 1.0, 81)
# Shares of the most negative value that an affine grid may cover; 0 drops the negative side as ReLU would.
NEGATIVE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
RULES = ("mse", "percentile", "max")
PERCENTILE = 0.999  # of the values that lie below the upper end, and above the lower one, by the ``percentile`` rule
# Activation ranges are searched on this many values: more change the chosen step by less than one candidate.
SAMPLE_LIMIT = 16384


def covered(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """The ends (N,), at most and at least 0, that a grid for rows (N, M) should reach by ``percentile`` or ``max``."""
    if rule == "max":
        return x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)
    last = x.shape[1] - 1
    ordered = x.sort(1).values  # torch.quantile refuses more than 16 million values
    high = ordered[:, round(PERCENTILE * last)]
    return ordered[:, last - round(PERCENTILE * last)].clamp_max(0), high.clamp_min(0)


def search_symmetric_step(x: Tensor, grid: Grid, channels: int | None, rule: str = "mse") -> Tensor:
    """Steps with the smallest mean squared error for a grid with zero point 0.

    Args:
        x: values; with ``channels`` the first dimension has that many rows, each with its own step.
        grid: the codes; one-sided if ``qmin`` is 0.
        channels: number of rows, or None for one step for all.
        rule: one of ``RULES``; all but ``mse`` take the smallest step that reaches the ends they name.

    Returns:
        float32 steps (channels,) or (1,). A row of zeros gets ``SMALLEST_STEP``.
    """
    rows = x.reshape(channels or 1, -1)
    if rule != "mse":
        low, high = covered(rows, rule)
        step = high / grid.qmax if grid.qmin >= 0 else torch.maximum(high / grid.qmax, low / grid.qmin)
        return step.clamp_min(SMALLEST_STEP)
    positive = rows.amax(1).clamp_min(0) / grid.qmax
    largest = positive if grid.qmin >= 0 else torch.maximum(positive, rows.amin(1).clamp_max(0) / grid.qmin)
    best_error = torch.full_like(largest, torch.inf)
    best_step = largest.clone()
    for share in SHARES.tolist():
        step = (largest * share).clamp_min(SMALLEST_STEP)
        quantized = (rows / step[:, None]).round_().clamp_(grid.qmin, grid.qmax).mul_(step[:, None])
        error = quantized.sub_(rows).square_().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
    return best_step.clamp_min(SMALLEST_STEP)


def search_affine_range(x: Tensor, grid: Grid, rule: str = "mse") -> tuple[Tensor, Tensor]:
    """Step and integer zero point with the smallest mean squared error, for values with a short negative side.

    Args:
        x: any number of values; at most ``SAMPLE_LIMIT`` of them, evenly spaced in rank, are looked at.
        grid: the codes, ``qmin`` 0.
        rule: one of ``RULES``.

    Returns:
        step (1,) and zero point (1,), both float32.
    """
    values = x.reshape(-1)
    if rule != "mse":
        low, high = covered(values[None], rule)
        step = ((high - low) / (grid.levels - 1)).clamp_min(SMALLEST_STEP)
        return step, torch.round(-low / step).clamp(grid.qmin, grid.qmax)
    if values.numel() > SAMPLE_LIMIT:
        ranks = torch.linspace(0, values.numel() - 1, SAMPLE_LIMIT, device=x.device).long()
        values = values.sort().values[ranks]
    lowest, highest = values.min().clamp_max(0), values.max().clamp_min(0)
    shares = SHARES.to(x.device)
    candidates = []
    for negative_share in NEGATIVE_SHARES:
        low = lowest * negative_share
        step = ((highest * shares - low) / (grid.levels - 1)).clamp_min(SMALLEST_STEP)
        candidates.append((step, torch.round(-low / step).clamp(grid.qmin, grid.qmax)))
    steps = torch.cat([step for step, _ in candidates])
    zero_points = torch.cat([zero_point for _, zero_point in candidates])
    errors = torch.empty_like(steps)
    for first in range(0, len(steps), 32):  # 32 x 16,384 values at a time: 2 MB, stays in cache
        step, zero_point = steps[first : first + 32, None], zero_points[first : first + 32, None]
        codes = (values / step).round_().clamp_(grid.qmin - zero_point, grid.qmax - zero_point)
        errors[first : first + 32] = codes.mul_(step).sub_(values).square_().sum(1)
    best = errors.argmin()
    return steps[best].reshape(1), zero_points[best].reshape(1)
