"""benchmarks/accuracy.py: grid files, the bootstrap against independent references, a tiny grid that is really run."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_detector import SMALL

from data.shapes import CLASSES, Drawing, draw_shapes
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.metrics import ap_per_class
from val import Samples

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in ("accuracy", "bootstrap", "grid")}
    finally:
        sys.path.remove(str(BENCHMARKS))


# --- grid files -------------------------------------------------------------------------------------------------------

TWO = {"pcb": {"yaml": "a.yaml"}, "cells": {"yaml": "b.yaml"}}


def grid_of(modules, tmp_path, **values):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"data": TWO, **values}, sort_keys=False))
    return modules["grid"].read_grid(file)


def test_runs_are_a_product_in_the_written_order_without_repeats(modules, tmp_path):
    runs = [{"method": "lsq", "data": "pcb", "variant": ["base", "both"], "seed": [0, 1]}]
    runs += [{"seed": 1, "method": "lsq", "data": "pcb", "variant": "base"}, {"method": "float", "bits": ["w3a3"]}]
    grid = grid_of(modules, tmp_path, runs=runs)
    assert [cell.name for cell in grid.cells] == [
        "pcb_lsq_w4a4_base_seed0", "pcb_lsq_w4a4_base_seed1", "pcb_lsq_w4a4_both_seed0", "pcb_lsq_w4a4_both_seed1",
        "pcb_float_seed0", "cells_float_seed0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "values, words",
    [
        ({"runs": [{"method": "lqs"}]}, ["entry 1", "method", "'lqs'", "lsq"]),
        ({"runs": [{"method": "lsq", "variant": "better"}]}, ["variant", "'better'", "gabfusion"]),
        ({"runs": [{"methods": "lsq"}]}, ["'methods'", "did you mean 'method'"]),
        ({"runs": [{"method": "lsq", "bits": "9"}]}, ["bits", "9"]),
        ({"run": []}, ["'run'", "did you mean 'runs'"]),
        ({"runs": []}, ["runs is empty"]),
        ({"variants": {"a": {"recipes": 1}}}, ["variants.a.'recipes'", "did you mean 'recipe'"]),
        ({"data": {"pcb": {"yaml": "a.yaml", "epoch": 3}}}, ["data.pcb.'epoch'", "'epochs'"]),
        (
            {"variants": {"a": {"stages": [["w6a6", 2], ["w4a4", 2]]}}, "runs": [{"method": "lsq", "variant": "a"}]},
            ["variants.a.stages", "4 epochs leave none of pcb's 4"],
        ),
        ({"variants": {"a": {"against": "b"}}}, ["variants.a.against", "'b' is no variant", "gabfusion"]),
        ({"variants": {"a": {"stages": [["w9a9", 1]]}}}, ["grid.yaml: variants.a.stages", "9 is not possible"]),
        *(
            ({"variants": {"a": {"stages": wrong}}}, ["variants.a.stages", "pair of bits and epochs"])
            for wrong in ([["w6a6"]], ["w6a6", 1], [["w6a6", "1"]], [["w6a6", 0]], [["w6a6", 1.5]], [[6, 1]])
        ),
        ({"variants": {"a": {"stages": "w6a6"}}}, ["variants.a.stages", "'w6a6' is not what belongs here"]),
        ({"variants": {"a": {"stages": [["w6a6", 1], ["w6a6", 1]]}}}, ["variants.a.stages", "bits of its own"]),
        ({"variants": {"a": {"stages": [["w6a6", 1]], "flags": ["--gabfusion"]}}}, ["neither --gabfusion nor"]),
        ({"variants": {"a": {"flags": "--ada"}}}, ["variants.a.flags", "'--ada' is not what belongs here"]),
        ({"runs": [{"method": "lsq", "bits": "3"}]}, ["entry 1", "write them as in w4a8"]),
        ({"runs": [{"method": "lsq", "seed": "a"}]}, ["entry 1", "seed", "whole number"]),
        ({"runs": {"method": "lsq"}}, ["runs", "list of mappings"]),
        ({"runs": ["lsq"]}, ["runs", "list of mappings"]),
        ({"data": ["pcb"]}, ["data", "maps names to settings"]),
        ({"data": {"pcb": {"epochs": 3}}}, ["data.pcb.yaml", "every data set needs it"]),
        ({"data": {"pcb": {"yaml": "a.yaml", "image_size": "big"}}}, ["data.pcb.image_size", "'big'"]),
        ({"data": {"pcb": {"yaml": "a.yaml", "cosine": 1}}}, ["data.pcb.cosine", "False, its default"]),
        ({"data": {"pcb": {"yaml": "a.yaml", "holdout": 2}}}, ["data.pcb.holdout", "share"]),
    ],
)
def test_a_wrong_grid_is_named(values, words, modules, tmp_path):
    with pytest.raises(UserError) as found:
        grid_of(modules, tmp_path, **values)
    assert all(word in str(found.value) for word in words)


def test_a_grid_may_have_variants_of_its_own(modules, tmp_path):
    variants = {"slow": {"hyp": {"quant_lr0": 0.001}, "flags": ["--ada"]}}
    grid = grid_of(modules, tmp_path, variants=variants, runs=[{"method": "lsq", "variant": "slow", "data": "pcb"}])
    assert [cell.variant for cell in grid.cells] == ["slow"] and grid.variants["both"].flags == ["--gabfusion", "--ada"]
    assert grid.variants["slow"].hyp == {"quant_lr0": 0.001}


@pytest.mark.parametrize(
    "name", ["core", "quick", "ablation", "around", "cells", "bifpn", "long", "recipe", "shapes", "options", "alone"]
)
def test_the_grids_that_come_along_are_sound(name, modules):
    grid = modules["grid"].read_grid(BENCHMARKS / "grids" / f"{name}.yaml")
    methods = {cell.method for cell in grid.cells}
    few = {"ablation", "bifpn", "recipe", "options", "alone"}
    assert methods == ({"float", "lsq"} if name in few else {"float", "lsq", "pact", "dsq", "n2uq"})
    core = {(c.method, c.bits, c.variant, c.seed) for c in grid.cells}
    if name == "core":
        every = [(m, b, v) for m in ("lsq", "pact", "dsq", "n2uq") for b in ("w4a4", "w3a3") for v in ("base", "both")]
        every += [(m, b, v) for m in ("lsq", "n2uq") for b in ("w4a4", "w3a3") for v in ("gabfusion", "ada")]
        assert core == {(*e, s) for e in [*every, ("float", "", "")] for s in range(3)}


# --- bootstrap --------------------------------------------------------------------------------------------------------


def random_samples(images=12, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    detections, labels = 40 * images, 6 * images
    scores = generator.permutation(detections) / detections  # no ties
    image = generator.integers(images, size=detections)
    correct = generator.random((detections, 1)) < (image / images)[:, None] * np.linspace(0.5, 0.1, 10)
    return Samples(
        correct, scores, generator.integers(classes, size=detections), image,
        generator.integers(classes, size=labels).astype(float), generator.integers(images, size=labels),
    )  # fmt: skip


def test_the_first_resample_is_the_set_itself(modules):
    samples, bootstrap = random_samples(), modules["bootstrap"]
    weights = bootstrap.draw_images(12, resamples=3)
    found = bootstrap.resampled_map(bootstrap.Counts.of(samples, 12, 3), weights)
    table = ap_per_class(samples.correct, samples.scores, samples.predicted, samples.actual)
    assert found[0] == pytest.approx([table.ap50.mean(), table.ap75.mean()], abs=1e-12)
    assert (weights[1:].sum(1) == 12).all() and (weights[1] != weights[2]).any()


def test_a_resample_is_the_set_with_images_repeated(modules):
    """Against the metric over a set in which images really are repeated or missing."""
    samples, bootstrap = random_samples(), modules["bootstrap"]
    weights = np.array([[0, 3, 1, 1, 2, 0, 1, 0, 1, 1, 2, 0]])
    found = bootstrap.resampled_map(bootstrap.Counts.of(samples, 12, 3), weights)
    take, labels = np.repeat(np.arange(480), weights[0, samples.image]), weights[0, samples.label_image]
    repeated = ap_per_class(
        samples.correct[take], samples.scores[take], samples.predicted[take], np.repeat(samples.actual, labels)
    )
    assert found[0] == pytest.approx([repeated.ap50.mean(), repeated.ap75.mean()], abs=5e-3)
    plain = ap_per_class(samples.correct, samples.scores, samples.predicted, samples.actual)
    assert abs(repeated.ap50.mean() - plain.ap50.mean()) > 2e-2  # the two sets differ by more than the tolerance


def test_a_class_without_labels_in_a_resample_does_not_count(modules):
    bootstrap = modules["bootstrap"]
    correct = np.ones((2, 10), bool)
    samples = Samples(correct, np.array([0.9, 0.8]), np.array([0, 1]), np.array([0, 1]), np.array([0, 1]), np.arange(2))
    found = bootstrap.resampled_map(bootstrap.Counts.of(samples, 2, 2), np.array([[1, 1], [2, 0]]))
    assert found == pytest.approx(0.995)  # what compute_ap gives where everything is right


def test_counts_survive_a_file(modules, tmp_path):
    bootstrap = modules["bootstrap"]
    counts = bootstrap.Counts.of(random_samples(), 12, 3)
    counts.save(tmp_path / "counts.npz")
    again = bootstrap.Counts.load(tmp_path / "counts.npz")
    assert all(np.array_equal(value, getattr(again, name)) for name, value in vars(counts).items())


def test_the_interval_of_a_mean_over_seeds_has_the_width_that_theory_gives(modules):
    """Seeds with a spread of 1 around 5: the bootstrap's deviation of the mean of S of them is sqrt(var / S)."""
    bootstrap = modules["bootstrap"]
    values = np.repeat(np.array([[3.5], [4.5], [5.5], [6.5]]), 4001, axis=1)
    means = bootstrap.mean_over_seeds(values)
    assert means[0] == 5.0
    assert means[1:].std() == pytest.approx(np.sqrt(1.25 / 4), rel=0.05)
    low, high = bootstrap.interval(means)
    assert low == pytest.approx(4.0, abs=0.3) and high == pytest.approx(6.0, abs=0.3)


