"""What csrc/bind.cpp binds; tests/test_runtime.py compares names and arguments.

Pointers (x, w, b, y, scratch; 0: none) are addresses, dtype a value of `runtime.DTYPES`, geometry the
numbers of `ops.conv.numbers`, scratch sizes bytes.
"""

from collections.abc import Sequence

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def fma_peak(rounds: int, threads: int) -> float: ...
def conv_forward(
    dtype: int, geometry: Sequence[int], x: Sequence[int], w: int, b: int, y: int, scratch: int, threads: int
) -> None: ...
def conv_forward_scratch(dtype: int, geometry: Sequence[int], threads: int) -> int: ...
def conv_input_grad(
    dtype: int, geometry: Sequence[int], x: Sequence[int], w: int, b: int, y: int, scratch: int, threads: int
) -> None: ...
def conv_input_grad_scratch(dtype: int, geometry: Sequence[int], threads: int) -> int: ...
def conv_weight_grad(
    dtype: int, geometry: Sequence[int], x: Sequence[int], w: int, b: int, y: int, scratch: int, threads: int
) -> None: ...
def conv_weight_grad_scratch(dtype: int, geometry: Sequence[int], threads: int) -> int: ...
def conv_forward_moments(
    dtype: int,
    geometry: Sequence[int],
    x: Sequence[int],
    w: int,
    b: int,
    y: int,
    moments: int,
    scratch: int,
    threads: int,
) -> None: ...
def conv_forward_slots(dtype: int, geometry: Sequence[int]) -> int: ...
def conv_bias_grad(
    dtype: int, geometry: Sequence[int], x: Sequence[int], w: int, b: int, y: int, scratch: int, threads: int
) -> None: ...
def conv_bias_grad_scratch(dtype: int, geometry: Sequence[int], threads: int) -> int: ...

class ResampleGeometry:
    def __init__(
        self,
        images: int,
        inner: int,
        mode: int,
        align_corners: bool,
        in_size: Sequence[int],
        out_size: Sequence[int],
        scale: Sequence[float],
    ) -> None: ...

def resample_scratch(dtype: int, geometry: ResampleGeometry, adjoint: bool, threads: int) -> int: ...
def resample(
    dtype: int, geometry: ResampleGeometry, adjoint: bool, src: int, dst: int, scratch: int, threads: int
) -> None: ...
def moments_slots(dtype: int, numbers: Sequence[int]) -> int: ...
def moments_scratch(dtype: int, numbers: Sequence[int], threads: int) -> int: ...
def gather_moments(
    dtype: int, numbers: Sequence[int], y: int, slots: int, scratch: int, threads: int
) -> None: ...
def combine_moments(
    dtype: int, numbers: Sequence[int], slots: int, of_image: int, mean: int, var: int, threads: int
) -> bool: ...
def norm_scratch(dtype: int, numbers: Sequence[int], threads: int) -> int: ...
def norm(
    dtype: int,
    numbers: Sequence[int],
    eps: float,
    x: int,
    w: int,
    b: int,
    y: int,
    mean: int,
    var: int,
    scratch: int,
    threads: int,
) -> None: ...
def norm_backward(
    dtype: int,
    numbers: Sequence[int],
    eps: float,
    dy: int,
    x: int,
    w: int,
    mean: int,
    var: int,
    dx: int,
    dw: int,
    db: int,
    scratch: int,
    threads: int,
) -> None: ...
def norm_act_scratch(dtype: int, numbers: Sequence[int], threads: int) -> int: ...
def norm_act(
    dtype: int,
    numbers: Sequence[int],
    eps: float,
    kind: int,
    alpha: float,
    x: int,
    w: int,
    b: int,
    slopes: int,
    residual: int,
    y: int,
    mean: int,
    var: int,
    scratch: int,
    threads: int,
) -> None: ...
def norm_act_backward(
    dtype: int,
    numbers: Sequence[int],
    eps: float,
    kind: int,
    alpha: float,
    dy: int,
    x: int,
    w: int,
    b: int,
    slopes: int,
    residual: int,
    mean: int,
    var: int,
    dx: int,
    dw: int,
    db: int,
    dslopes: int,
    dresidual: int,
    scratch: int,
    threads: int,
) -> None: ...
def activation(dtype: int, n: int, relu: bool, slope: float, x: int, y: int, threads: int) -> None: ...
def activation_backward(
    dtype: int, n: int, relu: bool, slope: float, dy: int, x: int, dx: int, threads: int
) -> None: ...
def pool_scratch(geometry: Sequence[int]) -> int: ...
def max_pool(
    dtype: int, geometry: Sequence[int], x: int, y: int, codes: int, scratch: int, threads: int
) -> None: ...
def max_pool_input_grad(
    dtype: int, geometry: Sequence[int], x: int, y: int, codes: int, scratch: int, threads: int
) -> None: ...
def max_pool_pick(
    dtype: int, geometry: Sequence[int], x: int, y: int, codes: int, scratch: int, threads: int
) -> None: ...
def max_pool_indices(
    dtype: int, geometry: Sequence[int], x: int, y: int, codes: int, scratch: int, threads: int
) -> None: ...
def avg_pool(
    dtype: int, geometry: Sequence[int], x: int, y: int, codes: int, scratch: int, threads: int
) -> None: ...
def avg_pool_input_grad(
    dtype: int, geometry: Sequence[int], x: int, y: int, codes: int, scratch: int, threads: int
) -> None: ...
def cat(
    parts: Sequence[int], bytes: Sequence[int], rows: int, whole: int, split: bool, threads: int
) -> None: ...
def score_add(
    W: int,
    K: int,
    extent: Sequence[int],
    stride: Sequence[int],
    first: int,
    y: int,
    weights: int,
    rows: int,
    threads: int,
) -> None: ...
def score_divide(W: int, K: int, count: int, rows: int, threads: int) -> bool: ...
def score_output(
    W: int,
    K: int,
    count: int,
    width: int,
    rows: int,
    between: int,
    low: int,
    high: int,
    t: int,
    values: int,
    kind: int,
    wide: bool,
    y: int,
    scratch: int,
    threads: int,
) -> None: ...
def score_output_scratch(W: int, K: int, threads: int) -> int: ...
def new_tensor(code: int, bits: int, shape: Sequence[int], strides: Sequence[int]) -> object: ...
def release_memory() -> int: ...
def set_memory_limit(bytes: int) -> None: ...
def memory_statistics() -> dict[str, int]: ...
