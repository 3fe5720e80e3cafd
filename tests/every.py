"""One small call of every function of contract C1, for what must hold of all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from convoxel import functional as F


@dataclass(frozen=True)
class Call:
    name: str  # in torch.nn.functional
    call: Callable[..., Any]  # of a module with that name, and of tensors
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return self.name

    @property
    def served(self) -> bool:
        return getattr(F, self.name) is not getattr(T, self.name)

    def tensors(self, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
        return [torch.randn(s).to(dtype).requires_grad_(grad) for s in self.shapes]

    def __call__(self, module: Any, *tensors: Tensor) -> Tensor:
        return self.call(module, *tensors)

    def results(self, module: Any, *tensors: Tensor) -> list[Tensor]:
        """y, and the gradients of sum(y^2) that the tensors ask for."""
        y = self(module, *tensors)
        leaves = [t for t in tensors if t.requires_grad]
        return [y.detach(), *(torch.autograd.grad(y.square().sum(), leaves) if leaves else [])]


SPATIAL = {1: (13,), 2: (9, 10), 3: (6, 7, 8)}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def _calls() -> list[Call]:
    calls = [Call("linear", lambda m, x, w, b: m.linear(x, w, b), ((5, 4), (3, 4), (3,)))]
    for rank, size in SPATIAL.items():
        x, one = (2, 4, *size), (2,) * rank
        w, b = (6, 2, *(3,) * rank), (6,)

        def add(name: str, call: Callable[..., Any], *shapes: tuple[int, ...], rank: int = rank) -> None:
            def at_rank(m: Any, *t: Tensor) -> Tensor:
                return call(getattr(m, f"{name}{rank}d"), *t)

            calls.append(Call(f"{name}{rank}d", at_rank, shapes))

        add("conv", lambda f, x, w, b: f(x, w, b, 2, 1, 1, 2), x, w, b)
        add("conv_transpose", lambda f, x, w, b: f(x, w, b, 2, 1, 1), x, (4, 3, *(3,) * rank), (3,))
        add("max_pool", lambda f, x: f(x, 3, 2, 1), x)
        add("max_pool", lambda f, x: f(x, 2, return_indices=True)[0], x)
        add("avg_pool", lambda f, x: f(x, 3, 2, 1), x)
        add("adaptive_avg_pool", lambda f, x: f(x, 4), x)
        add("adaptive_max_pool", lambda f, x: f(x, 4), x)
        calls.append(
            Call("batch_norm", lambda m, x, w, b: m.batch_norm(x, None, None, w, b, True), (x, (4,), (4,)))
        )
        calls.append(Call("instance_norm", lambda m, x: m.instance_norm(x), (x,)))
        calls.append(Call("group_norm", lambda m, x, w, b: m.group_norm(x, 2, w, b), (x, (4,), (4,))))
        for mode in ("nearest", "nearest-exact", LINEAR[rank]):
            how = {"scale_factor": one, "mode": mode}
            calls.append(Call("interpolate", lambda m, x, how=how: m.interpolate(x, **how), (x,)))
    calls.append(
        Call(
            "layer_norm", lambda m, x, w, b: m.layer_norm(x, (9, 10), w, b), ((2, 4, 9, 10), (9, 10), (9, 10))
        )
    )
    calls.append(Call("relu", lambda m, x: m.relu(x), ((3, 4, 5),)))
    calls.append(Call("leaky_relu", lambda m, x: m.leaky_relu(x, 0.1), ((3, 4, 5),)))
    return calls


ALL = _calls()
EVERY = [c for c in ALL if c.served]
ONE_OF_EACH = list({c.name: c for c in EVERY}.values())
