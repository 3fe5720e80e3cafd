"""kill -9 at random instants of a training run, and a disk that is full: every run goes on to the same bits.

    python tests/campaigns/kill.py [TRIALS=100] [SEED=0] [TMPFS]

A run of `convoxel train` on phantoms is trained once without interruption, with its caches, logs and pictures. Each
trial starts it in an empty folder and kills it by SIGKILL after a random share of that run's time, so that imports,
planning, caching, steps, saves and validation are all hit; half of them are killed again on their way; then it goes on
to the end. The final weights and the log must be those of the uninterrupted run, bit for bit. TMPFS: a small file
system that is empty (mount -t tmpfs -o size=3m none FOLDER), on which a last run fills the disk up: it must stop with
exit code 1 and one line of words, and go on to the same bits once there is room. Exit code 1 if anything differs.
"""

import contextlib
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from convoxel.phantom import make_dataset
from convoxel.training.settings import as_yaml

SETTINGS = {"patch_size": [16, 24, 24], "base_features": 4, "batch_size": 2, "epochs": 4, "steps_per_epoch": 10,
            "validation_patches": 2, "preview_every": 2}  # fmt: skip


def command(work: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "convoxel", "train", str(work / "data"), "-o", str(out), "-q",
            "--settings", str(work / "settings.yaml")]  # fmt: skip


def finish(work: Path, out: Path) -> None:
    done = subprocess.run(command(work, out), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{out}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")


def result(out: Path) -> tuple[dict[str, torch.Tensor], list[tuple[str, ...]], dict[str, bytes]]:
    """Weights, log without what the clock says, and the held-out scans' labels."""
    fold = out / "fold_0"
    with (fold / "log.csv").open() as file:
        log = [
            tuple(v for k, v in row.items() if "seconds" not in k and k != "waited")
            for row in csv.DictReader(file)
        ]
    labels = {path.name: path.read_bytes() for path in sorted((fold / "validation").glob("*.nii.gz"))}
    return load_file(fold / "model.safetensors"), log, labels


def same(a: Path, b: Path) -> bool:
    (ours, log, labels), (theirs, their_log, their_labels) = result(a), result(b)
    bits = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    left = [str(path) for path in a.rglob(".*.tmp")]
    return bits and log == their_log and labels == their_labels and not left


def kill_after(seconds: float, argv: list[str]) -> bool:
    """Whether it was killed: it may have been done before."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def stage(out: Path) -> str:
    """How far a killed run had come."""
    fold = out / "fold_0"
    if (fold / "validation").is_dir():
        return "in or after validation"
    if (fold / "model.safetensors").is_file():
        return "trained"
    if (fold / "state.safetensors").is_file():
        return "after a state"
    return "in the first epoch" if fold.is_dir() else "planning or before"


def _keep(*folders: Path) -> Path:
    target = Path(tempfile.mkdtemp(prefix="kill-"))
    for folder in folders:
        shutil.copytree(folder, target / folder.name)
    return target


def full_disk(work: Path, disk: Path, straight: Path) -> bool:
    """Fills the disk up but for a few KB once the run has its first state."""
    out = disk / "run"
    argv = [*command(work, out), "--cache", str(work / "cache")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "fold_0" / "state.safetensors").is_file() and process.poll() is None:
        time.sleep(0.001)
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    _, error = process.communicate()
    lines = [line for line in error.splitlines() if line.startswith("convoxel train:")]
    print(f"full disk: exit code {process.returncode}, {lines}")
    stopped = process.returncode == 1 and len(lines) == 1 and "Traceback" not in error
    ballast.unlink()
    done = subprocess.run(argv, capture_output=True, text=True)
    return stopped and done.returncode == 0 and same(out, straight)


def main(trials: int, seed: int, disk: Path | None) -> int:
    rng, stages, failures = random.Random(seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_dataset(work / "data", cases=5, test_cases=0, shape=(24, 40, 40), spacing=(9.0, 8.0, 8.0))
        (work / "settings.yaml").write_text(as_yaml(SETTINGS))
        straight = work / "straight"
        began = time.perf_counter()
        finish(work, straight)
        whole = time.perf_counter() - began
        print(f"uninterrupted: {whole:.1f} s; {trials} trials, seed {seed}", flush=True)
        for trial in range(trials):
            out = work / f"trial{trial}"
            for _ in range(rng.randint(1, 2)):
                if kill_after(rng.uniform(0.3, whole), command(work, out)):
                    stages[stage(out)] += 1
            finish(work, out)
            if not same(out, straight):
                failures += 1
                print(
                    f"trial {trial}: not the uninterrupted run's bits; both are kept in {_keep(out, straight)}",
                    flush=True,
                )
            shutil.rmtree(out)
            if (trial + 1) % 10 == 0:
                print(f"{trial + 1} trials, {sum(stages.values())} kills, {failures} failures", flush=True)
        if disk is not None and not full_disk(work, disk, straight):
            failures += 1
            print("full disk: lost")
    print(f"{trials} trials, {sum(stages.values())} kills ({dict(stages)}), {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    count, start = (int(word) for word in (*sys.argv[1:3], *("100", "0")[len(sys.argv) - 1 :])[:2])
    sys.exit(main(count, start, Path(sys.argv[3]) if len(sys.argv) > 3 else None))
