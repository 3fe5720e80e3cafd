"""The shape rules, written once, and the `Problem` string that names one call.

Everything here is integer arithmetic on sizes (symbolic sizes included): the public functions use it for
their errors, the fake kernels for their shapes, the benchmark for its FLOPs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Ints = Sequence[int]

SPATIAL_NAMES = {1: "W", 2: "H, W", 3: "D, H, W"}


def is_integer(value: Any) -> bool:
    """Whether torch takes it for an int: numpy's and 0-dimensional integer tensors too, never a bool."""
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and not value.is_floating_point() and value.dtype != torch.bool
    return isinstance(value, torch.SymInt) or (hasattr(value, "__index__") and not isinstance(value, bool))


def as_tuple(value: Any, rank: int, what: str, name: str) -> tuple[int, ...]:
    """`value` once for each of `rank` axes: 3 -> (3, 3, 3); (1, 2, 2) stays.

    Raises TypeError for anything but integers, ValueError beyond 64 bits, RuntimeError for a wrong count, all as
    torch does.
    """
    if type(value) is int and abs(value) < 2**63:  # nearly every call, without the checks of the others
        return (value,) * rank
    if is_integer(value):
        value = (value,) * rank
    if not isinstance(value, (tuple, list, torch.Size)) or not all(map(is_integer, value)):
        raise TypeError(f"{what}: {name} must be an int or a tuple of {rank} ints, got {value!r}")
    value = [v if isinstance(v, torch.SymInt) else int(v) for v in value]
    if any(isinstance(v, int) and abs(v) >= 2**63 for v in value):
        raise ValueError(f"{what}: {name} must fit in 64 bits, got {value!r}")
    if len(value) == 1:
        return tuple(value) * rank
    if len(value) != rank:
        raise RuntimeError(
            f"{what}: {name} must have 1 or {rank} entries, one for each of {SPATIAL_NAMES[rank]}, "
            f"got {len(value)}: {tuple(value)}"
        )
    return tuple(value)


