"""Every method of the registry at every width: trained, folded, exported and verified."""

import pytest
from small_detector import assert_verified, tiny_detector

from quant.registry import QUANTIZERS


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", list(QUANTIZERS))
def test_every_method_trains_folds_and_exports(method, bits):
    _, _, result = assert_verified(tiny_detector(method, bits, 2, gabfusion=True))
    assert result.quantizers.unexplained == result.layers.unexplained == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", list(QUANTIZERS))
def test_every_method_without_gabfusion(method, bits):
    _, _, result = assert_verified(tiny_detector(method, bits))
    assert result.quantizers.unexplained == result.layers.unexplained == 0


@pytest.mark.parametrize("method", list(QUANTIZERS))
def test_every_method_in_its_papers_form(method):
    assert_verified(tiny_detector(method, 4, 2, options={"paper": True}))
