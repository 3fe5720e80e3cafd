"""MONAI bundles: a folder or zip file with configs/metadata.json, configs/inference.json (or .yaml), models/model.pt.

A bundle's configuration is a program: "$..." is Python, "_target_" names anything that can be imported. Here it is read
as data. Four sections are looked at (network_def, preprocessing, inferer, postprocessing), references ("@name",
"@a::b", "@a#b") are followed, literals ("$True", "$[1, 2]") taken, and every other expression in what is needed is
refused by its name; what is not needed, such as file lists and devices, is not looked at.
"""

from __future__ import annotations

import ast
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..conversion import accelerate
from . import networks, safe
from .monai_recipe import INTENSITY, MonaiRecipe, Step
from .trained import TrainedModel

_CONFIGS = ("inference.json", "inference.yaml", "inference.yml")
_MODEL = Path("models", "model.pt")
_MOST = 16 << 30  # bytes of weights in a zip file
_DEPTH = 32  # references that point to references
# Transforms that do nothing to the values or their place once the scan is read.
_PLAIN = (
    "LoadImage",
    "EnsureChannelFirst",
    "AddChannel",
    "EnsureType",
    "CastToType",
    "ToTensor",
    "SaveImage",
)
_CALLED = re.compile(r"@([\w:#]+)\.(?:to|eval|float)\(@?\w*\)")  # "$@network_def.to(@device)"


def is_bundle(path: Path) -> bool:
    if path.is_dir():
        return (path / "configs" / "metadata.json").is_file()
    return path.suffix == ".zip" and zipfile.is_zipfile(path)


def load(path: Path) -> TrainedModel:
    """The network of a bundle, as its inference configuration uses it.

    Raises FileNotFoundError and ValueError: a file is missing or damaged, or the configuration asks for what is not on
    convoxel's lists; ImportError: MONAI (or, for .yaml, PyYAML) is not installed.
    """
    if path.is_dir():
        return _load(path, path.name)
    with tempfile.TemporaryDirectory() as folder:
        _unpack(path, Path(folder))
        return _load(Path(folder), path.stem)


def _load(folder: Path, name: str) -> TrainedModel:
    config = Config(_config(folder))
    metadata = safe.read_json(folder / "configs" / "metadata.json")
    file = folder / _MODEL
    found = safe.read_checkpoint(file)
    for key in ("model", "state_dict", "network"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    state = {key: value.clone() for key, value in safe.state_dict(file, found).items()}
    description = _network(config)
    recipe = _recipe(config, metadata, description["config"])
    network = accelerate(networks.build(description, state, str(file)), inplace=True)
    return TrainedModel([network], description, recipe, name)


def _config(folder: Path) -> dict[str, Any]:
    for name in _CONFIGS:
        path = folder / "configs" / name
        if path.is_file():
            return safe.read_json(path) if path.suffix == ".json" else _read_yaml(path)
    raise FileNotFoundError(2, f"no {' or '.join(_CONFIGS)} in the bundle's configs", str(folder))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"{path.name} needs PyYAML: pip install pyyaml") from error
    if path.stat().st_size > safe.MAX_JSON:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {safe.MAX_JSON}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a mapping, received a {type(found).__name__}")
    return found


def _unpack(path: Path, folder: Path) -> None:
    """The files that are read, under fixed names: nothing in the archive says where it goes."""
    wanted = ("configs/metadata.json", *(f"configs/{name}" for name in _CONFIGS), _MODEL.as_posix())
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = next((w for w in wanted if member.filename in (w, f"{path.stem}/{w}")), None)
            if name is None:
                continue
            if member.file_size > min(_MOST, shutil.disk_usage(folder).free):
                raise ValueError(
                    f"{path}: {member.filename} would be {member.file_size} bytes; unpack it yourself"
                )
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            try:
                with archive.open(member) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink)
            except (zipfile.BadZipFile, RuntimeError, EOFError) as error:
                raise ValueError(f"{path}: {member.filename} is damaged ({error}); copy it again") from error
    if not (folder / "configs" / "metadata.json").is_file():
        raise ValueError(f"{path}: no configs/metadata.json inside, so it is no MONAI bundle")


