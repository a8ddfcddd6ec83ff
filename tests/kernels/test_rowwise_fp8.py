"""rowwise_fp8: what rounding costs, that the backward is the adjoint of the stored weight, Triton byte for byte."""
import pytest
import torch

from copd_kernels.rowwise_fp8 import reference, triton_impl
from copd_kernels.rowwise_fp8.linear import frozen_linear
from copd_kernels.rowwise_fp8.reference import FP8, LARGEST, dequantise, quantise_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 2**-4
"""e4m3 keeps three bits after the leading one: a normal number is off by at most 1/16."""


def test_rows_are_kept_within_the_rounding_of_e4m3():
    x = torch.randn(50, 200) * torch.logspace(-20, 20, 50)[:, None]
    q, s = quantise_rows(x)
    assert q.dtype == FP8 and s.dtype == torch.float32 and s.shape == (50, 1)
    error = (dequantise(q, s) - x).abs()
    smallest_normal = s * 2**-6
    assert (error <= torch.maximum(ROUNDING * x.abs(), ROUNDING * smallest_normal)).all()
    assert torch.equal(q.float().abs().amax(1), torch.full((50,), LARGEST))


def test_zeros_stay_zeros_and_a_row_does_not_look_at_others():
    x = torch.randn(4, 32)
    x[2] = 0
    q, s = quantise_rows(x)
    assert not q[2].float().any() and s[2].isfinite().all()
    alone = quantise_rows(x[1:2])
    assert torch.equal(alone[0].float(), q[1:2].float()) and torch.equal(alone[1], s[1:2])


def test_a_multiplier_is_multiplied_first():
    x, m = torch.randn(5, 16), torch.rand(16)
    for ours, plain in zip(quantise_rows(x, m), quantise_rows(x * m)):
        assert torch.equal(ours.float(), plain.float())


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 1), (7, 37), (2, 4096), (3, 150)])
def test_triton_gives_the_reference_byte_for_byte(dtype, shape, monkeypatch):
    if shape[1] == 150:
        monkeypatch.setattr(triton_impl, "BLOCK", 64)  # several blocks
    x, m = (3 * torch.randn(shape)).to(DEVICE, dtype), (torch.rand(shape[1]) + 0.5).to(DEVICE)
    x[0] = 0
    for multiplier in (None, m):
        ours, theirs = (module.quantise_rows(x, multiplier) for module in (triton_impl, reference))
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=0)
        # A quotient in the middle between two numbers may fall to either side where division is not exact.
        differing = (ours[0].float() != theirs[0].float()).float().mean()
        assert differing <= (0 if DEVICE == "cpu" else 1e-3)
    assert triton_impl.quantise_rows(torch.empty(0, 8, device=DEVICE))[0].shape == (0, 8)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_forward_and_backward_are_those_of_the_stored_weight(backend):
    torch.manual_seed(0)
    x = torch.randn(6, 64, device=DEVICE, requires_grad=True)
    q, s = quantise_rows(torch.randn(48, 64, device=DEVICE) * torch.logspace(-2, 2, 48, device=DEVICE)[:, None])
    weight, grad = dequantise(q, s), torch.randn(2, 3, 48, device=DEVICE)
    y = frozen_linear(x.view(2, 3, 64), q, s, backend)
    y.backward(grad)
    rounded = dequantise(*quantise_rows(x.detach()))
    exact = dict(rtol=1e-4, atol=1e-4) if DEVICE == "cpu" else dict(rtol=1e-2, atol=1e-1)
    torch.testing.assert_close(y.detach().view(6, 48), rounded @ weight.T, **exact)
    given = dequantise(*quantise_rows(grad.view(6, 48), s[:, 0])) @ q.float()
    torch.testing.assert_close(x.grad, given, **exact)
    for found, truth in ((y.detach().view(6, 48), x.detach() @ weight.T), (x.grad, grad.view(6, 48) @ weight)):
        assert float((found - truth).norm() / truth.norm()) < 0.04


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_rows_views_and_one_gradient_for_all(backend):
    q, s = quantise_rows(torch.randn(32, 48, device=DEVICE))
    wide = torch.randn(5, 60, device=DEVICE)
    outcomes = []
    for x in (wide[:, 7:55], wide[:, 7:55].contiguous(), wide.T.contiguous().T[:, 7:55]):
        leaf = x.detach().requires_grad_()
        y = frozen_linear(leaf, q, s, backend)
        outcomes.append((y, *torch.autograd.grad(y.sum(), leaf)))  # a gradient without strides
    assert all(map(torch.equal, outcomes[0], outcomes[1])) and all(map(torch.equal, outcomes[0], outcomes[2]))
    none = torch.empty(0, 1, 48, device=DEVICE, requires_grad=True)
    y = frozen_linear(none, q, s, backend)
    assert y.shape == (0, 1, 32) and torch.autograd.grad(y.sum(), none)[0].shape == (0, 1, 48)


@pytest.mark.parametrize(("n", "k", "dtype"), [
    (40, 32, torch.float32), (32, 40, torch.float32), (32, 32, torch.float64)])
def test_sizes_and_dtypes_that_cannot_be(n, k, dtype):
    q, s = quantise_rows(torch.ones(n, k))
    with pytest.raises(ValueError, match="multiples of 16"):
        frozen_linear(torch.ones(1, k, dtype=dtype), q, s)
