"""The range search against a brute-force search over every step and zero point."""

import pytest
import torch

from quant.calibrate import InputSampler
from quant.primitives import Grid, activation_grid, weight_grid
from quant.ranges import covered, search_affine_range, search_symmetric_step


def squared_error(x, step, zero_point, grid):
    codes = (torch.round(x / step) + zero_point).clamp(grid.qmin, grid.qmax)
    return float(((codes - zero_point) * step - x).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_affine_search_is_close_to_brute_force(bits):
    torch.manual_seed(bits)
    x = torch.nn.functional.silu(torch.randn(2000) * 1.5)
    grid = activation_grid(bits, "affine")
    best = min(
        squared_error(x, step, zero_point, grid)
        for step in torch.linspace(0.02, 3.0, 600).tolist()
        for zero_point in range(grid.qmax + 1)
    )
    step, zero_point = search_affine_range(x, grid)
    assert squared_error(x, step.item(), zero_point.item(), grid) <= best * 1.05


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_search_per_channel_is_close_to_brute_force(bits):
    torch.manual_seed(bits)
    x = torch.randn(3, 200) * torch.tensor([[0.01], [1.0], [30.0]])
    grid = weight_grid(bits)
    steps = search_symmetric_step(x, grid, 3)
    for row, step in zip(x, steps, strict=True):
        candidates = torch.linspace(0.05, 1.0, 2000) * row.abs().max() / grid.qmax
        best = min(squared_error(row, candidate, 0, grid) for candidate in candidates)
        # At 8 bit the 200 rounding errors differ between neighbouring steps by chance alone.
        assert squared_error(row, step, 0, grid) <= best * (1.15 if bits == 8 else 1.05)


def test_constant_and_zero_inputs_give_a_usable_step():
    for x in (torch.zeros(50), torch.full((50,), 3.0), torch.full((50,), -0.2)):
        step, zero_point = search_affine_range(x, Grid(0, 15))
        assert step > 0 and torch.isfinite(step) and 0 <= zero_point <= 15
        if x[0] != 0:
            assert squared_error(x, step, zero_point, Grid(0, 15)) < 0.01 * float(x.square().sum())
    assert (search_symmetric_step(torch.zeros(4, 9), Grid(-7, 7), 4) > 0).all()


@pytest.mark.parametrize(("rule", "ends"), [("max", (-0.5, 40.0)), ("percentile", (-0.5, 2.0))])
def test_the_other_rules_cover_what_they_say(rule, ends):
    x = torch.cat([torch.linspace(-0.5, 2.0, 100_000), torch.tensor([40.0])])[torch.randperm(100_001)]
    step, zero_point = search_affine_range(x, Grid(0, 255), rule)
    reached = torch.stack([-zero_point * step, (255 - zero_point) * step]).flatten()
    torch.testing.assert_close(reached, torch.tensor(ends), atol=0.6 * step.item(), rtol=0)
    symmetric = search_symmetric_step(torch.stack([x, -3 * x]), Grid(-7, 7), 2, rule)
    torch.testing.assert_close(symmetric, torch.tensor([1.0, 3.0]) * ends[1] / 7, rtol=0.01, atol=0)
    unsigned = search_symmetric_step(x, Grid(0, 15), None, rule)
    torch.testing.assert_close(unsigned, torch.tensor([ends[1] / 15]), rtol=0.01, atol=0)


def test_the_percentile_is_that_of_all_images():
    """Not of a sample that the extremes of every batch have been put into."""
    torch.manual_seed(0)
    sampler = InputSampler(16)
    for _ in range(16):
        sampler(torch.nn.Identity(), (torch.rand(2, 1, 200, 250) - 0.5,))
    ends = torch.cat(covered(sampler.values(extremes=False)[None], "percentile"))
    torch.testing.assert_close(ends, torch.tensor([-0.499, 0.499]), atol=6e-4, rtol=0)
    assert sampler.values().max() > 0.4999 and sampler.values().min() < -0.4999


def test_a_rule_gives_constant_and_zero_inputs_a_usable_step():
    for x in (torch.zeros(50), torch.full((50,), 3.0), torch.full((50,), -0.2)):
        for rule in ("percentile", "max"):
            step, zero_point = search_affine_range(x, Grid(0, 15), rule)
            assert step > 0 and 0 <= zero_point <= 15
            assert squared_error(x, step, zero_point, Grid(0, 15)) <= 0.01 * float(x.square().sum())
