"""Compiled kernels against the same arithmetic piece by piece. A compiler may be missing: then they are skipped."""

import ctypes

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quant import kernels, native
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
        pytest.skip("no C++ compiler")
    yield
    kernels.switch(False)


def one_pass(quantizer, x, upstream):
    leaf = x.clone().requires_grad_(True)
    quantizer.zero_grad()
    y = quantizer(leaf)
    y.backward(upstream)
    gradients = {name: parameter.grad.clone() for name, parameter in quantizer.named_parameters()}
    return y.detach(), leaf.grad, gradients


@pytest.fixture
def calls(monkeypatch):
    """Names of the native functions that are called."""
    names, call = [], native._call
    monkeypatch.setattr(native, "_call", lambda name, *given: names.append(name) or call(name, *given))
    return names


def assert_equal_passes(quantizer, x, upstream, calls, monkeypatch):
    y, gradient, parameters = one_pass(quantizer, x, upstream)
    assert len(calls) == 2  # forward and backward
    monkeypatch.setattr(kernels, "_on", False)
    expected, expected_gradient, expected_parameters = one_pass(quantizer, x, upstream)
    assert len(calls) == 2
    assert torch.equal(y, expected) and y.stride() == expected.stride() and y.dtype is x.dtype
    tolerance = 1e-5 if x.dtype is torch.float32 else 1e-2
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=1e-6)
    for name, value in expected_parameters.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["affine", "unsigned", "signed"])
@pytest.mark.parametrize("method", ["lsq", "pact", "dsq", "n2uq"])
def test_activations(compiled, calls, method, scheme, dtype, monkeypatch):
    torch.manual_seed(0)
    x = torch.nn.functional.silu(2 * torch.randn(2, 5, 7, 9)).to(dtype).to(memory_format=torch.channels_last)
    upstream = torch.randn(2, 5, 7, 9).to(dtype)
    quantizer = activation_quantizer(method, scheme)
    quantizer.initialise(x * 0.8)  # some values outside on both sides
    assert_equal_passes(quantizer, x, upstream, calls, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels, size", [(5, (41, 83)), (1100, (3, 5)), (7, (1, 1))])
@pytest.mark.parametrize("method", ["lsq", "pact", "dsq", "n2uq"])
def test_factors_of_channels_are_multiplied_in_the_kernel(
    compiled, calls, method, channels, size, layout, dtype, monkeypatch
):
    torch.manual_seed(0)
    x = torch.nn.functional.silu(2 * torch.randn(3, channels, *size)).to(dtype).to(memory_format=layout)
    upstream = torch.randn(x.shape).to(dtype)
    quantizer = activation_quantizer(method)
    quantizer.initialise(x * 0.8)
    factors = torch.rand(channels, 1, 1) * 1.5 + 0.5
    product, products_gradient, parameters = one_pass(quantizer, x * factors.to(dtype), upstream)
    quantizer.add_equalizer(channels)
    quantizer.inverse_equalizer.copy_(factors)
    calls.clear()
    monkeypatch.setattr(quantizer, "equalized", lambda _x: pytest.fail("a pass of its own"))
    y, gradient, own = one_pass(quantizer, x, upstream)
    assert len(calls) == 2
    assert torch.equal(y, product) and torch.equal(gradient, products_gradient * factors.to(dtype))
    assert all(torch.equal(own[name], parameters[name]) for name in parameters)


@pytest.mark.parametrize("method", ["lsq", "pact", "dsq", "n2uq"])
def test_kernels_that_are_switched_off_on_the_way_back(compiled, method, monkeypatch):
    torch.manual_seed(0)
    x, upstream = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    quantizer = activation_quantizer(method)
    quantizer.initialise(x)
    quantizer.add_equalizer(3)
    quantizer.inverse_equalizer.copy_(torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1))
    _y, gradient, _parameters = one_pass(quantizer, x, upstream)
    leaf = x.clone().requires_grad_(True)
    y = quantizer(leaf)
    monkeypatch.setattr(kernels, "_on", False)
    y.backward(upstream)
    torch.testing.assert_close(leaf.grad, gradient)


def test_a_derived_method_gets_the_product(compiled):
    class Doubled(QUANTIZERS["lsq"]):
        def quantize(self, x):
            return super().quantize(2 * x)

    quantizer = Doubled.for_activations(4, "affine", Doubled.Options())
    x = torch.randn(2, 3, 4, 4)
    quantizer.initialise(x)
    expected = quantizer(x * 0.5)
    quantizer.add_equalizer(3)
    quantizer.inverse_equalizer.fill_(0.5)
    assert torch.equal(quantizer(x), expected)