def check_bool(name: str, what: str, value: Any) -> bool:
    """`value`, TypeError unless it is a bool, as torch asks for."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}(): argument '{what}' must be bool, not {type(value).__name__}")
    return value


def check_float(name: str, what: str, value: Any) -> float:
    """`value` as a float, TypeError unless it is a number (0-dimensional tensors and numpy's too)."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if isinstance(value, torch.Tensor) and value.dim() or not hasattr(value, "__float__"):
        raise TypeError(f"{name}(): argument '{what}' must be float, not {type(value).__name__}")
    return float(value)


def lift(values: Sequence[int], fill: int) -> tuple[int, ...]:
    """A 1-D or 2-D tuple as (D, H, W): (3, 5), 1 -> (1, 3, 5)."""
    return (fill,) * (3 - len(values)) + tuple(values)


def conv_out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output extent of one axis, in voxels: 5, kernel 3, stride 2, padding 1, dilation 1 -> 3."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv_transpose_out_size(
    size: int, kernel: int, stride: int, padding: int, output_padding: int, dilation: int
) -> int:
    """Output extent of one axis of a transposed convolution: 3, kernel 2, stride 2 -> 6."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1


def pool_out_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False
) -> int:
    """Output extent of one axis of a pooling, by torch's rule: with `ceil_mode` a last window may start
    inside the input or its left padding, never in the right padding. 5, kernel 2, stride 2 -> 2 (3)."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1
    return out


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether torch takes x (4-D or 5-D) for channels-last: its strides rise in the order C, W, H, D, N.

    Where both layouts fit (one channel, one pixel) the strides decide, as in torch's
    `suggest_memory_format`; outputs follow this rule, in the fake and in the real kernels.
    """
    if x.dim() not in (4, 5) or x.stride(1) == 0:
        return False
    least = 0
    for axis in (1, *range(x.dim() - 1, 1, -1), 0):
        size, stride = x.shape[axis], x.stride(axis)
        if size == 0 or stride < least or (axis == 0 and least == x.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def memory_format(last: bool, rank: int = 5) -> torch.memory_format:
    if not last:
        return torch.contiguous_format
    return torch.channels_last_3d if rank == 5 else torch.channels_last


# What a Problem may name, each with the letters that it takes.
OPS = {
    "conv": "nckifspdg",
    "conv_transpose": "nckifspdog",
    "linear": "nck",
    "batch_norm": "nci",
    "instance_norm": "nci",
    "group_norm": "ncig",
    "relu": "nci",
    "leaky_relu": "nci",
    "max_pool": "ncifspd",
    "avg_pool": "ncifsp",
    "interpolate": "ncis",
}
POOLS = ("max_pool", "avg_pool")
NORMS = ("batch_norm", "instance_norm", "group_norm")


@dataclass(frozen=True)
class Problem:
    """One call as one string that can be pasted: into a test, a benchmark, a bug report.

    >>> p = Problem.parse("conv n1 c32 k64 i128x128x128 f3x3x3 s2x2x2 p1x1x1 bf16")
    >>> p.y_shape
    (1, 64, 64, 64, 64)
    >>> str(p)
    'conv n1 c32 k64 i128x128x128 f3x3x3 s2x2x2 p1x1x1 bf16'

    The first word is one of `OPS`. n: images (linear: rows), c: input channels, k: output channels (conv and
    linear), i: input extents in voxels, f: kernel, s: stride (pools: f if unsaid; interpolate: how many times
    larger), p: padding, d: dilation, o: output padding (transposed only), g: groups, `nobias` (norms: neither
    weight nor bias), `last` (channels-last), `nearest` (interpolate, which is linear otherwise), and f32 (default),
    bf16 or f64. Extents have one, two or three axes, in the order D, H, W; linear has none. Norms use the
    statistics of x.
    """

    op: str = "conv"
    n: int = 1
    c: int = 1
    k: int = 1
    i: tuple[int, ...] = (1, 1, 1)
    f: tuple[int, ...] = (1, 1, 1)
    s: tuple[int, ...] = (1, 1, 1)
    p: tuple[int, ...] = (0, 0, 0)
    d: tuple[int, ...] = (1, 1, 1)
    o: tuple[int, ...] = (0, 0, 0)
    g: int = 1
    bias: bool = True
    last: bool = False
    dtype: str = "f32"
    nearest: bool = False

    DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}

    @property
    def rank(self) -> int:
        return len(self.i)

    @property
    def convolves(self) -> bool:
        """Whether it is a sum of products with a weight (K, C, ...): conv, conv_transpose, linear."""
        return "k" in OPS[self.op]

    @property
    def transposed(self) -> bool:
        return self.op == "conv_transpose"

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.DTYPES[self.dtype]

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.n, self.c, *self.i)

    @property
    def w_shape(self) -> tuple[int, ...]:
        """Of the weight; () where the operator has none."""
        if not self.convolves:
            return (self.c,) if self.op in NORMS and self.bias else ()
        pair = (self.c, self.k // self.g) if self.transposed else (self.k, self.c // self.g)
        return (*pair, *self.f)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Of the bias; () where there is none."""
        if not self.bias or not (self.convolves or self.op in NORMS):
            return ()
        return (self.k,)

    @property
    def y_shape(self) -> tuple[int, ...]:
        if self.transposed:
            axes = zip(self.i, self.f, self.s, self.p, self.o, self.d, strict=True)
            return (self.n, self.k, *(conv_transpose_out_size(*a) for a in axes))
        if self.op == "interpolate":
            return (self.n, self.k, *(n * s for n, s in zip(self.i, self.s, strict=True)))
        # with their kernel 1, stride 1 and padding 0, norms and activations keep the size
        axes4 = zip(self.i, self.f, self.s, self.p, self.d, strict=True)
        return (self.n, self.k, *(conv_out_size(*a) for a in axes4))

    @property
    def flops(self) -> int:
        """Multiplications and additions of the definition of a convolution or a linear layer, padding counted as
        torch counts it; of the others 0, since memory bounds them."""
        if not self.convolves:
            return 0
        pixels = math.prod(self.i if self.transposed else self.y_shape[2:])
        return 2 * self.n * pixels * math.prod(self.f) * self.c * self.k // self.g

    @classmethod
    def parse(cls, text: str) -> Problem:
        """The Problem of a string; ValueError names the word that is not understood."""
        op, *words = text.split() or [""]
        if op not in OPS:
            raise ValueError(f"problem '{text}': starts with '{op}', expected one of {', '.join(OPS)}")
        fields: dict[str, Any] = {}
        for word in words:
            match = re.fullmatch(rf"([{OPS[op]}])(\d+(?:x\d+)*)", word)
            if word in cls.DTYPES:
                fields["dtype"] = word
            elif word == "last" or (word == "nearest" and op == "interpolate"):
                fields[word] = True
            elif word == "nobias" and ("k" in OPS[op] or op in NORMS):
                fields["bias"] = False
            elif match:
                numbers = tuple(int(v) for v in match[2].split("x"))
                fields[match[1]] = numbers[0] if match[1] in "nckg" else numbers
            else:
                raise ValueError(
                    f"problem '{text}': '{word}' is not understood; {op} takes {' '.join(OPS[op])} and the words "
                    "of convoxel.geometry.Problem"
                )
        fields = cls.defaults(op, fields) | fields
        rank = len(fields["i"])
        if wrong := [a for a in "fspdo" if len(fields[a]) != rank]:
            raise ValueError(
                f"problem '{text}': i has {rank} axes, but {', '.join(wrong)} has another number"
            )
        return cls(op, **fields)._checked(text)

    @staticmethod
    def defaults(op: str, fields: dict[str, Any]) -> dict[str, Any]:
        """What is meant where a string says nothing."""
        i = fields.get("i", () if op == "linear" else (1, 1, 1))
        ones, zeros = (1,) * len(i), (0,) * len(i)
        stride = fields.get("f", ones) if op in POOLS else ones
        return {"i": i, "k": 1 if "k" in OPS[op] else fields.get("c", 1),
                "f": ones, "s": stride, "p": zeros, "d": ones, "o": zeros}  # fmt: skip

    def _checked(self, text: str) -> Problem:
        if min(self.n, self.c, self.k, self.g, *self.i, *self.f, *self.s, *self.d) < 1:
            raise ValueError(f"problem '{text}': everything but padding must be at least 1")
        if self.c % self.g or self.k % self.g:
            raise ValueError(f"problem '{text}': c{self.c} and k{self.k} must be multiples of g{self.g}")
        if self.op in POOLS and any(2 * p > f for p, f in zip(self.p, self.f, strict=True)):
            raise ValueError(f"problem '{text}': padding must be at most half of the kernel")
        if min(self.y_shape) < 1:
            raise ValueError(
                f"problem '{text}': gives an output of {self.y_shape}; the kernel must fit in the padded input"
            )
        return self

    def __str__(self) -> str:
        words = [self.op]
        usual = self.defaults(self.op, {a: getattr(self, a) for a in "icf"})
        for name in OPS[self.op]:
            value = getattr(self, name)
            if name in "ncki":
                words.append(name + (str(value) if name != "i" else "x".join(map(str, value))))
            elif name == "f" or (name != "g" and value != usual[name]):
                words.append(name + "x".join(map(str, value)))
        words += [f"g{self.g}"] * (self.g != 1) + ["nobias"] * (not self.bias) + ["nearest"] * self.nearest
        return " ".join(words + ["last"] * self.last + [self.dtype] * (self.dtype != "f32"))
