from pathlib import Path

import pytest
import yaml

from data.shapes import Drawing
from utils.dataset_yaml import load_dataset_yaml, prepare_dataset
from utils.errors import UserError
from utils.hyp import OPTIONAL, load_hyp
from utils.paths import ROOT


@pytest.fixture
def write(tmp_path):
    """Writes a YAML beside two image folders; a value of None leaves its key away."""
    for split in ("train", "val"):
        (tmp_path / "set" / "images" / split).mkdir(parents=True)

    def write(**changes):
        content = {"path": "set", "train": "images/train", "val": "images/val", "names": ["cat", "dog"]} | changes
        file = tmp_path / "some.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return file

    return write


def test_paths_names_and_defaults(write, tmp_path):
    spec = load_dataset_yaml(write(defaults={"imgsz": 96}))
    assert spec.train == [str(tmp_path / "set/images/train")]
    assert spec.val == [str(tmp_path / "set/images/val")]
    assert (spec.names, spec.nc, spec.path) == ({0: "cat", 1: "dog"}, 2, tmp_path / "set")
    assert (spec.defaults, spec.test, spec.is_coco) == ({"imgsz": 96}, [], False)
    with pytest.raises(UserError, match="'test'"):
        spec.split("test")
    assert load_dataset_yaml(write(names={1: "dog", 0: "cat"})).names == {0: "cat", 1: "dog"}
    several = load_dataset_yaml(write(train=["images/train", "images/val"]))
    assert several.train == [*spec.train, *spec.val]


def test_where_a_relative_path_is_looked_for(write, tmp_path, monkeypatch):
    assert load_dataset_yaml(write(path=".", train="set/images/train", val="set/images/val")).path == tmp_path
    assert load_dataset_yaml(write(path=str(tmp_path / "set"))).path == tmp_path / "set"
    (tmp_path / "elsewhere" / "other" / "images").mkdir(parents=True)
    file = write(path="other", train="images", val="images")
    with pytest.raises(UserError, match="other"):
        load_dataset_yaml(file)
    monkeypatch.setenv("YOLOv5_DATASETS_DIR", str(tmp_path / "elsewhere"))
    assert load_dataset_yaml(file).path == tmp_path / "elsewhere" / "other"
    assert load_dataset_yaml(write(path="../datasets/other", train="images", val="images")).path.name == "other"
    monkeypatch.delenv("YOLOv5_DATASETS_DIR")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_dataset_yaml(write(path="other", train="images", val="images")).path == tmp_path / "elsewhere/other"


def test_without_a_path_as_labelling_services_and_old_yamls_are(write, tmp_path, monkeypatch):
    """``../train/images`` beside the YAML, and ``../set/images`` as seen from where one works."""
    for folder in ("service/train/images", "service/valid/images", "work/deeper", "set/images/train"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    file = write(path=None, train="../train/images", val=["../valid/images"]).rename(tmp_path / "service" / "data.yaml")
    spec = load_dataset_yaml(file)
    assert (spec.train, spec.val) == ([str(file.parent / "train/images")], [str(file.parent / "valid/images")])
    monkeypatch.chdir(tmp_path / "work")
    file = write(path=None, train="../set/images/train", val="../set/images/train").rename(
        tmp_path / "work/deeper/a.yaml"
    )
    assert load_dataset_yaml(file).train == [str(tmp_path / "set/images/train")]
    with pytest.raises(UserError, match=str(tmp_path / "work/other")):  # named where it is looked for first
        load_dataset_yaml(write(path=None, train="../other", val="../other").rename(tmp_path / "work/deeper/a.yaml"))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"names": None}, "'names' is missing"),
        ({"train": None}, "'train' is missing"),
        ({"val": "images/nowhere"}, "nowhere not found"),
        ({"evaluation": "kitti"}, "evaluation: kitti"),
        ({"nc": 3}, "'nc' is 3 but there are 2 names"),
        ({"names": {1: "cat", 2: "dog"}}, "0, 1, 2"),
        ({"names": "cat"}, "'names'"),
        ({"train": 5}, "'train' must be"),
        ({"defaults": [1]}, "'defaults'"),
        ({"generate": "shapes", "color": 1}, "unknown keys color"),
    ],
)
def test_mistakes_are_named(write, changes, reason):
    with pytest.raises(UserError, match=reason):
        load_dataset_yaml(write(**changes))


def test_files_that_are_no_data_set(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml"):
        load_dataset_yaml("nothing.yaml")
    for content in ("a: [", "- 1\n", ""):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(UserError, match=r"bad\.yaml"):
            load_dataset_yaml(tmp_path / "bad.yaml")


def test_coco_is_known_by_its_val_list(write, tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "val2017.txt").write_text("")
    assert load_dataset_yaml(write(path="coco", train="val2017.txt", val="val2017.txt")).is_coco


def test_the_shapes_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("shapes.yaml", "data/shapes.yaml", str(ROOT / "data" / "shapes.yaml")):
        spec = load_dataset_yaml(name)
        assert spec.generate == "shapes"
        assert spec.path == ROOT / "datasets" / "shapes"
        assert set(spec.defaults) >= {"imgsz", "epochs", "float_epochs", "batch_size", "cfg"}


def test_preparing_checks_or_draws(write, tmp_path):
    spec = load_dataset_yaml(write(generate="pictures", path=str(tmp_path / "new")))
    with pytest.raises(UserError, match="generate: pictures"):
        prepare_dataset(spec)
    spec = load_dataset_yaml(write(generate="shapes", path=str(tmp_path / "drawn")))
    assert prepare_dataset(spec).path == tmp_path / "drawn"
    assert len(list((tmp_path / "drawn" / "images" / "val").iterdir())) == Drawing().val_images
    spec = load_dataset_yaml(write())
    assert prepare_dataset(spec) is spec


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("lr0", -0.01, "0 or more"),
        ("mixup", float("inf"), "0 or more"),
        ("momentum", 0, "over 0 and under 1"),
        ("warmup_momentum", 1, "0 or more and under 1"),
        ("quant_ema_tau", 0.0, "over 0"),
        ("anchors", "0", "over 0"),
    ],
)
def test_hyperparameters_that_cannot_be_are_refused(tmp_path, key, value, reason):
    file = tmp_path / "hyp.yaml"
    file.write_text(yaml.safe_dump({key: value}))
    with pytest.raises(UserError, match=f"hyp.yaml: {key}: .* must be {reason}$"):
        load_hyp(file)


def test_hyper_parameter_files_have_the_reference_keys():
    low = yaml.safe_load((ROOT / "data/hyps/hyp.scratch-low.yaml").read_text())
    assert len(low) == 28
    assert (low["lr0"], low["cls"], low["scale"], low["mosaic"], low["mixup"]) == (0.01, 0.5, 0.5, 1.0, 0.0)
    for file in Path(ROOT / "data" / "hyps").glob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        ours = {key for key in values if key.startswith("quant_")} | set(OPTIONAL)
        assert set(values) - ours == set(low), file
        assert all(isinstance(value, float | int) for value in values.values()), file
    voc = yaml.safe_load((ROOT / "data/hyps/hyp.VOC.yaml").read_text())
    assert (voc["lr0"], voc["obj_pw"], voc["anchors"], voc["mixup"]) == (0.00334, 0.67198, 3.412, 0.04266)
