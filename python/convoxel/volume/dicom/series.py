"""Which files of a folder are one scan."""

from __future__ import annotations

from pathlib import Path

from ..core import VolumeError
from .headers import NO_MARK, File, has_mark, need_pydicom, read_header

_NAMES = (".dcm", ".ima", ".dicom")


def is_dicom(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in _NAMES or has_mark(path)


def files_of(path: Path, series: str | None) -> list[File]:
    """The files of one series: that of the file `path`, or `series`, or the folder's only one."""
    need_pydicom()
    if not path.is_dir():
        chosen = read_header(path)
        if not chosen.is_scan:
            raise VolumeError(
                f"{path}: this is {chosen.kind}; give the folder of a scan, or one of its slices"
            )
        if series not in (None, chosen.series):
            raise VolumeError(f"{path}: its series is {chosen.series}, not {series}; give its folder instead")
        series, path = chosen.series, path.parent
    files, broken = _scan(path)
    found: dict[str, list[File]] = {}
    for file in files:
        if file.is_scan:
            found.setdefault(file.series, []).append(file)
    if not found and (damaged := [reason for reason in broken.values() if NO_MARK not in reason]):
        raise VolumeError(damaged[0])
    wanted = _choose(found, files, series, path)
    _check_none_is_broken(wanted, broken)
    if len({file.place for file in wanted}) > 1:
        raise VolumeError(
            f"{path}: the series {wanted[0].series} has several frames of reference: the patient moved or was "
            "placed anew; put the images of one scan into a folder of their own"
        )
    return wanted


def _scan(folder: Path) -> tuple[list[File], dict[Path, str]]:
    """Readable DICOM files, and the other files with what is wrong with them."""
    files, broken = [], {}
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "DICOMDIR")
    except OSError as error:
        raise VolumeError(f"{folder}: cannot list it ({error.strerror}); check its permissions") from error
    for path in paths:
        try:
            files.append(read_header(path))
        except VolumeError as error:
            broken[path] = str(error)
    return files, broken


def _choose(found: dict[str, list[File]], files: list[File], series: str | None, folder: Path) -> list[File]:
    if series is not None and series in found:
        return found[series]
    names = "; ".join(f"{uid}: {group[0].title}, {len(group)} files" for uid, group in sorted(found.items()))
    if series is not None:
        raise VolumeError(f"{folder}: there is no series {series} in it; it has {names or 'none'}")
    if len(found) > 1:
        raise VolumeError(
            f'{folder}: it has {len(found)} series, choose one by read(path, series="..."): {names}'
        )
    if found:
        return next(iter(found.values()))
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())[:5]
    others = f" (only {', '.join(sorted({file.kind for file in files}))})" if files else ""
    where = (
        f"one of its own folders, {', '.join(folders)}?" if folders else "check that this is the right one"
    )
    raise VolumeError(f"{folder}: this folder has no DICOM scan in it{others}; {where}")


def _check_none_is_broken(wanted: list[File], broken: dict[Path, str]) -> None:
    """A damaged file may be a slice of the scan, its last perhaps, which no gap would show."""
    kinds = {_kind(file.path) for file in wanted}
    for path, reason in broken.items():
        if _kind(path) in kinds:
            raise VolumeError(
                f"{reason.split(';')[0]}; it lies among the files of the series and is named like one: copy it "
                "again, or remove it from the folder"
            )


def _kind(path: Path) -> str:
    """The ending of a name; none where it is a number, as in 1.2.840.113619."""
    ending = path.suffix.lower()
    return "" if ending[1:].isdigit() else ending
