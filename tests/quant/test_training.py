"""The quantized phase's companion: distillation, penalties, the schedule's effect on what may be exported, monitors."""

import copy
import math

import pytest
import torch
from small_detector import float_detector, images, quantized_detector
from torch import nn

import quant.training
from quant.config import QuantConfig
from quant.gabfusion import GABFusion
from quant.quantizer import Quantizer
from quant.recipe import build_config, merge
from quant.training import QuantizedTraining
from utils.errors import UserError
from utils.log import set_verbose


def companion(model=None, recipe=None, **flags):
    model = quantized_detector(gabfusion=True).train() if model is None else model
    config = build_config("lsq", 4, gabfusion=flags.pop("gabfusion", True), **flags)
    plain = {"distillation": {"logits": 0.0, "boxes": 0.0, "gradient_ratio": 0.0}}
    config = QuantConfig.from_dict(merge(merge(config.to_dict(), plain), recipe or {}))
    teacher = float_detector(seed=1) if config.needs_teacher else None
    return QuantizedTraining(model, copy.deepcopy(model), config, teacher, epochs=10)


def warnings(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]


def test_a_healthy_epoch_warns_of_nothing(capsys):
    companion().end_epoch(0.9)
    assert warnings(capsys) == []


def test_a_branch_that_is_switched_off_is_named_once(capsys):
    training = companion()
    node = next(iter(training.nodes.values()))
    with torch.no_grad():
        node.logits.copy_(torch.tensor([4.0, -4.0]))
    training.end_epoch(0.9)
    training.end_epoch(0.9)
    (line,) = warnings(capsys)
    assert next(iter(training.nodes)) in line and "switched off" in line


def test_a_collapsed_step_is_named(capsys):
    training = companion()
    with torch.no_grad():
        training.model.model[1].conv.input_quantizer.step.mul_(1e-3)
    training.end_epoch(0.9)
    (line,) = warnings(capsys)
    assert "model.1.conv.input_quantizer" in line and "collapsed" in line


def test_dying_objectness_is_said(capsys):
    companion().end_epoch(0.001)
    assert "objectness output is dying" in warnings(capsys)[0]


@pytest.mark.parametrize("ratio, word", [(1e-5, "does nothing"), (30.0, "outweighs")])
def test_attention_that_is_too_weak_or_too_strong_is_said(ratio, word, capsys):
    training = companion(ada="js")
    features = {index: torch.rand(2, 4, 5, 5, requires_grad=True) for index in (10, 13)}
    task = sum(feature.sum() for feature in features.values())
    training.measure_ratios(task, {"ada": task * ratio}, features)
    assert training.gradient_ratios == pytest.approx({"ada": ratio}, rel=1e-4)
    training._term_sums, training._term_count = {"ada": torch.tensor(1.0)}, 1
    training.end_epoch(0.9)
    line = warnings(capsys)[0]
    assert word in line and "ada.weight" in line


# --- distillation -----------------------------------------------------------------------------------------------------

ALL = {"distillation": {"feature_mse": 2.0, "channel_wise": 3.0, "logits": 4.0, "boxes": 5.0}}


def run(training, batch):
    raw, features = training.model(batch, features=training.features)
    return training.distillation(batch, features, raw), features, raw


def test_distillation_scales_with_weight_and_batch():
    training = companion(ada="kl")
    batch = images(3)
    losses, features, _ = run(training, batch)
    divergence = training.alignment(features, training.teacher(batch, features=training.features)[1], training.readers)
    assert list(losses) == ["ada"]
    torch.testing.assert_close(losses["ada"], divergence * 3 * training.config.ada.weight)
    assert all(parameter.grad is None for parameter in training.teacher.parameters())


def test_all_terms_share_one_forward_pass_of_a_teacher_that_never_changes():
    training = companion(ada="kl", recipe=ALL)
    before = copy.deepcopy(training.teacher.state_dict())
    calls = []
    training.teacher.register_forward_hook(lambda *_: calls.append(1))
    losses, _, _ = run(training, images(2))
    assert list(losses) == ["ada", "feature_mse", "channel_wise", "logits", "boxes"] and len(calls) == 1
    weighted = sum(losses.values())
    weighted.backward()
    assert all(p.grad is None and not p.requires_grad for p in training.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in training.teacher.state_dict().items())
    assert training.model.model[4].cv1.conv.weight.grad.abs().sum() > 0
    for name, weight in (("feature_mse", 2.0), ("channel_wise", 3.0), ("logits", 4.0), ("boxes", 5.0)):
        torch.testing.assert_close(losses[name].detach(), training._term_sums[name] * weight * 2)


