"""`convoxel bench layers` and `network`: what they print is what they measured."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as T

from convoxel import bench, cli, runtime
from convoxel.bench import lists, measure, operators, process
from convoxel.geometry import NORMS, Problem


def run(*words: str) -> int:
    return cli.main(["bench", *words])


def rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


LAYERS = [
    "conv n1 c8 k16 i8x9x10 f3x3x3 p1x1x1",
    "conv_transpose n1 c8 k4 i5x6 f2x2 s2x2 last",
    "conv n1 c2 k3 i9 f3",
    "linear n5 c7 k3",
    "instance_norm n2 c4 i6x7",
]


def test_layers_with_limits_and_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [w for p in LAYERS for w in ("--problem", p)]
    assert run(*words, "--repeats", "2", "--json", str(tmp_path / "r.json")) == 0
    out = capsys.readouterr().out
    found = rows(tmp_path / "r.json")
    expected = ["conv n1 c8 k16 i8x9x10 f3x3x3 p1x1x1 last", LAYERS[1], *LAYERS[2:4], LAYERS[4] + " last"]
    assert [(r["problem"], r["direction"]) for r in found] == [
        (p, d) for p in expected for d in operators.passes(Problem.parse(p))
    ]
    for row in found:
        p = Problem.parse(row["problem"])
        assert row["problem"] in out and 0 < row["ms_min"] <= row["ms"]
        assert row["gain"] == pytest.approx(row["torch_ms"] / row["ms"])
        assert row["torch_ms"] <= row["torch_same_ms"]
        assert row["gflops"] == pytest.approx(p.flops / row["ms"] / 1e6)
        assert row["gbs"] == pytest.approx(operators.least_bytes(p, row["direction"]) / row["ms"] / 1e6)
        assert 0 < row["copy_fraction"] and (row["peak_fraction"] > 0) == p.convolves
        assert row["error"] < 1e-5 and row["torch_error"] < 1e-6
        assert row["error"] <= row["max_error"] < 1e-4
        assert row["algorithm"].split()[0] in ("direct", "winograd", "depthwise")
    assert re.search(r"FMA peak, GFLOP/s +\d+", out) and re.search(r"copy, GB/s +\d+", out)
    assert out.count("geometric mean") == 4
    assert not runtime.is_strict()


def test_both_memory_formats_of_ours(tmp_path: Path) -> None:
    words = ["--problem", "relu n1 c4 i8x8", "--layout", "both", "--passes", "forward", "--dtype", "bf16"]
    assert run(*words, "--repeats", "1", "--json", str(tmp_path / "r.json")) == 0
    assert [r["problem"] for r in rows(tmp_path / "r.json")] == [
        "relu n1 c4 i8x8 bf16",
        "relu n1 c4 i8x8 last bf16",
    ]


def test_precision_and_instruction_set_are_those_asked_for(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--problem", "conv n1 c16 k16 i12x12 f3x3", "--passes", "forward", "--repeats", "1"]
    how = ["--isa", "avx2", "--precision", "highest", "--json", str(tmp_path / "r.json")]
    assert run(*words, *how) == 0
    (row,) = rows(tmp_path / "r.json")
    assert row["algorithm"] == "direct avx2" and row["precision"] == "highest"
    assert "ISA                avx2 " in capfd.readouterr().out
    assert runtime.get_float32_conv_precision() == "high" and runtime.isa() != "avx2"


def test_a_capped_process_caps_torch_too() -> None:
    at = process.in_process(torch.backends.cpu.get_cpu_capability, variables=process.environment("avx2"))
    assert at == "AVX2"
    assert "ATEN_CPU_CAPABILITY" not in os.environ


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["bench"], ["bench", "layers"]),
        (["bench", "hot"], ["bench", "layers", "hot"]),
        (["bench", "network", "--size", "8"], ["bench", "network", "--size", "8"]),
        (["bench", "--help"], ["bench", "--help"]),
        (["bench", "--traceback", "--passes", "x"], ["bench", "--traceback", "layers", "--passes", "x"]),
        (["--traceback", "bench"], ["--traceback", "bench", "layers"]),
        (["info"], ["info"]),
    ],
)
def test_bench_alone_is_bench_layers(argv: list[str], expected: list[str]) -> None:
    assert bench.complete(argv) == expected


@pytest.mark.parametrize("name", lists.LISTS)
def test_lists_are_problems_of_a_sensible_size(name: str) -> None:
    some = lists.LISTS[name]
    for text, p in zip(some.texts, some.problems, strict=True):
        assert str(p) == text and p.flops < 3e11
        assert max(operators.least_bytes(p, d) for d in operators.passes(p)) < 2**30


@pytest.mark.parametrize(
    "text",
    [
        "conv n1 c8 k6 i7x8 f3x3 p1x1",
        "conv_transpose n2 c6 k8 i4x5x6 f2x2x2 s2x2x2 nobias",
        "conv n2 c8 k12 i40x6 f5x3 s2x1 p1x0 d2x1 g4",
        "conv_transpose n1 c4 k8 i30x5x3 f5x1x2 s3x1x2 p1x0x1 o2x0x1 d2x1x1 g2",
        "linear n3 c5 k7",
        "batch_norm n3 c6 i5x4",
        "instance_norm n2 c6 i5x4x3 nobias",
        "group_norm n2 c6 i7 g3",
        "relu n1 c5 i6",
        "leaky_relu n1 c5 i6x7",
        "max_pool n1 c5 i7x8 f3x2 s2x1 p1x0 d1x2",
        "avg_pool n1 c5 i6x7x8 f2x2x2",
        "interpolate n1 c5 i4x5x6 s2x1x3",
        "interpolate n1 c5 i4x5 s2x2 nearest",
    ],
)
def test_a_wrong_result_shows_as_error(text: str) -> None:
    p = Problem.parse(text)
    t = operators.tensors(p)
    for name, step in operators.steps(T, p, t).items():
        reference, results = operators.exact(p, name, t), step()
        assert len(results) == len(reference) == (3 if name == "backward" and p.op in NORMS and p.bias else 1)
        assert results[0].shape == {"forward": p.y_shape, "weight_grad": p.w_shape}.get(name, p.x_shape)
        assert max(operators.errors(results, reference)) < 3e-6
        wrong = tuple(1.01 * r for r in results)
        assert operators.errors(wrong, reference)[0] == pytest.approx(0.01, rel=1e-3)


def test_least_bytes_are_those_of_the_tensors() -> None:
    p = Problem.parse("instance_norm n1 c2 i4x4 bf16")
    assert [operators.least_bytes(p, d) for d in operators.passes(p)] == [2 * 64, 3 * 64]
    p = Problem.parse("max_pool n1 c2 i4x4 f2x2")
    assert [operators.least_bytes(p, d) for d in operators.passes(p)] == [160, 160]
    assert operators.least_bytes(Problem.parse("linear n2 c3 k5"), "forward") == 4 * (6 + 15 + 10)


def test_spread_is_between_the_quartiles() -> None:
    assert measure.spread([5.0, 1, 2, 4, 3]) == pytest.approx(2 / 3)
    assert measure.spread([7.0]) == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--passes", "sideways"], 2, "sideways unknown, expected of forward,input_grad"),
        (["--repeats", "0"], 2, "--repeats: expected at least 1, received 0"),
        (["--threads", "0"], 2, "--threads: expected at least 1, received 0"),
        (["--json", "/nowhere/r.json"], 2, "--json: the folder /nowhere does not exist"),
        (["cold"], 2, "invalid choice: 'cold'"),
        (["--problem", "conv x"], 1, "'x'"),
        (["--problem", "conv i8x8 f9x9"], 1, "an output of (1, 1, 0, 0); the kernel must fit"),
        (["--problem", "conv_transpose i1 f1 p1"], 1, "an output of (1, 1, -1)"),
        (["--problem", "conv c7 k8 i8 f3 g2"], 1, "c7 and k8 must be multiples of g2"),
        (["--problem", "conv c0 i8 f3"], 1, "must be at least 1"),
        (["--problem", "relu c2 i8", "--passes", "weight_grad"], 1, "none of these problems has weight_grad"),
        (["network", "--size", "64,64"], 1, "--size: nnunet3d takes 3 numbers, received 64,64"),
    ],
)
def test_wrong_arguments_are_named(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == code
    assert message in capsys.readouterr().err


def test_a_network_in_processes_that_take_turns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["network", "--model", "small", "--size", "16,16,16", "--rounds", "1"]
    assert run(*words, "--repeats", "1", "--json", str(tmp_path / "r.json")) == 0
    found = rows(tmp_path / "r.json")
    assert [r["variant"] for r in found] == list(bench.network.VARIANTS)
    for row in found:
        assert min(row["forward_ms"], row["step_ms"]) > 0 and row["peak_mb"] > 50
        assert row["difference"] < 1e-4
    assert 0 < found[0]["difference"] and found[1]["difference"] == 0
    assert capsys.readouterr().out.count("convoxel over torch") == 2


def test_an_error_of_a_process_is_the_parents() -> None:
    with pytest.raises(ValueError, match="divisible"):
        process.in_process(bench.network.measure, "convoxel", True, 1, "small", (15, 16, 16), 1, 1)
