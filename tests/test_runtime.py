"""Settings of the process, what is counted and printed, what an import brings along."""

import ast
import re
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

import convoxel
from child import python
from convoxel import _C, runtime
from convoxel import functional as F
from convoxel.geometry import Problem

X, W = torch.ones(1, 2, 5, 6), torch.ones(3, 2, 3, 3)


# Strict mode and counters (C5) --------------------------------------------------------------------


def test_strict_mode_raises_for_what_goes_to_torch() -> None:
    half = X.half(), W.half()
    assert not convoxel.is_strict()
    assert torch.equal(F.conv2d(*half), T.conv2d(*half))
    convoxel.set_strict(True)
    assert convoxel.is_strict()
    with pytest.raises(convoxel.HandedToTorch, match=r"conv2d: not served by convoxel: dtype torch.float16 on cpu.*"
                                                     r"set_strict\(False\)"):  # fmt: skip
        F.conv2d(*half)
    assert convoxel.stats()["conv2d"]["torch"] == 1  # what raised was not handed over
    F.conv2d(X, W)


def test_stats_say_what_was_served_and_what_was_not(isa: str) -> None:
    convoxel.set_conv_algorithm("direct")
    x = X.clone().requires_grad_()
    F.conv2d(x, W).sum().backward()
    F.conv2d(X, W)
    for _ in range(2):
        F.linear(torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.int64))
    by = f"direct {isa}"
    assert convoxel.stats() == {
        "conv": {"served": 2, "by": {by: 2}, "torch": 0, "why": {}},
        "conv_input_grad": {"served": 1, "by": {by: 1}, "torch": 0, "why": {}},
        "linear": {"served": 0, "by": {}, "torch": 2, "why": {"dtype torch.int64 on cpu": 2}},
    }
    convoxel.reset_stats()
    assert convoxel.stats() == {}


def test_counters_lose_nothing_between_threads() -> None:
    half = X.half(), W.half()

    def work() -> None:
        for _ in range(50):
            F.conv2d(X, W)
            F.conv2d(*half)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    stats = convoxel.stats()
    assert stats["conv"]["served"] == stats["conv2d"]["torch"] == 400


# Settings (C6) ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", runtime.PRECISIONS)
def test_precision_takes_torchs_words(value: str) -> None:
    assert convoxel.get_float32_conv_precision() == "high"
    convoxel.set_float32_conv_precision(value)
    try:
        assert convoxel.get_float32_conv_precision() == value == convoxel.info()["precision"]
        y = F.conv2d(X, W)
    finally:
        convoxel.set_float32_conv_precision("high")
    assert torch.equal(y, T.conv2d(X, W))


@pytest.mark.parametrize("wrong", ["HIGH", "", "tf32", None, 1, ["high"]])
@pytest.mark.parametrize("setting", ["float32_conv_precision", "conv_algorithm"])
def test_wrong_settings_raise_and_change_nothing(wrong: object, setting: str) -> None:
    before = getattr(convoxel, f"get_{setting}")()
    with pytest.raises(ValueError, match="expected one of .*high|expected one of .*direct"):
        getattr(convoxel, f"set_{setting}")(wrong)
    assert getattr(convoxel, f"get_{setting}")() == before


def test_algorithm_is_taken_from_its_setter() -> None:
    assert convoxel.get_conv_algorithm() == "auto"
    convoxel.set_conv_algorithm("direct")
    try:
        F.conv2d(X, W)
        assert list(convoxel.stats()["conv"]["by"]) == [f"direct {convoxel.isa()}"]
    finally:
        convoxel.set_conv_algorithm("auto")


def test_isas_are_listed_weakest_first_and_can_be_chosen() -> None:
    names = convoxel.isas()
    known = ["baseline", "avx2", "avx512", "avx512bf16", "amx"]
    assert names[0] == "baseline" and names == [n for n in known if n in names]
    for name in names:
        convoxel.set_isa(name)
        assert convoxel.isa() == name and convoxel.info()["ISA"].startswith(f"{name} (available: baseline")
    with pytest.raises(ValueError, match=f"ISA 'mmx' is not available: .*{', '.join(names)}"):
        convoxel.set_isa("mmx")
    assert convoxel.isa() == names[-1]


