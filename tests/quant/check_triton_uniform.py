"""The Triton kernels against the arithmetic piece by piece. Run by test_triton_uniform.py in a process of its own."""

import pytest
import torch

from quant import kernels, triton_uniform
from quant.primitives import activation_grid, uniform_fake_quantize, weight_grid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def one_pass(function, x, step, zero_point, grid, upstream):
    leaves = [None if t is None else t.clone().requires_grad_(True) for t in (x, step, zero_point)]
    y = function(*leaves, grid)
    y.backward(upstream)
    return y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)


def assert_same(x, step, zero_point, grid, scale=0.25):
    upstream = torch.randn(x.shape, device=DEVICE).to(x.dtype)
    found = one_pass(
        lambda x, s, z, g: triton_uniform.uniform_fake_quantize(x, s, z, g.qmin, g.qmax, scale),
        x, step, zero_point, grid, upstream,
    )  # fmt: skip
    before = kernels.switch(False)
    expected = one_pass(
        lambda x, s, z, g: uniform_fake_quantize(x, s, z, g, scale), x, step, zero_point, grid, upstream
    )
    kernels.switch(before)
    assert torch.equal(found[0], expected[0]) and found[0].stride() == expected[0].stride()
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)
    if zero_point is not None:
        torch.testing.assert_close(found[3], expected[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (2, 16, 24, 24), (1, 1, 1, 1)])
def test_activations(shape, dtype):
    torch.manual_seed(0)
    x = torch.nn.functional.silu(2 * torch.randn(shape, device=DEVICE)).to(dtype).to(memory_format=torch.channels_last)
    for bits in (2, 4, 8):
        for zero in (0.6, 3.4, 300.0, -5.0):  # the last two beyond the grid
            grid = activation_grid(bits, "affine")
            step = torch.full((1,), 3.0 / grid.qmax, device=DEVICE)
            assert_same(x, step, torch.full((1,), zero, device=DEVICE), grid)


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (3, 600, 3, 3)])  # one program a row, and several
def test_weights_with_a_step_each(shape):
    torch.manual_seed(0)
    rows = shape[0]
    x = torch.randn(shape, device=DEVICE) * torch.logspace(-2, 1, rows, device=DEVICE).reshape(-1, 1, 1, 1)
    step = torch.logspace(-2, 1, rows, device=DEVICE) / 7 * torch.tensor([1, -1, 1e-9, 1, 1, 1], device=DEVICE)[:rows]
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_same(x.to(memory_format=layout), step, None, weight_grid(4))


def test_ties_and_values_on_the_limits():
    step = torch.tensor([0.5], device=DEVICE)
    x = torch.arange(-40, 41, device=DEVICE).float().reshape(1, 1, 9, 9) * 0.125
    assert_same(x, step, None, weight_grid(4))
    assert_same(x, step, torch.tensor([2.5], device=DEVICE), activation_grid(4, "affine"))


def test_not_a_number_stays_visible():
    step, zero = torch.tensor([0.1], device=DEVICE), torch.tensor([1.0], device=DEVICE)
    x = torch.tensor([0.5, torch.nan, -0.2], device=DEVICE)
    assert triton_uniform.uniform_fake_quantize(x, step, zero, 0, 15, 1.0).isnan().tolist() == [False, True, False]
    assert triton_uniform.uniform_fake_quantize(x, step * torch.nan, zero, 0, 15, 1.0).isnan().all()
