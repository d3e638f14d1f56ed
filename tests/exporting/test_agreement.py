"""``export.py --verify``: honest files hold, damaged ones do not, and the table says where."""

import re
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_detector import TINY, float_detector, images, save

import export
import val
from exporting.agreement import MAP_TOLERANCE, judge, standard_errors
from quant import QuantConfig, calibrate, prepare
from utils.metrics import ap_per_class

SIDE = 64


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A 4-bit detector of the drawn set's four classes in every format."""
    model = prepare(float_detector({**TINY, "nc": 4}), QuantConfig.from_dict({"method": "lsq"}))
    calibrate(model, [images(4, 32, 32, seed=2)])
    path = save(model.eval(), tmp_path_factory.mktemp("agreement") / "best.pt")
    flags = ["--imgsz", str(SIDE), "--include", "onnx", "openvino", "torchscript"]
    assert export.main(["--weights", str(path), *flags]) == 0
    return path.parent


def verify(files, data, *names):
    weights = [str(files / name) for name in ("best.pt", *names)]
    return export.main(["--weights", *weights, "--imgsz", str(SIDE), "--verify", str(data)])


def test_every_format_holds_on_the_users_images(files, tiny_dataset, capsys):
    before = sorted(file.name for file in files.iterdir())
    names = ("best.onnx", "best_storage.onnx", "best_openvino_model", "best.torchscript")
    assert verify(files, tiny_dataset, *names) == 0
    printed = capsys.readouterr().out
    for name in names:
        assert [line.split()[-1] for line in printed.splitlines() if line.split()[:1] == [str(files / name)]] == [
            "holds"
        ]
    assert printed.count("codes compared") == 6 and "without a flipped code" in printed and "PROBLEM" not in printed
    assert sorted(file.name for file in files.iterdir()) == before, "nothing is written"


def damage(source, target, pick, change):
    model = onnx.load(str(source))
    (tensor,) = [tensor for tensor in model.graph.initializer if pick(tensor, model)][:1]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
    onnx.save(model, str(target))


