"""PACT, SAWB and DoReFa against float64 references written from the papers' equations, value by value."""

import copy
import math

import pytest
import torch
from small_detector import float_detector, images
from torch import nn

from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.layers import QuantConv2d
from quant.lsq import FixedGrid
from quant.pact import (
    DEFAULT_PENALTY,
    PACT,
    PAPER_CLIP,
    SAWB,
    SAWB_COEFFICIENTS,
    DoReFa,
    PACTOptions,
    statistics_aware_clip,
)
from quant.prepare import prepare, quantizers
from quant.primitives import SMALLEST_STEP, activation_grid, to_codes, weight_grid
from quant.quantizer import IntegerForm, Quantizer
from quant.ranges import search_symmetric_step
from quant.recipe import build_config
from quant.registry import QUANTIZERS
from utils.errors import UserError
from utils.optim import QUANTIZER, build_optimizer, parameter_groups

BITS = [2, 3, 4, 5, 6, 8]
SCHEMES = ["affine", "unsigned", "signed"]


def activation(bits=4, scheme="affine", **options) -> PACT:
    return PACT(bits, activation_grid(bits, scheme), scheme, PACTOptions(**options))


def silu(*shape, scale=2.0):
    return nn.functional.silu(torch.randn(*shape) * scale)


def clipped_reference(x, alpha, lower, bits, scheme, upstream):
    """Values and gradients for x, alpha and lower in float64, by the case distinctions of the formulas."""
    if scheme == "affine":
        step = (alpha + lower) / (2**bits - 1)
        smallest = -round(lower / step)  # Python rounds half to even
        largest = 2**bits - 1 + smallest
    else:
        largest = 2**bits - 1 if scheme == "unsigned" else 2 ** (bits - 1) - 1
        smallest = 0 if scheme == "unsigned" else -(2 ** (bits - 1))
        step = alpha / largest
    y, dx, dalpha, dlower = [], [], 0.0, 0.0
    for value, gradient in zip(x.double().flatten().tolist(), upstream.double().flatten().tolist(), strict=True):
        y.append(min(max(round(value / step), smallest), largest) * step)
        above, below = value >= largest * step, value <= smallest * step
        dx.append(0.0 if above or below else gradient)
        dalpha += gradient if above else 0.0
        if below and scheme == "affine":
            dlower -= gradient
        elif below:
            dalpha += gradient * smallest / largest
    return y, dx, dalpha, dlower


def assert_same(actual, expected, rtol=1e-6, atol=1e-7):
    torch.testing.assert_close(
        actual.detach().double().flatten(), torch.tensor(expected, dtype=torch.double).flatten(), rtol=rtol, atol=atol
    )


# --- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_activation_forward_and_gradients(bits, scheme):
    torch.manual_seed(bits)
    quantizer = activation(bits, scheme)
    # A grid with a sign is to be left on both sides, which SiLU's values would not do.
    x = torch.randn(2, 3, 13, 11) * 2 if scheme == "signed" else silu(2, 3, 13, 11)
    quantizer.initialise(x * 0.6)  # ranges that some values leave
    assert scheme != "signed" or (x < quantizer.current_step() * quantizer.grid.qmin).any()
    if scheme == "affine":
        nn.init.constant_(quantizer.lower, 0.21)  # away from a multiple of the step, and SiLU goes below it
    x.requires_grad_(True)
    upstream = torch.randn_like(x)
    y = quantizer(x)
    y.backward(upstream)
    lower = quantizer.lower.item() if scheme == "affine" else 0.0
    expected = clipped_reference(x.detach(), quantizer.alpha.item(), lower, bits, scheme, upstream)
    assert_same(y, expected[0])
    assert_same(x.grad, expected[1], rtol=0, atol=0)
    assert quantizer.alpha.grad.item() == pytest.approx(expected[2], rel=1e-4, abs=1e-5)
    assert abs(expected[2]) > 1e-2  # some values are clipped
    if scheme == "affine":
        assert quantizer.lower.grad.item() == pytest.approx(expected[3], rel=1e-4, abs=1e-5)
        assert abs(expected[3]) > 1e-2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unsigned_form_is_the_papers_equation(bits):
    """Equations 1 to 3, differentiated by autograd in float64 with rounding passed straight through."""
    torch.manual_seed(0)
    quantizer = activation(bits, "unsigned")
    nn.init.constant_(quantizer.alpha, 1.7)
    x = torch.randn(500, requires_grad=True)
    upstream = torch.randn(500)
    y = quantizer(x)
    y.backward(upstream)
    value, alpha = x.detach().double().requires_grad_(True), quantizer.alpha.detach().double().requires_grad_(True)
    clipped = 0.5 * (value.abs() - (value - alpha).abs() + alpha)
    levels = 2**bits - 1
    rounded = torch.round(clipped * levels / alpha) * alpha / levels
    (clipped + (rounded - clipped).detach()).backward(upstream.double())
    assert_same(y, rounded.tolist())
    assert_same(x.grad, value.grad.tolist())
    assert quantizer.alpha.grad.item() == pytest.approx(alpha.grad.item(), rel=1e-5)


