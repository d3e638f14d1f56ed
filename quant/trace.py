"""Who reads which tensor: found by running the network once and comparing tensor identities, whatever the model is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle


@dataclass
class Readers:
    """Tensor identities seen during one forward pass. Equal numbers mean the same tensor.

    Attributes:
        convolutions: convolution name -> its input tensor.
        slots: name of a block with an ``input_quantizer`` slot -> its input tensor.
        norms: batch norm name -> its input tensor.
        outputs: name of a module that was asked for -> its output tensor.
        image: the network's input tensor.
        results: tensors that the network returns.
    """

    image: int
    convolutions: dict[str, int] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    norms: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    results: set[int] = field(default_factory=set)


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
        def hook(_module, inputs, keywords, output=None) -> None:
            tensor = output if of_output else (*inputs, *keywords.values())[0]
            alive.append(tensor)
            # What reads one tensor first and another one later shares neither's grid: a number of its own.
            table[name] = id(tensor) if table.get(name, id(tensor)) == id(tensor) else -len(alive)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_pre_hook(note(found.convolutions, name, False), with_kwargs=True))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(note(found.norms, name, False), with_kwargs=True))
        elif has_input_slot(module):
            handles.append(module.register_forward_pre_hook(note(found.slots, name, False), with_kwargs=True))
        if name in outputs:
            handles.append(module.register_forward_hook(note(found.outputs, name, True), with_kwargs=True))
    with _evaluating(model, handles):
        alive.append(model(example))
    found.results = {id(tensor) for tensor in _tensors(alive[-1])}
    return found


@contextmanager
def _evaluating(model: nn.Module, handles: list[RemovableHandle]) -> Iterator[None]:
    """Eval mode for the time being; afterwards the mode is as it was and the hooks are gone."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


# Modules that hand on what they read but for its place: they commute with a positive factor.
PASSING = (nn.MaxPool2d, nn.AvgPool2d, nn.Upsample, nn.Identity, nn.Dropout)
# Calls that look at a tensor's form, not at its values.
_FORM_ONLY = {"__get__", "dim", "size", "numel", "stride", "is_floating_point", "is_contiguous", "__len__", "__hash__"}


@dataclass
class Flow:
    """Where each tensor of one forward pass came from and went to; tensors are numbered by identity.

    Attributes:
        outputs: module name -> its output tensor (of the last call).
        branches: name of a module that is called with a list of tensors -> that list.
        channels: tensor of such a list -> its size in dimension 1.
        readers: tensor -> the innermost modules, by name, whose operations use its values ("" is the network itself).
        passed: output of a pool, an upsampling or the like -> (name of that module, its input tensor).
        producers: tensor -> the modules that put it out, innermost first.
        calls: module name -> the tensor (or list of tensors) that each of its calls read.
        results: tensors that the network returns.
    """

    outputs: dict[str, int] = field(default_factory=dict)
    branches: dict[str, list[int]] = field(default_factory=dict)
    channels: dict[int, int] = field(default_factory=dict)
    readers: dict[int, set[str]] = field(default_factory=dict)
    passed: dict[int, tuple[str, int]] = field(default_factory=dict)
    producers: dict[int, list[str]] = field(default_factory=dict)
    calls: dict[str, list[int]] = field(default_factory=dict)
    results: set[int] = field(default_factory=set)

    def source(self, tensor: int) -> int:
        """The tensor that ``tensor`` is a pooled or resized copy of, or ``tensor`` itself."""
        while tensor in self.passed:
            tensor = self.passed[tensor][1]
        return tensor

    def copies_of_one(self, name: str) -> bool:
        """Whether all branches of module ``name`` are one tensor or pooled copies of it, as in an SPPF."""
        return len({self.source(tensor) for tensor in self.branches.get(name, ())}) == 1


class _NoteReads(TorchFunctionMode):
    """Notes for every operation which module it runs in and which tensors it uses."""

    def __init__(self, flow: Flow, running: list[str], alive: list[object]) -> None:
        super().__init__()
        self.flow, self.running, self.alive = flow, running, alive

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _FORM_ONLY:
            for value in (*args, *kwargs.values()):
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, Tensor):
                        self.alive.append(tensor)
                        self.flow.readers.setdefault(id(tensor), set()).add(self.running[-1] if self.running else "")
        return func(*args, **kwargs)


@torch.no_grad()
def trace_flow(model: nn.Module, example: Tensor) -> Flow:
    """Runs ``model`` in eval mode on ``example`` (B, 3, H, W) and records what every operation reads.

    Unlike ``trace_readers`` it also sees what is read outside of convolutions, so it can tell that nothing else reads.
    """
    flow, running, alive = Flow(), [], [example]
    handles = []

    def enter(name: str):
        def hook(_module, inputs, keywords) -> None:
            inputs = (*inputs, *keywords.values())
            running.append(name)
            alive.append(inputs)
            flow.calls.setdefault(name, []).extend(id(value) for value in inputs[:1])
            if inputs and isinstance(inputs[0], (list, tuple)):
                flow.branches[name] = [id(tensor) for tensor in inputs[0]]
                flow.channels |= {id(tensor): tensor.shape[1] for tensor in inputs[0]}

        return hook

    def leave(name: str):
        def hook(module, inputs, keywords, output) -> None:
            inputs = (*inputs, *keywords.values())
            running.pop()
            alive.append(output)
            flow.outputs[name] = id(output)
            flow.producers.setdefault(id(output), []).append(name)
            if isinstance(module, PASSING) and output is not inputs[0]:
                flow.passed[id(output)] = (name, id(inputs[0]))

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name), with_kwargs=True))
    with _evaluating(model, handles), _NoteReads(flow, running, alive):
        alive.append(model(example))
    flow.results = {id(tensor) for tensor in _tensors(alive[-1])}
    return flow


def norms_behind(model: nn.Module, flow: Flow) -> dict[str, str]:
    """Convolution -> the batch norm that can be folded into it: nothing else reads between them, and each runs once.

    A shortcut that takes the convolution's own result, or an activation function that changes it in place (it keeps its
    identity then), stands between the two.

    Args:
        model: any network.
        flow: from ``trace_flow``.
    """
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or len(flow.calls.get(name, ())) != 1:
            continue
        result = flow.outputs[name]
        readers = flow.readers.get(result, set())
        if len(readers) != 1 or result in flow.results:
            continue
        reader = next(iter(readers))
        norm = model.get_submodule(reader)
        # A class derived from BatchNorm2d may compute something else; ours has an output quantizer.
        known = type(norm) is nn.BatchNorm2d or (isinstance(norm, nn.BatchNorm2d) and hasattr(norm, "output_quantizer"))
        if known and norm.running_mean is not None and len(flow.calls[reader]) == 1:
            found[name] = reader
    return found
