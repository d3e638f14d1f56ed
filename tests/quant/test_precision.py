"""Sensitivity against running the whole network with one layer quantized by hand; budgets; what is refused."""

import copy
import csv
import itertools
import math
import re

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_detector import SMALL, float_detector, images, save
from torch import nn

import train
from data.shapes import CLASSES
from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.layers import QuantConv2d
from quant.precision import (
    Sensitivity,
    check_auto_bits,
    choose_bits,
    detection_loss,
    format_sensitivity,
    free_layers,
    main,
    noise_curve,
    output_tensors,
    resolve_auto_bits,
    sensitivity,
)
from quant.prepare import model_from_checkpoint, prepare, set_enabled
from quant.recipe import build_config, parse_auto_bits
from quant.report import layer_reports, quantized_bytes
from quant.samples import thin_out
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.hyp import load_hyp

BATCHES = [images(3, seed=5), images(2, seed=6)]
CONFIG = build_config("lsq", 4)
PROBED = [
    "model.0.conv",
    "model.4.m.1.cv2.conv",
    "model.7.conv",
    "model.10.cv2.conv",
    "model.13.cv3.conv",
    "model.14.m.0",
]


@pytest.fixture(scope="module")
def model():
    return float_detector()


def unequalized(config):
    """Bits are chosen for single layers of the float network, whose weights take nothing over from their input."""
    config.activation.equalization = 0.0
    return config


@pytest.fixture(scope="module")
def measured(model):
    return sensitivity(model, CONFIG, BATCHES)


def on_grid(weight, bits):
    """The nearest values on LSQ's first grid, by its own search."""
    quantizer = prepare_layer(weight, bits)
    step = quantizer.step.detach().abs().reshape(-1, 1, 1, 1).double()
    limit = 2 ** (bits - 1) - 1
    return ((weight.double() / step).round().clamp(-limit, limit) * step).float()


def prepare_layer(weight, bits):
    from quant.lsq import LSQ

    quantizer = LSQ.for_weights(bits, weight.shape[0], LSQ.Options())
    quantizer.initialise(weight)
    return quantizer


def noise_of(found, exact):
    """Relative squared error over batches of lists of maps, in float64."""
    pairs = [pair for lists in zip(found, exact, strict=True) for pair in zip(*lists, strict=True)]
    error = sum(((f.double() - e.double()) ** 2).sum() for f, e in pairs)
    return (error / sum((e.double() ** 2).sum() for _, e in pairs)).item()


@torch.no_grad()
def raw(model):
    return [model.eval()(batch)[1] for batch in BATCHES]


@pytest.mark.parametrize("name", PROBED)
@pytest.mark.parametrize("bits", [2, 6])
def test_noise_equals_running_the_whole_network(model, measured, name, bits):
    changed = copy.deepcopy(model)
    weight = changed.get_submodule(name).weight
    weight.data = on_grid(weight.data, bits)
    (entry,) = [entry for entry in measured if (entry.name, entry.bits) == (name, bits)]
    assert entry.noise == pytest.approx(noise_of(raw(changed), raw(model)), rel=1e-3)
    assert entry.sqnr == pytest.approx(-10 * math.log10(entry.noise))


@pytest.mark.parametrize("parts", ["inputs", "both"])
def test_inputs_are_quantized_for_one_convolution_only(model, parts):
    name = "model.10.cv1.conv"  # shares its input with cv2
    (entry,) = sensitivity(model, CONFIG, BATCHES, [3], parts, [name])
    reference = prepare(copy.deepcopy(model), unequalized(build_config("lsq", 3)))
    calibrate(reference, BATCHES)
    quantizer = reference.model[10].input_quantizer
    changed = copy.deepcopy(model)
    conv = changed.get_submodule(name)
    conv.register_forward_pre_hook(lambda _, inputs: (quantizer(inputs[0]),))
    if parts == "both":
        conv.weight.data = on_grid(conv.weight.data, 3)
    # The two searches draw different samples of the same values.
    assert entry.noise == pytest.approx(noise_of(raw(changed), raw(model)), rel=0.05)


