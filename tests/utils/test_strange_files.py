"""Whatever a YAML, a label file, a checkpoint, a cache or an ONNX file's metadata holds, its reader answers or raises
UserError."""

import contextlib
import copy
import io
import zipfile

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_detector import TINY

import train
from models.backend import load_network, metadata_names, metadata_stride
from models.yolo import DetectionModel
from quant.recipe import build_config
from utils.checkpoint import load_checkpoint, read_weights, save_checkpoint
from utils.dataset_yaml import load_dataset_yaml
from utils.errors import UserError
from utils.hyp import load_hyp
from utils.label_cache import load_cache, save_cache
from utils.labels import _renew, parse_labels
from utils.yaml_file import read_yaml

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
SCALARS = st.none() | st.booleans() | st.integers(-3, 200) | st.floats(-3, 200) | st.sampled_from([float("nan"), 1e-3])
SCALARS |= st.text(max_size=8) | st.sampled_from(["~nobody", "\0", "..", "1e-3", "nn.SiLU()"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths to everything inside of nested lists and dicts."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in entries for place in places(inner, (*path, key)))]


def altered(original: dict):
    """``original`` with one or two entries, at any depth, replaced by anything."""
    place = st.sampled_from(places(original)[1:])

    def alter(changes: list) -> dict:
        result = copy.deepcopy(original)
        for path, value in changes:
            inner = result
            with contextlib.suppress(KeyError, IndexError, TypeError):  # the first change took the place away
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = value
        return result

    return st.lists(st.tuples(place, VALUES), min_size=1, max_size=2).map(alter)


ODD_YAML = [
    "a: 2020-13-45",
    "[" * 500,
    "a: &a [*a]",
    "? [1]\n: 2",
    "!!python/object:os.system {}",
    "a: 0x",
    "\t",
    "- 1:60",
]


@QUICK
@given(st.text(max_size=40).map(str.encode) | st.binary(max_size=40) | st.sampled_from(ODD_YAML).map(str.encode))
def test_yaml(tmp_path, content):
    (tmp_path / "a.yaml").write_bytes(content)
    for errors in ("strict", "replace"):
        with contextlib.suppress(UserError):
            read_yaml(tmp_path / "a.yaml", errors)


DATA = {
    "path": ".",
    "train": "images",
    "val": ["images"],
    "nc": 2,
    "names": {0: "a", 1: "b"},
    "defaults": {"imgsz": 64},
}


@QUICK
@given(altered(DATA) | VALUES)
def test_data_set_yaml(tmp_path, content):
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    with contextlib.suppress(UserError):
        spec = load_dataset_yaml(tmp_path / "data.yaml")
        assert list(spec.names) == list(range(spec.nc)) and spec.train and spec.val


@QUICK
@given(altered({"lr0": 0.01, "anchors": 3, "mosaic": 1.0}) | VALUES)
def test_hyperparameters(tmp_path, content):
    (tmp_path / "hyp.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    with contextlib.suppress(UserError):
        assert all(isinstance(value, (int, float)) for value in load_hyp(tmp_path / "hyp.yaml").values())


RECIPE = build_config("lsq", "4", True, True, None, {}).to_dict()


@QUICK
@given(altered(RECIPE) | VALUES)
def test_recipes(tmp_path, content):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    with contextlib.suppress(UserError):
        config = build_config("lsq", None, None, None, str(tmp_path / "recipe.yaml"), {})
        assert 2 <= config.weight.bits <= 8


@settings(QUICK, max_examples=40)
@given(altered(TINY))
def test_model_yaml(content):
    with contextlib.suppress(UserError):
        DetectionModel(content)


FIELD = st.sampled_from(
    ["0", "1", "0.5", "0.2", "-0.1", "1e999", "1e300", "nan", "inf", "0x1", "1_0", "\u0661", "½", "", "1,5"]
)


@QUICK
@given(st.text(max_size=60) | st.lists(st.lists(FIELD, max_size=12).map(" ".join), max_size=5).map("\n".join))
def test_labels(text):
    rows, problems = parse_labels(text, "a.txt")
    assert len(rows) + len(problems) <= len(text.splitlines())
    assert np.isfinite(rows).all() and (rows[:, 1:] >= 0).all() and (rows[:, 1:] <= 1).all() and (rows[:, 3:] > 0).all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a checkpoint and of a label cache."""
    folder = tmp_path_factory.mktemp("whole")
    save_checkpoint(CHECKPOINT, folder / "a.pt")
    (folder / "a.txt").write_text("")
    save_cache(folder / "a.cache", _renew([str(folder / "a.jpg")], None, ""))
    return {"checkpoint": (folder / "a.pt").read_bytes(), "cache": (folder / "a.cache").read_bytes()}


CHECKPOINT = {
    "model_yaml": TINY,
    "names": {0: "a", 1: "b", 2: "c"},
    "stride": [4.0],
    "model": {"weight": torch.ones(3)},
    "ema": None,
    "options": {"imgsz": 64, "quant": None, "recipe": None},
    "phase": "float",
    "epoch": 1,
    "quantization": None,
}
DAMAGE = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)


def damaged(content: bytes, changes: list, length: float) -> bytes:
    result = bytearray(content[: round(len(content) * length)])
    for place, byte in changes:
        if result:
            result[min(int(place * len(result)), len(result) - 1)] = byte
    return bytes(result)


@QUICK
@given(DAMAGE, st.sampled_from([1.0, 1.0, 0.99, 0.5, 0.01]))
def test_damaged_checkpoints(tmp_path, whole, changes, length):
    (tmp_path / "a.pt").write_bytes(damaged(whole["checkpoint"], changes, length))
    for read in (load_checkpoint, read_weights):
        with contextlib.suppress(UserError):
            read(tmp_path / "a.pt")


@pytest.fixture(scope="module")
def official():
    """The entries of a zip file as YOLOv5 saves it: a pickled module, and its tensors' bytes."""
    stream = io.BytesIO()
    torch.save({"epoch": -1, "model": DetectionModel(TINY).half(), "ema": None}, stream)
    with zipfile.ZipFile(stream) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


EDITS = st.lists(
    st.tuples(
        st.floats(0, 1), st.sampled_from(["replace", "delete", "insert", "repeat"]), st.binary(min_size=1, max_size=8)
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list) -> bytes:
    for place, kind, given_bytes in edits:
        at, size = int(place * len(content)), len(given_bytes)
        behind = content[at + size :] if kind in ("replace", "delete") else content[at:]
        put = {"replace": given_bytes, "delete": b"", "insert": given_bytes, "repeat": content[at : at + 4 * size]}[
            kind
        ]
        content = content[:at] + put + behind
    return content


@QUICK
@given(EDITS)
def test_official_checkpoints_with_an_edited_pickle(tmp_path, official, edits):
    """The checksums of the zip file are right, so it is the reader of pickles that has to cope."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name, content in official.items():
            archive.writestr(name, edited(content, edits) if name.endswith("data.pkl") else content)
    with contextlib.suppress(UserError):
        load_network(tmp_path / "a.pt")


@QUICK
@given(altered(CHECKPOINT) | st.dictionaries(st.text(max_size=3), VALUES))
def test_checkpoints_with_other_content(tmp_path, content):
    stream = io.BytesIO()
    torch.save({"format": 1, **content}, stream)
    (tmp_path / "a.pt").write_bytes(stream.getvalue())
    with contextlib.suppress(UserError):
        weights = read_weights(tmp_path / "a.pt")
        assert all(isinstance(name, str) for name in weights.names.values()) and weights.stride.dtype == torch.float32
    with contextlib.suppress(UserError):
        train.find_resume(str(tmp_path / "a.pt"))


@QUICK
@given(DAMAGE, st.sampled_from([1.0, 1.0, 0.99, 0.5]))
def test_damaged_caches(tmp_path, whole, changes, length):
    (tmp_path / "a.cache").write_bytes(damaged(whole["cache"], changes, length))
    table = load_cache(tmp_path / "a.cache")
    assert table is None or len(table.images) == len(table.labels)


LITERALS = st.sampled_from(
    [
        "{0: 'a', 1: 'b'}",
        "['a', 'b']",
        "{'0': 'a', '1': 'b'}",
        "{0: 'a', 5: 'b'}",
        "{1e999: 'a'}",
        "{0, 1}",
        "'ab'",
        "(" * 300,
    ]
)


@QUICK
@given(LITERALS | st.text(max_size=20), LITERALS | st.integers().map(str) | st.floats().map(str) | st.text(max_size=6))
@example("{0: 'a', 1: 'b'}", "0")
@example("[" * 20_000, "-32")
def test_metadata_of_onnx_files(names, stride):
    metadata = {"names": names, "stride": stride}
    found = metadata_names(metadata, 7)
    assert found is None or (list(found) == [0, 1] and all(isinstance(name, str) for name in found.values()))
    assert metadata_stride(metadata) is None or metadata_stride(metadata) >= 1