class Config:
    """A bundle's configuration, with references followed and nothing evaluated."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found

    def section(self, *names: str) -> Any:
        """The first of these that is there; ValueError if none is."""
        for name in names:
            if name in self.found:
                return self.resolve(self.found[name], name)
        raise ValueError(f"the bundle's inference configuration has no {' or '.join(names)}")

    def resolve(self, value: Any, where: str, depth: int = 0) -> Any:
        """`value` with what it refers to in its place."""
        if depth > _DEPTH:
            raise ValueError(f"{where}: its references lead to each other")
        if isinstance(value, Mapping):
            return {key: self._lazy(part, f"{where}.{key}", depth) for key, part in value.items()}
        if isinstance(value, list):
            return [self.resolve(part, f"{where}[{i}]", depth + 1) for i, part in enumerate(value)]
        if not isinstance(value, str):
            return value
        text = value.strip().removeprefix("$").strip()
        if called := _CALLED.fullmatch(text):
            text = f"@{called[1]}"
        if re.fullmatch(r"@[\w:#]+", text):
            return self.resolve(self._find(text[1:], where), where, depth + 1)
        if value.startswith("$"):
            try:
                return ast.literal_eval(text)  # numbers, words, lists: no names, no calls
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return Expression(value, where)
        return value

    def _lazy(self, value: Any, where: str, depth: int) -> Any:
        """References to whole transforms ("transform": "@preprocessing") are not followed from within others."""
        if where.endswith((".transform", ".network", ".device", ".keys", ".orig_keys")):
            return value
        return self.resolve(value, where, depth + 1)

    def _find(self, name: str, where: str) -> Any:
        found: Any = self.found
        for part in re.split(r"::|#", name):
            if isinstance(found, list) and part.isdigit() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, Mapping) and part in found:
                found = found[part]
            else:
                raise ValueError(f"{where}: refers to @{name}, which the configuration does not have")
        return found


class Expression:
    """Python in a configuration, not run; an error once its value is needed."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where


