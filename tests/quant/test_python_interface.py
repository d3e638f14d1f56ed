"""The Python interface on networks that are no detectors: a ResNet-18 of torchvision, a U-Net, and odd ones."""

import copy
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from small_detector import randomise_norm
from torch import nn

from quant import (
    Concat,
    GABFusion,
    QuantConfig,
    UserError,
    build_config,
    build_optimizer,
    calibrate,
    export_onnx,
    fold,
    penalty,
    prepare,
    quantizers,
    report,
    set_strength,
    strength_at,
    update_balance,
)
from quant.fold import BranchGrids, EqualizedGrid, IntegerConv2d
from quant.layers import QuantConv2d
from quant.lsq import FixedGrid
from quant.trace import norms_behind, trace_flow

ROOT = Path(__file__).resolve().parents[2]


def block(channels_in, channels_out):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU(True)
    )


class UNet(nn.Module):
    """Two skips; one way up is interpolated, the other a transposed convolution."""

    def __init__(self, classes=3):
        super().__init__()
        self.down = nn.ModuleList([block(3, 8), block(8, 16), block(16, 24)])
        self.pool = nn.MaxPool2d(2)
        self.resize = nn.Upsample(scale_factor=2)
        self.transposed = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.skips = nn.ModuleList([Concat(), Concat()])
        self.up = nn.ModuleList([block(24 + 16, 16), block(16 + 8, 8)])
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x):
        fine = self.down[0](x)
        middle = self.down[1](self.pool(fine))
        coarse = self.down[2](self.pool(middle))
        middle = self.up[0](self.skips[0]([self.resize(coarse), middle]))
        return self.head(self.up[1](self.skips[1]([self.transposed(middle), fine])))


def smooth(count, size, low=0.0, high=1.0):
    """Images with structure, so that statistics at every scale differ from noise."""
    torch.manual_seed(count + size)
    coarse = torch.rand(count, 3, 8, 8) * (high - low) + low
    return nn.functional.interpolate(coarse, (size, size), mode="bilinear")


def train(model, images, labels, steps=6):
    """A few steps with a loop such as a user writes; returns the losses and the strengths of the fusion."""
    optimizer = build_optimizer(model, "SGD", lr=0.01, momentum=0.9)
    losses, strengths = [], []
    model.train()
    for step in range(steps):
        strengths.append(strength_at((step + 1) / steps, ramp=0.5, hold=0.5, release=0.9))
        set_strength(model, strengths[-1])
        loss = nn.functional.cross_entropy(model(images), labels) + penalty(model)
        optimizer.zero_grad()
        loss.backward()
        update_balance(model)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses, strengths


@torch.no_grad()
def assert_layers_agree(model, folded, images, readers=None):
    """Gives every layer of ``model`` what the folded network's layer read, so that no flipped code can excuse another.

    Args:
        readers: name of a Concat -> name of the convolution that reads it.

    Returns:
        Number of codes compared behind concatenations.
    """
    seen = {}

    def note(name):
        def hook(_module, inputs, output):
            # Copies: activation functions that work in place come next.
            read = [part.clone() for part in inputs[0]] if isinstance(inputs[0], list) else inputs[0].clone()
            seen[name] = (read, output.clone())

        return hook

    wanted = {n: m for n, m in folded.named_modules() if isinstance(m, (IntegerConv2d, Concat))}
    handles = [module.register_forward_hook(note(name)) for name, module in wanted.items()]
    folded(images)
    for handle in handles:
        handle.remove()
    assert seen.keys() == wanted.keys() and len(seen) > 5
    norms, compared = norms_behind(model, trace_flow(model, images)), 0
    for name, (read, made) in seen.items():
        before = model.get_submodule(name)
        if isinstance(before, Concat):
            quantizer = model.get_submodule(readers[name]).input_quantizer
            form, values = quantizer.integer(), quantizer.equalized(before(read))
            theirs, ours = form.codes(values), form.codes(made)
            differs = theirs != ours
            from_boundary = ((values / form.step).remainder(1) - 0.5).abs()
            assert (from_boundary[differs] < 1e-4).all(), name
            assert differs.float().mean() < 1e-3 and len(ours.unique()) > 4
            compared += ours.numel()
            continue
        moved = wanted[name].input_quantizer is None and before.input_quantizer is not None
        if moved and before.input_quantizer.inverse_equalizer is not None:
            read = read / before.input_quantizer.inverse_equalizer  # it was multiplied in front of the Concat
        result = before(read)
        if name in norms:
            result = model.get_submodule(norms[name])(result)
        torch.testing.assert_close(made, result, rtol=1e-4, atol=1e-4 * float(result.abs().max()), msg=name)
    return compared