def test_the_image_is_not_touched(model):
    found = sensitivity(model, CONFIG, BATCHES[:1], [2], "inputs", ["model.0.conv", "model.1.conv"])
    assert found[0].noise == 0 and found[1].noise > 0


def test_measured_in_order_with_counts_and_left_alone(model, measured):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted({entry.name for entry in measured}) == sorted(names) and len(measured) == 5 * len(names)
    reports = {r.name: r for r in layer_reports(prepare(copy.deepcopy(model), CONFIG), BATCHES)}
    assert all((e.parameters, e.macs) == (reports[e.name].parameters, reports[e.name].macs) for e in measured)
    fewest = {e.name: e.noise for e in measured if e.bits == 2}
    assert all(e.noise < fewest[e.name] / 100 for e in measured if e.bits == 8)
    sensitivity(model, CONFIG, BATCHES[:1], [2], names=PROBED[:1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rise_of_the_loss(model):
    loss = detection_loss(model, load_hyp("hyp.scratch-low.yaml"), 64)
    targets = [torch.tensor([[0, 1, 0.5, 0.5, 0.2, 0.3], [2, 0, 0.3, 0.6, 0.5, 0.5]]), torch.zeros(0, 6)]
    (entry,) = sensitivity(model, CONFIG, BATCHES, [2], names=["model.7.conv"], loss=loss, targets=targets)
    changed = copy.deepcopy(model)
    conv = changed.get_submodule("model.7.conv")
    conv.weight.data = on_grid(conv.weight.data, 2)
    with torch.no_grad():
        rises = [
            loss(after, target)[0] - loss(before, target)[0]
            for after, before, target in zip(raw(changed), raw(model), targets, strict=True)
        ]
    assert entry.loss == pytest.approx(sum(rises).item() / 5, rel=1e-3) and entry.loss != 0


def test_any_torch_network():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    batch = torch.rand(4, 3, 8, 8)
    found = sensitivity(plain, CONFIG, [batch], [2, 8])
    changed = copy.deepcopy(plain)
    changed[2].weight.data = on_grid(changed[2].weight.data, 2)
    with torch.no_grad():
        expected = noise_of([[changed(batch)]], [[plain(batch)]])
    assert found[2].name == "2" and found[2].noise == pytest.approx(expected, rel=1e-4)


def test_output_tensors():
    a, b = torch.zeros(1), torch.ones(2)
    cases = [(a, [a]), ({"x": a, "y": (b,)}, [a, b]), ((a, [b]), [b]), ([a, [b, a], b], [a, b, a, b]), (None, [])]
    for output, expected in cases:
        assert list(map(id, output_tensors(output))) == list(map(id, expected))


# --- choosing -------------------------------------------------------------------------------------------------------


def test_noise_curve():
    curve = noise_curve({2: 1e-1, 3: 2e-1, 4: 1e-3, 6: 1e-5, 8: 0.0})
    assert sorted(curve) == list(range(2, 9)) and curve[3] == curve[2] == 1e-1
    assert curve[5] == pytest.approx(1e-4) and curve[8] == 1e-12 and curve[7] == pytest.approx(math.sqrt(1e-17))


layers = st.lists(st.tuples(st.floats(1e-6, 1.0), st.floats(1.5, 8.0), st.integers(1, 100_000)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=150)
@given(layers, st.floats(2, 8))
def test_budget_is_met_and_used(layers, average):
    noise = {str(i): {b: scale * ratio**-b for b in range(2, 9)} for i, (scale, ratio, _) in enumerate(layers)}
    costs = {str(i): float(cost) for i, (_, _, cost) in enumerate(layers)}
    bits = choose_bits(noise, costs, average)
    spent, budget = sum(costs[n] * b for n, b in bits.items()), average * sum(costs.values())
    assert spent <= budget * (1 + 1e-8)
    assert all(b == 8 or spent + costs[name] > budget for name, b in bits.items()), "a bit more was affordable"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(1e-3, 1.0), st.floats(2, 8)), min_size=2, max_size=4), st.integers(2, 8))
