import json
import re
import shlex
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import yaml

import train
import val
from utils.coco import COCO_CATEGORY_IDS
from utils.convert.__main__ import main
from utils.convert.coco import coco_to_yolo, join_polygons, polygon_area, read_annotations, yolo_to_coco
from utils.convert.files import box_line, clip, safe_name
from utils.convert.voc import VocAnnotation, VocObject, class_names, read_annotation, voc_to_yolo, write_annotation
from utils.dataset_download import read_plan
from utils.dataset_yaml import DATASETS_VARIABLE, load_dataset_yaml
from utils.difficult import difficult_path, read_difficult
from utils.downloads import MIRROR_VARIABLE, OFFLINE_VARIABLE
from utils.errors import UserError
from utils.images import write_image
from utils.labels import label_path, parse_labels
from utils.paths import ROOT
from utils.yaml_file import read_yaml

NAMES = ["cat", "dog", "hérisson"]
XML = """<annotation><filename>{name}</filename><size><width>{width}</width><height>{height}</height><depth>3</depth>
</size>{objects}</annotation>"""
OBJECT = """<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>
<ymax>{}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>
</part></object>"""
# name -> (size, objects): difficult ones, none at all, letters outside of ASCII, a box beyond the image
VOC = {
    "000012": ((64, 48), [("cat", 0, 1, 1, 64, 48), ("dog", 1, 11, 21, 20, 40)]),
    "000013": ((40, 50), [("dog", 0, 5, 6, 5, 6)]),
    "none": ((30, 30), []),
    "ünï code": ((33, 47), [("hérisson", 0, 30, 40, 35, 50), ("cat", 1, 3, 3, 9, 9)]),
}


def picture(file: Path, width: int, height: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_image(file, np.full((height, width, 3), 90, np.uint8))
    return file


def make_voc(folder: Path, content=VOC, image_set: str = "train") -> Path:
    for name, ((width, height), objects) in content.items():
        picture(folder / "JPEGImages" / f"{name}.jpg", width, height)
        text = XML.format(
            name=f"{name}.jpg", width=width, height=height, objects="".join(OBJECT.format(*item) for item in objects)
        )
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / "Annotations" / f"{name}.xml").write_text(text, encoding="utf-8")
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{image_set}.txt").write_text(
        "".join(f"{name}\n" for name in content), encoding="utf-8"
    )
    return folder


def rows_of(file: Path) -> np.ndarray:
    rows, problems = parse_labels(file.read_text(encoding="utf-8"))
    assert not problems
    return rows


