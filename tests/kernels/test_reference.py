"""The reference is PyTorch by another name: what is checked here is only what it adds."""

import pytest
import torch

from fastres.kernels import reference

X = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64).view(2, 3, 4, 5) - 60


def test_conv2d_adds_bias_then_residual_then_activates():
    weight, bias = torch.ones(1, 3, 1, 1, dtype=X.dtype), torch.ones(1, dtype=X.dtype)
    residual = -2 * X[:, :1]
    y = reference.conv2d(
        X, weight, bias, stride=(1, 1), padding=(0, 0), residual=residual, activation="relu"
    )
    assert torch.equal(y, (X.sum(1, keepdim=True) + 1 + residual).clamp(min=0))


def test_batch_norm_is_its_formula():
    mean, var = X.mean((0, 2, 3)), X.var((0, 2, 3))
    weight, bias = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 5.0, 6.0]).double()
    c = (slice(None), None, None)
    expected = weight[c] * (X - mean[c]) / (var[c] + 1e-5).sqrt() + bias[c]
    y = reference.batch_norm(X, weight, bias, mean, var, 1e-5)
    torch.testing.assert_close(y, expected)
    relu = reference.batch_norm(X, weight, bias, mean, var, 1e-5, "relu")
    torch.testing.assert_close(relu, expected.relu())


@pytest.mark.parametrize("kind", ["relu", "silu", "sigmoid", "gelu", "hardswish"])
def test_activations_keep_nan(kind):
    assert reference.activation(torch.tensor([float("nan")]), kind).isnan().all()


def test_add_and_mul():
    assert torch.equal(reference.add(X, -X, "sigmoid"), torch.full_like(X, 0.5))
    assert torch.equal(reference.mul(X, X), X.square())


def test_pad_names_every_dimension():
    y = reference.pad(X, (0, 1, 2, 0), (0, 0, 1, 3), 7.0)
    assert y.shape == (2, 4, 7, 8)
    assert torch.equal(y[:, 1:, 2:6, :5], X)
    assert (y[:, 0] == 7).all() and (y[..., 5:] == 7).all() and (y[:, :, :2] == 7).all()


def test_slice_to_the_end():
    y = reference.slice_(X, (0, 1, 0, 1), (2, 2, None, 5), (1, 1, 2, 3))
    assert torch.equal(y, X[0:2, 1:2, ::2, 1:5:3])


def test_pools_and_heads():
    assert reference.global_avg_pool(X).shape == (2, 3, 1, 1)
    assert torch.equal(reference.global_avg_pool(X, keepdim=False), X.mean((2, 3)))
    assert reference.max_pool(X, (2, 2), (2, 2), (0, 0), (1, 1), True).shape == (2, 3, 2, 3)
    corner = reference.avg_pool(X, (3, 3), (1, 1), (1, 1), False, False)[0, 0, 0, 0]
    assert corner == X[0, 0, :2, :2].mean()
    flat = reference.flatten(X, 1)
    assert flat.shape == (2, 60)
    assert reference.linear(flat, torch.ones(4, 60, dtype=X.dtype), activation="relu").min() >= 0
    assert torch.equal(reference.concat([X, X], 1)[:, 3:], X)
    torch.testing.assert_close(reference.softmax(X, 1).sum(1), torch.ones(2, 4, 5).double())


@pytest.mark.parametrize("flip", [False, True])
def test_normalize_is_its_formula_rounded_once(flip):
    pixels = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).to(torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    given = (mean, std, 1 / 255, flip)
    for c in range(3):
        plane = pixels[:, 2 - c if flip else c].double()
        want = (plane / 255 - mean[c]) / std[c]
        exact = reference.normalize(pixels, *given, torch.float64)[:, c]
        torch.testing.assert_close(exact, want)
        for dtype in (torch.float32, torch.float16):
            y = reference.normalize(pixels, *given, dtype)[:, c]
            torch.testing.assert_close(y, want.to(dtype))