def test_a_gain_is_over_the_variant_that_a_grid_names(modules, tmp_path):
    variants = {"alone": {"recipe": {"distillation": False}}, "more": {"flags": ["--ada"], "against": "alone"}}
    grid = grid_of(modules, tmp_path, variants=variants, runs=[{"method": "lsq"}])
    kept = dict.fromkeys(("mAP75", "mAP", "matched", "IoU", "train_seconds"), 0.5) | {"date": "today"}
    rows = {}
    for variant, value in {"base": 0.8, "alone": 0.5, "more": 0.6, "both": 0.7}.items():
        runs = [{"mAP50": value, "cell": {"seed": 0}, **kept}]
        rows["pcb", "lsq", "w4a4", variant] = {"runs": runs, "resampled": np.full((1, 5, 2), value)}
    gains = {e["variant"]: e["gain"] and e["gain"]["points"] for e in modules["accuracy"].summarise(rows, grid)}
    assert gains["base"] is None
    assert [gains[name] for name in ("alone", "more", "both")] == pytest.approx([-30, 10, -10])
    lines = modules["accuracy"].table(modules["accuracy"].summarise(rows, grid))
    assert any("+10.0 [+10.0, +10.0] over alone" in line for line in lines)


# --- a grid that is run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_grid(tmp_path_factory):
    """A grid file over eight training images and a network of a few thousand weights."""
    root = tmp_path_factory.mktemp("accuracy")
    draw_shapes(root / "set", seed=3, drawing=Drawing(train_images=8, val_images=4, image_size=64))
    names = dict(enumerate(CLASSES))
    spec = {"path": "set", "train": "images/train", "val": "images/val", "names": names}
    (root / "set.yaml").write_text(yaml.safe_dump(spec))
    (root / "small.yaml").write_text(yaml.safe_dump(SMALL))
    settings = {"yaml": str(root / "set.yaml"), "cfg": str(root / "small.yaml"), "image_size": 64, "batch_size": 4}
    settings |= {"float_epochs": 1, "epochs": 1, "holdout": 0.25}
    variants = {"slow": {"recipe": {"distillation": "feature_mse"}, "hyp": {"quant_lr0": 0.0005}, "flags": ["--ada"]}}
    runs = [{"method": "float"}, {"method": "lsq", "variant": ["base", "slow"]}]
    (root / "grid.yaml").write_text(
        yaml.safe_dump({"title": "Tiny", "data": {"drawn": settings}, "variants": variants, "runs": runs})
    )
    return root


