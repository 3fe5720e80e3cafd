"""`convoxel bench accuracy`, `scaling`, `compare`, and the pictures."""

import doctest
import json
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as T
from matplotlib.image import imread

from convoxel import cli, runtime
from convoxel.bench import accuracy, compare, fit, operators, plot, results, roofline
from convoxel.geometry import Problem
from convoxel.ops import route


def run(*words: object) -> int:
    return cli.main(["bench", *map(str, words)])


def drawn(path: Path) -> bool:
    """Whether the picture is more than paper."""
    return bool(imread(path)[..., :3].std() > 0.02)


# Accuracy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["conv n1 c5 k4 i6x7 f3x3 p1x1", "conv n2 c3 k3 i4x5x6 f3x1x2 p1x0x0 g3"])
def test_exact_is_the_convolution(text: str) -> None:
    p = Problem.parse(text)
    t = operators.tensors(p)
    in_double = operators.steps(T, p, t.map(torch.Tensor.double))
    for direction, found in accuracy.exact(p, t).items():
        for one, other in zip(found, in_double[direction](), strict=True):
            assert one.shape == other.shape and (one - other).abs().max() < 1e-13


def test_every_algorithm_has_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, picture = tmp_path / "r.json", tmp_path / "r.png"
    assert run("accuracy", "--channels", "2,16", "--json", json_file, "--plot", picture) == 0
    found = results.read(json_file)
    for c, rank, direction in product((2, 16), (2, 3), ("forward", "input_grad", "weight_grad")):
        some = {
            r["algorithm"]: r
            for r in found.rows
            if (r["channels"], r["rank"], r["direction"]) == (c, rank, direction)
        }
        tiles = {
            "winograd " + "x".join(map(str, tile))
            for tile in route.tiles((3, 3, 3) if rank == 3 else (1, 3, 3))
        }
        assert tiles | {"direct", "high", "highest", "depthwise"} <= set(some)
        errors = {name: row["error"] for name, row in some.items()}
        assert all(0 < row["error"] <= row["max_error"] < 1e-3 for row in some.values())
        assert max(errors.values()) < 1e-5 and errors["highest"] < 1e-6
        large, small = max(tiles), min(tiles)
        assert errors[large] > 1.5 * errors[small]
    out = capsys.readouterr().out
    assert "largest relative L2 error at precision high" in out and out.count("winograd 4x4x4") == 3
    assert drawn(picture)
    assert (runtime.get_conv_algorithm(), list(route.tiles((1, 3, 3)))) == ("auto", [(1, 4, 4), (1, 2, 2)])


def test_bfloat16_rounds_and_promises_nothing(tmp_path: Path) -> None:
    words = ["--channels", "16", "--passes", "forward", "--dtype", "bf16"]
    assert run("accuracy", *words, "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png") == 0
    errors = [r["error"] for r in results.read(tmp_path / "r.json").rows if r["algorithm"] != "high"]
    assert len(errors) > 5 and all(1e-3 < error < 1e-2 for error in errors)


def test_a_broken_promise_is_said_and_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "BOUND", 1e-8)
    assert run("accuracy", "--channels", "4", "--passes", "forward") == 1
    assert "winograd 1x4x4: " in (out := capsys.readouterr().out) and "high: expected at most 1e-08" in out


@pytest.mark.parametrize(
    ("algorithm", "error", "torch_error", "words"),
    [
        ("high", 0.9e-5, 1e-7, ""),
        ("high", 1.1e-5, 1e-7, "high"),
        ("winograd 4x4x4", 1.1e-5, 1e-7, "high"),
        ("direct", 1.1e-5, 1e-7, ""),
        ("highest", 4e-7, 1e-9, ""),
        ("highest", 5e-7, 1e-9, "highest"),
        ("highest", 5e-7, 2.6e-7, ""),
    ],
)
def test_what_the_precisions_promise(algorithm: str, error: float, torch_error: float, words: str) -> None:
    row = accuracy.Row("", 1, 2, "forward", algorithm, error, error, torch_error, torch_error)
    assert accuracy.broken(row).partition(":")[0] == words


# Scaling ------------------------------------------------------------------------------------------


