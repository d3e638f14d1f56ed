"""The layer zoo against loops, other formulations and the folding identity."""

import pytest
import torch
from torch import nn

from models import common


class CountingQuantizer(nn.Module):
    """Rounds to a grid of step 1/4 and remembers what it was given and what it returned."""

    def __init__(self):
        super().__init__()
        self.inputs, self.outputs = [], []

    def forward(self, x):
        self.inputs.append(x)
        self.outputs.append((x * 4).round() / 4)
        return self.outputs[-1]


def randomise_norms(module: nn.Module) -> nn.Module:
    """Gives every BatchNorm statistics far from the identity, with negative and zero gammas among them."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.1, 3.0)
            norm.weight.data[0] = 0.0
    return module.eval()


def inputs_of(convolution: nn.Module, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Runs ``module`` on ``x`` and returns what ``convolution`` read."""
    seen = []
    handle = convolution.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    "kernel,dilation,expected", [(1, 1, 0), (3, 1, 1), (5, 1, 2), (6, 1, 3), (3, 2, 2), (3, 4, 4), ((1, 3), 1, (0, 1))]
)
def test_same_padding(kernel, dilation, expected):
    assert common.same_padding(kernel, dilation) == expected


def test_conv_is_convolution_norm_activation():
    conv = randomise_norms(common.Conv(4, 6, 3, 2, g=2))
    x = torch.randn(2, 4, 9, 7)
    expected = nn.functional.conv2d(x, conv.conv.weight, None, 2, 1, 1, 2)
    norm = conv.bn
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(1, -1, 1, 1)
    expected = (expected - norm.running_mean.view(1, -1, 1, 1)) * scale + norm.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(conv(x), expected * torch.sigmoid(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act,kind", [(True, nn.SiLU), (False, nn.Identity), (nn.ReLU(), nn.ReLU), (None, nn.Identity)])
def test_conv_activation_argument(act, kind):
    assert isinstance(common.Conv(1, 1, act=act).act, kind)


def test_default_activation_reaches_only_defaults():
    module = nn.Sequential(common.C3(4, 4), common.Conv(4, 4, act=nn.Tanh()), common.Conv(4, 4, act=False))
    common.set_default_activation(module, nn.LeakyReLU(0.3))
    kinds = [layer.act for layer in module.modules() if isinstance(layer, common.Conv)]
    assert [type(kind) for kind in kinds] == [nn.LeakyReLU] * 5 + [nn.Tanh, nn.Identity]
    assert kinds[0] is not kinds[1] and kinds[0].negative_slope == 0.3
    assert isinstance(common.Conv(1, 1).act, nn.SiLU)  # other models keep theirs


@pytest.mark.parametrize("with_bias", [False, True])
def test_fold_batch_norm_keeps_the_function(with_bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, bias=with_bias)
    norm = randomise_norms(nn.BatchNorm2d(5))
    x = torch.randn(2, 3, 8, 8)
    weight, bias = common.fold_batch_norm(conv.weight, conv.bias, norm)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, bias), norm(conv(x)), rtol=1e-4, atol=1e-5)
    assert weight[0].abs().max() == 0  # gamma 0


def test_fuse_leaves_other_convolutions_alone():
    class OtherConv2d(nn.Conv2d):
        pass

    layer = common.Conv(3, 4)
    layer.conv = OtherConv2d(3, 4, 1, bias=False)
    layer.fuse()
    assert isinstance(layer.bn, nn.BatchNorm2d) and layer.conv.bias is None


BLOCKS = [
    (common.Conv, (8, 16, 3, 2), (16, 8, 8)),
    (common.DWConv, (8, 16, 3, 1), (16, 16, 16)),
    (common.DWConvTranspose2d, (8, 8, 2, 2), (8, 32, 32)),
    (common.Bottleneck, (8, 8), (8, 16, 16)),
    (common.Bottleneck, (8, 12), (12, 16, 16)),
    (common.BottleneckCSP, (8, 12, 2), (12, 16, 16)),
    (common.CrossConv, (8, 8, 3, 1, 1, 1.0, True), (8, 16, 16)),
    (common.C3, (8, 12, 2), (12, 16, 16)),
    (common.C3x, (8, 12, 2), (12, 16, 16)),
    (common.C3Ghost, (8, 16, 2), (16, 16, 16)),
    (common.C3SPP, (8, 12), (12, 16, 16)),
    (common.GhostConv, (8, 16, 3, 2), (16, 8, 8)),
    (common.GhostBottleneck, (8, 16, 3, 2), (16, 8, 8)),
    (common.GhostBottleneck, (8, 8), (8, 16, 16)),
    (common.SPP, (8, 12), (12, 16, 16)),
    (common.SPPF, (8, 12, 5), (12, 16, 16)),
    (common.Focus, (8, 12, 3), (12, 8, 8)),
    (common.Contract, (2,), (32, 8, 8)),
    (common.Expand, (2,), (2, 32, 32)),
]


