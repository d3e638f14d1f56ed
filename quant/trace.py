"""Who reads which tensor: found by running the network once and comparing tensor identities, whatever the model is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Readers:
    """Tensor identities seen during one forward pass. Equal numbers mean the same tensor.

    Attributes:
        convolutions: convolution name -> its input tensor.
        slots: name of a block with an ``input_quantizer`` slot -> its input tensor.
        norms: batch norm name -> its input tensor.
        outputs: name of a module that was asked for -> its output tensor.
        image: the network's input tensor.
    """

    image: int
    convolutions: dict[str, int] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    norms: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)


def has_input_slot(module: nn.Module) -> bool:
    """Whether the block can quantize the tensor that several of its convolutions, or its shortcut, read."""
    return not isinstance(module, nn.Conv2d) and hasattr(module, "input_quantizer")


@torch.no_grad()
def trace_readers(model: nn.Module, example: Tensor, outputs: Iterable[str] = ()) -> Readers:
    """Runs ``model`` in eval mode on ``example`` (B, 3, H, W) and records who reads what.

    A block whose slot is filled counts as the reader of its input; the convolutions inside read the slot's output.

    Args:
        outputs: names of modules whose output tensors are recorded too.
    """
    outputs = set(outputs)
    found = Readers(image=id(example))
    alive: list[object] = [example]  # an identity is only unique while its tensor exists
    handles = []

    def note(table: dict[str, int], name: str, of_output: bool):
        def hook(_module, inputs, output=None) -> None:
            tensor = output if of_output else inputs[0]
            alive.append(tensor)
            table[name] = id(tensor)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_pre_hook(note(found.convolutions, name, False)))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(note(found.norms, name, False)))
        elif has_input_slot(module):
            handles.append(module.register_forward_pre_hook(note(found.slots, name, False)))
        if name in outputs:
            handles.append(module.register_forward_hook(note(found.outputs, name, True)))
    was_training = model.training
    model.eval()
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return found
