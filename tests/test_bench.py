"""`convoxel bench layers` and `network`: what they print is what they measured."""

import json
import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as T

from convoxel import bench, cli, runtime
from convoxel.bench import lists, measure, network, networks, operators, peers, process
from convoxel.geometry import NORMS, Problem
from convoxel.ops import route


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
        assert row["algorithm"].split()[0] in route.ALGORITHMS
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


OPERATORS = (
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
)


@pytest.mark.parametrize("text", OPERATORS)
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
        (["cold"], 2, "no list cold, expected of hot, first"),
        (["--problem", "conv x"], 1, "'x'"),
        (["--problem", "conv i8x8 f9x9"], 1, "an output of (1, 1, 0, 0); the kernel must fit"),
        (["--problem", "conv_transpose i1 f1 p1"], 1, "an output of (1, 1, -1)"),
        (["--problem", "conv c7 k8 i8 f3 g2"], 1, "c7 and k8 must be multiples of g2"),
        (["--problem", "conv c0 i8 f3"], 1, "must be at least 1"),
        (["--problem", "relu c2 i8", "--passes", "weight_grad"], 1, "none of these problems has weight_grad"),
        (
            ["hot", "--peers", "torch,keras"],
            2,
            "keras unknown, expected of torch,compile,onnxruntime,openvino",
        ),
        (["network", "--dtype", "f16"], 2, "f16 unknown, expected of f32,bf16"),
        (["network", "--size", "64,64"], 1, "--size: nnunet3d takes 3 numbers, received 64,64"),
    ],
)
def test_wrong_arguments_are_named(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == code
    assert message in capsys.readouterr().err


def test_a_network_in_processes_that_take_turns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["network", "small", "--size", "16,16,16", "--rounds", "1"]
    assert run(*words, "--repeats", "1", "--json", str(tmp_path / "r.json")) == 0
    found = rows(tmp_path / "r.json")
    assert [r["variant"] for r in found] == ["convoxel", "torch", "torch, memory kept"]
    for row in found:
        assert min(row["forward_ms"], row["step_ms"], row["peak_fraction"]) > 0 and row["peak_mb"] > 50
        assert row["forward_gain"] == pytest.approx(row["forward_ms"] / found[0]["forward_ms"])
        assert row["step_gain"] == pytest.approx(row["step_ms"] / found[0]["step_ms"])
    assert 0 < found[0]["difference"] < 1e-4 and found[1]["difference"] == 0
    assert capsys.readouterr().out.count("convoxel over torch") == 2


def test_bfloat16_rounds_the_logits_of_both() -> None:
    work = network.Work("small", (8, 8, 8), 1, 1, 2)
    exact, *rounded = (
        torch.tensor(network.measure(network.Variant(engine, dtype), False, work).logits)
        for engine, dtype in (("torch", "f32"), ("torch", "bf16"), ("convoxel", "bf16"))
    )
    for logits in rounded:
        assert 1e-4 < (logits - exact).norm() / exact.norm() < 0.1


def test_variants_of_a_network() -> None:
    names = [str(v) for v in network.variants(("torch", "onnxruntime", "openvino"), ("f32", "bf16"))]
    assert names[:5] == ["convoxel", "torch", "torch, memory kept", "onnxruntime", "openvino"]
    assert names[5:] == ["convoxel bf16", "torch bf16", "torch bf16, memory kept", "openvino bf16"]


def test_an_error_of_a_process_is_the_parents() -> None:
    work = network.Work("small", (15, 16, 16), 1, 1, 1)
    with pytest.raises(ValueError, match="divisible"):
        process.in_process(network.measure, network.Variant("convoxel"), True, work)


def test_flops_of_a_network() -> None:
    work = network.Work("small", (8, 8, 8), 2, 1, 1)
    first = 2 * 2 * 512 * 27 * (1 * 8 + 8 * 8)  # two images, two convolutions at full resolution
    head = 2 * 2 * 512 * 8 * 3
    assert first + head < network.forward_flops(work) < 8 * (first + head)
    assert network.forward_flops(network.Work("small", (16, 16, 16), 2, 1, 1)) == 8 * network.forward_flops(
        work
    )


def test_twins_change_the_kernels_and_nothing_else() -> None:
    ours, theirs = (
        networks.build("small", (8, 8, 8), 1, False)[0],
        networks.build("small", (8, 8, 8), 1, True)[0],
    )
    layers = [name for name, m in ours.named_modules() if isinstance(m, torch.nn.LeakyReLU) or m._parameters]
    assert {type(ours.get_submodule(name)).__module__ for name in layers} == {"convoxel.nn"}
    assert {type(theirs.get_submodule(name)).__module__ for name in layers} == {
        f"torch.nn.modules.{name}" for name in ("conv", "instancenorm", "activation")
    }
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


def test_any_network_can_be_named() -> None:
    found = networks.named("monai.networks.nets.BasicUNet(2, in_channels=2, features=[8, 8, 8, 8, 8, 8])")
    assert (found.patch, found.channels) == ((256, 256), 2)
    work = network.Work("torch.nn.Conv3d(2, 4, kernel_size=(1, 3, 3))", (4, 8, 8), 1, 1, 1)
    assert network.forward_flops(work) == 2 * 2 * 4 * 9 * 4 * 6 * 6
    for wrong, words in (
        ("nonsense", "expected nnunet3d"), ("torch.nn.Conv3d", "a call that makes"),
        ("torch.nn.ReLU()", "no 2-D or 3-D"), ("torch.ones(3)", "makes a Tensor"),
        ("torch.nn.Conv2d(1, x, 3)", "importable"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            networks.named(wrong)
    with pytest.raises(ImportError, match="no_such_package"):
        networks.named("no_such_package.Net()")


# Other engines ------------------------------------------------------------------------------------

INSTALLED = {name: find_spec(module) for name, module in peers.MODULES.items()}


@pytest.mark.parametrize("text", OPERATORS)
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_engine_computes_what_the_problem_says(name: str, text: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip(name)
    p = Problem.parse(text)
    t = operators.tensors(p)
    step = peers.LAYER_PEERS[name](p, t)["forward"]
    reference = operators.exact(p, "forward", t)
    for _ in range(2):
        assert max(operators.errors(step(), reference)) < 3e-6


@pytest.mark.parametrize("text", ["conv n1 c4 k3 i6x7 f3x3 p1x1", "leaky_relu n1 c3 i5x6"])
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compile_computes_what_the_problem_says(text: str) -> None:
    p = Problem.parse(text)
    t = operators.tensors(p)
    found = peers.LAYER_PEERS["compile"](p, t)
    assert set(found) == set(operators.passes(p))
    for name, step in found.items():
        for _ in range(2):
            assert max(operators.errors(step(), operators.exact(p, name, t))) < 3e-6


@pytest.mark.skipif(not INSTALLED["openvino"], reason="needs convoxel[bench]")
def test_peers_beside_ours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--problem", "conv n1 c4 k4 i6x6 f3x3", "--peers", "onnxruntime,openvino", "--repeats", "2"]
    assert run(*words, "--json", str(tmp_path / "r.json")) == 0
    first, *others = rows(tmp_path / "r.json")
    assert list(first["peers"]) == ["onnxruntime", "openvino"] and min(first["peers"].values()) > 0
    assert max(first["peer_errors"].values()) < 1e-6
    assert all(r["peers"] == {} for r in others)
    assert capsys.readouterr().out.count("over openvino, forward") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["network", "small", "--dtype", "bf16"],
        ["layers", "--problem", "relu n1 c4 i8", "--dtype", "bf16"],
    ],
)
def test_onnxruntime_has_no_bfloat16(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnxruntime", "onnx"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or ModuleType(name))
    assert run(*words, "--peers", "onnxruntime") == 1
    assert "onnxruntime computes no bfloat16 on a CPU" in capsys.readouterr().err


@pytest.mark.skipif(not INSTALLED["openvino"], reason="needs convoxel[bench]")
def test_an_engine_beside_a_network(tmp_path: Path) -> None:
    words = ["network", "small", "--size", "8,8,8", "--rounds", "1", "--repeats", "1"]
    assert run(*words, "--peers", "onnxruntime,openvino", "--json", str(tmp_path / "r.json")) == 0
    for row in rows(tmp_path / "r.json")[3:]:
        assert row["forward_ms"] > 0 and row["step_ms"] is None and row["difference"] < 1e-4


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("openvino", ["--problem", "relu n1 c1 i4", "--peers", "openvino"]),
        ("onnxruntime", ["network", "small", "--peers", "torch,onnxruntime"]),
        ("monai", ["network", "basicunet"]),
    ],
)
def test_what_is_not_installed_names_the_extra(
    module: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == module:
            monkeypatch.setitem(sys.modules, name, None)  # which makes its import fail
    monkeypatch.setitem(sys.modules, module, None)
    assert run(*words) == 1
    assert 'pip install "convoxel[bench]"' in (message := capsys.readouterr().err) and module in message