def test_each_term_reports_its_loss_and_its_gradient(capsys):
    training = companion(ada="kl", recipe=ALL)
    losses, features, raw = run(training, images(2))
    training.measure_ratios(sum(level.square().sum() for level in raw), losses, features)
    set_verbose(True)
    try:
        values = training.end_epoch(0.9)
    finally:
        set_verbose(False)
    out = capsys.readouterr().out
    for name in ("ada", "feature_mse", "channel_wise", "logits", "boxes"):
        assert values[f"quant/{name}_loss"] > 0 and values[f"quant/{name}_gradient_ratio"] > 0
        assert f"quant/{name}_loss" in training.columns and f"{name} loss" in out


def test_weights_follow_the_gradient_ratio_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(quant.training, "WEIGHT_RANGE", 1e9)  # these random networks are far from where weights end
    recipe = {
        "distillation": {"feature_mse": 2.0, "logits": 4.0, "boxes": 0.0, "gradient_ratio": 0.5},
        "ada": {"gradient_ratio": 0.1},
    }
    training = companion(ada="kl", recipe=recipe)
    assert training.measures(0, 64) and training.measures(3, 64)  # until it has been measured once
    for first in (True, False):
        losses, features, raw = run(training, images(2))
        task = sum(level.square().sum() for level in raw)
        training.measure_ratios(task, losses, features)
        before = dict(training.gradient_ratios)
        fitted = training.fit_weights(losses)
        training.measure_ratios(task, fitted, features)
        assert training.gradient_ratios == pytest.approx({"ada": 0.1, "feature_mse": 0.5, "logits": 0.5}, rel=1e-3)
        if first:  # far from where they have to be
            assert max(abs(math.log(before[name] / ratio)) for name, ratio in training.gradient_ratios.items()) > 1
    assert [index for index in range(64) if training.measures(index, 64)] == list(range(0, 64, 4))
    training.gradient_ratios = {"ada": 0.1 * 100, "feature_mse": 0.5 / 100, "logits": 0.5}
    before = dict(training.term_weights)
    training.fit_weights(losses)
    moved = {name: training.term_weights[name] / before[name] for name in before}
    assert moved == pytest.approx({"ada": 1 / 1.5, "feature_mse": 1.5, "logits": 1.0})


def test_a_weight_that_follows_a_ratio_stays_within_bounds():
    training = companion(recipe={"distillation": {"logits": 0.03, "boxes": 0.0, "gradient_ratio": 1.0}})
    loss = {"logits": torch.tensor(2.0)}
    for ratio in (0.0, math.inf, math.nan):
        training.gradient_ratios = {"logits": ratio}
        assert training.fit_weights(loss) == loss and training.term_weights == {"logits": 0.03}
    training.weights_fitted = False
    training.gradient_ratios = {"logits": 1e-9}
    assert training.fit_weights(loss)["logits"].item() == pytest.approx(200.0)
    assert training.term_weights["logits"] == pytest.approx(3.0)
    training.weights_fitted = False
    training.gradient_ratios = {"logits": 1e9}
    training.fit_weights(loss)
    assert training.term_weights["logits"] == pytest.approx(0.0003)


def test_without_a_ratio_weights_stay_and_are_measured_once_an_epoch():
    training = companion(ada="kl", recipe=ALL)
    assert [index for index in range(64) if training.measures(index, 64)] == [32]
    losses, features, raw = run(training, images(2))
    training.measure_ratios(sum(level.square().sum() for level in raw), losses, features)
    assert training.fit_weights(losses) == losses and training.term_weights["logits"] == 4.0


def test_a_gradient_ratio_is_that_of_the_norms():
    training = companion(ada="kl", recipe=ALL)
    losses, features, raw = run(training, images(2))
    task = sum(level.square().sum() for level in raw)
    training.measure_ratios(task, losses, features)
    norms = {}
    for name, loss in {"task": task, **losses}.items():
        gradients = torch.autograd.grad(loss, list(features.values()), retain_graph=True)
        norms[name] = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
    expected = {name: float(norms[name] / norms["task"]) for name in losses}
    assert training.gradient_ratios == pytest.approx(expected, rel=1e-4)


def test_terms_may_look_at_other_layers_than_attention():
    recipe = {"ada": {"layers": [4]}, "distillation": {"feature_mse": 1.0, "layers": [10, 13]}}
    training = companion(ada="kl", recipe=recipe)
    assert training.features == (4, 10, 13)
    losses, features, _ = run(training, images(2))
    gradients = torch.autograd.grad(losses["ada"], [features[4], features[10]], retain_graph=True, allow_unused=True)
    assert gradients[0] is not None and gradients[1] is None
    (gradient,) = torch.autograd.grad(losses["feature_mse"], [features[13]])
    assert gradient.abs().sum() > 0
    with pytest.raises(UserError, match=r"distillation\.layers: 99 is not a layer"):
        companion(recipe={"distillation": {"logits": 1.0, "layers": [99]}})


