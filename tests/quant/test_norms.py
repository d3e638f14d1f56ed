"""Batch-norm statistics that are computed again from the weights and codes in use."""

import copy

import pytest
import torch
from small_detector import images, tiny_detector
from torch import nn

from quant.norms import reestimate_norms, shift_norms
from quant.prepare import set_enabled


def norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def trained():
    """A tiny quantized detector whose statistics belong to other weights than it has."""
    model = tiny_detector()
    for norm in norms(model).values():
        norm.running_mean.add_(0.5)
        norm.running_var.mul_(3.0)
    return model


def test_statistics_are_the_mean_over_batches_of_what_each_layer_sees():
    """Against the inputs that hooks record during one pass in training mode, layer by layer."""
    model = trained()
    batches = [images(3, 32, 32, seed=seed) for seed in range(4)]
    reference, seen = copy.deepcopy(model).train(), {}
    for name, norm in norms(reference).items():
        norm.register_forward_pre_hook(lambda _m, x, name=name: seen.setdefault(name, []).append(x[0].detach()))
    with torch.no_grad():
        for batch in batches:
            reference(batch)
    assert reestimate_norms(model, iter(batches)) == 4
    for name, norm in norms(model).items():
        mean = torch.stack([x.mean((0, 2, 3)) for x in seen[name]]).mean(0)
        variance = torch.stack([x.var((0, 2, 3)) for x in seen[name]]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_nothing_else_changes(mode):
    model = trained().train(mode)
    model.model[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    momenta = [norm.momentum for norm in norms(model).values()]
    reestimate_norms(model, [images(2, 32, 32)])
    assert modes == [module.training for module in model.modules()]
    assert momenta == [norm.momentum for norm in norms(model).values()] and None not in momenta
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.rsplit(".")[-1] in ("running_mean", "running_var") for key in changed - counters(model))


def counters(model):
    return {f"{name}.num_batches_tracked" for name in norms(model)}


def test_doing_it_again_gives_the_same():
    model, batches = trained(), [images(2, 32, 32, seed=seed) for seed in range(3)]
    reestimate_norms(model, batches)
    first = copy.deepcopy(model.state_dict())
    reestimate_norms(model, batches)
    assert all(torch.equal(value, first[key]) for key, value in model.state_dict().items())


def test_named_norms_and_no_batches_leave_statistics_alone():
    model = trained()
    before = copy.deepcopy(model.state_dict())
    kept = next(iter(norms(model)))
    assert reestimate_norms(model, []) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    reestimate_norms(model, [images(2, 32, 32)], keep=(kept,))
    after = model.state_dict()
    moved = {
        name for name in norms(model) if not torch.equal(after[f"{name}.running_mean"], before[f"{name}.running_mean"])
    }
    assert moved == set(norms(model)) - {kept}


def test_modes_come_back_after_an_error():
    model = trained().train()
    with pytest.raises(RuntimeError):
        reestimate_norms(model, [images(2, 32, 32), torch.zeros(2, 5, 32, 32)])
    assert all(module.training for module in model.modules())
    assert all(norm.momentum is not None for norm in norms(model).values())


def test_statistics_move_by_what_quantization_changes():
    model = trained()
    reference = copy.deepcopy(model)
    set_enabled(reference, False)
    batches = [images(3, 32, 32, seed=seed) for seed in range(3)]
    quantized, plain = copy.deepcopy(model), copy.deepcopy(reference)
    reestimate_norms(quantized, batches)
    reestimate_norms(plain, batches)
    before, kept = copy.deepcopy(norms(model)), copy.deepcopy(reference.state_dict())
    assert shift_norms(model, reference, iter(batches)) == 3
    assert all(torch.equal(value, kept[key]) for key, value in reference.state_dict().items())
    for name, norm in norms(model).items():
        old, q, f = before[name], norms(quantized)[name], norms(plain)[name]
        torch.testing.assert_close(norm.running_mean, old.running_mean + q.running_mean - f.running_mean)
        spread = (old.running_var + old.eps) * (q.running_var + old.eps) / (f.running_var + old.eps) - old.eps
        torch.testing.assert_close(norm.running_var, spread.clamp_min(0))
        assert not torch.allclose(norm.running_mean, old.running_mean, rtol=1e-4, atol=1e-5)


def test_statistics_stay_where_quantization_changes_nothing():
    model = trained()
    set_enabled(model, False)
    before = copy.deepcopy(model.state_dict())
    shift_norms(model, copy.deepcopy(model), [images(3, 32, 32)])
    for key, value in model.state_dict().items():
        if key not in counters(model):
            torch.testing.assert_close(value, before[key], msg=key)
    assert shift_norms(model, copy.deepcopy(model), []) == 0
