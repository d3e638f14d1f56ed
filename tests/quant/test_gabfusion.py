"""GABFusion: insertion, schedule, controller, fixed statistics; which nodes it stands at, and folding it away."""

import copy
from functools import cache

import pytest
import torch
from small_detector import SMALL, float_detector, images
from torch import nn

from models.common import Add, BottleneckCSP, Concat, Conv
from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.fold import ActivationGrid, BranchGrids, ScaledBranches, fold
from quant.gabfusion import GABFusion, calibrate_fusion, fusion_nodes, set_strength, strength_at
from quant.onnx_graph import build, trace, traceable
from quant.prepare import fusion_readers, prepare
from quant.verify import references, verify
from utils.ema import ModelEMA
from utils.errors import UserError


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


def test_backward_scales_gradients_to_their_geometric_mean_and_leaves_the_features_alone():
    node = GABFusion(3, "backward")
    node.set_strength(1.0)
    weight = torch.cat([torch.full((1, channels, 1, 1), gain) for channels, gain in ((2, 8.0), (3, 1.0), (4, 2.0))], 1)
    torch.manual_seed(0)
    for step in range(2):
        branches = [torch.randn(2, channels, 5, 5, requires_grad=True) for channels in (2, 3, 4)]
        fused = node(branches)
        assert torch.equal(fused, torch.cat(branches, 1)) and node.is_identity
        (fused * weight).sum().backward(inputs=branches)
        norms = [float(branch.grad.norm()) for branch in branches]
        plain = [gain * (2 * channels * 25) ** 0.5 for channels, gain in ((2, 8.0), (3, 1.0), (4, 2.0))]
        mean = (plain[0] * plain[1] * plain[2]) ** (1 / 3)
        assert norms == pytest.approx(plain if step == 0 else [mean] * 3, rel=1e-4)
        torch.testing.assert_close(node.energy, torch.tensor(plain))  # before they were scaled
        node.update_balance()


def test_backward_scales_no_gradient_by_more_than_its_limit_nor_those_of_other_readers():
    node = GABFusion(2, "backward")
    node.energy_average.copy_(torch.tensor([1000.0, 1.0]))
    node.updates.fill_(1)
    branches = [torch.randn(1, 2, 3, 3, requires_grad=True) for _ in range(2)]
    (node(branches).sum() + 7 * branches[0].sum()).backward()
    assert branches[0].grad.unique().tolist() == pytest.approx([7 + 1 / 4])
    assert branches[1].grad.unique().tolist() == pytest.approx([4.0])


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
    torch.testing.assert_close(node.logits, before)
    torch.testing.assert_close(node.energy_average, torch.tensor([2.0, 1.0]))


def test_mixed_precision_that_begins_with_an_overflow_begins_the_averages_afterwards():
    node = GABFusion(2, "feedback")
    for energy in ([float("inf"), 3.0], [2.0, 1.0]):  # the first loss scale is too large as a rule
        node.energy.copy_(torch.tensor(energy) * 1024)
        node.update_balance(torch.tensor(1024.0))
    torch.testing.assert_close(node.energy_average, torch.tensor([2.0, 1.0]))
    assert node.updates == 1 and node.logits[0] < 0 < node.logits[1]


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


# --- sums -------------------------------------------------------------------------------------------------------------


def test_an_add_starts_as_the_plain_sum_and_normalises_over_channels_of_the_sum():
    branches = features(6, 6, 6)
    node = GABFusion(3, operation="add")
    torch.testing.assert_close(node(branches), branches[0] + branches[1] + branches[2], rtol=1e-5, atol=1e-5)
    node.mean.fill_(0.3)
    node.deviation.fill_(2.0)
    with torch.no_grad():
        node.logits.copy_(torch.tensor([0.4, -0.1, 0.2]))
    node.set_strength(1.0)
    alpha = torch.softmax(node.logits.detach().double(), 0)
    h = sum(3 * a * branch.double() for a, branch in zip(alpha, branches, strict=True))
    norm = nn.LayerNorm(6, elementwise_affine=False, eps=1e-5, dtype=torch.double)
    expected = norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * 2.0 + 0.3
    torch.testing.assert_close(node(branches).double(), expected, rtol=1e-4, atol=1e-4)


def test_energies_of_a_sum_differ_by_the_factors_alone():
    node = GABFusion(2, operation="add")
    with torch.no_grad():
        node.logits.copy_(torch.tensor([0.7, -0.7]))
    branches = [branch.requires_grad_(True) for branch in features(4, 4)]
    (node(branches) ** 2).sum().backward()
    torch.testing.assert_close(node.energy, torch.stack([b.grad.norm() for b in branches]), rtol=1e-4, atol=1e-4)
    factors = node.factors().detach()
    torch.testing.assert_close(node.energy[0] / node.energy[1], factors[0] / factors[1])


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="choose one of concat, add"):
        GABFusion(2, operation="mean")


# --- which nodes ------------------------------------------------------------------------------------------------------