def relative_distance(model, folded, images):
    with torch.no_grad():
        expected, actual = model(images), folded(images)
    return float((expected - actual).norm() / expected.norm())


@pytest.fixture(scope="module")
def resnet():
    """A trained ResNet-18 on normalised images, its images, and the losses."""
    torch.manual_seed(0)
    images = smooth(4, 64, -2.0, 2.5)
    model = torchvision.models.resnet18(num_classes=10)
    config = QuantConfig.from_dict({"method": "lsq", "activation": {"image": "learned"}})
    prepare(model, config, images[:1])
    calibrate(model, [images])
    losses, _ = train(model, images, torch.tensor([1, 5, 5, 9]), 4)
    return model, images, losses


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    images = smooth(8, 32)
    model = UNet()
    prepare(model, build_config("lsq", 4, gabfusion="feedback"), images[:1])
    calibrate(model, [images])
    losses, strengths = train(model, images, (images.argmax(1)), 6)
    return model, images, losses, strengths


def test_resnet_trains_and_folds_to_what_it_was(resnet):
    model, images, losses = resnet
    assert losses[-1] < losses[0]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20 and all(isinstance(conv, QuantConv2d) for conv in convolutions)
    assert (model.conv1.weight_quantizer.bits, model.conv1.input_quantizer.bits) == (8, 8)
    assert not isinstance(model.conv1.input_quantizer, FixedGrid)
    # The two readers of a tensor share its quantizer, over the border of their blocks' children.
    assert model.layer2[0].conv1.input_quantizer is model.layer2[0].downsample[0].input_quantizer
    folded = fold(model)
    assert not any(isinstance(m, (nn.BatchNorm2d, QuantConv2d)) for m in folded.modules())
    assert type(folded.fc) is nn.Linear
    assert_layers_agree(model, folded, images)
    assert relative_distance(model, folded, images) < 0.02


def test_unet_with_gabfusion_trains_and_folds_to_what_it_was(unet):
    model, images, losses, strengths = unet
    assert losses[-1] < losses[0]
    assert max(strengths) == 1 and strengths[0] < 1 and strengths[-1] == 0
    nodes = [name for name, module in model.named_modules() if isinstance(module, GABFusion)]
    assert nodes == ["skips.0.balance", "skips.1.balance"]
    model = copy.deepcopy(model)
    with torch.no_grad():  # a few steps hardly move the factors
        model.skips[0].balance.logits.copy_(torch.tensor([0.4, -0.3]))
        model.skips[1].balance.logits.copy_(torch.tensor([-0.2, 0.5]))
    folded = fold(model)
    assert all(isinstance(skip.balance, BranchGrids) for skip in folded.skips)
    assert not any(isinstance(m, (nn.BatchNorm2d, QuantConv2d, GABFusion)) for m in folded.modules())
    assert type(folded.transposed) is nn.ConvTranspose2d
    readers = {"skips.0": "up.0.0", "skips.1": "up.1.0"}
    compared = assert_layers_agree(model, folded, images, readers)
    assert compared == 8 * (40 * 16 * 16 + 24 * 32 * 32)
    assert relative_distance(model, folded, images) < 0.02


def test_feedback_moves_the_branch_weights(unet):
    model = unet[0]
    for skip in model.skips:
        assert int(skip.balance.updates) == 6 and (skip.balance.energy_average > 0).all()
        assert bool(skip.balance.logits.any())


def test_head_of_a_network_is_8_bit(unet):
    model = unet[0]
    assert (model.head.weight_quantizer.bits, model.head.input_quantizer.bits) == (8, 8)
    assert model.up[1][0].weight_quantizer.bits == 4


def test_what_stays_float_is_named(capsys):
    prepare(UNet(), QuantConfig(), torch.rand(1, 3, 32, 32))
    assert "1 layers stay float: transposed (ConvTranspose2d)" in capsys.readouterr().out
    prepare(torchvision.models.resnet18(num_classes=10), QuantConfig(), torch.rand(1, 3, 64, 64))
    assert "fc (Linear)" in capsys.readouterr().out


