"""Saving less for the backward pass: how a tensor was made, instead of the tensor.

A convolution needs its input x for the weights' gradient. Where x is act(norm(raw) (+ residual)), that norm keeps raw
for a gradient of its own, so the convolution keeps raw too, not x, and makes x again, by the same kernel and therefore
bit for bit, when its gradient is asked for: of two full tensors a block, one is left. The same holds for an activation
behind a norm, which needs no more than the signs of x, and for a concatenation of such tensors, and for a
transposed convolution whose kernel is as wide as its stride: one product a voxel and channel makes its output again.

A node of the graph that can do so carries `made`. Everything else is saved as ever, and so is x wherever a step in
between could go unseen: x modified in place, hooks on saved tensors (checkpointing, offloading), transforms, compiling.
A stretch of the network that checkpointing runs twice can be declared one (`Run`): the same holds inside it.
A tensor still alive in backward is taken as it is. What is kept is under torch's own watch: who modifies raw, or the
norm's parameters, between forward and backward gets torch's error.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .library import _real, from_3d, to_3d

Tensors = Sequence[Tensor | None]


@dataclass(frozen=True)
class Block:
    """y = act(z), z = norm(x) (+ residual), of (x, w, b, slopes, residual, mean, var)."""

    groups: int
    over_batch: bool
    fixed: bool
    eps: float
    kind: str = "identity"
    alpha: float = 0.0
    rounded: bool = False  # z was stored, in bfloat16, before it was activated

    def make(self, tensors: Tensors) -> Tensor:
        """y; differentiable where gradients are on."""
        kind = "identity" if self.rounded else self.kind
        how = (self.groups, self.over_batch, self.fixed, self.eps, kind, self.alpha)
        y = torch.ops.convoxel.norm_act.default(*tensors, *how)[0]
        if not self.rounded:
            return y
        if torch.is_grad_enabled():
            ops = torch.ops.convoxel
            return ops.relu.default(y) if self.kind == "relu" else ops.leaky_relu.default(y, self.alpha)
        torch.ops.convoxel.activation_.default(y, self.kind == "relu", self.alpha)
        return y

    def activated(self, kind: str, alpha: float, dtype: torch.dtype) -> Block:
        """The same with an activation behind it."""
        how = (self.groups, self.over_batch, self.fixed, self.eps)
        return Block(*how, kind, alpha, rounded=dtype == torch.bfloat16)

    def dz(self, dy: Tensor, tensors: Tensors) -> Tensor:
        """The gradient of z."""
        how = (self.groups, self.over_batch, self.fixed, self.eps, self.kind, self.alpha)
        return torch.ops.convoxel.norm_act_backward.default(dy, *tensors, *how, False, False, False, True)[4]


class Run:
    """`with` it inside torch.utils.checkpoint (its `context_fn`): one of the two runs of a stretch of the network.

    torch wants both runs to save tensors of the same shapes in the same order, and keeps only the second's. So both
    save the same recipes, of what was made inside the stretch; what came from outside is no recipe, for what that was
    made of may be the second run of another stretch. In the first, `blank`s stand for what nobody keeps.
    """

    def __init__(self, stretch: object, first: bool) -> None:
        self.stretch, self.first, self.hooks = stretch, first, None

    def __enter__(self) -> None:
        self.hooks, self.before = _hooks(), _now.run
        _now.run = self

    def __exit__(self, *_: object) -> None:
        _now.run, self.hooks = self.before, None  # the hooks hold the stretch's inputs, and it them


class _Now(threading.local):
    run: Run | None = None


_now = _Now()


def _hooks() -> Any:
    """The saved tensors' hooks that are on now; None without."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _stretch() -> object:
    """Of the run that is on now; None outside."""
    return None if _now.run is None else _now.run.stretch


def blank(t: Tensor | None) -> Tensor | None:
    """One element that has the shape of t."""
    return None if t is None else t.new_empty(()).expand(t.shape)


def possible(y: Tensor) -> bool:
    """Whether y's making can be repeated unseen."""
    return (
        _real(y)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and _hooks() == (None if _now.run is None else _now.run.hooks)
    )


class State:
    """What a tensor was, to tell whether it still is: its version and its memory."""

    def __init__(self, y: Tensor) -> None:
        self.version, self.pointer = y._version, y.data_ptr()

    def holds(self, y: Tensor) -> bool:
        return y._version == self.version and y.data_ptr() == self.pointer


class Made:
    """Carried by a node of the graph: its output is `how.make(tensors(what it saved))`."""

    def __init__(self, y: Tensor, how: Recipe, saves: Tensors, tensors: Callable[[Tensors], Tensors]) -> None:
        self.state, self.how, self.tensors, self.stretch = State(y), how, tensors, _stretch()
        self.blanks = [blank(t) for t in saves] if _now.run is not None and _now.run.first else None

    def recipe(self, node: Any) -> tuple[Recipe, Tensors]:
        return self.how, self.tensors(node.saved_tensors if self.blanks is None else self.blanks)


