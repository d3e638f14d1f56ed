import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import yaml

import val
from models.backend import load_backend
from models.yolo import DetectionModel
from utils.checkpoint import save_checkpoint
from utils.dataset import create_dataloader
from utils.dataset_yaml import load_dataset_yaml
from utils.loss import DetectionLoss
from utils.optim import parameter_groups
from utils.paths import ROOT

HYP = {"box": 0.05, "cls": 0.5, "obj": 1.0, "cls_pw": 1.0, "obj_pw": 1.0, "anchor_t": 4.0, "fl_gamma": 0.0}


class Oracle:
    """A detector that knows the labels: it returns each of them with confidence 0.9, shifted by ``shift`` pixels."""

    def __init__(self, loader, classes, shift=0.0):
        self.answers, self.shift = [], shift
        for images, targets, _, _ in loader:
            height, width = images.shape[2:]
            batch = torch.zeros(len(images), 40, 5 + classes)
            for index in range(len(images)):
                mine = targets[targets[:, 0] == index]
                batch[index, : len(mine), :4] = mine[:, 2:] * torch.tensor([width, height, width, height])
                batch[index, : len(mine), 4] = 0.9
                batch[index, torch.arange(len(mine)), 5 + mine[:, 1].long()] = 1.0
            batch[..., 0] += shift
            self.answers.append(batch)

    def __call__(self, images):
        return self.answers.pop(0)


@pytest.fixture
def loaded(tiny_dataset):
    spec = load_dataset_yaml(tiny_dataset)
    loader, _ = create_dataloader(spec.val, 96, 2, rect=True, pad=0.5, workers=0, prefix="val")
    return spec, loader


