"""A signal after two OpenVINO models have come and gone: handled, not a segmentation fault."""

import signal
import subprocess
import sys

import pytest
from small_detector import TINY, float_detector, save

import export
from utils.paths import ROOT

PROGRAM = """
import signal, sys
from pathlib import Path
from contextlib import nullcontext
import torch
from models import openvino_backend
if sys.argv[2] == "as it was":
    openvino_backend.kept_signal_stack = nullcontext
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
open_model = lambda: openvino_backend.OpenVinoBackend(Path(sys.argv[1]), torch.device("cpu"))
first, second = open_model(), open_model()
del first
del second
signal.raise_signal(signal.SIGUSR1)
print("heard", len(heard))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signal stacks are looked after on Linux only")
def test_a_signal_after_two_models(tmp_path):
    pytest.importorskip("openvino")
    path = save(float_detector(TINY), tmp_path / "best.pt")
    assert export.main(["--weights", str(path), "--include", "openvino", "--imgsz", "32"]) == 0
    model = tmp_path / "best_openvino_model"

    def run(how):
        command = [sys.executable, "-c", PROGRAM, str(model), how]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)

    done = run("kept")
    assert done.returncode == 0 and "heard 1" in done.stdout, done.stderr
    if run("as it was").returncode != -signal.SIGSEGV:
        pytest.skip("this OpenVINO leaves the signal stack alone")