def test_a_derived_method_may_come_from_beside(compiled):
    class Beside:
        def quantize(self, x):
            return 2 * x

    class Mixed(Beside, QUANTIZERS["lsq"]):
        pass

    quantizer = Mixed.for_activations(4, "affine", Mixed.Options())
    quantizer.add_equalizer(3)
    quantizer.inverse_equalizer.fill_(0.5)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(quantizer(x), x)


@pytest.mark.parametrize("method", ["lsq", "pact", "dsq", "n2uq"])
def test_factors_of_one_image_without_a_batch(compiled, method):
    quantizer = activation_quantizer(method)
    x = torch.randn(1, 3, 4, 5)
    quantizer.initialise(x)
    quantizer.add_equalizer(3)
    quantizer.inverse_equalizer.copy_(torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1))
    assert torch.equal(quantizer(x[0]), quantizer(x)[0])
    with pytest.raises(RuntimeError, match="size of tensor"):
        quantizer(torch.randn(1, 6, 4, 5))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("method", ["lsq", "dsq"])
def test_weights_with_a_step_each(compiled, calls, method, layout, monkeypatch):
    torch.manual_seed(0)
    kind = QUANTIZERS[method]
    quantizer = kind.for_weights(4, 6, kind.Options())
    weights = (torch.randn(6, 5, 3, 3) * torch.logspace(-2, 1, 6).reshape(6, 1, 1, 1)).to(memory_format=layout)
    quantizer.initialise(weights * 0.8)
    assert_equal_passes(quantizer, weights, torch.randn(6, 5, 3, 3), calls, monkeypatch)


def test_not_a_number_stays_visible(compiled):
    for method in ("lsq", "pact", "dsq", "n2uq"):
        quantizer = activation_quantizer(method)
        quantizer.initialise(torch.randn(1000))
        x = torch.tensor([0.5, torch.nan, -0.2], requires_grad=True)
        y = quantizer(x)
        y.sum().backward()
        assert y.isnan().tolist() == [False, True, False], method


@pytest.mark.parametrize("broken", ["step", "zero_point", "x"])
def test_a_diverged_quantizer_shows_it(compiled, broken, monkeypatch):
    quantizer = activation_quantizer("lsq")
    quantizer.initialise(torch.randn(1000))
    x = torch.randn(50)
    if broken == "x":
        x[3] = torch.nan
    else:
        getattr(quantizer, broken).data.fill_(torch.nan)
    # Only the values are compared: which gradient a NaN gets is not the same in all of torch's own kernels.
    found = one_pass(quantizer, x, torch.ones(50))[0].isnan()
    monkeypatch.setattr(kernels, "_on", False)
    expected = one_pass(quantizer, x, torch.ones(50))[0].isnan()
    assert found.any() and torch.equal(found, expected)


def test_steps_of_another_type(compiled):
    x, step = torch.randn(8, 3, 3, 3), torch.rand(8, dtype=torch.float64) + 0.1
    assert torch.equal(native.staircase(x, step, -7, 7)[0], native.staircase(x, step.float(), -7, 7)[0])


def test_sixteen_bit_floats_and_empty_tensors_go_piece_by_piece(compiled, calls):
    quantizer = activation_quantizer("lsq")
    quantizer.initialise(torch.randn(1000))
    one_pass(quantizer, torch.randn(50).half(), torch.ones(50).half())
    one_pass(quantizer, torch.randn(0, 3), torch.ones(0, 3))
    assert not calls


def test_tensors_without_memory_go_piece_by_piece(compiled):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.randn(4, 5))
        assert not native.usable(fake)
    assert native.usable(torch.randn(4, 5)) and native.usable(torch.nn.Parameter(torch.randn(4, 5)))


# --- the library against the formulas that torch.compile gets --------------------------------------------------------

SIZE = 3 * native.CHUNK + 17  # several chunks, the last one not full