def command(modules, root, *arguments):
    return modules["accuracy"].main(
        [str(root / "grid.yaml"), "--output", str(root / "out"), "--document", str(root / "results.md"), *arguments]
    )


@pytest.fixture(scope="module")
def done(modules, tiny_grid):
    """All trainings of the tiny grid, in this process."""
    grid = modules["grid"].read_grid(tiny_grid / "grid.yaml")
    for cell in grid.cells:
        modules["accuracy"].run_cell(cell, grid, tiny_grid / "out")
    return tiny_grid


def test_rows_differ_in_what_they_say_and_in_nothing_else(done, modules):
    out = done / "out"
    last = {p.name: load_checkpoint(p / "weights" / "last.pt") for p in out.iterdir() if p.is_dir()}
    start = str(out / "drawn_start" / "weights" / "last.pt")
    rows = {name: checkpoint for name, checkpoint in last.items() if name != "drawn_start"}
    assert all(row["options"]["weights"] == start and row["epochs"] == 1 for row in rows.values())
    assert last["drawn_float_seed0"]["quantization"] is None
    for key in ("weight_decay", "nominal_batch", "ema_decay"):
        assert last["drawn_float_seed0"]["hyp"][key] == last["drawn_lsq_w4a4_base_seed0"]["hyp"][f"quant_{key}"]
    assert last["drawn_float_seed0"]["options"]["optimizer"] == "SGD"
    assert {key: last["drawn_float_seed0"]["hyp"][key] for key in ("lr0", "momentum")} == modules["accuracy"].FLOAT_SGD
    slow, base = (last[f"drawn_lsq_w4a4_{variant}_seed0"] for variant in ("slow", "base"))
    assert slow["quantization"]["ada"]["enabled"] and slow["quantization"]["distillation"]["feature_mse"] > 0
    assert not base["quantization"]["ada"]["enabled"] and base["quantization"]["distillation"]["feature_mse"] == 0
    assert slow["hyp"] == {**base["hyp"], "quant_lr0": 0.0005}