def test_by_default_a_network_learns_from_the_teachers_logits_and_boxes():
    config = QuantConfig.from_dict({})
    assert config.needs_teacher and list(config.distillation.weights) == ["logits", "boxes"]
    assert QuantConfig.from_dict({"distillation": ["logits", "boxes"]}) == config
    assert list(QuantConfig.from_dict({"distillation": "feature_mse"}).distillation.weights) == ["feature_mse"]
    assert list(QuantConfig.from_dict({"distillation": {"feature_mse": 1.0}}).distillation.weights) == [
        "feature_mse", "logits", "boxes",
    ]  # fmt: skip
    model = quantized_detector()
    with pytest.raises(UserError, match="need a float teacher"):
        QuantizedTraining(model, copy.deepcopy(model), config, None, 1)


def test_names_stand_for_the_tuned_weights():
    one = QuantConfig.from_dict({"distillation": ["feature_mse", "logits"]}).distillation
    block = {"feature_mse": True, "logits": True, "channel_wise": False, "boxes": False}
    two = QuantConfig.from_dict({"distillation": block}).distillation
    assert one == two and list(one.weights) == ["feature_mse", "logits"]
    assert not QuantConfig.from_dict({"distillation": False}).needs_teacher
    with pytest.raises(UserError, match=r"unknown key 'distillation\.logit'; did you mean 'logits'"):
        QuantConfig.from_dict({"distillation": "logit"})


# --- penalty ----------------------------------------------------------------------------------------------------------


class Penalised(Quantizer):
    """A quantizer that does nothing but ask for a small range."""

    def __init__(self, value):
        super().__init__(4, None, "signed")
        self.alpha = nn.Parameter(torch.tensor(value))

    def penalty(self):
        return 0.5 * self.alpha**2

    def quantize(self, x):
        return x

    def current_step(self):
        return self.alpha


def test_penalties_are_added_once_a_batch_times_its_size():
    model = quantized_detector(gabfusion=True).train()
    assert companion(model).penalty(8) is None
    model.model[1].conv.input_quantizer, model.model[3].conv.input_quantizer = Penalised(3.0), Penalised(2.0)
    model.model[5].conv.input_quantizer = model.model[3].conv.input_quantizer  # shared: counted once
    training = companion(model)
    penalty = training.penalty(8)
    assert penalty.item() == pytest.approx(8 * 0.5 * (9 + 4))
    penalty.backward()
    assert model.model[3].conv.input_quantizer.alpha.grad.item() == pytest.approx(8 * 2.0)


# --- monitors of the fusion -------------------------------------------------------------------------------------------


def train_steps(training, scales=(1.0, 1.0)):
    """Forward passes in training mode at full strength; ``scales`` multiply what reaches the nodes, batch by batch."""
    for norm in training.model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()  # its running statistics are no averages of anything in this network
    left = list(scales)
    for node in training.nodes.values():
        node.register_forward_pre_hook(lambda node, inputs: ([branch * left[0] for branch in inputs[0]],))
    training.set_progress(0.3)
    for index in range(len(scales)):
        training.set_probe(index == 0)
        training.model(images(2, seed=index))
        left.pop(0)
    training.end_epoch(0.9)


def test_a_healthy_normalisation_warns_of_nothing(capsys):
    training = companion()
    train_steps(training)
    assert warnings(capsys) == []


def test_a_node_whose_branches_are_copies_of_one_tensor_is_named(capsys):
    class Pyramid(nn.Module):
        """An SPPF whose concatenation somebody gave a GABFusion."""

        def __init__(self, block):
            super().__init__()
            self.cv1, self.cv2, self.m, self.balance = block.cv1, block.cv2, block.m, GABFusion(4)

        def forward(self, x):
            levels = [self.cv1(x)]
            for _ in range(3):
                levels.append(self.m(levels[-1]))
            return self.cv2(self.balance(levels))

    model = quantized_detector(gabfusion=True).train()
    block = Pyramid(model.model[6])
    block.f, block.i = model.model[6].f, 6
    model.model[6] = block
    companion(model)
    (line,) = warnings(capsys)
    assert line.startswith("WARNING: model.6.balance: all branches are pooled copies") and "gabfusion.scope" in line


