"""`convoxel bench targets`: the table says what the files say."""

import re
from pathlib import Path

import pytest

from convoxel import cli
from convoxel.bench import lists, network_lists, operators, results, targets
from convoxel.geometry import Problem

AVX512 = {"processor": "A", "threads": 2, "ISA": "avx512 (available: avx2, avx512)"}
AVX2 = AVX512 | {"ISA": "avx2 (available: avx2, avx512)"}


def layers(
    name: str, gain: float, word: str = " last", precision: str = "high", **other: float
) -> list[dict]:
    """A row for each pass of each problem of a list."""
    usual = {"gain": gain, "ms": 10.0, "torch_ms": 10.0 * gain, "peak_fraction": 0.9, "copy_fraction": 0.5}
    return [
        {"problem": text + word, "direction": direction, "precision": precision} | usual | other
        for text in lists.LISTS[name].texts
        for direction in operators.passes(Problem.parse(text))
    ]


def network(**ms: float) -> list[dict]:
    """Rows of nnU-Net 3D: what each variant takes, for everything."""
    names = {name: name.replace("_", " ").replace("kept", "torch, memory kept") for name in ms}
    return [
        {"network": "nnunet3d", "size": [128] * 3, "variant": names[name]}
        | {"forward_ms": v, "step_ms": v, "peak_mb": v}
        for name, v in ms.items()
    ]


def cells(rows: list[dict], kind: str = "layers", machine: dict = AVX512) -> dict[str, tuple[str, str]]:
    """Work: what was measured, and whether it is met."""
    table = targets.table([results.Results(kind, machine, rows)])
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    return {work: (measured, met) for work, _, _, measured, met in found}


HOT = "k3 hot layers, fp32 high, forward and input gradient"


@pytest.mark.parametrize(("gain", "met"), [(3.1, "yes"), (2.9, "**no**")])
def test_a_list_is_judged_by_its_mean(gain: float, met: str) -> None:
    measured, found = cells(layers("hot", gain))[HOT]
    assert measured.startswith(
        f"forward {gain:.2f}x, input_grad {gain:.2f}x; lowest {gain:.2f}x (conv n1 c32"
    )
    assert found == met


def test_a_mean_is_geometric_and_a_low_row_fails() -> None:
    rows = layers("hot", 4.0)
    for row in rows[:2]:
        row["gain"] = 1.9
    measured, met = cells(rows)[HOT]
    assert measured.startswith(f"forward {(4**5 * 1.9) ** (1 / 6):.2f}x") and "lowest 1.90x" in measured
    assert met == "**no**"


def test_a_part_of_a_list_meets_nothing() -> None:
    assert cells(layers("hot", 9.0)[:3])[HOT] == (
        "1 of 6 problems: forward 9.00x, input_grad 9.00x; lowest 9.00x "
        "(conv n1 c32 k32 i128x128x128 f3x3x3 p1x1x1 last forward)",
        "",
    )
    assert cells([])[HOT] == ("not measured", "")


def test_dtypes_and_precisions_are_kept_apart() -> None:
    bf16 = "k3 hot layers, bf16, over torch bf16"
    found = cells(layers("hot", 1.6, " last bf16"))
    assert found[bf16][1] == "yes" and found[HOT][0] == "not measured"
    peak = "k3 hot layers, fp32 highest (direct)"
    assert cells(layers("hot", 1.0, precision="highest"))[peak][1] == "yes"
    assert cells(layers("hot", 1.0, precision="highest", peak_fraction=0.8))[peak][1] == "**no**"
    assert cells(layers("hot", 0.9, precision="highest"))[peak][1] == "**no**"


def test_each_row_around_counts_and_says_its_bandwidth() -> None:
    rows = layers("around", 2.5)
    around = "norm, activation, pooling, interpolation"
    measured, met = cells(rows)[around]
    assert measured.endswith("; of a copy forward 0.50, backward 0.50") and met == "yes"
    rows[5]["gain"] = 1.8
    assert cells(rows)[around][1] == "**no**"


