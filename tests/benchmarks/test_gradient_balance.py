"""benchmarks/gradient_balance.py: its measurement against plain autograd, its verdicts, and the whole command."""

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_detector import NAMES, SIZE, float_detector, save
from torch import nn

from data.shapes import Drawing, draw_shapes
from models.common import Concat
from quant.prepare import example_input, insert_fusion
from utils.checkpoint import load_checkpoint
from utils.loss import DetectionLoss, scale_loss_gains

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("gradient_balance")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A drawn data set of three classes and a float checkpoint for it."""
    root = tmp_path_factory.mktemp("balance")
    draw_shapes(root / "drawn", seed=1, drawing=Drawing(train_images=12, val_images=4, image_size=SIZE))
    for file in (root / "drawn" / "labels").rglob("*.txt"):
        rows = [line.split() for line in file.read_text().splitlines()]
        file.write_text("".join(f"{int(label) % 3} {' '.join(box)}\n" for label, *box in rows))
    names = "".join(f'  {number}: "{name}"\n' for number, name in NAMES.items())
    data = root / "drawn" / "drawn.yaml"
    data.write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}", encoding="utf-8")
    (root / "start" / "weights").mkdir(parents=True)
    return data, save(float_detector(), root / "start" / "weights" / "last.pt")


def options_for(benchmark, drawn, folder, *extra):
    data, weights = drawn
    arguments = ["--weights", str(weights), "--data", str(data), "--imgsz", str(SIZE), "--methods", "lsq"]
    arguments += ["--batches", "3", "--batch-size", "4", "--output", str(folder), "--report", str(folder / "r.md")]
    return [*arguments, *extra]


def test_norms_equal_autograd_of_a_plain_network(benchmark, drawn, tmp_path):
    options = benchmark.parse_options(options_for(benchmark, drawn, tmp_path, "--bits", "--states", "plain"))
    checkpoint = load_checkpoint(drawn[1])
    hyp = benchmark.load_hyp(benchmark.DEFAULT_FILE)
    data = benchmark.Data(options, hyp, 16, 8)
    assert [len(images) for images, _ in data.batches] == [4, 4, 4]
    meter = benchmark.Meter(data, hyp, options)
    benchmark.measure_float(meter, "start", checkpoint)
    assert len(meter.rows) == 3 * 2 * 2 and {row.factor for row in meter.rows} == {1.0}

    class Splitting(nn.Module):
        """Concatenates copies of the branches, so that their gradients are those of this reader alone."""

        def forward(self, branches):
            self.copies = [branch * 1.0 for branch in branches]
            for copy in self.copies:
                copy.retain_grad()
            return torch.cat(self.copies, 1)

    model = float_detector().train()
    nodes = {f"model.{layer.i}": layer for layer in model.model if isinstance(layer, Concat)}
    for layer in nodes.values():
        layer.balance = Splitting()
    gains = scale_loss_gains(hyp, 2, 3, SIZE)
    loss_function = DetectionLoss(model.detect.anchors, model.detect.stride, 3, gains)
    for batch, (images, targets) in enumerate(data.batches):
        loss = loss_function(model(images.float() / 255), targets)[0]
        loss.backward()
        for row in (row for row in meter.rows if row.batch == batch):
            expected = nodes[row.node].balance.copies[row.branch].grad.double().norm()
            assert row.gradient_norm == pytest.approx(float(expected), rel=1e-3)
            assert row.loss == pytest.approx(loss.item() / 4, rel=1e-4)


def test_balanced_state_lets_the_feedback_law_settle(benchmark, drawn, tmp_path):
    options = benchmark.parse_options(options_for(benchmark, drawn, tmp_path, "--bits", "--states", "balanced"))
    hyp = benchmark.load_hyp(benchmark.DEFAULT_FILE)
    meter = benchmark.Meter(benchmark.Data(options, hyp, 16, 8), hyp, options)
    model = benchmark.float_network(load_checkpoint(drawn[1]), options).train()
    meter.branches = benchmark.branches_of(model, torch.rand(2, 3, SIZE, SIZE))
    for node in benchmark.fusion_nodes(model).values():
        node.logits.copy_(torch.tensor([0.9, -0.9]))  # as one starts where the deep gradient is six times too large
    meter.measure(model, benchmark.Case("start"))
    meter.measure_states(model, benchmark.Case("start"))
    before, after = benchmark.ratios(meter.rows).values()
    assert {row.state for row in meter.rows} == {"plain", "balanced"}
    for node in before:
        assert np.median(before[node]) > 4 and np.median(after[node]) < np.median(before[node]) ** 0.6


def test_depth_counts_convolutions_on_the_longest_way(benchmark):
    model = float_detector()
    insert_fusion(model, benchmark.settling(benchmark.QuantConfig()), example_input(model))
    branches = benchmark.branches_of(model.train(), torch.rand(2, 3, SIZE, SIZE))
    # Conv 1, Conv 2, C3 of one bottleneck (cv1, two, cv3) 6, Conv 7, C3 of two 13, Conv 14, SPPF 16, Conv 17; the
    # first Concat joins 17 and 13. Behind it C3 21, Conv 22: the second joins 22 and 17.
    assert {name: [branch.depth for branch in found] for name, found in branches.items()} == {
        "model.9.balance": [17, 13],
        "model.12.balance": [22, 17],
    }
    assert [branch.channels for branch in branches["model.12.balance"]] == [16, 16]


def rows_of(benchmark, deep, shallow, network="float", method="float", state="plain", trained=False):
    bits = "32" if method == "float" else "w4a4"
    return [
        benchmark.Row(network, method, bits, trained, state, "model.9", branch, depth, 8, batch, 1.0, 1.0, norm)
        for branch, depth, norms in ((0, 20, deep), (1, 5, shallow))
        for batch, norm in enumerate(norms)
    ]


def test_verdicts(benchmark):
    shallow = np.array([1.0, 2.0, 4.0, 1.0, 3.0, 0.5, 1.0, 2.0, 1.0, 1.0])
    rows = rows_of(benchmark, shallow * 2, shallow)
    rows += rows_of(benchmark, shallow * 1.6, shallow, "float", "lsq")
    rows += rows_of(benchmark, shallow / 4, shallow, "low", "lsq", trained=True)
    mixed = np.where(np.arange(10) % 2, 3.0, 1 / 3)
    rows += rows_of(benchmark, shallow * mixed, shallow, "mixed", "lsq", trained=True)
    rows += rows_of(benchmark, shallow * 1.1, shallow, "after", "lsq", benchmark.TRAINED, trained=True)
    found = benchmark.ratios(rows)
    cases = list(found)
    assert [benchmark.dominating(found[case]["model.9"]) for case in cases] == [
        "deep", "deep", "shallow", "neither", "deep",
    ]  # fmt: skip
    changed = benchmark.effects(found)
    np.testing.assert_allclose(changed[cases[1]]["model.9"], 0.8)
    np.testing.assert_allclose(changed[cases[2]]["model.9"], 0.125)
    assert cases[4] not in changed and benchmark.imbalance(found[cases[2]]) == pytest.approx(4)
    said = benchmark.conclusions(found)
    assert said[0] == "* float: deep dominates at model.9 2.00 (2.00 to 2.00)."
    assert "the same verdict as float at 1 of 1 nodes" in said[1] and "0.80 to 0.80 times float's" in said[1]
    assert (
        "clearly less at 1, unclear at 0" in said[1]
        and "the same verdict as float at 0 of 1 nodes" in said[2]
        and "low lsq w4a4 trained" in said[2]
    )
    assert said[-1].endswith("of after lsq w4a4 trained: 1.10 trained GABFusion.")
    dead = benchmark.ratios(rows_of(benchmark, [0.0], [0.0]))
    assert benchmark.describe(next(iter(dead.values()))).startswith("neither")


def test_command_line(benchmark, drawn, tmp_path, capsys):
    trained = tmp_path / "trained" / "weights"
    trained.mkdir(parents=True)
    model = benchmark.model_from_checkpoint(load_checkpoint(drawn[1]))
    config = benchmark.build_config("lsq", 4, gabfusion=True)
    benchmark.prepare(model, config)
    benchmark.calibrate(model, [torch.rand(4, 3, SIZE, SIZE)])
    with torch.no_grad():
        for node in benchmark.fusion_nodes(model).values():
            node.logits.copy_(torch.tensor([0.4, -0.4]))
    save(model, trained / "last.pt")

    arguments = options_for(benchmark, drawn, tmp_path, "--bits", "4", "--seed", "3")
    arguments.insert(1, str(trained / "last.pt"))  # quantized first: the order must not matter
    assert benchmark.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "* start: " in printed and "* start lsq w4a4 calibrated: the same verdict as float at" in printed
    with (tmp_path / "gradient_balance_drawn.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    cases = list(dict.fromkeys((row["network"], row["method"], row["state"]) for row in rows))
    assert cases == [
        *(("start", "float", state) for state in benchmark.STATES),
        *(("start", "lsq", state) for state in benchmark.STATES),
        ("trained", "lsq", benchmark.TRAINED),
    ]
    assert len(rows) == 7 * 3 * 2 * 2 and all(float(row["gradient_norm"]) > 0 for row in rows)
    factors = {row["branch"]: float(row["factor"]) for row in rows if row["network"] == "trained"}
    assert factors == pytest.approx({"0": 1.38, "1": 0.62}, abs=0.01)
    text = (tmp_path / "r.md").read_text()
    assert "<!-- begin gradient_balance_drawn -->" in text and "python benchmarks/gradient_balance.py --weights" in text
    assert "model.9 (17 / 13)" in text and str(tmp_path) not in text
    assert (tmp_path / "figures" / "gradient_balance_drawn.png").stat().st_size > 10_000

    assert benchmark.main([*arguments[:2], *arguments[3:]]) == 1
    assert "all are quantized" in capsys.readouterr().out
