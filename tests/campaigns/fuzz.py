"""Random hostile calls of every public function, ours against torch's, until the time is up.

    python tests/campaigns/fuzz.py --seconds 60 --seed 0

Each call draws a function, a shape (empty, odd, with too few or too many axes), dtypes, layouts, strides and
arguments, some of them wrong. Both sides must give the same shape, dtype and values within tests/tolerance.py,
gradients too, or raise the same type. Every difference is printed with lines that repeat it; exit code 1.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import convoxel  # noqa: E402
from convoxel import functional as F  # noqa: E402
from tolerance import UNIT, bound  # noqa: E402

Call = tuple[str, list[Any], dict[str, Any]]  # function, arguments, named arguments; a tensor is a Recipe
WRONG = (
    -1,
    0,
    2**45,
    2**62,
    2**63,
    1.5,
    "2",
    None,
    True,
    (),
    (1, 2, 3, 4),
    [2],
    torch.tensor(2),
    float("nan"),
)
MEMORY = 8 * 2**30
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Recipe:
    """A tensor as the text that makes it."""

    def __init__(self, dice: random.Random, shape: tuple[int, ...], dtype: torch.dtype):
        self.shape, self.dtype, self.seed = shape, dtype, dice.randrange(1000)
        self.layout = dice.choice(("contiguous",) * 4 + ("last",) * 3 + ("step", "flip", "expand", "offset"))
        self.grad = dice.random() < 0.7

    def make(self, dtype: torch.dtype | None = None) -> Tensor:
        shape, torch_seed = list(self.shape), torch.Generator().manual_seed(self.seed)
        if self.layout == "expand" and shape:
            shape[0] = min(shape[0], 1)
        if self.layout == "step" and shape:
            shape[-1] *= 2
        if self.layout == "offset" and shape:
            shape[0] += 1
        t = (
            torch.randn(shape, generator=torch_seed, dtype=torch.float64)
            .to(self.dtype)
            .to(dtype or self.dtype)
        )
        if self.layout == "last" and t.dim() in (4, 5):
            t = t.to(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
        elif self.layout == "flip":
            back = list(reversed(range(t.dim())))
            t = t.permute(back).contiguous().permute(back)
        elif self.layout == "expand" and self.shape:
            t = t.expand(self.shape)
        elif self.layout == "step" and shape:
            t = t[..., ::2]
        elif self.layout == "offset" and shape:
            t = t[1:]
        if dtype is not None:  # the reference: torch's gradients are wrong in some layouts
            t = t.contiguous()
        return t.detach().requires_grad_(self.grad and t.is_floating_point())

    def __repr__(self) -> str:
        return f"tensor({self.shape}, {self.dtype}, {self.layout!r}, grad={self.grad}, seed={self.seed})"


# Calls --------------------------------------------------------------------------------------------


def size(dice: random.Random) -> int:
    return dice.choice((1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17) if dice.random() < 0.97 else (0, 33))


def spatial(dice: random.Random, rank: int) -> tuple[int, ...]:
    return tuple(size(dice) for _ in range(rank))


def steps(dice: random.Random, rank: int, low: int, high: int) -> int | tuple[int, ...]:
    each = dice.random() < 0.4
    return tuple(dice.randint(low, high) for _ in range(rank)) if each else dice.randint(low, high)


def image(dice: random.Random, rank: int, channels: int | None = None) -> tuple[int, ...]:
    c = dice.choice((1, 2, 3, 4, 6, 8, 16, 17)) if channels is None else channels
    batch = () if dice.random() < 0.1 else (dice.choice((0, 1, 1, 2, 2, 3)),)
    return (*batch, c, *spatial(dice, rank))


def conv(dice: random.Random, dtype: torch.dtype, rank: int, transposed: bool) -> Call:
    g = dice.choice((1, 1, 1, 2, 3))
    c, k = g * dice.choice((1, 2, 3, 8, 17)), g * dice.choice((1, 2, 3, 8, 17))
    kernel = tuple(dice.choice((1, 2, 3, 3, 4)) for _ in range(rank))
    x = Recipe(dice, image(dice, rank, c), dtype)
    w = Recipe(dice, ((c, k // g) if transposed else (k, c // g)) + kernel, dtype)
    b = Recipe(dice, (k,), dtype) if dice.random() < 0.6 else None
    how: dict[str, Any] = {"stride": steps(dice, rank, 1, 3), "padding": steps(dice, rank, 0, 2),
                           "dilation": steps(dice, rank, 1, 2), "groups": g}  # fmt: skip
    if transposed and dice.random() < 0.4:
        how["output_padding"] = steps(dice, rank, 0, 1)
    if not transposed and dice.random() < 0.15:
        how["padding"] = dice.choice(("same", "valid"))
    return f"conv_transpose{rank}d" if transposed else f"conv{rank}d", [x, w, b], how


def linear(dice: random.Random, dtype: torch.dtype, rank: int) -> Call:
    c, k = size(dice), size(dice)
    x = Recipe(dice, (*spatial(dice, dice.randint(0, rank)), c), dtype)
    w = Recipe(dice, (k, c) if dice.random() < 0.9 else (c,), dtype)
    return (
        "linear",
        [x, w, Recipe(dice, (k,), dtype) if dice.random() < 0.5 and len(w.shape) == 2 else None],
        {},
    )


def pool(dice: random.Random, dtype: torch.dtype, rank: int) -> Call:
    kind, x = (
        dice.choice(("max", "avg", "adaptive_avg", "adaptive_max")),
        Recipe(dice, image(dice, rank), dtype),
    )
    if kind.startswith("adaptive"):
        how: dict[str, Any] = {"output_size": steps(dice, rank, 1, 6)}
    else:
        how = {"kernel_size": steps(dice, rank, 1, 4), "padding": steps(dice, rank, 0, 1),
               "ceil_mode": dice.random() < 0.3}  # fmt: skip
        if dice.random() < 0.6:
            how["stride"] = steps(dice, rank, 1, 3)
    if kind == "max" and dice.random() < 0.3:
        how["dilation"] = steps(dice, rank, 1, 2)
    if kind == "avg" and dice.random() < 0.4:
        how["count_include_pad"] = False
    if kind == "avg" and rank > 1 and dice.random() < 0.2:
        how["divisor_override"] = dice.choice((1, 3, -2))
    if "max" in kind and dice.random() < 0.4:
        how["return_indices"] = True
    return f"{kind}_pool{rank}d", [x], how


def norm(dice: random.Random, dtype: torch.dtype, rank: int) -> Call:
    kind = dice.choice(("batch", "instance", "group", "layer"))
    shape = image(dice, rank)
    x, c = Recipe(dice, shape, dtype), shape[1]

    def vector(shape: tuple[int, ...] = (c,)) -> Recipe | None:
        wide = torch.float32 if dtype == torch.bfloat16 and dice.random() < 0.5 else dtype
        return Recipe(dice, shape, wide) if dice.random() < 0.6 else None

    how: dict[str, Any] = {"eps": dice.choice((1e-5, 1e-3))}
    if kind == "layer":
        inner = shape[-dice.randint(1, len(shape)) :]
        return "layer_norm", [x, list(inner), vector(inner), vector(inner)], how
    if kind == "group":
        w = vector()  # torch has no gradient of a bias without a weight
        return "group_norm", [x, dice.choice((1, 1, 2, c)), w, w], how
    how["training" if kind == "batch" else "use_input_stats"] = True
    return f"{kind}_norm", [x, None, None, vector(), vector()], how


def interpolate(dice: random.Random, dtype: torch.dtype, rank: int) -> Call:
    mode = dice.choice(("nearest", "nearest-exact", LINEAR[rank], LINEAR[rank], LINEAR[1 + rank % 3]))
    how: dict[str, Any] = {"mode": mode}
    if dice.random() < 0.5:
        how["size"] = steps(dice, rank, 1, 12)
    else:
        factor = [dice.choice((0.5, 1, 1.3, 2, 2.0, 3)) for _ in range(rank)]
        how["scale_factor"] = factor if dice.random() < 0.5 else factor[0]
        if dice.random() < 0.2:
            how["recompute_scale_factor"] = True
    if "linear" in mode and dice.random() < 0.4:
        how["align_corners"] = dice.random() < 0.7
    return "interpolate", [Recipe(dice, image(dice, rank), dtype)], how


def activation(dice: random.Random, dtype: torch.dtype, rank: int) -> Call:
    x = Recipe(dice, spatial(dice, dice.randint(0, rank + 2)), dtype)
    how: dict[str, Any] = {"inplace": dice.random() < 0.2}
    if dice.random() < 0.5:
        return "relu", [x], how
    return "leaky_relu", [x], {**how, "negative_slope": dice.choice((0.01, 0.0, 1, 2.5, -0.5))}


KINDS: tuple[Callable[[random.Random, torch.dtype, int], Call], ...] = (
    lambda dice, dtype, rank: conv(dice, dtype, rank, False),
    lambda dice, dtype, rank: conv(dice, dtype, rank, True),
    linear, pool, norm, interpolate, activation,
)  # fmt: skip


def spoil(dice: random.Random, call: Call) -> Call:
    """One argument replaced by a wrong one, or a tensor by one of another shape, axis or dtype."""
    name, args, named = call
    tensors = [i for i, a in enumerate(args) if isinstance(a, Recipe)]
    if named and dice.random() < 0.6:
        key = dice.choice([*named])
        wrong = dice.choice(WRONG)
        if name == "max_pool1d" and isinstance(wrong, int) and wrong > 2**40:
            wrong = 0  # torch loops over a kernel of 2^62
        return name, args, {**named, key: wrong}
    i = dice.choice(tensors)
    old, args = args[i], list(args)
    axes = list(old.shape)
    how = dice.randrange(5)
    if how == 0 and axes:
        axes[dice.randrange(len(axes))] += dice.choice((1, 2))
    elif how == 1 and axes:
        axes[dice.randrange(len(axes))] = 0
    elif how == 2:
        axes.insert(dice.randint(0, len(axes)), dice.choice((1, 2)))
    elif how == 3 and axes:
        del axes[dice.randrange(len(axes))]
    dtype = dice.choice((torch.float64, torch.float16, torch.int64, torch.bool)) if how == 4 else old.dtype
    args[i] = Recipe(dice, tuple(axes), dtype) if dice.random() < 0.95 else dice.choice((None, 3, [1.0]))
    return name, args, named


def draw(dice: random.Random) -> tuple[Call, Call]:
    """A call, and what it was before it was spoilt."""
    dtype = dice.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
    call = dice.choice(KINDS)(dice, dtype, dice.randint(1, 3))
    return (spoil(dice, call) if dice.random() < 0.35 else call), call


# Comparison ---------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """y (and indices), then the gradients for a fixed dy; `error` is what the call raised, `backward` what its
    gradient did."""

    tensors: list[Tensor]
    error: Exception | None = None
    backward: Exception | None = None

    def __str__(self) -> str:
        return repr(self.error or self.backward)[:300] if self.error or self.backward else "a result"


def run(module: Any, call: Call, dtype: torch.dtype | None = None) -> Outcome:
    name, args, named = call
    low = (
        module is T
        and name.startswith("conv_transpose")
        and {getattr(a, "dtype", torch.bfloat16) for a in args} == {torch.bfloat16}
    )
    if low and dtype is None:  # torch crashes in some of these
        rounded = run(T, call, torch.float32)
        rounded.tensors = [t.bfloat16() for t in rounded.tensors]
        return rounded
    made = [a.make(dtype) if isinstance(a, Recipe) else a for a in args]
    if name == "group_norm" and isinstance(made[0], Tensor) and made[0].is_floating_point():
        made[0].requires_grad_()  # torch crashes where the weights alone want a gradient
    leaves = [t for t in made if isinstance(t, Tensor) and t.requires_grad]
    if named.get("inplace") and isinstance(made[0], Tensor):
        made[0] = made[0].clone()
    try:
        out = getattr(module, name)(*made, **named)
    except Exception as error:
        return Outcome([], error)
    outcome = Outcome(list(out) if isinstance(out, tuple) else [out])
    y = outcome.tensors[0]
    if leaves and y.requires_grad:
        try:
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
            grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
        except Exception as error:
            outcome.backward = error
        else:
            outcome.tensors += [g for g in grads if g is not None]
    return outcome


# In torch's messages: what it lacks, where it fails itself, and what it says of sizes beyond it.
TORCHS_OWN = (
    "INTERNAL ASSERT",
    "not implemented for 'BFloat16'",
    "verflow",
    "Input dimension should be at least",
    "Unsupported memory format",
    "cannot convert float",
    "can't allocate memory",
)


def known(call: Call, ours: Outcome, theirs: Outcome) -> bool:
    """Where the exceptions differ on purpose: torch is inconsistent, crashes or lacks a kernel."""
    name, args, named = call
    say, theirs_say = str(ours.error), str(theirs.error)
    if theirs.backward is not None:  # a gradient that torch lacks
        return ours.backward is None
    if not isinstance(args[0], Recipe):  # torch: AttributeError: 'int' object has no attribute 'dim'
        return isinstance(ours.error, TypeError)
    if any(words in theirs_say for words in TORCHS_OWN):
        return True
    if ours.error is None and len(args) > 1 and isinstance(args[1], Recipe) and 0 in args[1].shape:
        return True  # no output channels
    if name.endswith("norm") and isinstance(theirs.error, IndexError):  # torch's statistics of nothing
        return ours.error is None or isinstance(ours.error, RuntimeError)
    if not isinstance(ours.error, RuntimeError) or theirs.error is not None:
        return False
    # Torch gives a result and we refuse:
    if any(isinstance(n, int) and n > 2**40 for value in named.values() for n in numbers(value)):
        return True  # its sizes overflowed
    if args[0].shape[:1] == (0,) and 0 in args[0].shape[2:]:
        return True  # no images, of no voxels
    if name.startswith("adaptive_avg"):
        return numbers(named["output_size"])[0] == 1  # a mean of tensors of any rank
    if name == "instance_norm":
        return "should be a vector" in say  # it repeats its weights, to no channels too
    if name.startswith("conv"):  # some of its backends take a dilation of 0, and give empty outputs
        return "non-positive stride" in say and 0 in numbers(named["dilation"]) or "too small" in say
    return name == "linear" and "same dtype" in say  # it mixes them for some strides


def numbers(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def two_faults(call: Call, intact: Call, ours: Outcome, theirs: Outcome) -> bool:
    """Whether torch rejects more than the one argument that was spoilt: then another fault may be named, and an
    empty batch, for which torch returns early, may not hide one."""
    if ours.error is None:
        return False
    if theirs.error is not None and run(T, intact).error is not None:
        return True
    x = call[1][0]
    if not isinstance(x, Recipe) or 0 not in x.shape:
        return False
    filled = copy.copy(x)
    filled.shape = tuple(n or 2 for n in x.shape)
    return theirs.error is not None or run(T, (call[0], [filled, *call[1][1:]], call[2])).error is not None


def difference(call: Call, intact: Call) -> str | None:
    """What is not as torch has it, or None."""
    ours, theirs = run(F, call), run(T, call)
    for mine, other in ((ours.error, theirs.error), (ours.backward, theirs.backward)):
        if type(mine) is not type(other):
            on_purpose = known(call, ours, theirs) or two_faults(call, intact, ours, theirs)
            return None if on_purpose else f"ours  {ours}\n    torch {theirs}"
        if mine is not None:
            return None if str(mine).strip() else f"no message in {mine!r}"
    if len(ours.tensors) != len(theirs.tensors):
        return f"{len(ours.tensors)} results and gradients, torch has {len(theirs.tensors)}"
    exact = run(T, call, torch.float64).tensors
    if len(exact) != len(theirs.tensors) or "nearest" in str(
        call[2].get("mode")
    ):  # whose rounding has layouts
        exact = theirs.tensors
    for i, tensors in enumerate(zip(ours.tensors, theirs.tensors, exact, strict=True)):
        if i and not torch_is_right(call):
            break
        if wrong := wrong_tensor(*tensors):
            return f"result {i}: {wrong}"
    return wrong_layout(call, ours.tensors[0])


def torch_is_right(call: Call) -> bool:
    """About gradients: that of nearest with a factor is not the adjoint of its forward where an extent stays, and
    group norm's of no pixels is NaN."""
    name, args, named = call
    nearest = name == "interpolate" and "nearest" in str(named["mode"]) and "scale_factor" in named
    return not nearest and not (name == "group_norm" and 0 in args[0].shape)