@pytest.fixture
def weights(tiny_dataset, tmp_path):
    """A small untrained model with the data set's classes, as a checkpoint."""
    names = load_dataset_yaml(tiny_dataset).names
    torch.manual_seed(0)
    model = DetectionModel("yolov5n.yaml", nc=len(names))
    model.names = names
    stride = [float(s) for s in model.stride]
    content = {"format": 1, "model_yaml": model.yaml, "names": names, "stride": stride, "quantization": None}
    content |= {"anchors": model.detect.anchors, "model": model.state_dict(), "ema": None, "phase": "float"}
    save_checkpoint(content, tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


def evaluate(model, spec, loader, **options):
    return val.evaluate(model, loader, names=spec.names, device=torch.device("cpu"), **options)


def test_perfect_answers_measure_as_perfect(loaded, tmp_path, capsys):
    spec, loader = loaded
    output = val.OutputOptions(folder=tmp_path, plots=True, text=True, confidence=True, json=tmp_path / "p.json")
    result = evaluate(Oracle(loader, spec.nc), spec, loader, output=output, verbose=True)
    assert result.images == 4 and result.instances == sum(len(rows) for rows in loader.dataset.labels)
    assert min(result.precision, result.recall) > 0.95 and result.map50 > 0.99 and result.map > 0.99
    assert result.coco[:2] == pytest.approx((1.0, 1.0), abs=1e-3)
    matched = result.matched
    assert matched.count == result.instances and matched.share == matched.class_accuracy == 1.0
    assert result.map75 > 0.99 and matched.mean_iou > 0.98 and matched.confidence == result.per_class.confidence
    assert np.array_equal(result.confusion.matrix, np.diag(np.diag(result.confusion.matrix)))
    assert np.diag(result.confusion.matrix).sum() == result.instances
    assert result.map_by_class(spec.nc).shape == (spec.nc,) and set(result.speed) == {"preprocess", "inference", "nms"}
    for name in (
        "confusion_matrix.png",
        "PR_curve.png",
        "F1_curve.png",
        "val_batch0_labels.jpg",
        "val_batch1_pred.jpg",
    ):
        assert (tmp_path / name).stat().st_size > 1000

    lines = capsys.readouterr().out.splitlines()
    last = [line for line in lines if line.startswith("mAP75")]
    assert len(last) == 1 and "100.0% of labels, mean IoU 1.0000" in last[0] and "class accuracy 1.0000" in last[0]
    table = [line.split() for line in lines if line.split()[:1] in ([name] for name in ("all", *spec.names.values()))]
    assert table[0][:3] == ["all", "4", str(result.instances)] and len(table) == 1 + len(result.per_class.classes)
    for file, rows in zip(loader.dataset.image_files, loader.dataset.labels, strict=True):
        text = (tmp_path / "labels" / f"{file.rsplit('/', 1)[1].rsplit('.', 1)[0]}.txt").read_text()
        written = np.array([[float(cell) for cell in line.split()] for line in text.splitlines()])
        assert np.allclose(written[:, 5], 0.9, atol=1e-4)
        key = np.lexsort(written[:, :5].round(2).T)
        np.testing.assert_allclose(written[key, :5], rows[np.lexsort(rows.round(2).T)], atol=2e-3)
    assert len(json.loads((tmp_path / "p.json").read_text())) == result.instances


def test_wrong_places_measure_as_nothing(loaded):
    spec, loader = loaded
    result = evaluate(Oracle(loader, spec.nc, shift=500.0), spec, loader)
    assert result.map50 == 0.0 and result.recall == 0.0


def test_localisation_and_classification_are_told_apart(loaded):
    spec, loader = loaded
    misplaced = evaluate(Oracle(loader, spec.nc, shift=3.0), spec, loader)
    oracle = Oracle(loader, spec.nc)
    for batch in oracle.answers:
        batch[..., 5:] = batch[..., 5:].roll(1, dims=2)
    misnamed = evaluate(oracle, spec, loader, confidence_threshold=0.5)
    # Of a box of width w, w - 3 pixels stay; the shifted box adds 3, or less at the right edge of the image.
    boxes = np.concatenate(loader.dataset.labels) * 96
    width, room = boxes[:, 3], 96 - (boxes[:, 1] + boxes[:, 3] / 2)
    expected = ((width - 3) / (width + np.minimum(3, room))).mean()
    assert misplaced.matched.class_accuracy > 0.95 and misplaced.map75 < 0.9 * misplaced.map50
    assert misplaced.matched.mean_iou == pytest.approx(float(expected), abs=0.01)
    assert misnamed.matched.class_accuracy < 0.05 and misnamed.matched.mean_iou > 0.98


def test_single_class_forgives_wrong_classes(loaded):
    spec, loader = loaded
    oracle = Oracle(loader, spec.nc)
    for batch in oracle.answers:
        batch[..., 5:] = batch[..., 5:].roll(1, dims=2)
    wrong = [batch.clone() for batch in oracle.answers]
    assert evaluate(oracle, spec, loader).map50 < 0.3
    oracle.answers = wrong
    single, _ = create_dataloader(spec.val, 96, 2, rect=True, pad=0.5, workers=0, prefix="val", single_class=True)
    result = val.evaluate(oracle, single, names={0: "item"}, device=torch.device("cpu"), single_class=True)
    # Without classes overlapping objects suppress each other.
    assert result.map50 > 0.8 and len(result.per_class.classes) == 1


def test_hybrid_adds_the_labels(loaded):
    spec, loader = loaded
    result = evaluate(Oracle(loader, spec.nc, shift=500.0), spec, loader, output=val.OutputOptions(hybrid=True))
    assert result.map50 > 0.9


def test_losses_and_mode_of_a_module(loaded):
    spec, loader = loaded
    model = DetectionModel("yolov5n.yaml", nc=spec.nc).train()
    assert parameter_groups(model)[0]
    loss = DetectionLoss(model.detect.anchors, model.stride, spec.nc, HYP)
    result = evaluate(model, spec, loader, loss=loss)
    assert model.training and all(value > 0 for value in result.losses)
    model.eval()
    expected = torch.stack([loss(model(i.float() / 255)[1], t)[1] for i, t, _, _ in loader]).mean(0)
    assert result.losses == pytest.approx(expected.tolist(), rel=1e-4)


def test_command_line(weights, tiny_dataset, tmp_path, capsys):
    arguments = ["--weights", str(weights), "--data", str(tiny_dataset), "--project", str(tmp_path / "runs")]
    arguments += [
        "--img",
        "96",
        "--batch",
        "2",
        "--conf",
        "0.0005",
        "--iou",
        "0.6",
        "--save-txt",
        "--save-json",
        "--verb",
    ]
    assert val.main([*arguments, "--device", "cpu", "--workers", "0"]) == 0
    output = capsys.readouterr()
    assert "mAP50-95" in output.out and "Speed:" in output.out and output.err == ""
    assert (tmp_path / "runs" / "exp" / "tiny_predictions.json").is_file()
    assert val.main([*arguments, "--workers", "0", "--task", "speed", "--noplots"]) == 0
    assert (tmp_path / "runs" / "exp2").is_dir()


def test_classes_of_other_names_are_told(weights, tiny_dataset, tmp_path, capsys):
    data = yaml.safe_load(tiny_dataset.read_text())
    names = list(load_dataset_yaml(tiny_dataset).names.values())
    other = tmp_path / "other.yaml"
    arguments = ["--weights", str(weights), "--data", str(other), "--imgsz", "64", "--workers", "0", "--noplots"]
    arguments += ["--project", str(tmp_path / "runs")]
    for given, expected in (([names[0].upper(), *names[1:]], None), (["gadget", *names[1:]], "gadget")):
        other.write_text(yaml.safe_dump(data | {"path": str(tiny_dataset.parent), "names": given}))
        assert val.main(arguments) == 0
        told = capsys.readouterr().out
        assert ("are matched by number" in told) == bool(expected)
        assert expected is None or (f"class 0 is {names[0]!r}" in told and repr(expected) in told)


def test_a_study_measures_every_size_into_one_folder(weights, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(val, "STUDY_SIZES", (64, 96))
    runs, folder = tmp_path / "runs", tmp_path / "runs" / "exp"
    arguments = ["--weights", str(weights), str(weights), "--data", str(tiny_dataset), "--project", str(runs)]
    arguments += ["--task", "study", "--device", "cpu", "--workers", "0", "--iou", "0.7"]
    results = val.run(val.parse_options(arguments))
    assert list(runs.iterdir()) == [folder]
    tables, picture = sorted(folder.glob("*.txt")), cv2.imread(str(folder / "study.png"))
    assert len(tables) == 2 and picture.std() > 1  # of two files with one name
    for number, file in enumerate(tables):
        rows, mine = np.loadtxt(file), results[2 * number : 2 * number + 2]
        assert rows[:, 0].tolist() == [64, 96]
        np.testing.assert_allclose(rows[:, 3:5], [(result.map50, result.map) for result in mine], rtol=1e-3)


@pytest.mark.parametrize("flag", ["--imgsz", "--img", "--img-size"])
def test_aliases_and_abbreviations(flag):
    options = val.parse_options([flag, "320", "--batch", "4", "--conf", "0.1", "--iou", "0.5", "--max", "9"])
    assert (options.imgsz, options.batch_size, options.conf_thres, options.iou_thres) == (320, 4, 0.1, 0.5)
    assert options.max_det == 9


def test_mistakes_are_one_line(weights, tiny_dataset, tmp_path, capsys):
    data = yaml.safe_load(tiny_dataset.read_text())
    data["names"] = dict(enumerate("abc"))
    other = tiny_dataset.with_name("other.yaml")
    other.write_text(yaml.safe_dump(data))
    for arguments, text in (
        (["--weights", str(weights), "--data", str(other)], "names 3"),
        (["--weights", str(weights), "--data", str(tiny_dataset), "--dnn"], "onnxruntime"),
        (["--weights", str(weights), "--data", str(tiny_dataset), "--task", "test"], "test"),
        (["--weights", str(tmp_path / "none.pt"), "--data", str(tiny_dataset)], "none.pt"),
        (
            ["--weights", str(weights), "--data", str(tiny_dataset), "--name", str(other / "x")],
            "cannot be made (Not a directory)",
        ),
    ):
        assert val.main([*arguments, "--project", str(tmp_path / "runs"), "--workers", "0", "--img", "96"]) == 1
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("val.py: ")]
        assert len(lines) == 1 and text in lines[0]


@pytest.mark.parametrize(("size", "map50", "map50_95"), [(320, 0.386, 0.238), (640, 0.491, 0.310)])
def test_official_weights_measure_as_upstream(shared_data, tmp_path, size, map50, map50_95):
    arguments = ["--weights", str(shared_data / "weights" / "yolov5n.pt"), "--batch", "8", "--img", str(size)]
    arguments += ["--data", str(shared_data / "coco-slice" / "coco-slice.yaml"), "--project", str(tmp_path / "runs")]
    result = val.run(val.parse_options([*arguments, "--noplots", "--device", "cpu"]))
    assert (result.map50, result.map) == pytest.approx((map50, map50_95), abs=0.002)
    if size == 640:
        assert (result.precision, result.recall) == pytest.approx((0.517, 0.463), abs=0.005)


def test_confident_rows_measure_as_all_rows(loaded, weights):
    spec, loader = loaded
    backend = load_backend(weights, "cpu")
    torch.manual_seed(0)
    for convolution in backend.model.detect.m:
        convolution.weight.data.normal_(std=0.5)
        convolution.bias.data.zero_()
    ours = evaluate(backend, spec, loader)
    simple = evaluate(lambda images: backend(images.contiguous())[0], spec, loader)
    assert backend.model.detect.decodes and ours.per_class.labels.sum() == ours.instances
    assert np.array_equal(ours.per_class.ap, simple.per_class.ap) and ours.matched == simple.matched
    assert ours.matched.count > 0


def test_a_network_that_fails_decodes_again(loaded, weights):
    spec, loader = loaded
    backend = load_backend(weights, "cpu")
    backend.model.model[0].conv = torch.nn.Conv2d(4, 16, 1)
    with pytest.raises(RuntimeError):
        evaluate(backend, spec, loader)
    assert backend.model.detect.decodes


def test_bytes_become_floats_between_0_and_1():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    device = torch.device("cpu")
    assert torch.equal(val._to_device(None, images, device), images.float() / 255)
    given = torch.full((1, 3, 2, 2), 255.0)
    assert torch.equal(val._to_device(None, given, device), torch.ones(1, 3, 2, 2)) and given[0, 0, 0, 0] == 255


def test_nothing_is_imported_that_takes_seconds(weights):
    heavy = "matplotlib", "torchvision", "pandas", "onnx", "onnxruntime", "tensorboard", "torch._dynamo", "pycocotools"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import val, models.backend as b; b.load_backend(sys.argv[2])\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(ROOT), str(weights)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["[]"]


@pytest.mark.parametrize(
    "flag, value", [("--conf-thres", "1.5"), ("--iou-thres", "nan"), ("--batch-size", "0"), ("--max-det", "-1")]
)
def test_numbers_that_mean_nothing_are_refused_at_once(flag, value, capsys):
    assert val.main(["--weights", "missing.pt", f"{flag}={value}"]) == 1
    message = "".join(capsys.readouterr())
    assert f"{flag} " in message and "is needed" in message
