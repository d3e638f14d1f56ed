import csv

import cv2
import numpy as np
import pytest
import torch
from loopback import loopback

import detect
from models.yolo import DetectionModel
from utils.checkpoint import load_checkpoint, save_checkpoint

NAMES = {0: "cat", 1: "dog"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model that finds many boxes of class 1 everywhere: the biases of its output say so."""
    torch.manual_seed(0)
    model = DetectionModel("yolov5n.yaml", nc=2)
    for layer in model.detect.m:
        bias = layer.bias.detach().view(3, 7)
        bias[:, 4:] = torch.tensor([2.0, -4.0, 2.0])
        layer.bias.data = bias.flatten()
    stride = [float(s) for s in model.stride]
    content = {"format": 1, "model_yaml": model.yaml, "names": NAMES, "stride": stride, "quantization": None}
    content |= {"anchors": model.detect.anchors, "model": model.state_dict(), "ema": None, "phase": "float"}
    file = tmp_path_factory.mktemp("weights") / "dogs.pt"
    save_checkpoint(content, file)
    return file


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, shape in (("one.jpg", (60, 80)), ("two.png", (64, 64)), ("three.jpg", (90, 40))):
        cv2.imwrite(str(folder / name), generator.integers(0, 255, (*shape, 3), dtype=np.uint8))
    (folder / "notes.md").write_text("not an image")
    return folder


def call(weights, source, tmp_path, *arguments):
    base = ["--weights", str(weights), "--source", str(source), "--project", str(tmp_path / "runs"), "--device", "cpu"]
    return detect.main([*base, "--img", "64", *arguments])


def test_folder_with_text(weights, images, tmp_path, capsys):
    assert call(weights, images, tmp_path, "--save-txt", "--save-conf", "--max-det", "5") == 0
    folder = tmp_path / "runs" / "exp"
    for name in ("one.jpg", "two.png", "three.jpg"):
        drawn, original = cv2.imread(str(folder / name)), cv2.imread(str(images / name))
        assert drawn.shape == original.shape and (drawn != original).any()
    rows = [line.split() for line in (folder / "labels" / "one.txt").read_text().splitlines()]
    assert 1 <= len(rows) <= 5 and all(len(row) == 6 and row[0] == "1" for row in rows)
    values = np.array(rows, dtype=float)[:, 1:]
    assert (values >= 0).all() and (values <= 1).all()
    output = capsys.readouterr().out
    assert "image 3/3" in output and "dog" in output and "Speed:" in output
    # 60 x 80 is scaled to 48 x 64 and padded to the stride, not to a square.
    assert "one.jpg: 64x64" in output and "three.jpg: 64x32" in output


def test_boxes_equal_the_models_own(weights, images, tmp_path):
    from models.backend import load_backend
    from utils.nms import non_max_suppression

    image = cv2.imread(str(images / "two.png"))
    planes = torch.from_numpy(image[..., ::-1].transpose(2, 0, 1).copy()).float()[None] / 255
    expected = non_max_suppression(load_backend(weights, torch.device("cpu"))(planes)[0], 0.3, 0.5)[0]
    assert (
        call(weights, images / "two.png", tmp_path, "--save-txt", "--save-format", "1", "--conf", "0.3", "--iou", "0.5")
        == 0
    )
    text = (tmp_path / "runs" / "exp" / "labels" / "two.txt").read_text()
    found = np.array([line.split() for line in text.splitlines()], dtype=float)
    np.testing.assert_allclose(found[:, 1:], expected[:, :4].clamp(0, 64).numpy(), atol=1e-2)


def test_patterns_nosave_table_and_crops(weights, images, tmp_path):
    assert call(weights, images / "*.jpg", tmp_path, "--nosave", "--save-csv", "--save-crop", "--max-det", "2") == 0
    folder = tmp_path / "runs" / "exp"
    assert not list(folder.glob("*.jpg"))
    with open(folder / "predictions.csv", newline="") as stream:
        table = list(csv.reader(stream))
    assert table[0] == ["Image Name", "Prediction", "Confidence"] and len(table) == 5
    assert {row[0] for row in table[1:]} == {"one.jpg", "three.jpg"} and {row[1] for row in table[1:]} == {"dog"}
    assert len(list((folder / "crops" / "dog").glob("*.jpg"))) == 4


def test_classes_and_thresholds(weights, images, tmp_path):
    assert call(weights, images / "two.png", tmp_path, "--save-txt", "--classes", "0") == 0
    assert call(weights, images / "two.png", tmp_path, "--save-txt", "--conf-thres", "0.999") == 0
    assert not list((tmp_path / "runs").glob("exp*/labels/*.txt"))


def test_captions_can_be_hidden(weights, images, tmp_path):
    pictures = []
    for flags in ([], ["--hide-conf"], ["--hide-labels"]):
        assert call(weights, images / "two.png", tmp_path, "--max-det", "1", *flags) == 0
        folder = sorted((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)[-1]
        pictures.append(cv2.imread(str(folder / "two.png")))
    assert (pictures[0] != pictures[1]).any() and (pictures[1] != pictures[2]).any()


def test_video(weights, tmp_path, capsys):
    file = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 64))
    for index in range(6):
        writer.write(np.full((64, 80, 3), 40 * index, np.uint8))
    writer.release()
    assert call(weights, file, tmp_path, "--save-txt", "--vid-stride", "2") == 0
    capture = cv2.VideoCapture(str(tmp_path / "runs" / "exp" / "film.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and capture.get(cv2.CAP_PROP_FPS) == pytest.approx(5)
    assert capture.read()[1].shape == (64, 80, 3)
    assert len(list((tmp_path / "runs" / "exp" / "labels").glob("film_*.txt"))) == 3
    assert "video 1/1 (5/6)" in capsys.readouterr().out


def test_mistakes_are_one_line(weights, images, tmp_path, capsys):
    for arguments, text in (
        (["--classes", "7"], "--classes 7"),
        (["--conf", "3"], "--conf-thres 3"),
        (["--imgsz", "1", "2", "3"], "--imgsz 1 2 3"),
        (["--weights", "a.pt", "b.pt"], "a.pt"),
        (["--update"], "--update"),
        (["--dnn"], "onnxruntime"),
        (["--source", "screen 0"], "screens are not read"),
        (["--source", detect.DEFAULT_SOURCE], "give --source"),
        (["--visualize", "--augment"], "--visualize"),
        (["--line-thickness", "0"], "at least 1"),
        (["--vid-stride", "0"], "1 or more"),
        (["--source", str(tmp_path / "none.jpg")], "none.jpg"),
        (["--project", str(images / "one.jpg")], "one.jpg/exp: the folder of the results cannot be made (Not a dir"),
    ):
        assert call(weights, images, tmp_path, *arguments) == 1
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("detect.py: ")]
        assert len(lines) == 1 and text in lines[0]


def test_without_a_display_everything_else_is_done(weights, images, tmp_path, capsys, monkeypatch):
    def no_window(*_arguments):
        raise cv2.error("no display")

    monkeypatch.setattr(cv2, "imshow", no_window)
    assert call(weights, images, tmp_path, "--view-img") == 0
    assert capsys.readouterr().out.count("--view-img: there is no display") == 1
    assert len(list((tmp_path / "runs" / "exp").iterdir())) == 3


def test_feature_maps_of_every_layer(weights, images, tmp_path):
    assert call(weights, images / "two.png", tmp_path, "--visualize", "--nosave") == 0
    files = {file.name for file in (tmp_path / "runs" / "exp" / "two").iterdir()}
    assert len(files) == 48 and {"stage0_Conv_features.png", "stage23_C3_features.npy"} <= files


def test_augmented_and_several_weights(weights, images, tmp_path, capsys):
    """The biases alone decide of this network, so more passes find more boxes until suppression joins them."""
    found = []
    for arguments in ([], ["--augment"], ["--weights", str(weights), str(weights)]):
        assert call(weights, images / "two.png", tmp_path, *arguments, "--nosave", "--iou", "1") == 0
        found.append(int(capsys.readouterr().out.split("64x64 ")[1].split(" dog")[0]))
    assert found[2] == 2 * found[0] and found[0] < found[1] != found[2]


def test_agnostic_suppression(weights, images, tmp_path, capsys):
    """Two ensemble members that agree on boxes but not on classes: together, and one hiding the other."""
    other = load_checkpoint(weights)
    for name in (f"model.24.m.{level}.bias" for level in range(3)):
        other["model"][name] = other["model"][name].view(3, 7)[:, [0, 1, 2, 3, 4, 6, 5]].flatten()
    for name in (f"model.24.m.{level}.weight" for level in range(3)):
        shape = other["model"][name].shape
        other["model"][name] = other["model"][name].view(3, 7, -1)[:, [0, 1, 2, 3, 4, 6, 5]].reshape(shape)
    save_checkpoint(other, tmp_path / "cats.pt")
    lines = []
    for flags in ([], ["--agnostic-nms"]):
        arguments = ["--weights", str(weights), str(tmp_path / "cats.pt"), "--nosave", "--max-det", "300000", *flags]
        assert call(weights, images / "two.png", tmp_path, *arguments) == 0
        lines.append(capsys.readouterr().out.split("64x64 ")[1].split(", ")[:2])
    assert lines[0][0].split()[0] == lines[0][1].split()[0]  # as many cats as dogs
    counts = [sum(int(part.split()[0]) for part in line if part.split()[1][:3] in ("cat", "dog")) for line in lines]
    assert counts[1] < counts[0]


def test_a_picture_by_its_address_and_a_stream(weights, images, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("YOLOV5_QAT_OFFLINE", raising=False)
    with loopback() as site:
        site.files["/far/one.jpg"] = (images / "one.jpg").read_bytes()
        assert call(weights, f"{site.url}/far/one.jpg", tmp_path, "--save-txt") == 0
        assert (tmp_path / "runs" / "exp" / "labels" / "one.txt").is_file()
        assert call(weights, f"{site.url}/far/none.jpg", tmp_path) == 1
    assert "404" in capsys.readouterr().out
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 64))
    for index in range(6):
        writer.write(np.full((64, 80, 3), 40 * index, np.uint8))
    writer.release()
    monkeypatch.setattr("utils.streams.PAUSE", 0.01)
    with loopback() as site:
        site.files["/live"] = film.read_bytes()
        monkeypatch.setattr("utils.streams.ATTEMPTS", 0)
        assert call(weights, f"{site.url}/live", tmp_path, "--save-txt", "--save-crop", "--max-det", "1") == 0
    assert "stream 1/1" in capsys.readouterr().out
    folder = sorted((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)[-1]
    (video,) = folder.glob("*.mp4")
    assert cv2.VideoCapture(str(video)).read()[1].shape == (64, 80, 3)
    assert list((folder / "labels").glob("127_0_0_1_*_live_*.txt")) and list((folder / "crops" / "dog").iterdir())
