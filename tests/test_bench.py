"""`convoxel bench`: what it prints is what it measured."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch

from convoxel import bench, bench_network
from convoxel.geometry import Problem


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(words))


def test_layers_with_their_error_and_fraction_of_peak(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    problems = ["conv n1 c8 k16 i8x9x10 f3x3x3 p1x1x1", "conv_transpose n1 c8 k4 i5x6 f2x2 s2x2"]
    words = [w for p in problems for w in ("--problem", p)]
    assert run(*words, "--repeats", "2", "--json", str(tmp_path / "r.json")) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "r.json").read_text())
    assert [(r["problem"], r["direction"]) for r in results["rows"]] == [
        (str(Problem.parse(p)), d) for p in problems for d in bench.PASSES
    ]
    for row in results["rows"]:
        assert (
            row["problem"] in out
            and row["ms"] > 0
            and row["gain"] == pytest.approx(row["torch_ms"] / row["ms"])
        )
        assert row["gflops"] == pytest.approx(Problem.parse(row["problem"]).flops / row["ms"] / 1e6)
        assert row["error"] < 1e-5 and row["torch_error"] < 1e-6
    assert re.search(r"FMA peak, GFLOP/s +\d+", out) and out.count("geometric mean") == 3


@pytest.mark.parametrize("direction", bench.PASSES)
@pytest.mark.parametrize(
    "text",
    [
        "conv n1 c8 k6 i7x8 f3x3 p1x1",
        "conv_transpose n2 c6 k8 i4x5x6 f2x2x2 s2x2x2",
        "conv n2 c8 k12 i40x6 f5x3 s2x1 p1x0 d2x1 g4",
        "conv_transpose n1 c4 k8 i30x5x3 f5x1x2 s3x1x2 p1x0x1 o2x0x1 d2x1x1 g2",
    ],
)
def test_a_wrong_result_shows_as_error(direction: str, text: str) -> None:
    p = Problem.parse(text)
    x, w, dy = (torch.randn(s) for s in (p.x_shape, p.w_shape, p.y_shape))
    reference = bench.exact(p, direction, x, w, dy)
    good = bench.steps(torch.nn.functional, p, x, w, dy)[direction]()
    assert bench.relative_error(good, reference) < 1e-6
    assert bench.relative_error(good * 1.01, reference) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--passes", "sideways"], "sideways"),
        (["--repeats", "0"], "at least 1"),
        (["--threads", "0"], "--threads: expected at least 1, received 0"),
        (["--json", "/nowhere/r.json"], "--json: the folder /nowhere does not exist"),
        (["--problem", "conv x"], "'x'"),
        (["--problem", "conv i8x8 f9x9"], r"an output of \(1, 1, 0, 0\); the kernel must fit"),
        (["--problem", "conv_transpose i1 f1 p1"], r"an output of \(1, 1, -1\)"),
        (["--problem", "conv c7 k8 i8 f3 g2"], "c7 and k8 must be multiples of g2"),
        (["--problem", "conv c0 i8 f3"], "must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*words)


def test_a_network_in_processes_that_take_turns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["network", "--model", "nnunet2d", "--size", "128,128", "--batch", "1", "--rounds", "1"]
    assert run(*words, "--repeats", "1", "--json", str(tmp_path / "r.json")) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [r["variant"] for r in rows] == list(bench_network.VARIANTS)
    for row in rows:
        assert min(row["forward_ms"], row["step_ms"]) > 0 and row["peak_mb"] > 50
        assert row["difference"] < 1e-4
    assert 0 < rows[0]["difference"] and rows[1]["difference"] == 0
    assert capsys.readouterr().out.count("convoxel over torch") == 2


def test_an_error_of_a_process_is_the_parents() -> None:
    with pytest.raises(ValueError, match="divisible"):
        bench_network.in_process("convoxel", True, 1, ("nnunet2d", (100, 100), 1, 1))


def test_network_refuses_sizes_of_another_rank() -> None:
    with pytest.raises(ValueError, match="--size: nnunet3d takes 3 numbers, received 64,64"):
        run("network", "--size", "64,64")