def test_a_line_through_times() -> None:
    assert doctest.testmod(fit).failed == 0
    assert fit.fit([1, 2, 4], [12, 22, 21]).deviation > 0.2
    rows = [
        {"work": "a", "threads": n, "size": s, "ms": 5 + s**3 / 1e6 / n} for n in (1, 2) for s in (10, 20, 30)
    ]
    assert {key: (line.fixed, line.slope) for key, line in fit.lines(rows).items()} == {
        ("a", 1): pytest.approx((5, 1)),
        ("a", 2): pytest.approx((5, 0.5)),
    }


def test_time_against_volume_and_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, picture = tmp_path / "r.json", tmp_path / "r.png"
    how = ["--sizes", "8,16", "--threads", "1,2", "--repeats", "2"]
    assert run("scaling", *how, "--json", json_file, "--plot", picture) == 0
    found = results.read(json_file)
    assert [(r["work"], r["size"], r["threads"]) for r in found.rows] == [
        (work, size, threads)
        for work in ("conv 32 to 32", "small U-Net")
        for size in (8, 16)
        for threads in (1, 2)
    ]
    for row in found.rows:
        assert row["ms"] > 0 and row["ms_per_mvoxel"] == pytest.approx(row["ms"] / (row["size"] ** 3 / 1e6))
    assert capsys.readouterr().out.count("from the line") == 4
    assert drawn(picture) and torch.get_num_threads() == 2


# Compare ------------------------------------------------------------------------------------------

MACHINE = {"processor": "A", "threads": 2}


def layer(problem: str = "relu n1 c1 i4", ms: float = 10.0, spread: float = 0.05, gain: float = 2.0) -> dict:
    return {
        "problem": problem,
        "direction": "forward",
        "precision": "high",
        "ms": ms,
        "spread": spread,
        "gain": gain,
    }


def net(variant: str, ms: float, gain: float, peak: float = 100.0) -> dict:
    row: dict = {
        "network": "n",
        "size": [8, 8],
        "batch": 1,
        "dtype": "f32",
        "variant": variant,
        "peak_mb": peak,
    }
    return row | {
        f"{what}_{k}": v
        for what in ("forward", "step")
        for k, v in (("ms", ms), ("gain", gain), ("spread", 0.1))
    }


def write(path: Path, rows: list[dict], kind: str = "layers", **machine: object) -> Path:
    results.write(path, results.Results(kind, MACHINE | machine, rows))
    return path


@pytest.mark.parametrize(
    ("after", "code", "words"),
    [
        (layer(ms=10.4), 0, "1.04\n0 slower by more than the spread, 0 by more than 10%"),
        (layer(ms=10.8), 0, "1.08 slower\n1 slower by more than the spread, 0 by"),
        (layer(ms=11.5), 1, "1.15 slower LOST more than 10%\n1 slower"),
        (layer(ms=11.5, spread=0.3), 1, "1.15 LOST more than 10%\n0 slower"),
        (layer(ms=5.0), 0, "0.50\n0 slower"),
    ],
)
def test_what_became_slower(
    after: dict, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "a.json", [layer()]), write(tmp_path / "b.json", [layer("relu n1 c9 i9"), after])
    assert run("compare", a, b) == code
    assert words in capsys.readouterr().out


