"""Whole training runs on a few drawn images with a small network: both phases, resuming, every fold mode, refusals."""

import argparse
import copy
import itertools
import json
import math
import os
from pathlib import Path

import onnx
import pytest
import torch
import yaml
from small_detector import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import export
import train
import training.trainer
from quant import kernels
from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.fold import fold
from quant.gabfusion import fusion_nodes
from quant.latent import latent_state
from quant.norms import reestimate_norms
from quant.prepare import model_from_checkpoint, prepare
from quant.quantizer import Quantizer
from training.run import Phase
from training.trainer import Trainer
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.run_log import read_results

FAST = ["--imgsz", "64", "--batch-size", "4", "--workers", "0", "--noplots", "--noautoanchor", "--device", "cpu"]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    file = tmp_path_factory.mktemp("cfg") / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    return str(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight training and four validation images with six classes."""
    from data.shapes import CLASSES, Drawing, draw_shapes

    root = tmp_path_factory.mktemp("data")
    draw_shapes(root / "set", seed=3, drawing=Drawing(train_images=8, val_images=4, image_size=64))
    file = root / "set.yaml"
    names = dict(enumerate(CLASSES))
    file.write_text(yaml.safe_dump({"path": "set", "train": "images/train", "val": "images/val", "names": names}))
    return str(file)


def run(project: Path, name: str, *arguments: str) -> Path:
    options = train.parse_arguments([*FAST, "--project", str(project), "--name", name, *arguments])
    return train.main(options)


@pytest.fixture(scope="module")
def both_phases(cfg, data, tmp_path_factory):
    arguments = ["--cfg", cfg, "--data", data, "--quant", "lsq", "--bits", "4", "--gabfusion", "--ada"]
    return run(tmp_path_factory.mktemp("runs"), "both", *arguments, "--float-epochs", "2", "--epochs", "4")


def test_both_phases_leave_their_files(both_phases):
    files = {str(p.relative_to(both_phases)) for p in both_phases.rglob("*") if p.is_file()}
    expected = {"opt.yaml", "hyp.yaml", "quant.yaml", "results.csv", "float_results.csv"}
    assert expected <= files
    assert {f"weights/{name}.pt" for name in ("last", "best", "float_last", "float_best")} <= files
    float_rows = read_results(both_phases / "float_results.csv")
    rows = read_results(both_phases / "results.csv")
    assert [len(float_rows), len(rows)] == [2, 4]
    assert rows[0]["model.9.balance/factor0"] == pytest.approx(1, abs=0.1)
    assert rows[0]["quant/ada_loss"] > 0 and rows[0]["quant/ada_gradient_ratio"] > 0
    assert [row["quant/deployable"] for row in rows] == [0, 0, 0, 1]
    assert [row["quant/strength"] for row in rows] == pytest.approx([1, 1, 0.375, 0])


def test_tensorboard_follows_a_quantized_phase(both_phases):
    events = EventAccumulator(str(both_phases))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "train/box_loss",
        "metrics/mAP_0.5",
        "x/lr0",
        "model.9.balance/factor0",
        "model.9.balance/gradient1",
    } <= tags
    assert {"quant/ada_gradient_ratio", "quant/strength", "steps/model.1.conv.weight_quantizer"} <= tags
    assert all(event.value > 0 for event in events.Scalars("steps/model.1.conv.weight_quantizer"))
    assert len(events.Scalars("metrics/mAP_0.5")) == 4 and list((both_phases / "float").glob("events*"))


def test_best_is_a_deployable_network(both_phases):
    checkpoint = load_checkpoint(both_phases / "weights" / "best.pt")
    assert checkpoint["epoch"] == 3 and checkpoint["finished"]
    model = model_from_checkpoint(checkpoint).eval()
    assert all(node.is_identity for node in fusion_nodes(model).values())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.isfinite(fold(model)(x)[0]).all()


def test_float_start_is_used_as_it_is_when_the_classes_fit(both_phases, data, tmp_path):
    start = both_phases / "weights" / "float_best.pt"
    folder = run(
        tmp_path, "a", "--weights", str(start), "--data", data, "--quant", "lsq", "--bits", "8", "--epochs", "0"
    )
    assert not (folder / "weights" / "float_last.pt").exists()
    checkpoint = load_checkpoint(folder / "weights" / "best.pt")
    assert checkpoint["quantization"]["weight"]["bits"] == 8
    float_state = load_checkpoint(start)["ema"]
    anew = ("running_mean", "running_var", "num_batches_tracked")
    kept = [key for key in float_state if not key.endswith(anew)]
    assert all(torch.equal(checkpoint["ema"][key], float_state[key]) for key in kept)  # calibrated only


@pytest.mark.parametrize("fusion", ["learnable", "backward", {"enabled": True, "ramp": 0, "hold": 0, "release": 0}])
def test_only_a_normalisation_that_is_there_is_told_of(fusion, both_phases, data, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"gabfusion": fusion, "distillation": False}))
    start = ["--weights", str(both_phases / "weights" / "float_best.pt"), "--data", data, "--epochs", "1"]
    run(tmp_path, "f", *start, "--quant", "lsq", "--recipe", str(recipe))
    assert ("GABFusion still normalises" in capsys.readouterr().out) == (fusion == "learnable")


@pytest.mark.parametrize("fold_mode, balance", [("finetune", "learnable"), ("keep", "feedback"), ("finetune", "fixed")])
def test_other_ways_of_folding(fold_mode, balance, both_phases, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    paper = balance == "fixed"
    recipe.write_text(yaml.safe_dump({"gabfusion": {"fold": fold_mode, "balance": balance, "paper": paper}}))
    start = both_phases / "weights" / "float_best.pt"
    folder = run(
        tmp_path, "f", "--weights", str(start), "--data", data, "--quant", "lsq", "--recipe", str(recipe),
        "--epochs", "2",
    )  # fmt: skip
    best = folder / "weights" / "best.pt"
    model = model_from_checkpoint(load_checkpoint(best)).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, actual = model(x)[1], fold(model)(x)[1]
    for left, right in zip(expected, actual, strict=True):
        close = ((left - right).abs() <= 1e-3 * left.abs().max()).float().mean()
        assert close > 0.97
    assert export.main(["--weights", str(best), "--imgsz", "64"]) == 0
    operators = {node.op_type for node in onnx.load(best.with_suffix(".onnx")).graph.node}
    assert ("ReduceMean" in operators) == (fold_mode == "keep")


def test_every_distillation_term_and_fusion_node_in_one_run(both_phases, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    terms = ["feature_mse", "channel_wise", "logits", "boxes"]
    recipe.write_text(yaml.safe_dump({"distillation": terms, "ada": True, "gabfusion": {"scope": "all"}}))
    start = both_phases / "weights" / "float_best.pt"
    options = ["--weights", str(start), "--data", data, "--quant", "lsq", "--recipe", str(recipe), "--epochs", "1"]
    folder = run(tmp_path, "d", *options)
    (row,) = read_results(folder / "results.csv")
    assert all(row[f"quant/{term}_loss"] > 0 for term in [*terms, "ada"])
    ratios = {term: row[f"quant/{term}_gradient_ratio"] for term in [*terms, "ada"]}
    assert all(ratio > 0 for ratio in ratios.values()), ratios  # after two epochs, how large is chance
    assert row["model.2.cat.balance/gradient0"] > 0
    model = model_from_checkpoint(load_checkpoint(folder / "weights" / "best.pt")).eval()
    assert len(fusion_nodes(model)) == 6


def test_a_methods_penalty_reaches_the_gradient(both_phases, data, tmp_path):
    """The gradient of PACT's clip differs by that of factor * clip^2 times the batch size; nothing else changes."""
    start = both_phases / "weights" / "float_best.pt"
    gradients = {}
    for factor in (0.0, 500.0):  # large, as the task's own gradient is some thousands here
        recipe = tmp_path / f"{factor}.yaml"
        recipe.write_text(yaml.safe_dump({"method": "pact", "options": {"penalty": factor}, "distillation": False}))
        options = [*FAST, "--weights", str(start), "--data", data, "--recipe", str(recipe), "--epochs", "1"]
        options += ["--project", str(tmp_path), "--name", str(factor)]
        prepared, model = train.prepare_run(train.parse_arguments(options))
        prepare(model, prepared.config)
        calibrate(model, prepared.calibration_batches())
        trainer = Trainer(prepared, Phase("quantized", 1, ""), model.train())
        torch.manual_seed(0)
        images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
        trainer._step(images, torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.3]]), measure=False)
        clip = trainer.model.model[1].conv.input_quantizer.alpha
        gradients[factor] = float(clip.grad)
    assert gradients[500.0] - gradients[0.0] == pytest.approx(4 * 2 * 500 * clip.item(), rel=1e-3)