def test_settings_come_from_the_environment() -> None:
    out = python(
        """
        import convoxel, torch
        from convoxel import functional as F
        print(convoxel.isa(), convoxel.get_conv_algorithm(), convoxel.is_strict())
        F.conv1d(torch.ones(1, 1, 5), torch.ones(1, 1, 3))
        try:
            F.conv1d(torch.ones(1, 1, 5).half(), torch.ones(1, 1, 3).half())
        except convoxel.HandedToTorch as error:
            print(error)
        """,
        CONVOXEL_ISA="baseline",
        CONVOXEL_CONV_ALGORITHM="direct",
        CONVOXEL_STRICT="1",
        CONVOXEL_VERBOSE="1",
    )
    assert "baseline direct True" in out and "conv1d: not served by convoxel: dtype torch.float16" in out
    assert re.search(
        r"^convoxel conv conv n1 c1 k1 i1x1x5 f1x1x3 nobias direct baseline [\d.]+ ms \(algorithm direct is set\)$",
        out,
        re.M,
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "CONVOXEL_ISA",
            "ValueError: ISA 'pentium' is not available: this build on this CPU has baseline.*unset",
        ),
        (
            "CONVOXEL_CONV_ALGORITHM",
            "ValueError: CONVOXEL_CONV_ALGORITHM=pentium: expected one of auto, direct",
        ),
        ("CONVOXEL_STRICT", "ValueError: CONVOXEL_STRICT=pentium: expected 1 or 0"),
    ],
)
def test_a_wrong_environment_stops_the_import_in_words(name: str, message: str) -> None:
    assert re.search(message, python("import convoxel", fails=True, **{name: "pentium"}))


@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)]
)
def test_switches_of_the_environment(value: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVOXEL_STRICT", value)
    assert runtime._flag("CONVOXEL_STRICT") is on


def verbose_lines(capsys: pytest.CaptureFixture[str], call) -> list[tuple[str, ...]]:
    runtime._state.verbose = True
    try:
        call()
    finally:
        runtime._state.verbose = False
    lines = capsys.readouterr().err.splitlines()
    matches = [
        re.fullmatch(r"convoxel (\w+) (.+) (\w+) (\w+) (\d+\.\d+) ms( \(.+\))?", line) for line in lines
    ]
    assert all(matches), lines
    return [m.groups() for m in matches if m]


@pytest.mark.parametrize(
    "text",
    [
        "conv n2 c4 k6 i7x9 f3x3 s2x1 p1x1 d1x2 g2",
        "conv n1 c3 k2 i4x5x6 f2x3x1 nobias bf16",
        "conv n1 c3 k2 i4x5x6 f3x3x3 last f64",
    ],
)
def test_verbose_lines_hold_a_problem_that_parses_back(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    p = Problem.parse(text)
    x, w = (torch.ones(s, dtype=p.torch_dtype, requires_grad=True) for s in (p.x_shape, p.w_shape))
    b = torch.ones(p.k, dtype=p.torch_dtype, requires_grad=True) if p.bias else None
    last = torch.channels_last_3d
    call = lambda: getattr(F, f"conv{p.rank}d")(  # noqa: E731
        x.contiguous(memory_format=last) if p.last else x, w, b, p.s, p.p, p.d, p.g
    )
    lines = verbose_lines(capsys, lambda: call().sum().backward())
    ops = ["conv", "conv_weight_grad", "conv_input_grad"] + ["conv_bias_grad"] * p.bias
    assert [line[0] for line in lines] == ops
    for op, problem, algorithm, isa, *_ in lines[:3]:
        q = Problem.parse(problem)
        fill = (1,) * (3 - p.rank)
        assert (q.x_shape, q.w_shape) == (
            (p.n, p.c, *fill, *p.i),
            (p.k, p.c // p.g, *fill, *p.f),
        )
        assert (q.y_shape[2:], q.g, q.dtype) == (fill + p.y_shape[2:], p.g, p.dtype)
        assert algorithm in runtime.ALGORITHMS and isa == convoxel.isa()
        assert q.bias == (p.bias and op == "conv") and (q.last == p.last or op != "conv")


def test_quiet_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    F.conv2d(X, W)
    assert capsys.readouterr() == ("", "")


def test_deterministic_algorithms_are_honoured() -> None:
    """torch then fills fresh memory with NaN: nothing may depend on it, and nothing may refuse."""
    x, w = (t.clone().requires_grad_() for t in (torch.randn(2, 5, 9, 8), torch.randn(7, 5, 3, 3)))

    def run() -> list[Tensor]:
        y = F.conv2d(x, w, padding=1, stride=2)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, w))]

    before = run()
    torch.use_deterministic_algorithms(True)
    try:
        after = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_info_says_what_runs_here() -> None:
    info = convoxel.info()
    assert info["convoxel"] == convoxel.__version__ and info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads() == 2
    assert ", ".join(convoxel.isas()) in info["ISA"] and "absent: " in info["CUDA"]
    assert [line.split()[0] for line in str(info).splitlines()] == list(info)


