"""grouped_lora: the reference against one dense expert at a time, and Triton against the reference."""
import pytest
import torch

from copd_kernels.grouped_lora import reference, triton_impl
from copd_kernels.grouped_lora.segments import TILE, Segments

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IN, OUT = 20, 24
COLUMNS = {"all": None, "gate or up": (24, 24, 0), "q of qkv": (4, 8, 16)}
CASES = {
    "slices, one empty": ([slice(2, 9), slice(9, 9), slice(9, 30)], (3, 2, 5), 33),
    "indices": ([torch.tensor([5, 1, 7]), torch.tensor([0, 2]), torch.empty(0, dtype=torch.int64)], (4, 4, 4), 9),
    "more than a tile": ([slice(0, TILE + 6), torch.arange(TILE + 9, 2 * TILE + 20)], (17, 2), 2 * TILE + 20),
    "one expert": ([slice(0, 4)], (1,), 4),
}


class Case:
    """A stream and factors; q, k and v of a projection are written into every second run of columns."""

    def __init__(self, name: str, columns: str, dtype: torch.dtype):
        routes, ranks, tokens = CASES[name]
        generator = torch.Generator().manual_seed(3)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()

        self.segments = Segments.build(routes, DEVICE)
        self.columns = COLUMNS[columns]
        self.x, self.down = draw(tokens, IN), [draw(rank, IN) for rank in ranks]
        self.y, self.up = draw(tokens, 2 * OUT if self.columns else OUT), [draw(OUT, rank) for rank in ranks]
        self.scales = [0.5 + n for n in range(len(ranks))]
        self.pull = draw(*self.y.shape).detach()

    def outcome(self, module) -> list[torch.Tensor]:
        """h, the result and all gradients, in float64."""
        h = module.grouped_down(self.x, self.down, self.segments)
        out = module.grouped_up(self.y * 1, h, self.up, self.scales, self.segments, self.columns)
        leaves = [self.x, self.y, *self.down, *self.up]
        return [t.detach().double() for t in (h, out, *torch.autograd.grad((out * self.pull).sum(), leaves))]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", CASES)
def test_reference_is_one_dense_adapter_per_expert(name, columns):
    case = Case(name, columns, torch.float64)
    _, out, *_ = case.outcome(reference)
    wanted = case.y.detach().clone()
    first, width, step = case.columns or (0, OUT, 0)
    for rows, a, b, scale in zip(case.segments.routes, case.down, case.up, case.scales):
        delta = scale * case.x[rows] @ a.T @ b.T
        for n in range(OUT):
            wanted[rows, first + n // width * step + n % width] += delta[:, n].detach()
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", CASES)
def test_triton_equals_the_reference_in_value_and_gradient(name, columns):
    wanted = Case(name, columns, torch.float64).outcome(reference)
    for found, truth in zip(Case(name, columns, torch.float32).outcome(triton_impl), wanted, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", CASES)
def test_shares_of_rows_add_up(name, columns, monkeypatch):
    """Shares of fewer rows than a block, and of none."""
    monkeypatch.setattr(triton_impl, "FEWEST_ROWS", 3)
    wanted = Case(name, columns, torch.float64).outcome(reference)
    for found, truth in zip(Case(name, columns, torch.float32).outcome(triton_impl), wanted, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=2e-4)


def test_triton_keeps_bfloat16_products_in_float32():
    case = Case("slices, one empty", "all", torch.bfloat16)
    for found, truth in zip(case.outcome(triton_impl), case.outcome(reference), strict=True):
        assert float((found - truth).norm() / truth.norm().clamp_min(1e-9)) < 2e-2


@pytest.mark.parametrize("module", [reference, triton_impl])
def test_no_experts_and_bad_arguments(module):
    x, none = torch.ones(3, 4, device=DEVICE), Segments.build([], DEVICE)
    h = module.grouped_down(x, [], none)
    assert h.shape == (3, 0) and torch.equal(module.grouped_up(x.clone(), h, [], [], none), x)
    with pytest.raises(ValueError, match="one each"):
        module.grouped_down(x, [torch.ones(1, 4)], none)


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="model.kernels=reference"):
        triton_impl.grouped_down(torch.ones(3, 4, dtype=torch.float64), [torch.ones(1, 4)],
                                 Segments.build([slice(0, 3)], DEVICE))
