"""GABFusion: insertion, schedule, controller, fixed statistics."""

import copy

import pytest
import torch
from torch import nn

from quant.gabfusion import GABFusion, calibrate_fusion, set_strength, strength_at
from utils.ema import ModelEMA


def features(*channels, size=6, batch=2):
    torch.manual_seed(0)
    return [torch.randn(batch, c, size, size) * (index + 1) for index, c in enumerate(channels)]


@pytest.mark.parametrize("balance", ["learnable", "feedback", "fixed"])
@pytest.mark.parametrize("channels", [(4, 4), (3, 5), (2, 3, 4)])
def test_insertion_is_the_old_concatenation(balance, channels):
    branches = features(*channels)
    fused = GABFusion(len(channels), balance)(branches)
    torch.testing.assert_close(fused, torch.cat(branches, 1), rtol=0, atol=1e-5)


def test_full_strength_is_layer_norm_over_channels_with_calibrated_scalars():
    branches = features(5, 7)
    node = GABFusion(2)
    node.mean.fill_(0.3)
    node.deviation.fill_(2.0)
    with torch.no_grad():
        node.logits.copy_(torch.tensor([0.4, -0.1]))
    node.set_strength(1.0)
    alpha = torch.softmax(node.logits, 0)
    h = torch.cat([2 * a * branch for a, branch in zip(alpha, branches, strict=True)], 1)
    norm = nn.LayerNorm(12, elementwise_affine=False, eps=1e-5)
    expected = norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * 2.0 + 0.3
    torch.testing.assert_close(node(branches), expected, rtol=1e-4, atol=1e-4)
    node.set_strength(0.25)
    torch.testing.assert_close(node(branches), 0.75 * h + 0.25 * expected, rtol=1e-4, atol=1e-4)


def test_paper_form_drops_the_factor_and_the_ramp():
    branches = features(4, 4)
    node = GABFusion(2, paper=True)
    h = torch.cat([0.5 * branch for branch in branches], 1)
    norm = nn.LayerNorm(8, elementwise_affine=False, eps=1e-5)
    torch.testing.assert_close(node(branches), norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


def test_schedule():
    at = [strength_at(p, 0.05, 0.5, 0.9) for p in (0, 0.025, 0.05, 0.3, 0.5, 0.7, 0.9, 1.0)]
    assert at == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0, 0])
    assert strength_at(0.0, 0.0, 0.0, 0.0) == 0.0


def test_gradients_reach_branches_and_logits():
    branches = [branch.requires_grad_(True) for branch in features(3, 3)]
    node = GABFusion(2)
    node.set_strength(0.5)
    torch.manual_seed(1)
    upstream = torch.randn(2, 6, 6, 6)
    node(branches).backward(upstream)
    analytic = node.logits.grad.clone()
    numeric = []
    for index in range(2):
        values = []
        for delta in (1e-3, -1e-3):
            with torch.no_grad():
                node.logits[index] += delta
                values.append(float((node(branches).double() * upstream).sum()))
                node.logits[index] -= delta
        numeric.append((values[0] - values[1]) / 2e-3)
    torch.testing.assert_close(analytic.double(), torch.tensor(numeric, dtype=torch.double), rtol=2e-2, atol=2e-2)
    assert all(branch.grad is not None for branch in branches)


def test_energy_is_the_gradient_that_reaches_the_branch_through_this_node():
    branches = [branch.requires_grad_(True) for branch in features(3, 5)]
    node = GABFusion(2)
    with torch.no_grad():
        node.logits.copy_(torch.tensor([0.7, -0.7]))
    (node(branches) ** 2).sum().backward()
    expected = torch.stack([branch.grad.norm() for branch in branches])  # no other reader here
    torch.testing.assert_close(node.energy, expected, rtol=1e-4, atol=1e-4)
    branches[0].grad = None
    other = branches[0].sum() * 100  # another reader must not count
    ((node(branches) ** 2).sum() + other).backward()
    torch.testing.assert_close(node.energy, expected, rtol=1e-4, atol=1e-4)


