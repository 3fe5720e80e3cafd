"""Scans on the command line: which files make one case, and where its labels go.

nnU-Net's naming: CASE_0000.nii.gz, CASE_0001.nii.gz ... are the channels of one case, its labels are CASE.nii.gz.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".nhdr")
WRITABLE = (".nii.gz", ".nii", ".nrrd", ".mha")


class Case(NamedTuple):
    """The files of one scan, in the order of the channels, and the file for its labels."""

    name: str
    files: tuple[Path, ...]
    target: Path

    @property
    def probabilities(self) -> Path:
        """The file for the probabilities, beside the labels."""
        return self.target.with_name(f"{_split(self.target)[0]}_probabilities.nii.gz")


def find(inputs: Sequence[Path], out: Path, channels: int) -> list[Case]:
    """The cases in `inputs`: files, folders of them, or folders of one DICOM series; for a model of so many channels.

    With one case `out` may be a file; otherwise it is a folder, in which each is named CASE.nii.gz.

    Raises FileNotFoundError, and ValueError where channels are missing or two cases have one name.

    >>> find([Path("liver_0000.nii.gz")], Path("out"), channels=1)[0].target
    PosixPath('out/liver.nii.gz')
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.name.lower().endswith(ENDINGS))
            if not inside and not any(file.is_file() for file in path.iterdir()):
                raise ValueError(
                    f"{path}: no scans in this folder; expected {', '.join(ENDINGS)} or a DICOM series"
                )
            files += inside or [path]
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(2, "no such scan", str(path))
    groups = _group(files, channels)
    single = out.name.lower().endswith(WRITABLE)
    if single and len(groups) > 1:
        raise ValueError(f"{out} is one file, but there are {len(groups)} cases; give a folder for -o")
    cases: list[Case] = []
    for (folder, name), parts in groups.items():
        if any(case.name == name for case in cases):
            raise ValueError(
                f"two cases are named {name}, one of them in {folder}; predict them one after the other"
            )
        ending = _split(parts[0])[1]
        target = out / f"{name}{ending if ending in WRITABLE else WRITABLE[0]}"
        cases.append(Case(name, tuple(parts), out if single else target))
    return cases


def _group(files: Sequence[Path], channels: int) -> dict[tuple[Path, str], list[Path]]:
    numbered: dict[tuple[Path, str], dict[int, Path]] = {}
    for file in dict.fromkeys(files):
        name, _ = _split(file)
        match = re.fullmatch(r"(.+)_(\d{4})", name)
        if match is None and channels > 1:
            # one file with all channels (4-D); the model looks whether it has them
            numbered[file.parent, name] = {0: file}
            continue
        case, index = (match[1], int(match[2])) if match else (name, 0)
        parts = numbered.setdefault((file.parent, case), {})
        if index in parts:
            raise ValueError(f"{file} and {parts[index]} are the same channel of one case")
        parts[index] = file
    groups = {}
    for (folder, name), parts in numbered.items():
        if len(parts) > 1 or channels == 1:
            missing = [i for i in range(channels) if i not in parts]
            if missing or len(parts) != channels:
                wanted = ", ".join(f"{name}_{i:04d}" for i in range(channels))
                raise ValueError(
                    f"{folder / name}: the model takes {channels} channel(s), {wanted}; found "
                    f"{', '.join(file.name for _, file in sorted(parts.items()))}"
                )
        groups[folder, name] = [file for _, file in sorted(parts.items())]
    return groups


def _split(path: Path) -> tuple[str, str]:
    """("liver_0000", ".nii.gz"); a folder has no ending."""
    ending = next((end for end in ENDINGS if path.name.lower().endswith(end)), "")
    return path.name[: len(path.name) - len(ending)] or path.resolve().name, ending