def test_equal_costs_give_the_best_bits(layers, average):
    """With convex curves and equal costs the greedy choice is the optimum, which trying everything finds."""
    noise = {str(i): {b: scale * ratio**-b for b in range(2, 9)} for i, (scale, ratio) in enumerate(layers)}
    bits = choose_bits(noise, dict.fromkeys(noise, 7.0), average)
    best = min(
        sum(curve[b] for curve, b in zip(noise.values(), trial, strict=True))
        for trial in itertools.product(range(2, 9), repeat=len(noise))
        if sum(trial) <= average * len(noise)
    )
    assert sum(noise[name][b] for name, b in bits.items()) == pytest.approx(best, rel=1e-9)


def test_bits_below_the_fewest_are_impossible():
    with pytest.raises(ValueError, match="below the fewest"):
        choose_bits({"a": {2: 1.0, 3: 0.5}}, {"a": 1.0}, 1.9)


@pytest.mark.parametrize("text", ["auto:4.0", "auto:3", "auto:4.5a6", "auto:4:bops", "auto:2", "auto:6.5"])
def test_auto_meets_the_budget_and_the_choice_can_be_rebuilt(model, measured, text):
    config = build_config("lsq", text)
    assert config.auto_bits.pending and not config.layers
    choice = resolve_auto_bits(model, config, BATCHES, measured)
    auto = config.auto_bits
    assert not choice.config.auto_bits.pending and config.auto_bits.pending
    # Nothing is chosen again from what was written down.
    rebuilt = QuantConfig.from_dict(yaml.safe_load(yaml.safe_dump(choice.config.to_dict())))
    assert rebuilt == choice.config
    network = prepare(copy.deepcopy(model), rebuilt)
    reports = layer_reports(network, example=BATCHES[0])
    assert {r.name: r.weight_bits for r in reports if r.name in choice.bits} == choice.bits
    assert {r.weight_bits for r in reports if r.name not in choice.bits} == {8}
    assert {r.activation_bits for r in reports if r.name in choice.bits} == {config.activation.bits}
    free = [r for r in reports if r.name in choice.bits]
    cost = {r.name: r.macs * r.activation_bits if auto.cost == "bops" else r.parameters for r in free}
    average = sum(cost[r.name] * r.weight_bits for r in free) / sum(cost.values())
    assert auto.average - 0.05 < average <= auto.average + 1e-6 and choice.average == pytest.approx(average)
    assert f"average {average:.3f} of {auto.average:g}" in choice.describe()
    if text == "auto:4.0":
        uniform = prepare(copy.deepcopy(model), build_config("lsq", 4))
        assert quantized_bytes(network) == pytest.approx(quantized_bytes(uniform), rel=0.01)


def test_chosen_bits_lose_less_than_uniform_ones(model, measured):
    """At 3 bits on average, with float inputs; and the noise expected is the noise that comes."""
    choice = resolve_auto_bits(model, build_config("lsq", "auto:3"), BATCHES, measured)
    exact, noise = raw(model), {}
    for name, config in (("chosen", choice.config), ("uniform", build_config("lsq", 3))):
        network = prepare(copy.deepcopy(model), unequalized(config))
        calibrate(network, BATCHES)
        set_enabled(network, False)
        for layer in choice.bits:
            network.get_submodule(layer).weight_quantizer.enabled = True
        noise[name] = noise_of(raw(network), exact)
    assert noise["chosen"] < 0.5 * noise["uniform"]
    # Errors of different layers are not quite uncorrelated at so few bits.
    assert choice.noise / 3 < noise["chosen"] < choice.noise * 3
    assert choice.uniform_noise / 3 < noise["uniform"] < choice.uniform_noise * 3


def test_a_layer_made_sensitive_gets_more_bits(model, measured):
    name = "model.7.conv"
    before = resolve_auto_bits(model, build_config("lsq", "auto:4"), BATCHES, measured).bits
    spoilt = copy.deepcopy(model)
    # One outlier a channel: a grid that reaches it has a wide step, and all else is rounded away.
    weight = spoilt.get_submodule(name).weight.data
    weight[:, 0] = 40 * weight.abs().amax((1, 2, 3))[:, None, None]
    after = resolve_auto_bits(spoilt, build_config("lsq", "auto:4"), BATCHES).bits
    assert after[name] > before[name], (before[name], after[name])


