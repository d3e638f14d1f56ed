"""Ordinary things that other people's networks do: views, in-place functions, modules that run twice, keywords."""

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

from quant import Concat, QuantConfig, UserError, build_config, calibrate, export_onnx, fold, prepare
from quant.layers import QuantConv2d
from quant.lsq import FixedGrid
from quant.quantizer import Quantizer
from quant.registry import QUANTIZERS
from quant.report import layer_reports


def ready(model, values, size=16):
    torch.manual_seed(0)
    images = torch.rand(4, 3, size, size)
    prepare(model, QuantConfig.from_dict(values), images[:1])
    calibrate(model, [images])
    return images


@pytest.mark.parametrize("method", ["lsq", "pact", "dsq", "n2uq"])
@pytest.mark.parametrize(
    "view", [lambda t: t.chunk(2, 1)[1], lambda t: t[:, :, ::2, ::2], lambda t: t[:, :1].expand(4, 5, 6, 10)]
)
def test_gradients_of_a_view_are_those_of_its_copy(method, view):
    torch.manual_seed(0)
    kind = QUANTIZERS[method]
    quantizer = kind.for_activations(4, "affine", kind.Options())
    x = view(F.silu(2 * torch.randn(4, 16, 6, 10)))
    quantizer.initialise(x * 0.8)
    upstream = torch.randn(x.shape)
    found = []
    for leaf in (x, x.clone(memory_format=torch.contiguous_format)):
        leaf = leaf.detach().requires_grad_(True)
        quantizer.zero_grad()
        quantizer(leaf).backward(upstream)
        found.append([leaf.grad, *(p.grad.clone() for p in quantizer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output", [None, 8])
def test_activation_functions_may_work_in_place(output):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6),
        nn.SiLU(inplace=True), nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    images = ready(model, {"activation": {"output": output}})
    model.train()
    model(images).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model[0].weight.grad.count_nonzero() > 0


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = torch.relu(self.again(x)) + x
        return self.last(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 2, 1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.last(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize("values", [{}, {"activation": {"output": 8}}, {"target": "tensorrt"}])
@pytest.mark.parametrize("network", [Recurrent, Tied])
def test_a_convolution_that_runs_again_is_exported(network, values, tmp_path):
    torch.manual_seed(1)
    model = network()
    images = ready(model, values)
    assert export_onnx(fold(model.eval()), tmp_path / "n.onnx", images[:1]).holds


def test_operations_of_a_convolution_that_runs_again_are_all_counted():
    model = Recurrent()
    images = ready(model, {})
    macs = {report.name: report.macs for report in layer_reports(model, [images, images[:2]])}
    assert macs == {"first": 3 * 8 * 9 * 14 * 14, "again": 3 * 8 * 8 * 9 * 14 * 14, "last": 8 * 2 * 14 * 14}


@pytest.mark.parametrize(
    "change",
    [torch.nn.utils.weight_norm, lambda conv: torch.nn.utils.prune.l1_unstructured(conv, "weight", 0.5)],
    ids=["weight norm", "pruning"],
)
def test_a_weight_that_is_computed_stays_float_and_is_named(change, capsys):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), change(nn.Conv2d(4, 4, 3)))
    ready(model, {})
    assert isinstance(model[0], QuantConv2d) and type(model[2]) is nn.Conv2d
    assert "1 layers stay float: 2 (Conv2d)" in capsys.readouterr().out


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.pool, self.b = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.b(input=self.pool(input=self.a(input=x)))


@pytest.mark.parametrize("output", [None, 8])
def test_modules_may_be_called_with_keywords(output):
    model = Keywords()
    images = ready(model, {"activation": {"output": output}})
    assert isinstance(model.a.input_quantizer, FixedGrid)
    torch.testing.assert_close(fold(model.eval())(images), model(images), rtol=0, atol=0.05)


class ImageLast(nn.Module):
    """One convolution reads a feature map first and the image later."""

    def __init__(self):
        super().__init__()
        self.lift, self.shared, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.shared(5 * self.lift(x)) + self.shared(x))


def test_the_images_grid_is_not_used_for_features():
    model = ImageLast()
    ready(model, {})
    assert isinstance(model.lift.input_quantizer, FixedGrid)
    assert not isinstance(model.shared.input_quantizer, FixedGrid)


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.cat = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1), Concat()
        self.c = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        x = self.a(x)
        y = self.b(self.cat([x, torch.relu(x)]))
        return self.c(self.cat([x, y, torch.relu(y)]))


def test_refusals_say_what_to_do():
    image = torch.rand(1, 3, 8, 8)
    with pytest.raises(UserError, match=r"cat: this Concat runs 2 times, .* make a module for each"):
        prepare(Skips(), build_config("lsq", 4, gabfusion=True), image)
    with pytest.raises(UserError, match="resolve_auto_bits"):
        prepare(Skips(), build_config("lsq", "auto:3.0"), image)
    with pytest.raises(UserError, match="example is a tuple: only networks that read one tensor"):
        prepare(Skips(), build_config("lsq", 4), (image, image))
    with pytest.raises(UserError, match=r"lsq\+ is affine by definition; take lsq"):
        QuantConfig.from_dict({"method": "lsq+", "target": "tensorrt"})


def test_values_that_are_not_finite_are_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    prepare(model, build_config("lsq", 4), torch.rand(1, 3, 8, 8))
    with pytest.raises(UserError, match="the network's input has values that are not finite"):
        calibrate(model, [torch.full((1, 3, 8, 8), torch.inf)])
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"1.weight: .* 8 values of which 7 are finite.*sound"):
        calibrate(model, [torch.rand(1, 3, 8, 8)])
    with torch.no_grad():
        model[1].weight.fill_(0.5)
    calibrate(model, [torch.rand(1, 3, 8, 8)])
    with torch.no_grad():
        model[1].input_quantizer.step.fill_(torch.nan)
    with pytest.raises(UserError, match=r"1\.input_quantizer: its parameters are not finite, training diverged"):
        fold(model.eval())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_halved_network_runs(dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    images = ready(model, {"weight": {"bits": 8}, "activation": {"bits": 8}})
    expected = model(images)
    halved = model.to(dtype)
    assert halved[3].input_quantizer.step.dtype is torch.float32
    torch.testing.assert_close(halved(images.to(dtype)).float(), expected, rtol=0.1, atol=0.1)


def test_training_without_calibration_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(Quantizer, "_warned", False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    images = torch.rand(2, 3, 8, 8)
    prepare(model, build_config("lsq", 4), images)
    model.eval()(images)
    assert "calibrate" not in capsys.readouterr().out
    model.train()(images)
    model(images)
    assert capsys.readouterr().out.count("Call quant.calibrate(model, batches)") == 1
    monkeypatch.setattr(Quantizer, "_warned", False)
    calibrate(model, [images])
    model(images)
    restored = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    prepare(restored, build_config("lsq", 4), images).load_state_dict(model.state_dict())
    restored(images)
    assert "calibrate" not in capsys.readouterr().out
