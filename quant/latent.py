"""The float weights behind a quantized network's codes, to start a network of other bits from."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from quant.equalize import equalize
from quant.gabfusion import GABFusion
from quant.prepare import example_input, quantizers, set_enabled
from utils.errors import UserError


def latent_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the float network whose weights ``model`` rounds.

    Its equalizing factors are taken back, its quantizers left out. Batch norms keep the quantized network's statistics,
    which the float one does not have: move them (``quant.norms.shift_norms``) once it has been quantized again.

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
    set_enabled(model, False)
    if any(quantizer.inverse_equalizer is not None for quantizer in quantizers(model).values()):
        equalize(model.eval(), [example_input(model)], 0.0)  # all factors 1, the present ones go back into the weights
    # Not by module: a quantizer that several convolutions share is in the state_dict below each of them.
    slots = (".weight_quantizer.", ".input_quantizer.", ".output_quantizer.")
    return {name: value for name, value in model.state_dict().items() if not any(slot in name for slot in slots)}
