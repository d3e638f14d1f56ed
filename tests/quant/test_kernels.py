"""Compiled kernels against the formulas piece by piece. A compiler may be missing: then these tests are skipped."""

import pytest
import torch

from quant import kernels
from quant.compilation import compile_quantizers
from quant.registry import QUANTIZERS


def activation_quantizer(method, scheme="affine", bits=4):
    kind = QUANTIZERS[method]
    return kind.for_activations(bits, scheme, kind.Options())


@pytest.fixture(scope="module")
def compiled():
    model = torch.nn.ModuleList(
        activation_quantizer(method, scheme)
        for method in ("lsq", "pact", "dsq", "n2uq")
        for scheme in ("affine", "unsigned", "signed")
    )
    if not compile_quantizers(model, (torch.float32, torch.bfloat16)):
        pytest.skip("torch.compile does not work here: it needs a C++ compiler")
    yield
    kernels.switch(False)


def one_pass(quantizer, x, upstream):
    leaf = x.clone().requires_grad_(True)
    quantizer.zero_grad()
    y = quantizer(leaf)
    y.backward(upstream)
    gradients = {name: parameter.grad.clone() for name, parameter in quantizer.named_parameters()}
    return y.detach(), leaf.grad, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["affine", "unsigned", "signed"])
@pytest.mark.parametrize("method", ["lsq", "pact", "dsq", "n2uq"])
def test_compiled_equals_piece_by_piece(compiled, method, scheme, dtype, monkeypatch):
    torch.manual_seed(0)
    x = torch.nn.functional.silu(2 * torch.randn(2, 5, 7, 9)).to(dtype).to(memory_format=torch.channels_last)
    upstream = torch.randn(2, 5, 7, 9).to(dtype)
    quantizer = activation_quantizer(method, scheme)
    quantizer.initialise(x * 0.8)  # some values outside on both sides
    ran = []
    monkeypatch.setattr(
        kernels, "run", lambda kernel, *given, run=kernels.run: ran.append(kernel) or run(kernel, *given)
    )
    y, gradient, parameters = one_pass(quantizer, x, upstream)
    assert len(ran) == (1 if method == "n2uq" else 2)  # n2uq's backward pass is a table in both forms
    monkeypatch.setattr(kernels, "_on", False)
    expected, expected_gradient, expected_parameters = one_pass(quantizer, x, upstream)
    assert len(ran) == (1 if method == "n2uq" else 2)
    assert torch.equal(y, expected) and y.stride() == expected.stride() and y.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=1e-6)
    for name, value in expected_parameters.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_new_size_is_no_reason_to_compile_again(compiled):
    quantizer = activation_quantizer("lsq")
    quantizer.initialise(torch.randn(1000))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for shape in ((4, 3, 5, 5), (1, 8, 2, 3), (17,), (3, 4)):
        one_pass(quantizer, torch.randn(shape), torch.ones(shape))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_not_a_number_stays_visible(compiled):
    for method in ("lsq", "pact", "dsq", "n2uq"):
        quantizer = activation_quantizer(method)
        quantizer.initialise(torch.randn(1000))
        x = torch.tensor([0.5, torch.nan, -0.2], requires_grad=True)
        y = quantizer(x)
        y.sum().backward()
        assert y.isnan().tolist() == [False, True, False], method


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, caplog):
    def broken(kernel):
        raise RuntimeError("no C++ compiler found\nlong trace")

    monkeypatch.setattr(kernels, "_on", False)
    monkeypatch.setattr(kernels, "compiled", broken)
    assert not compile_quantizers(torch.nn.ModuleList([activation_quantizer("lsq")]))
    assert not kernels.active(torch.ones(1))
    assert "without it: no C++ compiler found" in caplog.text and "long trace" not in caplog.text
