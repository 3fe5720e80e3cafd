"""A dataset's folder: which cases it has, and whether its dataset.json says the same.

nnU-Net (version 2): imagesTr/CASE_0000.nii.gz, one file per channel, labelsTr/CASE.nii.gz, and imagesTs with
labelsTs if there are any. Medical Segmentation Decathlon: dataset.json lists the files, one per case.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .catalogue import Finding, finding

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass
class Case:
    """One patient: images by channel number (the Decathlon's one file is number 0) and the label."""

    name: str
    training: bool
    images: dict[int, Path] = field(default_factory=dict)
    label: Path | None = None


@dataclass
class Dataset:
    """What a folder and its dataset.json announce. labels: value -> name; None: not known."""

    folder: Path
    format: str = "nnunet"  # or "msd"
    channels: list[str] | None = None
    labels: dict[int, str] | None = None
    ending: str = ".nii.gz"
    cases: list[Case] = field(default_factory=list)

    def __str__(self) -> str:
        kind = {"nnunet": "nnU-Net", "msd": "Medical Segmentation Decathlon"}[self.format]
        training = sum(case.training for case in self.cases)
        channels = ", ".join(self.channels or ["channels not named"])
        return (
            f"{self.folder}: {kind} dataset, {training} training and {len(self.cases) - training} test cases, "
            f"{channels}, {len(self.labels or ())} labels"
        )


def is_dataset(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("dataset.json", "imagesTr", "imagesTs"))


def open_dataset(folder: Path) -> tuple[Dataset, list[Finding]]:
    """The dataset in a folder, and what is wrong with its dataset.json and its files' names."""
    content, found = _read_json(folder / "dataset.json")
    dataset = Dataset(folder)
    if content is None:
        dataset.ending = _usual_ending(folder)
    else:
        lists = isinstance(content.get("training"), list) and not _is_version_1(folder, content["training"])
        dataset.format = "msd" if lists else "nnunet"
        found += _describe(dataset, content)
    if dataset.format == "msd":
        found += _listed(dataset, content or {})
    elif content is not None and isinstance(content.get("dataset"), dict):
        found += _mapped(dataset, content["dataset"])
    else:
        found += _nnunet_files(dataset)
        if content is not None and re.fullmatch(r"Dataset\d{3}_.+", folder.resolve().name) is None:
            found.append(finding("folder-name", folder, f"the folder is named {folder.resolve().name}"))
    found += _complete(dataset)
    training = sum(case.training for case in dataset.cases)
    if content is not None and "numTraining" in content and content["numTraining"] != training:
        words = f"numTraining is {content['numTraining']}, there are {training} cases"
        found.append(finding("num-training", folder / "dataset.json", words))
    return dataset, found


def _read_json(path: Path) -> tuple[dict[str, Any] | None, list[Finding]]:
    if not path.is_file():
        return None, [finding("json-missing", path, "there is no such file")]
    twice: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(key for key, count in Counter(key for key, _ in items).items() if count > 1)
        return dict(items)

    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=pairs)
    except (ValueError, RecursionError, OSError) as error:  # ValueError: not JSON, or not UTF-8
        return None, [finding("json-invalid", path, " ".join(str(error).split()))]
    found = [finding("json-duplicate-key", path, f"the key {key!r} is there twice") for key in twice]
    if not isinstance(content, dict):
        return None, [
            *found,
            finding("json-invalid", path, f"it holds a {type(content).__name__}, not an object"),
        ]
    return content, found


def _usual_ending(folder: Path) -> str:
    names = [path.name for path in (folder / "imagesTr").glob("*") if not path.name.startswith(".")]
    return max(ENDINGS, key=lambda ending: sum(name.endswith(ending) for name in names))


def _is_version_1(folder: Path, training: list[Any]) -> bool:
    """Whether the lists are nnU-Net's first version's: they name CASE.nii.gz where the files are CASE_0000.nii.gz."""
    names = [
        entry["image"]
        for entry in training
        if isinstance(entry, dict) and isinstance(entry.get("image"), str)
    ]
    return bool(names) and all(
        not _is_file(folder / name) and _is_file(folder / name.replace(".nii", "_0000.nii")) for name in names
    )