def values(size=SIZE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(size, generator=generator) * 2).to(dtype)
    x[:4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    return torch.randn(size, generator=generator).to(dtype), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_library_equals_the_formulas(compiled, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gradient, x = values(dtype=dtype)
        step, low, high = torch.tensor([0.3]), torch.tensor([-2.0]), torch.tensor([13.0])
        assert torch.equal(native.staircase(x, step, low, high)[0], kernels.staircase(x, step, low, high))
        x[2:4] = 1.0  # formulas multiply infinity with 0
        scale = torch.tensor([1.7, 0.9])
        for found, expected in (
            (native.uniform_backward(gradient, x, step, low, high),
             kernels.uniform_backward(gradient, x, step, low, high)),
            (native.clipped_backward(gradient, x, low * step, high * step),
             kernels.clipped_backward(gradient, x, low * step, high * step)),
            (native.soft_backward(gradient, x, step, low, high, 2.2, scale),
             kernels.soft_backward(gradient, x, step, low, high, torch.tensor([2.2]), scale)),
        ):  # fmt: skip
            assert len(found) == len(expected)
            tolerance = 2e-6 if dtype is torch.float32 else 8e-3
            torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
            for one, other in zip(found[1:], expected[1:], strict=True):
                torch.testing.assert_close(one.reshape(()), other.reshape(()), rtol=1e-4, atol=2e-2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("step", [257.0, 259.0, 1.001953125])
def test_bfloat16_is_rounded_half_to_even(compiled, step):
    """These lie in the middle of two bfloat16 numbers, or near it."""
    x = torch.tensor([1.0, -1.0]).bfloat16() * round(step)
    (y,) = native.staircase(x, step, -1, 1)
    assert torch.equal(y, torch.tensor([step, -step]).bfloat16())


def test_sums_do_not_depend_on_threads(compiled):
    gradient, x = values(20 * native.CHUNK)
    x[2:4] = 1.0
    numbers = torch.randint(0, 300, x.shape).short()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = native.uniform_backward(gradient, x, 0.3, -2.0, 13.0)
        results.append([*found, *native.cell_backward(gradient, numbers, torch.rand(300).fill_(0.5))])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_cells(compiled):
    gradient, x = values(dtype=torch.float32)
    x[5] = torch.nan
    width, offset, table = torch.tensor([0.25]), torch.tensor([9.0]), torch.rand(17)
    table[0] = torch.nan
    y, numbers = native.cell_values(x, width, offset, table)
    expected = (x.double() / 0.25 + 9).clamp(1, 16).floor().nan_to_num(0).long()
    assert torch.equal(numbers.long(), expected)
    assert torch.equal(y.nan_to_num(-1), table[expected].nan_to_num(-1))
    out, sums = native.cell_backward(gradient, numbers, table.nan_to_num(0))
    assert torch.equal(out, gradient * table.nan_to_num(0)[expected])
    reference = torch.zeros(17, dtype=torch.double).index_add_(0, expected, gradient.double())
    torch.testing.assert_close(sums.double(), reference, rtol=1e-4, atol=1e-2)


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """As in a new process with an empty cache."""
    monkeypatch.setattr(kernels, "_on", False)
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_without_a_compiler_it_says_so_and_goes_on(unloaded, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model = torch.nn.ModuleList([activation_quantizer("lsq")])
    assert not compile_quantizers(model, required=False)
    assert not capsys.readouterr().out
    assert not compile_quantizers(model)
    assert not kernels.active(torch.ones(1), 1.0)
    assert "without: no C++ compiler found" in capsys.readouterr().out


def test_a_compiler_that_fails_is_named(unloaded, monkeypatch, tmp_path):
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'no space left' >&2; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(native.NativeError, match="broken-compiler: no space left"):
        native.load()
    assert not list(tmp_path.glob("yolov5-qat/*.so"))


@pytest.mark.parametrize("content", [b"half a file", b""])
def test_a_damaged_library_is_built_again(unloaded, compiled, tmp_path, content):
    model = torch.nn.ModuleList([activation_quantizer("lsq")])
    native.load()
    (file,) = tmp_path.glob("yolov5-qat/native-*.so")
    whole = file.read_bytes()
    file.unlink()  # not written over: it is loaded
    file.write_bytes(content or whole[:5000])
    native._library = None
    assert compile_quantizers(model)
    assert len(file.read_bytes()) == len(whole)
    assert ctypes.CDLL(str(file)).staircase_float32


def test_a_folder_that_is_none_is_no_end(unloaded, compiled, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_quantizers(torch.nn.ModuleList([activation_quantizer("lsq")]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_they_can_be_switched_on_where_nothing_is_trained(compiled, mode):
    with mode():
        assert compile_quantizers(torch.nn.ModuleList([activation_quantizer("lsq")]))
    assert kernels.native_active(torch.ones(1))


def test_torch_compile_needs_no_new_code_for_a_new_size():
    """The path of accelerators, here on a CPU."""
    limits = torch.tensor([0.3]), torch.tensor([-2.0]), torch.tensor([13.0])
    try:
        kernels.run_compiled(kernels.staircase, [torch.randn(4, 3, 5, 5)], *limits)
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {error}")
    kernels.run_compiled(kernels.staircase, [torch.randn(2, 3, 4, 5)], *limits)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for shape in ((1, 8, 2, 3), (18,), (3, 4)):  # an odd size has one row only, which is compiled for itself
        x = torch.randn(shape)
        (y,) = kernels.run_compiled(kernels.staircase, [x], *limits)
        assert torch.equal(y, kernels.staircase(x, *limits))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