def test_alpha_learns_from_values_at_the_clip_and_from_none_below_it():
    quantizer = activation(4, "unsigned")
    nn.init.constant_(quantizer.alpha, 6.0)
    just_below = math.nextafter(6.0, 0.0)
    x = torch.tensor([6.0, 7.0, float(torch.nextafter(torch.tensor(6.0), torch.tensor(0.0))), 5.9, 0.0, -1.0])
    assert just_below < 6.0 and x[2] < 6.0
    x.requires_grad_(True)
    quantizer(x).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4, 1e5]))
    assert quantizer.alpha.grad.item() == 11.0
    assert x.grad.tolist() == [0.0, 0.0, 100.0, 1000.0, 0.0, 0.0]


def test_gradient_is_the_same_in_both_memory_formats():
    torch.manual_seed(1)
    x, upstream = silu(2, 5, 7, 6), torch.randn(2, 5, 7, 6)
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        quantizer = activation()
        quantizer.initialise(x * 0.6)
        leaf = x.clone(memory_format=memory_format).requires_grad_(True)
        quantizer(leaf).backward(upstream)  # the gradient's own layout differs from channels_last
        gradients.append((leaf.grad, quantizer.alpha.grad, quantizer.lower.grad))
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
def test_integer_form_of_activations_reproduces_forward_code_for_code(bits, scheme):
    torch.manual_seed(bits)
    x = silu(4096, scale=3)
    quantizer = activation(bits, scheme)
    quantizer.initialise(x)
    with torch.no_grad():
        quantizer.alpha *= 0.8137
        if scheme == "affine":
            quantizer.lower.add_(0.05)
    quantizer.eval()
    form = quantizer.integer()
    codes = form.codes(x)
    assert form.grid.qmin <= form.zero_point <= form.grid.qmax and isinstance(form.zero_point, int)
    assert set(codes.tolist()) <= set(range(form.grid.qmin, form.grid.qmax + 1))
    assert torch.equal(form.values(codes), quantizer(x))
    assert quantizer(torch.zeros(1)).item() == 0  # zero is always a code
    assert quantizer.current_step().item() == form.step.item()


def test_two_sided_range_of_silu_is_as_good_as_the_searched_one():
    """Relative squared error of SiLU(N(0, 1)) at 4 bit: 0.0099 two-sided, 0.066 as in the paper."""
    torch.manual_seed(0)
    x = silu(100_000, scale=1)
    for scheme, expected in (("affine", 0.0099), ("unsigned", 0.066)):
        quantizer = activation(4, scheme)
        quantizer.initialise(x)
        error = float((quantizer(x).detach() - x).square().sum() / x.square().sum())
        assert error == pytest.approx(expected, rel=0.1)


