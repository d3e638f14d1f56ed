"""What somebody reads who gives a command something wrong: one line that says what, where and what to do instead.

Every case goes through the command's own parser and main function; the table is the list of messages.
"""

import importlib
import shutil
from types import SimpleNamespace

import pytest
import yaml
from small_detector import SMALL, float_detector, images, save

import detect
import export
import train
import utils.results
import val
from data.shapes import CLASSES, Drawing, draw_shapes
from models.yolo import DetectionModel
from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.prepare import prepare

NAMES = dict(enumerate(CLASSES))
COMMANDS = {
    "train.py": lambda arguments: train.command_line(),
    "val.py": val.main,
    "detect.py": detect.main,
    "export.py": export.main,
    **{
        name: importlib.import_module(module).main
        for name, module in (
            ("quant.report", "quant.report"),
            ("quant.precision", "quant.precision"),
            ("run_report", "run_report.__main__"),
            ("utils.convert", "utils.convert.__main__"),
        )
    },
}
SHORT = "--data data.yaml --cfg small.yaml --imgsz 64 --batch-size 4 --workers 0 --noplots --device cpu --epochs 1"
QUANT = f"{SHORT} --quant lsq --float-epochs 1"
EXISTS = "Give the path of a .pt file, or a released name such as yolov5n.pt"
METHODS = "lsq, lsq+, pact, dsq, n2uq"
BITS = "choose one of 2, 3, 4, 5, 6, 7, 8"

