"""Folding what the methods may bring along: thresholds, half-level and full weight grids, output quantizers."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from small_detector import TINY, TINY_SIDE, assert_verified, float_detector, folded_and_file, images, tiny_detector
from torch import nn

from models.yolo import Detect
from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.fold import ActivationGrid, BranchGrids, IntegerConv2d, container_bits, fold
from quant.layers import QuantBatchNorm2d, QuantConv2d
from quant.lsq import LSQ
from quant.prepare import prepare, quantizers
from quant.primitives import Grid
from quant.quantizer import IntegerForm, Quantizer
from quant.registry import QUANTIZERS
from quant.verify import references, verify
from utils.errors import UserError


class UnevenSteps(Quantizer):
    """A stand-in with thresholds: intervals grow from left to right; three levels lie below zero."""

    def __init__(self, bits, grid, scheme, channels=None):
        super().__init__(bits, grid, scheme, channels)
        self.thresholds = nn.Parameter(torch.arange(1.0, grid.levels))
        self.register_buffer("step", torch.ones(1))

    @classmethod
    def for_weights(cls, bits, channels, options):
        return LSQ.for_weights(bits, channels, options)

    def set_range(self, x):
        share = torch.arange(1, self.grid.levels) / self.grid.levels
        self.thresholds.copy_(x.min() + (x.max() - x.min()) * share**1.5)
        self.step.copy_((x.max() - x.min()) / self.grid.levels)

    def quantize(self, x):
        form = self.integer()
        return x + (form.values(form.codes(x)) - x).detach() + 0 * self.thresholds.sum()

    def current_step(self):
        return self.step

    def integer(self):
        zero_point = self.grid.qmin + min(3, self.grid.levels - 2)
        return IntegerForm(self.step.clone(), zero_point, self.grid, self.thresholds.detach().clone())


class OtherWeights(Quantizer):
    """A stand-in for weight grids beyond the narrow one; subclasses choose it."""

    half_levels = False

    def __init__(self, bits, grid, scheme, channels=None):
        super().__init__(bits, grid, scheme, channels)
        self.step = nn.Parameter(torch.ones(channels or 1))

    @classmethod
    def for_activations(cls, bits, scheme, options):
        return LSQ.for_activations(bits, scheme, options)

    def set_range(self, x):
        self.step.copy_((-x.reshape(len(self.step), -1)).amax(1).abs().clamp_min(1e-3) / -self.grid.qmin)

    def quantize(self, x):
        form = self.integer()
        return x + (form.values(form.codes(x)) - x).detach() + 0 * self.step.sum()

    def current_step(self):
        return self.step

    def integer(self):
        return IntegerForm(self.step.detach().clone(), 0, self.grid, odd=self.half_levels)


class HalfLevels(OtherWeights):
    half_levels = True

    @classmethod
    def for_weights(cls, bits, channels, options):
        bits = min(bits, 7)
        return cls(bits, Grid(-(2**bits - 1), 2**bits - 1), "signed", channels)


class FullGrid(OtherWeights):
    @classmethod
    def for_weights(cls, bits, channels, options):
        return cls(bits, Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), "signed", channels)


@pytest.fixture
def stand_ins(monkeypatch):
    for name, kind in (("uneven", UnevenSteps), ("half", HalfLevels), ("full", FullGrid)):
        monkeypatch.setitem(QUANTIZERS, name, kind)


def optimized_operators(model, path):
    """What onnxruntime makes of the file on this machine."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(str(path)).graph.node]