def test_stages_come_before_a_rows_own_bits_and_off_its_epochs(done, modules):
    values = yaml.safe_load((done / "grid.yaml").read_text())
    values["data"]["drawn"]["epochs"] = 3
    values["variants"] = {"staged": {"stages": [["w6a6", 1], ["w4a4", 1]]}}
    values["runs"] = [{"method": "lsq", "bits": "w3a3", "variant": "staged"}]
    (done / "staged.yaml").write_text(yaml.safe_dump(values))
    out = done / "staged"
    shutil.copytree(done / "out" / "drawn_start", out / "drawn_start")
    grid = modules["grid"].read_grid(done / "staged.yaml")
    modules["accuracy"].run_cell(grid.cells[0], grid, out)
    folder = out / "drawn_lsq_w3a3_staged_seed0"
    files = [path / "weights" / "last.pt" for path in (out / "drawn_start", folder / "w6a6", folder / "w4a4", folder)]
    for before, file, bits in zip(files, files[1:], (6, 4, 3), strict=False):
        checkpoint = load_checkpoint(file)
        assert checkpoint["quantization"]["weight"]["bits"] == checkpoint["quantization"]["activation"]["bits"] == bits
        assert checkpoint["options"]["weights"] == str(before) and checkpoint["options"]["teacher"] == str(files[0])
        assert checkpoint["epochs"] == 1 and checkpoint["finished"]
    assert (folder / "result.json").exists()


def test_a_holdout_is_trained_on_by_none_and_reported_on(done):
    out = done / "out"
    train_images, held = (set((out / f"drawn_{part}.txt").read_text().split()) for part in ("train", "val"))
    assert len(train_images) == 6 and len(held) == 2 and not train_images & held
    assert json.loads((out / "drawn_float_seed0" / "result.json").read_text())["images"] == 2
    data = {load_checkpoint(file)["options"]["data"] for file in out.rglob("last.pt")}
    assert data == {str(out / "drawn_holdout.yaml")}


