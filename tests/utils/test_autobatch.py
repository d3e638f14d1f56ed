import pytest
import torch

from utils.autobatch import SHARE, auto_batch_size, fitted_batch_size
from utils.errors import UserError


def test_the_batch_fills_its_share_of_the_memory():
    memory = [1000 + 300 * size for size in (1, 2, 4, 8, 16)]
    batch = fitted_batch_size((1, 2, 4, 8, 16), memory, 100_000)
    assert 1000 + 300 * batch <= SHARE * 100_000 < 1000 + 300 * (batch + 1)
    assert fitted_batch_size((1, 2, 4, 8, 16), memory, 100_000, multiple=4) == batch // 4 * 4
    assert fitted_batch_size((1,), (500,), 10_000) == SHARE * 10_000 / 500


@pytest.mark.parametrize("available, multiple, words", [(1000, 1, "1 image:"), (2500, 4, "4 images")])
def test_what_does_not_fit_is_refused(available, multiple, words):
    with pytest.raises(UserError, match=words):
        fitted_batch_size((1, 2), (1300, 1600), available, multiple)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's memory")
def test_measured_on_a_gpu():
    device = torch.device("cuda:0")
    bytes_per_image = 200 * 2**20
    batch = auto_batch_size(lambda size: torch.empty(size * bytes_per_image, dtype=torch.uint8, device=device), device)
    free = torch.cuda.mem_get_info(device)[0]
    assert 0.7 * SHARE * free < batch * bytes_per_image < free
