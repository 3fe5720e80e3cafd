"""The shape rules against torch's own results, and the Problem string."""

import itertools

import pytest
import torch
import torch.nn.functional as T

from cases import CONV, CONV_TRANSPOSE
from convoxel import geometry
from convoxel.geometry import Problem, as_tuple, conv_out_size, conv_transpose_out_size, is_channels_last


@pytest.mark.parametrize("p", CONV + CONV_TRANSPOSE, ids=str)
def test_problem_is_one_string_and_its_shape_is_torchs(p: Problem) -> None:
    assert Problem.parse(str(p)) == p
    x, w = torch.empty(p.x_shape, device="meta"), torch.empty(p.w_shape, device="meta")
    function = getattr(T, f"{p.op}{p.rank}d")
    how = (p.s, p.p, p.o, p.g, p.d) if p.transposed else (p.s, p.p, p.d, p.g)
    assert function(x, w, None, *how).shape == p.y_shape


def test_flops_are_torchs() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for p in CONV + CONV_TRANSPOSE:
        if p.g != 1:  # torch's counter ignores groups
            continue
        x, w = torch.empty(p.x_shape), torch.empty(p.w_shape)
        function = getattr(T, f"{p.op}{p.rank}d")
        with FlopCounterMode(display=False) as counter:
            function(x, w, None, *((p.s, p.p, p.o, p.g, p.d) if p.transposed else (p.s, p.p, p.d, p.g)))
        assert p.flops == counter.get_total_flops(), p


@pytest.mark.parametrize(
    "text",
    [
        "linear n3 c4 k5",
        "linear n3 c4 k5 nobias bf16",
        "batch_norm n2 c4 i5",
        "instance_norm n2 c4 i5x6 nobias",
        "group_norm n2 c6 i5x6x7 g3 last",
        "relu n1 c2 i3",
        "leaky_relu n1 c2 i3x4 f64",
        "max_pool n1 c2 i9x8 f3x2 s2x1 p1x0 d1x2",
        "max_pool n1 c2 i9x8 f3x2",
        "avg_pool n1 c2 i7x8x9 f2x2x2 s1x2x3",
        "interpolate n1 c2 i3x4x5 s2x1x2",
        "interpolate n1 c2 i3 s4 nearest last",
    ],
)
def test_every_operator_has_problems(text: str) -> None:
    p = Problem.parse(text)
    assert str(p) == text and Problem.parse(str(p)) == p
    x = torch.empty(p.x_shape, dtype=p.torch_dtype)
    w, b = (torch.empty(s) if s else None for s in (p.w_shape, p.b_shape))
    assert p.flops == (2 * p.n * p.c * p.k if p.op == "linear" else 0)
    if p.op == "linear":
        assert T.linear(x.float(), w, b).shape == p.y_shape
    elif "norm" in p.op:
        assert (w is None) == ("nobias" in text) and p.y_shape == p.x_shape
        assert w is None or w.shape == b.shape == (p.c,)
    elif "pool" in p.op:
        how = (p.d,) if p.op == "max_pool" else ()
        assert getattr(T, f"{p.op}{p.rank}d")(x, p.f, p.s, p.p, *how).shape == p.y_shape
    elif p.op == "interpolate":
        assert T.interpolate(x, scale_factor=p.s).shape == p.y_shape and p.nearest == ("nearest" in text)
    else:
        assert p.y_shape == p.x_shape


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "starts with ''"),
        ("pool n1", "starts with 'pool'"),
        ("conv n1 c2 z3", "'z3'"),
        ("conv n1 i4x4 f3x3x3", "i has 2 axes, but f"),
        ("conv n1 i4xx4", "'i4xx4'"),
        ("relu c2 i4 f3", "'f3' is not understood; relu takes n c i"),
        ("relu c2 i4 nobias", "'nobias'"),
        ("conv c2 i4 nearest", "'nearest'"),
        ("linear n2 c3 k4 i5", "'i5'"),
        ("max_pool c2 i4 f2 p2", "padding must be at most half of the kernel"),
        ("max_pool c2 i4 f2x2", "i has 1 axes, but f"),
        ("group_norm c4 i5 g3", "must be multiples of g3"),
    ],
)
def test_a_wrong_problem_names_the_word(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Problem.parse(text)


def test_out_sizes_against_torch() -> None:
    for n, k, s, p, d in itertools.product((1, 5, 8), (1, 2, 3), (1, 2, 3), (0, 1), (1, 2)):
        if n + 2 * p >= d * (k - 1) + 1:
            expected = T.conv1d(torch.empty(1, 1, n), torch.empty(1, 1, k), None, s, p, d).shape[-1]
            assert conv_out_size(n, k, s, p, d) == expected
        for o in range(max(s, d)):
            size = conv_transpose_out_size(n, k, s, p, o, d)
            if size > 0:
                assert (
                    T.conv_transpose1d(torch.empty(1, 1, n), torch.empty(1, 1, k), None, s, p, o, 1, d).shape[
                        -1
                    ]
                    == size
                )


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (1, 1, 1, 1), (1, 4, 5, 6, 7), (2, 3, 0, 5)])
@pytest.mark.parametrize("last", [False, True])
def test_layout_rule_is_torchs(shape: tuple[int, ...], last: bool) -> None:
    from torch._prims_common import suggest_memory_format

    t = torch.empty(shape)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if last:
        t = torch.empty(shape, memory_format=formats[len(shape)])
    for view in (t, t[:1], t[:, :, ::2], t.transpose(2, 3), t.expand(2, *shape[1:]) if shape[0] == 1 else t):
        assert is_channels_last(view) == (suggest_memory_format(view) == formats[len(shape)])


@pytest.mark.parametrize("bad", ["3", 1.5, None, True, (1, "2"), [1.0, 2]])
def test_a_tuple_of_ints_is_asked_for(bad: object) -> None:
    with pytest.raises(TypeError, match="conv2d: stride must be an int or a tuple of 2 ints"):
        as_tuple(bad, 2, "conv2d", "stride")


def test_docstrings_examples_hold() -> None:
    import doctest

    assert doctest.testmod(geometry).failed == 0