def test_report_of_any_network(unet):
    model, images, *_ = unet
    whole = report(model, [images])
    assert [layer.name for layer in whole.layers] == [n for n, m in model.named_modules() if isinstance(m, QuantConv2d)]
    text = str(whole)
    assert all(layer.name in text for layer in whole.layers) and "GBOPs" in text
    decoder = next(layer for layer in whole.layers if layer.name == "up.0.0")
    assert decoder.macs == 40 * 16 * 9 * 16 * 16 and decoder.bops == decoder.macs * 16
    assert decoder.output_sqnr > 5
    assert report(model).totals.macs == whole.totals.macs  # counted for the example of prepare


@pytest.mark.parametrize("network", ["resnet", "unet"])
def test_onnx_file_computes_the_same(network, request, tmp_path):
    model, images, *_ = request.getfixturevalue(network)
    file = tmp_path / "folder" / "network.onnx"
    result = export_onnx(fold(model), file, images[:1])
    assert file.is_file() and result.holds
    assert result.layers.compared > 10000 and result.layers.unexplained == 0


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Identity, nn.SiLU])
def test_runtime_does_not_round_biases(activation, tmp_path):
    """onnxruntime runs convolutions between quantizers in integers, and would round float biases to 4-bit units."""
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), activation(), nn.Conv2d(16, 16, 3), activation(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3), activation(), nn.Conv2d(16, 16, 1)),
    )
    images = smooth(2, 64)
    prepare(model, build_config("lsq", 4), images[:1])
    with torch.no_grad():
        for index in (0, 2, 5):
            model[index].bias.normal_(0, 0.3)
    calibrate(model, [images])
    result = export_onnx(fold(model), tmp_path / "network.onnx", images[:1])
    assert result.layers.compared > 50000 and result.layers.unexplained == 0


def test_state_dict_is_restored_into_a_freshly_prepared_network(unet):
    model, images, *_ = unet
    again = prepare(UNet(), QuantConfig.from_dict(model.quantization), images[:1])
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model(images))


