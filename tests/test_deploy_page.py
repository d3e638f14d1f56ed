"""docs/deploy.md: its command lines and its Python do what the page says."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from small_detector import TINY, confident, float_detector, images, save

import detect
import export
import val
from quant import QuantConfig, calibrate, prepare
from utils.paths import ROOT

COMMANDS = {"export.py": export.main, "val.py": val.main, "detect.py": detect.main}


@pytest.fixture
def folder(tiny_dataset, tmp_path, monkeypatch):
    """What the page assumes: a quantized and a float checkpoint, a data set, a picture that is not square."""
    network = confident(float_detector({**TINY, "nc": 4}))
    save(network, tmp_path / "float.pt")
    prepare(network, QuantConfig.from_dict({"method": "lsq", "weight": {"bits": 8}, "activation": {"bits": 8}}))
    calibrate(network, [images(4, 32, 32, seed=2)])
    for name in ("best", "nms"):
        save(network.eval(), tmp_path / f"{name}.pt")
    shutil.copy(tiny_dataset, tmp_path / "data.yaml")
    text = (tmp_path / "data.yaml").read_text().replace("path: .", f"path: {tiny_dataset.parent}")
    (tmp_path / "data.yaml").write_text(text)
    generator = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / "image.jpg"), cv2.resize(generator.integers(0, 255, (6, 9, 3), np.uint8), (90, 61)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(line, project):
    program, script, *arguments = shlex.split(line)
    assert program == "python"
    if script != "export.py":
        arguments += ["--project", str(project), "--device", "cpu"]
    assert COMMANDS[script](arguments) == 0, line


def test_the_page_in_order(folder, capsys):
    assert export.main(["--weights", "float.pt"]) == 0
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", page, re.DOTALL)
    assert [kind for kind, _ in blocks].count("python") == 6 and [kind for kind, _ in blocks].count("bash") == 3
    space, found = {}, {}
    for number, (kind, text) in enumerate(blocks):
        if kind == "bash":
            for line in text.strip().splitlines():
                run_command(line, folder / f"runs{number}")
            continue
        space.pop("found", None)
        exec(compile(text, f"deploy.md block {number}", "exec"), space)
        if "find(" in text and "def find" not in text:
            rows = space["find"](space["decoded"][0], space["back"]) if "found" not in space else space["found"]
            found[number] = np.array([[float(value) for value in row] for row in rows])
    assert "holds" in capsys.readouterr().out

    assert detect.main([
        "--weights", "best.onnx", "--source", "image.jpg", "--project", "runs", "--save-txt", "--save-format", "1",
        "--save-conf", "--nosave",
    ]) == 0  # fmt: skip
    lines = (folder / "runs" / "exp" / "labels" / "image.txt").read_text().splitlines()
    expected = np.array([line.split() for line in lines], float)[:, [1, 2, 3, 4, 5, 0]]
    onnx, openvino, opencv, torchscript = found.values()
    assert len(expected) > 100 and len(opencv) > 2
    inside = space["boxes"]
    assert len(inside) == 100 < len(onnx)
    for rows in (onnx, openvino, torchscript, inside):
        rows[:, :4] = rows[:, :4].clip(0, [90, 61, 90, 61])
        # detect.py pads by fractions of a pixel on the way back.
        np.testing.assert_allclose(rows, expected[: len(rows)], atol=0.5)
        assert len(rows) in (100, len(expected))


# The page leaves ``prepare`` to the reader; here it reads numbers that are prepared already.
PREPARE = """
#include <fstream>
std::vector<float> prepare(const std::string&, int size) {
    std::vector<float> images(3 * size * size);
    std::ifstream("input.bin", std::ios::binary).read(reinterpret_cast<char*>(images.data()), 4 * images.size());
    return images;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_openvino_program(folder):
    openvino = pytest.importorskip("openvino")
    package = Path(openvino.__file__).parent
    libraries = sorted((package / "libs").glob("libopenvino.so*"))
    if not (package / "include" / "openvino" / "openvino.hpp").exists() or not libraries:
        pytest.skip("this openvino package has no headers")
    assert export.main(["--weights", "best.pt", "--include", "openvino"]) == 0
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (program,) = [text for text in re.findall(r"```cpp\n(.*?)```", page, re.DOTALL) if "openvino.hpp" in text]
    assert "640, 640" in program
    Path("program.cpp").write_text(program.replace("640", "64") + PREPARE)
    flags = ["-std=c++17", "-O0", f"-I{package / 'include'}", "program.cpp", "-o", "program", str(libraries[0])]
    subprocess.run(["g++", *flags, f"-Wl,-rpath,{libraries[0].parent}"], check=True)
    picture = images(1, 64, 64).numpy()
    Path("input.bin").write_bytes(picture.tobytes())
    printed = subprocess.run(["./program"], check=True, capture_output=True, text=True).stdout
    found = np.array([line.split() for line in printed.splitlines()], float)
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    rows = core.compile_model("best_openvino_model/best.xml", "CPU", settings)([picture])[0][0]
    expected = rows[rows[:, 4] > 0.25]
    assert len(expected) > 10
    np.testing.assert_allclose(found, expected[:, :5], atol=0.006)
