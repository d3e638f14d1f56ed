"""Data sets by name, end to end: the project's own YAMLs, their original archives in miniature on a loopback server."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from loopback import loopback
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_detector import SMALL

import train
import val
from exporting.pictures import verification_images
from utils.checkpoint import read_weights
from utils.coco import COCO_CATEGORY_IDS
from utils.dataset import create_dataloader
from utils.dataset_yaml import DATASETS_VARIABLE, load_dataset_yaml, prepare_dataset
from utils.downloads import MIRROR_VARIABLE, WEIGHTS_URL
from utils.errors import UserError
from utils.labels import list_images, parse_labels
from utils.paths import ROOT

CPU = torch.device("cpu")


def jpeg(width: int, height: int, seed: int) -> bytes:
    image = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(image, (width, height)))[1].tobytes()


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


# --- the originals in miniature
def annotation(name: str, size: tuple[int, int], objects: list[tuple]) -> bytes:
    """An annotation as VOC's: class, difficult, xmin, ymin, xmax, ymax."""
    items = "".join(
        f"<object><name>{label}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
        f"<bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>\n"
        for label, difficult, a, b, c, d in objects
    )
    text = f"<annotation><folder>VOC</folder><filename>{name}.jpg</filename><size><width>{size[0]}</width>"
    return (
        f"{text}<height>{size[1]}</height><depth>3</depth></size><segmented>0</segmented>{items}</annotation>".encode()
    )


def voc_year(year: int, sets: dict[str, int]) -> dict[str, bytes]:
    """The files of one of VOC's archives: every image has a person, every second one a difficult dog."""
    files = {}
    for image_set, count in sets.items():
        names = [f"{year}_{image_set}{number:02d}" for number in range(count)]
        for number, name in enumerate(names):
            objects = [("person", 0, 5, 6, 40, 50)] + [("dog", 1, 30, 30, 80, 60)] * (number % 2)
            files[f"JPEGImages/{name}.jpg"] = jpeg(80, 60, number)
            files[f"Annotations/{name}.xml"] = annotation(name, (80, 60), objects)
        files[f"ImageSets/Main/{image_set}.txt"] = "".join(f"{name}\n" for name in names).encode()
        files[f"ImageSets/Main/person_{image_set}.txt"] = "".join(f"{name}  1\n" for name in names).encode()
    return {f"VOCdevkit/VOC{year}/{name}": content for name, content in files.items()}


VOC_ARCHIVES = {
    "voc2007/VOCtrainval_06-Nov-2007.tar": tar_of(voc_year(2007, {"train": 3, "val": 2})),
    "voc2007/VOCtest_06-Nov-2007.tar": tar_of(voc_year(2007, {"test": 4})),
    "voc2012/VOCtrainval_11-May-2012.tar": tar_of(voc_year(2012, {"train": 2, "val": 1})),
}
COCO_SIZES = {"train2017": [(90, 70)] * 4, "val2017": [(200, 160), (160, 200), (120, 90)]}


def coco_instances(name: str) -> dict:
    """Objects of three sizes, a crowd, an image without objects; all 80 categories are declared."""
    names = yaml.safe_load((ROOT / "data" / "coco.yaml").read_text())["names"]
    generator, images, rows = np.random.default_rng(len(name)), [], []
    for number, (width, height) in enumerate(COCO_SIZES[name], 1):
        identifier = 100 * number + len(name)
        images.append({"id": identifier, "file_name": f"{identifier:012d}.jpg", "width": width, "height": height})
        if number == 3:
            continue
        for index in range(9):
            side = min((8, 40, 110)[index % 3], width - 2, height - 2)
            low = generator.uniform(0, (width - side, height - side)).round(2)
            category = COCO_CATEGORY_IDS[(index * 11) % 80]
            rows.append({"image_id": identifier, "bbox": [*low.tolist(), side, side], "area": side**2, "iscrowd": 0,
                         "category_id": category})  # fmt: skip
        rows.append({"image_id": identifier, "bbox": [0, 0, 60, 60], "area": 3600, "iscrowd": 1, "category_id": 1})
    for index, row in enumerate(rows, 1):
        row |= {"id": index, "segmentation": []}
    categories = [{"id": COCO_CATEGORY_IDS[index], "name": label} for index, label in names.items()]
    return {"info": {}, "images": images, "annotations": rows, "categories": categories}


