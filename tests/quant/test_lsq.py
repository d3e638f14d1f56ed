"""LSQ against a float64 reference written from the paper's equations, value by value."""

import copy

import pytest
import torch

from quant.config import QuantConfig
from quant.lsq import LSQ, FixedGrid, LSQPlus
from quant.primitives import SMALLEST_STEP, Grid, activation_grid, to_codes, weight_grid
from quant.quantizer import MethodOptions
from quant.ranges import search_affine_range
from quant.recipe import build_config
from quant.registry import QUANTIZERS
from utils.errors import UserError

PAPER = MethodOptions(paper=True)


def reference(x, step, zero_point, qmin, qmax, upstream):
    """Forward and gradients by the case distinction of arXiv 1902.08153 eq. 1 to 5, in float64 with Python loops."""
    y, dx, ds, dz = [], [], 0.0, 0.0
    low, high = qmin - zero_point, qmax - zero_point
    for value, gradient in zip(x.double().tolist(), upstream.double().tolist(), strict=True):
        v = value / step
        rounded = round(v)  # Python rounds half to even, as ONNX does
        y.append(min(max(rounded, low), high) * step)
        if v <= low:
            dx.append(0.0)
            ds += gradient * low
            dz += gradient * -step
        elif v >= high:
            dx.append(0.0)
            ds += gradient * high
            dz += gradient * -step
        else:
            dx.append(gradient)
            ds += gradient * (rounded - v)
    return y, dx, ds, dz


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("scheme", ["affine", "unsigned", "signed"])
def test_activation_forward_and_gradients(bits, scheme):
    torch.manual_seed(bits)
    quantizer = LSQ(bits, activation_grid(bits, scheme), scheme)
    x = torch.nn.functional.silu(torch.randn(1, 3, 13, 11) * 2)
    quantizer.initialise(x * 0.7)  # a range that some values leave
    x.requires_grad_(True)
    upstream = torch.randn_like(x)
    quantizer(x).backward(upstream)
    form = quantizer.integer()
    grid = form.grid
    y, dx, ds, dz = reference(
        x.detach().flatten(), form.step.double().item(), form.zero_point, grid.qmin, grid.qmax, upstream.flatten()
    )
    scale = 1 / (x.numel() * grid.qmax) ** 0.5  # N: features of one image
    torch.testing.assert_close(
        quantizer(x).flatten().double(), torch.tensor(y, dtype=torch.double), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(x.grad.flatten().double(), torch.tensor(dx, dtype=torch.double), rtol=0, atol=0)
    assert quantizer.step.grad.item() == pytest.approx(ds * scale, rel=1e-3, abs=1e-4 * scale)
    if scheme == "affine":
        assert quantizer.zero_point.grad.item() == pytest.approx(dz * scale, rel=1e-4, abs=1e-5 * scale)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_gradients_per_channel(bits):
    torch.manual_seed(0)
    weight = (torch.randn(3, 4, 3, 3) * torch.tensor([0.1, 1.0, 5.0]).reshape(3, 1, 1, 1)).requires_grad_(True)
    quantizer = LSQ(bits, weight_grid(bits), "signed", channels=3)
    quantizer.initialise(weight * 0.83)  # no weight stands exactly on the limit, where float32 and float64 may differ
    upstream = torch.randn_like(weight)
    quantizer(weight).backward(upstream)
    for channel in range(3):
        step = quantizer.current_step()[channel].double().item()
        y, dx, ds, _ = reference(
            weight[channel].detach().flatten(), step, 0, *(-quantizer.grid.qmax, quantizer.grid.qmax),
            upstream[channel].flatten(),
        )  # fmt: skip
        scale = 1 / (weight[channel].numel() * quantizer.grid.qmax) ** 0.5
        torch.testing.assert_close(
            quantizer(weight)[channel].flatten().double(), torch.tensor(y, dtype=torch.double), rtol=1e-6, atol=1e-7
        )
        torch.testing.assert_close(weight.grad[channel].flatten().double(), torch.tensor(dx, dtype=torch.double))
        assert quantizer.step.grad[channel].item() == pytest.approx(ds * scale, rel=1e-3, abs=1e-5)


def test_gradient_is_the_same_in_both_memory_formats():
    torch.manual_seed(1)
    x = torch.randn(2, 5, 7, 6)
    upstream = torch.randn_like(x)
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        quantizer = LSQ(4, activation_grid(4, "affine"), "affine")
        quantizer.initialise(x)
        leaf = x.clone(memory_format=memory_format).requires_grad_(True)
        quantizer(leaf).backward(upstream)  # the gradient's own layout differs from channels_last
        gradients.append((leaf.grad, quantizer.step.grad, quantizer.zero_point.grad))
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheme", ["affine", "unsigned", "signed"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integer_form_reproduces_forward_code_for_code(bits, scheme):
    torch.manual_seed(bits)
    x = torch.nn.functional.silu(torch.randn(4096) * 3)
    quantizer = LSQ(bits, activation_grid(bits, scheme), scheme)
    quantizer.initialise(x)
    quantizer.eval()
    form = quantizer.integer()
    assert form.grid.qmin <= form.zero_point <= form.grid.qmax
    codes = to_codes(x, form.step, form.zero_point, form.grid)
    assert set(codes.tolist()) <= set(range(form.grid.qmin, form.grid.qmax + 1))
    assert torch.equal((codes - form.zero_point) * form.step, quantizer(x))
    assert 0.0 in quantizer(torch.zeros(1)).tolist()  # zero is always a code


def test_step_stays_positive_under_any_update():
    quantizer = LSQ(4, activation_grid(4, "affine"), "affine")
    quantizer.initialise(torch.rand(100))
    for value in (-3.0, -1e-12, 0.0, 1e-30):
        with torch.no_grad():
            quantizer.step.fill_(value)
        assert quantizer.current_step().item() >= SMALLEST_STEP
        assert torch.isfinite(quantizer(torch.randn(10))).all()


def test_half_keeps_float32_to_the_last_digit():
    quantizer = LSQ(4, activation_grid(4, "affine"), "affine")
    with torch.no_grad():
        quantizer.step.fill_(1.2345678e-6)  # not representable in float16
    before = quantizer.step.item()
    quantizer.half()
    assert quantizer.step.dtype is torch.float32 and quantizer.step.item() == before
    assert quantizer.initialised.dtype is torch.bool


def test_autocast_does_not_touch_the_arithmetic():
    torch.manual_seed(0)
    x = torch.randn(1000)
    quantizer = LSQ(8, activation_grid(8, "affine"), "affine")
    quantizer.initialise(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(x), quantizer(x)) and quantizer(x).dtype is torch.float32
    plain = quantizer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(x), plain)


