"""Damaged scans: 1,000 seeded mutations of sound files, and every file that nibabel and pydicom ship.

    PYTHONPATH=python .venv/bin/python tests/campaigns/mutate.py --count 1000 --seed 0

Each file is read in a child process with a time limit. What may come back is a sound Volume or a VolumeError
with a reason and a remedy; another exception, a crash, a hang, or memory beyond BESIDES and what the voxels
of the Volume need is a fault. Sound files have to be read, with the values and places that nibabel and pydicom
give. `--only N` repeats one mutation. Prints counts; exit code 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from dicoms import oblique, values, write_enhanced, write_series  # noqa: E402

LIMIT = 64 << 20  # max_bytes of every read
BESIDES = 96 << 20  # bytes that a read of these small files may take beyond its voxels
SECONDS = 10.0
NUMBERS = (0, 1, -1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
WORDS = (
    *(b"0", b"-1", b"1", b"2", b"7", b"1e308", b"-1e308", b"1e-320", b"nan", b"inf", b"", b"none", b"LIST"),
    *(b"99999999999999999999", b"2147483648", b"../x", b"/etc/passwd", b"(1,2)", b"9" * 5000, b"\xff\xfe"),
    *(b"True", b"False", b"gzip", b"raw", b"double", b"MET_DOUBLE", b"LOCAL", b"little", b"big", b"%d"),
)
TAGS = [  # of a DICOM file: pixels, sizes, place, scale, character set, meta
    *((0x28, e) for e in (0x02, 0x04, 0x08, 0x10, 0x11, 0x30, 0x100, 0x101, 0x102, 0x103, 0x1052, 0x1053)),
    *((0x20, e) for e in (0x0D, 0x0E, 0x13, 0x32, 0x37, 0x52, 0x9113, 0x9116)),
    *((0x08, 0x05), (0x08, 0x16), (0x08, 0x18), (0x18, 0x50), (0x02, 0x00), (0x02, 0x02), (0x02, 0x10)),
    *((0x5200, 0x9229), (0x5200, 0x9230), (0x7FE0, 0x10), (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)),
]


# Sound files ----------------------------------------------------------------------------------------


def sound_files(folder: Path) -> dict[str, Path]:
    """{kind: what to read}; of a DICOM folder one file is mutated."""
    import nibabel

    from convoxel.volume import Volume, write

    affine = np.diag([-1.0, -1, 1, 1]) @ oblique()
    scan, four = Volume(values(), None, affine), Volume(np.stack([values(), values() + 7]), None, affine)
    paths = {
        name: folder / name for name in ("a.nii", "a.nii.gz", "raw.nrrd", "gzip.nrrd", "raw.mha", "zlib.mha")
    }
    for name, path in paths.items():
        write(four if "z" in name else scan, path, compress=None if "nii" in name else "raw" not in name)
    paths["b.nii"] = folder / "b.nii"
    header = nibabel.Nifti2Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nibabel.Nifti2Image(values().T, affine, header)
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, paths["b.nii"])
    write_series(folder / "series", values(), oblique())
    paths["series"] = folder / "series"
    (folder / "enhanced").mkdir()
    write_enhanced(folder / "enhanced" / "a.dcm", values(), oblique())
    paths["enhanced"] = folder / "enhanced"
    for name in (
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "CT_small.dcm",
    ):
        paths[name] = folder / name.removesuffix(".dcm")
        paths[name].mkdir()
        shutil.copy(shipped("pydicom", "data/test_files") / name, paths[name] / name)
    return paths


def shipped(module: str, folder: str) -> Path:
    return Path(__import__(module).__file__).parent / folder


# Mutations ------------------------------------------------------------------------------------------


def mutate(data: bytes, name: str, dice: random.Random) -> tuple[bytes, str]:
    """The damaged file and what was done to it."""
    if name.endswith(".gz") and dice.random() < 0.6:  # inside, with a right checksum
        inner, what = mutate(gzip.decompress(data), name.removesuffix(".gz"), dice)
        return gzip.compress(inner, mtime=0), f"inside gzip: {what}"
    kind = dice.choice(("bits", "bytes", "cut", "insert", "remove", "swap", "field", "field", "field"))
    new = bytearray(data)
    reach = len(data) if dice.random() < 0.5 else min(len(data), 600)  # the header more often
    at = dice.randrange(reach)
    length = min(dice.choice((1, 2, 4, 8, 100)), len(data) - at)
    if kind == "bits":
        for _ in range(dice.choice((1, 1, 2, 8, 64))):
            new[dice.randrange(reach)] ^= 1 << dice.randrange(8)
    elif kind == "bytes":
        new[at : at + length] = bytes([dice.choice((0, 0xFF, 0x80, 0x20, dice.randrange(256)))]) * length
    elif kind == "cut":
        del new[at:]
    elif kind == "insert":
        new[at:at] = dice.randbytes(length)
    elif kind == "remove":
        del new[at : at + length]
    elif kind == "swap":
        other = dice.randrange(len(data) - length + 1)
        new[at : at + length], new[other : other + length] = (
            data[other : other + length],
            data[at : at + length],
        )
    else:
        return field(data, name, dice)
    return bytes(new), f"{kind} at {at}"


def field(data: bytes, name: str, dice: random.Random) -> tuple[bytes, str]:
    """One value of a header becomes another."""
    new = bytearray(data)
    if name.endswith(".nii"):
        at = 2 * dice.randrange(270 if data[:2] != b"\x5c\x01" else 174)
        form = dice.choice("<>") + dice.choice("bhiqfd")
        number = dice.choice(NUMBERS + (float("nan"), float("inf"), 1e38, 2, 3, 512))
        try:
            struct.pack_into(form, new, at, number if form[1] in "fd" else int(number))
        except (struct.error, ValueError, OverflowError):
            struct.pack_into("<H", new, at, dice.randrange(1 << 16))
        return bytes(new), f"{form} {number} at {at}"
    if name.endswith((".nrrd", ".mha")):
        end = max(data.find(b"\n\n"), data.find(b"LOCAL"), 1)
        words = list(re.finditer(rb"[^\s,()]+", data[:end]))
        word, other = dice.choice(words), dice.choice(WORDS)
        new[word.start() : word.end()] = other
        return bytes(new), f"{word.group()!r} -> {other[:20]!r}"
    group, element = dice.choice(TAGS)
    places = [m.start() for m in re.finditer(re.escape(struct.pack("<HH", group, element)), data)]
    if not places:
        return mutate(data, name, dice)
    at = dice.choice(places)
    part = dice.choice(("vr", "length", "value", "value"))
    if part == "vr":
        new[at + 4 : at + 6] = dice.choice((b"OB", b"OW", b"SQ", b"UN", b"DS", b"US", b"FD", b"UT", b"??"))
    elif part == "length":
        form, where = dice.choice((("<H", at + 6), ("<I", at + 8), ("<I", at + 4)))
        struct.pack_into(form, new, where, dice.choice(NUMBERS) % (1 << (16 if form == "<H" else 32)))
    else:
        text = dice.choice((struct.pack("<I", dice.choice(NUMBERS) & 0xFFFFFFFF), dice.choice(WORDS)[:8]))
        new[at + 8 : at + 8 + len(text)] = text
    return bytes(new), f"{part} of ({group:04x},{element:04x})"


# Reading, in a child --------------------------------------------------------------------------------


def worker() -> None:
    """Paths in, one line of JSON out for each."""
    import resource

    from convoxel.volume import VolumeError, read

    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, resource.RLIM_INFINITY))
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        path = json.loads(line)
        before = memory(reset=True)
        answer: dict[str, Any] = {}
        try:
            volume = read(path, max_bytes=LIMIT)
            taken = memory() - before
            answer = {"outcome": "volume", "voxels": volume.array.nbytes, "faults": unsound(volume)}
            answer["sum"] = float(np.nan_to_num(volume.array.astype(float), posinf=0, neginf=0).sum())
        except VolumeError as error:
            taken = memory() - before
            plain = (
                str(error).startswith(os.path.dirname(path)) and "; " in str(error) and len(str(error)) < 2000
            )
            answer = {"outcome": "refused", "faults": "" if plain else f"unclear: {str(error)[:300]}"}
        except BaseException as error:
            taken = memory() - before
            answer = {"outcome": "raised", "faults": f"{type(error).__name__}: {str(error)[:300]}"}
        print("=>" + json.dumps(answer | {"taken": taken}), flush=True)


def unsound(volume: Any) -> str:
    good = np.isfinite(volume.affine).all() and min(volume.spacing) > 0 and volume.array.ndim in (3, 4)
    return "" if good and volume.array.size else f"unsound volume: {volume}"


def memory(reset: bool = False) -> int:
    """This process' peak resident memory in bytes since the last reset; 0 where there is no /proc."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) << 10
    except (OSError, IndexError):
        return 0


