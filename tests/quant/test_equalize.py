"""Equalization: its formula, that it changes nothing but rounding, where it stays away, and that files carry it out."""

import copy

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_detector import float_detector, images
from torch import nn

from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.equalize import RANGE, equalizing_factors, quantizer_readers
from quant.export_head import matrix_head
from quant.fold import BranchGrids, EqualizedGrid, fold
from quant.layers import QuantConv2d
from quant.lsq import LSQ
from quant.onnx_graph import DOMAIN, build, hoist_factors, remove_unused, trace, traceable
from quant.prepare import model_from_checkpoint, prepare, quantizers, set_enabled
from quant.primitives import activation_grid
from quant.registry import QUANTIZERS


def config(**activation):
    blocks = {"activation": {"bits": 4, **activation}}
    return QuantConfig.from_dict(blocks)


def quantized(**activation):
    model = prepare(float_detector(), config(**activation))
    calibrate(model, [images(4, seed=2)])
    return model.eval()


def equalized_quantizers(model):
    return {name: q for name, q in quantizers(model).items() if q.inverse_equalizer is not None}


def test_factors_are_roots_of_magnitudes_about_their_geometric_mean():
    magnitudes = torch.tensor([1.0, 4.0, 16.0, 0.0])
    torch.testing.assert_close(equalizing_factors(magnitudes, 0.5), torch.tensor([0.5, 1.0, 2.0, 1.0]))
    torch.testing.assert_close(equalizing_factors(magnitudes, 1.0), torch.tensor([0.25, 1.0, 4.0, 1.0]))
    torch.testing.assert_close(equalizing_factors(magnitudes, 0.0), torch.ones(4))
    torch.testing.assert_close(equalizing_factors(torch.zeros(3), 0.5), torch.ones(3))  # nothing passes: nothing moves
    extreme = equalizing_factors(torch.tensor([1e-20, 1.0, 1e20]), 1.0)
    torch.testing.assert_close(extreme, torch.tensor([1 / RANGE, 1.0, RANGE]))


def test_with_quantizers_off_the_network_is_the_float_one():
    model, reference = quantized(), float_detector()
    factors = torch.cat([1 / q.inverse_equalizer.flatten() for q in equalized_quantizers(model).values()])
    assert factors.max() > 1.5 and factors.min() < 0.67  # it did something
    set_enabled(model, False)
    batch = images(2, seed=5)
    with torch.no_grad():
        ours, theirs = model(batch)[0], reference.eval()(batch)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_channels_of_different_sizes_lose_less():
    def error(exponent):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 1)).eval()
        net[0].weight.data *= torch.logspace(-1, 1, 8).reshape(-1, 1, 1, 1)
        net[1].weight.data /= torch.logspace(-1, 1, 8).reshape(1, -1, 1, 1)  # the small channels matter as much
        batch = torch.rand(2, 3, 12, 12)
        exact = net(batch)
        settings = {"weight": {"bits": 8}, "activation": {"bits": 4, "equalization": exponent}}
        prepare(net, QuantConfig.from_dict(settings | {"detect_bits": 8}), batch)
        calibrate(net, [batch])
        return float((net(batch) - exact).detach().square().mean())

    assert error(0.5) < 0.5 * error(0.0)


@pytest.mark.parametrize("method", sorted(QUANTIZERS))
def test_every_method_quantizes_the_scaled_input(method):
    quantizer = QUANTIZERS[method].for_activations(4, "affine", QUANTIZERS[method].Options())
    x = torch.randn(2, 3, 5, 5)
    factors = torch.tensor([0.5, 1.0, 3.0]).reshape(3, 1, 1)
    quantizer.initialise(x * factors)
    expected = quantizer.eval()(x * factors)
    quantizer.add_equalizer(3)
    quantizer.inverse_equalizer.copy_(factors)
    assert torch.equal(quantizer(x), expected)
    torch.testing.assert_close(quantizer.in_own_scale(x), expected / factors)
    quantizer.enabled = False
    assert torch.equal(quantizer(x), x * factors)  # the weights behind expect it so


def test_a_gradient_passes_with_the_factor():
    quantizer = LSQ(8, activation_grid(8, "affine"), "affine")
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    quantizer.initialise(x)
    quantizer.add_equalizer(2)
    quantizer.inverse_equalizer.copy_(torch.tensor([0.25, 0.5]).reshape(2, 1, 1))
    quantizer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.25, 0.5]).reshape(2, 1, 1).expand(2, 2, 4, 4))


def test_it_stays_away_where_it_would_be_wrong_or_useless():
    model = quantized()
    names = equalized_quantizers(model)
    detect = model.model[-1]
    assert names and all(q.bits < 8 for q in names.values())
    assert all(conv.input_quantizer.inverse_equalizer is None for conv in detect.m)
    bottleneck = model.model[4].m[0]  # its shortcut adds what its slot quantized
    assert bottleneck.add and bottleneck.input_quantizer.inverse_equalizer is None
    assert model.model[4].input_quantizer.inverse_equalizer is not None
    assert model.model[6].cv2.conv.input_quantizer.inverse_equalizer is None  # SPPF's pools share their codes
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    prepare(grouped, config(), torch.rand(1, 3, 8, 8))
    assert not equalized_quantizers(grouped)


