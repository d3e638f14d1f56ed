"""Whatever a YAML, an XML or a JSON file holds, what reads it answers or raises UserError."""

import contextlib
import json
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.archives import safe_parts
from utils.convert.coco import coco_to_yolo, read_annotations
from utils.convert.voc import read_annotation
from utils.dataset_download import read_plan
from utils.downloads import file_name
from utils.errors import UserError
from utils.images import write_image

IMAGE = np.zeros((20, 20, 3), np.uint8)
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
SCALARS = st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner), max_leaves=8
)


def mostly(*usual):
    """Usual values, and now and then any other."""
    return st.one_of(*[st.sampled_from(usual)] * 6, VALUES)


def record(optional=None, **required):
    return st.fixed_dictionaries(required, optional=optional or {})


URLS = mostly("https://a.org/x.zip", "https://a.org/y.tar", "http://[", "https://a.org/")
ARCHIVES = record({"md5": mostly("0" * 32), "into": mostly("images", "../x", "/x"), "x": VALUES}, url=URLS)
CONVERSION = record(
    {"source": mostly("x", ".."), "corners": mostly("edges"), "segments": mostly(True)},
    format=mostly("voc", "coco"),
    sets=mostly({"a": "b"}, {"a": "../b"}),
)


@QUICK
@given(declared=mostly("https://a.org/x.zip") | st.lists(ARCHIVES, max_size=2), convert=CONVERSION | VALUES)
def test_declarations(declared, convert):
    with contextlib.suppress(UserError):
        plan = read_plan(Path("x.yaml"), declared, convert, {0: "a"})
        assert plan.archives and all(".." not in archive.into.split("/") for archive in plan.archives)


@QUICK
@given(st.text(max_size=30) | st.text("./\\:a~[", max_size=12))
def test_names(name):
    with contextlib.suppress(UserError):
        target = Path("/base").joinpath(*safe_parts(name, Path("x.zip")))
        assert target.is_relative_to("/base") and ".." not in target.parts
    with contextlib.suppress(UserError):
        assert "/" not in file_name(f"https://a.org/{name}")
    with contextlib.suppress(UserError):
        file_name(f"https://{name}/x")


NUMBERS = st.sampled_from(["1", "9", "-4", "3.5", "nan", "inf", "1e999", "x", ""])


def element(name, content):
    return content.map(lambda text: f"<{name}>{text}</{name}>")


def joined(*parts):
    return st.tuples(*parts).map("".join)


BOX = element("bndbox", joined(*(element(key, NUMBERS) for key in ("xmin", "ymin", "xmax", "ymax"))))
OBJECT = element("object", joined(st.sampled_from(["<name>a</name>", ""]), BOX | st.just("")))
SIZE = element("size", joined(element("width", NUMBERS), element("height", NUMBERS)))
ODDITIES = st.sampled_from(["", "", "<!DOCTYPE a>", "&b;", "<?xml version='1.0' encoding='utf-7'?>", "<a>"])


@QUICK
@given(st.binary(max_size=60) | joined(ODDITIES, element("annotation", joined(SIZE, OBJECT, ODDITIES))).map(str.encode))
def test_annotations_of_voc(tmp_path, content):
    (tmp_path / "a.xml").write_bytes(content)
    with contextlib.suppress(UserError):
        read_annotation(tmp_path / "a.xml")


BOXES = mostly([1, 2, 3, 4], [1, 2, -3, 4], [1e999, 2, 3, 4])
OUTLINES = mostly([[1, 2, 3, 4, 5, 6]], [[1, 2, 3]], [[1, 2, 3, 4, 5, "x"]])
IMAGES = record({"width": mostly(20), "height": mostly(20)}, id=mostly(1), file_name=mostly("a.png", "../a.png"))
ROWS = record(
    {"iscrowd": mostly(0, 1), "segmentation": OUTLINES}, image_id=mostly(1), category_id=mostly(3, 4), bbox=BOXES
)
CATEGORIES = mostly([{"id": 3, "name": "a"}], [{"id": "x", "name": "a"}])


@QUICK
@given(mostly([]) | st.lists(IMAGES, max_size=2), mostly([]) | st.lists(ROWS, max_size=3), CATEGORIES)
def test_annotations_of_coco(tmp_path, images, rows, categories):
    write_image(tmp_path / "a.png", IMAGE)
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
    with contextlib.suppress(UserError):
        counts = coco_to_yolo(
            read_annotations(file, True), tmp_path, tmp_path / "out", "val", segments=True, transfer=None
        )
        assert counts.images > 0