class Reader:
    """A child that reads files; when it crashes or hangs there is a next one."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.child: subprocess.Popen[str] | None = None

    def __call__(self, path: Path) -> dict[str, Any]:
        if self.child is None:
            self.child = subprocess.Popen(
                [sys.executable, __file__, "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                bufsize=1,
            )
            self._answer("nothing.nii", 60)  # imports take their time
        answer = self._answer(str(path), self.seconds)
        if answer["outcome"] in ("crashed", "hung"):
            self.close()
        return answer

    def _answer(self, path: str, seconds: float) -> dict[str, Any]:
        assert self.child is not None and self.child.stdin is not None and self.child.stdout is not None
        try:
            print(json.dumps(path), file=self.child.stdin, flush=True)
        except OSError:
            return {"outcome": "crashed", "faults": f"exit code {self.child.wait()}", "taken": 0}
        while True:
            if not select.select([self.child.stdout], [], [], seconds)[0]:
                return {"outcome": "hung", "faults": f"no answer in {seconds} s", "taken": 0}
            line = self.child.stdout.readline()
            if not line:
                return {"outcome": "crashed", "faults": f"exit code {self.child.wait()}", "taken": 0}
            if line.startswith("=>"):
                return dict(json.loads(line[2:]))

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            for pipe in (self.child.stdin, self.child.stdout):
                pipe and pipe.close()
            self.child = None


def fault(answer: dict[str, Any]) -> str:
    if answer["faults"]:
        return f"{answer['outcome']}, {answer['faults']}"
    allowed = BESIDES + answer.get("voxels", 0)
    return f"took {answer['taken'] >> 20} MiB" if answer["taken"] > allowed else ""


# The campaign ---------------------------------------------------------------------------------------


def mutations(count: int, seed: int, only: int | None = None, seconds: float = SECONDS) -> list[str]:
    """Reads `count` damaged files and prints what came of them; returns the faults."""
    faults, counts, peak = [], {}, 0
    reader = Reader(seconds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sound = sound_files(folder)
        sums = {}
        for kind, path in sound.items():
            answer = reader(path)
            sums[kind] = answer.get("sum")
            if answer["outcome"] != "volume" or fault(answer):
                faults.append(f"sound {kind}: {answer}")
        for index in [only] if only is not None else range(count):
            dice = random.Random(f"{seed}:{index}")
            kind = dice.choice(sorted(sound))
            target = sound[kind]
            victim = dice.choice(sorted(target.iterdir())) if target.is_dir() else target
            good = victim.read_bytes()
            damaged, what = mutate(good, victim.name, dice)
            victim.write_bytes(damaged)
            answer = reader(target)
            victim.write_bytes(good)
            outcome = answer["outcome"]
            if outcome == "volume":
                outcome = "read, same sum" if answer["sum"] == sums[kind] else "read, other values"
            counts.setdefault(kind, Counter())[outcome] += 1
            peak = max(peak, answer["taken"])
            if fault(answer):
                faults.append(f"--seed {seed} --only {index}: {kind}, {what}: {fault(answer)}")
            if only is not None:
                print(f"{kind}, {what}: {answer}")
    reader.close()
    total = Counter()
    for kind, outcomes in sorted(counts.items()):
        print(f"{kind:32s}", ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items())))
        total += outcomes
    print(
        f"{'all, seed ' + str(seed):32s}", ", ".join(f"{n} {outcome}" for outcome, n in sorted(total.items()))
    )
    print(f"most memory taken by one read: {peak >> 20} MiB; faults: {len(faults)}")
    return faults


def shipped_files(renamed: bool = True, seconds: float = SECONDS) -> list[str]:
    """What nibabel and pydicom ship, under its own name and (renamed) under those of our formats."""
    faults: list[str] = []
    counts: Counter[str] = Counter()
    reader = Reader(seconds)
    sources = [("nibabel", "tests/data"), ("nibabel", "nicom/tests/data"), ("pydicom", "data/test_files")]
    with tempfile.TemporaryDirectory() as name:
        for module, folder in sources:
            for path in sorted(p for p in shipped(module, folder).rglob("*") if p.is_file()):
                wanted = expected(path)
                names = [path.name] + [
                    f"{path.name}{end}" for end in (".nii", ".nii.gz", ".nrrd", ".mha", ".dcm")
                ]
                for number, file in enumerate(names):
                    home = Path(name) / "home"
                    home.mkdir()
                    shutil.copy(path, home / file)
                    answer = reader(home / file)
                    shutil.rmtree(home)
                    own = number == 0
                    right = wanted is not None and np.isclose(answer.get("sum", np.nan), wanted, rtol=1e-5)
                    if own:
                        counts[
                            f"{module}: {'sound' if wanted is not None else 'others'}, {answer['outcome']}"
                        ] += 1
                    else:
                        counts[f"{module}: under other names, {answer['outcome']}"] += 1
                    if fault(answer):
                        faults.append(f"{module} {file}: {fault(answer)}")
                    elif own and wanted is not None and not right:
                        faults.append(
                            f"{module} {file}: a false alarm or other values: {answer}, sum {wanted}"
                        )
                    elif own and wanted is None and answer["outcome"] != "refused":
                        faults.append(f"{module} {file}: expected to be refused: {answer}")
    reader.close()
    for what, n in sorted(counts.items()):
        print(f"{what:48s} {n}")
    print(f"faults: {len(faults)}")
    return faults


def expected(path: Path) -> float | None:
    """The sum of the values, as nibabel or pydicom has them; None if this is no scan with a place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.name.endswith((".nii", ".nii.gz")):
            import nibabel

            image = nibabel.load(path)
            plain = image.ndim <= 4 and not isinstance(image, nibabel.Cifti2Image)
            return float(np.nan_to_num(image.get_fdata()).sum()) if plain else None
        try:
            import pydicom

            ds = pydicom.dcmread(path)
            grey = ds.SamplesPerPixel == 1 and ds.PhotometricInterpretation.startswith("MONO")
            if (
                not grey
                or not ds.SOPClassUID
                or not ds.SeriesInstanceUID
                or ds.Modality in ("SEG", "RTDOSE")
                or not ds.ImageOrientationPatient
            ):
                return None
            if "MOSAIC" in ds.get("ImageType", ()):  # many slices in one picture, placed as none of them
                return None
            array = pydicom.pixels.apply_rescale(ds.pixel_array, ds)
            return float(array.sum()) if ds.ImagePositionPatient and ds.PixelSpacing else None
        except Exception:  # whatever keeps pydicom from decoding it, it is no sound file
            return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mutation")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return 0
    faults = mutations(options.count, options.seed, options.only)
    if options.only is None:
        faults += shipped_files()
    print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
