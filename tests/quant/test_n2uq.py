"""N2UQ against float64 references written from the paper: the ramp by autograd, segment by segment."""

import copy
import math

import pytest
import torch
from small_detector import float_detector, images

from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.lsq import LSQ
from quant.n2uq import N2UQ, SMALLEST_WIDTH, EntropyWeights, N2UQOptions
from quant.prepare import prepare, quantizers
from quant.primitives import SMALLEST_STEP, activation_grid
from utils.ema import ModelEMA
from utils.errors import UserError

ALL_BITS = [2, 3, 4, 5, 6, 8]
SCHEMES = ["affine", "unsigned", "signed"]
NAMES = ("output_scale", "input_scale", "start", "widths")


def silu(*shape, seed=0, spread=2.0):
    return torch.nn.functional.silu(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread)


def trained(bits, scheme, seed=0, paper=False):
    """A quantizer whose every parameter has left its first value."""
    torch.manual_seed(seed)
    quantizer = N2UQ(bits, activation_grid(bits, scheme), scheme, paper=paper)
    quantizer.initialise(silu(4096, seed=seed))
    with torch.no_grad():
        quantizer.output_scale.mul_(1.13)
        quantizer.input_scale.mul_(-0.91)  # the magnitude counts
        quantizer.start.add_(0.37)
        quantizer.widths.mul_(torch.rand_like(quantizer.widths) * 1.7 + 0.1)
    return quantizer


def reference(quantizer, x, upstream):
    """y, dL/dx and the unscaled gradients of the parameters, in float64 with a loop over the segments.

    Returns also the ramp's edges and thresholds in x.
    """
    p = {name: getattr(quantizer, name).detach().double().requires_grad_() for name in NAMES}
    unit, zero_point = quantizer.unit.double(), quantizer.zero_point.double()
    x = x.detach().double().requires_grad_()
    step, scale = p["output_scale"].abs() * unit, p["input_scale"].abs() / unit
    left, ramp, passed = p["start"], 0, 0
    edges, thresholds = [left / scale], []
    for width in p["widths"].abs() + quantizer.smallest_width:
        ramp = ramp + ((x * scale - left) / width).clamp(0, 1)
        thresholds.append((left + width / 2) / scale)
        passed = passed + (x.detach() >= thresholds[-1].detach())
        left = left + width
        edges.append(left / scale)
    soft = ramp - ramp.detach()
    y = step * (passed + soft + quantizer.grid.qmin - zero_point)
    y.backward(upstream.double())
    gradients = {name: value.grad for name, value in p.items()}
    return y.detach(), x.grad, gradients, torch.cat(edges).detach(), torch.cat(thresholds).detach()


def cell_width(quantizer, edges):
    """The power of two above the ramp's length over its number of cells."""
    cells = max(4096, 64 * 2**quantizer.bits) - 4
    return 2.0 ** (math.floor(math.log2(float(edges[-1] - edges[0]) / cells)) + 1)


