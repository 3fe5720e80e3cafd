"""`Sequential` and `Model`: torch modules with Keras' verbs.

torch 2 has an `nn.Module.compile` of its own (torch.compile in place). Here `compile` is Keras'; for torch's
wrap the compiled network, `Model(torch.compile(network))`, or call `torch.nn.Module.compile(model)` on a
Model (torch itself skips a bare nn.Sequential there). fit, evaluate and predict run the compiled network.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .. import checkpoint, models
from .trainer import Trainer


class Sequential(Trainer, nn.Sequential):
    """torch's nn.Sequential (same layers, same state_dict keys "0.weight", ...) with Keras' verbs.

    Lazy layers (nn.LazyConv2d, nn.LazyLinear, ...) take their input channels from the first batch.
    `model.load(path)` fills the layers from a file of `model.save(path)`.

    >>> from convoxel import nn
    >>> model = Sequential(nn.Flatten(), nn.LazyLinear(2))
    >>> model.compile("adam", "cross_entropy", ["accuracy"])
    >>> x, y = torch.rand(8, 1, 4, 4), torch.tensor([0, 1] * 4)
    >>> history = model.fit(x, y, epochs=2, batch_size=4, verbose=0)
    >>> sorted(history.history), len(history.history["loss"])
    (['accuracy', 'loss'], 2)
    """

    def _check_input(self, x: Tensor) -> None:
        first = self[0] if len(self) else None
        if isinstance(first, _ConvNd) and x.ndim != len(first.kernel_size) + 2:
            axes = "N, C, " + ", ".join("DHW"[-len(first.kernel_size) :])
            raise ValueError(
                f"{type(first).__name__} needs x of shape ({axes}), received {tuple(x.shape)}; "
                "a missing channel axis is added by x[:, None]"
            )
        if isinstance(first, _ConvNd) and first.in_channels not in (0, x.shape[1]):  # 0: lazy
            raise ValueError(
                f"{type(first).__name__} needs x with {first.in_channels} channels (N, C, ...), received "
                f"{tuple(x.shape)}; choose the channels, or build the layer for {x.shape[1]}"
            )


class Model(Trainer):
    """Any torch module with Keras' verbs: Model(module), or a subclass with layers and a forward of its own.

    The state_dict of Model(module) is the module's own, without a prefix: a checkpoint of either fits the
    other. (named_parameters() says "module.".) A subclass that wraps a module and adds layers or parameters
    of its own keeps torch's keys.

    `Model.load(path)` builds a registered network (`convoxel.models`) and its weights from a file of
    `model.save(path)`; `model.load(path)` fills the model at hand, of any architecture.

    >>> model = Model(models.create("unet", rank=2, in_channels=1, out_channels=3, features=(4, 8)))
    >>> model.compile("adam", "dice_ce", ["dice"])
    >>> model.predict(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(self, module: nn.Module | None = None):
        super().__init__()
        own_forward = type(self).forward is not Model.forward
        if not isinstance(module, nn.Module) and not (module is None and own_forward):
            raise TypeError(
                f"Model expects a torch module, received {type(module).__name__}; a subclass without one "
                "defines forward(self, x)"
            )
        if module is not None:
            self.module = module
            self.register_state_dict_post_hook(_drop_prefix)
            self.register_load_state_dict_pre_hook(_add_prefix)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _network(self) -> nn.Module:
        return self.module if _is_wrapper(self) else self

    @classmethod
    def _build(cls, path: str | PathLike) -> Model:
        state, architecture = checkpoint.read(path)
        if architecture is None:
            raise ValueError(
                f"{path} holds weights only (its network is not registered in convoxel.models); build the "
                f"network, then fill it: Model(network).load({str(path)!r})"
            )
        name, config = architecture["name"], architecture["config"]
        try:
            # On the meta device a network has shapes and no memory: a false header costs nothing.
            with torch.device("meta"):
                expected = models.create(name, **config)
            checkpoint.check_fits(path, state, expected.state_dict())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        with torch.random.fork_rng(
            devices=[]
        ):  # its first weights are thrown away: no draw of yours is spent
            network = models.create(name, **config)
        network.load_state_dict(state, assign=True)
        return cls(network)


def _is_wrapper(model: nn.Module) -> bool:
    """Nothing but `module`: then its keys are the model's keys."""
    return list(model._modules) == ["module"] and not model._parameters and not model._buffers


def _drop_prefix(model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if _is_wrapper(model):
        long = f"{prefix}module."
        for key in [k for k in state if k.startswith(long)]:
            state[prefix + key.removeprefix(long)] = state.pop(key)


def _add_prefix(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if _is_wrapper(model):
        for key in [k for k in state if k.startswith(prefix)]:
            state[f"{prefix}module.{key.removeprefix(prefix)}"] = state.pop(key)