def test_tolerance(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json", [layer()]), write(tmp_path / "b.json", [layer(ms=11.5)])
    assert run("compare", a, b, "--tolerance", "0.2") == 0


def test_another_machine_is_compared_by_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.json", [layer()])
    b = write(tmp_path / "b.json", [layer(ms=30, gain=2.1)], processor="B")
    assert run("compare", a, b) == 0
    assert "0.95" in (out := capsys.readouterr().out) and "over torch in the same run" in out
    assert run("compare", a, b, "--by", "ms") == 1


def test_networks_are_compared_by_our_rows(tmp_path: Path) -> None:
    rows = [net("convoxel", 10, 1), net("torch", 30, 3), net("torch, memory kept", 20, 2)]
    a = results.Results("network", MACHINE, rows)
    assert {k: f.value for k, f in compare.figures(a, "ms").items()} == {
        "n 1x8x8 f32 forward": 10,
        "n 1x8x8 f32 step": 10,
        "n 1x8x8 f32 peak MB": 100,
    }
    assert {k: f.value for k, f in compare.figures(a, "gain").items()} == {
        "n 1x8x8 f32 forward": pytest.approx(1 / 3),
        "n 1x8x8 f32 step": pytest.approx(1 / 3),
    }


def test_other_kinds_have_figures() -> None:
    cube = {"work": "w", "size": 8, "threads": 1, "ms": 3, "spread": 0.1}
    wrong = {"problem": "p", "direction": "forward", "algorithm": "direct", "error": 1e-7}
    scaling = results.Results("scaling", MACHINE, [cube])
    assert compare.figures(scaling, "ms") == {"w 8^3 1 threads": compare.Figure(3, 0.1)}
    found = compare.figures(results.Results("accuracy", MACHINE, [wrong]), "gain")
    assert found == {"p forward direct error": compare.Figure(1e-7)}


def test_files_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, other = write(tmp_path / "a.json", [layer()]), write(tmp_path / "n.json", [], "network")
    (tmp_path / "old.json").write_text(json.dumps({"machine": {}, "rows": []}))
    for b, words in (
        (other, "two files of one kind, received layers and network"),
        (write(tmp_path / "b.json", [layer("relu n1 c2 i3")]), "no row of layers that both files have"),
        (tmp_path / "old.json", "measure again with this version"),
        (tmp_path / "none.json", "No such file"),
    ):
        assert run("compare", a, b) == 1
        assert words in capsys.readouterr().err


# Pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "label"),
    [
        ("conv n1 c32 k64 i128x128x128 f3x3x3 s2x2x2 p1x1x1 last", "conv 32→64 128³ k3³ s2³ last"),
        ("conv_transpose n4 c8 k4 i5x6 f2x2 s2x2 bf16", "conv transpose 8→4 5x6 k2² s2² n4 bf16"),
        ("linear n4096 c3 k4", "linear 3→4 4096 rows"),
        ("group_norm n1 c8 i9 g2", "group norm 8 9 g2"),
        ("interpolate n1 c8 i9x9 s2x2 nearest", "interpolate 8 9² s2² nearest"),
    ],
)
def test_labels_are_short(problem: str, label: str) -> None:
    assert plot.short(problem) == label


def test_a_list_says_what_is_asked_for() -> None:
    row = {"problem": "conv n1 c64 k64 i64x64x64 f3x3x3 p1x1x1 last bf16", "direction": "weight_grad"}
    assert plot.least(row) == 2
    assert plot.least(row | {"problem": "relu n1 c1 i1"}) is None


def test_pictures_of_layers_and_networks(tmp_path: Path) -> None:
    words = ["--problem", "relu n1 c4 i8x8", "--passes", "forward", "--repeats", "1"]
    assert run(*words, "--plot", tmp_path / "l.png") == 0
    assert drawn(tmp_path / "l.png")
    rows = [net("convoxel", 10, 1) | {"engine": "convoxel"}, net("torch", 30, 3) | {"engine": "torch"}]
    plot.draw(tmp_path / "n.svg", results.Results("network", MACHINE, rows))
    assert "</svg>" in (tmp_path / "n.svg").read_text()


def test_the_roofline_stands_where_the_limits_meet(tmp_path: Path) -> None:
    words = ["--problem", "conv n1 c4 k8 i8x8 f3x3 p1x1", "--repeats", "1", "--json", tmp_path / "l.json"]
    assert run(*words, "--roofline", tmp_path / "l.svg") == 0
    text = (tmp_path / "l.svg").read_text()
    machine = results.read(tmp_path / "l.json").machine
    assert f"limits: {machine['FMA peak, GFLOP/s']:.0f} GFLOP/s" in text and "conv 4→8 8² k3² last" in text
    assert [roofline.roof(i, 400, 20) for i in (1, 20, 21, 40)] == [20, 400, 400, 400]
    row = next(r for r in results.read(tmp_path / "l.json").rows if r["direction"] == "forward")
    flops, moved = 2 * 8 * 64 * 4 * 9, 4 * (4 * 64 + 8 * 4 * 9 + 8 * 64)
    assert roofline.intensity(row) == pytest.approx(flops / moved, rel=1e-3)


def test_a_picture_that_cannot_be_drawn_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("hot", "--plot", tmp_path / "l.txt") == 1
    assert "--plot: " in (found := capsys.readouterr().err) and "must end with one of" in found
    assert run("hot", "--roofline", tmp_path / "l.txt") == 1
    assert "--roofline: " in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backend_bases", None)
    assert run("hot", "--plot", tmp_path / "l.png") == 1
    assert 'pip install "convoxel[bench]"' in capsys.readouterr().err