def factors(quantizer, x):
    lsq = 1 / math.sqrt(x[0].numel() * quantizer.grid.qmax) / quantizer.unit.item() ** 2
    return {name: lsq * (1.0 if name == "output_scale" else 0.1) for name in NAMES}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_forward_and_all_gradients(bits, scheme):
    quantizer = trained(bits, scheme, seed=bits)
    *_, edges, thresholds = reference(quantizer, torch.zeros(1), torch.zeros(1))
    low, high = edges[0].item(), edges[-1].item()
    x = torch.empty(3, 5, 13, 11).uniform_(low - 0.1 * (high - low), high + 0.1 * (high - low))
    cell = cell_width(quantizer, edges)
    x = (torch.floor(x / cell) + 0.5) * cell  # the centres, where the gradients are exact
    # In the cell of an edge or threshold float32 and float64 may take different sides: those values stand outside.
    marks = torch.cat([edges, thresholds])
    near = (x.double().unsqueeze(-1) - marks).abs().amin(-1) < cell
    x[near] = edges[0].float() - 1
    x.requires_grad_(True)
    upstream = torch.randn_like(x)
    y = quantizer(x)
    y.backward(upstream)
    y_reference, dx, gradients, *_ = reference(quantizer, x, upstream)
    torch.testing.assert_close(y.double(), y_reference, rtol=1e-6, atol=1e-7)
    assert len(y.unique()) > 0.9 * 2**bits
    torch.testing.assert_close(x.grad.double(), dx, rtol=1e-5, atol=1e-7)
    assert dx.count_nonzero() > 0.5 * dx.numel()
    for name, factor in factors(quantizer, x).items():
        expected = gradients[name] * factor
        tolerance = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(getattr(quantizer, name).grad.double(), expected, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_gradients_of_values_anywhere_are_within_a_cell(bits):
    quantizer = trained(bits, "affine", seed=bits)
    x = silu(2, 4, 40, 40, seed=bits).requires_grad_(True)
    upstream = torch.rand_like(x)  # of one sign: the sums must not cancel down to their errors
    quantizer(x).backward(upstream)
    _, dx, gradients, edges, thresholds = reference(quantizer, x, upstream)
    cell = cell_width(quantizer, edges)
    far = (x.detach().double().unsqueeze(-1) - edges).abs().amin(-1) > cell
    torch.testing.assert_close(x.grad.double()[far], dx[far], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(quantizer.integer().thresholds.double(), thresholds, rtol=0, atol=0.51 * cell)
    for name, factor in factors(quantizer, x).items():
        error = getattr(quantizer, name).grad.double() - gradients[name] * factor
        assert error.norm() < 0.02 * (gradients[name] * factor).norm()


def test_gradients_are_the_same_in_every_memory_layout():
    x = silu(2, 6, 7, 5)
    upstream = torch.randn_like(x)
    layouts = [
        x.clone(),
        x.clone(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),  # dense, but neither of the two usual orders
        x.repeat(1, 1, 1, 2)[..., :5],
    ]
    results = []
    for layout in layouts:
        quantizer = trained(4, "affine")
        leaf = layout.detach().requires_grad_(True)
        assert torch.equal(leaf, x)
        y = quantizer(leaf)
        y.backward(upstream)
        results.append([y, leaf.grad, *(getattr(quantizer, name).grad for name in NAMES)])
    for result in results[1:]:
        for left, right in zip(results[0], result, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_more_values_than_one_chunk_and_a_gradient_of_one_number():
    quantizer = trained(4, "affine")
    x = silu(2, 3, 211, 203).requires_grad_(True)  # 256,998 values, an odd remainder
    y = quantizer(x)
    y.sum().backward()  # an expanded gradient: stride 0
    y_reference, _, gradients, *_ = reference(quantizer, x, torch.ones_like(x))
    assert ((y.double() - y_reference).abs() > 1e-5).float().mean() < 2e-3  # within half a cell of a threshold
    for name, factor in factors(quantizer, x).items():
        torch.testing.assert_close(
            getattr(quantizer, name).grad.double(), gradients[name] * factor, rtol=0.03, atol=1e-3
        )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_integer_form_reproduces_forward_code_for_code(bits, scheme):
    for seed in range(4):
        quantizer = trained(bits, scheme, seed=seed).eval()
        form = quantizer.integer()
        assert form.thresholds.shape == (2**bits - 1,) and form.thresholds.dtype is torch.float32
        assert form.grid.qmin <= form.zero_point <= form.grid.qmax
        up = torch.nextafter(form.thresholds, torch.full_like(form.thresholds, torch.inf))
        down = torch.nextafter(form.thresholds, torch.full_like(form.thresholds, -torch.inf))
        extremes = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e38, -1e38, torch.inf, -torch.inf])
        x = torch.cat([silu(8192, seed=seed + 9), form.thresholds, up, down, extremes])
        codes = form.codes(x)
        assert set(codes.tolist()) <= set(range(form.grid.qmin, form.grid.qmax + 1))
        assert torch.equal(form.values(codes), quantizer(x))
        # Every single threshold is exact: the code changes from one float32 to the next.
        assert bool((form.codes(form.thresholds) > form.codes(down)).all())


def test_codes_count_exactly_the_thresholds_passed():
    quantizer = trained(3, "affine").eval()
    form = quantizer.integer()
    step, zero_point = form.step.item(), form.zero_point
    for value in silu(300, seed=5).tolist():
        passed = sum(value >= threshold for threshold in form.thresholds.tolist())
        assert quantizer(torch.tensor([value])).item() == pytest.approx((passed - zero_point) * step, rel=1e-6)


def test_not_a_number_stays_visible():
    y = trained(4, "affine")(torch.tensor([1.0, float("nan"), 0.5]))
    assert y.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_thresholds_rise_whatever_the_optimizer_does(bits, seed):
    quantizer = trained(bits, "affine")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            sizes = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 30.0, 1e30])[torch.randint(6, parameter.shape)]
            parameter.copy_(torch.randn_like(parameter) * sizes)
    form = quantizer.integer()
    assert torch.isfinite(form.thresholds).all() and (form.thresholds.diff() >= 0).all()
    assert form.step.item() >= SMALLEST_STEP
    x = torch.cat([silu(1000), form.thresholds]).requires_grad_(True)
    y = quantizer(x)
    assert torch.equal(form.values(form.codes(x.detach())), y)
    y.sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (x, *quantizer.parameters()))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 3, 4, 4), torch.full((64,), 0.7), torch.full((64,), -0.2), torch.tensor([3.0]), silu(64) * 1e30,
     silu(64) * 1e-30, torch.randn(2, 1, 5, 5)],
    ids=["zero", "constant", "negative", "one value", "huge", "tiny", "one channel"],
)  # fmt: skip
def test_degenerate_ranges_are_usable(bits, scheme, x):
    quantizer = N2UQ(bits, activation_grid(bits, scheme), scheme)
    quantizer.initialise(x)
    leaf = x.clone().requires_grad_(True)
    y = quantizer(leaf)
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(leaf.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in quantizer.parameters())
    form = quantizer.integer()
    assert torch.isfinite(form.thresholds).all() and torch.equal(form.values(form.codes(x)), y)
    if scheme == "affine":
        assert (y - x).abs().max() <= 1.01 * x.abs().max()