@pytest.mark.parametrize("axes", [(2, 3), (1, 2, 3), (0,)])
def test_statistics_over_the_wrong_axis_are_said(axes, capsys):
    class WrongAxis(GABFusion):
        def _normalise(self, h):
            variance, mean = torch.var_mean(h.float(), axes, correction=0, keepdim=True)
            deviation = (variance + 1e-5).sqrt()
            return (h - mean) / deviation * self.deviation + self.mean, mean, deviation

    training = companion()
    for node in training.nodes.values():
        node.__class__ = WrongAxis
    train_steps(training)
    assert any("not taken over the channel axis" in line and "dimension 1" in line for line in warnings(capsys))


@pytest.mark.parametrize("scale", [(1.0, 0.4), (1e-3, 1e-3)])
def test_statistics_that_jump_or_left_their_calibration_are_said(scale, capsys):
    train_steps(companion(), scale)
    lines = warnings(capsys)
    assert len(lines) == 2 and all("unstable" in line and "quant_lr0" in line for line in lines)


def test_alpha_that_never_moved_is_said_at_the_end_only(capsys):
    training = companion()
    for node in training.nodes.values():
        node.logits.data.copy_(torch.tensor([0.005, -0.005]))
    training.set_progress(0.5)
    training.end_epoch(0.9)
    assert warnings(capsys) == []
    training.set_progress(1.0)
    training.end_epoch(0.9)
    (line,) = warnings(capsys)
    assert "alpha did nothing" in line and "gabfusion.learning_rate" in line
    moved = companion()
    moved.set_progress(1.0)
    moved.end_epoch(0.9)
    assert warnings(capsys) == []


# --- monitors of training ---------------------------------------------------------------------------------------------


def validations(training, *losses):
    for box, classification in losses:
        training.end_epoch(0.9, {"val/box_loss": box, "val/cls_loss": classification})


def test_boxes_that_get_worse_while_classes_hold_are_said(capsys):
    validations(companion(), (0.05, 0.02), (0.04, 0.018), (0.044, 0.018), (0.046, 0.017))
    (line,) = warnings(capsys)
    assert "box regression degrades while classification holds" in line and "0.0400 -> 0.0460" in line
    assert "activation_bits" in line


@pytest.mark.parametrize(
    "losses",
    [
        [(0.05, 0.02), (0.04, 0.018), (0.046, 0.018), (0.04, 0.018), (0.046, 0.018)],  # single epochs jump
        [(0.05, 0.02), (0.04, 0.018), (0.046, 0.021), (0.046, 0.022)],  # both get worse: overfitting
        [(0.04, 0.0), (0.05, 0.0), (0.06, 0.0)],  # one class: no class loss to compare with
        [(0.0, 0.0), (0.05, 0.02), (0.05, 0.02), (0.05, 0.02)],  # no validation in the first epoch
    ],
)
def test_other_courses_of_the_losses_are_no_such_signature(losses, capsys):
    validations(companion(), *losses)
    assert warnings(capsys) == []


def test_an_exploded_step_is_named(capsys):
    training = companion()
    with torch.no_grad():
        training.model.model[1].conv.input_quantizer.step.mul_(100)
    training.end_epoch(0.9)
    (line,) = warnings(capsys)
    assert "model.1.conv.input_quantizer" in line and "exploded" in line and "quant_parameter_lr" in line


def test_a_range_from_constant_values_is_named(capsys):
    model = quantized_detector(gabfusion=True).train()
    for index in (1, 3, 5, 11):
        model.model[index].conv.input_quantizer.initialise(torch.zeros(100))
        model.model[index].conv.input_quantizer.step.data.fill_(1e-7)
    companion(model)
    (line,) = warnings(capsys)  # one, however many layers it is about
    assert "model.1.conv.input_quantizer (step 9.5e-07), model.3.conv" in line and "and 1 more: range set from" in line


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_only_the_end_of_the_schedule_is_deployable():
    training = companion()
    states = []
    for epoch in range(10):
        training.set_progress((epoch + 1) / 10)
        states.append(training.deployable)
        assert float(next(iter(training.nodes.values())).strength) == pytest.approx(training.strength)
    assert states == [False] * 8 + [True, True]


def test_attention_needs_a_teacher_and_existing_layers():
    model = quantized_detector(gabfusion=True)
    config = build_config("lsq", 4, ada="js")
    with pytest.raises(UserError, match="need a float teacher"):
        QuantizedTraining(model, copy.deepcopy(model), config, None, 1)
    config.ada.layers = [99]
    with pytest.raises(UserError, match="99 is not a layer"):
        QuantizedTraining(model, copy.deepcopy(model), config, float_detector(), 1)