def test_results_of_other_settings_are_refused_and_named(done, modules, capsys):
    values = yaml.safe_load((done / "grid.yaml").read_text())
    values["data"]["drawn"]["epochs"] = 2
    (done / "changed.yaml").write_text(yaml.safe_dump(values))
    arguments = [str(done / "changed.yaml"), "--output", str(done / "out"), "--document", str(done / "changed.md")]
    for more in ([], ["--report"]):
        assert modules["accuracy"].main([*arguments, *more]) == 1
        assert "epochs 1, now 2" in capsys.readouterr().out
    values["data"]["drawn"]["epochs"], values["variants"]["slow"]["hyp"] = 1, {"quant_lr0": 0.001}
    (done / "changed.yaml").write_text(yaml.safe_dump(values))
    assert modules["accuracy"].main(arguments) == 1
    assert "hyp {'quant_lr0': 0.0005}, now {'quant_lr0': 0.001}" in capsys.readouterr().out
    assert not (done / "changed.md").exists()
    assert modules["accuracy"].main([*arguments, "--only", "drawn_lsq_w4a4_slow_seed0"]) == 1
    assert "now {'quant_lr0': 0.001}" in capsys.readouterr().out


def test_what_was_begun_with_other_settings_is_not_taken_up(done, modules, capsys, tmp_path):
    """A row that was interrupted, and the float start that new rows would begin with."""
    out = tmp_path / "out"
    shutil.copytree(done / "out", out)
    row = out / "drawn_lsq_w4a4_base_seed0"
    (row / "result.json").unlink()
    values = yaml.safe_load((done / "grid.yaml").read_text())
    for key, value, told in (("epochs", 2, "epochs 1, now 2"), ("float_epochs", 2, "float_epochs 1, now 2")):
        changed = yaml.safe_load((done / "grid.yaml").read_text())
        changed["data"]["drawn"][key] = value
        changed["runs"] = [{"method": "lsq", "seed": 0 if key == "epochs" else 5}]
        (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
        name = f"drawn_lsq_w4a4_base_seed{changed['runs'][0]['seed']}"
        assert modules["accuracy"].main([str(tmp_path / "changed.yaml"), "--output", str(out), "--only", name]) == 1
        assert told in capsys.readouterr().out and not (out / name / "result.json").exists()
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values))
    arguments = [str(tmp_path / "grid.yaml"), "--output", str(out)]
    assert modules["accuracy"].main([*arguments, "--only", row.name]) == 0 and (row / "result.json").exists()


def test_ctrl_c_ends_everything_and_the_same_command_goes_on(tiny_grid, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "benchmarks/accuracy.py", str(tiny_grid / "grid.yaml"), "--output", str(out)]
    root = BENCHMARKS.parent
    # A shell's background jobs, of which pytest may be one, ignore the signal and hand that on.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "start_new_session": True}
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, **heeds)
    limit = time.monotonic() + 120
    while not list(out.glob("drawn_float_seed0/weights")) and time.monotonic() < limit:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the pool's processes too
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on where" in told and "Traceback" not in told
    assert not list(out.glob("*/result.json"))
    with pytest.raises(ProcessLookupError):  # nobody is left, if not at once
        while time.monotonic() < limit + 30:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and len(list(out.glob("*/result.json"))) == 3


def test_a_report_of_nothing_leaves_the_document_alone(done, modules, capsys):
    document = done / "kept.md"
    document.write_text("tables\n")
    arguments = [str(done / "grid.yaml"), "--output", str(done / "empty"), "--document", str(document), "--report"]
    assert modules["accuracy"].main(arguments) == 1
    assert "no finished training" in capsys.readouterr().out and document.read_text() == "tables\n"


def test_what_is_done_is_not_done_again(done, modules, capsys):
    files = {p: p.stat().st_mtime_ns for p in (done / "out").rglob("last.pt")}
    assert len(files) == 4
    assert command(modules, done) == 0
    assert files == {p: p.stat().st_mtime_ns for p in (done / "out").rglob("last.pt")}
    text = (done / "results.md").read_text()
    assert "## Tiny" in text and "w4a4 lsq slow" in text and "Not yet run" not in text
    entries = {e["variant"]: e for e in json.loads((done / "out" / "accuracy_grid.json").read_text())["rows"]}
    result = json.loads((done / "out" / "drawn_lsq_w4a4_slow_seed0" / "result.json").read_text())
    base = json.loads((done / "out" / "drawn_lsq_w4a4_base_seed0" / "result.json").read_text())
    assert entries["slow"]["mAP50"] == result["mAP50"] and entries["slow"]["minutes"] == result["train_seconds"] / 60
    assert entries["slow"]["gain"]["points"] == pytest.approx(100 * (result["mAP50"] - base["mAP50"]), abs=1e-6)
    assert entries["base"]["gain"] is None and entries["base"]["gap"] is not None and entries["base"]["spread"] is None


