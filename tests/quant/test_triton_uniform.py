"""LSQ's Triton kernels: compiled on a GPU, else in Triton's interpreter, which a process has to be started with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_kernels_equal_the_arithmetic_piece_by_piece():
    pytest.importorskip("triton")
    environment = dict(os.environ) if torch.cuda.is_available() else os.environ | {"TRITON_INTERPRET": "1"}
    checks = Path(__file__).with_name("check_triton_uniform.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