def test_affine_covers_silu_better_than_the_other_schemes():
    """Reference for SiLU(N(0, 1)) at 4 bit: relative squared error 0.010 affine, 0.066 unsigned, 0.026 signed."""
    torch.manual_seed(0)
    x = torch.nn.functional.silu(torch.randn(100_000))
    errors = {}
    for scheme in ("affine", "unsigned", "signed"):
        quantizer = LSQ(4, activation_grid(4, scheme), scheme)
        quantizer.initialise(x)
        errors[scheme] = float((quantizer(x).detach() - x).square().sum() / x.square().sum())
    assert errors["affine"] == pytest.approx(0.0099, rel=0.1)
    assert errors["unsigned"] == pytest.approx(0.066, rel=0.1)
    assert errors["signed"] == pytest.approx(0.0263, rel=0.1)


def test_deepcopy_and_state_dict_keep_everything():
    quantizer = LSQ(3, activation_grid(3, "affine"), "affine")
    quantizer.initialise(torch.randn(500))
    x = torch.randn(100)
    restored = LSQ(3, activation_grid(3, "affine"), "affine")
    restored.load_state_dict(quantizer.state_dict())
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))
    assert torch.equal(restored(x), quantizer(x)) and bool(restored.initialised)


@pytest.mark.parametrize("x", [torch.zeros(0), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])])
def test_ranges_are_not_set_from_nothing_or_from_nan(x):
    with pytest.raises(ValueError, match="cannot set a quantization range"):
        LSQ(4, Grid(0, 15), "affine").initialise(x)


def test_image_grid_returns_every_pixel_value():
    pixels = torch.arange(256).float() / 255
    torch.testing.assert_close(FixedGrid()(pixels), pixels, rtol=0, atol=1e-7)
    assert torch.equal(to_codes(pixels, torch.tensor(1 / 255), 0, Grid(0, 255)), torch.arange(256).float())