def is_step(tensor, model):
    return tensor.name in [node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"][2:]


@pytest.mark.parametrize(
    ("pick", "change", "said"),
    [
        (is_step, lambda step: step * np.float32(1.02), "codes differ away from any rounding boundary"),
        (
            lambda tensor, _: tensor.name == "model.5.cv3.conv.weight",
            lambda codes: np.roll(codes, 1, 0),
            "PROBLEM: .*model.6",
        ),
        (
            lambda tensor, _: tensor.name == "model.6.m.0.products.0.bias",
            lambda bias: bias + np.float32(0.5),
            "the head differs",
        ),
    ],
    ids=["step", "weights", "bias"],
)
def test_a_damaged_onnx_file_is_found_out(files, tiny_dataset, tmp_path, capsys, pick, change, said):
    damage(files / "best.onnx", tmp_path / "damaged.onnx", pick, change)
    assert verify(files, tiny_dataset, "best_storage.onnx", tmp_path / "damaged.onnx") == 1
    printed = capsys.readouterr().out
    problems = [line for line in printed.splitlines() if line.startswith("PROBLEM")]
    assert 1 <= len(problems) <= 6 and all("damaged.onnx" in line for line in problems)
    assert printed.count("PROBLEM") == len(problems) == len(set(problems)), "each is said once"
    table = [line for line in printed.splitlines() if line.split()[-1:] in (["holds"], ["hold"])]
    assert ["does not hold" in line for line in table] == [False, True]
    assert re.search(said, "\n".join(problems))


def test_a_damaged_openvino_model_is_found_out(files, tiny_dataset, tmp_path, capsys):
    folder = tmp_path / "damaged_openvino_model"
    folder.mkdir()
    for file in (files / "best_openvino_model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = bytearray((folder / "best.bin").read_bytes())
    stored = [data.attrib for data in ElementTree.parse(folder / "best.xml").iter("data") if "offset" in data.attrib]
    integers = [slice(int(d["offset"]), int(d["offset"]) + int(d["size"])) for d in stored if d["element_type"] == "i8"]
    assert len(integers) > 8
    for place in integers:
        weights[place] = weights[place][::-1]
    (folder / "best.bin").write_bytes(bytes(weights))
    assert verify(files, tiny_dataset, folder) == 1
    assert "codes differ away from any rounding boundary" in capsys.readouterr().out


def test_what_was_exported_at_once_is_verified_at_once(files, tiny_dataset, tmp_path, capsys):
    path = tmp_path / "again.pt"
    path.write_bytes((files / "best.pt").read_bytes())
    assert (
        export.main(["--weights", str(path), "--dynamic", "--nms", "--imgsz", str(SIDE), "--verify", str(tiny_dataset)])
        == 0
    )
    printed = capsys.readouterr().out
    assert "again_storage.onnx" in printed and printed.count("holds") == 2
    for command in ("python val.py", "python detect.py", "python export.py"):
        assert printed.count(command) == 1


def test_a_file_of_another_network_is_found_out(files, tiny_dataset, tmp_path, capsys):
    path = save(float_detector({**TINY, "nc": 4}), tmp_path / "float.pt")
    formats = ["--include", "onnx", "openvino", "torchscript"]
    assert export.main(["--weights", str(path), "--imgsz", str(SIDE), *formats]) == 0
    for name in ("float.onnx", "float_openvino_model", "float.torchscript"):
        assert verify(files, tiny_dataset, tmp_path / name) == 1
        assert "made of another network, its method is float and the checkpoint's lsq" in capsys.readouterr().out


def test_an_oblong_size_is_refused_before_anything_is_written(tmp_path, tiny_dataset, capsys):
    path = save(float_detector({**TINY, "nc": 4}), tmp_path / "best.pt")
    flags = ["--imgsz", "32", "64", "--verify", str(tiny_dataset)]
    assert export.main(["--weights", str(path), *flags]) == 1
    assert "--verify needs a square or dynamic input, not 32x64" in capsys.readouterr().out
    assert not path.with_suffix(".onnx").exists()


def test_mistakes_are_named(files, tiny_dataset, tmp_path, capsys):
    for arguments, reason in (
        (["--weights", files / "best.onnx"], "is exported already. To compare it with its checkpoint"),
        (["--weights", files / "best.onnx", files / "best.torchscript", "--verify", tiny_dataset], "exported already"),
        (["--weights", files / "best.pt", files / "best.onnx", "--verify", tmp_path / "no.yaml"], "no.yaml"),
        (["--weights", files / "best.pt", files / "no_openvino_model", "--verify", tiny_dataset], "no such file"),
    ):
        assert export.main([str(word) for word in arguments]) == 1
        assert reason in capsys.readouterr().out


def evaluation(scores, correct, image, labels=60):
    """One class, one label in each of 60 images."""
    samples = val.Samples(
        np.repeat(correct[:, None], 10, 1), scores, np.zeros(len(scores)), image, np.zeros(labels), np.arange(labels)
    )
    per_class = ap_per_class(samples.correct, scores, samples.predicted, samples.actual)
    return val.Evaluation(*per_class.means(), per_class, labels, labels, samples=samples)


def test_a_difference_beyond_chance_is_a_problem(tmp_path):
    generator = np.random.default_rng(0)
    image = np.arange(60)
    found = generator.random(60) < 0.8
    scores = generator.random(60)
    network = evaluation(scores, found, image)
    assert standard_errors(network, network) == (0, 0) and not judge(tmp_path, network, network).problems

    noise = found ^ (generator.random(60) < 0.03)  # some found, some lost
    noisy = judge(tmp_path, network, evaluation(scores, noise, image))
    assert abs(noisy.difference) > MAP_TOLERANCE and noisy.error > 0.002 and not noisy.problems

    worse = judge(tmp_path, network, evaluation(scores, found & (generator.random(60) < 0.6), image))
    assert worse.difference < -0.1 and len(worse.problems) == 1 and "mAP differs by -0." in worse.problems[0]
    broken = judge(tmp_path, network, evaluation(scores * np.nan, found & False, image))
    assert broken.problems


def test_the_standard_error_is_that_of_the_mean_over_images():
    """With all scores equal in rank, losing half of the images' only boxes at random has the binomial's spread."""
    generator = np.random.default_rng(1)
    lost = generator.random(400) < 0.5
    image, ones = np.arange(400), np.ones(400, bool)
    scores = np.linspace(1, 0.5, 400)
    network = evaluation(scores, ones, image, 400)
    half = evaluation(np.where(lost, 0.1, scores), ~lost, image, 400)
    expected = (0.5 * 0.5 / 400) ** 0.5  # AP is the recall, as the misses rank last
    assert standard_errors(network, half)[0] == pytest.approx(expected, rel=0.25)
