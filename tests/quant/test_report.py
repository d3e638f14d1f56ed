"""The report's figures against plain NumPy on captured tensors, its totals, its files and its command."""

import csv
import dataclasses
from collections import defaultdict

import numpy as np
import pytest
import torch
from small_detector import SMALL, float_detector, images, quantized_detector, save
from torch import nn
from torch.nn import functional as F

from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.fold import fold
from quant.layers import QuantConv2d
from quant.prepare import prepare
from quant.primitives import Grid
from quant.quantizer import IntegerForm, Quantizer
from quant.recipe import build_config
from quant.report import (
    LayerReport,
    float_bytes,
    format_report,
    grid_limits,
    layer_reports,
    main,
    quantized_bytes,
    totals,
    write_csv,
    write_tensorboard,
)
from utils.checkpoint import load_checkpoint

BATCHES = [images(3, seed=5), images(2, seed=6)]


def read_csv(file):
    """The layers in a file of ``write_csv``, without its totals."""
    kinds = {field.name: str(field.type).split(" ")[0] for field in dataclasses.fields(LayerReport)}
    readers = {"int": int, "float": float, "str": str}
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["name"] not in ("total", "float")]
    return [
        LayerReport(**{k: None if v == "" and kinds[k] != "str" else readers[kinds[k]](v) for k, v in row.items()})
        for row in rows
    ]


@pytest.fixture(scope="module")
def model():
    return quantized_detector(4)


@pytest.fixture(scope="module")
def reports(model):
    return {report.name: report for report in layer_reports(model, BATCHES)}


def decibels(exact, quantized):
    exact, quantized = exact.astype(np.float64), quantized.astype(np.float64)
    return 10 * np.log10((exact**2).sum() / ((exact - quantized) ** 2).sum())


def by_hand(x, form):
    """Quantized float64 values, and the share outside the grid, by the textbook formula of a uniform grid."""
    step = form.step.double().numpy().reshape(-1, *[1] * (x.ndim - 1)) if form.step.numel() > 1 else form.step.item()
    codes = np.clip(np.rint(x / step) + form.zero_point, form.grid.qmin, form.grid.qmax)
    low, high = (form.grid.qmin - form.zero_point) * step, (form.grid.qmax - form.zero_point) * step
    slack = 1e-4 * step  # the last code's own value, in other floats
    return (codes - form.zero_point) * step, ((x < low - slack) | (x > high + slack)).mean()


def test_weights_equal_numpy(model, reports):
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, QuantConv2d)}
    assert list(reports) == list(convolutions)
    for name, conv in convolutions.items():
        report, form = reports[name], conv.weight_quantizer.integer()
        weight = conv.weight.detach().double().numpy()
        quantized, clipped = by_hand(weight, form)
        assert report.weight_sqnr == pytest.approx(decibels(weight, quantized), abs=1e-3)
        assert report.weight_clipped == pytest.approx(clipped, abs=1e-9)
        assert report.weight_step == pytest.approx(conv.weight_quantizer.step.abs().mean().item())
        assert report.weight_grid == ("-127..127" if report.weight_bits == 8 else "-7..7")
    assert {r.weight_bits for r in reports.values()} == {4, 8}
    assert max(r.weight_clipped for r in reports.values()) > 0.005, "nothing is clipped: the shares are not tested"