def test_clips_stay_positive_under_any_update_and_can_come_back():
    quantizer = activation()
    quantizer.initialise(silu(1000))
    for value in (-3.0, -1e-12, 0.0, 1e-30):
        with torch.no_grad():
            quantizer.alpha.fill_(value)
            quantizer.lower.fill_(value)
        upper, lower = quantizer.clips()
        assert upper.item() >= SMALLEST_STEP and lower.item() >= 0 and quantizer.current_step().item() >= SMALLEST_STEP
        x = torch.randn(100) * 10
        quantizer.zero_grad()
        quantizer(x).sub(x).square().sum().backward()
        # More range would lower this loss: a descent step makes both magnitudes grow, from 0 as well.
        assert quantizer.alpha.grad.item() * (1 if value >= 0 else -1) < 0
        assert quantizer.lower.grad.item() * (1 if value >= 0 else -1) < 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "x",
    [torch.zeros(50), torch.full((50,), 3.0), torch.full((50,), -3.0), torch.ones(1), torch.randn(50) * 1e30,
     torch.randn(50) * 1e-30],
    ids=["zeros", "constant", "negative", "one value", "huge", "tiny"],
)  # fmt: skip
def test_degenerate_activations_leave_a_usable_state(x, scheme):
    quantizer = activation(4, scheme)
    quantizer.initialise(x)
    leaf = x.clone().requires_grad_(True)
    y = quantizer(leaf)
    y.backward(torch.full_like(y, 1e-3))
    assert torch.isfinite(y).all() and torch.isfinite(leaf.grad).all() and torch.isfinite(quantizer.alpha.grad).all()
    assert torch.isfinite(quantizer.current_step()).all() and quantizer.current_step().item() > 0
    assert torch.equal(quantizer.integer().values(quantizer.integer().codes(x)), y)


@pytest.mark.parametrize("x", [torch.zeros(0), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])])
def test_ranges_are_not_set_from_nothing_or_from_nan(x):
    for quantizer in (activation(), PACT.for_weights(4, None, PACTOptions())):
        with pytest.raises(ValueError, match="cannot set a quantization range"):
            quantizer.initialise(x)


def test_penalty_is_an_l2_term_on_both_clips():
    quantizer = activation(penalty=0.01)
    with torch.no_grad():
        quantizer.alpha.fill_(3.0)
        quantizer.lower.fill_(-0.5)  # a magnitude: the clip is 0.5
    penalty = quantizer.penalty()
    assert penalty.shape == () and penalty.item() == pytest.approx(0.01 * (9 + 0.25))
    penalty.backward()
    assert quantizer.alpha.grad.item() == pytest.approx(0.06)
    assert quantizer.lower.grad.item() == pytest.approx(-0.01)
    assert activation(scheme="unsigned", penalty=0.5).penalty().item() == pytest.approx(0.5)  # alpha is 1 at first
    assert activation(penalty=0.0).penalty() is None
    assert PACT.for_weights(4, 3, PACTOptions()).penalty() is None


def test_paper_starts_above_the_activations_and_is_unsigned():
    options = PACTOptions(paper=True)
    quantizer = PACT.for_activations(4, "affine", options)
    quantizer.initialise(torch.rand(100))
    assert quantizer.scheme == "unsigned" and quantizer.lower is None
    assert quantizer.alpha.item() == PAPER_CLIP == 10 and quantizer.current_step().item() == pytest.approx(10 / 15)
    two_sided = activation(initial_clip=6.0)
    two_sided.initialise(silu(1000))
    assert two_sided.alpha.item() == 6 and 0.1 < two_sided.lower.item() < 0.4


# --- weights --------------------------------------------------------------------------------------------------------