def _plain(value: Any) -> Any:
    """`value`, or a ValueError if it needs an expression."""
    if isinstance(value, Expression):
        raise ValueError(
            f"{value.where}: {value.text!r} is Python to be run, which convoxel does not do; write its value"
        )
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _target(found: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The last word of "_target_", and the other arguments."""
    found = _plain(found)
    if not isinstance(found, Mapping) or not isinstance(found.get("_target_"), str):
        raise ValueError(f"{where}: expected an object with a _target_, received {found!r:.100}")
    arguments = {key: value for key, value in found.items() if not key.startswith("_")}
    return found["_target_"].rpartition(".")[2], arguments


def _network(config: Config) -> networks.Description:
    name, arguments = _target(config.section("network_def", "network"), "network_def")
    same = {listed.lower(): listed for listed in networks.NETWORKS["monai"]}
    return networks.describe("monai", same.get(name.lower(), name), arguments)


def _transforms(config: Config, section: str) -> list[tuple[str, dict[str, Any]]]:
    """(name without its "d", arguments) of every transform of a Compose that is not disabled."""
    found = config.section(section)
    if isinstance(found, Mapping):
        found = found.get("transforms", [])
    if not isinstance(found, list):
        raise ValueError(f"{section}: expected a Compose of transforms, received {found!r:.100}")
    result = []
    for i, part in enumerate(found):
        if isinstance(part, Mapping) and part.get("_disabled_") is True:
            continue
        name, arguments = _target(_without_keys(part), f"{section}[{i}]")
        result.append((re.sub(r"(?:d|D|Dict)$", "", name), arguments))
    return result


def _without_keys(part: Any) -> Any:
    """Which entries of a dictionary a transform works on does not matter here, and neither do devices and folders."""
    if not isinstance(part, Mapping):
        return part
    ignored = (
        "keys",
        "orig_keys",
        "meta_keys",
        "orig_meta_keys",
        "device",
        "transform",
        "allow_missing_keys",
    )
    kept = {key: value for key, value in part.items() if key not in ignored}
    name = re.sub(r"(?:d|D|Dict)$", "", str(part.get("_target_", "")).rpartition(".")[2])
    return {"_target_": name} if name in _PLAIN else kept


def _recipe(config: Config, metadata: Mapping[str, Any], network: Mapping[str, Any]) -> MonaiRecipe:
    orientation, steps = _preprocessing(_transforms(config, "preprocessing"))
    after = _postprocessing(_transforms(config, "postprocessing"), bool(orientation or _spatial(steps)))
    channels, labels = _names(metadata, network)
    heads = network.get("out_channels")
    if not isinstance(heads, int):
        raise ValueError("network_def: expected out_channels")
    window = _inferer(config)
    return MonaiRecipe(
        channels=channels,
        labels=labels,
        orientation=orientation,
        steps=tuple(steps),
        heads=heads,
        **window,
        **after,
    )


def _spatial(steps: Sequence[Step]) -> bool:
    return any(name in ("Spacing", "CropForeground") for name, _ in steps)


def _preprocessing(found: Sequence[tuple[str, dict[str, Any]]]) -> tuple[str | None, list[Step]]:
    orientation, steps = None, list[Step]()
    for name, options in found:
        if name in _PLAIN:
            continue
        if name == "Orientation":
            if orientation or _spatial(steps):
                raise ValueError(
                    "preprocessing: Orientation is known once, before Spacing and CropForeground"
                )
            orientation = str(options.get("axcodes"))
            _only(name, options, {"axcodes": orientation})
        elif name == "Spacing":
            if _spatial(steps):
                raise ValueError("preprocessing: Spacing is known once, before CropForeground")
            _only(name, options, {"pixdim": options.get("pixdim"), "mode": "bilinear", "padding_mode": "border",
                                  "align_corners": False, "diagonal": False, "scale_extent": False,
                                  "recompute_affine": False})  # fmt: skip
            steps.append((name, {"pixdim": _three("pixdim", options.get("pixdim"))}))
        elif name == "CropForeground":
            if any(step == name for step, _ in steps):
                raise ValueError("preprocessing: CropForeground is known once")
            _only(name, options, {"margin": 0, "k_divisible": 1, "source_key": options.get("source_key"),
                                  "allow_smaller": options.get("allow_smaller"), "mode": "constant"})  # fmt: skip
            steps.append((name, {}))
        elif name in INTENSITY:
            options = {key: value for key, value in options.items() if key != "dtype"}
            _only(name, options, {**options, **INTENSITY[name]}, names_only=True)
            steps.append((name, options))
        else:
            raise ValueError(
                f"preprocessing: the transform {name} is not on convoxel's list: {', '.join(_PLAIN)}, Orientation, "
                f"Spacing, CropForeground, {', '.join(INTENSITY)}"
            )
    return orientation, steps


def _postprocessing(found: Sequence[tuple[str, dict[str, Any]]], moved: bool) -> dict[str, Any]:
    """Activations, Invert and AsDiscrete, in the orders that mean something."""
    found = [(name, options) for name, options in found if name not in _PLAIN]
    names = [name for name, _ in found]
    if sorted(set(names)) != sorted(names) or not set(names) <= {"Activations", "Invert", "AsDiscrete"}:
        raise ValueError(
            f"postprocessing: known are Activations, Invert and AsDiscrete, each once; received {names}"
        )
    if "AsDiscrete" not in names or moved and "Invert" not in names:
        raise ValueError(f"postprocessing: AsDiscrete is needed, and Invert to bring labels back to the scan; it has "
                         f"{', '.join(names) or 'nothing'}")  # fmt: skip
    options = dict(found)
    activation = _one_of("Activations", options.get("Activations", {}), ("softmax", "sigmoid"))
    discrete = options["AsDiscrete"]
    threshold = discrete.get("threshold")
    if bool(discrete.get("argmax")) == (threshold is not None) or set(discrete) - {"argmax", "threshold"}:
        raise ValueError(
            f"postprocessing: AsDiscrete is known with argmax or a threshold, received {discrete}"
        )
    nearest = bool(options.get("Invert", {}).get("nearest_interp", True)) and "Invert" in names
    if "Invert" in names and names.index("AsDiscrete") < names.index("Invert") and not nearest:
        raise ValueError(
            "postprocessing: Invert after AsDiscrete needs nearest_interp: labels cannot be averaged"
        )
    if "Activations" in names and names.index("AsDiscrete") < names.index("Activations"):
        raise ValueError("postprocessing: Activations has to come before AsDiscrete")
    first = "Activations" in names and (
        "Invert" not in names or names.index("Activations") < names.index("Invert")
    )
    return {
        "activation": activation,
        "activate_first": first,
        "nearest": nearest,
        "threshold": None if threshold is None else float(threshold),
    }


def _inferer(config: Config) -> dict[str, Any]:
    name, options = _target(config.section("inferer"), "inferer")
    if not name.startswith("SlidingWindowInferer"):
        raise ValueError(f"inferer: {name} is not known; expected SlidingWindowInferer")
    if str(options.get("padding_mode", "constant")) != "constant" or float(options.get("cval", 0)) != 0:
        raise ValueError("inferer: padding with 0 alone is known (padding_mode constant, cval 0)")
    overlap = options.get("overlap", 0.25)
    return {
        "patch": tuple(max(0, int(p or 0)) for p in _three("roi_size", options.get("roi_size"))),
        "overlap": tuple(map(float, overlap)) if isinstance(overlap, list) else float(overlap),
        "mode": str(options.get("mode", "constant")),
        "sigma": float(options.get("sigma_scale", 0.125)),
    }


def _names(metadata: Mapping[str, Any], network: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The channels that go in and the labels that come out, by metadata.json; numbers where it does not say."""
    count = network.get("in_channels")
    if not isinstance(count, int):
        raise ValueError("network_def: expected in_channels")
    data = metadata.get("network_data_format", {})

    def definitions(kind: str) -> dict[str, Any]:
        parts = data.get(kind) if isinstance(data, Mapping) else None
        part = next(iter(parts.values()), None) if isinstance(parts, Mapping) else None
        found = part.get("channel_def") if isinstance(part, Mapping) else None
        return {str(key): value for key, value in found.items()} if isinstance(found, Mapping) else {}

    inputs, outputs = definitions("inputs"), definitions("outputs")
    channels = tuple(str(inputs.get(str(i), f"channel {i}")) for i in range(count))
    return channels, {str(name): int(key) for key, name in outputs.items() if key.isdigit()}


def _three(name: str, value: Any) -> list[float]:
    values = value if isinstance(value, list) else [value] * 3
    values = [*values, *[values[-1]] * (3 - len(values))] if values else values
    if len(values) != 3 or not all(v is None or isinstance(v, int | float) for v in values):
        raise ValueError(
            f"{name}: expected three numbers (x, y, z), received {value!r}; convoxel runs 3-D bundles"
        )
    return values


def _one_of(name: str, options: Mapping[str, Any], known: Sequence[str]) -> str | None:
    chosen = [key for key, value in options.items() if value]
    if len(chosen) > 1 or set(chosen) - set(known):
        raise ValueError(
            f"postprocessing: {name} is known with {' or '.join(known)}, received {dict(options)}"
        )
    return chosen[0] if chosen else None


def _only(name: str, options: Mapping[str, Any], known: Mapping[str, Any], names_only: bool = False) -> None:
    """ValueError for an argument that is not known, or has another value than the one that is."""
    for key, value in options.items():
        if key == "dtype" or key in known and (names_only or value == known[key] or value == [known[key]]):
            continue
        raise ValueError(f"preprocessing: {name} with {key}={value!r} is not known")