def states(file: Path) -> dict:
    return load_checkpoint(file)["ema"]


@pytest.mark.parametrize("phase", ["float", "quantized"])
def test_interrupted_run_resumes_to_the_same_result(phase, cfg, data, tmp_path, monkeypatch, capsys):
    """Stopped after two epochs and resumed, a run ends bit-identical to one that was not stopped."""
    arguments = ["--cfg", cfg, "--data", data, "--quant", "lsq", "--bits", "4", "--gabfusion", "feedback", "--ada"]
    arguments += ["--float-epochs", "3", "--epochs", "3"]
    whole = run(tmp_path, "whole", *arguments)

    finish = Trainer._finish_epoch

    def stop_in(self, epoch, *rest):
        result = finish(self, epoch, *rest)
        if self.phase.name == phase and epoch == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Trainer, "_finish_epoch", stop_in)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "stopped", *arguments)
    monkeypatch.undo()
    name = "float_last.pt" if phase == "float" else "last.pt"
    stopped = tmp_path / "stopped"
    monkeypatch.setattr(Quantizer, "_warned", False)
    capsys.readouterr()
    train.main(train.parse_arguments(["--resume", str(stopped / "weights" / name)]))
    assert "without a range" not in capsys.readouterr().out  # compiled kernels are tried on ranges that were loaded
    expected, actual = states(whole / "weights" / "last.pt"), states(stopped / "weights" / "last.pt")
    assert expected.keys() == actual.keys()
    assert [key for key in expected if not torch.equal(expected[key], actual[key])] == []
    assert len(read_results(stopped / "results.csv")) == 3
    # The table at the end has its row of calibration alone after a resume too.
    calibrated = [load_checkpoint(folder / "weights" / "last.pt")["calibrated"] for folder in (whole, stopped)]
    assert calibrated[0] == calibrated[1] and len(calibrated[0]) == 2