# --- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0), (1.3, 0), (0.7, 5), (1.1, -40)])
@pytest.mark.parametrize("grid", [Grid(0, 15), Grid(-8, 7)])
def test_thresholds_take_the_factor_and_the_shift_of_a_fusion(factor, shift, grid):
    thresholds = torch.sort(torch.randn(15, generator=torch.Generator().manual_seed(0))).values
    form = IntegerForm(torch.tensor([0.25]), grid.qmin + 3, grid, thresholds)
    constants = ActivationGrid(form, 4, torch.tensor(factor), shift)
    x = torch.linspace(-15, 15, 3001)
    seen = x.double() * factor + shift * 0.25
    counts = (seen[:, None] >= thresholds.double()).sum(1)
    away = ((seen[:, None] - thresholds.double()).abs() > 1e-5).all(1)
    assert away.sum() > 2900 and len(counts.unique()) == 16
    assert torch.equal(constants.codes(x)[away], counts[away].float())
    assert torch.equal(constants(x)[away], (counts[away] - 3) * torch.tensor(0.25))
    assert constants.grid == Grid(0, 15)


@pytest.mark.parametrize("uneven", [False, True])
def test_distance_is_how_far_a_value_must_move_to_change_its_code(uneven):
    thresholds = torch.tensor([-1.0, 0.0, 0.0, 4.0]) if uneven else None
    form = IntegerForm(torch.tensor([0.5]), 1, Grid(0, 4), thresholds)
    constants = ActivationGrid(form, 3)
    x = torch.tensor([0.1, 0.1, 0.1, -9.0])
    ours = constants.codes(x)
    theirs = torch.tensor([4.0, 0.0, 2.0, 1.0])
    assert ours.tolist() == ([3, 3, 3, 0] if uneven else [1, 1, 1, 0])
    boundaries = [4.0, -1.0, 0.0, -1.0] if uneven else [1.25, -0.25, 0.25, -0.25]
    if not uneven:
        x[3] = -0.75  # a uniform grid clips: half a step below its lowest level nothing is further away
    wanted = [abs(value - boundary) / 0.5 for value, boundary in zip(x.tolist(), boundaries, strict=True)]
    assert constants.distance(x, ours, theirs).tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_thresholds_reach_the_file(stand_ins, bits):
    model = tiny_detector("uneven", bits, 1, gabfusion=True, detect_bits=6)
    folded, file, result = assert_verified(model)
    assert any(isinstance(module, BranchGrids) for module in folded.modules())
    assert result.quantizers.different == 0, "comparisons are exact"
    operators = [node.op_type for node in file.model.graph.node]
    assert operators.count("GreaterOrEqual") > 3 * (2**bits - 1)
    assert operators.count("Gather") == 1, "63 thresholds in front of Detect"


def test_verification_sees_a_moved_threshold(stand_ins):
    model = tiny_detector("uneven", 4)
    folded, file = folded_and_file(model)
    grid = next(m for m in folded.modules() if isinstance(m, ActivationGrid) and m.thresholds is not None)
    grid.thresholds[4] += 0.2 * (grid.thresholds[5] - grid.thresholds[4])
    result = verify(folded, file, references(folded, [images(1, TINY_SIDE, TINY_SIDE)[0]]))
    assert not result.holds and result.quantizers.unexplained and result.layers.unexplained


# --- weight grids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "bits"), [([0], 1), ([-1], 1), ([1], 2), ([-8, 7], 4), ([8], 5), ([-9], 5), ([-15, 15], 5), ([-128], 8)]
)
def test_container_bits(codes, bits):
    assert container_bits(torch.tensor(codes, dtype=torch.int8)) == bits


