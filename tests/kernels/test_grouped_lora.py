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
    "nobody has rows": ([slice(0, 0), torch.empty(0, dtype=torch.int64)], (3, 2), 5),
    "no stream": ([slice(0, 0)], (3,), 0),
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


@pytest.mark.interpreted
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", CASES)
def test_triton_equals_the_reference_in_value_and_gradient(name, columns):
    wanted = Case(name, columns, torch.float64).outcome(reference)
    for found, truth in zip(Case(name, columns, torch.float32).outcome(triton_impl), wanted, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=2e-4)


@pytest.mark.interpreted
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", CASES)
def test_shares_of_rows_add_up(name, columns, monkeypatch):
    """Shares of fewer rows than a block, and of none."""
    monkeypatch.setattr(triton_impl, "FEWEST_ROWS", 3)
    wanted = Case(name, columns, torch.float64).outcome(reference)
    for found, truth in zip(Case(name, columns, torch.float32).outcome(triton_impl), wanted, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=2e-4)


@pytest.mark.interpreted
def test_views_and_expanded_gradients():
    """x and h between other numbers, y whose rows overlap or are columns, a gradient of one number for all."""
    case = Case("slices, one empty", "all", torch.float32)
    wide = torch.randn(len(case.x), IN + 7, device=DEVICE)
    for y in (torch.randn(OUT, device=DEVICE).expand(len(case.x), OUT), torch.randn(OUT, len(case.x), device=DEVICE).T):
        outcomes = []
        for module, dtype in ((reference, torch.float64), (triton_impl, torch.float32)):
            x = wide.to(dtype)[:, 3:3 + IN].requires_grad_()
            factors = [[f.detach().to(dtype).requires_grad_() for f in own] for own in (case.down, case.up)]
            h = torch.nn.functional.pad(module.grouped_down(x, factors[0], case.segments), (2, 1))[:, 2:-1]
            before = y.to(dtype)
            out = module.grouped_up(before, h, factors[1], case.scales, case.segments)
            outcomes.append([t.double() for t in (out, *torch.autograd.grad(out.sum(), [x, *factors[0], *factors[1]]))])
            assert torch.equal(before, y.to(dtype)), "y that cannot be written in place is left alone"
        for truth, found in zip(*outcomes, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=2e-4)


@pytest.mark.interpreted
@pytest.mark.parametrize("wanted", ["x", "down", "up"])
def test_triton_leaves_out_gradients_that_nobody_wants(wanted, monkeypatch):
    """And what is wanted alone is what it is beside the others."""
    case, plain = (Case("indices", "q of qkv", dtype) for dtype in (torch.float32, torch.float64))
    names = ["x", "y", *(f"down{n}" for n in range(3)), *(f"up{n}" for n in range(3))]
    _, _, *truth = plain.outcome(reference)
    for leaf in [case.x, case.y, *case.down, *case.up]:
        leaf.requires_grad_(False)
    leaves = {"x": [case.x], "down": case.down, "up": case.up}[wanted]
    for leaf in leaves:
        leaf.requires_grad_()
    h = triton_impl.grouped_down(case.x, case.down, case.segments)
    out = triton_impl.grouped_up(case.y * 1, h, case.up, case.scales, case.segments, case.columns)
    found = torch.autograd.grad((out * case.pull).sum(), leaves)
    for one, want in zip(found, [t for name, t in zip(names, truth) if name.startswith(wanted)], strict=True):
        torch.testing.assert_close(one.double(), want, rtol=1e-4, atol=2e-4)


def test_scales_reach_the_device_once():
    """The host would wait for it at every linear."""
    numbers = (0.5, 2.0)
    assert triton_impl._on_device(numbers, DEVICE) is triton_impl._on_device(numbers, DEVICE)


@pytest.mark.interpreted
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
    one, two = (Segments.build([slice(0, 3)] * n, DEVICE) for n in (1, 2))
    a, b, y = torch.ones(2, 4, device=DEVICE), torch.ones(4, 2, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"\[\(2, 4\)\] for rows of 5; A is"):
        module.grouped_down(torch.ones(3, 5, device=DEVICE), [a], one)
    with pytest.raises(ValueError, match="rows up to 4 of a stream of 3; inside the stream"):
        module.grouped_down(x, [a], Segments.build([slice(0, 4)], DEVICE))
    h = module.grouped_down(x, [a], one)
    for factors, columns in (([b], (1, 4, 0)), ([b], (0, 3, 0)), ([b[:3]], None), ([torch.ones(4, 3)], None)):
        with pytest.raises(ValueError, match="for h of 2 and y of 4 columns, at .*; B is"):
            module.grouped_up(y, h, factors, [1.0], one, columns)
    with pytest.raises(ValueError, match="B is"):
        module.grouped_up(y, h, [b[:3], b], [1.0, 1.0], two, (0, 3, 0))


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="model.kernels=reference"):
        triton_impl.grouped_down(torch.ones(3, 4, dtype=torch.float64), [torch.ones(1, 4)],
                                 Segments.build([slice(0, 3)], DEVICE))