# Command, arguments, exit code, what it says; {here} is the folder in which it is started.
WRONG_USES = [
    # flags
    ("train.py", "--bitz 4", 2, "unknown flag --bitz, did you mean --bits?"),
    ("train.py", "--lr0 0.1", 2, "--lr0 is not here: hyperparameters stand in a YAML file, copy one of data/hyps"),
    ("train.py", "--epochs four", 2, "--epochs: 'four' is no whole number. All flags: train.py --help"),
    ("train.py", "data.yaml", 2, "data.yaml belongs to no flag"),
    ("train.py", "--optimizer Adm", 2, "--optimizer: invalid choice: 'Adm' (choose from"),
    ("export.py", "--keras", 2, "--keras is not here: TensorFlow files are made from the ONNX file (onnx2tf)"),
    ("val.py", "--task speeed", 2, "--task: invalid choice: 'speeed' (choose from"),
    ("utils.convert", "voc", 2, "invalid choice: 'voc' (choose from"),
    # numbers
    ("train.py", f"{SHORT} --epochs -3", 1, "--epochs -3: must be at least 0"),
    ("train.py", f"{SHORT} --epochs 0", 1, "--epochs 0 trains nothing; it calibrates only together with --quant"),
    ("train.py", f"{SHORT} --batch-size 0", 1, "--batch-size 0: must be at least 1"),
    ("train.py", f"{SHORT} --imgsz 7", 1, "--imgsz 7: must be at least 32"),
    ("train.py", f"{SHORT} --device 7777", 1, "--device 7777: GPU 7777 does not exist, PyTorch sees"),
    ("train.py", f"{SHORT} --freeze 99", 1, "--freeze 99: the network has layers 0 to 14"),
    ("val.py", "--weights float.pt --data data.yaml --conf 2", 1, "--conf-thres 2.0: a number from 0 to 1 is needed"),
    ("val.py", "--weights float.pt --data data.yaml --imgsz 0", 1, "--imgsz 0: at least 1 is needed"),
    ("detect.py", "--weights float.pt --source set --classes 9", 1, "--classes 9: the model has classes 0 to 3"),
    ("export.py", "--weights float.pt --opset 7", 1, "--opset 7: at least 12 is needed"),
    # files that are not there, or are something else
    ("train.py", f"{SHORT} --weights none.pt", 1, f"none.pt does not exist in {{here}}. {EXISTS}"),
    ("train.py", f"{SHORT} --weights set", 1, f"set is a folder. {EXISTS}"),
    ("train.py", f"{SHORT} --weights text.pt", 1, "text.pt is damaged or not a PyTorch file (at position 0,"),
    ("train.py", f"{SHORT} --weights broken.onnx", 1, "is an exported network; give the .pt that it was exported from"),
    ("train.py", f"{SHORT} --hyp none.yaml", 1,
     "--hyp none.yaml: no such file; files in data/hyps: hyp.Objects365.yaml"),
    ("train.py", f"{SHORT} --cfg yolov5q.yaml", 1, "Model YAML yolov5q.yaml does not exist. Give a path, or one of:"),
    ("val.py", "--weights text.txt --data data.yaml", 1,
     "'.txt' files are not supported, only .pt, .onnx, .torchscript"),
    ("val.py", "--weights broken.onnx --data data.yaml", 1, "broken.onnx: onnxruntime cannot load it:"),
    ("val.py", "--data data.yaml", 1, "no --weights given and no best.pt under"),
    ("detect.py", "--weights float.pt --source none.jpg", 1, "--source none.jpg: no such file or folder."),
    ("detect.py", "--weights float.pt --source empty", 1,
     "--source empty: no images or videos in it. Files with these"),
    ("run_report", "none", 1, "none: no such run folder; training writes them to runs/train/"),
    ("run_report", "set", 1, "set: neither opt.yaml nor results.csv is there, so this is no run of train.py"),
    # data
    ("train.py", f"{SHORT} --data cocco.yaml", 1, "cocco.yaml: no such data set YAML, neither in {here} nor in"),
    ("train.py", f"{SHORT} --data cocco.yaml", 1, "; did you mean coco.yaml?"),
    ("train.py", f"{SHORT} --data broken.yaml", 1, "broken.yaml, line 2, column 4: is not a valid YAML file: expected"),
    ("train.py", f"{SHORT} --data noval.yaml", 1, "noval.yaml: key 'val' is missing. A data set YAML needs train, val"),
    ("train.py", f"{SHORT} --data gone.yaml", 1,
     "nowhere/images/val not found. Put the images there, or correct 'path'"),
    ("train.py", f"{SHORT} --data bare.yaml", 1,
     "train: no labels for the 8 images in {here}/bare/images/train. Label"),
    ("train.py", f"{SHORT} --data few.yaml", 1,
     "has class 3, but the data set has 2 names (0 to 1). Correct the label"),
    ("val.py", "--weights other.pt --data data.yaml", 1,
     "detects 3 classes, data.yaml names 4: give weights trained on it"),
    ("val.py", "--weights float.pt --data data.yaml --task test", 1,
     "data.yaml: has no 'test' images. Add the key, or"),
    # quantization
    ("train.py", f"{SHORT} --bits 4", 1, "--bits needs --quant: add --quant lsq (or a --recipe)"),
    ("train.py", f"{SHORT} --gabfusion", 1, "--gabfusion needs --quant: add --quant lsq (or a --recipe)"),
    ("train.py", f"{SHORT} --quant lqs", 1, f"--quant lqs: did you mean lsq? It takes {METHODS}"),
    ("train.py", f"{QUANT} --bits 1", 1, f"--bits 1: 1 is not possible; {BITS}"),
    ("train.py", f"{QUANT} --bits 9", 1, f"--bits 9: 9 is not possible; {BITS}"),
    ("train.py", f"{QUANT} --bits w4", 1,
     "--bits w4: write one number (4), weights and activations (w4a8) or a budget"),
    ("train.py", f"{QUANT} --gabfusion learnabel", 1,
     "--gabfusion learnabel: did you mean learnable? It takes learnable,"),
    ("train.py", f"{QUANT} --ada mse", 1, "--ada mse: it takes auto, js, kl"),
    ("train.py", f"{QUANT} --recipe none.yaml", 1,
     "--recipe none.yaml: no such file; recipes that come along: gabfusion-"),
    ("train.py", f"{QUANT} --recipe key.yaml", 1, "key.yaml: unknown key 'wieght'; did you mean 'weight'?"),
    ("train.py", f"{SHORT} --recipe method.yaml", 1,
     f"method.yaml: method: 'lsqq' is not possible; choose one of {METHODS}"),
    ("train.py", f"{SHORT} --weights quantized.pt", 1,
     "quantized.pt is quantized already. Give float weights, --quant to train it on"),
    ("train.py", f"{QUANT} --teacher other.pt", 1,
     "--teacher other.pt knows other classes (ring, the 'second', dréi ...)"),
    ("train.py", f"{QUANT} --ada --teacher nano.pt", 1,
     "--teacher nano.pt is of another architecture: its layer 10 is (128,"),
    ("train.py", f"{QUANT} --teacher quantized.pt", 1,
     "quantized.pt is quantized; the teacher must be a float checkpoint"),
    ("train.py", f"{SHORT} --teacher float.pt", 1,
     "--teacher is whom a quantized network learns from: add --quant lsq"),
    ("export.py", "--weights float.pt --int8", 1,
     "--int8: quantize in training instead: train.py --quant lsq --bits 8"),
    ("export.py", "--weights quantized.pt --half", 1, "quantized.pt is quantized: --half is for float models"),
    ("quant.report", "--weights float.pt", 1, "--weights float.pt is not quantized: train it with --quant first"),
    ("quant.precision", "--weights quantized.pt --data data.yaml", 1, "is quantized already; give a float checkpoint"),
    # export and resuming
    ("export.py", "--weights float.pt --include onx", 1,
     "--include onx: not a format this project writes; use onnx, openvino,"),
    ("export.py", "--weights float.pt --include tflite", 1,
     "export --include onnx and convert that file: onnx2tf -i best.onnx"),
    ("export.py", "--weights broken.onnx", 1,
     "broken.onnx is exported already. To compare it with its checkpoint: --weights"),
    ("export.py", "--weights float.pt --imgsz -1", 1, "--imgsz -1: give one side, or height and width, in pixels"),
    ("train.py", "--resume", 1, "--resume: no last.pt under {here}/runs; name the file: --resume path/to/last.pt"),
    ("train.py", "--resume float.pt", 1, "--resume float.pt: this checkpoint is not from a training run"),
    ("train.py", "--evolve --resume", 1, "--evolve: a search is continued with --resume_evolve path/to/evolve.csv"),
]  # fmt: skip