@pytest.mark.parametrize("x", [torch.zeros(0), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])])
def test_ranges_are_not_set_from_nothing_or_from_nan(x):
    for quantizer in (N2UQ(4, activation_grid(4, "affine"), "affine"), N2UQ.for_weights(4, None, N2UQOptions())):
        with pytest.raises(ValueError, match="cannot set a quantization range"):
            quantizer.initialise(x)


def test_an_empty_batch_passes():
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    y = trained(4, "affine")(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_the_arithmetic(dtype):
    quantizer = trained(4, "affine")
    x = silu(2, 3, 8, 8).to(dtype).requires_grad_(True)
    plain = quantizer(x.detach().float())
    with torch.autocast("cpu", dtype=dtype):
        y = quantizer(x)
    assert y.dtype is dtype and torch.equal(y, plain.to(dtype))
    y.backward(torch.ones_like(y))
    assert x.grad.dtype is dtype and torch.isfinite(x.grad).all() and x.grad.count_nonzero() > 0
    assert all(parameter.grad.dtype is torch.float32 for parameter in quantizer.parameters())


def test_half_deepcopy_and_state_dict_keep_everything():
    quantizer = trained(3, "affine")
    with torch.no_grad():
        quantizer.unit.fill_(0.12345678)  # not representable in float16
    x = silu(500, seed=3)
    expected = quantizer(x)
    restored = N2UQ(3, activation_grid(3, "affine"), "affine")
    restored.load_state_dict(quantizer.state_dict())
    assert bool(restored.initialised)
    for other in (copy.deepcopy(quantizer), restored, copy.deepcopy(quantizer).half()):
        assert torch.equal(other(x), expected)
        assert all(t.dtype is torch.float32 for t in other.state_dict().values() if t.is_floating_point())


def test_the_average_keeps_the_calibrated_constants():
    quantizer = trained(4, "affine")
    average = ModelEMA(torch.nn.Sequential(copy.deepcopy(quantizer)), decay=0.9)
    with torch.no_grad():
        quantizer.unit.mul_(3)
        quantizer.zero_point.add_(1)
    average.update(torch.nn.Sequential(quantizer))
    assert torch.equal(average.ema[0].unit, quantizer.unit)
    assert torch.equal(average.ema[0].zero_point, quantizer.zero_point)


def test_memory_is_half_an_activation_copy():
    quantizer = trained(4, "affine")
    x = silu(4, 16, 40, 40).requires_grad_(True)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quantizer(x)
    tables = 3 * 4096 * 4
    assert max(saved.values()) == x.numel() * 2
    assert sum(saved.values()) <= x.numel() * 2 + tables


def test_first_range_is_the_uniform_grid_of_smallest_error():
    """SiLU(N(0, 1)) at 4 bit: relative squared error 0.010 affine, 0.066 unsigned, as LSQ's first range."""
    x = silu(50_000, spread=1.0)
    for scheme, expected in (("affine", 0.0099), ("unsigned", 0.066), ("signed", 0.0263)):
        quantizer = N2UQ(4, activation_grid(4, scheme), scheme)
        quantizer.initialise(x)
        error = (quantizer(x) - x).detach().square().sum() / x.square().sum()
        assert float(error) == pytest.approx(expected, rel=0.1)
        uniform = LSQ(4, activation_grid(4, scheme), scheme)
        uniform.initialise(x)
        assert (quantizer(x) != uniform(x)).float().mean() < 0.01  # thresholds stand on cell borders
    assert quantizer.start.item() == quantizer.grid.qmin == -8


def test_paper_form_is_the_papers():
    options = N2UQOptions(paper=True)
    quantizer = N2UQ.for_activations(3, "affine", options)
    quantizer.initialise(silu(1000) * 50)  # not looked at
    assert quantizer.scheme == "unsigned" and quantizer.zero_point.item() == 0
    levels = torch.arange(8) * (2 / 7)
    assert torch.allclose(quantizer(torch.linspace(-1, 3, 1001)).unique(), levels)
    thresholds = levels[:-1] + 1 / 7
    torch.testing.assert_close(quantizer.integer().thresholds, thresholds, rtol=0, atol=2 / 2000)
    assert quantizer.smallest_width * 2 / 7 == pytest.approx(1e-3)
    assert N2UQ.for_weights(4, 8, options).integer().odd


def test_training_moves_thresholds_towards_the_target():
    """A staircase that ought to be a square root: the loss falls far below the uniform grid's."""
    x = torch.rand(1, 4096, generator=torch.Generator().manual_seed(0))
    target = x.sqrt()
    quantizer = N2UQ(3, activation_grid(3, "unsigned"), "unsigned")
    quantizer.initialise(x)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.03)
    losses = []
    for _ in range(100):
        loss = (quantizer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    widths = quantizer.integer().thresholds.diff()
    assert widths[-1] > 3 * widths[0]  # the inverse of the square root is flat at 0


# --- weights ---------------------------------------------------------------------------------------------------------


def weight_reference(row, bits, half):
    """Quantized weights of one channel by the paper's formula, in Python floats; ``half`` has 2**bits levels."""
    mean = sum(abs(w) for w in row) / len(row)
    factor = mean * (2**bits - 1) / 2 ** (bits - 1)
    quantized, inside = [], []
    for w in row:
        clipped = min(max(w / factor, -1.0), 1.0)
        if half:
            level = round((clipped + 1) / 2 * (2**bits - 1)) * 2 / (2**bits - 1) - 1
        else:
            level = round(clipped * (2 ** (bits - 1) - 1)) / (2 ** (bits - 1) - 1)
        quantized.append(level * factor)
        inside.append(abs(w) < factor)
    return quantized, inside


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_follow_the_papers_scaling(bits, half):
    torch.manual_seed(bits)
    scales = torch.tensor([0.1, 1.0, 5.0]).reshape(3, 1, 1, 1)
    weight = (torch.randn(3, 40, 3, 3) * scales).requires_grad_(True)
    quantizer = N2UQ.for_weights(bits, 3, N2UQOptions(weights="half" if half else "symmetric", clip="entropy"))
    quantizer.initialise(weight)
    upstream = torch.randn_like(weight)
    y = quantizer(weight)
    y.backward(upstream)
    for channel in range(3):
        expected, inside = weight_reference(weight[channel].flatten().double().tolist(), bits, half)
        torch.testing.assert_close(y[channel].flatten().double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
        mask = torch.tensor(inside).reshape(40, 3, 3)
        assert torch.equal(weight.grad[channel], upstream[channel] * mask) and not mask.all()
        assert len(y[channel].unique()) == (2**bits if half else 2**bits - 1)
    assert (0.0 in y) is not half


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_searched_clip_has_the_smallest_error_and_the_papers_has_not(bits):
    weight = torch.randn(3, 400, generator=torch.Generator().manual_seed(bits))

    def error(clip):
        quantizer = N2UQ.for_weights(bits, 3, N2UQOptions(clip=clip))
        quantizer.initialise(weight)
        return (quantizer.eval()(weight) - weight).square().sum(1)

    best = torch.full((3,), torch.inf)
    for share in torch.linspace(0.05, 1, 400):
        step = (share * weight.abs().amax(1) / (2 ** (bits - 1) - 1)).reshape(3, 1)
        limit = 2 ** (bits - 1) - 1
        best = best.minimum(((weight / step).round().clamp(-limit, limit) * step - weight).square().sum(1))
    torch.testing.assert_close(error("auto"), best, rtol=0.01, atol=0)
    assert (
        torch.equal(error("auto"), error("searched")) and (error("entropy") > (1.0 if bits == 2 else 1.05) * best).all()
    )
    paper = N2UQ.for_weights(bits, 3, N2UQOptions(paper=True))
    assert not paper.searched and paper.half_levels


@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("options", [N2UQOptions(), N2UQOptions(weights="half"), N2UQOptions(paper=True)])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_weights_integer_form_is_the_eval_forward(bits, options, channels):
    torch.manual_seed(bits)
    weight = torch.randn(6, 4, 3, 3) * 0.2
    weight[2] = 0
    quantizer = N2UQ.for_weights(bits, channels, options)
    quantizer.initialise(weight)
    quantizer(weight * 1.3)  # a training step: the step follows
    quantizer.eval()
    form = quantizer.integer()
    assert form.odd is (bits < 8 and (options.paper or options.weights == "half"))
    assert torch.equal(form.values(form.codes(weight)), quantizer(weight))
    assert torch.isfinite(quantizer(weight)).all() and (form.step >= SMALLEST_STEP).all()
    if channels:
        ratio = quantizer.current_step()[0] / N2UQ.for_weights(bits, channels, options).current_step()[0]
        assert ratio > 0


def test_step_of_weights_follows_in_training_and_rests_in_eval():
    weight = torch.randn(2, 3, 3, 3)
    quantizer = N2UQ.for_weights(4, 2, N2UQOptions())
    quantizer.initialise(weight)
    first = quantizer.current_step().clone()
    quantizer.eval()(weight * 2)
    assert torch.equal(quantizer.current_step(), first)
    quantizer.train()(weight * 2)
    torch.testing.assert_close(quantizer.current_step(), first * 2)
    pair = quantizer(weight.requires_grad_(True)) + quantizer(weight * 3)
    pair.sum().backward()  # the second call must not spoil what the first one saved


@pytest.mark.parametrize("bits, decibel", [(5, 24), (6, 29), (8, 40)])
def test_weights_above_4_bits_are_not_clipped_at_the_papers_ratio(bits, decibel):
    """At 8 bits the paper's ratio would give 13.4 dB for Gaussian weights."""
    torch.manual_seed(0)
    weight = torch.randn(4, 64, 3, 3)
    quantizer = N2UQ.for_weights(bits, 4, N2UQOptions())
    quantizer.initialise(weight)
    error = (quantizer(weight) - weight).square().sum()
    assert 10 * torch.log10(weight.square().sum() / error) > decibel


@pytest.mark.parametrize("scale", [0.0, 1e30, 1e-30])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_degenerate_weights(bits, scale):
    quantizer = N2UQ.for_weights(bits, 3, N2UQOptions())
    weight = torch.randn(3, 2, 1, 1) * scale
    quantizer.initialise(weight)
    assert torch.isfinite(quantizer(weight)).all() and torch.isfinite(quantizer.current_step()).all()


# --- in a network -----------------------------------------------------------------------------------------------------


def test_options_are_checked():
    config = QuantConfig.from_dict({"method": "n2uq", "options": {"weights": "half"}})
    assert config.method_options().weights == "half"
    with pytest.raises(UserError, match="choose symmetric or half"):
        QuantConfig.from_dict({"method": "n2uq", "options": {"weights": "full"}})


def raw_outputs(model):
    """Training mode for Detect's raw maps, but with the batch norms' running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


@pytest.mark.parametrize("options", [{}, {"weights": "half"}])
def test_a_small_detector_trains(options):
    batch = images(2, seed=3)
    with torch.no_grad():
        target = raw_outputs(float_detector())(batch)
    model = float_detector()
    prepare(model, QuantConfig.from_dict({"method": "n2uq", "options": options}))
    calibrate(model, [batch])
    raw_outputs(model)
    found = [q for q in quantizers(model).values() if isinstance(q, N2UQ)]
    assert found and any(isinstance(q, EntropyWeights) for q in quantizers(model).values())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    losses = []
    for _ in range(24):
        loss = sum((a - b).square().mean() for a, b in zip(model(batch), target, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    for quantizer in found:
        assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in quantizer.parameters())
        widths = quantizer.widths.abs() + SMALLEST_WIDTH
        assert widths.max() - widths.min() > 1e-3
    model.eval()
    x = silu(2000)
    for quantizer in found:
        quantizer.inverse_equalizer = None  # any values
        form = quantizer.integer()
        assert torch.equal(form.values(form.codes(x)), quantizer(x))