def edges(rows: np.ndarray, width: float, height: float) -> list[tuple]:
    """Class and edges in pixels, worked out apart from the project's own functions."""
    return [
        (int(c), *np.round([(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height], 2))
        for c, x, y, w, h in rows.astype(float)
    ]


def test_voc_boxes_are_pixels_counted_from_one(tmp_path):
    counts = voc_to_yolo(make_voc(tmp_path / "voc"), "train", tmp_path / "out", "train", NAMES)
    labels, difficult = tmp_path / "out/labels/train", tmp_path / "out/difficult/train"
    assert edges(rows_of(labels / "000012.txt"), 64, 48) == [(0, 0, 0, 64, 48)]
    assert edges(rows_of(difficult / "000012.txt"), 64, 48) == [(1, 10, 20, 20, 40)]
    assert edges(rows_of(labels / "000013.txt"), 40, 50) == [(1, 4, 5, 5, 6)]
    assert (labels / "none.txt").read_text() == ""
    assert edges(rows_of(labels / "ünï code.txt"), 33, 47) == [(2, 29, 39, 33, 47)]
    assert sorted(file.name for file in difficult.iterdir()) == ["000012.txt", "ünï code.txt"]
    assert (counts.images, counts.boxes, counts.difficult, counts.background) == (4, 3, 2, 1)
    assert len(list((tmp_path / "out/images/train").iterdir())) == 4


def test_edges_from_zero_and_difficult_objects_on_request(tmp_path):
    folder = make_voc(tmp_path / "voc")
    counts = voc_to_yolo(folder, "train", tmp_path / "out", "a", NAMES, corners="edges", train_difficult=True)
    # The box of one pixel is none between edges.
    assert counts.difficult == 0 and counts.boxes == 4 and counts.left_out == {"box without extent in the image": 1}
    rows = rows_of(tmp_path / "out/labels/a/000012.txt")
    assert edges(rows, 64, 48) == [(0, 1, 1, 64, 48), (1, 11, 21, 20, 40)]
    assert not (tmp_path / "out/difficult").exists()


@pytest.mark.parametrize("how", ["copy", "move", "link"])
def test_images_are_copied_moved_or_linked(tmp_path, how):
    folder = make_voc(tmp_path / "voc")
    voc_to_yolo(folder, "train", tmp_path / "out", "train", NAMES, transfer=how)
    source, target = folder / "JPEGImages/000012.jpg", tmp_path / "out/images/train/000012.jpg"
    assert target.is_file() and source.exists() == (how != "move")
    assert how == "move" or source.samefile(target) == (how == "link")


def test_what_voc_leaves_open(tmp_path):
    """A set of one class, an image without annotation, one that is missing, a size of zero, a class without a name."""
    folder = make_voc(tmp_path / "voc")
    picture(folder / "JPEGImages" / "extra.png", 20, 20)
    text = XML.format(name="sizeless.jpg", width=0, height=0, objects=OBJECT.format("cat", 0, 1, 1, 10, 20))
    (folder / "Annotations" / "sizeless.xml").write_text(text)
    picture(folder / "JPEGImages" / "sizeless.jpg", 20, 40)
    (folder / "ImageSets/Main/cat_val.txt").write_text("000012  1\n000013 -1\nextra  0\ngone\nsizeless\n\n")
    counts = voc_to_yolo(folder, "cat_val", tmp_path / "out", "val", ["cat"])
    assert (counts.images, counts.unlabelled, counts.missing) == (4, 1, 1)
    assert counts.left_out == {"class 'dog' is not among the names": 2}
    assert edges(rows_of(tmp_path / "out/labels/val/sizeless.txt"), 20, 40) == [(0, 0, 0, 10, 20)]
    assert not (tmp_path / "out/labels/val/extra.txt").exists()
    assert class_names([folder]) == sorted(NAMES)


def test_voc_mistakes_are_messages(tmp_path):
    folder = make_voc(tmp_path / "voc")
    with pytest.raises(UserError, match="no such image set"):
        voc_to_yolo(folder, "val", tmp_path / "out", "val", NAMES)
    (folder / "ImageSets/Main/bad.txt").write_text("../../etc/passwd\n")
    with pytest.raises(UserError, match="no file name that can be used"):
        voc_to_yolo(folder, "bad", tmp_path / "out", "val", NAMES)
    (folder / "ImageSets/Main/gone.txt").write_text("gone\n")
    with pytest.raises(UserError, match="none of the 1 images"):
        voc_to_yolo(folder, "gone", tmp_path / "out", "val", NAMES)
    voc_to_yolo(folder, "train", tmp_path / "out", "train", NAMES)
    with pytest.raises(UserError, match="is there already"):
        voc_to_yolo(folder, "train", tmp_path / "out", "train", NAMES)


@pytest.mark.parametrize(
    "text",
    [
        "", "<annotation>", "not xml", "<annotation><object><name>a</name></object></annotation>",
        "<annotation><size><width>wide</width></size></annotation>",
        "<annotation><size><width>inf</width></size></annotation>",
        '<!DOCTYPE a [<!ENTITY b "b">]><annotation>&b;</annotation>',
        '<?xml version="1.0" encoding="no-such"?><annotation/>',
        "<annotation/>" + " " * 10_000_001,
    ],
)  # fmt: skip
def test_bad_annotations_are_messages(tmp_path, text):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UserError, match=r"a\.xml"):
        read_annotation(tmp_path / "a.xml")
    (tmp_path / "a.xml").write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match=r"a\.xml"):
        read_annotation(tmp_path / "a.xml")


