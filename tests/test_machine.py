"""Threads, forks, signals, memory and symbols: what the machine underneath must not notice."""

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import convoxel
from child import python
from convoxel import functional as F
from convoxel import nn
from every import EVERY, ONE_OF_EACH, Call

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


# Threads ------------------------------------------------------------------------------------------


@linux
def test_threads_are_torchs_and_as_many_as_torch_was_told() -> None:
    """One OpenMP runtime, torch's: its workers serve our kernels, and no others appear."""
    out = python(
        """
        import os, re, torch, convoxel
        from convoxel import functional as F

        print(sorted(set(re.findall(r"/\\S*/lib(?:gomp|omp|iomp)\\S*", open("/proc/self/maps").read()))))
        x, w = torch.ones(1, 8, 24, 24, 24), torch.ones(8, 8, 3, 3, 3)
        tasks = lambda: len(os.listdir("/proc/self/task"))
        ours, torchs = lambda: F.conv3d(x, w), lambda: torch.ones(1 << 20).add_(1)
        first = tasks()
        for threads, calls in (1, [ours]), (5, [ours, torchs]), (7, [torchs, ours]):
            torch.set_num_threads(threads)
            for call in calls:
                call()
                print(tasks() - first)
        """
    )
    libraries, *tasks = out.splitlines()
    assert libraries.count(".so") == 1 and str(Path(torch.__file__).parent) in libraries, libraries
    alone, five, same, seven, same_again = map(int, tasks)
    assert (
        alone == 0 and five >= 3 and same == five and seven == same_again == five + 2
    )  # import starts one or two


@pytest.mark.parametrize("call", EVERY, ids=str)
def test_same_bits_for_every_thread_count(call: Call) -> None:
    tensors = call.tensors(grad=True)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(call.results(F, *tensors))
    assert equal(runs[0], runs[1]) and equal(runs[0], runs[2])


def test_many_python_threads_on_shared_layers_give_the_right_bits() -> None:
    net = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.LeakyReLU(), nn.MaxPool3d(2),
                        nn.ConvTranspose3d(8, 3, 2, stride=2))  # fmt: skip
    inputs = [torch.randn(1, 2, 8, 8, 8) for _ in range(6)]

    def run(x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = net(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]

    expected = [run(x) for x in inputs]
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            wrong.extend(i for _ in range(10) if not equal(run(inputs[i]), expected[i]))
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert wrong == [] and not any(w.is_alive() for w in workers)


def test_other_python_threads_run_during_a_kernel() -> None:
    """Heartbeats of another thread within a single call; with the GIL held there would be none."""
    convoxel.set_isa("baseline")
    convoxel.set_conv_algorithm("direct")
    torch.set_num_threads(1)
    x, w = torch.ones(1, 32, 24, 24, 24), torch.ones(64, 32, 3, 3, 3)
    beats: list[float] = []
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.002):
            beats.append(time.perf_counter())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        start = time.perf_counter()
        F.conv3d(x, w)
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
    assert sum(start + 0.01 < b < end - 0.01 for b in beats) >= 3, (
        f"{len(beats)} beats in {end - start:.3f} s"
    )


def test_every_kernel_is_bound_with_the_gil_released() -> None:
    source = ROOT / "csrc" / "bind.cpp"
    if not source.exists():
        pytest.skip("no source tree beside the tests")
    parts = re.split(r"(?=\bm\.def\()", source.read_text())[1:]
    definitions = [part.split("\n}")[0] for part in parts]  # what follows is another function
    kernels = [d for d in definitions if re.search(r"\[[^]]*\]\([^)]*\bPointer\b", d)]
    assert len(kernels) >= 2
    for definition in kernels:
        assert "py::call_guard<py::gil_scoped_release>()" in definition, definition.splitlines()[:3]


def test_ctrl_c_is_answered_and_leaves_everything_working() -> None:
    x, w = torch.randn(1, 8, 16, 16, 16), torch.randn(8, 8, 3, 3, 3)
    expected = F.conv3d(x, w)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            start = time.monotonic()
            while time.monotonic() < start + 30:
                F.conv3d(x, w)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    assert torch.equal(F.conv3d(x, w), expected)


# Forks --------------------------------------------------------------------------------------------