def add_coco(site) -> None:
    contents = {name: coco_instances(name) for name in COCO_SIZES}
    files = {f"annotations/instances_{name}.json": json.dumps(item).encode() for name, item in contents.items()}
    site.add("http://images.cocodataset.org/annotations/annotations_trainval2017.zip", zip_of(files))
    for name, content in contents.items():
        images = {f"{name}/{i['file_name']}": jpeg(i["width"], i["height"], i["id"]) for i in content["images"]}
        site.add(f"http://images.cocodataset.org/zips/{name}.zip", zip_of(images))


@pytest.fixture
def site(monkeypatch, tmp_path):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with loopback() as site:
        monkeypatch.setenv(MIRROR_VARIABLE, site.url)
        monkeypatch.setenv(DATASETS_VARIABLE, str(tmp_path / "datasets"))
        yield site


@pytest.fixture
def voc(site, tmp_path):
    """data/VOC.yaml with the checksums of the miniature archives, which the server has."""
    text = (ROOT / "data" / "VOC.yaml").read_text()
    for item in yaml.safe_load(text)["download"]:
        content = VOC_ARCHIVES[item["url"].split("VOC/", 1)[1]]
        site.add(item["url"], content)
        text = text.replace(item["md5"], hashlib.md5(content).hexdigest())
    (tmp_path / "VOC.yaml").write_text(text)
    return tmp_path / "VOC.yaml"


def rows_below(folder: Path) -> dict[str, list]:
    return {file.stem: parse_labels(file.read_text())[0][:, 0].tolist() for file in sorted(folder.rglob("*.txt"))}