@pytest.mark.parametrize("corners", ["pixels", "edges"])
def test_annotations_survive_writing(tmp_path, corners):
    generator = np.random.default_rng(0)
    low = generator.integers(0, 200, (40, 2))
    boxes = np.concatenate([low, low + generator.integers(1, 300, (40, 2))], 1).astype(float)
    objects = [VocObject(f"ä {i} <&>", tuple(box), bool(i % 2)) for i, box in enumerate(boxes.tolist())]
    annotation = VocAnnotation(tmp_path / "voc/Annotations/ß.xml", 500, 400, "ß.png", objects)
    write_annotation(annotation, corners)
    assert read_annotation(annotation.file, corners) == annotation
    texts = [item.text for item in ElementTree.parse(annotation.file).iter("xmin")]
    assert texts == [str(int(box[0]) + (corners == "pixels")) for box in boxes]


def test_voc_to_yolo_and_back(tmp_path):
    folder = make_voc(
        tmp_path / "voc", VOC | {"ünï code": ((33, 47), [("hérisson", 0, 30, 40, 33, 47), ("cat", 1, 3, 3, 9, 9)])}
    )
    assert main(["voc2yolo", str(folder), "--output", str(tmp_path / "out")]) == 0
    data = tmp_path / "out" / "out.yaml"
    spec = load_dataset_yaml(data)
    assert list(spec.names.values()) == sorted(NAMES) and spec.evaluation == "voc"
    assert main(["yolo2voc", "--data", str(data), "--split", "train", "--output", str(tmp_path / "back")]) == 0
    for name in VOC:
        before = read_annotation(folder / "Annotations" / f"{name}.xml")
        after = read_annotation(tmp_path / "back" / "Annotations" / f"{name}.xml")
        assert after.objects == before.objects and (after.width, after.height) == (before.width, before.height)
        assert (tmp_path / "back" / "JPEGImages" / f"{name}.jpg").is_file()
    assert (tmp_path / "back/ImageSets/Main/train.txt").read_text(encoding="utf-8").split("\n")[:-1] == sorted(VOC)


def test_real_annotations_survive_the_way_to_voc_and_back(shared_data, tmp_path):
    """Blood cells, labelled in whole pixels counted from the edge."""
    images = sorted((shared_data / "bccd/images/test").iterdir())[:6]
    for image in images:
        for kind, source in (("images", image), ("labels", Path(label_path(image)))):
            (tmp_path / "set" / kind / "test").mkdir(parents=True, exist_ok=True)
            shutil.copy(source, tmp_path / "set" / kind / "test")
    shutil.copy(shared_data / "bccd/bccd.yaml", tmp_path / "set")
    (tmp_path / "set/set.yaml").write_text(
        "path: .\ntrain: images/test\nval: images/test\nnames: [RBC, WBC, Platelets]\n"
    )
    arguments = ["--data", str(tmp_path / "set/set.yaml"), "--output", str(tmp_path / "voc"), "--corners", "edges"]
    assert main(["yolo2voc", *arguments]) == 0
    counts = voc_to_yolo(
        tmp_path / "voc", "val", tmp_path / "back", "test", ["RBC", "WBC", "Platelets"], corners="edges"
    )
    assert counts.images == 6 and counts.boxes > 50
    for image in images:
        before, after = rows_of(Path(label_path(image))), rows_of(tmp_path / "back/labels/test" / f"{image.stem}.txt")
        np.testing.assert_allclose(after, before, atol=1.1e-6)


# --- COCO
def coco_arguments(folder):
    """Of coco2yolo, for what ``make_coco`` makes."""
    images, output = str(folder / "val"), str(folder / "out")
    return [str(folder / "instances_val.json"), "--images", images, "--output", output]