def test_what_the_user_fixed_stays(model, measured):
    recipe = build_config("lsq", "auto:4").to_dict()
    recipe["layers"] = {
        r"model\.4\..*": {"weight_bits": 5},
        r"model\.7\.conv": {"activation_bits": 6},
        re.escape("model.10.cv1.conv"): {"activation_bits": 7},
    }
    config = QuantConfig.from_dict(recipe)
    assert free_layers(model, config)["model.7.conv"] == 6
    choice = resolve_auto_bits(model, config, BATCHES, measured)
    fixed = {"model.0.conv", "model.14.m.0", "model.14.m.1"}
    assert not [name for name in choice.bits if name.startswith("model.4.") or name in fixed]
    found = {r.name: r for r in layer_reports(prepare(copy.deepcopy(model), choice.config))}
    assert {r.weight_bits for name, r in found.items() if name.startswith("model.4.")} == {5}
    assert (found["model.7.conv"].activation_bits, found["model.10.cv1.conv"].activation_bits) == (6, 7)
    assert all(found[name].weight_bits == b for name, b in choice.bits.items())
    recipe["layers"] = {".*": {"weight_bits": 3}}
    with pytest.raises(UserError, match="nothing is left to choose"):
        check_auto_bits(model, QuantConfig.from_dict(recipe))


def test_weights_that_are_not_finite_are_named(model):
    broken = copy.deepcopy(model)
    broken.get_submodule("model.7.conv").weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"model\.7\.conv\.weight"):
        resolve_auto_bits(broken, build_config("lsq", "auto:4"), BATCHES)


# --- asking for it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, average, cost, weight, activation",
    [
        ("auto:4", 4, "parameters", 4, 4),
        ("AUTO:3.2", 3.2, "parameters", 3, 4),
        ("auto:4.7a8", 4.7, "parameters", 5, 8),
        ("auto:2.5:bops", 2.5, "bops", 2, 3),
        ("auto:8.0a2:bops", 8, "bops", 8, 2),
    ],
)
def test_requests(text, average, cost, weight, activation):
    auto, weight_bits, activation_bits = parse_auto_bits(text)
    assert (auto.average, auto.cost, auto.resolved) == (average, cost, False)
    assert (weight_bits, activation_bits) == (weight, activation)
    config = build_config("lsq", text)
    assert (config.auto_bits, config.weight.bits, config.activation.bits) == (auto, weight, activation)
    assert config.bits_label() == f"w{average:g}a{activation} mixed" and build_config("lsq", 4).bits_label() == "w4a4"


@pytest.mark.parametrize(
    "text",
    ["auto", "auto:", "auto:four", "auto:1.9", "auto:8.1", "auto:4a1", "auto:4a9", "auto:4:flops", "auto:-4", "4.5"],
)
def test_bad_requests_are_refused(text):
    with pytest.raises(UserError, match="--bits"):
        build_config("lsq", text)


@pytest.mark.parametrize(
    "block, message",
    [
        ({"average": 1}, "auto_bits.average: 1 is not a number from 2 to 8"),
        ({"average": "much"}, "auto_bits.average: 'much' is not a number"),
        ({"cost": "time"}, "'time' is not possible; choose one of parameters, bops"),
        ({"avrage": 4}, "did you mean 'average'"),
        ({"resolved": 1}, "is not true or false"),
    ],
)
def test_bad_recipes_are_refused(block, message):
    with pytest.raises(UserError, match=re.escape(message)):
        QuantConfig.from_dict({"auto_bits": block})


def test_flags_over_a_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("auto_bits: {average: 3.5, cost: bops}\nactivation: {bits: 8}\n")
    config = build_config("lsq", recipe=recipe)
    assert config.auto_bits.pending and config.bits_label() == "w3.5a8 mixed"
    assert not build_config("lsq", "w4a8", recipe=recipe).auto_bits.pending
    assert build_config("lsq", "auto:5", recipe=recipe).auto_bits.cost == "parameters"
    recipe.write_text("auto_bits: {average: 3.5, resolved: true}\nlayers: {'model.7.conv': {weight_bits: 2}}\n")
    assert not build_config("lsq", recipe=recipe).auto_bits.pending
    for bits in ("auto:5", "4"):
        with pytest.raises(UserError, match="chosen layer by layer already"):
            build_config("lsq", bits, recipe=recipe)


