"""How many rows the head is multiplied with: logits of T tokens are T rows, the gradient of T hidden states T more."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class HeadProducts(TorchDispatchMode):
    """Adds up ``rows`` of all matrix products with a head of [V, H], whichever way round.

    V must be a size that nothing but the vocabulary has.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if "mm" in func.name().split("::")[1].split(".")[0]:
            left, right = [a for a in args if isinstance(a, Tensor)][-2:]
            if self.vocabulary in right.shape:
                self.rows += left.shape[:-1].numel()
        return func(*args, **(kwargs or {}))

    def of(self, work: Callable[[], Any]) -> tuple[Any, int]:
        """What a piece of work returns, and its rows."""
        before = self.rows
        with self:
            found = work()
        return found, self.rows - before