def make_coco(folder: Path, annotations=None, **changes) -> Path:
    """Categories with gaps, in an order of their own; an outline of two parts, a crowd, an image without objects."""
    square = [10.0, 10.0, 20.0, 10.0, 20.0, 20.0, 10.0, 20.0]
    content = {
        "images": [
            {"id": 7, "file_name": "000000000007.jpg", "width": 64, "height": 48},
            {"id": 9, "file_name": "sub folder/ñandú.jpg", "width": 40, "height": 30},
            {"id": 8, "file_name": "empty.jpg", "width": 30, "height": 30},
            {"id": 6, "file_name": "absent.jpg", "width": 30, "height": 30},
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}, {"id": 17, "name": "кот"}],
        "annotations": annotations or [
            {"id": 1, "image_id": 7, "category_id": 17, "bbox": [10.25, 10, 10.5, 10], "iscrowd": 0,
             "segmentation": [square]},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 64, 48], "iscrowd": 1,
             "segmentation": {"counts": [3], "size": [48, 64]}},
            {"id": 3, "image_id": 9, "category_id": 90, "bbox": [-5, 20, 15, 30], "iscrowd": 0,
             "segmentation": [[0, 20, 4, 20, 4, 24], [6, 26, 10, 26, 10, 30]]},
            {"id": 4, "image_id": 9, "category_id": 3, "bbox": [5, 5, 0, 3], "iscrowd": 0, "segmentation": []},
            {"id": 5, "image_id": 9, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0,
             "segmentation": {"counts": "abc", "size": [30, 40]}},
        ],
    } | changes  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for image in content["images"][:3]:
        picture(folder / "val" / image["file_name"], image["width"], image["height"])
    file = folder / "instances_val.json"
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return file


def test_coco_to_yolo(tmp_path):
    file = make_coco(tmp_path)
    counts = coco_to_yolo(read_annotations(file), tmp_path / "val", tmp_path / "out", "val")
    labels = tmp_path / "out/labels/val"
    assert edges(rows_of(labels / "000000000007.txt"), 64, 48) == [(1, 10.25, 10, 20.75, 20)]
    assert edges(rows_of(labels / "sub folder/ñandú.txt"), 40, 30) == [(2, 0, 20, 10, 30), (0, 1, 2, 4, 6)]
    assert (labels / "empty.txt").read_text() == ""
    listed = (tmp_path / "out/val.txt").read_text(encoding="utf-8").splitlines()
    assert listed == [f"./images/val/{name}" for name in ("000000000007.jpg", "sub folder/ñandú.jpg", "empty.jpg")]
    assert (counts.images, counts.boxes, counts.background, counts.missing) == (3, 3, 1, 1)
    assert counts.left_out == {"crowd region": 1, "box without extent in the image": 1}


def test_coco_outlines(tmp_path):
    file = make_coco(tmp_path)
    coco_to_yolo(read_annotations(file, segments=True), tmp_path / "val", tmp_path / "out", "val", segments=True)
    labels = tmp_path / "out/labels/val"
    assert edges(rows_of(labels / "000000000007.txt"), 64, 48) == [(1, 10, 10, 20, 20)]
    text = (labels / "sub folder/ñandú.txt").read_text().splitlines()
    outline = np.array(text[0].split()[1:], float).reshape(-1, 2) * (40, 30)
    assert polygon_area(outline.ravel()) == pytest.approx(16, abs=1e-3)  # both triangles, a bridge without area
    assert edges(rows_of(labels / "sub folder/ñandú.txt"), 40, 30) == [(2, 0, 20, 10, 30), (0, 1, 2, 4, 6)]


def test_joined_outlines_keep_every_point_and_the_area():
    generator = np.random.default_rng(1)
    for _ in range(20):
        squares = generator.uniform(0, 10, (4, 1, 2)) + 20 * np.arange(4)[:, None, None] * generator.integers(0, 2, 2)
        squares = squares + np.array([[0, 0], [3, 0], [3, 3], [0, 3]])
        # Apart from each other, or their areas would not add up.
        squares = [square + np.array([40 * index, 0]) for index, square in enumerate(squares)]
        joined = join_polygons([square.ravel().tolist() for square in squares])
        assert {tuple(point) for square in squares for point in square} == {tuple(point) for point in joined}
        assert polygon_area(joined.ravel()) == pytest.approx(36)
    assert join_polygons([[1, 2, 3, 4, 5, "x"], [1, 2, 3, 4, 5, [6]], {}, 5, [10**400] * 6]) is None
    assert join_polygons({"counts": []}) is None and join_polygons([[1, 2, 3]]) is None and join_polygons([]) is None