def wrong_tensor(ours: Tensor, theirs: Tensor, exact: Tensor) -> str | None:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{tuple(ours.shape)} {ours.dtype}, torch {tuple(theirs.shape)} {theirs.dtype}"
    if ours.dtype not in UNIT:
        return None if torch.equal(ours, theirs) else "other integers"
    if not torch.equal(ours.isnan(), exact.isnan()):  # torch's bfloat16 gradients can be memory never written
        return "NaN at other places"
    if not ours.numel():
        return None
    error, torchs = (
        (t.double() - exact.double()).nan_to_num(0, 0, 0).abs().max().item() for t in (ours, theirs)
    )
    # Relative to the largest value: a few thousand products, all of them normal.
    size = 1 + exact.double().nan_to_num(0, 0, 0).abs().max().item()
    if size < 1 + 1e-9:  # a norm of single values: what cancels was multiplied by 1 / sqrt(eps)
        size = 400.0
    if error > 2 * min(torchs, 0.01 * size) + 4 * bound(ours.dtype, 4096) * size:
        return f"error {error:.2e} against float64, torch's {torchs:.2e}"
    return None


def wrong_layout(call: Call, y: Tensor) -> str | None:
    """Contiguous in, contiguous out; channels-last in, channels-last out."""
    name, args, _ = call
    unbatched = name[-2:] in ("2d", "3d") and y.dim() < int(name[-2]) + 2
    if (
        y.numel() == 0
        or y.dtype not in UNIT
        or y.dim() not in (4, 5)
        or unbatched
        or name in ("linear", "layer_norm")
    ):
        return None
    layouts = {a.layout for a in args if isinstance(a, Recipe) and len(a.shape) == y.dim()}
    last = torch.channels_last if y.dim() == 4 else torch.channels_last_3d
    wanted = {"contiguous": torch.contiguous_format, "last": last}.get("".join(layouts))
    if wanted is not None and not y.is_contiguous(memory_format=wanted):
        return f"layout {layouts} became strides {y.stride()} for {tuple(y.shape)}"
    return None


