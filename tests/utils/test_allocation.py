import subprocess
import sys

import pytest

from utils.allocation import keep_freed_memory
from utils.paths import ROOT

PROGRAM = """
import resource, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from utils.allocation import keep_freed_memory
kept = keep_freed_memory() if sys.argv[2] == "kept" else None
def use():
    block = np.empty(48 * 2**20, np.uint8)
    block[::4096] = 1
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(ROOT), how], capture_output=True, text=True, check=True)
    kept, number = done.stdout.split()
    return kept, int(number)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted as Linux does")
def test_freed_blocks_are_used_again_without_page_faults():
    if not keep_freed_memory():
        pytest.skip("this C library is not glibc")
    plain, (kept, few) = faults("plain")[1], faults("kept")
    assert kept == "True"
    assert plain > 40 and few < plain / 4, (plain, few)


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert keep_freed_memory() is False