def test_coco_names_choose_and_order_classes(tmp_path):
    file = make_coco(tmp_path)
    counts = coco_to_yolo(read_annotations(file), tmp_path / "val", tmp_path / "out", "val", ["кот", "brush"])
    assert edges(rows_of(tmp_path / "out/labels/val/000000000007.txt"), 64, 48) == [(0, 10.25, 10, 20.75, 20)]
    assert counts.left_out["category 3 is not among the names"] == 2


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"images": 5}, "not a COCO instances file"),
        ({"categories": [{"name": "a"}]}, "not a COCO instances file"),
        ({"annotations": [{"image_id": 99, "category_id": 3, "bbox": [1, 2, 3, 4]}]}, "image 99, which is not listed"),
        ({"annotations": [{"image_id": 7, "category_id": 3, "bbox": [1, 2, 3]}]}, "not 4 numbers"),
        ({"annotations": [{"image_id": 7, "category_id": 3}]}, "bbox"),
        ({"annotations": [{"image_id": 7, "category_id": [], "bbox": [1, 2, 3, 4]}]}, "not a COCO instances file"),
        ({"annotations": [{"image_id": 7, "category_id": 3, "bbox": [10**400, 2, 3, 4]}]}, "not 4 numbers"),
        ({"images": [{"id": 7, "file_name": "../evil.jpg"}]}, "no file name"),
        ({"images": [{"id": 7, "file_name": "/evil.jpg"}]}, "no file name"),
        ({"images": [{"id": 7, "file_name": 7}]}, "no file name"),
        ({"images": [{"id": 7, "file_name": "gone.jpg"}]}, "none of the 1 images"),
    ],
)  # fmt: skip
def test_coco_mistakes_are_messages(tmp_path, changes, reason):
    make_coco(tmp_path)
    file = tmp_path / "other.json"
    content = json.loads((tmp_path / "instances_val.json").read_text(encoding="utf-8"))
    if "images" in changes:
        content["annotations"] = []
    file.write_text(json.dumps(content | changes))
    with pytest.raises(UserError, match=reason):
        coco_to_yolo(read_annotations(file), tmp_path / "val", tmp_path / "out", "val")