def _describe(dataset: Dataset, content: dict[str, Any]) -> Iterator[Finding]:
    """Fills channels, labels and ending from dataset.json."""
    path = dataset.folder / "dataset.json"
    key = "modality" if dataset.format == "msd" else "channel_names"
    old = dataset.format == "nnunet" and key not in content and isinstance(content.get("modality"), dict)
    if old:
        yield finding("json-old-format", path, "it has modality instead of channel_names")
        key = "modality"
    brief = old or dataset.format == "msd"
    for name in (key, "labels", *(() if brief else ("numTraining", "file_ending"))):
        if name not in content:
            yield finding("json-incomplete", path, f"{name} is missing")
    yield from _channels(dataset, content.get(key), key, path)
    if isinstance(content.get("labels"), dict):
        yield from _labels(dataset, content["labels"], content, path, numbers_first=brief)
    elif "labels" in content:
        yield finding("json-incomplete", path, "labels is not an object of names and numbers")
    if dataset.format == "nnunet" and "file_ending" in content:
        ending = content["file_ending"]
        if isinstance(ending, str) and ending:
            dataset.ending = ending
        else:
            yield finding(
                "json-incomplete", path, f"file_ending is {_short(ending)}, expected a text such as .nii.gz"
            )


def _channels(dataset: Dataset, names: Any, key: str, path: Path) -> Iterator[Finding]:
    if not isinstance(names, dict) or not names:
        if names is not None:
            yield finding("json-incomplete", path, f"{key} is not an object of numbers and names")
        return
    if set(names) != {str(i) for i in range(len(names))}:
        yield finding("channel-names", path, f"{key} has {', '.join(map(repr, names))}")
    dataset.channels = [str(name) for name in names.values()]


def _labels(
    dataset: Dataset, labels: dict[str, Any], content: dict[str, Any], path: Path, numbers_first: bool
) -> Iterator[Finding]:
    numbered = all(re.fullmatch(r"-?\d+", str(key)) for key in labels)
    named = all(isinstance(value, str) and not re.fullmatch(r"-?\d+", value) for value in labels.values())
    if (numbered and named) != numbers_first:
        wanted = "number: name" if numbers_first else "name: number"
        yield finding("labels-inverted", path, f"expected {wanted}, labels is {_short(labels)}")
    if numbered and named:
        labels = {name: int(number) for number, name in labels.items()}
    entries = {name: value if isinstance(value, list) else [value] for name, value in labels.items()}
    try:
        values = {name: [int(v) for v in value] for name, value in entries.items()}
    except (TypeError, ValueError):
        yield finding("json-incomplete", path, f"labels has values that are no numbers: {_short(labels)}")
        return
    dataset.labels = {}
    for name, several in values.items():
        for value in several:
            dataset.labels.setdefault(value, name)
    yield from _numbering(values, content, path)