def test_a_run_of_relative_paths_resumes_from_anywhere(cfg, data, tmp_path, monkeypatch):
    started, elsewhere = tmp_path / "started" / "deeper", tmp_path / "elsewhere"
    started.mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(started)
    relative = ["--cfg", os.path.relpath(cfg), "--data", os.path.relpath(data)]
    save = Trainer._finish_epoch

    def stop(self, *values):
        save(self, *values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_finish_epoch", stop)
        run(Path("runs"), "one", *relative, "--epochs", "2")
    monkeypatch.chdir(elsewhere)
    folder = train.main(train.parse_arguments(["--resume", str(started / "runs/one/weights/last.pt")]))
    assert folder == started / "runs" / "one" and len(read_results(folder / "results.csv")) == 2
    assert Path.cwd() == elsewhere and not list(elsewhere.iterdir())


@pytest.mark.parametrize("quantized", [False, True])
def test_the_start_of_a_run_is_gone_when_it_resumes(quantized, both_phases, data, tmp_path, monkeypatch):
    """A float run has all that it needs in its checkpoint, a quantized one compares with its start to the end."""
    start = tmp_path / "start.pt"
    start.write_bytes((both_phases / "weights" / "float_best.pt").read_bytes())
    save = Trainer._finish_epoch

    def stop(self, *values):
        save(self, *values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_finish_epoch", stop)
        method = ["--quant", "lsq"] if quantized else []
        run(tmp_path, "one", "--weights", str(start), "--data", data, "--epochs", "2", *method)
    start.unlink()
    resume = train.parse_arguments(["--resume", str(tmp_path / "one" / "weights" / "last.pt")])
    if quantized:
        with pytest.raises(UserError, match=r"--weights .*start.pt, which this run started with, is gone"):
            train.main(resume)
    else:
        assert len(read_results(train.main(resume) / "results.csv")) == 2


@pytest.mark.parametrize("images", [8, 0])
def test_validated_statistics_are_those_of_the_averaged_weights(images, both_phases, data, tmp_path):
    """Computed once more from the saved network and the same images, they are the same; or not, if switched off."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"batch_norm": {"reestimate": images}}))
    start = ["--weights", str(both_phases / "weights" / "float_best.pt"), "--data", data, "--recipe", str(recipe)]
    options = train.parse_arguments(
        [*FAST, "--project", str(tmp_path), "--name", "n", *start, "--quant", "lsq", "--epochs", "1", "--freeze", "2"]
    )
    checkpoint = load_checkpoint(train.main(options) / "weights" / "last.pt")
    model = model_from_checkpoint(checkpoint).to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    frozen = {
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d) and name[:8] in ("model.0.", "model.1.")
    }
    run_again, _ = train.prepare_run(argparse.Namespace(**{**checkpoint["options"], "name": "again", "quant": "lsq"}))
    assert reestimate_norms(model, run_again.training_batches(8, training.trainer.QUANTIZED_EPOCHS), tuple(frozen)) == 2
    moved = {
        key for key, value in model.state_dict().items()
        if key.endswith("running_mean") and not torch.allclose(value, before[key], rtol=1e-3, atol=1e-4)
    }  # fmt: skip
    assert (moved == set()) == (images == 8)
    run_again.config = QuantConfig.from_dict({"batch_norm": {"reestimate": 512}})
    assert [sum(map(len, run_again._norm_batches(0, limit))) for limit in (None, 4)] == [8, 4]
    float_state = states(both_phases / "weights" / "float_best.pt")
    for name in frozen:  # layers that are frozen keep theirs
        assert torch.equal(before[f"{name}.running_var"], float_state[f"{name}.running_var"])


def test_the_quantized_learning_rate_falls_with_every_step(both_phases, data, tmp_path, monkeypatch):
    hyp = tmp_path / "hyp.yaml"
    hyp.write_text(
        yaml.safe_dump({"quant_lr0": 0.004, "quant_lrf": 0.1, "quant_warmup_epochs": 0, "quant_nominal_batch": 4})
    )
    rates, optimize = [], Trainer._optimize

    def record(self):
        rates.append(self.optimizer.param_groups[1]["lr"])
        optimize(self)

    monkeypatch.setattr(Trainer, "_optimize", record)
    start = ["--weights", str(both_phases / "weights" / "float_best.pt"), "--data", data, "--hyp", str(hyp)]
    run(tmp_path, "falls", *start, "--quant", "lsq", "--epochs", "3")
    shares = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]  # two batches an epoch
    assert rates == pytest.approx([0.004 * share for share in shares])


def test_batch_norms_stand_still_at_the_end(both_phases, data, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"batch_norm": {"freeze": 0.5}}))
    start = ["--weights", str(both_phases / "weights" / "float_best.pt"), "--data", data, "--recipe", str(recipe)]
    statistics, finish = [], Trainer._finish_epoch

    def record(self, *arguments):
        statistics.append(self.model.model[0].bn.running_mean.clone())
        return finish(self, *arguments)

    monkeypatch.setattr(Trainer, "_finish_epoch", record)
    run(tmp_path, "still", *start, "--quant", "lsq", "--epochs", "4")
    changes = [not torch.equal(one, two) for one, two in itertools.pairwise(statistics)]
    assert changes == [True, False, False]


@pytest.fixture(scope="module")
def corrected(both_phases, data, tmp_path_factory):
    """Flags of a run whose last two of three epochs train batch norms alone, and the folder of such a run."""
    folder = tmp_path_factory.mktemp("corrected")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"batch_norm": {"correction": 2}}))
    flags = ["--weights", str(both_phases / "weights" / "float_best.pt"), "--data", data, "--recipe", str(recipe)]
    flags += ["--quant", "lsq", "--gabfusion", "--epochs", "3", "--save-period", "1"]
    return flags, run(folder, "whole", *flags)


def test_the_correction_trains_gains_and_shifts_of_batch_norms_alone(corrected):
    _, folder = corrected
    trained = load_checkpoint(folder / "weights" / "epoch0.pt")["ema"]
    first, second = (load_checkpoint(folder / "weights" / f"epoch{epoch}.pt") for epoch in (1, 2))
    moved = {key for key in trained if not torch.equal(trained[key], first["ema"][key])}
    learned = {key for key in trained if key.endswith(("bn.weight", "bn.bias"))}
    assert moved - learned <= {key for key in trained if "balance" in key}  # the fusion's strength is back at 0
    assert len(moved & learned) > 0.9 * len(learned)
    statistics = [key for key in trained if "running" in key]
    assert all(torch.equal(first["model"][key], second["model"][key]) for key in statistics)
    rows = read_results(folder / "results.csv")
    # Of each epoch's second step, of four in all, between 0.002 and its lrf of 0.01.
    assert [row["x/lr0"] for row in rows[1:]] == pytest.approx([0.002 * (1 - 0.99 * step / 4) for step in (1, 3)])
    assert [row["quant/deployable"] for row in rows] == [1, 1, 1]


def test_an_interrupted_correction_resumes_to_the_same_result(corrected, tmp_path, monkeypatch):
    flags, folder = corrected
    finish = Trainer._finish_epoch

    def stop(self, epoch, *rest):
        result = finish(self, epoch, *rest)
        if epoch == stopping:
            raise KeyboardInterrupt
        return result

    for stopping in (0, 1):  # before its first epoch and between its epochs
        monkeypatch.setattr(Trainer, "_finish_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, f"stopped{stopping}", *flags)
        monkeypatch.undo()
        train.main(train.parse_arguments(["--resume", str(tmp_path / f"stopped{stopping}" / "weights" / "last.pt")]))
        expected, actual = (
            states(place / "weights" / "last.pt") for place in (folder, tmp_path / f"stopped{stopping}")
        )
        assert [key for key in expected if not torch.equal(expected[key], actual[key])] == []


def test_a_correction_leaves_epochs_to_train_in(corrected, tmp_path):
    flags, _ = corrected
    with pytest.raises(UserError, match=r"batch_norm.correction: 2 of the 2 quantized epochs"):
        run(tmp_path, "short", *flags, "--epochs", "2")


def test_the_best_network_is_saved_before_the_last(cfg, data, tmp_path, monkeypatch):
    """Killed between the two, a run must not know of a best fitness whose network was never kept."""
    saved, save = [], training.trainer.save_checkpoint

    def record(checkpoint, path):
        saved.append(path.name)
        save(checkpoint, path)

    monkeypatch.setattr(training.trainer, "save_checkpoint", record)
    run(tmp_path, "float", "--cfg", cfg, "--data", data, "--epochs", "1")
    assert saved[:3] == ["last.pt", "best.pt", "last.pt"]  # the first before training, to be resumed from


def test_interrupted_float_run_with_fitted_anchors_resumes_to_the_same_result(cfg, data, tmp_path, monkeypatch):
    hyp = tmp_path / "hyp.yaml"
    hyp.write_text("anchor_t: 1.05\n")  # no anchor fits that closely, so new ones are searched

    def train_float(name):
        options = ["--cfg", cfg, "--data", data, "--epochs", "3", "--hyp", str(hyp), "--imgsz", "64", "--workers", "0"]
        options += ["--batch-size", "4", "--noplots", "--device", "cpu", "--project", str(tmp_path), "--name", name]
        return train.main(train.parse_arguments(options))

    whole = train_float("whole")
    finish = Trainer._finish_epoch

    def stop(self, epoch, *rest):
        result = finish(self, epoch, *rest)
        if epoch == 0:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Trainer, "_finish_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train_float("stopped")
    monkeypatch.undo()
    train.main(train.parse_arguments(["--resume", str(tmp_path / "stopped" / "weights" / "last.pt")]))
    expected, actual = states(whole / "weights" / "last.pt"), states(tmp_path / "stopped" / "weights" / "last.pt")
    assert [key for key in expected if not torch.equal(expected[key], actual[key])] == []


def test_rectangular_batches_can_be_quantized(both_phases, data, tmp_path):
    start = both_phases / "weights" / "float_best.pt"
    folder = run(tmp_path, "r", "--weights", str(start), "--data", data, "--rect", "--quant", "lsq", "--epochs", "1")
    assert (folder / "weights" / "best.pt").exists()


def test_bfloat16_and_compiled_quantizers_train_as_well(both_phases, data, tmp_path):
    """The same first epoch within what bfloat16's 8 bits leave; the log names what was compiled."""
    start = ["--weights", str(both_phases / "weights" / "float_best.pt"), "--data", data, "--quant", "lsq"]
    losses = {}
    for name, flags in {"plain": [], "fast": ["--precision", "bfloat16", "--compile"]}.items():
        folder = run(tmp_path, name, *start, "--gabfusion", "--ada", "--epochs", "1", *flags)
        (row,) = read_results(folder / "results.csv")
        losses[name] = [row[f"train/{part}_loss"] for part in ("box", "obj", "cls")]
    kernels.switch(False)
    assert losses["fast"] != losses["plain"]
    assert losses["fast"] == pytest.approx(losses["plain"], rel=0.05)


def test_one_image_of_one_cell_is_explained(data, tmp_path):
    cell = ["--batch-size", "1", "--imgsz", "32"]
    with pytest.raises(UserError, match="larger --batch-size or --imgsz"):
        run(tmp_path, "one", "--cfg", "yolov5n.yaml", "--data", data, "--epochs", "1", *cell)


def test_a_run_folder_is_not_a_checkpoint(both_phases):
    with pytest.raises(UserError, match="is a folder"):
        train.main(train.parse_arguments(["--resume", str(both_phases)]))


@pytest.mark.parametrize("anchors", ["cfg", "hyp", "cfg, with a float phase"])
def test_a_quantized_phase_alone_keeps_the_anchors_of_its_weights(anchors, both_phases, data, tmp_path):
    cfg, hyp = tmp_path / "other.yaml", tmp_path / "hyp.yaml"
    cfg.write_text(yaml.safe_dump(SMALL | {"anchors": [[3 * value for value in row] for row in SMALL["anchors"]]}))
    count = len(SMALL["anchors"][0]) // 2
    hyp.write_text(yaml.safe_dump(yaml.safe_load((both_phases / "hyp.yaml").read_text()) | {"anchors": count}))
    weights = both_phases / "weights" / "float_best.pt"
    flags = ["--hyp", str(hyp)] if anchors == "hyp" else ["--cfg", str(cfg)]
    flags += ["--float-epochs", "1"] if "float" in anchors else []
    start = ["--weights", str(weights), "--data", data, "--quant", "lsq", "--project", str(tmp_path)]
    options = train.parse_arguments([*FAST, *start, *flags])
    _, model = train.prepare_run(options)
    stay = torch.equal(model.detect.anchors, model_from_checkpoint(load_checkpoint(weights)).detect.anchors)
    assert stay != options.needs_float
    assert options.needs_float == ("float" in anchors)


def test_a_finished_run_refuses_to_resume(both_phases):
    with pytest.raises(UserError, match=r"nothing to resume.*--weights .*float_best\.pt"):
        train.main(train.parse_arguments(["--resume", str(both_phases / "weights" / "last.pt")]))


def test_plain_float_training_and_its_files(cfg, data, tmp_path):
    folder = run(tmp_path, "float", "--cfg", cfg, "--data", data, "--epochs", "1")
    assert {p.name for p in (folder / "weights").iterdir()} == {"last.pt", "best.pt"}
    assert not (folder / "quant.yaml").exists()
    header = (folder / "results.csv").read_text().splitlines()[0].split(",")
    assert all(len(name) == 20 for name in header) and header[13].strip() == "x/lr2"


def test_one_checkpoint_where_no_more_are_wanted(cfg, data, tmp_path, capsys):
    """The better epoch may have been the first, which was not kept: not a thing to warn of."""
    folder = run(tmp_path, "one", "--cfg", cfg, "--data", data, "--epochs", "3", "--patience", "1", "--nosave")
    kept = {p.name for p in (folder / "weights").iterdir()}
    assert "last.pt" in kept and kept <= {"last.pt", "best.pt"} and "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bits", "4"], "--bits needs --quant"),
        (["--gabfusion"], "--gabfusion needs --quant"),
        (["--quant", "lsqq"], "--quant lsqq: did you mean lsq"),
        (["--quant", "lsq", "--bits", "1"], "1 is not possible"),
        (["--quant", "lsq", "--bits", "w4"], "write one number"),
        (["--quant", "lsq", "--gabfusion", "sideways"], "--gabfusion sideways: it takes learnable"),
        (["--quant", "lsq", "--recipe", "nowhere.yaml"], "no such file"),
        (["--weights", "nowhere.pt"], "does not exist"),
        (["--hyp", "nowhere.yaml"], "no such file"),
        (["--float-epochs", "3"], "without it use --epochs"),
        (["--epochs", "-1"], "at least 0"),
        (["--compile"], "--compile .* needs --quant"),
        (["--precision", "float16"], "float16 is for CUDA"),
        (["--epochs", "0"], "trains nothing"),
        (["--quant", "lsq", "--float-epochs", "0"], "no float model of these classes"),
    ],
)
def test_refusals(arguments, message, data, cfg, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, "r", "--data", data, "--cfg", cfg, *arguments)
    assert not (tmp_path / "r").exists()