# What an import brings along ----------------------------------------------------------------------


def test_import_needs_no_extra_and_says_which_one_is_missing() -> None:
    out = python(
        """
        import sys, torch

        EXTRAS = "tqdm safetensors nibabel nilearn matplotlib sklearn scipy pandas".split()

        for name in EXTRAS:
            sys.modules[name] = None  # importing it raises ModuleNotFoundError

        import convoxel
        from convoxel import inference, nn, volume
        net = convoxel.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
        net.compile("sgd", "cross_entropy")
        x, y = torch.ones(4, 1, 5, 5), torch.zeros(4, dtype=torch.long)
        net.fit(x, y, verbose=0)
        print(net.evaluate(x, y, verbose=0)["loss"] >= 0)
        inference.sliding_window_inference(torch.ones(1, 1, 8, 8), (4, 4), 1, nn.Conv2d(1, 2, 3, padding=1))
        for call in (
            lambda: net.fit(x, y, verbose=1),
            lambda: net.save("net"),
            lambda: volume.read("scan.nii"),
        ):
            try:
                call()
            except ImportError as error:
                print(error)
        """
    )
    lines = out.splitlines()
    extras = ["train", "train", "io"]
    assert lines[0] == "True" and len(lines) == 4, out
    assert all(f'pip install "convoxel[{e}]"' in line for e, line in zip(extras, lines[1:], strict=True)), out


def test_import_loads_no_extra_even_where_they_are_installed() -> None:
    out = python(
        """
        import sys, torch
        before = set(sys.modules)
        import convoxel
        print(sorted({m.split(".")[0] for m in set(sys.modules) - before}))
        """
    )
    loaded = set(ast.literal_eval(out))
    assert not loaded & {
        "nibabel",
        "nilearn",
        "matplotlib",
        "sklearn",
        "scipy",
        "pandas",
        "tqdm",
        "safetensors",
    }


# The binding --------------------------------------------------------------------------------------


def test_the_stub_has_every_bound_name_and_argument() -> None:
    def arguments(node: ast.stmt) -> list[str]:
        if isinstance(node, ast.ClassDef):  # those of its __init__
            return next(arguments(f) for f in node.body if isinstance(f, ast.FunctionDef))
        return [a.arg for a in node.args.args] if isinstance(node, ast.FunctionDef) else []

    def documented(bound: type | object) -> list[str]:
        text = bound.__init__.__doc__ if isinstance(bound, type) else bound.__doc__
        return re.findall(r"(\w+): ", (text or "").split("->")[0])

    tree = ast.parse(Path(convoxel.__file__).with_name("_C.pyi").read_text())
    declared = {n.name: arguments(n) for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert declared == {n: documented(getattr(_C, n)) for n in dir(_C) if not n.startswith("_")}


def test_wrong_values_at_the_binding_raise() -> None:
    """No pointer is read before the numbers are of the right kind and count."""
    for bad in ([1] * 23, [1.5] * 24, [2**63] * 24, "abc", None):
        for name in (n for n in dir(_C) if n.startswith("conv_") and n.endswith("_scratch")):
            with pytest.raises(TypeError):
                getattr(_C, name)(0, bad, 1)