class Joined:
    """Carried by the node of a concatenation: what its parts are made of, held for as long as y lives."""

    def __init__(self, y: Tensor, parts: Sequence[Kept], dim: int) -> None:
        self.join, taken = Join.of(parts, dim)
        held = [(t, None if t is None else State(t)) for t in taken]
        self.state, self.held, self.stretch = State(y), held, _stretch()
        self.alive = weakref.ref(y, lambda _: held.clear())

    def recipe(self, node: Any) -> tuple[Recipe, Tensors] | None:
        if any(t is not None and s is not None and not s.holds(t) for t, s in self.held):
            return None
        return self.join, [t for t, _ in self.held]


@dataclass(frozen=True)
class Join:
    """y = the parts side by side, each with its number of saved tensors."""

    parts: list[Kept]
    counts: list[int]
    dim: int

    @staticmethod
    def of(parts: Sequence[Kept], dim: int) -> tuple[Join, Tensors]:
        """It, and what to save for it."""
        taken = [part.take() for part in parts]
        return Join(list(parts), [len(some) for some in taken], dim), [t for some in taken for t in some]

    def parts_of(self, tensors: Tensors) -> list[Tensor]:
        rest = iter(tensors)
        return [k.give([next(rest) for _ in range(n)]) for k, n in zip(self.parts, self.counts, strict=True)]

    def make(self, tensors: Tensors) -> Tensor:
        return torch.ops.convoxel.cat.default(self.parts_of(tensors), self.dim)


@dataclass(frozen=True)
class Upsampled:
    """y = a transposed convolution of (w, b, what x is made of)."""

    x: Kept
    how: tuple[Any, ...]

    def make(self, tensors: Tensors) -> Tensor:
        w, b, *kept = tensors
        return torch.ops.convoxel.conv_input_grad.default(self.x.give(kept), w, b, *self.how)


Recipe = Block | Join | Upsampled


def save(
    node: Any, y: Tensor, how: Recipe, saves: Tensors, tensors: Callable[[Tensors], Tensors] = lambda t: t
) -> None:
    """In setup_context: the node saves these for backward, and y is what `how` makes of `tensors(saves)`."""
    node.save_for_backward(*saves)
    if possible(y):
        node.made = Made(y, how, saves, tensors)


def remember_parts(y: Tensor, parts: Sequence[Tensor], dim: int) -> None:
    """y is the parts side by side; forgotten where none of them can be made again, so that nothing is gained."""
    if y.grad_fn is None or not possible(y):
        return
    kept = [Kept(part) for part in parts]
    if any(part.how for part in kept):
        y.grad_fn.made = Joined(y, kept, dim)  # type: ignore[attr-defined]


def recipe(y: Tensor) -> tuple[Recipe, Tensors] | None:
    """How y was made, and of what; None where that is unknown, or y is no longer what was made."""
    made = getattr(y.grad_fn, "made", None)
    if not isinstance(made, (Made, Joined)) or not possible(y) or not made.state.holds(y):
        return None
    if made.stretch is not _stretch():
        return None
    try:
        return made.recipe(y.grad_fn)
    except RuntimeError:  # freed by a backward pass, or modified since
        return None


def pre_activation(x: Tensor) -> tuple[Block, Tensors] | None:
    """The recipe of x where it is a norm without activation, in a tensor of its own."""
    found = None if x._is_view() else recipe(x)
    if found is None or not isinstance(found[0], Block) or found[0].kind != "identity":
        return None
    return found[0], found[1]


class Kept:
    """A tensor that a node needs in backward. `ctx.save_for_backward(*kept.take())`, then `kept.give(saved)`."""

    def __init__(self, x: Tensor) -> None:
        self.how: Recipe | None = None
        self.save: Tensors = [x]
        y = x._base if x._is_view() else x
        if y is None or y.grad_fn is None or not possible(y) or not self._seen_through(x, y):
            return
        found = recipe(y)
        if found is not None:
            self.how, self.save = found
            self.alive, self.state = TensorWeakRef(y), State(y)

    def _seen_through(self, x: Tensor, y: Tensor) -> bool:
        """Whether x is y, or y with unit axes put in or left out between C and the extents."""
        self.rank = x.dim() - 2
        view = self._view(y)
        return view.shape == x.shape and view.stride() == x.stride() and view.data_ptr() == x.data_ptr()

    def _view(self, y: Tensor) -> Tensor:
        if y.dim() < self.rank + 2:
            return to_3d(y)
        return from_3d(y, self.rank, True) if y.dim() > self.rank + 2 > 2 else y

    def take(self) -> Tensors:
        """What to save; from now on it is held there only."""
        taken, self.save = self.save, ()
        return taken

    def give(self, saved: Tensors) -> Tensor:
        """The tensor; differentiable where gradients are on."""
        if self.how is None:
            (x,) = saved
            return x  # type: ignore[return-value]
        y = self.alive()
        if y is None or not self.state.holds(y):
            y = self.how.make(saved)
        return self._view(y)
