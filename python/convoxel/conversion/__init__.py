"""Networks that people already have, on convoxel's kernels: `accelerate`, `report`, `restore`.

layers     which class each module gets
rewrite    a forward whose calls wait for the next one
chain      the layers that wait, and what becomes of them
blocks     which of them run as one
layout     channels-last inside, the input's format outside
copying    new modules around the same parameters
report     what was converted, fused, left
"""

from __future__ import annotations

from . import layers
from .copying import Network, anew
from .layers import check_module
from .report import Report, report

__all__ = ["Report", "accelerate", "report", "restore"]


def accelerate(model: Network, *, inplace: bool = False) -> Network:
    """The network on convoxel's kernels: same parameters, `state_dict`, results and training script.

    Every layer that convoxel has becomes ours wherever it sits, convolution, norm and activation run as one where
    one goes into the other, and inside the network tensors are channels-last. Subclasses of layers, parametrised
    and compiled modules stay as they are: `report` says which and why.

    Args:
        model: any torch module: nnU-Net's, MONAI's, segmentation_models', your own. It is called as before.
        inplace: convert this very object; otherwise new modules around the same Parameters and buffers, and the
            given network keeps working as it was.

    Returns:
        A module of the same class (a subclass of it), with the same names, hooks and training flag. It can be
        trained, copied, pickled, compiled and exported; `restore` undoes it.

    Raises:
        TypeError: if `model` is no torch module.

    >>> from monai.networks.nets import BasicUNet
    >>> net = convoxel.accelerate(BasicUNet(spatial_dims=3, in_channels=1, out_channels=2))
    >>> net(torch.randn(1, 1, 64, 64, 64)).shape
    torch.Size([1, 2, 64, 64, 64])
    """
    check_module("accelerate", model)
    network = model if inplace else anew(model)
    for module in network.modules():
        layers.convert(module, root=module is network)
    return network


def restore(model: Network) -> Network:
    """Undoes `accelerate`, in this very object: its layers are torch's again. Layers that were written with
    `convoxel.nn` stay ours. TypeError if `model` is no torch module.

    >>> net = convoxel.restore(convoxel.accelerate(nn.Conv2d(1, 8, 3)))
    >>> type(net) is nn.Conv2d
    True
    """
    check_module("restore", model)
    for module in model.modules():
        layers.restore(module)
    return model