def test_sawb_coefficients_are_the_least_squares_fit():
    """The fit that the table's comment describes, in float64: alpha* by search, then one linear regression a width."""
    stats = pytest.importorskip("scipy.stats")
    ranks = (torch.arange(16384, dtype=torch.double) + 0.5) / 16384
    families = (stats.norm, stats.logistic, stats.laplace, stats.t(5), stats.uniform(-1, 2))
    samples = [torch.from_numpy(family.ppf(ranks.numpy())) for family in families]
    for bits, (first, second, least) in SAWB_COEFFICIENTS.items():
        ratios, clips = [], []
        for x in samples:
            magnitudes = x[len(x) // 2 :]  # all distributions are symmetric
            root_mean_square = magnitudes.square().mean().sqrt()
            ratios.append(float(magnitudes.mean() / root_mean_square))
            clips.append(best_clip(magnitudes, 2 ** (bits - 1) - 1) / float(root_mean_square))
        design = torch.tensor([[1.0, ratio] for ratio in ratios[:4]], dtype=torch.double)
        target = torch.tensor(clips[:4], dtype=torch.double)
        solution = torch.linalg.lstsq(design, target[:, None]).solution[:, 0].tolist()
        assert [first, second] == pytest.approx(solution, rel=0.04), bits
        for ratio in ratios[:4]:  # the two coefficients are strongly correlated, their clips are not
            assert first + second * ratio == pytest.approx(solution[0] + solution[1] * ratio, rel=0.01), bits
        assert least == pytest.approx(clips[4] if bits <= 3 else clips[0], rel=0.01), bits


def best_clip(magnitudes, largest_code):
    """Clip with the smallest mean squared error on the grid 0 .. largest_code, to about 0.1 %."""
    low, high = 0.02, 1.0
    for _ in range(2):
        shares = torch.linspace(low, high, 60, dtype=torch.double)
        steps = magnitudes.max() * shares[:, None] / largest_code
        errors = ((magnitudes / steps).round().clamp(max=largest_code) * steps - magnitudes).square().mean(1)
        best, spacing = float(shares[errors.argmin()]), (high - low) / 59
        low, high = max(best - 1.5 * spacing, 0.005), min(best + 1.5 * spacing, 1.0)
    return float(magnitudes.max()) * best


def sawb_reference(weight, bits):
    """SAWB of one channel in float64 with Python loops: values and step."""
    values = weight.double().flatten().tolist()
    magnitudes = [abs(value) for value in values]
    root_mean_square = math.sqrt(sum(m * m for m in magnitudes) / len(magnitudes))
    first, second, least = SAWB_COEFFICIENTS[bits]
    clip = first * root_mean_square + second * sum(magnitudes) / len(magnitudes)
    clip = min(max(clip, least * root_mean_square), max(magnitudes))
    limit = 2 ** (bits - 1) - 1
    step = clip / limit
    return [min(max(round(value / step), -limit), limit) * step for value in values], step


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("channels", [3, None])
def test_sawb_forward_and_gradient(bits, channels):
    torch.manual_seed(bits)
    weight = (torch.randn(3, 4, 3, 3) * torch.tensor([0.1, 1.0, 5.0]).reshape(3, 1, 1, 1)).requires_grad_(True)
    quantizer = PACT.for_weights(bits, channels, PACTOptions())
    assert type(quantizer) is SAWB and quantizer.grid == weight_grid(bits)
    quantizer.initialise(weight)
    upstream = torch.randn_like(weight)
    y = quantizer(weight)
    y.backward(upstream)
    rows = weight.detach().reshape(channels or 1, -1)
    for row, quantized, step in zip(rows, y.reshape(channels or 1, -1), quantizer.current_step(), strict=True):
        expected, expected_step = sawb_reference(row, bits)
        assert_same(quantized, expected, rtol=1e-5)
        assert step.item() == pytest.approx(expected_step, rel=1e-5)
    assert torch.equal(weight.grad, upstream)  # straight through, for clipped weights too
    assert not list(quantizer.parameters())


@pytest.mark.parametrize("bits", BITS)
def test_sawb_is_nearly_as_good_as_a_search(bits):
    torch.manual_seed(0)
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((64, 288))
    for rows, worst in ((torch.randn(64, 288), 1.12), (laplace, 1.12), (torch.randn(64, 16), 1.2)):
        errors = []
        clip = statistics_aware_clip(rows, bits, 64)
        for step in (clip / weight_grid(bits).qmax, search_symmetric_step(rows, weight_grid(bits), 64)):
            quantized = to_codes(rows, step[:, None], 0, weight_grid(bits)) * step[:, None]
            errors.append(float((quantized - rows).square().sum()))
        assert errors[0] < worst * errors[1]


def dorefa_reference(weight, bits, upstream):
    """DoReFa of one channel in float64: equation 9 by autograd with constant maximum and scale; values, gradient."""
    w = weight.detach().double().requires_grad_(True)
    largest = torch.tanh(w).abs().max().detach()
    normalised = torch.tanh(w) / (2 * largest) + 0.5
    levels = 2**bits - 1
    rounded = torch.round(normalised * levels) / levels
    unit = 2 * (normalised + (rounded - normalised).detach()) - 1
    scale = (w * unit).sum().detach() / unit.square().sum().detach()
    (unit * scale).backward(upstream.double())
    return (unit * scale).tolist(), w.grad.tolist(), float(scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("channels", [3, None])
def test_dorefa_forward_and_gradient(bits, channels):
    torch.manual_seed(bits)
    weight = (torch.randn(3, 4, 3, 3) * torch.tensor([0.05, 0.5, 1.5]).reshape(3, 1, 1, 1)).requires_grad_(True)
    quantizer = PACT.for_weights(bits, channels, PACTOptions(weights="dorefa"))
    quantizer.initialise(weight)
    upstream = torch.randn_like(weight)
    y = quantizer(weight)
    y.backward(upstream)
    split = [tensor.detach().reshape(channels or 1, -1) for tensor in (weight, y, weight.grad, upstream)]
    for row, quantized, gradient, up in zip(*split, strict=True):
        values, expected_gradient, scale = dorefa_reference(row, bits, up)
        assert_same(quantized, values, rtol=1e-5)
        assert_same(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
        assert quantized.abs().min().item() > scale / (2**bits - 1) * 0.9999  # no zero
    assert torch.unique(y[1]).numel() <= 2**bits


def test_dorefa_keeps_the_scale_of_the_weights():
    """Before a layer without batch norm a factor of 20 would be an error of 20; DoReFa's own output is in -1 .. 1."""
    torch.manual_seed(0)
    weight = torch.randn(8, 16, 3, 3) * 0.05
    for bits in (2, 3, 4, 7):
        quantizer = PACT.for_weights(bits, 8, PACTOptions(weights="dorefa"))
        y = quantizer(weight)
        slope = (y * weight).flatten(1).sum(1) / y.square().flatten(1).sum(1)
        torch.testing.assert_close(slope, torch.ones(8), rtol=1e-5, atol=1e-5)  # no better factor exists
        assert (
            float((y - weight).square().mean() / weight.square().mean())
            < (0.45, 0.12, 0.04, 0.001)[(2, 3, 4, 7).index(bits)]
        )


@pytest.mark.parametrize("weights", ["sawb", "dorefa"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_integer_form_of_weights_reproduces_forward_code_for_code(bits, weights):
    torch.manual_seed(bits)
    weight = torch.randn(6, 5, 3, 3) * torch.logspace(-3, 1, 6).reshape(6, 1, 1, 1)
    quantizer = PACT.for_weights(bits, 6, PACTOptions(weights=weights)).eval()
    quantizer.initialise(weight * 7)
    y = quantizer(weight)
    form = quantizer.integer()
    codes = form.codes(weight)
    assert isinstance(form, IntegerForm) and torch.equal(form.values(codes), y)
    assert codes.abs().max() == form.grid.qmax and form.grid.qmin == -form.grid.qmax
    half_levels = weights == "dorefa" and bits <= 7
    assert form.odd == half_levels and form.grid.qmax == (2**bits - 1 if half_levels else 2 ** (bits - 1) - 1)
    if half_levels:
        assert (codes % 2 == 1).all()
    assert form.grid.qmax <= 127  # int8


@pytest.mark.parametrize("weights", ["sawb", "dorefa"])
def test_step_follows_the_weights(weights):
    torch.manual_seed(0)
    weight = torch.randn(4, 50) * 0.002  # small enough for tanh to be the identity
    quantizer = PACT.for_weights(4, 4, PACTOptions(weights=weights))
    quantizer.initialise(weight)
    before, y = quantizer.current_step().clone(), quantizer(weight)
    tripled = quantizer(weight * 3)
    torch.testing.assert_close(quantizer.integer().step, before * 3, rtol=1e-3, atol=0)
    torch.testing.assert_close(tripled, y * 3, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("weights", ["sawb", "dorefa"])
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 8), torch.full((3, 8), 0.4), torch.full((3, 8), -0.4), torch.ones(3, 1), torch.randn(3, 8) * 1e30,
     torch.randn(3, 8) * 1e-30, torch.randn(1, 8)],
    ids=["zeros", "constant", "negative", "one weight", "huge", "tiny", "one channel"],
)  # fmt: skip
def test_degenerate_weights_leave_a_usable_state(weight, weights):
    for channels in (len(weight), None):
        quantizer = PACT.for_weights(4, channels, PACTOptions(weights=weights))
        quantizer.initialise(weight)
        leaf = weight.clone().requires_grad_(True)
        y = quantizer(leaf)
        y.backward(torch.ones_like(y))
        assert torch.isfinite(y).all() and torch.isfinite(leaf.grad).all()
        assert torch.isfinite(quantizer.current_step()).all() and (quantizer.current_step() >= SMALLEST_STEP).all()
        assert torch.equal(quantizer.integer().values(quantizer.integer().codes(weight)), y)
        if weight.abs().max() == weight.abs().min():
            torch.testing.assert_close(y, weight, rtol=1e-6, atol=2e-6)  # one magnitude is a level


def test_method_of_the_weights():
    assert type(PACT.for_weights(4, None, PACTOptions())) is SAWB
    assert type(PACT.for_weights(4, None, PACTOptions(paper=True))) is DoReFa
    assert type(PACT.for_weights(4, None, PACTOptions(paper=True, weights="sawb"))) is SAWB
    assert type(PACT.for_weights(8, None, PACTOptions(paper=True))) is SAWB  # 255 levels of odd codes leave int8


# --- state ----------------------------------------------------------------------------------------------------------


def every_quantizer():
    torch.manual_seed(3)
    x, weight = silu(500), torch.randn(3, 50) * 1e-3
    return [(activation(3, scheme), x) for scheme in SCHEMES] + [
        (PACT.for_weights(3, 3, PACTOptions(weights=name)), weight) for name in ("sawb", "dorefa")
    ]


def test_deepcopy_and_state_dict_keep_everything():
    for (quantizer, x), (restored, _) in zip(every_quantizer(), every_quantizer(), strict=True):
        quantizer.initialise(x)
        restored.load_state_dict(quantizer.state_dict())
        duplicate = copy.deepcopy(quantizer)
        for other in (restored, duplicate):
            assert bool(other.initialised) and torch.equal(other.current_step(), quantizer.current_step())
            form = other.integer()
            assert torch.equal(form.values(form.codes(x)), quantizer(x))
        assert {name: tuple(value.shape) for name, value in quantizer.state_dict().items()} == {
            name: tuple(value.shape) for name, value in restored.state_dict().items()
        }


def test_half_keeps_float32():
    for quantizer, x in every_quantizer():
        quantizer.initialise(x * 1e-4)
        before = quantizer.current_step().clone()
        quantizer.half()
        assert all(
            value.dtype is torch.float32 for name, value in quantizer.state_dict().items() if name != "initialised"
        )
        assert torch.equal(quantizer.current_step(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_inputs(dtype):
    for quantizer, x in every_quantizer():
        quantizer.initialise(x)
        plain = quantizer(x)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(quantizer(x), plain) and quantizer(x).dtype is torch.float32
            short = x.to(dtype).requires_grad_(True)
            y = quantizer(short)
        assert torch.equal(y, quantizer(short.detach().float()).to(dtype))
        y.backward(torch.ones_like(y))
        assert short.grad.dtype is dtype and torch.isfinite(short.grad).all()


# --- in a network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": "lsq"}, "weights: 'lsq' is not possible; choose one of auto, sawb, dorefa"),
        ({"penalty": -1}, "penalty: -1 is not a number from 0 on"),
        ({"penalty": "much"}, "not a number"),
        ({"initial_clip": True}, "initial_clip: True is not a number"),
        ({"penalty": math.inf}, "penalty: inf is not a number"),
        ({"clip": 3}, "unknown key 'options.clip'"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(UserError, match=message):
        QuantConfig.from_dict({"method": "pact", "options": options})


def test_options_of_a_recipe():
    def options(**values):
        return QuantConfig.from_dict({"method": "pact", "options": values}).method_options()

    assert options().penalty_factor() == DEFAULT_PENALTY == 1e-6 and options(paper=True).penalty_factor() == 2e-4
    assert options(paper=True, penalty=0).penalty_factor() == 0
    assert options(penalty="1e-3").penalty_factor() == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert (options().weight_method(), options(paper=True).weight_method()) == ("sawb", "dorefa")


def quantized(options=None, method="pact"):
    """Three convolutions, prepared and calibrated; the first is 8 bit, the others 4."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 3, 1)]
    config = build_config(method, 4)
    config.options = options or {}
    model = prepare(nn.Sequential(*layers), config, images(1))
    calibrate(model, [images(4)])
    return model


def train(model, steps=20):
    """Learns to blur an image, penalties included; returns the losses."""
    pixels = images(4)
    target = nn.functional.avg_pool2d(pixels, 3, stride=1, padding=1)
    optimizer = build_optimizer(model.train(), "SGD", lr=0.02)
    losses = []
    for _ in range(steps):
        loss = (model(pixels) - target).square().mean()
        penalties = [penalty for q in quantizers(model).values() if (penalty := q.penalty()) is not None]
        optimizer.zero_grad()
        (loss + sum(penalties)).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method, options", [("pact", {}), ("pact", {"paper": True}), ("pact", {"weights": "dorefa"})])
def test_trains_in_a_network_and_its_integer_form_follows(method, options):
    model = quantized(options, method)
    before = {name: q.current_step().clone() for name, q in quantizers(model).items()}
    losses = train(model)
    assert losses[-1] < 0.3 * losses[0]
    after = quantizers(model)
    moved = {name for name in before if not torch.equal(before[name], after[name].current_step())}
    assert len(before) == 6 and moved == set(before) - {"0.input_quantizer"}  # all but the image's
    model.eval()(images(1))
    for module in model.modules():
        if isinstance(module, QuantConv2d):
            form = module.weight_quantizer.integer()
            assert torch.equal(form.values(form.codes(module.weight)), module.weight_quantizer(module.weight))


def test_prepared_detector_has_the_methods_quantizers():
    config = QuantConfig.from_dict({"method": "pact", "options": {"penalty": 0.25, "weights": "dorefa"}})
    model = prepare(float_detector(), config)
    calibrate(model, [images(2)])
    kinds = {type(q) for q in quantizers(model).values()}
    assert kinds == {PACT, SAWB, DoReFa, FixedGrid}  # SAWB: the 8-bit layers
    assert all(q.decay == 0.25 for q in quantizers(model).values() if isinstance(q, PACT))
    assert all(torch.isfinite(output).all() for output in model.train()(images(2)))


def test_optimizer_decays_no_clip():
    model = quantized()
    clips = {id(p) for q in quantizers(model).values() for p in q.parameters()}
    groups = parameter_groups(model)
    assert clips and clips == {id(parameter) for parameter in groups[QUANTIZER]}
    decays = [group["weight_decay"] for group in build_optimizer(model, weight_decay=0.5).param_groups]
    assert decays[QUANTIZER] == 0 and max(decays) == 0.5


def test_calibration_names_the_layer_whose_values_are_not_finite():
    model = prepare(float_detector(), build_config("pact", 4))
    model.model[1].conv.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.1\.conv\.weight: cannot set a quantization range"):
        calibrate(model, [images(1)])


class AverageMagnitude(Quantizer):
    """A new method, whole: the step is twice the mean magnitude over sqrt(qmax), and does not learn."""

    def __init__(self, bits, grid, scheme, channels=None):
        super().__init__(bits, grid, scheme, channels)
        self.register_buffer("step", torch.ones(channels or 1))

    def set_range(self, x):
        self.step.copy_(2 * x.reshape(self.channels or 1, -1).abs().mean(1) / self.grid.qmax**0.5 + 1e-6)

    def quantize(self, x):
        return x + (self.integer().values(self.integer().codes(x)) - x).detach()

    def current_step(self):
        return self.step

    def integer(self):
        return IntegerForm(self.step.clone(), 0, self.grid)


def test_a_new_method_is_one_class_and_one_registry_line(monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "average", AverageMagnitude)
    model = quantized(method="average")
    used = [q for q in quantizers(model).values() if isinstance(q, AverageMagnitude)]
    assert len(used) == 5 and all(bool(q.initialised) for q in used)  # the sixth is the image's
    losses = train(model)
    assert losses[-1] < 0.3 * losses[0]
    monkeypatch.undo()
    with pytest.raises(UserError, match="--quant average: it takes lsq"):
        build_config("average", 4)
