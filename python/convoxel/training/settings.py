"""Everything about a training run that its user may choose; YAML in, YAML out."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import memory
from .patches import FOREGROUND

NETWORKS = ("plain", "residual")
OPTIMIZERS = {
    "sgd": 0.01,
    "adamw": 3e-4,
}  # name: learning rate where none is given (nnU-Net's; its AdamW trainer's)
PRECISIONS = ("float32", "bfloat16")
ENGINES = ("convoxel", "torch")


@dataclass(frozen=True)
class Settings:
    """What is not given (None) is planned from the data and the machine.

    >>> Settings(epochs=50, patch_size=(64, 96, 96)).total_steps
    12500
    """

    # what is planned
    rank: int = 3  # 3: volumes; 2: slices
    network: str = "plain"  # or "residual": nnU-Net's residual encoder
    base_features: int = 32  # channels at full resolution, doubled from stage to stage
    spacing: tuple[float, ...] | None = None  # mm, (z, y, x) or (y, x), of the grid that networks see
    patch_size: tuple[int, ...] | None = None  # voxels, (z, y, x) or (y, x)
    batch_size: int | None = None  # patches a step, of all processes together
    memory: str | None = None  # that training may take, "8GB"; None: half of this machine's
    step_seconds: float = 4.0  # how long a step may take on this machine, where the patch is planned
    cross_validation: int = 5  # folds, where the dataset has no splits_final.json

    # what is learnt, and how
    epochs: int = 250
    steps_per_epoch: int = 250
    optimizer: str = "sgd"  # with Nesterov's momentum; or "adamw"
    learning_rate: float | None = None  # at the start; it falls as (1 - step / steps)^0.9
    momentum: float = 0.99
    weight_decay: float = 3e-5
    clip: float | None = 12.0  # norm of the gradient, at most
    accumulate: int = 1  # parts that a batch is computed in
    batch_dice: bool = False  # overlap of the whole batch rather than of each patch
    deep_supervision: bool = True
    foreground: float = FOREGROUND  # share of the patches that are centred on a structure
    augment: bool = True
    elastic: bool = False
    mirror: bool = True  # flips in training, and averages over flips in prediction
    precision: str = "float32"  # or "bfloat16": autocast
    checkpointing: bool = False  # compute activations twice rather than keep them
    patience: int | None = None  # epochs without a better validation Dice after which it stops
    seed: int = 0

    # what is shown and kept
    validation_patches: int = 20  # per epoch
    preview_every: int = 10  # epochs; 0: no pictures of predictions
    tensorboard: bool = True

    # the machine
    engine: str = "convoxel"  # or "torch": the same network on torch's own kernels, to compare
    workers: int | None = None  # threads that prepare patches; None: half of the cores

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rank", (2, 3)),
            ("network", NETWORKS),
            ("optimizer", tuple(OPTIMIZERS)),
            ("precision", PRECISIONS),
            ("engine", ENGINES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(map(str, allowed))}, received {getattr(self, name)!r}"
                )
        for name in ("base_features", "batch_size", "cross_validation", "epochs", "steps_per_epoch", "accumulate",
                     "patience", "validation_patches"):  # fmt: skip
            _least(name, getattr(self, name), 1)
        for name in ("preview_every", "workers", "weight_decay", "momentum", "seed"):
            _least(name, getattr(self, name), 0)
        for name in ("step_seconds", "learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a number above 0, received {value}")
        for name in ("spacing", "patch_size"):
            value = getattr(self, name)
            if value is not None and (len(value) != self.rank or not min(value) > 0):
                raise ValueError(
                    f"{name}: expected {self.rank} numbers above 0, (z, y, x) or (y, x), received {value}"
                )
        if not 0 <= self.foreground <= 1 or not self.momentum < 1:
            raise ValueError("foreground is a share from 0 to 1, momentum below 1; received "
                             f"{self.foreground}, {self.momentum}")  # fmt: skip
        if self.memory is not None:
            memory.as_bytes("memory", self.memory)

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def first_rate(self) -> float:
        """The learning rate of the first step."""
        return OPTIMIZERS[self.optimizer] if self.learning_rate is None else self.learning_rate

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def settings_from(found: Mapping[str, Any], where: str) -> Settings:
    """Settings of plain data; ValueError with `where` for a name or a kind of value that is not one."""
    fields = typing.get_type_hints(Settings)
    if unknown := sorted(set(found) - set(fields)):
        raise ValueError(f"{where}: no setting {unknown[0]!r}; there are {', '.join(fields)}")
    try:
        return Settings(**{name: _typed(name, value, fields[name]) for name, value in found.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, as plain data, for `settings_from`."""
    try:
        found = _yaml().safe_load(path.read_text(encoding="utf-8"))
    except (_yaml().YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no YAML: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f'{path}: expected lines such as "epochs: 100", received a {type(found).__name__}')
    return found


def as_yaml(found: Mapping[str, Any]) -> str:
    """Plain data in YAML, in its own order."""
    return _yaml().safe_dump(_plain(found), sort_keys=False, default_flow_style=None, width=110)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its field has it: a list becomes a tuple, a whole number a float; nothing else is guessed."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if isinstance(value, list | tuple):
            return tuple(_typed(name, part, inner) for part in value)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif type(value) is kind:
        return value
    elif kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a word
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{name}: expected {_words(hint)}, received {value!r}")


def _words(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    return text.replace("tuple[float, ...]", "a list of numbers").replace(
        "tuple[int, ...]", "a list of whole numbers"
    )


def _least(name: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, received {value}")


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            'settings are read and written with PyYAML: pip install "convoxel[train]"'
        ) from error
    return yaml
