"""The float weights behind a quantized network's codes, to start a network of other bits from."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from quant.equalize import quantizer_readers
from quant.gabfusion import GABFusion
from quant.prepare import example_input
from utils.errors import UserError


@torch.no_grad()
def latent_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the float network whose weights ``model`` rounds.

    Its equalizing factors are taken back, its quantizers left out. Batch norms keep the quantized network's statistics,
    which are not the float one's: compute them anew (``quant.norms.reestimate_norms``) before it is calibrated.

    Args:
        model: prepared; left as it is.

    Raises:
        UserError: it has GABFusion, whose branch factors a float network has no place for.
    """
    if any(isinstance(module, GABFusion) for module in model.modules()):
        raise UserError(
            "its branches have factors of GABFusion, which its float weights do not: start from a run without "
            "--gabfusion"
        )
    model = copy.deepcopy(model)
    for quantizer, convolutions in quantizer_readers(model, example_input(model)).items():
        factors = quantizer.inverse_equalizer
        if factors is not None:
            for weight in {id(conv.weight): conv.weight for conv in convolutions}.values():
                weight.mul_(factors.reshape(1, -1, 1, 1).to(weight.dtype))
    # Not by module: a quantizer that several convolutions share is in the state_dict below each of them.
    slots = (".weight_quantizer.", ".input_quantizer.", ".output_quantizer.")
    return {name: value for name, value in model.state_dict().items() if not any(slot in name for slot in slots)}
