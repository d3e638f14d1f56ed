"""DSQ against a float64 reference: autograd through the paper's equations, with sgn straight through."""

import copy
import math

import pytest
import torch
from small_detector import float_detector, images

import quant.blocks
from quant.calibrate import calibrate
from quant.dsq import ALPHA_LIMITS, DSQ, SLOPE, DSQOptions
from quant.prepare import prepare
from quant.primitives import SMALLEST_STEP, activation_grid, to_codes, weight_grid
from quant.recipe import build_config
from utils.errors import UserError
from utils.optim import build_optimizer

BITS = [2, 3, 4, 5, 6, 8]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LOW, HIGH = ALPHA_LIMITS


def silu(*shape, spread=2.0):
    return torch.nn.functional.silu(torch.randn(*shape) * spread)


def staircase(x, lower, upper, alpha, zero_point, intervals):
    """arXiv 1908.05033 eq. 3 to 9 on a grid with 0 among its levels: hard values with the soft ones' gradients."""
    distance = (upper - lower) / intervals
    interval = torch.floor((x / distance).detach()).clamp(-zero_point, intervals - zero_point - 1)
    middle = (interval + 0.5) * distance
    k = torch.log(2 / alpha - 1) / distance
    phi = torch.tanh(k * (x - middle)) / torch.tanh(0.5 * k * distance)
    sign = phi + (torch.where(phi >= 0, 1.0, -1.0) - phi).detach()
    inside = distance * (interval + (sign + 1) / 2)
    low, high = -zero_point * distance.detach(), (intervals - zero_point) * distance.detach()
    snapped_lower, snapped_upper = lower + (low - lower).detach(), upper + (high - upper).detach()
    y = torch.where(x <= low, snapped_lower + 0 * x, inside)
    return torch.where(x >= high, snapped_upper + 0 * x, y)


def gradients(x, lower, upper, logit, zero_point, qmin, qmax, upstream):
    """Values (n,) and the gradients of x (n,) and the parameters (1,), upper, logit and, unless None, lower."""
    leaves = [value.detach().double().cpu().requires_grad_(True) for value in (x, upper, logit)]
    x, upper, logit = leaves
    if lower is not None:
        leaves.append(lower.detach().double().cpu().requires_grad_(True))
    low = leaves[3] * qmax if lower is not None else upper * qmin
    alpha = LOW + (HIGH - LOW) * torch.sigmoid(SLOPE * logit)
    y = staircase(x, low, upper * qmax, alpha, zero_point - qmin, qmax - qmin)
    found = torch.autograd.grad(y, leaves, upstream.double().cpu())
    return y.detach(), *found


def root_mean_square(quantizer):
    """Of the soft staircase's slope, by which the gradient of x is divided unless the mode is the paper's."""
    alpha = quantizer.alpha().item()
    edges = torch.linspace(-0.5, 0.5, 20001, dtype=torch.double)
    middles = (edges[1:] + edges[:-1]) / 2
    k = math.log(2 / alpha - 1)
    slope = k / torch.cosh(k * middles).square() / (2 * math.tanh(k / 2))
    return 1.0 if quantizer.paper else slope.square().mean().sqrt().item()


