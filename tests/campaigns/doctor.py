"""Damaged datasets by the thousand: the doctor always comes to its end, without an error of its own.

    python tests/campaigns/doctor.py [COUNT] [FIRST_SEED] [SOUND]

Each seed damages one file of a sound phantom dataset (bytes of a scan, compressed or not, or of its header, or the
structure of dataset.json) and examines the dataset, with warnings as errors. Prints how often which fault was named,
and every seed that raised or took longer than ten seconds. Then SOUND (40) phantom datasets of ten cases, CT and MR in
both folder formats: every finding on them is a false alarm. Exit code 1 if anything went wrong.
"""

import gzip
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from convoxel import doctor
from convoxel.phantom import make_dataset

_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    7,
    1e300,
    "",
    "0",
    "x",
    [],
    [1, 2],
    {},
    {"0": "a"},
    [[]],
    "../../..",
    "\0",
    "é" * 300,
]


def mutate(folder: Path, rng: random.Random) -> str:
    """Damages one file; returns what was done."""
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    if path.name == "dataset.json" or rng.random() < 0.3:
        content = json.loads((folder / "dataset.json").read_text())
        done = _mutate_json(content, rng)
        (folder / "dataset.json").write_text(json.dumps(content))
        return f"dataset.json: {done}"
    inside = rng.random() < 0.7
    data = bytearray(gzip.decompress(path.read_bytes()) if inside else path.read_bytes())
    reach = min(len(data), 352) if inside and rng.random() < 0.8 else len(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(reach)
        data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    if rng.random() < 0.15:
        del data[rng.randrange(len(data)) :]
    path.write_bytes(gzip.compress(data, 1) if inside else data)
    return f"{path.name}: bytes {'inside' if inside else 'of the file'}"


def _mutate_json(content: Any, rng: random.Random) -> str:
    """Replaces, removes or adds something at a random depth."""
    where = content
    path = []
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        path.append(str(key))
        if isinstance(where[key], (dict, list)) and where[key] and rng.random() < 0.6:
            where = where[key]
            continue
        kind = rng.choice(("replace", "replace", "remove", "add"))
        if kind == "remove":
            del where[key]
        elif kind == "add" and isinstance(where, dict):
            where[
                rng.choice(("dataset", "training", "test", "modality", "regions_class_order", "9", "ignore"))
            ] = rng.choice(_VALUES)
        else:
            where[key] = rng.choice(_VALUES)
        return f"{kind} {'/'.join(path)}"


def campaign(count: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """How often which fault was named, and what went wrong."""
    names: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        settings: list[dict[str, Any]] = [{}, {"format": "msd", "modalities": ("T1", "T2")}]
        sound = [
            make_dataset(
                Path(scratch) / f"Dataset00{i}_Sound", cases=2, test_cases=1, shape=(16, 20, 20), **s
            )
            for i, s in enumerate(settings)
        ]
        for seed in range(first, first + count):
            rng = random.Random(seed)
            folder = Path(scratch) / "Dataset009_Damaged"
            shutil.copytree(sound[seed % 2], folder)
            done, start = mutate(folder, rng), time.perf_counter()
            try:
                names.update({f.name for f in doctor.examine(folder)} - {"few-cases"} or {"(nothing found)"})
            except Exception:
                wrong.append(f"seed {seed}: {done}: {traceback.format_exc()}")
            if time.perf_counter() - start > 10:
                wrong.append(f"seed {seed}: {done}: {time.perf_counter() - start:.0f} s")
            shutil.rmtree(folder)
    return names, wrong


def alarms(count: int, first: int = 0) -> list[str]:
    """Findings on sound datasets."""
    kinds: list[dict[str, Any]] = [{}, {"modalities": ("T1", "T2")}, {"format": "msd"}]
    kinds.append({"modalities": ("T2",), "format": "msd"})
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(first, first + count):
            folder = Path(scratch) / f"Dataset{seed % 1000:03d}_Phantom"
            make_dataset(folder, cases=10, seed=seed, shape=(20, 32, 32), **kinds[seed % len(kinds)])
            found += [f"seed {seed}: {finding}" for finding in doctor.examine(folder)]
            shutil.rmtree(folder)
    return found


def main(count: int = 1000, first: int = 0, sound: int = 40) -> int:
    warnings.simplefilter("error")
    names, wrong = campaign(count, first)
    for name, times in names.most_common():
        print(f"{times:6} {name}")
    false = alarms(sound, first)
    print(*wrong, *false, sep="\n")
    print(
        f"{count} damaged datasets from seed {first} on: {len(wrong)} wrong; {sound} sound: {len(false)} false alarms"
    )
    return int(bool(wrong or false))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