@pytest.mark.parametrize("kind,arguments,shape", BLOCKS)
def test_block_shape_gradient_and_fusion(kind, arguments, shape):
    torch.manual_seed(0)
    block = randomise_norms(kind(*arguments))
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    y = block(x)
    assert y.shape == (2, *shape)
    y.square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad is not None for p in block.parameters())
    for module in block.modules():
        if isinstance(module, common.Conv):
            module.fuse()
    assert not any(isinstance(module, common.Conv) and module.bn is not None for module in block.modules())
    torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-4)


def test_sppf_equals_spp_with_growing_windows():
    fast, plain = randomise_norms(common.SPPF(8, 12, 5)), common.SPP(8, 12, (5, 9, 13)).eval()
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(1, 8, 20, 20)
    torch.testing.assert_close(fast(x), plain(x))


def test_focus_order():
    focus = common.Focus(1, 4).eval()
    x = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])  # top left 0, top right 1, bottom left 2, bottom right 3
    assert inputs_of(focus.conv, focus, x).flatten().tolist() == [0, 2, 1, 3]


def test_contract_against_loop_and_expand_inverts_it():
    x = torch.randn(2, 3, 4, 6)
    expected = torch.empty(2, 12, 2, 3)
    for row in range(2):
        for column in range(2):
            first = (row * 2 + column) * 3
            expected[:, first : first + 3] = x[:, :, row::2, column::2]
    torch.testing.assert_close(common.Contract(2)(x), expected)
    torch.testing.assert_close(common.Expand(2)(common.Contract(2)(x)), x)


@pytest.mark.parametrize("kind", [common.C3, common.C3x, common.C3Ghost, common.BottleneckCSP])
def test_slot_of_a_split_feeds_both_readers_one_tensor(kind):
    block = kind(8, 8).eval()
    keys = list(block.state_dict())
    quantizer = CountingQuantizer()
    block.input_quantizer = quantizer
    assert list(block.state_dict()) == keys
    x = torch.randn(1, 8, 4, 4)
    assert inputs_of(block.cv1, block, x) is quantizer.outputs[-1]
    assert inputs_of(block.cv2, block, x) is quantizer.outputs[-1]
    assert len(quantizer.inputs) == 2 and quantizer.inputs[0] is x  # one call a pass


@pytest.mark.parametrize("kind", [common.Bottleneck, common.CrossConv])
def test_shortcut_adds_the_quantized_tensor(kind):
    block = kind(4, 4, shortcut=True).eval()
    block.input_quantizer = quantizer = CountingQuantizer()
    x = torch.randn(1, 4, 5, 5)
    y = block(x)
    quantized = quantizer.outputs[0]
    torch.testing.assert_close(y, quantized + block.cv2(block.cv1(quantized)))
    assert (y - (x + block.cv2(block.cv1(quantized)))).abs().max() > 1e-3


def test_ghost_bottleneck_shortcut_reads_the_quantized_tensor():
    block = common.GhostBottleneck(4, 4).eval()
    block.input_quantizer = quantizer = CountingQuantizer()
    y = block(torch.randn(1, 4, 5, 5))
    torch.testing.assert_close(y, block.conv(quantizer.outputs[0]) + quantizer.outputs[0])


def test_concat_and_its_balance_slot():
    class Halves(nn.Module):
        def forward(self, branches):
            return torch.cat([branch / 2 for branch in branches], 1)

    concat = common.Concat()
    branches = [torch.randn(1, 2, 3, 3), torch.randn(1, 4, 3, 3)]
    fused = concat(branches)
    assert fused.shape == (1, 6, 3, 3) and torch.equal(fused[:, 2:], branches[1])
    assert not concat.state_dict() and not list(concat.children())
    concat.balance = Halves()
    torch.testing.assert_close(concat(branches), fused / 2)
    concat.balance = None
    assert torch.equal(concat(branches), fused)


def test_slots_are_empty_in_a_new_block():
    for module in nn.Sequential(common.C3(4, 4), common.BottleneckCSP(4, 4), common.GhostBottleneck(4, 4)).modules():
        assert getattr(module, "input_quantizer", None) is None
        assert getattr(module, "balance", None) is None