def check(quantizer, x, y, upstream, row=None):
    """Compares one row (or all) of a quantizer's values and input gradients with the reference, which it returns."""
    form = quantizer.integer()
    pick = (lambda t: t) if row is None else (lambda t: t[row])
    upper = quantizer.upper if row is None else quantizer.upper[row : row + 1]
    values = gradients(
        pick(x).flatten(), quantizer.lower, upper, quantizer.alpha_logit, form.zero_point, form.grid.qmin,
        form.grid.qmax, pick(upstream).flatten(),
    )  # fmt: skip
    torch.testing.assert_close(pick(y).flatten().double().cpu(), values[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        pick(x.grad).flatten().double().cpu() * root_mean_square(quantizer), values[1], rtol=1e-4, atol=5e-4
    )
    return values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("scheme", ["affine", "unsigned", "signed"])
@pytest.mark.parametrize("bits", BITS)
def test_activation_forward_and_gradients(bits, scheme, paper, device, monkeypatch):
    monkeypatch.setattr(quant.blocks, "BLOCK", 300)  # several blocks and a shorter last one
    torch.manual_seed(bits)
    quantizer = DSQ(bits, activation_grid(bits, scheme), scheme, None, DSQOptions(paper=paper, alpha=0.13)).to(device)
    x = silu(2, 3, 13, 11).to(device)
    quantizer.initialise(x * 0.7)  # a range that some values leave
    x.requires_grad_(True)
    upstream = torch.randn_like(x)
    y = quantizer(x)
    y.backward(upstream)
    expected = check(quantizer, x, y, upstream)
    grid, step = quantizer.grid, quantizer.current_step().item()
    lsq = 1 / (x[0].numel() * grid.qmax) ** 0.5  # N: features of one image
    range_scale, alpha_scale = (1 / grid.qmax**2, 1) if paper else (lsq, lsq / step**2)
    tolerance = 1e-4 * x.numel() ** 0.5 * grid.qmax
    assert quantizer.upper.grad.item() / range_scale == pytest.approx(expected[2].item(), rel=1e-3, abs=tolerance)
    assert quantizer.alpha_logit.grad.item() / alpha_scale == pytest.approx(
        expected[3].item(), rel=1e-3, abs=tolerance * step / grid.qmax
    )
    if scheme == "affine":
        scale = range_scale if paper else lsq / grid.qmax
        assert quantizer.lower.grad.item() / scale == pytest.approx(expected[4].item(), rel=1e-3, abs=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_weight_gradients_per_channel(bits, paper, device, monkeypatch):
    monkeypatch.setattr(quant.blocks, "BLOCK", 80)  # two rows of 36 at a time
    torch.manual_seed(0)
    scales = torch.tensor([0.1, 1.0, 5.0]).reshape(3, 1, 1, 1)
    weight = (torch.randn(3, 4, 3, 3) * scales).to(device).requires_grad_(True)
    quantizer = DSQ.for_weights(bits, 3, DSQOptions(paper=paper)).to(device)
    assert quantizer.grid == (activation_grid(bits, "signed") if paper else weight_grid(bits))
    quantizer.initialise(weight * 0.83)
    upstream = torch.randn_like(weight)
    y = quantizer(weight)
    y.backward(upstream)
    grid, steps, alpha_gradient = quantizer.grid, quantizer.current_step(), 0.0
    lsq = 1 / (weight[0].numel() * grid.qmax) ** 0.5
    for channel in range(3):
        expected = check(quantizer, weight, y, upstream, channel)
        scale = 1 / grid.qmax**2 if paper else lsq
        found = quantizer.upper.grad[channel].item() / scale
        assert found == pytest.approx(expected[2].item(), rel=1e-3, abs=1e-3 * grid.qmax)
        alpha_gradient += expected[3].item()
    scale = 1 if paper else lsq / steps.mean().item() ** 2
    assert quantizer.alpha_logit.grad.item() / scale == pytest.approx(alpha_gradient, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("names", [("lower",), ("upper",), ("lower", "upper")])
def test_a_parameter_of_the_wrong_sign_still_descends(names):
    """-|lower| and |upper| are the range; the gradient must turn over with the parameter."""
    torch.manual_seed(0)
    x, upstream = silu(400), torch.randn(400)
    found = {}
    for flip in (False, True):
        quantizer = DSQ(4, activation_grid(4, "affine"), "affine")
        quantizer.initialise(x * 0.8)
        quantizer.lower.data.fill_(-0.02)
        for name in names if flip else ():
            getattr(quantizer, name).data.neg_()
        quantizer(x).backward(upstream)
        found[flip] = quantizer
    for name in ("lower", "upper"):
        sign = -1 if name in names else 1
        assert getattr(found[True], name).grad.item() == sign * getattr(found[False], name).grad.item() != 0


def test_a_lower_end_at_zero_can_leave_it():
    quantizer = DSQ(2, activation_grid(2, "affine"), "affine")
    quantizer.initialise(torch.rand(100))
    assert quantizer.lower.item() == 0
    x = torch.full((4,), -1.0)
    (quantizer(x) - x).square().sum().backward()
    assert quantizer.lower.grad.item() > 0  # descending moves it down, towards x


def test_fixed_alpha_has_no_gradient_and_changes_no_other():
    torch.manual_seed(0)
    x, upstream = silu(3, 500), torch.randn(3, 500)
    found = []
    for learn in (True, False):
        quantizer = DSQ(4, activation_grid(4, "affine"), "affine", None, DSQOptions(alpha=0.3, learn_alpha=learn))
        quantizer.initialise(x)
        leaf = x.clone().requires_grad_(True)
        quantizer(leaf).backward(upstream)
        found.append((leaf.grad, quantizer.upper.grad, quantizer.lower.grad))
        assert ("alpha_logit" in dict(quantizer.named_parameters())) == learn
        assert quantizer.alpha().item() == pytest.approx(0.3)
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("value", [-1e9, -50.0, 0.0, 50.0, 1e9])
def test_alpha_stays_within_its_bounds_and_the_gradient_finite(value):
    quantizer = DSQ(4, activation_grid(4, "affine"), "affine")
    x = silu(500).requires_grad_(True)
    quantizer.initialise(x)
    quantizer.alpha_logit.data.fill_(value)
    assert LOW * (1 - 1e-6) <= quantizer.alpha().item() <= HIGH * (1 + 1e-6)
    quantizer(x).backward(torch.ones(500))
    k = math.log(2 / LOW - 1)
    assert x.grad.max().item() <= k / (2 * (1 - LOW)) + 1e-4  # 1.93, the steepest slope there can be
    assert torch.isfinite(quantizer.alpha_logit.grad).all()


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("alpha", [0.06, 0.2, 0.45])
def test_gradient_keeps_its_size_over_whole_intervals(alpha, paper):
    """The mean square is 1 after normalisation; the paper's has mean 1."""
    options = DSQOptions(alpha=alpha, paper=paper)
    quantizer = DSQ(4, activation_grid(4, "unsigned"), "unsigned", None, options)
    quantizer.upper.data.fill_(1.0)
    x = ((torch.arange(5000) + 0.5) / 1000).requires_grad_(True)  # five whole intervals
    quantizer(x).sum().backward()
    size = x.grad.mean() if paper else x.grad.square().mean()
    assert size.item() == pytest.approx(1.0, abs=1e-4)
    assert x.grad.std().item() > 0.05


@pytest.mark.parametrize("shape", [(4, 5, 7, 6), (1, 5, 7, 6), (3, 1, 4, 4), (6, 9), (11,)])
def test_gradients_do_not_depend_on_layout_or_blocks(shape, monkeypatch):
    torch.manual_seed(1)
    x, upstream = silu(*shape), torch.randn(*shape)
    wide = torch.zeros(*shape[:-1], 2 * shape[-1])
    gapped = wide[..., ::2].copy_(x)
    layouts = [x, gapped]
    if len(shape) == 4:
        layouts += [x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
    for channels in (None, shape[0]):
        found = []
        for layout in layouts:
            for block in (7, 65536):
                monkeypatch.setattr(quant.blocks, "BLOCK", block)
                scheme = "signed" if channels else "affine"
                quantizer = DSQ(4, activation_grid(4, scheme), scheme, channels)
                quantizer.initialise(x)
                leaf = layout.detach().requires_grad_(True)
                y = quantizer(leaf)
                y.backward(upstream)
                found.append([y.detach(), leaf.grad, quantizer.upper.grad, quantizer.alpha_logit.grad])
        for other in found[1:]:
            torch.testing.assert_close(other[:2], found[0][:2], rtol=0, atol=0)
            torch.testing.assert_close(other[2:], found[0][2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["affine", "unsigned", "signed"])
@pytest.mark.parametrize("bits", BITS)
def test_integer_form_reproduces_forward_code_for_code(bits, scheme, device):
    torch.manual_seed(bits)
    x = silu(8192, spread=3.0).to(device)
    quantizer = DSQ(bits, activation_grid(bits, scheme), scheme).to(device)
    for seed in range(5):
        quantizer.initialise(x)
        if seed:  # as if trained: l is no multiple of the step any more
            quantizer.upper.data.mul_(torch.rand(1, device=device) + 0.5)
            if scheme == "affine":
                quantizer.lower.data.add_(0.3 / 2**bits * torch.randn(1, device=device))
        quantizer.eval()
        form = quantizer.integer()
        assert isinstance(form.zero_point, int) and form.grid.qmin <= form.zero_point <= form.grid.qmax
        codes = form.codes(x)
        assert torch.equal(codes, to_codes(x, form.step, form.zero_point, form.grid))
        assert set(codes.tolist()) <= set(range(form.grid.qmin, form.grid.qmax + 1))
        assert torch.equal(form.values(codes), quantizer(x))
        assert quantizer(torch.zeros(1, device=device)).item() == 0  # zero is a code
        assert torch.equal(quantizer(x[:5]), quantizer(x)[:5])  # no statistics of the batch


def test_weights_are_coded_as_the_forward_pass_says():
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3)
    for paper, channels in ((False, 6), (False, None), (True, 6), (True, None)):
        quantizer = DSQ.for_weights(4, channels, DSQOptions(paper=paper))
        quantizer.initialise(weight)
        form = quantizer.eval().integer()
        assert len(form.step) == (channels or 1)
        assert torch.equal(form.values(form.codes(weight)), quantizer(weight))
        if paper:  # ranges from the extremes: nothing is clipped
            assert ((quantizer(weight) - weight).abs() <= form.step.reshape(-1, 1, 1, 1) / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("fill", ["zero", "constant", "negative", "huge", "tiny", "one"])
@pytest.mark.parametrize("options", [DSQOptions(), DSQOptions(paper=True)])
def test_degenerate_values_give_finite_usable_states(fill, options):
    make = {
        "zero": torch.zeros, "constant": lambda *s: torch.full(s, 0.37), "negative": lambda *s: torch.full(s, -2.0),
        "huge": lambda *s: torch.randn(s) * 1e30, "tiny": lambda *s: torch.randn(s) * 1e-30,
        "one": lambda *s: torch.full((1, *[1] * (len(s) - 1)), 1.5),
    }[fill]  # fmt: skip
    torch.manual_seed(0)
    cases = [(DSQ.for_activations(4, scheme, options), make(2, 8, 5, 5)) for scheme in ("affine", "unsigned", "signed")]
    weight = make(3, 4, 3, 3)
    cases.append((DSQ.for_weights(4, len(weight), options), weight))
    for quantizer, x in cases:
        quantizer.initialise(x)
        leaf = x.clone().requires_grad_(True)
        y = quantizer(leaf)
        y.backward(torch.ones_like(y))
        gradients_found = [leaf.grad, *(p.grad for p in quantizer.parameters())]
        assert all(torch.isfinite(value).all() for value in [y, *gradients_found, *quantizer.parameters()])
        assert (quantizer.current_step() >= SMALLEST_STEP).all()
        form = quantizer.eval().integer()
        assert torch.equal(form.values(form.codes(x)), quantizer(x))


@pytest.mark.parametrize("lower, upper", [(0.0, 0.0), (1e-30, -1e-30), (-3.0, 1e30), (5.0, 0.0), (0.0, -2.0)])
def test_the_ends_stay_in_order_under_any_update(lower, upper):
    quantizer = DSQ(4, activation_grid(4, "affine"), "affine")
    with torch.no_grad():
        quantizer.lower.fill_(lower)
        quantizer.upper.fill_(upper)
    form = quantizer.integer()
    assert form.step.item() >= SMALLEST_STEP and 0 <= form.zero_point <= 15
    values = quantizer(torch.tensor([-1e30, 0.0, 1e30]))
    assert values[0] <= values[1] == 0 <= values[2] and values[0] < values[2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_and_low_precision_inputs(dtype, device):
    torch.manual_seed(0)
    x = silu(1, 4, 9, 9).to(device, dtype)
    quantizer = DSQ(4, activation_grid(4, "affine"), "affine").to(device)
    quantizer.initialise(x)
    outputs = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_(True)
        with torch.autocast(device, dtype=torch.bfloat16 if dtype is torch.float32 else dtype, enabled=enabled):
            y = quantizer(leaf)
        quantizer.zero_grad()
        y.square().sum().backward()
        assert y.dtype is leaf.grad.dtype is dtype and torch.isfinite(leaf.grad).all()
        outputs.append((y.detach(), leaf.grad, quantizer.alpha_logit.grad.clone()))
    for left, right in zip(*outputs, strict=True):
        assert torch.equal(left, right)


def test_deepcopy_state_dict_and_half_keep_everything():
    torch.manual_seed(0)
    x = silu(500)
    quantizer = DSQ(3, activation_grid(3, "affine"), "affine")
    quantizer.initialise(x)
    quantizer.alpha_logit.data.fill_(0.123456789)
    quantizer(x).sum().backward()
    restored = DSQ(3, activation_grid(3, "affine"), "affine")
    restored.load_state_dict(quantizer.state_dict())
    for other in (copy.deepcopy(quantizer), restored, copy.deepcopy(quantizer).half()):
        assert torch.equal(other(x), quantizer(x)) and bool(other.initialised)
        assert torch.equal(other.alpha(), quantizer.alpha()) and other.alpha().dtype is torch.float32


def test_only_input_and_output_are_kept_for_the_backward_pass():
    x = silu(2, 8, 16, 16).requires_grad_(True)
    quantizer = DSQ(4, activation_grid(4, "affine"), "affine")
    quantizer.initialise(x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        quantizer(x)
    assert sum(kept) <= 2 * x.numel() + 10


@pytest.mark.parametrize("x", [torch.zeros(0), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])])
def test_ranges_are_not_set_from_nothing_or_from_nan(x):
    with pytest.raises(ValueError, match="cannot set a quantization range"):
        DSQ(4, activation_grid(4, "affine"), "affine").initialise(x)


@pytest.mark.parametrize("alpha", [0, 0.05, 0.5, 2, True])
def test_an_impossible_alpha_is_refused(alpha):
    config = build_config("dsq")
    config.options = {"alpha": alpha}
    with pytest.raises(UserError, match="alpha"):
        config.method_options()


def errors_of_training(method, bits, steps=25):
    """The error at each step of training a quantized detector to give the float one's maps, and alpha's moves."""
    model = float_detector()
    batch = images(4)
    with torch.no_grad():
        wanted = model.train()(batch)
    config = build_config(method, bits)
    config.activation.equalization = 0.0  # which leaves training little to recover
    prepare(model, config)
    calibrate(model, [batch])
    optimizer = build_optimizer(model, lr=0.002)
    first = {name: value.clone() for name, value in model.named_parameters() if name.endswith("alpha_logit")}
    errors = []
    for _ in range(steps):
        error = sum((found - want).square().mean() for found, want in zip(model(batch), wanted, strict=True))
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        errors.append(error.item())
    now = dict(model.named_parameters())
    return errors, [(now[name] - value).abs().item() for name, value in first.items()]


def test_four_bit_training_recovers_a_detector_as_lsq_does():
    expected, _ = errors_of_training("lsq", 4)
    errors, moved = errors_of_training("dsq", 4)
    assert all(math.isfinite(error) for error in errors)
    assert errors[-1] < 0.75 * errors[0]
    assert sum(errors[-5:]) < 1.25 * sum(expected[-5:])
    assert len(moved) > 20 and min(moved) > 0