def small(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return str(tmp_path / "small.yaml")


def train_an_epoch(data: Path | str, tmp_path: Path) -> Path:
    arguments = ["--data", str(data), "--cfg", small(tmp_path), "--imgsz", "64", "--epochs", "1", "--batch-size", "4"]
    arguments += [
        "--workers",
        "0",
        "--noplots",
        "--noautoanchor",
        "--device",
        "cpu",
        "--project",
        str(tmp_path / "runs"),
    ]
    return train.main(train.parse_arguments(arguments)) / "weights" / "best.pt"


def measure(weights: Path, data: Path | str, tmp_path: Path, *flags: str) -> val.Evaluation:
    arguments = ["--weights", str(weights), "--data", str(data), "--imgsz", "64", "--workers", "0", "--device", "cpu"]
    return val.run(val.parse_options([*arguments, "--noplots", "--project", str(tmp_path / "val"), *flags]))


# --- VOC
def test_voc_is_fetched_converted_trained_on_and_measured(voc, site, tmp_path, capsys, monkeypatch):
    weights = train_an_epoch(voc, tmp_path)
    root = tmp_path / "datasets" / "VOC"
    assert sorted(item.name for item in (tmp_path / "datasets").iterdir()) == ["VOC"]  # nothing else is left
    counts = {folder.name: len(list(folder.iterdir())) for folder in (root / "images").iterdir()}
    assert counts == {"train2007": 3, "val2007": 2, "test2007": 4, "train2012": 2, "val2012": 1}
    assert rows_below(root / "labels" / "test2007") == {f"2007_test{number:02d}": [14.0] for number in range(4)}
    assert rows_below(root / "difficult" / "test2007") == {"2007_test01": [11.0], "2007_test03": [11.0]}
    assert len(site.requests) == 3
    capsys.readouterr()
    result = measure(weights, voc, tmp_path)
    assert len(site.requests) == 3  # what is there is not fetched again
    assert result.instances == 4 and result.voc.difficult == 2 and result.voc.classes.tolist() == [14]
    printed = capsys.readouterr().out
    assert ["all", "4", "4"] in [line.split()[:3] for line in printed.splitlines()]
    assert f"VOC, IoU 0.5: mAP by 11 points {result.voc.map11:.4f}, by every point {result.voc.map:.4f}" in printed
    # Weights that are named like upstream's are fetched too.
    site.add(WEIGHTS_URL + "yolov5s.pt", weights.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert measure(Path("yolov5s.pt"), voc, tmp_path).voc.map == result.voc.map and (tmp_path / "yolov5s.pt").is_file()


class Sure:
    """Detects a person and a dog at the same places in every image, whatever it shows."""

    def __call__(self, images):
        height, width = images.shape[2:]
        rows = torch.zeros(len(images), 2, 25)
        for index, (label, box) in enumerate(((14, (4, 5, 40, 50)), (11, (29, 29, 80, 60)))):
            left, top, right, bottom = (value * width / 80 for value in box)  # the long side fills the image
            top, bottom = (value + (height - 60 * width / 80) / 2 for value in (top, bottom))
            rows[:, index, :4] = torch.tensor([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
            rows[:, index, 4], rows[:, index, 5 + label] = 0.9, 1.0
        return rows


def test_detections_of_difficult_objects_count_for_voc_only_as_nothing(voc):
    spec = prepare_dataset(load_dataset_yaml(voc))
    loader, _ = create_dataloader(spec.val, 160, 2, workers=0, prefix="val", num_classes=20)
    result = val.evaluate(Sure(), loader, names=spec.names, device=CPU, output=val.OutputOptions(voc=True))
    assert (result.voc.map11, result.voc.map, result.voc.ignored) == (1.0, 1.0, 2)
    assert result.voc.objects.tolist() == [4] and result.map50 > 0.99


def test_an_interrupted_voc_download_resumes(voc, site, tmp_path):
    """The process is killed with one archive there and half of another."""
    test_archive = "/host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtest_06-Nov-2007.tar"
    site.break_after = [10**9, 20_000, 0, 0, 0, 0]
    code = "import sys; from utils.dataset_yaml import *; prepare_dataset(load_dataset_yaml(sys.argv[1]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(voc)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    part = tmp_path / "datasets/VOC.download/VOCtest_06-Nov-2007.tar.part"
    deadline = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size == 20_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()  # while it waits a second for its next attempt
    process.wait()
    site.break_after.clear()
    assert not (tmp_path / "datasets" / "VOC").exists()
    site.requests.clear()
    prepare_dataset(load_dataset_yaml(voc))
    assert site.requests[0] == (test_archive, "bytes=20000-") and len(site.requests) == 2
    assert len(list((tmp_path / "datasets/VOC/images").rglob("*.jpg"))) == 12


def test_a_wrong_checksum_is_refused(voc, tmp_path):
    text = voc.read_text()
    md5 = yaml.safe_load(text)["download"][1]["md5"]
    voc.write_text(text.replace(md5, "c52e279531787c972589f7e41ab4ae64"))
    with pytest.raises(UserError, match=f"VOCtest_06-Nov-2007.tar: the downloaded file has md5 {md5} instead of c52e"):
        prepare_dataset(load_dataset_yaml(voc))
    assert not (tmp_path / "datasets" / "VOC").exists()


def test_a_conversion_that_was_interrupted_starts_from_the_archives(voc, site, tmp_path):
    work = tmp_path / "datasets" / "VOC.download"
    for folder in ("unpacked/VOCdevkit/VOC2007/JPEGImages", "converted/images/train2007"):
        (work / folder).mkdir(parents=True)
        (work / folder / "half.jpg").write_bytes(b"half an image")
    prepare_dataset(load_dataset_yaml(voc))
    assert not list((tmp_path / "datasets").rglob("half.jpg")) and not work.exists()


def test_a_folder_of_the_users_is_left_alone(voc, site, tmp_path):
    (tmp_path / "datasets/VOC/images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"nothing is downloaded into .* because it holds other files"):
        prepare_dataset(load_dataset_yaml(voc))
    assert site.requests == [] and [item.name for item in (tmp_path / "datasets").iterdir()] == ["VOC"]


def test_exporting_looks_at_the_data_only_if_it_is_there(voc, site, tmp_path):
    """Images to verify an export on are no reason to fetch gigabytes; that --data names the set is."""
    weights = read_weights(train_an_epoch(voc, tmp_path))
    (tmp_path / "datasets/VOC").rename(tmp_path / "datasets/elsewhere")
    site.requests.clear()
    assert "drawn images" in verification_images(None, weights, (64, 64))[1] and site.requests == []
    images, source = verification_images(str(voc), weights, (64, 64))
    assert len(images) == 4 and source == "images of VOC.yaml" and len(site.requests) == 3


def test_a_folder_that_cannot_be_made_is_a_message(voc, site, tmp_path):
    (tmp_path / "datasets").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written .*YOLOv5_DATASETS_DIR"):
        prepare_dataset(load_dataset_yaml(voc))


# --- COCO
def test_coco_is_fetched_converted_trained_on_and_measured(site, tmp_path, capsys):
    add_coco(site)
    weights = train_an_epoch("coco.yaml", tmp_path)
    root = tmp_path / "datasets" / "coco"
    assert list_images(root / "val2017.txt") == [
        str(root / "images/val2017" / image["file_name"]) for image in coco_instances("val2017")["images"]
    ]
    assert rows_below(root / "labels/val2017")["000000000107"] == [(index * 11) % 80 for index in range(9)]
    capsys.readouterr()
    result = measure(weights, "coco.yaml", tmp_path)
    assert result.images == 3 and result.instances == 18
    assert list((tmp_path / "val").rglob("best_predictions.json"))
    assert len(site.requests) == 3
    # Each split has its own annotations; test images, here two without labels, have none.
    assert measure(weights, "coco.yaml", tmp_path, "--task", "train").coco is not None
    (root / "test").mkdir()
    images = list_images(root / "val2017.txt")[:2]
    (root / "test-dev2017.txt").write_text("".join(f"./test/{Path(file).name}\n" for file in images))
    for file in images:
        (root / "test" / Path(file).name).write_bytes(Path(file).read_bytes())
    capsys.readouterr()
    assert measure(weights, "coco.yaml", tmp_path, "--task", "test").coco is None
    assert "has the detections; there is nothing to measure them by" in capsys.readouterr().out


class Noisy:
    """Detects the labels of each batch with errors in place, class and confidence; remembers what it said."""

    def __init__(self, loader) -> None:
        generator, self.answers = torch.Generator().manual_seed(0), []
        for images, targets, _, _ in loader:
            height, width = images.shape[2:]
            rows = torch.zeros(len(images), 60, 85)
            for index in range(len(images)):
                mine = targets[targets[:, 0] == index].repeat(3, 1)
                boxes = mine[:, 2:] * torch.tensor([width, height, width, height])
                boxes += boxes[:, [2, 3, 2, 3]] * 0.1 * torch.randn(boxes.shape, generator=generator)
                rows[index, : len(mine), :4] = boxes
                rows[index, : len(mine), 4] = torch.rand(len(mine), generator=generator)
                rows[index, torch.arange(len(mine)), 5 + mine[:, 1].long()] = 1.0
            self.answers.append(rows)

    def __call__(self, images):
        return self.answers.pop(0)


def test_coco_numbers_are_those_of_pycocotools(site, tmp_path, capsys):
    add_coco(site)
    spec = prepare_dataset(load_dataset_yaml("coco.yaml"))
    loader, _ = create_dataloader(spec.val, 320, 2, rect=True, pad=0.5, workers=0, prefix="val", num_classes=80)
    truth_file = spec.path / "annotations" / "instances_val2017.json"
    output = val.OutputOptions(json=tmp_path / "p.json", annotations=truth_file, coco_numbers=True)
    noisy = Noisy(loader)
    result = val.evaluate(noisy, loader, names=spec.names, device=CPU, output=output, iou_threshold=0.95)
    printed = capsys.readouterr().out
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_file))
        reference = COCOeval(truth, truth.loadRes(str(tmp_path / "p.json")), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    assert result.coco == pytest.approx(reference.stats.tolist(), abs=1e-6)
    assert (result.map, result.map50) == result.coco[:2]
    sizes = (result.coco.map_small, result.coco.map_medium, result.coco.map_large)
    assert len(set(sizes)) == 3 and min(sizes) > 0 and max(sizes) < 1
    for name, value in zip(("small", "medium", " large"), sizes, strict=True):
        assert f"area={name:>6} | maxDets=100 ] = {value:.3f}" in printed


def test_detections_reach_the_json_in_pixels_of_the_file_and_numbers_of_coco(site, tmp_path):
    add_coco(site)
    spec = prepare_dataset(load_dataset_yaml("coco.yaml"))
    loader, _ = create_dataloader(spec.val, 320, 2, rect=True, pad=0.5, workers=0, prefix="val", num_classes=80)
    exact = Noisy(loader)
    exact.answers = []
    for images, targets, _, _ in loader:
        rows = torch.zeros(len(images), 60, 85)
        for position, (index, label, *box) in enumerate(targets.tolist()):
            rows[int(index), position, :4] = torch.tensor(box) * torch.tensor(images.shape[2:]).flip(0).repeat(2)
            rows[int(index), position, 4] = rows[int(index), position, 5 + int(label)] = 1.0
        exact.answers.append(rows)
    output = val.OutputOptions(json=tmp_path / "p.json", coco_numbers=True)
    val.evaluate(exact, loader, names=spec.names, device=CPU, output=output)
    wanted = [row for row in coco_instances("val2017")["annotations"] if not row["iscrowd"]]
    key = lambda row: (row["image_id"], row["category_id"])  # noqa: E731
    found = json.loads((tmp_path / "p.json").read_text())
    for before, after in zip(sorted(wanted, key=key), sorted(found, key=key), strict=True):
        assert key(before) == key(after)
        np.testing.assert_allclose(after["bbox"], before["bbox"], atol=0.01)


# --- the others, and YAMLs of other people
def test_coco128_is_fetched_from_its_zip(site, tmp_path):
    for name in ("coco128", "coco128-seg"):
        files = {f"{name}/images/train2017/{n:012d}.jpg": jpeg(32, 24, n) for n in range(3)}
        files |= {f"{name}/labels/train2017/{0:012d}.txt": b"45 .1 .1 .9 .1 .9 .9\n", f"{name}/README.txt": b"x"}
        site.add(f"https://github.com/ultralytics/yolov5/releases/download/v1.0/{name}.zip", zip_of(files))
        spec = prepare_dataset(load_dataset_yaml(f"{name}.yaml"))
        assert spec.path == tmp_path / "datasets" / name and len(list_images(spec.val)) == 3


def test_bccd_is_fetched_from_its_repository(site, tmp_path):
    site.lengths = site.ranges = site.tags = False  # as repositories are served
    files = {}
    for number, name in enumerate(("train", "val", "test")):
        files[f"BCCD/ImageSets/Main/{name}.txt"] = f"BloodImage_{number}\n".encode()
        files[f"BCCD/JPEGImages/BloodImage_{number}.jpg"] = jpeg(64, 48, number)
        objects = [("WBC", 0, 26, 17, 49, 37), ("Platelets", 0, 0, 0, 5, 48)]
        files[f"BCCD/Annotations/BloodImage_{number}.xml"] = annotation("x", (64, 48), objects)
    content = zip_of({f"BCCD_Dataset-master/{name}": data for name, data in files.items()})
    site.add("https://github.com/Shenggan/BCCD_Dataset/archive/refs/heads/master.zip", content)
    spec = prepare_dataset(load_dataset_yaml("bccd.yaml"))
    (label,) = (tmp_path / "datasets/bccd/labels/test").iterdir()
    rows = parse_labels(label.read_text())[0]
    assert rows[:, 0].tolist() == [1, 2]
    np.testing.assert_allclose(rows[0, 1:], [37.5 / 64, 27 / 48, 23 / 64, 20 / 48], atol=1e-6)
    assert spec.split("test") == [str(tmp_path / "datasets/bccd/images/test")]


def write_yaml(tmp_path: Path, **content) -> Path:
    base = {"path": "mine", "train": "images/train", "val": "images/train", "names": ["cat"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(base | content))
    return tmp_path / "mine.yaml"


IMAGES = {"images/train/a.jpg": jpeg(32, 32, 0), "labels/train/a.txt": b"0 .5 .5 .2 .2\n"}


@pytest.mark.parametrize("inside", ["mine/", ""])
@pytest.mark.parametrize("pack", [zip_of, tar_of, lambda files: tar_of(files, "w:gz")])
def test_an_address_as_in_yamls_for_yolov5(site, tmp_path, inside, pack):
    """With or without the data set's folder in the archive."""
    site.add("https://example.org/x/mine.zip", pack({inside + name: content for name, content in IMAGES.items()}))
    spec = prepare_dataset(load_dataset_yaml(write_yaml(tmp_path, download="https://example.org/x/mine.zip\n")))
    assert list_images(spec.train) == [str(tmp_path / "datasets/mine/images/train/a.jpg")]


def test_hostile_archives_are_refused(site, tmp_path):
    for name in ("../../escaped.txt", str(tmp_path / "escaped.txt")):
        site.add("https://example.org/mine.tar", tar_of(IMAGES | {name: b"evil"}))
        with pytest.raises(UserError, match="outside of the folder"):
            prepare_dataset(load_dataset_yaml(write_yaml(tmp_path, download="https://example.org/mine.tar")))
        assert not list(tmp_path.rglob("escaped.txt")) and not (tmp_path / "datasets" / "mine").exists()
        (tmp_path / "datasets/mine.download/mine.tar").unlink()


def test_an_archive_without_what_the_yaml_promises_is_a_message(site, tmp_path):
    site.add("https://example.org/mine.zip", zip_of({"other/a.jpg": b""}))
    with pytest.raises(UserError, match="what was downloaded has no images/train; it has other"):
        prepare_dataset(load_dataset_yaml(write_yaml(tmp_path, download="https://example.org/mine.zip")))
    assert not (tmp_path / "datasets" / "mine").exists()


PYTHON = "import os\nfrom pathlib import Path\nPath('PLACE').write_text('ran')\nos.system('touch PLACE')\n"
SCRIPTS = [
    PYTHON,
    "bash data/scripts/get_coco.sh",
    "touch PLACE",
    "https://a.org/x.zip; touch PLACE",
    "/usr/local/bin/get_data.sh",
    "  ",
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("as_list", [False, True])
def test_scripts_are_refused_and_never_run(site, tmp_path, script, as_list):
    script = script.replace("PLACE", str(tmp_path / "ran"))
    file = write_yaml(tmp_path, download=[script] if as_list else script)
    with pytest.raises(UserError, match=r"is a script .*nothing in a YAML is ever run.* docs/datasets\.md"):
        prepare_dataset(load_dataset_yaml(file))
    assert not (tmp_path / "ran").exists() and site.requests == []
    named = tmp_path / "VOC.yaml"  # like upstream's
    os.rename(file, named)
    with pytest.raises(UserError, match=f"Use --data {ROOT / 'data' / 'VOC.yaml'} instead"):
        prepare_dataset(load_dataset_yaml(named))
    # Where the data is there, the script does not matter.
    (tmp_path / "datasets/mine/images/train").mkdir(parents=True)
    assert prepare_dataset(load_dataset_yaml(named)).names == {0: "cat"}


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"download": ["https://a.org/x.zip", "https://b.org/x.zip"]}, "same file name"),
        ({"download": "ftp://a.org/x.zip"}, "is a script"),
        ({"download": {"url": "file:///etc/passwd"}}, "not an http"),
        ({"download": {"url": "https://a.org/x.zip", "md5": "12"}}, "no checksum"),
        ({"download": {"url": "https://a.org/x.zip", "shell": "true"}}, "neither an address nor"),
        ({"download": {"url": "https://a.org/x.zip", "into": "../.."}}, "no file name that can be used"),
        ({"download": 5}, "neither an address nor"),
        ({"download": "https://a.org/x.zip", "convert": "voc"}, "must be a mapping"),
        ({"download": "https://a.org/x.zip", "convert": {"format": "kitti"}}, "must be a mapping"),
        ({"download": "https://a.org/x.zip", "convert": {"format": "voc"}}, "'sets' must map"),
        ({"download": "https://a.org/x.zip", "convert": {"format": "voc", "sets": {"a": "../b"}}}, "no file name"),
        ({"download": "https://a.org/x.zip", "convert": {"format": "voc", "sets": {"../a": "b"}}}, "no file name"),
        (
            {"download": "https://a.org/x.zip", "convert": {"format": "coco", "sets": {"a": "b"}, "segments": 1}},
            "true or",
        ),
    ],
)
def test_wrong_declarations_are_messages(site, tmp_path, content, reason):
    with pytest.raises(UserError, match=reason):
        prepare_dataset(load_dataset_yaml(write_yaml(tmp_path, **content)))
    assert site.requests == [] and not (tmp_path / "datasets").exists()
