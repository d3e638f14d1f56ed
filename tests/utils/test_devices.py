"""The ``--device`` and ``--precision`` flags."""

import pytest
import torch

from utils.devices import limit_threads, select_device, training_type
from utils.errors import UserError


def test_cpu_and_default():
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("text", ["gpu", "0;1", "-1", "1.5", ","])
def test_nonsense_is_refused(text):
    with pytest.raises(UserError, match="--device"):
        select_device(text)


def test_absent_gpu_is_refused():
    with pytest.raises(UserError, match=r"GPU 99 does not exist.*--device cpu"):
        select_device("99")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("text", ["0", "cuda:0", "cuda", " 0 "])
def test_first_gpu(text):
    assert select_device(text) == torch.device("cuda:0")


def test_training_type():
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert training_type("auto", cpu) is training_type("float32", gpu) is torch.float32
    assert training_type("auto", gpu) is torch.float16 and training_type("bfloat16", cpu) is torch.bfloat16
    with pytest.raises(UserError, match="--precision float16 is for CUDA"):
        training_type("float16", cpu)


def test_threads():
    before = torch.get_num_threads()
    try:
        assert limit_threads(1) == torch.get_num_threads() == 1
        assert limit_threads(0) == 1
        assert limit_threads() >= 1
    finally:
        torch.set_num_threads(before)
