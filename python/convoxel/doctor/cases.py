"""One case: its images and its label, each read once, and whether they lie on one grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..volume import Volume
from .catalogue import Finding, finding
from .dataset import Case, Dataset
from .labels import LabelMap, examine_labels, on_nothing
from .scans import Channel, Grid, channel_of, examine_image, grid_of, load

_SAME = 1e-3  # relative difference of two spacings
_APART = (0.5, 0.02, 1e-4)  # voxels: another place; doubtful; rounding; below that the same
_NOTHING = 0.3  # of the labelled voxels


@dataclass
class CaseFacts:
    """What is known of a case without its voxels."""

    case: Case
    grid: Grid | None = None
    channels: dict[Path, list[Channel]] = field(default_factory=dict)
    label: LabelMap | None = None
    files: int = 0


def examine_case(
    case: Case, dataset: Dataset, max_bytes: int | None = None
) -> tuple[CaseFacts, list[Finding]]:
    """Reads the files of a case, one image at a time, and compares them."""
    facts = CaseFacts(case, files=len(case.images) + (case.label is not None))
    found: list[Finding] = []
    marked = None
    if case.label is not None:
        marked, found = load(case.label, max_bytes)
        if marked is not None:
            known = None if dataset.labels is None else dataset.labels.keys()
            digest = channel_of(marked.array).digest
            facts.label, more = examine_labels(marked, case.label, digest, known)
            found += more
    for i, path in sorted(case.images.items()):
        image, more = load(path, max_bytes)
        found += more
        if image is None:
            continue
        found += _image(image, i, path, dataset, facts)
        if facts.grid is None:
            facts.grid = grid_of(image)
            if marked is not None and case.label is not None:
                found += compare("label", grid_of(marked), case.label, facts.grid, "the image")
                found += _on_image(image, marked, case.label, dataset)
        else:
            found += compare("channel", grid_of(image), path, facts.grid, "the first channel")
        del image  # before the next is read
    return facts, found + list(_duplicates(facts))


def _image(volume: Volume, i: int, path: Path, dataset: Dataset, facts: CaseFacts) -> Iterator[Finding]:
    names = dataset.channels or []
    if dataset.format == "nnunet":
        names = names[i : i + 1]
        if volume.is_multichannel:
            yield finding("four-dimensional", path, f"its shape is {volume.shape} (C, D, H, W)")
    else:
        count = volume.shape[0] if volume.is_multichannel else 1
        if dataset.channels is not None and count != len(names):
            yield finding("channel-count", path, f"it has {count} channels, dataset.json names {len(names)}")
    facts.channels[path], found = examine_image(volume, path, names)
    yield from found


def _on_image(image: Volume, marked: Volume, path: Path, dataset: Dataset) -> Iterator[Finding]:
    if image.grid_shape != marked.grid_shape or marked.is_multichannel:
        return
    values = image.array[0] if image.is_multichannel else image.array
    is_ct = (dataset.channels or [""])[0].strip().upper() == "CT"
    share = on_nothing(values, marked.array, is_ct)
    if share > _NOTHING:
        yield finding(
            "label-on-nothing", path, f"{share:.0%} of the labelled voxels lie on {'air' if is_ct else '0'}"
        )


def compare(kind: str, grid: Grid, path: Path, other: Grid, what: str) -> Iterator[Finding]:
    """Whether a grid is that of another: kind is "label" or "channel", `what` names the other."""
    if grid.shape != other.shape:
        swapped = ", the same sizes in another order" if sorted(grid.shape) == sorted(other.shape) else ""
        yield finding(
            f"{kind}-shape", path, f"{grid.shape} voxels (z, y, x), {what} has {other.shape}{swapped}"
        )
        return
    ratios = [abs(a - b) / b for a, b in zip(grid.spacing, other.spacing, strict=True)]
    apart = grid.apart(other)
    voxels = apart / min(other.spacing)
    distance = f"up to {apart:.3g} mm ({voxels:.2g} voxels) from the same voxel of {what}"
    if grid.orientation != other.orientation:
        words = f"its axes run to {grid.orientation}, those of {what} to {other.orientation}: {distance}"
        yield finding(f"{kind}-orientation", path, words)
    elif max(ratios) > _SAME:
        ours, theirs = ("{:.5g} x {:.5g} x {:.5g}".format(*g.spacing) for g in (grid, other))
        yield finding(f"{kind}-spacing", path, f"voxels of {ours} mm, {what} has {theirs}: {distance}")
    elif voxels > _APART[0]:
        yield finding(f"{kind}-place", path, distance)
    elif voxels > _APART[1]:
        yield finding(f"{kind}-place-small", path, distance)
    elif voxels > _APART[2]:
        yield finding(f"{kind}-rounding", path, distance)


def _duplicates(facts: CaseFacts) -> Iterator[Finding]:
    seen: dict[bytes, str] = {}
    for path, channels in facts.channels.items():
        for i, channel in enumerate(channels):
            here = f"{path.name}, channel {i}" if len(channels) > 1 else path.name
            if channel.low == channel.high:
                continue  # said already: constant
            if channel.digest in seen:
                yield finding("duplicate-channel", path, f"{here} has the voxels of {seen[channel.digest]}")
            seen.setdefault(channel.digest, here)
