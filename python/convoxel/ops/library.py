"""How an operator gets into torch: one Library, one `register` for schema, kernel, fake, gradient, vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.autograd import forward_ad

from .. import memory, runtime
from ..geometry import Ints, is_channels_last, memory_format

_library = torch.library.Library("convoxel", "FRAGMENT")
_names: list[str] = []

Operator = Callable[..., Any]
NONE = 0  # the pointer of a tensor that is not there
SMALL = 32 * 1024  # elements: below, a second thread costs more than it does


def registered() -> list[str]:
    """Names of all operators under `torch.ops.convoxel`."""
    return sorted(_names)


def register(
    schema: str,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    vmap: Callable[..., Any] | None = None,
) -> Operator:
    """Defines `torch.ops.convoxel.<name>` and returns what calls it: its default overload, bound once (half the
    cost of a look-up per call). Pointers are taken in `cpu` only: there tensors are always real."""
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    torch.library.register_fake(f"convoxel::{name}", _on_one_device(name, fake), lib=_library)
    if backward:
        torch.library.register_autograd(
            f"convoxel::{name}", backward, setup_context=setup_context, lib=_library
        )
    if vmap:
        torch.library.register_vmap(f"convoxel::{name}", vmap, lib=_library)
    _names.append(name)
    overload: OpOverload = getattr(torch.ops.convoxel, name).default
    if backward is None or setup_context is None:
        return overload
    return _differentiable_under_functorch(overload, backward, setup_context)


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """One tensor on the meta device brings a call here whatever the others are on; its result is never written."""

    def checked(*args: Any) -> Any:
        devices = sorted({str(a.device) for a in args if isinstance(a, torch.Tensor)})
        if len(devices) > 1:
            raise RuntimeError(
                f"{name}: expected all tensors on the same device, received some on "
                f"{' and some on '.join(devices)}; move them with .to(device)"
            )
        return fake(*args)

    return checked


def _differentiable_under_functorch(
    overload: OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Operator:
    """torch.func.grad, jacrev and per-sample gradients refuse `register_autograd` formulas; the same formula as
    an autograd.Function serves them, and is taken only inside their transforms."""
    twin: Any = type(
        overload.name().replace("::", "_"),
        (torch.autograd.Function,),
        {
            "generate_vmap_rule": True,
            "forward": staticmethod(lambda *args: overload(*args)),
            "setup_context": staticmethod(lambda ctx, inputs, output: setup_context(ctx, inputs, output)),
            "backward": staticmethod(backward),
        },
    )

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*args)
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is None or transform.key() != torch._C._functorch.TransformType.Grad:
            return overload(*args)
        return twin.apply(*args)

    return call


def why_not(*tensors: torch.Tensor | None) -> str | None:
    """Why these tensors are outside what the kernels serve (contract C1), or None."""
    for t in tensors:
        if t is None:
            continue
        if t.layout != torch.strided:
            return f"{t.layout} layout"
        if t.device.type not in ("cpu", "meta"):
            return f"device {t.device.type}"
        if t.dtype not in runtime.DTYPES:
            return f"dtype {t.dtype} on {t.device.type}"
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
            return "forward-mode differentiation"
    return None


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there; torch's own question raises on devices that have none, such as meta."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast(*tensors: torch.Tensor | None, weight: int | None = None) -> tuple[torch.Tensor | None, ...]:
    """The tensors in autocast's dtype where it is on (torch's lower-precision list), else as they are.
    tensors[weight] stays float32 beside bfloat16: a convolution rounds it where it reads it, which saves a copy in
    every call."""
    first = next(t for t in tensors if t is not None)
    if not autocasts(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)

    def stays(i: int, t: torch.Tensor) -> bool:
        if i == weight and (t.dtype, dtype) == (torch.float32, torch.bfloat16):
            return True
        return not t.is_floating_point() or t.dtype == torch.float64

    return tuple(t if t is None or stays(i, t) else t.to(dtype) for i, t in enumerate(tensors))


def full_precision(t: torch.Tensor) -> torch.Tensor:
    """t in float32 where autocast is on (torch's float32 list), else as it is."""
    low = isinstance(t, torch.Tensor) and t.dtype in (torch.bfloat16, torch.float16)
    return t.float() if low and autocasts(t.device) else t


def pointer(t: torch.Tensor | None) -> int:
    return NONE if t is None else t.data_ptr()


def scratch(size: int) -> torch.Tensor:
    """`size` bytes that a kernel may write to; never read before written."""
    return memory.empty((size,), torch.uint8)


def _real(t: torch.Tensor) -> bool:
    """Whether t has memory on the CPU: fake tensors, which claim to, dispatch in Python."""
    return t.is_cpu and type(t).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def new(like: torch.Tensor, shape: Ints, last: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
    dtype, layout = dtype or like.dtype, memory_format(last, len(shape))
    if _real(like):
        return memory.empty(shape, dtype, layout)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def empty_like(t: torch.Tensor, memory_format: torch.memory_format = torch.preserve_format) -> torch.Tensor:
    """torch.empty_like, from the pool where t is real and large."""
    if not _real(t) or t.nbytes < memory.LEAST:  # in this order: a fake may have symbolic sizes
        return torch.empty_like(t, memory_format=memory_format)
    return memory.like(torch.empty_like(t, memory_format=memory_format, device="meta"))


def contiguous(t: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """t.contiguous(memory_format=memory_format), its copy from the pool."""
    if t.is_contiguous(memory_format=memory_format):
        return t
    return empty_like(t, memory_format).copy_(t)


def dense(t: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """t (N, C, D, H, W) without gaps, and whether it is channels-last (else contiguous)."""
    last = is_channels_last(t)
    return contiguous(t, memory_format(last)), last


def to_3d(t: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, C, 1, H, W), (N, C, W) -> (N, C, 1, 1, W): views that keep channels-last."""
    while t.dim() < 5:
        t = t.unsqueeze(2)
    return t


def from_3d(y: torch.Tensor, rank: int, batched: bool) -> torch.Tensor:
    """Undoes `to_3d`; without `batched` the image axis goes too."""
    while y.dim() > rank + 2:
        y = y.squeeze(2)
    return y if batched else y.squeeze(0)