BIFPN = {
    **SMALL,
    "head": [
        [-1, 1, "Conv", [16, 1, 1]],  # 7
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [4, 1, "Conv", [16, 1, 1, None, 1, 1, False]],  # 9: no activation function, so a factor can join its batch norm
        [[-1, 8], 1, "Add", []],  # 10: top-down
        [-1, 1, "C3", [16, False]],  # 11
        [-1, 1, "Conv", [16, 3, 2]],
        [6, 1, "Conv", [16, 1, 1]],
        [[12, 7, 13], 1, "Add", []],  # 14: three branches, all behind SiLU
        [-1, 1, "C3", [16, False]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 11, 4], 1, "Concat", [1]],  # 17: three branches
        [-1, 1, "C3", [16, False]],
        [[18, 15], 1, "Detect", ["nc", "anchors"]],
    ],
}
YOLOV3 = {  # concatenations read by a Bottleneck and by two layers; an SPP written as rows
    **SMALL,
    "head": [
        [-1, 1, "Conv", [16, 1, 1]],  # 7
        [-1, 1, "nn.MaxPool2d", [5, 1, 2]],
        [-2, 1, "nn.MaxPool2d", [9, 1, 4]],
        [[7, 8, 9], 1, "Concat", [1]],  # 10: copies of one tensor
        [-1, 1, "Bottleneck", [32, False]],  # 11
        [-1, 1, "Conv", [16, 1, 1]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]],  # 14
        [-1, 1, "Bottleneck", [16, False]],  # 15
        [14, 1, "nn.Upsample", [None, 1, "nearest"]],  # another reader of 14, without a quantizer
        [-1, 1, "Conv", [16, 1, 1]],
        [[15, 17], 1, "Concat", [1]],  # 18
        [-1, 1, "Conv", [16, 3, 1]],
        [18, 1, "Conv", [16, 1, 1]],  # 18 has two readers of one grid
        [[19, 20], 1, "Concat", [1]],  # 21, read by the 8-bit Detect alone
        [[21, 11], 1, "Detect", ["nc", "anchors"]],
    ],
}


HEADS = {"small": SMALL, "bifpn": BIFPN, "yolov3": YOLOV3}


@cache
def fused(head, scope="neck"):
    """Prepared, calibrated, schedule ended, branch weights away from 1. Shared between tests: not to be changed."""
    model = prepare(float_detector(HEADS[head]), QuantConfig.from_dict({"gabfusion": {"scope": scope}}))
    calibrate(model, [images(4, seed=2)])
    torch.manual_seed(0)
    for node in fusion_nodes(model).values():
        node.set_strength(0.0)
        nn.init.normal_(node.logits, 0, 0.4)
    return model.eval()


@pytest.mark.parametrize(
    "head, scope, expected",
    [
        ("small", "neck", ["9", "12"]),
        ("small", "all", ["2.cat", "4.cat", "9", "10.cat", "12", "13.cat"]),
        ("bifpn", "neck", ["10", "14", "17"]),
        ("yolov3", "neck", ["14", "18", "21"]),
    ],
)
def test_scope(head, scope, expected):
    """Never SPPF, and no concatenation of pooled copies (row 10 of YOLOV3)."""
    nodes = fusion_nodes(fused(head, scope))
    assert list(nodes) == [f"model.{name}.balance" for name in expected]


def test_a_branch_count_is_that_of_the_row():
    nodes = fusion_nodes(fused("bifpn"))
    assert {name: (node.branches, node.operation) for name, node in nodes.items()} == {
        "model.10.balance": (2, "add"), "model.14.balance": (3, "add"), "model.17.balance": (3, "concat"),
    }  # fmt: skip


def test_a_concatenation_over_another_axis_gets_no_fusion():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.cat, self.last = nn.Conv2d(3, 4, 1), Concat(2), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.cat([x, x + 1]))

    with pytest.raises(UserError, match="no Concat or Add"):
        prepare(Rows(), QuantConfig.from_dict({"gabfusion": True}), torch.zeros(1, 3, 16, 16))


def test_add_rows_that_do_not_fit_are_named():
    head = copy.deepcopy(BIFPN["head"])
    head[3] = [[-1, 6], 1, "Add", []]
    with pytest.raises(UserError, match=r"head row 3 \(layer 10\): Add needs .* equally many channels"):
        float_detector({**BIFPN, "head": head})
    head[3] = [-1, 1, "Add", []]
    with pytest.raises(UserError, match=r"head row 3 .* two or more layers"):
        float_detector({**BIFPN, "head": head})
    head[3] = [[-1, 7], 1, "Add", []]  # twice the resolution
    with pytest.raises(UserError, match=r"head row 3 \(layer 10\): Add does not fit"):
        float_detector({**BIFPN, "head": head})


def test_add_without_fusion_is_the_sum():
    branches = features(4, 4, 4)
    torch.testing.assert_close(Add()(branches), torch.stack(branches).sum(0), rtol=1e-6, atol=1e-6)


