"""The placement policy, calibration and folding on real YOLOv5 networks."""

import copy

import pytest
import torch
from small_detector import randomise_norm
from torch import nn

from models.common import Concat
from models.yolo import DetectionModel
from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.fold import BranchGrids, IntegerConv2d, fold
from quant.gabfusion import GABFusion, set_strength
from quant.layers import QuantConv2d
from quant.lsq import FixedGrid
from quant.prepare import fusion_readers, model_from_checkpoint, prepare, quantizers, reading_quantizers, set_enabled
from quant.recipe import build_config
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.ema import ModelEMA
from utils.errors import UserError
from utils.optim import build_optimizer


def random_model(name="yolov5n.yaml", classes=4, seed=0):
    """A network whose batch norms are far from the identity, with negative and zero gammas."""
    torch.manual_seed(seed)
    model = DetectionModel(name, nc=classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise_norm(module, 0.2, 5)
            module.weight.data[1] = 0
            module.bias.data.normal_(0, 0.3)
    return model


def images(count=4, size=64):
    torch.manual_seed(5)
    coarse = torch.rand(count, 3, 8, 8)
    return (nn.functional.interpolate(coarse, (size, size), mode="bilinear") * 255).round() / 255


@pytest.fixture(scope="module")
def quantized():
    model = prepare(random_model(), build_config("lsq", 4, gabfusion=True))
    calibrate(model, [images()])
    return model.eval()


def test_every_convolution_is_quantized_and_reads_a_quantized_tensor(quantized):
    convolutions = {n: m for n, m in quantized.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convolutions) == 60
    assert all(isinstance(conv, QuantConv2d) for conv in convolutions.values())
    for name, conv in convolutions.items():
        owner = name
        while owner and getattr(quantized.get_submodule(owner), "input_quantizer", None) is None:
            owner = owner.rpartition(".")[0]
        assert owner, f"{name} reads an unquantized tensor"
        assert conv.weight_quantizer.grid.qmin == -conv.weight_quantizer.grid.qmax


def test_first_and_detect_convolutions_are_8_bit_and_the_image_grid_is_fixed(quantized):
    first = quantized.model[0].conv
    assert isinstance(first.input_quantizer, FixedGrid) and first.weight_quantizer.bits == 8
    assert first.input_quantizer.integer().step.item() == pytest.approx(1 / 255)
    for conv in quantized.detect.m:
        assert conv.weight_quantizer.bits == conv.input_quantizer.bits == 8
    others = [m for n, m in quantized.named_modules() if isinstance(m, QuantConv2d) and n.startswith("model.5")]
    assert all(conv.weight_quantizer.bits == 4 and conv.input_quantizer.bits == 4 for conv in others)


def test_one_quantizer_per_tensor_and_grid(quantized):
    block = quantized.model[17]
    assert block.input_quantizer is not None
    assert block.cv1.conv.input_quantizer is None and block.cv2.conv.input_quantizer is None
    assert block.cv3.conv.input_quantizer is not None
    # Layer 17 is read by a 4-bit convolution and by the 8-bit Detect convolution: two grids.
    assert [q.bits for q in reading_quantizers(quantized, ["model.17"])["model.17"]] == [4, 8]
    same = prepare(random_model(), QuantConfig.from_dict({"detect_bits": 4}))
    assert same.model[18].conv.input_quantizer is same.detect.m[0].input_quantizer


def test_shortcut_adds_the_quantized_tensor(quantized):
    bottleneck = quantized.model[2].m[0]
    assert bottleneck.add
    x = torch.randn(1, 16, 8, 8)
    codes = bottleneck.input_quantizer(x)
    inner = copy.deepcopy(bottleneck)
    inner.input_quantizer = None
    torch.testing.assert_close(bottleneck(x), inner(codes), rtol=0, atol=0)


def test_gabfusion_stands_at_the_four_neck_concats_only(quantized):
    where = [n for n, m in quantized.named_modules() if isinstance(m, GABFusion)]
    assert where == [f"model.{i}.balance" for i in (12, 16, 19, 22)]
    assert set(fusion_readers(quantized)) == set(where)


def test_insertion_leaves_the_float_output_unchanged():
    model = random_model().eval()
    x = images()
    before = model(x)[0]
    prepare(model, build_config("lsq", 4, gabfusion="feedback"))
    calibrate(model, [x])
    set_enabled(model.eval(), False)
    torch.testing.assert_close(model(x)[0], before, rtol=1e-5, atol=1e-5)


def test_float_state_dict_keys_are_unchanged():
    model = random_model()
    keys = set(model.state_dict())
    prepare(model, build_config("lsq", 4))
    added = set(model.state_dict()) - keys
    assert keys <= set(model.state_dict())
    assert all("quantizer" in key for key in added)


@pytest.mark.parametrize("bits", ["8", "4", "w4a8", "3", "2"])
@pytest.mark.parametrize("scheme", ["affine", "unsigned", "signed"])
def test_folded_network_equals_the_eval_network(bits, scheme):
    """Raw maps agree to float rounding, except where a value stood on a rounding boundary of some grid."""
    recipe = build_config("lsq", bits, gabfusion=True).to_dict()
    recipe["activation"]["scheme"] = scheme
    model = prepare(random_model(seed=3), QuantConfig.from_dict(recipe))
    calibrate(model, [images()])
    torch.manual_seed(1)
    for index in (12, 16, 19, 22):
        nn.init.normal_(model.model[index].balance.logits, 0, 0.3)
    model.eval()
    folded = fold(model)
    x = images(2, 96)
    with torch.no_grad():
        expected, actual = model(x)[1], folded(x)[1]
    for left, right in zip(expected, actual, strict=True):
        close = ((left - right).abs() <= 1e-3 * left.abs().max()).float().mean()
        assert close > 0.97, f"{1 - close:.1%} of the raw outputs differ"
    assert not any(isinstance(m, (nn.BatchNorm2d, QuantConv2d, GABFusion)) for m in folded.modules())


def test_folded_codes_are_narrow_and_follow_the_sign_of_gamma(quantized):
    folded = fold(quantized)
    conv, norm = quantized.model[3].conv, quantized.model[3].bn
    codes = torch.round(conv.weight / conv.weight_quantizer.current_step().reshape(-1, 1, 1, 1)).clamp(-7, 7)
    integer = folded.model[3].conv
    assert isinstance(integer, IntegerConv2d) and integer.weight_codes.dtype is torch.int8
    assert torch.equal(integer.weight_codes.float(), codes * torch.sign(norm.weight).reshape(-1, 1, 1, 1))
    assert integer.weight_codes.abs().max() == 7
    assert not integer.weight_codes[1].any() and integer.weight_scale[1] > 0  # gamma = 0


def test_folded_concat_has_a_step_per_branch(quantized):
    model = copy.deepcopy(quantized)
    with torch.no_grad():
        model.model[12].balance.logits.copy_(torch.tensor([0.5, -0.5]))
    folded = fold(model)
    grids = folded.model[12].balance
    assert isinstance(grids, BranchGrids) and folded.model[13].input_quantizer is None
    step = model.model[13].input_quantizer.integer().step
    for grid, factor in zip(grids.grids, model.model[12].balance.factors(), strict=True):
        torch.testing.assert_close(grid.grid.step, step / factor.detach())
        torch.testing.assert_close(grid.grid.output_step, step)
    halves = torch.cat([grid.inverse_equalizer for grid in grids.grids])
    assert torch.equal(halves, model.model[13].input_quantizer.inverse_equalizer)


def test_gabfusion_adds_nothing_to_the_folded_network():
    def structure(gabfusion):
        model = prepare(random_model(), build_config("lsq", 4, gabfusion=gabfusion))
        calibrate(model, [images()])
        folded = fold(model)
        return [type(m).__name__ for m in folded.modules()], sum(b.numel() for b in folded.buffers())

    assert structure(None) == structure(True)


def test_fold_refuses_what_is_not_ready(quantized):
    with pytest.raises(UserError, match="not quantized"):
        fold(random_model())
    with pytest.raises(UserError, match="no range yet"):
        fold(prepare(random_model(), build_config("lsq", 4)))
    model = copy.deepcopy(quantized)
    set_strength(model, 0.5)
    with pytest.raises(UserError, match="middle of the schedule"):
        fold(model)


def test_refusals():
    with pytest.raises(UserError, match="quantized already"):
        prepare(prepare(random_model(), build_config("lsq", 4)), build_config("lsq", 4))
    with pytest.raises(UserError, match="matches no convolution"):
        prepare(random_model(), QuantConfig.from_dict({"layers": {"nothing.*": {"weight_bits": 8}}}))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(UserError, match="no Concat"):
        prepare(plain, build_config("lsq", 4, gabfusion=True), torch.zeros(1, 3, 16, 16))


def test_overrides_by_regular_expression():
    config = QuantConfig.from_dict({"layers": {r"model\.2\..*": {"weight_bits": 6, "activation_bits": 5}}})
    model = prepare(random_model(), config)
    assert model.model[2].cv3.conv.weight_quantizer.bits == 6 and model.model[2].input_quantizer.bits == 5
    assert model.model[3].conv.weight_quantizer.bits == 4


def test_readers_of_different_bits_get_a_quantizer_each():
    model = prepare(
        random_model(), QuantConfig.from_dict({"layers": {r"model\.13\.cv2\.conv": {"activation_bits": 8}}})
    )
    block = model.model[13]
    assert block.input_quantizer is None
    assert (block.cv1.conv.input_quantizer.bits, block.cv2.conv.input_quantizer.bits) == (4, 8)


def test_steps_are_outside_weight_decay_and_inside_the_ema(quantized):
    model = copy.deepcopy(quantized).train()
    optimizer = build_optimizer(model, "SGD", 0.1, 0.0, 0.5)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for quantizer in quantizers(model).values():
        for parameter in quantizer.parameters():
            assert id(parameter) in known and id(parameter) not in decayed
    ema = ModelEMA(model, decay=0.5, tau=1e-9)
    before = model.model[5].conv.input_quantizer.step.item()
    with torch.no_grad():
        model.model[5].conv.input_quantizer.step.mul_(3)
    ema.update(model)
    assert ema.ema.model[5].conv.input_quantizer.step.item() == pytest.approx(2 * before)


def test_ema_moves_a_shared_quantizer_once():
    model = prepare(random_model(), QuantConfig.from_dict({"detect_bits": 4}))
    shared = model.model[18].conv.input_quantizer
    assert shared is model.detect.m[0].input_quantizer
    ema = ModelEMA(model, decay=0.5, tau=1e-9)
    with torch.no_grad():
        shared.step.fill_(3.0)  # it was 1
    ema.update(model)
    assert ema.ema.model[18].conv.input_quantizer.step.item() == pytest.approx(2.0)


def test_checkpoint_round_trip_keeps_every_quantizer_state(quantized, tmp_path):
    model = copy.deepcopy(quantized)
    with torch.no_grad():
        model.model[12].balance.logits.copy_(torch.tensor([0.2, -0.3]))
    file = tmp_path / "q.pt"
    content = {
        "model_yaml": model.yaml,
        "names": {i: str(i) for i in range(4)},
        "stride": model.stride.tolist(),
        "model": model.state_dict(),
        "quantization": model.quantization,
    }
    save_checkpoint(content, file)
    restored = model_from_checkpoint(load_checkpoint(file)).eval()
    x = images(2)
    torch.testing.assert_close(restored(x)[0], model(x)[0], rtol=0, atol=0)
    assert torch.equal(restored.state_dict()["model.12.balance.logits"], torch.tensor([0.2, -0.3]))


def test_training_step_gives_every_parameter_a_gradient(quantized):
    model = copy.deepcopy(quantized).train()
    set_strength(model, 0.5)
    sum(level.square().mean() for level in model(images())).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert (model.model[12].balance.energy > 0).all()


def test_calibration_names_the_layer_that_is_not_finite():
    model = prepare(random_model(), build_config("lsq", 4))
    with torch.no_grad():
        model.model[4].cv1.conv.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.4\.cv1\.conv"):
        calibrate(model, [images()])


@pytest.mark.parametrize("method", ["lsq", "pact", "dsq", "n2uq"])
def test_the_range_rule_sets_the_activations_and_leaves_the_weights(method, tmp_path):
    steps, recipe = {}, tmp_path / "recipe.yaml"
    for rule in ("mse", "percentile", "max"):
        recipe.write_text(f"calibration: {{range: {rule}}}\n", encoding="utf-8")
        model = prepare(random_model(), build_config(method, 3, recipe=str(recipe)))
        calibrate(model, [images()])
        layer = model.model[3].conv
        steps[rule] = layer.input_quantizer.current_step().item()
        steps[rule, "weight"] = layer.weight_quantizer.current_step().clone()
    assert steps["mse"] < steps["percentile"] < steps["max"]
    assert torch.equal(steps["mse", "weight"], steps["max", "weight"])
    with pytest.raises(UserError, match=r"calibration\.range.*entropy"):
        QuantConfig.from_dict({"calibration": {"range": "entropy"}}, "a test")


def test_concat_without_fusion_module_is_unchanged():
    assert isinstance(random_model().model[12], Concat) and random_model().model[12].balance is None