def test_unreadable_json_is_a_message(tmp_path):
    for text in ("", "[]", "{", '{"images": []}', "[" * 100_000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match="not a COCO instances file"):
            read_annotations(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_annotations(tmp_path / "gone.json")


@pytest.mark.parametrize("segments", [False, True])
def test_coco_to_yolo_and_back(tmp_path, segments):
    """Boxes are kept to a hundredth of a pixel, outlines of one part point by point."""
    generator = np.random.default_rng(2)
    names = yaml.safe_load((ROOT / "data/coco.yaml").read_text())["names"]
    chosen = [0, 11, 12, 79]  # around the gaps: 1, 13, 14, 90
    low = generator.uniform(0, 300, (30, 2)).round(2)
    size = generator.uniform(1, 150, (30, 2)).round(2)
    rows = []
    for index, ((x, y), (w, h)) in enumerate(zip(low.tolist(), size.tolist(), strict=True)):
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        rows.append({"id": index + 1, "image_id": 3, "iscrowd": 0, "bbox": [x, y, w, h], "segmentation": [outline],
                     "category_id": COCO_CATEGORY_IDS[chosen[index % 4]]})  # fmt: skip
    categories = [{"id": COCO_CATEGORY_IDS[index], "name": name} for index, name in names.items()]
    image = {"id": 3, "file_name": "000000000003.png", "width": 500, "height": 480}
    make_coco(tmp_path, rows, images=[image], categories=categories)
    flags = ["--segments"] if segments else []
    arguments = coco_arguments(tmp_path)
    assert main(["coco2yolo", *arguments, *flags]) == 0
    assert load_dataset_yaml(tmp_path / "out/out.yaml").names == names
    back = tmp_path / "back.json"
    assert main(["yolo2coco", "--data", str(tmp_path / "out/out.yaml"), "--output", str(back), "--coco-numbers"]) == 0
    result = json.loads(back.read_text())
    assert result["categories"] == categories and result["images"] == [image]
    for before, after in zip(rows, result["annotations"], strict=True):
        assert [before[key] for key in ("id", "image_id", "category_id")] == [
            after[key] for key in ("id", "image_id", "category_id")
        ]
        np.testing.assert_allclose(after["bbox"], before["bbox"], atol=0.003)
        assert after["area"] == pytest.approx(before["bbox"][2] * before["bbox"][3], rel=0.002)
        if segments:
            np.testing.assert_allclose(after["segmentation"], before["segmentation"], atol=0.001)
        else:
            assert after["segmentation"] == []


def test_yolo_labels_to_coco(tmp_path):
    images = [picture(tmp_path / f"images/val/{name}.png", 50, 40) for name in ("1", "zwei")]
    Path(label_path(images[0])).parent.mkdir(parents=True)
    Path(label_path(images[0])).write_text("1 .5 .5 .2 .5\n")
    content, counts = yolo_to_coco(images, {0: "a", 1: "b"})
    assert [image["id"] for image in content["images"]] == [1, "zwei"] and counts.background == 1
    assert content["annotations"][0]["bbox"] == [20, 10, 10, 20] and content["annotations"][0]["category_id"] == 1
    Path(label_path(images[0])).write_text("2 .5 .5 .2 .5\n")
    with pytest.raises(UserError, match="class 2"):
        yolo_to_coco(images, {0: "a", 1: "b"})
    Path(label_path(images[0])).write_text("1 .5 .5 .2 1.5\n")
    with pytest.raises(UserError, match=r"1\.txt:1: has a coordinate outside"):
        yolo_to_coco(images, {0: "a", 1: "b"})


# --- the documentation
DOCS = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")


def documented(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def test_the_commands_of_the_documentation_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_voc(tmp_path / "VOCdevkit/VOC2007")
    make_voc(tmp_path / "VOCdevkit/VOC2007", {"other": ((20, 20), [("cat", 0, 1, 1, 9, 9)])}, "val")
    (tmp_path / "annotations").mkdir()
    make_coco(tmp_path).rename(tmp_path / "annotations/instances_val.json")
    commands = [shlex.split(line) for block in documented("bash") for line in block.splitlines()]
    conversions = [words[3:] for words in commands if words[:3] == ["python", "-m", "utils.convert"]]
    assert [words[0] for words in conversions] == ["voc2yolo", "coco2yolo", "yolo2voc", "yolo2coco"]
    for words in conversions:
        assert main(words) == 0
    assert (tmp_path / "VOCdevkit/back/Annotations/other.xml").is_file()
    assert len(json.loads((tmp_path / "instances_back.json").read_text())["images"]) == 3
    for words in commands:
        if words[1] in ("train.py", "val.py"):
            options = {"train.py": train.parse_arguments, "val.py": val.parse_options}[words[1]](words[2:])
            assert load_dataset_yaml(options.data).download


def test_the_yaml_of_the_documentation_is_accepted(tmp_path):
    (text,) = documented("yaml")
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    spec = load_dataset_yaml(tmp_path / "mine.yaml")
    plan = read_plan(spec.yaml_file, spec.download, spec.convert, spec.names)
    assert plan.archives[0].into == "images" and plan.archives[0].checksum.startswith("sha256:0f34")
    assert plan.conversion.sets == {"train": "train", "val": "val"} and spec.evaluation == "voc"


def test_every_data_set_and_flag_is_documented(capsys):
    assert set(re.findall(r"^\| `(\S+\.yaml)`", DOCS, re.MULTILINE)) == {
        file.name for file in (ROOT / "data").glob("*.yaml")
    }
    by_hand = set(re.findall(r"^\| `(\S+\.yaml)` .* by hand, see below \|$", DOCS, re.MULTILINE))
    for file in (ROOT / "data").glob("*.yaml"):
        if file.name in by_hand:
            assert not read_yaml(file).get("download")
            continue
        spec = load_dataset_yaml(file)
        assert spec.generate or read_plan(file, spec.download, spec.convert, spec.names).archives
    for name in (DATASETS_VARIABLE, MIRROR_VARIABLE, OFFLINE_VARIABLE):
        assert f"`{name}`" in DOCS
    for command in ("voc2yolo", "coco2yolo", "yolo2voc", "yolo2coco"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        for flag in re.findall(r"--[a-z-]+", capsys.readouterr().out):
            assert flag in DOCS or flag == "--help"


# --- small parts
def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["voc2yolo", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "has no ImageSets/Main" in capsys.readouterr().out
    make_coco(tmp_path)
    arguments = coco_arguments(tmp_path)
    assert main(["coco2yolo", *arguments]) == 0
    arguments = ["--data", str(tmp_path / "out/out.yaml"), "--output", str(tmp_path / "x.json"), "--coco-numbers"]
    assert main(["yolo2coco", *arguments]) == 1
    assert "has 3 classes, COCO 80" in capsys.readouterr().out


def test_two_images_of_one_name_do_not_fit_into_voc(tmp_path, capsys):
    for folder in ("a", "b"):
        picture(tmp_path / "images" / folder / "same.png", 20, 20)
    (tmp_path / "x.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [a]\n")
    assert main(["yolo2voc", "--data", str(tmp_path / "x.yaml"), "--output", str(tmp_path / "out")]) == 1
    assert "VOC keeps all images in one folder" in capsys.readouterr().out


def test_clipping_and_names():
    assert clip((-5, 2, 7, 90), 10, 20) == (0, 2, 7, 20)
    assert clip((11, 2, 15, 3), 10, 20) is None and clip((1, 2, float("nan"), 3), 10, 20) is None
    assert box_line(3, (0, 0, 10, 20), 10, 20) == "3 0.500000 0.500000 1.000000 1.000000"
    assert rows_of_text(box_line(0, (5, 5, 5.0000001, 6), 4000, 4000)).shape == (1, 5)
    for name in ("", "a/b", "..", ".", "a\\b", "a\nb", None, 3):
        with pytest.raises(UserError):
            safe_name(name, Path("x"))
    assert safe_name("a/b", Path("x"), folders=True) == "a/b"
    for name in ("/a", "a//b", "a/../b", "a/"):
        with pytest.raises(UserError):
            safe_name(name, Path("x"), folders=True)


def rows_of_text(text: str) -> np.ndarray:
    return parse_labels(text)[0]


def test_difficult_objects_lie_beside_the_labels(tmp_path):
    assert difficult_path("/x/images/y/images/val/a.b.jpg") == Path("/x/images/y/difficult/val/a.b.txt")
    assert difficult_path("/x/a.jpg") == Path("/x/difficult/a.txt")
    assert read_difficult(tmp_path / "images/a.jpg").shape == (0, 5)
    (tmp_path / "difficult").mkdir()
    (tmp_path / "difficult/a.txt").write_text("1 .5 .5 .1 .1\n1 .5 .5 .1 .1\n")
    assert read_difficult(tmp_path / "images/a.jpg").tolist() == [pytest.approx([1, 0.5, 0.5, 0.1, 0.1])]
    (tmp_path / "difficult/a.txt").write_text("1 .5 .5 .1 .1\nnonsense\n")
    with pytest.raises(UserError, match=r"a\.txt:2: .*Correct the file"):
        read_difficult(tmp_path / "images/a.jpg")