def test_thin_out():
    batches = [torch.arange(n, m).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4) for n, m in ((0, 16), (16, 32), (32, 40))]
    found = torch.cat(thin_out(batches, 10))[:, 0, 0, 0]
    assert found.tolist() == list(range(0, 40, 4)) and len(torch.cat(thin_out(batches, 100))) == 40


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    network = float_detector({**SMALL, "nc": len(CLASSES)})
    network.names = dict(enumerate(CLASSES))
    return network


def test_sensitivity_command(network, tiny_dataset, tmp_path, capsys):
    weights, file = save(network, tmp_path / "float.pt"), tmp_path / "s.csv"
    arguments = [
        "--data",
        str(tiny_dataset),
        "--images",
        "2",
        "--bits",
        "8",
        "2",
        "--csv",
        str(file),
        "--device",
        "cpu",
    ]
    assert main(["--weights", str(weights), *arguments, "--parts", "both"]) == 0
    shown = capsys.readouterr().out
    assert "both of one convolution quantized (lsq); 2 images, 64 px" in shown and "rise of the loss" in shown
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["bits"] for row in rows[:2]] == ["2", "8"] and len(rows) % 2 == 0
    assert all(float(row["sqnr"]) == pytest.approx(-10 * math.log10(float(row["noise"]))) for row in rows)
    quantized = prepare(copy.deepcopy(network), CONFIG)
    assert main(["--weights", str(save(quantized, tmp_path / "q.pt")), *arguments]) == 1
    assert "quantized already" in capsys.readouterr().out
    assert main(["--weights", str(weights), "--images", "0"]) == 1


def test_the_table_starts_with_the_most_sensitive():
    found = [Sensitivity("a", 2, 10, 5, 0.1), Sensitivity("b", 2, 10, 5, 0.5), Sensitivity("b", 4, 10, 5, 0.0)]
    found.append(Sensitivity("a", 4, 10, 5, 0.001))
    lines = format_sensitivity(found).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["b", "a"] and lines[3].split()[2:] == ["10.0", "30.0"]


def test_a_run_chooses_once_and_writes_it_down(network, tiny_dataset, tmp_path, capsys):
    weights = save(network, tmp_path / "float.pt")
    arguments = [
        "--imgsz",
        "64",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--noplots",
        "--device",
        "cpu",
        "--quant",
        "lsq",
    ]
    arguments += ["--weights", str(weights), "--data", str(tiny_dataset), "--project", str(tmp_path)]
    options = train.parse_arguments([*arguments, "--bits", "auto:3.5", "--epochs", "1", "--optimizer", "SGD"])
    folder = train.main(options)
    shown = capsys.readouterr().out
    assert shown.count("Weight bits of") == 1 and "average 3." in shown and "w3.5a4 mixed trained (lsq)" in shown
    assert shown.index("Weight bits of") < shown.index("Noisiest: ") < shown.index("Calibrated only")
    written = QuantConfig.from_dict(yaml.safe_load((folder / "quant.yaml").read_text()))
    assert written.auto_bits.resolved and len(written.layers) > 3
    checkpoint = load_checkpoint(folder / "weights" / "best.pt")
    assert QuantConfig.from_dict(checkpoint["quantization"]) == written
    kept = model_from_checkpoint(checkpoint).eval()
    with (folder / "layers.csv").open(newline="") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    for name, conv in kept.named_modules():
        if isinstance(conv, QuantConv2d):
            assert int(rows[name]["weight_bits"]) == conv.weight_quantizer.bits
            assert float(rows[name]["weight_step"]) == pytest.approx(conv.weight_quantizer.step.abs().mean().item())
    assert float(rows["total"]["bytes"]) < float(rows["float"]["bytes"]) / 4
    # The file is a recipe: another run takes its bits and searches nothing.
    again = train.parse_arguments([*arguments, "--recipe", str(folder / "quant.yaml"), "--epochs", "0"])
    repeated = train.main(again)
    assert "Weight bits of" not in capsys.readouterr().out
    assert QuantConfig.from_dict(yaml.safe_load((repeated / "quant.yaml").read_text())) == written