def shown(call: Call) -> str:
    name, args, named = call
    return f"{name}({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in named.items())])})"


def worker(seed: int, first: int, seconds: float, only: bool, ours: bool, mark: Path) -> None:
    """Calls from number `first` on; `mark` says where it is, for the parent if this process dies. Exits with 1
    if any differs."""
    warnings.simplefilter("ignore")
    if not ours:  # a hostile size is refused, not granted; a sanitizer's own memory is terabytes
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    end, number, failures, isas = time.monotonic() + seconds, first, 0, convoxel.isas()
    while number == first or time.monotonic() < end and not only:
        dice = random.Random(f"{seed} {number}")
        convoxel.set_isa(dice.choice(isas))
        call, intact = draw(dice)
        mark.write_text(f"{number}\n{shown(call)}  on {convoxel.isa()}")
        if only:
            print(shown(call))
        if ours:
            run(F, call)
        elif wrong := difference(call, intact):
            failures += 1
            print(
                f"\n{shown(call)}  on {convoxel.isa()}\n    {wrong}\n    --seed {seed} --only {number}",
                flush=True,
            )
        number += 1
    served = {name: row["served"] for name, row in convoxel.stats().items() if row["served"]}
    print("\nkernels run: " + ", ".join(f"{name} {n}" for name, n in sorted(served.items())), flush=True)
    sys.exit(1 if failures else 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ours", action="store_true", help="run ours alone, for sanitizers: compare nothing")
    parser.add_argument("--only", type=int, help="repeat this call of the seed alone, and print it")
    args = parser.parse_args()
    end, number, failures = time.monotonic() + args.seconds, args.only or 0, 0
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "call"
        while True:
            left = end - time.monotonic()
            how = (args.seed, number, left, args.only is not None, args.ours, mark)
            process = multiprocessing.get_context("spawn").Process(target=worker, args=how)
            process.start()
            process.join()
            at, call = mark.read_text().split("\n")
            number, failures = int(at) + 1, failures + (process.exitcode != 0)
            killed = process.exitcode not in (0, 1)
            if killed:
                print(f"\n{call}\n    killed the process, exit code {process.exitcode}\n"
                      f"    --seed {args.seed} --only {at}", flush=True)  # fmt: skip
            if not killed or args.only is not None or time.monotonic() > end:
                break
    verdict = "some differ from torch" if failures else "none differs from torch"
    if args.ours:
        verdict = "some did not end" if failures else "all ran to their end"
    print(f"{number} calls, seed {args.seed}: {verdict}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