# --- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head, scope", [("small", "all"), ("bifpn", "neck"), ("yolov3", "neck")])
def test_folded_network_equals_the_eval_network(head, scope):
    model = fused(head, scope)
    folded = fold(model)
    assert not fusion_nodes(folded)
    x = images(2, seed=5)
    with torch.no_grad():
        expected, actual = model(x)[1], folded(x)[1]
    for left, right in zip(expected, actual, strict=True):
        # 0 here; a single code that flips on a rounding boundary would cost 0.005, a lost factor costs 0.05 and more.
        assert (left - right).norm() < 0.01 * (left - left.mean()).norm()


def test_where_the_factors_go():
    folded = fold(fused("bifpn"))
    first, second, third = (folded.model[index].balance for index in (10, 14, 17))
    assert first is None  # one factor in the batch norm of layer 9, relative to the other's, which is in the step
    grid = folded.model[11].input_quantizer.grid  # behind the factors of the channels
    assert isinstance(grid, ActivationGrid) and grid.step != grid.output_step
    assert isinstance(second, ScaledBranches) and second.factors[0] == 1 and 1 not in second.factors[1:]
    assert isinstance(third, BranchGrids)
    folded = fold(fused("yolov3"))
    assert isinstance(folded.model[14].balance, ScaledBranches) and 1 not in folded.model[14].balance.factors
    assert isinstance(folded.model[18].balance, BranchGrids) and isinstance(folded.model[21].balance, BranchGrids)


@pytest.mark.parametrize("head, scope", [("bifpn", "neck"), ("small", "all"), ("yolov3", "neck")])
def test_the_exported_file_computes_the_same(head, scope):
    folded = fold(fused(head, scope))
    folded.detect.export = True
    example = images(1)
    exported = build(trace(traceable(folded), example))
    result = verify(folded, exported, references(folded, list(images(2, seed=6))))
    assert result.holds, result.table()


class Sum(nn.Module):
    """Two branches, a sum, one reader: nothing behind the reader's quantizer, so codes cannot cascade."""

    def __init__(self, activation=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.left, self.right = Conv(4, 8, 1, act=activation), Conv(4, 8, 3, act=activation)
        self.add, self.last = Add(), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(self.add([self.left(x), self.right(x)]))


def prepared(model, **options):
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(-1, 1)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = images(4, seed=2)
    prepare(model, QuantConfig.from_dict({"gabfusion": {**options}}), x)
    calibrate(model, [x])
    for node in fusion_nodes(model).values():
        node.set_strength(0.0)
        nn.init.normal_(node.logits, 0, 0.5)
    return model.eval(), x


def share_of_differences(model, x):
    folded = fold(model, x)
    with torch.no_grad():
        left, right = model(x), folded(x)
    return folded, float(((left - right).abs() > 1e-4 * left.abs().max()).float().mean())


@pytest.mark.parametrize("activation", [True, False, nn.LeakyReLU(0.1)])
def test_a_folded_sum_keeps_the_codes(activation):
    model, x = prepared(Sum(activation))
    folded, different = share_of_differences(model, x)
    assert different < 1e-3
    if activation is True:  # SiLU is not homogeneous: one factor stays as a Mul
        assert [factor == 1 for factor in folded.add.balance.factors] == [True, False]
    else:
        assert folded.add.balance is None


def test_a_branch_with_another_reader_keeps_its_values():
    class Shared(Sum):
        def __init__(self):
            super().__init__(False)
            self.other = nn.Conv2d(8, 5, 1)

        def forward(self, x):
            left, right = self.left(self.stem(x)), self.right(self.stem(x))
            return self.last(self.add([right, left])) + self.other(left)

    model, x = prepared(Shared())
    folded, different = share_of_differences(model, x)
    assert different < 1e-3
    assert folded.add.balance is None  # right's factor in its batch norm, left's in the step behind the sum
    assert folded.last.input_quantizer.grid.step != folded.last.input_quantizer.grid.output_step


def test_a_sum_with_constant_statistics_folds_too():
    model, x = prepared(Sum(), fold="finetune")
    set_strength(model, 1.0)
    steps = {name: reader.current_step().detach() for name, reader in fusion_readers(model).items()}
    calibrate_fusion(model, [x], fix=steps)
    model.add.balance.mean += 3 * steps["add.balance"].item()
    assert abs(float(model.add.balance.constants()[1])) >= 1
    assert share_of_differences(model, x)[1] < 1e-3


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.last = BottleneckCSP(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.block(x))


def test_a_concatenation_in_front_of_a_batch_norm_folds_into_it():
    model, x = prepared(Halves(), scope="all")
    assert list(fusion_nodes(model)) == ["block.cat.balance"]
    folded = fold(model, x)
    assert folded.block.cat.balance is None
    with torch.no_grad():
        left, right = model(x), folded(x)
    assert float(((left - right).abs() > 1e-2 * left.abs().max()).float().mean()) < 0.01
