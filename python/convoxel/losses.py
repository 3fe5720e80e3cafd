"""Losses: one scalar, the mean over the batch, from a network's output and the truth.

Shapes: output (N, K, ...), class labels (N, ...) or (N, 1, ...) of any integer dtype, K classes.
Every loss here also takes deep supervision's outputs: a list, full resolution first. The labels are
then sampled at the voxel centres of each output, and the losses are summed with weights
1, 1/2, 1/4, ... divided by their sum.

Names for `compile`: see `NAMES` at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def class_labels(output: Tensor, target: Tensor, who: str) -> Tensor:
    """Check integer labels against an output and return them as int64 (N, ...).

    output: (N, K, ...) with K classes (K = 1 stands for two classes, 0 and 1).
    target: (N, ...) or (N, 1, ...), integer or bool, values in 0..K-1.
    Raises TypeError for a dtype that is not integer, ValueError for shapes and values.

    >>> class_labels(torch.zeros(2, 3, 4), torch.ones(2, 1, 4, dtype=torch.uint8), "dice").shape
    torch.Size([2, 4])
    """
    if output.ndim < 2:
        raise ValueError(f"{who}: the output must be (N, K, ...), received {tuple(output.shape)}")
    expected = output.shape[:1] + output.shape[2:]
    if target.is_floating_point() or target.is_complex():
        one_hot = target.shape == output.shape
        raise TypeError(
            f"{who}: labels must be integers (one class number per position), received {target.dtype}; "
            + (
                "one-hot labels become class numbers by .argmax(1)"
                if one_hot
                else "convert them with .long() or .astype('int64')"
            )
        )
    if target.ndim == output.ndim and target.shape[1] == 1:
        target = target.squeeze(1)
    if target.shape != expected:
        raise ValueError(
            f"{who}: an output of shape {tuple(output.shape)} (N, K, ...) needs integer labels of shape "
            f"{tuple(expected)}, received {tuple(target.shape)}; cut or reshape the labels as the images are"
        )
    labels, classes = target.long(), max(output.shape[1], 2)
    if labels.numel():
        low, high = (int(v) for v in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"{who}: labels must be in 0..{classes - 1} for an output of {output.shape[1]} channels, "
                f"received values from {low} to {high}; check the label map, or give the network "
                "one output channel per class"
            )
    return labels


def at_resolution(target: Tensor, size: Sequence[int]) -> Tensor:
    """The target at the voxel centres of a coarser grid: its last len(size) axes become `size`.

    Nearest neighbour (torch's "nearest-exact"), any dtype, values are never mixed.

    >>> at_resolution(torch.tensor([[0, 1, 2, 3]]), (2,))
    tensor([[1, 3]])
    """
    for axis, n in enumerate(size, start=target.ndim - len(size)):
        old = target.shape[axis]
        if n != old:
            centres = (torch.arange(n, device=target.device) * 2 + 1) * old // (2 * n)
            target = target.index_select(axis, centres)
    return target


class Loss(nn.Module):
    """Base of the losses: `compute` sees one output; a list of outputs is deep supervision.

    `from_logits` says whether `compute` expects raw network outputs (True) or probabilities (False).
    """

    from_logits = True

    def compute(self, output: Tensor, target: Tensor) -> Tensor:
        """output (N, K, ...), target as the subclass says -> scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define compute(output, target)")

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        if isinstance(output, Tensor):
            return self.compute(output, target)
        if not isinstance(output, (list, tuple)) or not output:
            raise TypeError(
                f"{type(self).__name__} expects a tensor, or a list of tensors (deep supervision, full "
                f"resolution first), received {type(output).__name__}"
            )
        weights = [0.5**level for level in range(len(output))]
        terms = [
            weight / sum(weights) * self.compute(o, at_resolution(target, o.shape[2:]))
            for weight, o in zip(weights, output, strict=True)
        ]
        return torch.stack(terms).sum()


class DeepSupervision(Loss):
    """Give any loss(output, target) that this module does not know deep supervision's list of outputs.

    >>> loss = DeepSupervision(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0])))
    >>> outputs, labels = [torch.zeros(1, 2, 8), torch.zeros(1, 2, 4)], torch.zeros(1, 8, dtype=torch.long)
    >>> round(loss(outputs, labels).item(), 4)
    0.6931
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.loss = loss
        self.from_logits = takes_logits(loss) is not False

    def compute(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss(output, target)


class CrossEntropy(Loss):
    """Cross-entropy of logits (N, K, ...) and integer labels (N, ...), torch's `cross_entropy`.

    The mean over all positions of -log softmax(output)[label]. No softmax layer before it.

    >>> round(CrossEntropy()(torch.zeros(4, 10), torch.zeros(4, dtype=torch.long)).item(), 4)  # log 10
    2.3026
    """

    def compute(self, output: Tensor, target: Tensor) -> Tensor:
        labels = class_labels(output, target, "cross_entropy")
        if output.shape[1] == 1:
            raise ValueError(
                "cross_entropy: one output channel leaves nothing to choose from (its softmax is always 1); "
                "use binary_cross_entropy_with_logits, or two output channels"
            )
        return F.cross_entropy(output, labels)


class CategoricalCrossentropy(Loss):
    """Cross-entropy of probabilities (N, K, ...), as Keras' loss of that name: no softmax is added.

    The mean over all positions of -sum_k t_k log p_k; the target t is one-hot (N, K, ...) or integer
    labels (N, ...). A probability is raised to the smallest normal number before the logarithm: the
    gradient through a softmax stays exact for every larger one, so that a confident mistake can be
    unlearnt. Raises ValueError if the output is not a probability distribution over axis 1.

    >>> p, labels = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([1])
    >>> round(CategoricalCrossentropy()(p, labels).item(), 4)  # log 4
    1.3863
    """

    from_logits = False

    def compute(self, output: Tensor, target: Tensor) -> Tensor:
        who = "categorical_crossentropy"
        if output.ndim < 2:
            raise ValueError(f"{who}: the output must be (N, K, ...), received {tuple(output.shape)}")
        p = _probabilities(output, who, "nn.Softmax(dim=1)", "cross_entropy")
        _check_sums_to_one(
            p, output, "output", "end the network with nn.Softmax(dim=1), or use cross_entropy"
        )
        log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        if target.shape != output.shape:
            return F.nll_loss(log_p, class_labels(output, target, who))
        t = target.to(p.dtype)
        _check_unit_interval(t, f"{who}: one-hot targets")
        _check_sums_to_one(t, output, "one-hot target", "pass one 1 per position, or integer labels")
        return -(t * log_p).sum(1).mean()


class BinaryCrossEntropy(Loss):
    """Binary cross-entropy: the mean over all elements of -t log p - (1 - t) log(1 - p).

    output: (N, K, ...), probabilities (torch's `binary_cross_entropy`), or logits with
    from_logits=True (torch's `binary_cross_entropy_with_logits`, the more accurate of the two).
    target: the output's shape, or (N, ...) if K = 1; any dtype, values in [0, 1].

    >>> p, t = torch.tensor([[0.25], [0.5]]), torch.tensor([0, 1])
    >>> round(BinaryCrossEntropy()(p, t).item(), 4)  # (log 4/3 + log 2) / 2
    0.4904
    """

    def __init__(self, from_logits: bool = False):
        super().__init__()
        self.from_logits = from_logits

    def compute(self, output: Tensor, target: Tensor) -> Tensor:
        who = "binary_cross_entropy"
        if output.ndim >= 2 and output.shape[1] == 1 and target.shape == output.squeeze(1).shape:
            target = target.unsqueeze(1)
        if target.shape != output.shape:
            raise ValueError(
                f"{who}: the target must have the output's shape {tuple(output.shape)} "
                f"(or lack axis 1 where that is 1), received {tuple(target.shape)}; "
                "for class numbers use cross_entropy"
            )
        if self.from_logits:
            _check_unit_interval(target, f"{who}: targets")
            return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))
        p = _probabilities(output, who, "nn.Sigmoid()", "binary_cross_entropy_with_logits")
        t, tiny = target.to(p.dtype), torch.finfo(p.dtype).tiny
        _check_unit_interval(t, f"{who}: targets")
        return -(t * p.clamp(min=tiny).log() + (1 - t) * (1 - p).clamp(min=tiny).log()).mean()


class Dice(Loss):
    """Soft Dice loss (Milletari 2016; sums and smoothing as nnU-Net's) of logits and integer labels.

    p = softmax(output) over axis 1 (K = 1: sigmoid), t = one-hot labels, sums over the voxels of a sample
    (batch=True: of the whole batch, nnU-Net's `batch_dice`), for each class k

        dice_k = (2 sum p_k t_k + smooth) / (sum p_k + sum t_k + smooth),    loss = 1 - mean of dice_k

    The mean is over samples and classes, class 0 (background) only with include_background=True.
    Empty classes: they count. A class that is not in the truth scores 1 where the network gives it
    nothing, and near 0 as soon as it gives it much more than `smooth` voxels. nnU-Net's loss is this
    minus 1: the same gradients.

    output: (N, K, ...) with at least one spatial axis; target: (N, ...) or (N, 1, ...), integer.

    >>> logits, labels = torch.zeros(1, 2, 4), torch.tensor([[0, 1, 1, 1]])
    >>> round(Dice()(logits, labels).item(), 4)  # 1 - 2 * 1.5 / (2 + 3)
    0.4
    """

    def __init__(self, include_background: bool = False, smooth: float = 1e-5, batch: bool = False):
        super().__init__()
        if not smooth > 0:
            raise ValueError(
                f"dice: smooth must be above 0 (an empty class would be 0 / 0), received {smooth}"
            )
        self.include_background, self.smooth, self.batch = include_background, smooth, batch

    def compute(self, output: Tensor, target: Tensor) -> Tensor:
        labels = class_labels(output, target, "dice").unsqueeze(1)
        if output.ndim < 3:
            raise ValueError(
                f"dice: the output needs spatial axes (N, K, ...), received {tuple(output.shape)}; "
                "use cross_entropy to classify whole images"
            )
        p = _full_precision(output)
        if output.shape[1] == 1:
            p, t = p.sigmoid(), labels.to(p.dtype)
        else:
            p = p.softmax(1)
            t = torch.zeros_like(p).scatter_(1, labels, 1.0)
            if not self.include_background:
                p, t = p[:, 1:], t[:, 1:]
        axes = [0] * self.batch + list(range(2, p.ndim))
        overlap, size = (p * t).sum(axes), p.sum(axes) + t.sum(axes)
        return 1 - ((2 * overlap + self.smooth) / (size + self.smooth)).mean()


class DiceCE(Loss):
    """nnU-Net's loss: `Dice` + `CrossEntropy`, both with weight 1, background left out of the Dice.

    Takes what Dice takes. With one output channel the second term is the binary cross-entropy.

    >>> logits, labels = torch.zeros(1, 2, 4), torch.tensor([[0, 1, 1, 1]])
    >>> round(DiceCE()(logits, labels).item(), 4)  # 0.4 + log 2
    1.0931
    """

    def __init__(self, include_background: bool = False, smooth: float = 1e-5, batch: bool = False):
        super().__init__()
        self.dice = Dice(include_background, smooth, batch)
        self.cross_entropy = CrossEntropy()
        self.binary_cross_entropy = BinaryCrossEntropy(from_logits=True)

    def compute(self, output: Tensor, target: Tensor) -> Tensor:
        second = self.cross_entropy if output.shape[1] > 1 else self.binary_cross_entropy
        return self.dice(output, target) + second(output, target)


def _full_precision(x: Tensor) -> Tensor:
    """float32 for the half types, whose sums and logarithms are too coarse for a loss."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _probabilities(output: Tensor, who: str, layer: str, alternative: str) -> Tensor:
    if bool((output < 0).any()) or bool((output > 1).any()):
        low, high = (float(v) for v in output.detach().aminmax())
        raise ValueError(
            f"{who}: the output must be probabilities in [0, 1], received {low:.4g} to {high:.4g}; "
            f"end the network with {layer}, or use {alternative} for logits"
        )
    return _full_precision(output)


def _check_unit_interval(t: Tensor, what: str) -> None:
    if bool((t < 0).any()) or bool((t > 1).any()):
        low, high = (float(v) for v in t.aminmax())
        raise ValueError(f"{what} must be in [0, 1], received values from {low:.4g} to {high:.4g}")


def _check_sums_to_one(p: Tensor, output: Tensor, what: str, remedy: str) -> None:
    """NaN passes: it shows as a NaN loss, which names its own cause."""
    off = (p.detach().sum(1) - 1).abs()
    tolerance = 0.05 if output.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if bool((off > tolerance).any()):
        raise ValueError(
            f"categorical_crossentropy: the {what} must sum to 1 over axis 1, received a sum that is "
            f"off by {float(off.max()):.4g}; {remedy}"
        )


NAMES: dict[str, Callable[[], Loss]] = {
    "cross_entropy": CrossEntropy,
    "categorical_crossentropy": CategoricalCrossentropy,
    "binary_cross_entropy": BinaryCrossEntropy,
    "binary_cross_entropy_with_logits": lambda: BinaryCrossEntropy(from_logits=True),
    "dice": Dice,
    "dice_ce": DiceCE,
}


def takes_logits(loss: Callable[..., Tensor]) -> bool | None:
    """Whether a loss wants logits (True) or probabilities (False); None: unknown.

    >>> takes_logits(Dice()), takes_logits(nn.BCELoss()), takes_logits(F.l1_loss)
    (True, False, None)
    """
    if isinstance(loss, Loss):
        return loss.from_logits
    if isinstance(loss, (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)):
        return True
    return False if isinstance(loss, nn.BCELoss) else None


def get(loss: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss of a name, or the given loss(output, target) -> scalar itself.

    >>> get("dice_ce")
    DiceCE(
      (dice): Dice()
      (cross_entropy): CrossEntropy()
      (binary_cross_entropy): BinaryCrossEntropy()
    )
    """
    if isinstance(loss, str):
        if loss not in NAMES:
            raise ValueError(f"unknown loss {loss!r}; expected one of {', '.join(NAMES)}, or a function")
        return NAMES[loss]()
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(
            f"the loss must be a name ({', '.join(NAMES)}) or loss(output, target), received {loss!r}"
        )
    return loss