def test_inputs_and_outputs_equal_numpy(model, reports):
    """A convolution with its own quantizer, two that share a block's slot, and one behind a Concat."""
    slot, concat = model.model[2].input_quantizer, model.model[10].input_quantizer
    readers = {
        "model.1.conv": ("model.1.conv", model.model[1].conv.input_quantizer),
        "model.2.cv1.conv": ("model.2", slot),
        "model.2.cv2.conv": ("model.2", slot),
        "model.10.cv2.conv": ("model.10", concat),
        "model.14.m.1": ("model.14.m.1", model.detect.m[1].input_quantizer),
    }
    taken = defaultdict(list)
    handles = [
        model.get_submodule(place).register_forward_pre_hook(
            lambda _, inputs, place=place: taken[place].append(inputs[0])
        )
        for place in {place for place, _ in readers.values()}
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    for handle in handles:
        handle.remove()
    for name, (place, quantizer) in readers.items():
        conv, report, form = model.get_submodule(name), reports[name], quantizer.integer()
        parts = [quantizer.equalized(x).double().numpy() for x in taken[place]]
        pairs = [by_hand(x, form) for x in parts]
        flat = np.concatenate([x.ravel() for x in parts])
        assert report.input_sqnr == pytest.approx(
            decibels(flat, np.concatenate([q.ravel() for q, _ in pairs])), abs=0.01
        )
        clipped = sum(share * x.size for x, (_, share) in zip(parts, pairs, strict=True)) / flat.size
        assert report.input_clipped == pytest.approx(clipped, abs=1e-3)
        assert report.activation_step == pytest.approx(form.step.item())
        weight = conv.weight.detach().double()
        rough = torch.from_numpy(by_hand(weight.numpy(), conv.weight_quantizer.integer())[0])
        bias = None if conv.bias is None else conv.bias.detach().double()
        shape = {"stride": conv.stride, "padding": conv.padding}
        exact = [F.conv2d(torch.from_numpy(x), weight, bias, **shape).numpy().ravel() for x in parts]
        found = [F.conv2d(torch.from_numpy(q), rough, bias, **shape).numpy().ravel() for q, _ in pairs]
        assert report.output_sqnr == pytest.approx(decibels(np.concatenate(exact), np.concatenate(found)), abs=0.02)
        assert report.input_sqnr is not None
        if quantizer.inverse_equalizer is None:  # else small weights meet large inputs, and the sums say less
            assert report.output_sqnr < report.weight_sqnr + 1


def test_operations_bits_and_bytes(reports):
    first, middle, last = reports["model.0.conv"], reports["model.2.cv1.conv"], reports["model.14.m.1"]
    assert (first.parameters, first.macs) == (8 * 3 * 9, 8 * 3 * 9 * 32 * 32)
    assert (middle.macs, middle.bops) == (16 * 8 * 16 * 16, 16 * 8 * 16 * 16 * 16)
    # Detect: 3 anchors x (5 + 3) outputs at stride 16, 8 x 8 bits.
    assert (last.parameters, last.macs, last.bops) == (32 * 24, 32 * 24 * 8 * 8 // 4, 32 * 24 * 8 * 8 // 4 * 64)
    assert first.bytes == 8 * 27 + 8 * 8 and middle.bytes == 16 * 8 / 2 + 8 * 8
    assert (first.activation_bits, middle.activation_bits, last.activation_bits) == (8, 4, 8)
    assert first.activation_grid == "0..255 unsigned" and middle.activation_grid == "0..15 affine"


def test_totals_against_the_folded_network(model, reports):
    whole = totals(model, list(reports.values()))
    folded = [m for m in fold(model).modules() if hasattr(m, "weight_codes")]
    expected = sum(m.weight_codes.numel() * m.weight_bits / 8 + m.weight_scale.numel() * 4 for m in folded)
    expected += sum(m.bias.numel() * 4 for m in folded)
    assert whole.bytes == quantized_bytes(model) == pytest.approx(expected, abs=1)
    plain = float_detector().fuse()
    assert whole.float_bytes == float_bytes(model) == sum(p.numel() for p in plain.parameters()) * 4
    assert whole.compression == pytest.approx(whole.float_bytes / whole.bytes) and 3 < whole.compression < 8
    assert whole.bops == sum(r.macs * r.weight_bits * r.activation_bits for r in reports.values())
    assert whole.float_bops == 1024 * whole.macs and 4 < whole.weight_bits < 8
    assert f"{whole.float_bops / whole.bops:.1f} times fewer" in whole.describe()
    assert quantized_bytes(quantized_detector(4, gabfusion=True)) == whole.bytes


def test_without_images_only_what_needs_none(model, reports):
    blind = layer_reports(model)
    assert all(r.macs is r.bops is r.input_sqnr is r.output_sqnr is r.input_clipped is None for r in blind)
    for report in blind:
        assert report.weight_sqnr == reports[report.name].weight_sqnr
        assert report.activation_grid == reports[report.name].activation_grid
    assert totals(model, blind).bops is None and "GBOPs" not in totals(model, blind).describe()
    counted = layer_reports(model, example=torch.zeros(1, 3, 128, 128))
    assert counted[0].macs == 4 * reports["model.0.conv"].macs and counted[0].output_sqnr is None


def test_the_network_is_left_as_it_was():
    model = quantized_detector(4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer_reports(model, BATCHES[:1])
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Thresholds(Quantizer):
    """Levels of unequal width: inputs 0, 1, 3, 7 and up become 0, 1, 2, 3 times 10."""

    def quantize(self, x):
        return (x[..., None] >= torch.tensor([1.0, 3.0, 7.0])).sum(-1).float() * 10

    def current_step(self):
        return torch.tensor([10.0])

    def integer(self):
        return IntegerForm(torch.tensor([10.0]), 0, Grid(0, 3), thresholds=torch.tensor([1.0, 3.0, 7.0]))


class HalfLevels(Quantizer):
    """The four levels -3, -1, 1, 3 times the step of a channel."""

    def quantize(self, x):
        return self.integer().values(self.integer().codes(x))

    def current_step(self):
        return torch.tensor([0.5, 1.0])

    def integer(self):
        return IntegerForm(self.current_step(), 0, Grid(-3, 3), odd=True)


def test_any_quantizer_and_any_network():
    conv = nn.Conv2d(1, 2, 1, bias=False)
    conv.weight.data = torch.tensor([1.4, -3.1]).reshape(2, 1, 1, 1)
    weights, inputs = HalfLevels(2, Grid(-3, 3), "signed", 2), Thresholds(2, Grid(0, 3), "unsigned")
    model = nn.Sequential(QuantConv2d.from_float(conv, weights, inputs), nn.Flatten(), nn.Linear(16, 5))
    x = torch.tensor([-2.0, -0.1, 0.5, 2.0, 6.9, 8.9, 9.5, 30.0]).reshape(1, 1, 2, 4)
    (report,) = layer_reports(model, [x])
    assert (report.weight_grid, report.activation_grid) == ("-3..3 odd", "0..3 thresholds")
    # Levels reach from 1 - 2 / 2 to 7 + 4 / 2: clipped are -2, -0.1, 9.5, 30. Weight -3.1 lies under -3 * 1.
    assert report.input_clipped == 4 / 8 and report.weight_clipped == 1 / 2
    assert [limit.item() for limit in grid_limits(inputs.integer())] == [0, 9]
    assert report.weight_sqnr == pytest.approx(10 * np.log10((1.4**2 + 3.1**2) / (0.1**2 + 0.1**2)), abs=1e-3)
    quantized = np.array([0, 0, 0, 10, 20, 30, 30, 30])
    assert report.input_sqnr == pytest.approx(decibels(x.double().numpy().ravel(), quantized), abs=1e-3)
    assert report.activation_step == 10 and report.bops == 2 * 8 * 2 * 2
    whole = totals(model, [report])
    assert whole.float_bytes - (2 + 2) * 4 == whole.bytes - round(2 * 2 / 8 + 16) == (16 * 5 + 5) * 4


def test_equal_widths_have_the_limits_of_the_uniform_grid():
    step = torch.tensor([0.3])
    thresholds = IntegerForm(step, 0, Grid(0, 15), thresholds=(torch.arange(15) + 0.5) * 0.3)
    for left, right in zip(grid_limits(thresholds), grid_limits(IntegerForm(step, 0, Grid(0, 15))), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheme", ["unsigned", "signed"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_every_scheme_and_granularity(scheme, granularity):
    values = {"activation": {"scheme": scheme}, "weight": {"bits": 3, "granularity": granularity}}
    model = prepare(float_detector(), QuantConfig.from_dict(values))
    calibrate(model, [images(2)])
    report = {r.name: r for r in layer_reports(model, [images(2)])}["model.2.cv1.conv"]
    assert report.activation_grid == ("0..15 unsigned" if scheme == "unsigned" else "-8..7")
    assert report.bytes == 8 * 16 * 3 / 8 + 8 * 4 + (8 if granularity == "channel" else 1) * 4
    assert report.weight_sqnr > 8 and report.input_sqnr > 3


def test_csv_round_trip(model, reports, tmp_path):
    file, rows = tmp_path / "layers.csv", list(reports.values())
    whole = totals(model, rows)
    write_csv(rows, file, whole)
    assert read_csv(file) == rows
    with file.open(newline="") as stream:
        *_, total, plain = csv.DictReader(stream)
    assert (total["name"], plain["name"]) == ("total", "float")
    assert float(total["bytes"]) == whole.bytes and int(total["bops"]) == whole.bops
    assert int(plain["bytes"]) == whole.float_bytes and int(plain["weight_bits"]) == 32
    write_csv(layer_reports(model), file)
    assert read_csv(file) == layer_reports(model)


def test_text_shows_the_worst_first(reports):
    rows = list(reports.values())
    lines = format_report(rows, 10).splitlines()
    worst = sorted(rows, key=lambda report: report.output_sqnr)[:10]
    assert [line.split()[0] for line in lines[1:]] == [report.name for report in worst]
    assert len({len(line) for line in lines}) == 1 and len(format_report(rows).splitlines()) == len(rows) + 1
    cells = lines[1].split()
    assert cells[1:3] == [f"w{worst[0].weight_bits}a{worst[0].activation_bits}", worst[0].weight_grid]
    assert f"{worst[0].output_sqnr:.1f}" in cells and f"{worst[0].bops / 1e6:.1f}" in cells


def test_tensorboard(model, reports, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    rows = list(reports.values())
    with SummaryWriter(str(tmp_path)) as writer:
        write_tensorboard(writer, rows, totals(model, rows))
    events = EventAccumulator(str(tmp_path)).Reload()
    written = {event.step: event.value for event in events.Scalars("layers/output_sqnr")}
    assert written == pytest.approx({i: report.output_sqnr for i, report in enumerate(rows)}, rel=1e-5)
    text = events.Tensors("quantization/layers/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"| {name} |" in text for name in reports) and "times smaller" in text


def test_command(tmp_path, tiny_dataset, capsys):
    network = float_detector({**SMALL, "nc": 4})
    prepare(network, build_config("lsq", 4))
    calibrate(network, [images(2)])
    weights = save(network, tmp_path / "best.pt")
    assert main(["--weights", str(weights), "--csv", str(tmp_path / "a.csv"), "--worst", "3"]) == 0
    shown = capsys.readouterr().out
    assert "Give --data" in shown and "64 x 64 pixels" in shown and len(read_csv(tmp_path / "a.csv")) > 20
    arguments = ["--data", str(tiny_dataset), "--images", "2", "--imgsz", "96", "--csv", str(tmp_path / "b.csv")]
    assert main(["--weights", str(weights), *arguments, "--device", "cpu"]) == 0
    assert all(report.output_sqnr > 0 for report in read_csv(tmp_path / "b.csv"))
    rebuilt = load_checkpoint(weights)
    assert rebuilt["quantization"]["weight"]["bits"] == 4
    capsys.readouterr()
    assert main(["--weights", str(save(float_detector(), tmp_path / "float.pt"))]) == 1
    assert "is not quantized" in capsys.readouterr().out
    assert main(["--weights", str(weights), "--images", "0"]) == 1