def test_controller_moves_a_constructed_imbalance_towards_one():
    """The reader weighs branch 0 ten times as much; feedback must bring the energies together."""
    torch.manual_seed(0)
    node = GABFusion(2, "feedback", eta=0.05)
    weight = torch.cat([torch.full((1, 4, 1, 1), 10.0), torch.ones(1, 4, 1, 1)], 1)
    ratios = []
    for _ in range(200):
        branches = [torch.randn(2, 4, 5, 5, requires_grad=True) for _ in range(2)]
        (node(branches) * weight).sum().backward()
        node.update_balance()
        ratios.append(float(node.energy[0] / node.energy[1]))
    assert ratios[0] == pytest.approx(10, rel=0.01)
    assert ratios[-1] == pytest.approx(1, rel=0.1)
    assert node.factors()[0] < node.factors()[1]


def test_gradient_scale_of_mixed_precision_is_divided_out():
    nodes = [GABFusion(2, "feedback"), GABFusion(2, "feedback")]
    for node, scale in zip(nodes, (1.0, 1024.0), strict=True):
        branches = [branch.requires_grad_(True) for branch in features(3, 3)]
        (node(branches).sum() * scale).backward()
        node.update_balance(scale)
    torch.testing.assert_close(nodes[0].energy_average, nodes[1].energy_average)
    torch.testing.assert_close(nodes[0].logits, nodes[1].logits)


def test_an_overflow_does_not_reach_the_controller():
    node = GABFusion(2, "feedback")
    node.energy.copy_(torch.tensor([2.0, 1.0]))
    node.update_balance()
    before = node.logits.clone()
    node.energy.copy_(torch.tensor([float("inf"), float("nan")]))
    node.update_balance()
    assert torch.isfinite(node.logits).all() and torch.isfinite(node.energy_average).all()
    torch.testing.assert_close(node.logits, 2 * before)  # one more step from the old averages


class Fused(nn.Module):
    def __init__(self, balance="learnable"):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.balance = GABFusion(2, balance)

    def forward(self, x):
        return self.balance([self.first(x), self.second(x)])


def test_calibration_sets_mean_and_deviation_of_the_statistics():
    torch.manual_seed(0)
    model = Fused().eval()
    batches = [torch.rand(2, 3, 5, 5) for _ in range(3)]
    calibrate_fusion(model, batches)
    h = torch.cat([torch.cat([model.first(x), model.second(x)], 1) for x in batches])
    assert model.balance.mean.item() == pytest.approx(h.mean(1).mean().item(), abs=1e-5)
    expected = (h.var(1, correction=0) + 1e-5).sqrt().mean().item()
    assert model.balance.deviation.item() == pytest.approx(expected, rel=1e-5)


def test_fixed_statistics_are_a_gain_and_a_shift_of_whole_steps():
    torch.manual_seed(0)
    model = Fused().eval()
    batches = [torch.rand(2, 3, 5, 5) for _ in range(2)]
    calibrate_fusion(model, batches)
    set_strength(model, 1.0)
    step = torch.tensor(0.07)
    calibrate_fusion(model, batches, fix={"balance": step})
    gain, shift = model.balance.constants()
    assert float(shift) == round(float(shift))
    h = torch.cat([model.first(batches[0]), model.second(batches[0])], 1)
    torch.testing.assert_close(model(batches[0]), h * gain + shift * step, rtol=1e-5, atol=1e-5)
    assert model.balance.is_identity


def test_ema_copies_the_schedule_and_averages_the_rest():
    model = Fused()
    ema = ModelEMA(model, decay=0.5, tau=1e-9)
    set_strength(model, 1.0)
    with torch.no_grad():
        model.balance.logits += 1.0
    ema.update(model)
    assert float(ema.ema.balance.strength) == 1.0
    torch.testing.assert_close(ema.ema.balance.logits, torch.full((2,), 0.5))


def test_deepcopy_and_reload_keep_the_state():
    node = GABFusion(3, "feedback")
    node.set_strength(0.4)
    with torch.no_grad():
        node.logits.copy_(torch.tensor([0.1, 0.2, 0.3]))
    branches = features(2, 2, 2)
    restored = GABFusion(3, "feedback")
    restored.load_state_dict(node.state_dict())
    for other in (copy.deepcopy(node), restored):
        torch.testing.assert_close(other(branches), node(branches), rtol=0, atol=0)
