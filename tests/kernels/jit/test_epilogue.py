import msgspec
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastres.kernels import reference
from fastres.kernels.aot import compile_launch
from fastres.kernels.epilogue import Epilogue
from fastres.kernels.jit.epilogue import apply_activation
from fastres.kernels.launch import Launch

KINDS = ("relu", "silu", "sigmoid", "gelu", "hardswish")


@triton.jit
def _activate_kernel(x_ptr, y_ptr, SIZE: tl.constexpr, ACTIVATION: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, apply_activation(tl.load(x_ptr + at), ACTIVATION))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_activation_matches_reference(kind, device, guarded, poisoned, assert_parity):
    x = guarded(torch.linspace(-8, 8, 64, device=device))
    x[5] = float("nan")
    oracle = x.cpu().double() if kind is None else reference.activation(x.cpu().double(), kind)
    assert oracle.isnan().sum() == 1
    out = poisoned(x.shape, x.dtype, device)
    _activate_kernel[(1,)](x, out, SIZE=64, ACTIVATION=kind, enable_fp_fusion=True)
    assert_parity(out, oracle, oracle.float())


@pytest.mark.compile
@pytest.mark.parametrize("kind", KINDS)
def test_activation_compiles_without_spills(kind):
    x = torch.empty(64, device="meta")
    constants = {"SIZE": 64, "ACTIVATION": kind}
    launch = Launch(_activate_kernel, 1, {"x_ptr": x, "y_ptr": x}, constants, 1, 1)
    assert compile_launch(launch, 90).spill_stores == 0


def test_reference_gelu_is_exact():
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    exact = x * torch.distributions.Normal(0.0, 1.0).cdf(x)
    torch.testing.assert_close(reference.activation(x, "gelu"), exact)
    assert not torch.equal(exact, F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize(
    ("epilogue", "text"),
    [
        (Epilogue(), ""),
        (Epilogue(residual=True), "+residual"),
        (Epilogue(activation="silu"), "+silu"),
        (Epilogue(residual=True, activation="relu"), "+residual+relu"),
    ],
    ids=str,
)
def test_epilogue_reads_as_text_and_survives_json(epilogue, text):
    assert str(epilogue) == text
    assert msgspec.json.decode(msgspec.json.encode(epilogue), type=Epilogue) == epilogue


def test_epilogue_is_frozen():
    with pytest.raises(AttributeError, match="immutable"):
        Epilogue().residual = True