@pytest.mark.parametrize("same_input", [True, False])
def test_weights_that_two_convolutions_share_are_multiplied_once_or_not_at_all(same_input):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.two.weight, self.last = self.one.weight, nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.stem(x).sigmoid()
            return self.last(self.one(x) + self.two(x if same_input else x.square()))

    torch.manual_seed(0)
    batch = torch.rand(2, 3, 8, 8)
    model = Tied().eval()
    model.stem.weight.data *= torch.logspace(-1, 1, 8).reshape(-1, 1, 1, 1)
    exact = model(batch)
    prepare(model, config(), batch)
    calibrate(model, [batch])
    set_enabled(model, False)
    torch.testing.assert_close(model(batch), exact, rtol=1e-4, atol=1e-5)
    assert (model.one.input_quantizer.inverse_equalizer is not None) == same_input


@pytest.mark.parametrize(
    "blocks",
    [
        {"activation": {"equalization": 0.0}},
        {"activation": {"output": 8}},
        {"target": "tensorrt"},
        {"gabfusion": {"fold": "finetune"}},
        {"gabfusion": {"fold": "keep"}},
    ],
)
def test_it_can_be_off(blocks):
    assert not equalized_quantizers(prepare(float_detector(), QuantConfig.from_dict(blocks)))
    assert QuantConfig.from_dict({"gabfusion": True}).equalizes


def test_a_second_calibration_takes_the_first_factors_back():
    model, reference = quantized(), float_detector()
    calibrate(model, [images(4, seed=2) * 0.3])
    weights = {name: module.weight for name, module in reference.named_modules() if isinstance(module, nn.Conv2d)}
    readers = quantizer_readers(model, images(1))
    names = {module: name for name, module in model.named_modules()}
    for quantizer in equalized_quantizers(model).values():
        for conv in readers[quantizer]:
            back = conv.weight * quantizer.inverse_equalizer.reshape(1, -1, 1, 1)
            torch.testing.assert_close(back, weights[names[conv]], rtol=1e-5, atol=1e-7)


def test_readers_are_the_convolutions_behind_a_quantizer():
    model = quantized()
    readers = quantizer_readers(model, images(1))
    block = model.model[2]
    assert readers[block.input_quantizer] == [block.cv1.conv, block.cv2.conv]
    assert readers[model.model[3].conv.input_quantizer] == [model.model[3].conv]
    convolutions = [module for module in model.modules() if isinstance(module, QuantConv2d)]
    assert sorted(map(id, convolutions)) == sorted(id(conv) for convs in readers.values() for conv in convs)


def test_the_folded_network_divides_the_branches_of_a_concat_by_their_own_factors():
    model = quantized()
    folded = fold(model)
    batch = images(2, seed=7)
    with torch.no_grad():
        torch.testing.assert_close(folded(batch)[0], model(batch)[0], rtol=1e-3, atol=5e-2)
    grids = next(module for module in folded.modules() if isinstance(module, BranchGrids))
    assert all(isinstance(grid, EqualizedGrid) for grid in grids.grids)
    assert not torch.equal(grids.grids[0].inverse_equalizer[:4], grids.grids[1].inverse_equalizer[:4])


def test_in_the_file_codes_are_concatenated_pooled_and_repeated_not_floats():
    graph = build(trace(traceable(matrix_head(fold(quantized()))), images(1))).model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    factors = {tensor.name for tensor in graph.initializer if tensor.dims[1:] == [1, 1] and len(tensor.dims) == 3}
    multiplied = [node.input[0] for node in graph.node if node.op_type == "Mul" and node.input[1] in factors]
    read = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(multiplied) > 5
    operators = {made_by[name].op_type for name in [*multiplied, *read] if name in made_by}
    assert not operators & {"Concat", "MaxPool", "Resize"}, operators


@pytest.mark.parametrize("factor, order", [(0.5, ["Mul", "MaxPool"]), (-0.5, ["MaxPool", "Mul"])])
def test_a_negative_factor_of_the_networks_own_stays_behind_a_maximum(factor, order):
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4, 4])
    nodes = [helper.make_node("MaxPool", ["x"], ["pooled"], kernel_shape=[2, 2])]
    nodes.append(helper.make_node("Mul", ["pooled", "factor"], ["scaled"]))
    nodes.append(helper.make_node("ActivationGrid", ["scaled"], ["y"], domain=DOMAIN))
    values = numpy_helper.from_array(np.full((2, 1, 1), factor, np.float32), "factor")
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "pool", [shape], [result], [values])
    hoist_factors(graph)
    remove_unused(graph)
    assert [node.op_type for node in graph.node] == [*order, "ActivationGrid"]


def test_checkpoints_from_before_are_read_without_it():
    model = float_detector()
    settings = QuantConfig.from_dict({"activation": {"equalization": 0.0}})
    prepare(model, settings)
    calibrate(model, [images(2)])
    saved = settings.to_dict()
    del saved["activation"]["equalization"], saved["distillation"]["boxes"]
    checkpoint = {"model_yaml": copy.deepcopy(model.yaml), "model": model.state_dict(), "names": model.names}
    restored = model_from_checkpoint(checkpoint | {"quantization": saved})
    assert not equalized_quantizers(restored)
    assert QuantConfig.from_saved(saved, "here").distillation.boxes == 0