FORK = """
    import os, signal, sys, threading, torch, convoxel
    from convoxel import functional as F, nn, runtime

    torch.set_num_threads(2)
    x, w = torch.randn(1, 8, 24, 24, 24), torch.randn(8, 8, 3, 3, 3)
    how = ((1, 1, 1), (0, 0, 0), (1, 1, 1), 1, (3, 3, 3))
    bits = lambda t: t.detach().numpy().tobytes()
    run = lambda: bits(F.conv3d(x, w)) + bits(torch.ops.convoxel.conv_weight_grad(x, F.conv3d(x, w), *how))
    expected = run()  # OpenMP's threads now exist

    def child(work):
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # a hang is killed
            try:
                os._exit(0 if work() else 1)
            finally:
                os._exit(2)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


@forks
def test_a_forked_child_computes_on() -> None:
    out = python(
        FORK
        + """
    print("as it is", child(lambda: run() == expected))
    print("one thread", child(lambda: torch.set_num_threads(1) or run() == expected))
    print("two threads", child(lambda: torch.set_num_threads(2) or run() == expected))
    print("told", child(lambda: runtime.threads() == 1 == convoxel.info()["threads"]))
    print("grandchild", child(lambda: child(lambda: run() == expected) == 0))
    with runtime._state.lock:  # as if another thread of the parent was counting
        print("lock", child(lambda: run() == expected and convoxel.stats() != {}))
    print("parent", 0 if runtime.threads() == 2 and run() == expected else 1)
    """
    )
    results = dict(line.rsplit(" ", 1) for line in out.splitlines() if line[-1].isdigit())
    assert results == dict.fromkeys(
        ("as it is", "one thread", "two threads", "told", "grandchild", "lock", "parent"), "0"
    ), out


@forks
def test_loader_workers_compute() -> None:
    out = python(
        FORK
        + """
    class Filtered(torch.utils.data.Dataset):
        layer = nn.Conv3d(1, 4, 3).requires_grad_(False)
        volumes = torch.randn(6, 1, 32, 32, 32)

        def __len__(self):
            return len(self.volumes)

        def __getitem__(self, i):
            return self.layer(self.volumes[i])

    data = Filtered()
    loader = torch.utils.data.DataLoader(data, 2, num_workers=2, multiprocessing_context="fork", timeout=30)
    print("same", torch.equal(torch.cat(list(loader)), torch.stack([data[i] for i in range(6)])))
    """
    )
    assert "same True" in out, out


# Memory -------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def grows(call, times: int) -> float:
    """Bytes per call, after a warm-up."""
    for _ in range(200):
        call()
    before = resident()
    for _ in range(times):
        call()
    return (resident() - before) / times


@linux
def test_ten_thousand_calls_leak_nothing() -> None:
    """A leaked result would be 7,000 bytes a call, a leaked Python object a hundred."""
    torch.set_num_threads(1)
    layer, x = nn.Conv3d(4, 4, 3), torch.randn(1, 4, 8, 8, 8)
    references = sys.getrefcount(x), sys.getrefcount(layer.weight)

    def step() -> None:
        layer.zero_grad()
        layer(x).sum().backward()

    assert grows(step, 10_000) < 60
    assert (sys.getrefcount(x), sys.getrefcount(layer.weight)) == references


@linux
@pytest.mark.parametrize("call", [c for c in ONE_OF_EACH if not c.name.startswith("conv")], ids=str)
def test_no_function_leaks(call: Call) -> None:
    torch.set_num_threads(1)
    tensors = [t.repeat(8, *[1] * (t.dim() - 1)) if i == 0 else t for i, t in enumerate(call.tensors())]
    leaves = [t.requires_grad_() for t in tensors]
    size = 4 * call(F, *tensors).numel()
    references = [sys.getrefcount(t) for t in leaves]
    assert grows(lambda: call.results(F, *leaves), 400) < max(size / 2, 300)
    assert [sys.getrefcount(t) for t in leaves] == references


@linux
def test_calls_that_raise_leak_nothing() -> None:
    x, w, half = torch.randn(1, 4, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(1, 4, 8, 8).half()
    references = sys.getrefcount(x), sys.getrefcount(w)
    convoxel.set_strict(True)

    def step() -> None:
        for bad in (
            lambda: F.conv2d(x, w),
            lambda: F.conv2d(half, w.half()),
            lambda: F.conv2d(x, w, stride=(1, 2, 3)),
        ):
            with pytest.raises((RuntimeError, ValueError)):
                bad()

    assert grows(step, 3_400) < 60
    assert (sys.getrefcount(x), sys.getrefcount(w)) == references


def test_a_result_outlives_its_network() -> None:
    layer = nn.Conv2d(1, 2, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    y = layer(torch.ones(1, 1, 5, 5))
    expected = y.detach().clone()
    del layer
    gc.collect()
    torch.randn(1000).sort()
    assert torch.equal(y, expected)
    y.sum().backward()
    assert torch.equal(y, F.conv2d(torch.ones(1, 1, 5, 5), weight, bias))


# Symbols ------------------------------------------------------------------------------------------

SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


def objects(source: Path, folder: Path) -> dict[Path, str]:
    """Object files of a kernel source by ISA: what the last build made if it is fresh, or compiled here."""
    newest = max(
        f.stat().st_mtime for f in [source, *source.parent.glob("*.h"), *source.parent.parent.glob("*.h")]
    )
    built = ROOT.glob(f"build/**/convoxel_*.dir/csrc/cpu/{source.name}.o")
    fresh = {o: o.parts[-4][len("convoxel_") : -len(".dir")] for o in built if o.stat().st_mtime > newest}
    if fresh:
        return fresh
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("neither a fresh build nor g++ is here")
    target, flags = (
        folder / "kernel.o",
        "-std=c++17 -O2 -fPIC -fvisibility=hidden -fno-exceptions -fopenmp -Wno-psabi",
    )
    command = [compiler, *flags.split(), "-DCONVOXEL_ISA=baseline", "-c", source, "-o", target]
    subprocess.run(command, check=True)
    return {target: "baseline"}


@pytest.mark.skipif(not SOURCES, reason="no source tree beside the tests")
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_kernels_share_no_symbol_between_instruction_sets(source: Path, tmp_path: Path) -> None:
    """A weak symbol (W, V, u) is kept once for all: an AVX-512 copy would crash the CPUs without it."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    for path, isa in objects(source, tmp_path).items():
        listing = subprocess.run(
            [nm, "-C", "--defined-only", path], capture_output=True, text=True, check=True
        )
        symbols = [line.split(maxsplit=2)[1:] for line in listing.stdout.splitlines()]
        shared = [name for kind, name in symbols if kind in "WVuwv" or (kind.isupper() and kind != "N")]
        assert shared and all(re.fullmatch(rf"convoxel::{isa}::\w+", name) for name in shared), shared
        assert not [s for s in symbols if s[0] in "WVuwv"]