def _numbering(values: dict[str, list[int]], content: dict[str, Any], path: Path) -> Iterator[Finding]:
    numbers = sorted({v for several in values.values() for v in several})
    regions = any(len(several) > 1 for several in values.values())
    single = Counter(several[0] for several in values.values() if len(several) == 1)
    for value, count in single.items():
        if count > 1 and not regions:
            same = [name for name, several in values.items() if several == [value]]
            yield finding("labels-same-value", path, f"{', '.join(same)} are all {value}")
    if 0 not in single:
        yield finding("no-background", path, f"no label is 0: {_short(values)}")
    if numbers != list(range(len(numbers))) and (0 in numbers or numbers != list(range(1, len(numbers) + 1))):
        yield finding("labels-gap", path, f"the numbers are {', '.join(map(str, numbers))}")
    if "ignore" in values and max(values["ignore"]) != numbers[-1]:
        yield finding(
            "ignore-not-last", path, f"ignore is {values['ignore'][0]}, the highest is {numbers[-1]}"
        )
    if regions and "regions_class_order" not in content:
        yield finding("regions-order", path, f"labels has regions: {_short(values)}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _nnunet_files(dataset: Dataset) -> Iterator[Finding]:
    """Cases from the names in imagesTr, labelsTr, imagesTs and labelsTs."""
    for part, training in (("Tr", True), ("Ts", False)):
        cases: dict[str, Case] = {}
        images, found = _listing(dataset, f"images{part}")
        yield from found
        for stem, path in images:
            match = _CHANNEL.fullmatch(stem)
            if match is None:
                yield finding(
                    "channel-suffix", path, f"the name {path.name} does not end in a channel's number"
                )
                continue
            case = cases.setdefault(match[1], Case(match[1], training))
            case.images[int(match[2])] = path
        labels, found = _listing(dataset, f"labels{part}")
        yield from found
        for stem, path in labels:
            match = _CHANNEL.fullmatch(stem)
            if match is not None and stem not in cases and match[1] in cases:
                yield finding("label-suffix", path, f"expected {match[1]}{dataset.ending}")
                stem = match[1]
            if stem in cases:
                cases[stem].label = path
            else:
                yield finding(
                    "label-without-image", path, f"there is no images{part}/{stem}_0000{dataset.ending}"
                )
        dataset.cases += [cases[name] for name in sorted(cases)]


def _listing(dataset: Dataset, name: str) -> tuple[list[tuple[str, Path]], list[Finding]]:
    """(name without ending, path) of a folder's files, and what does not belong there."""
    folder = dataset.folder / name
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    good = [
        (path.name.removesuffix(dataset.ending), path)
        for path in paths
        if path.is_file() and not path.name.startswith(".") and path.name.endswith(dataset.ending)
    ]
    stray = [path for path in paths if path not in {p for _, p in good}]
    if not good and any(path.name.endswith(ENDINGS) and not path.name.startswith(".") for path in stray):
        words = f"file_ending is {dataset.ending!r}, {name} has {stray[0].name}"
        return [], [finding("file-ending", folder, words)]
    return good, [finding("stray-file", path, f"not a scan that ends in {dataset.ending}") for path in stray]


def _listed(dataset: Dataset, content: dict[str, Any]) -> Iterator[Finding]:
    """Cases from the Decathlon's lists "training" and "test"."""
    json_path = dataset.folder / "dataset.json"
    entries = [(entry, True) for entry in content.get("training", [])]
    tests = content.get("test", [])
    if isinstance(tests, list):
        entries += [(entry, False) for entry in tests]
    else:
        yield finding("json-incomplete", json_path, f"test is not a list: {_short(tests)}")
    named: set[Path] = set()
    for entry, training in entries:
        pair = entry if isinstance(entry, dict) else {"image": entry}
        image, label = pair.get("image"), pair.get("label")
        if not isinstance(image, str) or not isinstance(label, str if training else (str, type(None))):
            yield finding(
                "json-incomplete", json_path, f"expected an image and a label, received {_short(entry)}"
            )
            continue
        case = Case(Path(image).name.removesuffix(".gz").removesuffix(".nii"), training)
        for kind, text in (("image", image), ("label", label)):
            if text is None:
                continue
            path = dataset.folder / text
            if not _is_file(path):
                yield finding("listed-file-missing", path, f"dataset.json lists it as {kind} of {case.name}")
                continue
            named.add(path.resolve())
            if kind == "image":
                case.images[0] = path
            else:
                case.label = path
        if case.images:
            dataset.cases.append(case)
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        for path in sorted((dataset.folder / folder).glob("*")):
            if path.name.startswith(".") or not path.name.endswith(ENDINGS):
                yield finding("stray-file", path, "not a scan")
            elif path.resolve() not in named:
                yield finding("file-not-listed", path, "it is in the folder, not in dataset.json")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def _mapped(dataset: Dataset, mapping: dict[str, Any]) -> Iterator[Finding]:
    """Cases from nnU-Net's "dataset": {case: {"images": [...], "label": ...}}."""
    for name, entry in mapping.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list) or not all(isinstance(p, str) for p in [*images, entry.get("label")]):
            yield finding("json-incomplete", dataset.folder / "dataset.json", f"case {name}: {_short(entry)}")
            continue
        case = Case(name, True)
        for i, text in enumerate([*images, entry["label"]]):
            path = dataset.folder / text
            if not _is_file(path):
                yield finding("listed-file-missing", path, f"dataset.json lists it for {name}")
            elif i < len(images):
                case.images[i] = path
            else:
                case.label = path
        dataset.cases.append(case)


def _complete(dataset: Dataset) -> Iterator[Finding]:
    """Whether every case has its channels and its label."""
    training = [case for case in dataset.cases if case.training]
    if not training:
        yield finding("no-cases", dataset.folder, "no training case was found")
    elif len(training) < 5:
        yield finding("few-cases", dataset.folder, f"training cases: {len(training)}")
    for case in dataset.cases:
        first = next(iter(case.images.values()), dataset.folder)
        if case.training and case.label is None:
            yield finding("image-without-label", first, f"case {case.name} has no label in labelsTr")
        if dataset.format == "msd":
            continue
        count = len(dataset.channels) if dataset.channels else max(case.images, default=0) + 1
        for i in range(count):
            if i not in case.images:
                yield finding("missing-channel", first, f"case {case.name} has no channel {i:04d}")
        for i, path in case.images.items():
            if i >= count:
                yield finding("extra-channel", path, f"dataset.json names {count} channels")
