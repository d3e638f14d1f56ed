"""``pip install .``: what the wheel holds, that it adds one name to site-packages, and that its commands run."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import yolov5_qat
from utils.paths import ROOT

PARTS = ("data", "exporting", "models", "quant", "run_report", "training", "utils", "yolov5_qat")
KINDS = (".py", ".yaml", ".cpp", ".html")
# Runs each command of the installed distribution with --help, in the one process that it is started in.
HELP = """
import importlib.metadata, sys
commands = [c for c in importlib.metadata.distribution("yolov5-qat").entry_points if c.group == "console_scripts"]
for command in commands:
    sys.argv = [command.name, "--help"]
    try:
        command.load()()
    except SystemExit as end:
        assert not end.code, (command.name, end.code)
    print("STARTED", command.name)
import models.yolo, train
print("FROM", models.yolo.__file__, train.__file__)
"""


def run(*command, **keywords):
    """Output of a command that must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **keywords)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: setuptools writes into the folder that it builds."""
    version = re.match(r"\d+", importlib.metadata.version("setuptools"))
    if int(version[0]) < 77:
        pytest.skip("needs setuptools 77 or newer")
    place = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        shutil.copytree(ROOT / part, place / "tree" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(file, place / "tree")
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *flags, "-w", place, place / "tree")
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A fresh virtual environment with the wheel in it, which sees this environment's packages too."""
    place = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", place)
    python = place / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    flags = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *flags, wheel)
    return place, packages


def test_the_wheel_holds_the_whole_tree_below_one_name(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in held} == {"yolov5_qat", f"yolov5_qat-{yolov5_qat.__version__}.dist-info"}
    files = [path for part in PARTS[:-1] for path in (ROOT / part).rglob("*") if path.suffix in KINDS]
    files += ROOT.glob("*.py")
    missing = {str(path.relative_to(ROOT)) for path in files} - {name.removeprefix("yolov5_qat/tree/") for name in held}
    assert len(files) > 130 and not missing


def test_every_command_starts(environment):
    place, packages = environment
    output = run(place / "bin" / "python", "-I", "-c", HELP)
    commands = ("train", "val", "detect", "export", "report", "layers", "sensitivity", "convert")
    assert set(re.findall(r"STARTED (\S+)", output)) == {f"yolov5-qat-{name}" for name in commands}
    for file in re.search("FROM (.*) (.*)", output).groups():
        assert Path(file).is_relative_to(packages / "yolov5_qat" / "tree")
    # native.cpp and page.html are looked for beside the modules that use them.
    assert (packages / "yolov5_qat" / "tree" / "quant" / "native.cpp").is_file()


def test_training_takes_yamls_along_and_writes_into_the_current_folder(environment, tiny_dataset, tmp_path):
    place, packages = environment
    work = tmp_path / "work"
    for name in ("utils", "models"):  # a user's own packages of these names are nothing to a command
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text("raise AssertionError('somebody else\\'s')\n")
    output = run(
        place / "bin" / "yolov5-qat-train", "--data", tiny_dataset, "--cfg", "yolov5n.yaml", "--hyp", "hyp.VOC.yaml",
        "--recipe", "lsq-w4a4", "--float-epochs", "1", "--epochs", "0", "--imgsz", "64", "--batch-size", "4",
        "--workers", "0", "--device", "cpu",
        cwd=work,
    )  # fmt: skip
    assert "w4a4 calibrated only" in output
    folder = work / "runs" / "train" / "exp"
    assert (folder / "weights" / "best.pt").is_file() and (folder / "report.html").is_file()
    assert not list((packages / "yolov5_qat").rglob("runs"))


def test_versions_agree():
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
    citation = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)[1]
    assert changes == citation == yolov5_qat.__version__


def test_modules_of_somebody_else_are_noticed():
    program = "import sys, types; sys.modules['utils'] = types.ModuleType('utils'); import yolov5_qat"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "ImportError: yolov5_qat has modules called utils, and this" in done.stderr
    run(sys.executable, "-c", "import utils.errors, yolov5_qat, quant.registry", cwd=ROOT)