# --- the papers' forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_paper_weights_have_the_full_grid_and_its_gradients(bits):
    torch.manual_seed(bits)
    weight = (torch.randn(3, 4, 3, 3) * torch.tensor([0.1, 1.0, 5.0]).reshape(3, 1, 1, 1)).requires_grad_(True)
    quantizer = LSQ.for_weights(bits, 3, PAPER)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert quantizer.grid == Grid(lowest, highest) and LSQ.for_weights(bits, 3, MethodOptions()).grid.qmin == -highest
    quantizer.initialise(weight)
    means = weight.detach().double().abs().mean((1, 2, 3))
    torch.testing.assert_close(quantizer.step.double(), 2 * means / highest**0.5, rtol=1e-5, atol=0)
    with torch.no_grad():  # the paper's start is so wide from 5 bits on that nothing reaches the limits
        quantizer.step.copy_(weight.flatten(1).abs().amax(1) * 0.7 / -lowest)
    upstream = torch.randn_like(weight)
    y = quantizer(weight)
    y.backward(upstream)
    assert (y / quantizer.current_step().reshape(3, 1, 1, 1)).min().round() == lowest  # some are clipped
    for channel in range(3):
        row = weight[channel].detach().flatten()
        step = quantizer.current_step()[channel].double().item()
        values, dx, ds, _ = reference(row, step, 0, lowest, highest, upstream[channel].flatten())
        scale = 1 / (row.numel() * highest) ** 0.5
        torch.testing.assert_close(y[channel].flatten().tolist(), values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weight.grad[channel].flatten().tolist(), dx)
        assert quantizer.step.grad[channel].item() == pytest.approx(ds * scale, rel=1e-3, abs=1e-5)
    form = quantizer.integer()
    assert torch.equal(form.values(form.codes(weight)), y)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_paper_activations_are_unsigned_and_start_from_the_mean_magnitude(bits):
    torch.manual_seed(bits)
    x = torch.nn.functional.silu(torch.randn(2, 3, 16, 16))
    quantizer = LSQ.for_activations(bits, "affine", PAPER)
    quantizer.initialise(x)
    assert quantizer.grid == Grid(0, 2**bits - 1) and quantizer.zero_point is None
    assert quantizer.step.item() == pytest.approx(2 * x.double().abs().mean().item() / (2**bits - 1) ** 0.5, rel=1e-5)
    assert quantizer(x).min() == 0


@pytest.mark.parametrize("options", [MethodOptions(), PAPER])
def test_lsq_plus_is_the_affine_form(options):
    torch.manual_seed(0)
    x = torch.nn.functional.silu(torch.randn(4096))
    quantizer = LSQPlus.for_activations(4, "affine", options)
    quantizer.initialise(x)
    step, zero_point = search_affine_range(x, Grid(0, 15))
    assert quantizer.scheme == "affine" and quantizer.integer().zero_point == zero_point.item() > 0
    assert quantizer.current_step().item() == step.item()


@pytest.mark.parametrize("channels", [3, None])
def test_lsq_plus_paper_weights_start_from_three_deviations(channels):
    torch.manual_seed(0)
    weight = torch.randn(3, 4, 3, 3) * torch.tensor([0.1, 1.0, 5.0]).reshape(3, 1, 1, 1) - 0.3
    quantizer = LSQPlus.for_weights(4, channels, PAPER)
    quantizer.initialise(weight)
    assert quantizer.grid == Grid(-8, 7)
    for row, step in zip(weight.double().reshape(channels or 1, -1), quantizer.current_step(), strict=True):
        mean, deviation = row.mean(), ((row - row.mean()) ** 2).mean() ** 0.5
        expected = max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / 8
        assert step.item() == pytest.approx(expected.item(), rel=1e-5)
    assert LSQPlus.for_weights(4, channels, MethodOptions()).grid == weight_grid(4)


@pytest.mark.parametrize("method", [LSQ, LSQPlus])
@pytest.mark.parametrize("x", [torch.zeros(3, 8), torch.full((3, 8), -2.0), torch.randn(3, 8) * 1e30], ids=str)
def test_degenerate_values_leave_a_usable_state(method, x):
    for options in (MethodOptions(), PAPER):
        for quantizer in (
            method.for_weights(4, 3, options), method.for_weights(4, None, options),
            method.for_activations(4, "affine", options),
        ):  # fmt: skip
            quantizer.initialise(x)
            assert torch.isfinite(quantizer.step).all() and (quantizer.step >= SMALLEST_STEP).all()
            y = quantizer(x)
            assert torch.isfinite(y).all()
            form = quantizer.integer()
            assert torch.equal(form.values(form.codes(x)), y)


def test_names_in_the_registry_and_in_recipes():
    assert QUANTIZERS["lsq"] is LSQ and QUANTIZERS["lsq+"] is LSQPlus
    config = build_config("lsq+", 4)
    assert config.method == "lsq+" and QuantConfig.from_dict(config.to_dict()) == config
    for scheme in ("unsigned", "signed"):
        QuantConfig.from_dict({"method": "lsq", "activation": {"scheme": scheme}})
        with pytest.raises(UserError, match=r"activation\.scheme under method lsq\+: '" + scheme):
            QuantConfig.from_dict({"method": "lsq+", "activation": {"scheme": scheme}})