def test_the_tables_of_a_grid_of_ones_own_go_beside_its_trainings(done, modules):
    project = Path(modules["accuracy"].ROOT) / "docs" / "results.md"
    before = project.read_bytes()
    (done / "core.yaml").write_bytes((done / "grid.yaml").read_bytes())  # the name of one of the project's
    assert modules["accuracy"].main([str(done / "core.yaml"), "--output", str(done / "out"), "--report"]) == 0
    assert "## Tiny" in (done / "out" / "results.md").read_text() and project.read_bytes() == before


def test_what_is_missing_is_run_in_a_process_of_its_own(done, modules, capsys):
    result = done / "out" / "drawn_lsq_w4a4_base_seed0" / "result.json"
    before = json.loads(result.read_text())
    result.unlink()
    assert command(modules, done, "--report") == 0
    assert "Not yet run: 1 of 3" in (done / "results.md").read_text()
    assert command(modules, done, "--jobs", "2") == 0
    after = json.loads(result.read_text())
    assert after["mAP50"] == before["mAP50"] and "done" in capsys.readouterr().out


def test_a_training_that_fails_is_named_and_the_others_go_on(done, modules, capsys):
    values = yaml.safe_load((done / "grid.yaml").read_text())
    values["variants"]["wrong"] = {"hyp": {"quant_lr0": -1.0}}
    values["runs"].insert(0, {"method": "lsq", "variant": "wrong"})
    (done / "wrong.yaml").write_text(yaml.safe_dump(values))
    arguments = ["--output", str(done / "out"), "--document", str(done / "results.md")]
    assert modules["accuracy"].main([str(done / "wrong.yaml"), *arguments]) == 1
    assert "drawn_lsq_w4a4_wrong_seed0: FAILED" in capsys.readouterr().out
    log = (done / "out" / "drawn_lsq_w4a4_wrong_seed0" / "log.txt").read_text()
    assert "quant_lr0" in log and "Traceback" not in log


@pytest.mark.parametrize(
    "variant, told",
    [
        ({"recipe": {"weight": {"bits": 11}}}, ["variant wrong, lsq w4a4", "recipe.yaml", "weight.bits"]),
        ({"flags": ["--gabfusoin"]}, ["variant wrong", "flags", "--gabfusoin"]),
        ({"recipe": "no-such-recipe"}, ["variant wrong", "no-such-recipe"]),
    ],
)
def test_what_cannot_be_trained_is_said_before_the_float_start(tiny_grid, modules, capsys, variant, told, tmp_path):
    values = yaml.safe_load((tiny_grid / "grid.yaml").read_text())
    values |= {"variants": {"wrong": variant}, "runs": [{"method": "lsq", "variant": "wrong"}]}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    for more in ([], ["--only", "drawn_lsq_w4a4_wrong_seed0"]):
        assert modules["accuracy"].main([str(tmp_path / "wrong.yaml"), "--output", str(tmp_path / "out"), *more]) == 1
        out = capsys.readouterr().out
        assert all(word in out for word in told) and not any((tmp_path / "out").rglob("last.pt"))


def test_an_unknown_training_is_refused(done, modules, capsys):
    assert command(modules, done, "--only", "nothing") == 1
    assert "nothing" in capsys.readouterr().out


@pytest.mark.parametrize(("parent", "code"), [("0", 1), ("os.getppid()", 7)])
def test_a_training_ends_with_the_process_that_started_it_and_not_before(parent, code):
    program = f"import os, sys, time; sys.path.insert(0, sys.argv[1]); import accuracy; accuracy.begin({parent})"
    program += "; time.sleep(3); sys.exit(7)"
    assert subprocess.run([sys.executable, "-c", program, str(BENCHMARKS)], timeout=50).returncode == code
