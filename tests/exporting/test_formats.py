"""Words on the command line that become formats, and what files say of themselves."""

import ast
import json
import shlex

import pytest
from small_detector import NAMES, float_detector, quantized_detector, save

import train
from exporting.description import describe, training_command
from exporting.formats import FORMATS, REPLACEMENTS, choose_formats
from models.backend import load_network
from utils.errors import UserError
from utils.metadata import read_metadata_file, write_metadata_file


def test_formats_are_found_in_every_spelling():
    assert choose_formats(["torchscript", "ONNX"]) == ["onnx", "torchscript"]
    assert choose_formats(["onnx,openvino", "onnx"]) == ["onnx", "openvino"]
    assert choose_formats(["xml", "ts"]) == ["openvino", "torchscript"]


@pytest.mark.parametrize("name", sorted(REPLACEMENTS))
def test_what_is_not_written_names_a_way(name):
    with pytest.raises(UserError, match=rf"--include {name}: not a format .*(--include (onnx|torchscript))"):
        choose_formats([*FORMATS, name])


@pytest.mark.parametrize("words", [["onx"], [","], []])
def test_unknown_formats_name_the_known_ones(words):
    with pytest.raises(UserError, match="onnx, openvino, torchscript"):
        choose_formats(words)


def test_a_file_says_how_it_was_trained_but_not_where(tmp_path):
    options = {"weights": "/home/somebody/float best.pt", "data": "/data/set.yaml", "quant": "lsq", "bits": "4"}
    path = save(quantized_detector(4), tmp_path / "q.pt", **options, gabfusion=True, ada="js", seed=0, recipe=None)
    network, weights = load_network(path)
    command = training_command(weights)
    assert "somebody" not in command
    words = shlex.split(command)
    assert words[:2] == ["python", "train.py"]
    parsed = train.parse_arguments(words[2:])
    assert (parsed.weights, parsed.data, parsed.imgsz, parsed.ada) == ("float best.pt", "set.yaml", 64, "js")
    assert (parsed.quant, parsed.bits, parsed.seed) == ("lsq", "4", 0) and parsed.gabfusion
    found = describe(network, weights)
    assert found["training"] == command and json.loads(found["bits"])["weights"] == 4
    assert ast.literal_eval(found["names"]) == NAMES and int(found["stride"]) == 16


def test_somebody_elses_checkpoint_knows_no_command(tmp_path):
    network, weights = load_network(save(float_detector(), tmp_path / "f.pt"))
    weights.checkpoint = None
    assert training_command(weights) == "" and "training" not in describe(network, weights)


@pytest.mark.parametrize("names", [NAMES, {0: "both ' and \"", 1: "colon: {x}", 2: "no"}])
def test_metadata_beside_a_file_is_read_as_it_was_written(tmp_path, names):
    metadata = {"stride": "32", "names": str(names), "bits": '{"weights": 4}', "method": "lsq"}
    write_metadata_file(metadata, tmp_path / "m.yaml")
    assert read_metadata_file(tmp_path / "m.yaml") == metadata
    assert read_metadata_file(tmp_path / "absent.yaml") == {}
    (tmp_path / "broken.yaml").write_text("a: [")
    assert read_metadata_file(tmp_path / "broken.yaml") == {}