def test_output_quantizers_on_a_residual_network():
    images = smooth(4, 64, -2.0, 2.5)
    torch.manual_seed(1)
    model = torchvision.models.resnet18(num_classes=10)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10)
    config = QuantConfig.from_dict({"activation": {"image": "learned", "output": 8}})
    prepare(model, config, images[:1])
    calibrate(model, [images])
    model.eval()
    assert sum(1 for name in quantizers(model) if name.endswith("output_quantizer")) == 10
    folded = fold(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    # The bias is rounded to whole units of the integer convolution, so layers agree less closely.
    assert relative_distance(model, folded, images) < 0.1


class Odd(nn.Module):
    """Batch norms that must not be folded, a convolution used twice, one module in two places, an own normalisation."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.twice = (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3))
        self.behind_relu, self.beside_shortcut, self.plain = (nn.BatchNorm2d(8) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.third = nn.Conv2d(8, 8, 1)
        self.also = nn.ModuleList([self.third])
        self.cat = Concat()
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = (x - 0.45) / 0.22
        x = self.behind_relu(self.relu(self.first(x)))  # in place: the batch norm's input is the convolution's result
        y = self.second(x)
        x = self.beside_shortcut(y) + y
        x = self.twice(torch.relu(self.twice(x)))
        x = self.plain(self.also[0](x))
        joined = self.cat([x, y])
        return self.last(joined) + joined.mean(1, keepdim=True)


def odd_network():
    torch.manual_seed(3)
    model = Odd()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise_norm(module, 0.3, 3)
    return model


@pytest.mark.parametrize("output", [None, 8])
def test_folding_leaves_alone_what_it_cannot_fold(output):
    images = smooth(4, 16)
    values = {"gabfusion": True, "weight": {"bits": 8}, "activation": {"bits": 8, "output": output}}
    model = prepare(odd_network(), QuantConfig.from_dict(values), images[:1])
    assert model.third is model.also[0] and isinstance(model.third, QuantConv2d)
    # The first convolution reads a normalised image: 8 bits, and no fixed grid.
    assert model.first.weight_quantizer.bits == 8 and not isinstance(model.first.input_quantizer, FixedGrid)
    calibrate(model, [images])
    with torch.no_grad():
        model.cat.balance.logits.copy_(torch.tensor([0.5, -0.2]))
    folded = fold(model.eval())
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == ["behind_relu", "beside_shortcut"]
    assert folded.third is folded.also[0] and not any(isinstance(m, QuantConv2d) for m in folded.modules())
    # Several operations read the concatenation, so the factors are applied to it and no grid moves in front.
    assert type(folded.cat.balance).__name__ == "ScaledBranches"
    assert relative_distance(model, folded, images) < (1e-3 if output is None else 0.05)


class Reused(nn.Module):
    """The convolution that reads a concatenation reads another tensor too."""

    def __init__(self):
        super().__init__()
        self.first, self.cat = nn.Conv2d(3, 8, 3, padding=1), Concat()
        self.shared, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.shared(self.shared(self.cat([x, x.square()]))))


def test_no_grid_moves_in_front_of_a_concat_if_its_quantizer_reads_more():
    torch.manual_seed(0)
    images = smooth(2, 16)
    model = prepare(Reused(), QuantConfig.from_dict({"gabfusion": True}), images)
    calibrate(model, [images])
    with torch.no_grad():
        model.cat.balance.logits.copy_(torch.tensor([0.5, -0.2]))
    folded = fold(model.eval())
    assert isinstance(folded.shared.input_quantizer, EqualizedGrid)
    assert relative_distance(model, folded, images) < 1e-3


def test_a_slot_quantizes_the_shortcut():
    from models.common import quantize

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.input_quantizer = nn.Conv2d(8, 8, 3, padding=1), None

        def forward(self, x):
            x = quantize(self.input_quantizer, x)
            return x + self.conv(x)

    images = smooth(2, 16)
    model = prepare(nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.Conv2d(8, 2, 1)), QuantConfig(), images)
    calibrate(model, [images])
    quantizer = model[1].input_quantizer
    assert quantizer is not None and model[1].conv.input_quantizer is None
    with torch.no_grad():
        model.eval()
        assert len(quantizer(model[0](images)).unique()) <= 16
        assert relative_distance(model, fold(model), images) < 1e-4


def test_users_mistakes():
    images = smooth(2, 32)
    with pytest.raises(UserError, match="example="):
        prepare(UNet(), QuantConfig())
    with pytest.raises(UserError, match="method"):
        prepare(UNet(), QuantConfig(method="lsqq"), images)
    with pytest.raises(UserError, match=r"no nn\.Conv2d"):
        prepare(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), QuantConfig(), images)
    with pytest.raises(UserError, match="no Concat"):
        prepare(torchvision.models.resnet18(), build_config("lsq", 4, gabfusion=True), torch.rand(1, 3, 64, 64))
    with pytest.raises(UserError, match="prepare it first"):
        calibrate(UNet(), [images])
    model = prepare(UNet(), build_config("lsq", 4, gabfusion=True), images)
    with pytest.raises(UserError, match="calibrate the model first"):
        report(model)
    with pytest.raises(UserError, match="without its labels"):
        calibrate(model, [(images, torch.zeros(2))])
    with pytest.raises(UserError, match=r"activation\.image to learned"):
        calibrate(model, [images * 4 - 2])
    calibrate(model, [images])
    set_strength(model, 0.3)
    with pytest.raises(UserError, match=r"set_strength\(model, 0\)"):
        fold(model)
    with pytest.raises(UserError, match="not folded"):
        export_onnx(model, "never.onnx", images)


def test_importing_the_package_is_light_and_names_survive_the_import_of_files():
    program = (
        "import sys, quant\n"
        "assert 'torch' not in sys.modules, 'import quant loads torch'\n"
        "import quant.lsq\n"
        "assert not {'models', 'onnx', 'torchvision'} & set(sys.modules), 'a quantizer loads more than torch'\n"
        "import quant.fold, quant.report\n"
        "assert 'onnx' not in sys.modules\n"
        "from quant import calibrate, fold, prepare, report\n"
        "assert all(callable(name) for name in (calibrate, fold, prepare, report))\n"
        "from quant.fold import IntegerConv2d\n"
        "assert all(hasattr(quant, name) and name in dir(quant) for name in quant.__all__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code, _of_the_detector = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("example.py").write_text(code, encoding="utf-8")
    space = runpy.run_path("example.py")
    assert (tmp_path / "network.onnx").is_file()
    printed = capsys.readouterr().out
    assert "decoder.0" in printed and "times smaller" in printed and "codes compared" in printed
    images = space["images"]
    assert relative_distance(space["model"], space["folded"], images) < 0.02
