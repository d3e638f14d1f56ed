"""The pages that a newcomer starts with, run as they stand but on small pictures; and the examples in Python."""

import importlib
import math
import re
import shutil
import sys
from pathlib import Path

import cv2
import pytest
import torch
import yaml
from small_detector import SMALL as SMALL_NETWORK
from small_detector import TINY, assert_verified, float_detector, save, tiny_detector

import detect
import export
import train
import val
from quant.registry import QUANTIZERS
from run_report.__main__ import main as report
from utils.checkpoint import load_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from pages import PAGES, ROOT, blocks, commands, script_of

# What makes a command small; what is said twice counts the second time.
SMALL = ["--imgsz", "64", "--device", "cpu"]
TRAINING = [*SMALL, "--batch-size", "4", "--workers", "0", "--noplots", "--project", "runs/train"]


def run(command, *more):
    """Runs one command of a page in this process; it must succeed."""
    name, *arguments = script_of(command)
    arguments += more
    if name == "train.py":
        train.main(train.parse_arguments([*arguments, *TRAINING]))
    elif name == "-m":
        assert arguments.pop(0) == "run_report" and report(arguments) == 0
    else:
        program = {"val.py": val, "detect.py": detect, "export.py": export}[name]
        kept = [] if program is export else ["--project", f"runs/{name[:-3]}"]
        assert program.main([*arguments, *SMALL, *kept]) == 0, command


def test_quick_start(tiny_dataset, tmp_path, monkeypatch):
    page = ROOT / "docs" / "quick-start.md"
    wanted = [c for c in commands(page) if c[0] == "python"]
    assert [c[1] for c in wanted] == ["train.py", "val.py", "detect.py", "export.py", "val.py"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_dataset.parent, "datasets/shapes")
    data = ["--data", str(tiny_dataset)]
    Path("small.yaml").write_text(yaml.safe_dump(SMALL_NETWORK))
    run(wanted[0], *data, "--cfg", "small.yaml", "--float-epochs", "1", "--epochs", "1")
    folder = Path("runs/train/exp")
    table = re.findall(r"^\| (`.*) \| .* \|$", page.read_text(encoding="utf-8"), re.M)
    listed = {Path(name).name for row in table for name in re.findall(r"`(.*?)`", row)}
    there = {file.name for file in folder.rglob("*")} | {"report.html"}  # --noplots draws none
    assert len(listed) >= 10 and listed <= there
    for command in wanted[1:]:
        run(command, *(data if command[1] != "detect.py" else ()))
    assert len(list(Path("runs/detect/exp").glob("*.png"))) == 4
    for name in ("best.onnx", "best_storage.onnx", "best_openvino_model/best.xml"):
        assert (folder / "weights" / name).is_file()

    monkeypatch.syspath_prepend(str(ROOT / "docs"))  # the picture of the README, of this run
    picture = importlib.import_module("picture")
    monkeypatch.setattr(picture, "FILE", tmp_path / "shapes.jpg")
    picture.main(str(folder))
    assert cv2.imread("shapes.jpg").shape == (2 * (picture.BAND + picture.SIDE), 4 * 264 - 8, 3)


def test_training_on_your_data(tiny_dataset, tmp_path, monkeypatch):
    page = ROOT / "docs" / "training.md"
    data = next(block for block in blocks(page, "yaml") if block.startswith("path"))
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(data)
    shutil.copytree(tiny_dataset.parent, "mine")
    for file in Path("mine/labels").rglob("*.txt"):  # two classes, as on the page
        file.write_text(re.sub(r"^\d+", lambda number: str(int(number[0]) % 2), file.read_text(), flags=re.M))
    save(float_detector({**TINY, "nc": 3}), tmp_path / "yolov5n.pt")
    foreign, own, calibrated, compared = [c for c in commands(page) if c[0] == "python" and "--evolve" not in c]

    run(foreign, "--float-epochs", "1", "--epochs", "1")
    weights = Path("runs/train/exp/weights")
    assert (weights / "float_best.pt").is_file()  # other classes: there is a float phase
    shutil.copy(weights / "float_best.pt", "my_detector.pt")
    run(own, "--epochs", "1")
    assert not Path("runs/train/exp2/weights/float_last.pt").exists()
    run(calibrated)
    saved = load_checkpoint(Path("runs/train/exp3/weights/best.pt"))
    assert saved["quantization"]["weight"]["bits"] == 8
    assert saved["names"] == dict(enumerate(yaml.safe_load(data)["names"]))
    run(compared)
    assert Path("comparison.html").is_file()


def test_pages_with_python_are_run_by_some_test():
    """python.md by tests/quant/test_python_interface.py and tests/models/test_load.py, deploy.md by
    tests/test_deploy_page.py, the other two below."""
    found = {page.stem for page in PAGES if blocks(page, "python")}
    assert found == {"python", "deploy", "quick-start", "adding-a-method"}


def test_importing_the_installed_package():
    (text,) = blocks(ROOT / "docs" / "quick-start.md", "python")
    space = {}
    exec(compile(text, "quick-start.md", "exec"), space)
    assert callable(space["load"])


@pytest.fixture
def added_method(tmp_path, monkeypatch):
    """The example of adding-a-method.md, in the registry for one test."""
    file, registration = blocks(ROOT / "docs" / "adding-a-method.md", "python")
    (tmp_path / "power_of_two_of_the_page.py").write_text(file, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    method = importlib.import_module("power_of_two_of_the_page").PowerOfTwo
    monkeypatch.setitem(QUANTIZERS, "power", None)  # taken out again afterwards
    exec(registration, {"QUANTIZERS": QUANTIZERS, "PowerOfTwo": method})
    return method


@pytest.mark.parametrize("bits", [3, 8])
def test_the_added_method_trains_folds_and_exports(added_method, bits):
    assert QUANTIZERS["power"] is added_method
    model = tiny_detector("power", bits, 2, gabfusion=True)
    steps = [q.current_step() for q in model.modules() if isinstance(q, added_method)]
    assert len(steps) > 5
    for step in steps:
        assert torch.equal(step.log2(), step.log2().round())
    assert_verified(model)


def test_the_added_method_learns_by_the_formula(added_method):
    """Against LSQ's dy/ds (arXiv 1902.08153, eq. 3) in float64, times ds/de = s log 2."""
    quantizer = added_method.for_activations(4, "affine", added_method.Options())
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0] = 8.0
    quantizer.initialise(x)
    upstream = torch.arange(x.numel()).reshape(x.shape)
    (quantizer(x) * upstream).sum().backward()
    step, zero = float(quantizer.current_step().detach()), float(quantizer.zero_point)
    v = x.double() / step
    low, high = -zero, 15 - zero
    slope = torch.where((v >= low) & (v <= high), v.round() - v, v.clamp(low, high))
    assert 0 < zero < 15 and (v > high).any()
    expected = (slope * upstream).sum() * step * math.log(2)
    torch.testing.assert_close(quantizer.exponent.grad.double().squeeze(), expected, rtol=1e-4, atol=1e-3)