def test_networks_are_ratios_of_variants() -> None:
    rows = network(convoxel=10, torch=41, kept=23, openvino=19, torch_bf16=18)
    found = cells(rows, "network")
    forward, step, memory = (v for k, v in found.items() if "nnU-Net 3D" in k or "peak memory" in k)
    assert forward == ("4.10x torch, 2.30x torch, memory kept, 1.90x openvino", "**no**")
    assert step == ("4.10x torch, 2.30x torch, memory kept, 1.80x torch bf16", "yes")
    assert memory == ("0.24x", "yes")
    small = cells([row | {"size": [96] * 3} for row in rows], "network")
    assert all(v[0].endswith(" (patch 96x96x96)") for k, v in small.items() if k.startswith("nnU-Net 3D"))
    without = cells(rows[:3], "network")
    assert [v[1] for k, v in without.items() if "nnU-Net 3D" in k] == ["", ""]


def test_what_is_replaced_is_not_slower() -> None:
    replaced = "anything replaced by default"
    assert cells(layers("first", 1.0))[replaced][1] == "yes"
    measured, met = cells(layers("first", 0.9))[replaced]
    assert measured.startswith("15 of 15 rows under 0.97x, 0 of 0 short") and met == "**no**"
    short = layers("small", 0.5, torch_ms=0.02, ms=0.04)
    assert cells(short)[replaced][1] == "yes"
    short[0]["ms"] = 0.06
    measured, met = cells(short)[replaced]
    assert "1 of 20 short ones over 25 us; most 40 us (conv n1 c8" in measured and met == "**no**"


def test_avx2_has_rows_of_its_own() -> None:
    found = cells(layers("hot", 2.5), machine=AVX2)
    assert found[HOT][0] == "not measured" and found[f"AVX2: {HOT}"][1] == "yes"
    assert f"AVX2: {HOT}" not in cells(layers("hot", 2.5))


def test_errors_and_scaling() -> None:
    wrong = [
        {"algorithm": a, "error": e, "problem": "conv n1 c8 k8 i9x9 f3x3 p1x1"}
        for a, e in (("high", 2e-6), ("winograd 4x4x4", 4e-6), ("direct", 1.0))
    ]
    wrong.append({"algorithm": "high", "error": 2e-3, "problem": "conv n1 c8 k8 i9x9 f3x3 p1x1 bf16"})
    assert cells(wrong, "accuracy")["fp32 high, relative L2 error"] == ("4.0e-06", "yes")
    wrong[0]["error"] = 2e-5
    assert cells(wrong, "accuracy")["fp32 high, relative L2 error"] == ("2.0e-05", "**no**")
    cubes = [{"work": "w", "size": s, "threads": n, "ms": s**3 / n} for s in (10, 20, 30) for n in (1, 2)]
    found = cells(cubes, "scaling")
    assert found["threads"] == ("w 2.00x from 1 to 2", "")
    assert (
        found["time against volume, 32^3 to 192^3"][0]
        == "largest deviation w, 1 threads: 0%; w, 2 threads: 0%"
    )


def test_folders_and_files_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "targets", str(tmp_path)]) == 1
    assert "no results in" in capsys.readouterr().err
    results.write(tmp_path / "hot.json", results.Results("layers", AVX512, layers("hot", 5.0)))
    assert cli.main(["bench", "targets", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"| {HOT} | 3x mean, none under 2x | 4x | forward 5.00x" in out
    assert re.search(r"- hot.json: processor A, threads 2, ISA avx512, ", out)


def test_the_script_asks_for_what_there_is() -> None:
    """Every line of benchmarks/run.sh is a command line that convoxel takes."""
    script = (Path(__file__).parents[1] / "benchmarks" / "run.sh").read_text()
    (rest,) = re.findall(r"^rest=\((.*)\)$", script, re.M)
    commands = [
        words.replace('"${rest[@]}"', rest).split()
        for words in re.findall(r"^measure \S+ (.*)$", script, re.M)
    ]
    parsed = [cli.build_parser().parse_args(["bench", *words]) for words in commands]
    assert {args.work for args in parsed} == {"layers", "network", "scaling", "accuracy"}
    asked = {name for args in parsed if args.work == "layers" for name in args.lists}
    assert asked == set(lists.LISTS) - set(network_lists.LAYERS)