def test_quantized_weights_start_a_network_of_fewer_bits(both_phases, data, tmp_path):
    teacher = str(both_phases / "weights" / "float_best.pt")
    wide = run(tmp_path, "wide", "--weights", teacher, "--data", data, "--quant", "lsq", "--bits", "6", "--epochs", "1")
    common = ["--weights", str(wide / "weights" / "best.pt"), "--data", data, "--quant", "lsq", "--bits", "3"]
    with pytest.raises(UserError, match=r"quantized already, .* add --teacher FILE, its run's float weights, or"):
        run(tmp_path, "r", *common)
    narrow = run(tmp_path, "narrow", *common, "--teacher", teacher, "--epochs", "0")
    rows = json.loads((narrow / "summary.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher, float", "start, w6a6", "w3a3 calibrated only"]
    assert rows[1]["mAP50"] == json.loads((wide / "summary.json").read_text())["rows"][-1]["mAP50"]
    # The weights are those behind the six-bit codes, not the float run's.
    states = [
        latent_state(model_from_checkpoint(load_checkpoint(folder / "weights" / "best.pt")))
        for folder in (wide, narrow)
    ]
    first = next(name for name in states[0] if name.endswith("conv.weight"))
    torch.testing.assert_close(states[1][first], states[0][first], rtol=1e-5, atol=1e-7)
    assert not torch.equal(load_checkpoint(teacher)["ema"][first].float(), states[0][first])
    # Statistics of the codes decide nothing: ranges are those of the float weights with statistics of their own.
    changed = load_checkpoint(wide / "weights" / "best.pt")
    for name, value in changed["ema"].items():
        if name.endswith("running_var"):
            value.mul_(100)
    save_checkpoint(changed, tmp_path / "changed.pt")
    common_changed = [str(tmp_path / "changed.pt") if argument.endswith("best.pt") else argument for argument in common]
    again = run(tmp_path, "again", *common_changed, "--teacher", teacher, "--epochs", "0")
    ours, theirs = (load_checkpoint(folder / "weights" / "best.pt")["ema"] for folder in (narrow, again))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    alone = tmp_path / "alone.yaml"
    alone.write_text("distillation: false\n", encoding="utf-8")
    trained = run(tmp_path, "trained", *common, "--recipe", str(alone), "--epochs", "1")
    assert json.loads((trained / "summary.json").read_text())["rows"][-1]["name"] == "w3a3 trained (lsq)"


def test_wrong_teachers_and_starts_are_refused(both_phases, data, cfg, tmp_path):
    weights = both_phases / "weights"
    with pytest.raises(UserError, match="quantized already"):
        run(tmp_path, "r", "--weights", str(weights / "best.pt"), "--data", data, "--quant", "lsq")
    common = ["--weights", str(weights / "float_best.pt"), "--quant", "lsq", "--ada"]
    with pytest.raises(UserError, match="must be a float checkpoint"):
        run(tmp_path, "r", *common, "--data", data, "--teacher", str(weights / "best.pt"))
    other = Path(data).parent / "other.yaml"
    content = yaml.safe_load(Path(data).read_text())
    content["names"] = {index: f"thing{index}" for index in range(6)}
    other.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="knows other classes"):
        run(tmp_path, "r", *common, "--data", str(other), "--teacher", str(weights / "float_best.pt"))


def test_missing_concat_is_refused_before_anything_is_trained(data, tmp_path):
    plain = {**SMALL, "backbone": SMALL["backbone"][:6], "head": [[[2, 5], 1, "Detect", ["nc", "anchors"]]]}
    cfg = tmp_path / "plain.yaml"
    cfg.write_text(yaml.safe_dump(plain))
    with pytest.raises(UserError, match="no Concat"):
        run(tmp_path, "r", "--data", data, "--cfg", str(cfg), "--quant", "lsq", "--gabfusion")


def test_user_errors_are_one_line_and_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--weights", "nowhere.pt"])
    assert train.command_line() == 1
    output = capsys.readouterr().out.strip().splitlines()
    assert output == [
        f"ERROR: nowhere.pt does not exist in {Path.cwd()}. Give the path of a .pt file, or a released name such as "
        "yolov5n.pt"
    ]