def declare(root, file, **changes):
    """Writes a data set YAML; a key that is None is left out."""
    declaration = {"path": str(root / "set"), "train": "images/train", "val": "images/val", "names": NAMES} | changes
    text = yaml.safe_dump({key: value for key, value in declaration.items() if value is not None})
    (root / file).write_text(text, encoding="utf-8")


def named(model, path):
    """Saves a network of the data set's classes."""
    model.names = dict(NAMES)
    return save(model.eval(), path)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with data, weights and YAMLs of which most have something wrong."""
    root = tmp_path_factory.mktemp("wrong")
    draw_shapes(root / "set", seed=3, drawing=Drawing(train_images=8, val_images=4, image_size=64))
    shutil.copytree(root / "set", root / "bare")
    shutil.rmtree(root / "bare" / "labels")
    (root / "empty").mkdir()
    declare(root, "data.yaml")
    declare(root, "noval.yaml", val=None)
    declare(root, "few.yaml", names={0: "a", 1: "b"})
    declare(root, "gone.yaml", path=str(root / "nowhere"))
    declare(root, "bare.yaml", path=str(root / "bare"))
    for file, text in {
        "small.yaml": yaml.safe_dump(SMALL | {"nc": len(NAMES)}),
        "broken.yaml": "train: [images\nval: x: y\n",
        "key.yaml": "method: lsq\nwieght: {bits: 4}\n",
        "method.yaml": "method: lsqq\n",
        "text.pt": "no network",
        "text.txt": "no network",
        "broken.onnx": "no network",
    }.items():
        (root / file).write_text(text)
    named(float_detector(SMALL | {"nc": len(NAMES)}), root / "float.pt")
    named(DetectionModel("yolov5n.yaml", nc=len(NAMES)), root / "nano.pt")
    quantized = prepare(float_detector(SMALL | {"nc": len(NAMES)}), QuantConfig())
    calibrate(quantized, [images(2)])
    named(quantized, root / "quantized.pt")
    save(float_detector(), root / "other.pt")
    return root


def started(command, arguments, monkeypatch, capsys):
    """What a command's entry point does with a command line: exit code and output."""
    monkeypatch.setattr("sys.argv", [command, *arguments])
    try:
        code = COMMANDS[command](arguments)
    except SystemExit as end:  # argparse's way out
        code = end.code
    printed = capsys.readouterr()
    return SimpleNamespace(code=code, lines=(printed.out + printed.err).strip().splitlines())


@pytest.mark.parametrize(("command", "arguments", "code", "message"), WRONG_USES)
def test_a_wrong_use_is_told_in_one_line(here, monkeypatch, capsys, command, arguments, code, message):
    monkeypatch.chdir(here)
    monkeypatch.setattr(train, "WORK", here)
    monkeypatch.setattr(utils.results, "WORK", here)
    ended = started(command, [*arguments.split()], monkeypatch, capsys)
    last = ended.lines[-1]
    assert ended.code == code, ended.lines
    assert message.format(here=here) in last
    assert last.startswith(("ERROR: ", f"{command}: ", f"python -m {command}: "))
    assert sum("rror" in line.split(" ")[0] for line in ended.lines) <= 1 and "Traceback" not in "".join(ended.lines)
    assert not (here / "runs").exists()  # nothing was begun


def test_data_without_labels_is_measured_as_nothing(here, monkeypatch, capsys):
    """A warning only: label files may all be meant to be empty."""
    monkeypatch.chdir(here)
    arguments = "--weights float.pt --data bare.yaml --imgsz 64 --noplots --workers 0 --device cpu --project measured"
    ended = started("val.py", arguments.split(), monkeypatch, capsys)
    assert ended.code == 0
    assert any(line.startswith("WARNING: no labels found, so nothing can be measured.") for line in ended.lines)


def test_ctrl_c_is_no_traceback(here, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(val, "run", interrupt)
    ended = started("val.py", ["--weights", str(here / "float.pt")], monkeypatch, capsys)
    assert (ended.code, ended.lines) == (130, ["val.py: interrupted"])


def test_a_wider_teacher_may_give_its_raw_maps(here):
    """Only feature and attention maps need the same widths."""
    from training.phases import check_teacher
    from utils.errors import UserError

    wide = SMALL | {"nc": len(NAMES), "width_multiple": 2.0}
    teacher, student = (DetectionModel(config) for config in (wide, SMALL | {"nc": len(NAMES)}))
    check_teacher("wide.pt", teacher, student, QuantConfig())
    for blocks in ({"ada": True}, {"distillation": {"feature_mse": 1.0}}):
        with pytest.raises(UserError, match="another architecture: its layer 10"):
            check_teacher("wide.pt", teacher, student, QuantConfig.from_dict({"method": "lsq", **blocks}))
    assert teacher.training and student.training
