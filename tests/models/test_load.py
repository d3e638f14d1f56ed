"""``load``: every kind of image in, the same detections out, in every form."""

import importlib
import re
import runpy
from pathlib import Path

import cv2
import numpy as np
import pandas
import pytest
import torch
from loopback import loopback
from PIL import Image

import export
from models.load import load, read_sources
from models.yolo import DetectionModel
from utils.boxes import crop_region
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.images import write_image
from utils.nms import non_max_suppression
from utils.paths import ROOT

NAMES = {0: "cat", 1: "small/dog"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model that finds boxes of both classes everywhere: the biases of its output say so."""
    torch.manual_seed(0)
    model = DetectionModel("yolov5n.yaml", nc=2)
    for layer in model.detect.m:
        layer.bias.detach().view(3, 7)[:, 4:] = torch.tensor([2.0, 1.0, 1.0])
        layer.weight.data *= 3
    content = {"format": 1, "model_yaml": model.yaml, "names": NAMES, "stride": model.stride.tolist(), "ema": None}
    content |= {"anchors": model.detect.anchors, "model": model.state_dict(), "phase": "float", "quantization": None}
    file = tmp_path_factory.mktemp("weights") / "pets.pt"
    save_checkpoint(content, file)
    return file


@pytest.fixture(scope="module")
def model(weights):
    return load(weights, device="cpu", max_det=20)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("images") / "one.png"
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    cv2.imwrite(str(file), cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_NEAREST))
    return file


def test_every_kind_of_image_is_the_same_image(model, picture):
    rgb = np.ascontiguousarray(cv2.imread(str(picture))[..., ::-1])
    opened = Image.open(picture)
    alpha = opened.convert("RGBA")
    tensor = torch.from_numpy(rgb.copy()).permute(2, 0, 1)
    kinds = [str(picture), picture, opened, alpha, rgb, np.asarray(alpha), rgb.transpose(2, 0, 1), tensor, tensor / 255]
    expected = model(picture, size=160).xyxy[0]
    assert len(expected) == 20 and expected.shape[1] == 6
    together = model(kinds, size=160)
    assert len(together) == len(kinds)
    for kind, rows in zip(kinds, together.xyxy, strict=True):
        torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(model(kind, size=160).xyxy[0], expected, rtol=1e-3, atol=1e-2)
    batch = torch.stack([tensor, tensor.flip(2)])
    assert len(model(batch, size=160)) == 2
    assert together.files[0] == together.files[2] == "one.png" and together.files[4] == "image4.jpg"


def test_boxes_lie_in_the_image_whatever_its_batch(model, picture):
    """A wide and a tall image share a batch that is larger than either of them alone needs."""
    wide = cv2.imread(str(picture))[..., ::-1]
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    for image, rows in zip((wide, tall), model([wide, tall], size=160).xyxy, strict=True):
        limits = torch.tensor([image.shape[1], image.shape[0]] * 2)
        assert bool((rows[:, :4] >= 0).all()) and bool((rows[:, :4] <= limits).all()) and len(rows)


def test_forms_of_the_boxes(model, picture):
    results = model([picture, picture], size=160)
    xyxy, xywh, xyxyn, xywhn = (getattr(results, form)[0] for form in ("xyxy", "xywh", "xyxyn", "xywhn"))
    for number in range(len(xyxy)):
        left, top, right, bottom, score, label = xyxy[number].tolist()
        expected = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top, score, label]
        assert xywh[number].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert xyxyn[number].tolist()[:4] == pytest.approx([left / 160, top / 120, right / 160, bottom / 120])
        assert xywhn[number].tolist()[0] == pytest.approx((left + right) / 320, rel=1e-4)
    table = results.pandas().xyxy[1]
    assert list(table.columns) == ["xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"]
    assert isinstance(table, pandas.DataFrame) and set(table["name"]) <= set(NAMES.values())
    np.testing.assert_allclose(table[["xmin", "ymin", "xmax", "ymax"]].to_numpy(), xyxy[:, :4].numpy())
    assert list(results.pandas().xywhn[0].columns)[:4] == ["xcenter", "ycenter", "width", "height"]
    single = results.tolist()[1]
    assert len(single) == 1 and torch.equal(single.xyxy[0], xyxy) and [len(part) for part in results] == [1, 1]


def test_text_pictures_and_crops(model, picture, tmp_path, capsys):
    results = model([picture, picture], size=160)
    results.print()
    output = capsys.readouterr().out
    assert "image 2/2 one.png: 120x160" in output and "ms inference" in output
    drawn = results.render()
    original = cv2.imread(str(picture))[..., ::-1]
    assert drawn[0].shape == original.shape and (drawn[0] != original).any() and (results.images[0] == original).all()
    assert results.pictures()[0].size == (160, 120)
    files = results.save(tmp_path / "out")
    assert [file.name for file in files] == ["one.jpg", "one_2.jpg"] and all(file.is_file() for file in files)
    crops = results.crop(tmp_path / "out")
    assert len(crops) == sum(map(len, results.xyxy)) and all(crop["file"].is_file() for crop in crops)
    assert {crop["file"].parent.name for crop in crops} <= {"cat", "small_dog"}
    for crop in crops[:5]:
        rows, columns = crop_region(crop["box"].tolist(), original.shape)
        assert (crop["im"] == original[rows, columns]).all() and crop["label"].startswith(NAMES[crop["cls"]])
    assert "file" not in results.crop(save=False)[0]


def test_settings_act(model, weights, picture):
    assert (load(weights, conf=0.999)(picture).xyxy[0]).shape == (0, 6)
    only = load(weights, classes=[1], iou=0.9)(picture, size=160)
    assert set(only.xyxy[0][:, 5].tolist()) == {1.0}
    assert str(load(weights, conf=0.999)(picture)).splitlines()[0].endswith("(no detections)")
    assert len(load([weights, weights], max_det=30)(picture, size=160).xyxy[0]) == 30
    assert len(load(weights, augment=True)(picture, size=160)) == 1
    assert len(model([])) == 0 and model.names == NAMES and model.stride == 32


def test_addresses_are_fetched_only_when_asked(model, picture, monkeypatch):
    monkeypatch.delenv("YOLOV5_QAT_OFFLINE", raising=False)
    with loopback() as site:
        site.files["/a/one.png"] = picture.read_bytes()
        address = f"{site.url}/a/one.png"
        with pytest.raises(UserError, match="download=True"):
            model(address)
        assert not site.requests
        fetched = model(address, size=160, download=True)
    assert fetched.files == ["one.png"]
    torch.testing.assert_close(fetched.xyxy[0], model(picture, size=160).xyxy[0])


def test_pil_images_stand_upright_as_files_do(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    Image.open(picture).convert("RGB").save(tmp_path / "turned.png", exif=exif)
    arrays, _ = read_sources([tmp_path / "turned.png", Image.open(tmp_path / "turned.png")])
    assert arrays[0].shape == (160, 120, 3) and (arrays[0] == arrays[1]).all()


def test_grey_images_have_three_channels():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    arrays, _ = read_sources([grey, grey[..., None], grey[None], torch.from_numpy(grey)])
    assert all((array == np.stack([grey] * 3, -1)).all() for array in arrays)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.float32), np.zeros((5, 6, 7), np.uint8), 7, "nowhere.jpg"])
def test_what_is_no_image_is_refused(model, image):
    with pytest.raises(UserError):
        model(image)


def test_torch_hub(weights, picture):
    model = torch.hub.load(str(ROOT), "custom", str(weights), source="local", max_det=3, verbose=False)
    assert model(picture, size=160).xyxy[0].shape == (3, 6)
    assert {"custom", "yolov5n", "yolov5x6"} <= set(vars(importlib.import_module("hubconf")))


def test_programs_written_for_yolov5_run(weights, picture, tmp_path):
    """Modules' methods, arguments of hub's entry points, names and folders of the results."""
    model = torch.hub.load(str(ROOT), "custom", path=str(weights), autoshape=True, source="local", _verbose=False)
    assert model.eval() is model and model.to(torch.device("cpu")) is model and model.cpu() is model
    model.max_det = 3
    results = model([picture], size=160, augment=False)
    assert results.n == 1 and results.pred is results.xyxy and (results.ims[0] == results.images[0]).all()
    drawn = results.render()
    assert results.ims is drawn and (results.ims[0] != results.images[0]).any()
    for expected, exist_ok in (("exp", False), ("exp2", False), ("exp", True)):
        (file,) = results.save(save_dir=tmp_path / "exp", exist_ok=exist_ok)
        assert file.parent == tmp_path / expected
    assert results.crop(save_dir=tmp_path / "exp")[0]["file"].is_relative_to(tmp_path / "exp3")
    model.conf, model.max_det, several = 0.001, 1000, {}
    for model.multi_label in (False, True):
        several[model.multi_label] = len(model(picture, size=160).xyxy[0])
    assert several[True] > several[False]


@pytest.mark.parametrize(
    "entry, settings",
    [("custom", {"autoshape": False}), ("yolov5n", {"pretrained": False}), ("yolov5n", {"classes": 3})],
)
def test_what_hub_does_not_give_is_said(weights, entry, settings):
    path = {"path": str(weights)} if entry == "custom" else {}
    with pytest.raises(UserError, match=r"models\.(backend|yolo)"):
        torch.hub.load(str(ROOT), entry, source="local", verbose=False, **path, **settings)


def test_a_file_with_suppression_inside_is_not_suppressed_again(weights, picture, tmp_path):
    pytest.importorskip("onnxruntime")
    copied = tmp_path / "pets.pt"
    copied.write_bytes(weights.read_bytes())
    assert export.main(["--weights", str(copied), "--imgsz", "160", "--dynamic", "--nms", "--max-det", "20"]) == 0
    exported = load(tmp_path / "pets.onnx", classes=[1])
    (rows,) = exported.backend(padded_by_hand(picture))[0]
    assert torch.equal(exported(picture, size=160).xyxy[0], taken_back(rows[rows[:, 5] == 1]))
    with pytest.raises(UserError, match="stays where it is"):
        exported.to("cpu")


def test_the_documentations_example_runs(weights, picture, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = next(part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "models.load" in part)
    monkeypatch.chdir(tmp_path)
    Path("best.pt").write_bytes(weights.read_bytes())
    write_image("image.jpg", cv2.imread(str(picture)))
    Path("example.py").write_text(code, encoding="utf-8")
    space = runpy.run_path("example.py")
    assert "image.jpg: 120x160" in capsys.readouterr().out and (tmp_path / "found" / "image.jpg").is_file()
    assert len(space["crops"]) == len(space["boxes"]) == len(space["table"]) > 0
    assert space["picture"].shape == (120, 160, 3) and list(space["best"]["xmin"]) == sorted(space["best"]["xmin"])


def padded_by_hand(picture):
    """The picture of 120x160 as the network's input: 4 rows of padding above and below."""
    canvas = np.full((128, 160, 3), 114, np.uint8)
    canvas[4:124] = cv2.imread(str(picture))[..., ::-1]
    return torch.from_numpy(canvas).permute(2, 0, 1)[None].float() / 255


def taken_back(rows):
    """Rows (n, 6) in pixels of ``padded_by_hand`` -> in those of the picture."""
    moved = rows - torch.tensor([0.0, 4, 0, 4, 0, 0])
    moved[:, :4] = torch.minimum(moved[:, :4].clamp(min=0), torch.tensor([160.0, 120.0, 160.0, 120.0]))
    return moved


def test_boxes_equal_those_of_an_image_padded_by_hand(model, picture):
    (rows,) = non_max_suppression(model.backend(padded_by_hand(picture))[0], 0.25, 0.45, max_detections=20)
    expected = taken_back(rows)[:, :4]
    torch.testing.assert_close(model(picture, size=160).xyxy[0][:, :4], expected, rtol=1e-3, atol=1e-2)