@pytest.mark.parametrize("method", ["half", "full"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_other_weight_grids_fold_and_flip_exactly(stand_ins, method, bits):
    model = tiny_detector(method, bits)
    folded = fold(model)
    signs = set()
    for name, integer in folded.named_modules():
        if not isinstance(integer, IntegerConv2d):
            continue
        conv = model.get_submodule(name)
        gain = torch.ones(len(conv.weight), dtype=torch.float64)
        if name.endswith("conv"):
            norm = model.get_submodule(name.removesuffix("conv") + "bn")
            gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        form = conv.weight_quantizer.integer()
        expected = form.values(form.codes(conv.weight)).double() * gain.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(integer.weight().double(), expected, rtol=1e-6, atol=0)
        assert integer.weight_bits == conv.weight_quantizer.bits
        signs.update(torch.sign(integer.weight_scale).tolist())
    assert signs == ({1.0, -1.0} if method == "full" else {1.0}), "+128 needs a negative scale"


@pytest.mark.parametrize("method", ["half", "full"])
def test_other_weight_grids_reach_both_files(stand_ins, method):
    model = tiny_detector(method, 4)
    folded, _, _ = assert_verified(model)
    _, storage, _ = assert_verified(model, int4_weights=True)
    stored = {tensor.name: tensor for tensor in storage.model.graph.initializer}
    kinds = set()
    for name, module in folded.named_modules():
        if isinstance(module, IntegerConv2d):
            tensor = stored[f"{name}.weight"]
            codes = numpy_helper.to_array(tensor).astype(np.int8)
            np.testing.assert_array_equal(codes, module.weight_codes.numpy())
            small = codes.min() >= -8 and codes.max() <= 7
            assert tensor.data_type == (TensorProto.INT4 if small else TensorProto.INT8)
            kinds.add((module.weight_bits, tensor.data_type))
    assert (4, TensorProto.INT8) in kinds, "a 4-bit layer whose codes need a byte"


# --- output quantizers ------------------------------------------------------------------------------------------------


def test_output_quantizers_stand_behind_every_batch_norm_but_not_behind_detect():
    plain, model = float_detector(TINY), tiny_detector(activation={"output": 8})
    assert set(plain.state_dict()) <= set(model.state_dict())
    assert all("quantizer" in key for key in set(model.state_dict()) - set(plain.state_dict()))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(isinstance(norm, QuantBatchNorm2d) and norm.output_quantizer.bits == 8 for norm in norms)
    convolutions = [module for module in model.modules() if isinstance(module, QuantConv2d)]
    assert all(conv.output_quantizer is None for conv in convolutions)
    restored = prepare(float_detector(TINY, seed=5), QuantConfig.from_dict(model.quantization))
    restored.load_state_dict(model.state_dict())
    x = images(1, TINY_SIDE, TINY_SIDE)
    assert torch.equal(restored.eval()(x)[0], copy.deepcopy(model)(x)[0])


def test_a_convolution_without_batch_norm_quantizes_its_own_result_unless_the_network_returns_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    example = torch.rand(2, 3, 12, 12)
    prepare(model, QuantConfig.from_dict({"activation": {"output": 8}}), example)
    calibrate(model, [example])
    assert model[0].output_quantizer is not None and isinstance(model[3], QuantBatchNorm2d)
    assert model[2].output_quantizer is None and model[4].output_quantizer is None
    folded = fold(model.eval(), example)
    assert [layer.output_quantizer is not None for layer in (folded[0], folded[2], folded[4])] == [True, True, False]
    with torch.no_grad():
        torch.testing.assert_close(folded(example), model(example), rtol=0.02, atol=0.02)


def test_output_quantizers_learn():
    model = tiny_detector(activation={"output": 8}).train()
    sum(level.square().mean() for level in model(images(2, TINY_SIDE, TINY_SIDE))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_folding_puts_the_batch_norm_between_convolution_and_output_quantizer():
    model = tiny_detector(activation={"output": 8})
    folded = fold(model)
    seen = []
    model.model[1].conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.model[1].bn.register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        model(images(4, TINY_SIDE, TINY_SIDE))
        x, expected = seen
        actual = folded.model[1].conv(x)
    grid = folded.model[1].conv.output_quantizer
    steps = ((actual - expected) / grid.output_step).round().abs()
    # The bias is rounded to 1/16 of what one product of codes counts; to whole ones, every tenth code would change.
    assert steps.max() <= 1 and (steps > 0).float().mean() < 0.02
    assert expected.unique().numel() > 50
    integer = folded.model[1].conv
    assert integer.multiplier == 16 and integer.bias_codes.dtype == torch.int32
    unit = model.model[1].conv.input_quantizer.current_step() * integer.weight_scale / 16
    torch.testing.assert_close(integer.bias_scale, unit)


def test_a_bias_that_leaves_32_bits_takes_a_larger_weight_step():
    model = tiny_detector(activation={"output": 8})
    norm = model.model[1].bn
    norm.weight.data[2] = 1e-9
    norm.bias.data[2] = 0.5
    integer = fold(model).model[1].conv
    assert integer.bias[2] == pytest.approx(0.5 - 1e-9 * float(norm.running_mean[2]), rel=1e-6)
    assert integer.weight()[2].abs().max() < 1e-6
    assert (integer.bias_codes.abs() < 2**31 - 1).all() and integer.bias_codes[2].abs() > 2**28


@pytest.mark.parametrize("method", ["lsq", "uneven", "half"])
def test_the_runtime_computes_output_quantized_convolutions_in_integers(stand_ins, method, tmp_path):
    model = tiny_detector(method, activation={"bits": 4, "output": 8}, gabfusion=True)
    folded, file, _ = assert_verified(model)
    assert_verified(model, int4_weights=True)
    operators = optimized_operators(file.model, tmp_path / "optimized.onnx")
    detect = sum(len(module.m) for module in model.modules() if isinstance(module, Detect))
    convolutions = sum(isinstance(module, IntegerConv2d) for module in folded.modules())
    assert operators.count("QLinearConv") == convolutions - detect and operators.count("Conv") == detect
    plain = optimized_operators(folded_and_file(tiny_detector(method))[1].model, tmp_path / "plain.onnx")
    assert "QLinearConv" not in plain


# --- TensorRT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_for_tensorrt_all_zero_points_are_zero_and_all_codes_int8(bits):
    model = tiny_detector("lsq", bits, target="tensorrt", gabfusion=True)
    image = model.model[0].conv.input_quantizer
    assert image.integer().step.item() == pytest.approx(1 / 127) and image.integer().zero_point == 0
    assert torch.equal(image.integer().codes(torch.tensor([0.0, 0.5019, 1.0])), torch.tensor([0.0, 64.0, 127.0]))
    for quantizer in quantizers(model).values():
        assert quantizer.integer().zero_point == 0 and quantizer.grid.qmin < 0
    _, file, _ = assert_verified(model)
    graph = file.model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) == 3:
            assert constants[node.input[2]].dtype == np.int8 and not constants[node.input[2]].any()
        if node.op_type == "QuantizeLinear":
            readers = {reader.op_type for reader in graph.node if node.output[0] in reader.input}
            assert readers == {"DequantizeLinear"} and len(node.input) == 3
        if node.op_type == "Conv":
            assert all(made_by[name].op_type == "DequantizeLinear" for name in node.input[:2])
    assert not {np.dtype(np.uint8)} & {constant.dtype for constant in constants.values()}


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"activation": {"scheme": "affine"}}, "leave the scheme out, or set it to signed"),
        ({"activation": {"scheme": "unsigned"}}, "leave the scheme out, or set it to signed"),
        ({"activation": {"output": 8}}, "activation.output would tear apart; leave it out"),
        ({"method": "uneven"}, "thresholds of method uneven; take another method, or target: onnxruntime"),
        ({"options": {"paper": True}}, "set options.paper to false"),
        ({"gabfusion": {"fold": "finetune"}}, "set gabfusion.fold to anneal"),
    ],
)
def test_what_tensorrt_cannot_run_is_refused_before_training(stand_ins, keys, reason):
    QuantConfig.from_dict({"target": "tensorrt"})
    with pytest.raises(UserError, match="target: tensorrt") as caught:
        QuantConfig.from_dict({"target": "tensorrt"} | keys)
    assert reason in " ".join(str(caught.value).split())


def test_output_quantizers_refuse_signed_inputs():
    with pytest.raises(UserError, match="set scheme to affine or unsigned"):
        QuantConfig.from_dict({"activation": {"scheme": "signed", "output": 8}})
