"""What a network learns from: Dice + cross-entropy, and the Dice by which an epoch is judged.

`losses.DiceCE` as training needs it: with regions that overlap, voxels that nobody labelled, several processes, and
few passes over the logits. The loss is a small formula of a few sums per structure; only these sums, and their
gradient, see the voxels, block by block while a block is in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from .. import losses, memory

SMOOTH = 1e-5  # voxels, as losses.Dice has it

_BLOCK = 2**19  # elements: two float32 scratch tensors of that size and their labels fit into L2 caches


class SegmentationLoss(losses.Loss):
    """nnU-Net's loss: soft Dice + cross-entropy, both with weight 1; of a list of outputs deep supervision's mean.

    Classes (structures None): softmax over K = classes channels; cross-entropy, and `losses.Dice` of all classes but
    background (0). Regions: one channel each, sigmoid; binary cross-entropy and Dice of every region. The
    cross-entropy is the mean over the voxels that count (and over regions; nnU-Net's with an ignore label adds them
    up); those with the value `ignore` count nowhere. Without any, the loss is 0, as are its gradients.

    Args:
        structures: None, or for each region the label values in it.
        classes: label values are 0..classes - 1.
        ignore: value of voxels that nobody labelled, or None.
        batch_dice: overlap of the whole batch rather than of each of its samples.
        group: the batch is that of all of torch.distributed's processes together: each gets its loss, and gradients
            whose mean over the processes (DistributedDataParallel's) is the joined batch's. Every process must call.

    output: (N, K, H, W) or (N, K, D, H, W), float, any memory format; half types are computed in float32.
    target: (N, *patch) int64. Raises ValueError for shapes and label values that do not fit.

    >>> loss = SegmentationLoss(None, classes=2, ignore=2, batch_dice=False, group=False)
    >>> logits, labels = torch.zeros(1, 2, 2, 3), torch.tensor([[[0, 1, 1], [1, 2, 2]]])
    >>> round(loss(logits, labels).item(), 4)  # 1 - 2 * 1.5 / (2 + 3) + log 2
    1.0931
    """

    def __init__(
        self,
        structures: Sequence[tuple[int, ...]] | None,
        *,
        classes: int,
        ignore: int | None,
        batch_dice: bool,
        group: bool,
    ) -> None:
        super().__init__()
        _check_structures("SegmentationLoss", structures, classes, ignore)
        self.channels = classes if structures is None else len(structures)
        self.classes, self.ignore, self.batch_dice, self.group = classes, ignore, batch_dice, group
        self.members: Tensor | None
        self.register_buffer("members", _members(structures, classes), persistent=False)

    def compute(self, output: Tensor, target: Tensor) -> Tensor:
        _check_shapes("SegmentationLoss", output, target, self.channels)
        sums = _ClassSums if self.members is None else _RegionSums
        overlap, predicted, true, entropy, counted = sums.apply(
            output, target, self.classes, self.ignore, self.members
        )
        if self.members is None:
            overlap, predicted, true = overlap[:, 1:], predicted[:, 1:], true[:, 1:]
        if self.batch_dice:
            overlap, predicted, true, entropy, counted = self._joined(
                overlap.sum(0), predicted.sum(0), true.sum(0), entropy, counted
            )
            dice = _dice_loss(overlap, predicted, true).mean()
        else:
            each = _dice_loss(overlap, predicted, true)
            total, number, entropy, counted = self._joined(
                each.sum(), counted.new_tensor(each.numel()), entropy, counted
            )
            dice = total / number.clamp(min=1)
        return (dice + entropy / counted.clamp(min=1)).to(_precision(output.dtype))

    def _joined(self, *parts: Tensor) -> Sequence[Tensor]:
        """Their sums over all processes, in one message."""
        if not self.group:
            return parts
        joined = _GroupSum.apply(torch.cat([part.reshape(-1) for part in parts]))
        pieces = joined.split([part.numel() for part in parts])
        return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def _dice_loss(overlap: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    return 1 - (2 * overlap + SMOOTH) / (predicted + true + SMOOTH)


class _GroupSum(torch.autograd.Function):
    """The sum over all processes, for a loss that every process computes from it alike.

    Each then knows the gradient of the sum without asking the others; averaging over W processes divides by W.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * distributed.get_world_size()


class _ClassSums(torch.autograd.Function):
    """logits (N, K, ...), labels (N, ...) -> float64 sums over the voxels that count, with p = softmax(logits).

    overlap (N, K): of p_k where the label is k; predicted (N, K): of p_k; true (N, K): voxels of class k;
    entropy (): of -log p_label; counted (): voxels.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, classes: int, ignore: int | None, members: None
    ) -> tuple[Tensor, ...]:
        overlap, predicted, true = logits.new_zeros((3, len(logits), classes), dtype=torch.float64).unbind()
        entropy = overlap.new_zeros(())
        # log sum_k exp x_k, and p_label: backward needs no maximum, no sum and no gather
        kept = _empty((2, len(logits), 1, target[:1].numel()), _precision(logits.dtype), logits.device)
        for block in _blocks(logits, target, ignore, classes, check=True):
            z, hit = kept[:, block.samples, :, block.voxels]
            top = block.x.amax(1, keepdim=True)
            p = torch.sub(block.x, top, out=block.scratch).exp_()
            torch.add(p.sum(1, keepdim=True).log_(), top, out=z)
            log_hit = block.x.gather(1, block.y).sub_(z)
            torch.exp(log_hit, out=hit)
            if block.left_out is not None:
                z.masked_fill_(block.left_out, math.inf)  # then p is 0, here and in backward
                hit.masked_fill_(block.left_out, 0)
                log_hit.masked_fill_(block.left_out, 0)
            p.mul_(top.sub_(z).exp_())
            entropy -= log_hit.sum(2).sum(dtype=torch.float64)  # a sum in another dtype copies first
            predicted[block.samples] += p.sum(2)
            overlap[block.samples] += _histogram(block, classes, hit)
            true[block.samples] += _histogram(block, classes)
        counted = true.sum()
        ctx.save_for_backward(logits, target, kept)
        ctx.ignore, ctx.classes = ignore, classes
        ctx.mark_non_differentiable(true, counted)
        return overlap, predicted, true, entropy, counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With a, b, c the gradients of predicted, overlap and entropy, t = one-hot labels and y the label:

        p_k (a_k + c - s) + t_k (p_y b_y - c),    s = sum_k a_k p_k + p_y b_y
        """
        logits, target, kept = ctx.saved_tensors
        b, a, _, c, _ = (gradient.to(kept.dtype) for gradient in gradients)
        gradient, flat = _empty_like(logits)
        for block in _blocks(logits, target, ctx.ignore, ctx.classes, check=False):
            samples, y = block.samples, block.y
            z, hit = kept[:, samples, :, block.voxels]
            p = block.x if block.copied else flat[samples, :, block.voxels]
            torch.sub(block.x, z, out=p).exp_()
            at_label = b[samples].reshape(-1).index_select(0, block.bins).view(y.shape).mul_(hit)
            s = torch.mul(p, a[samples, :, None], out=block.scratch).sum(1, keepdim=True).add_(at_label)
            p.mul_(torch.sub((a[samples] + c)[..., None], s, out=block.scratch))
            at_label.sub_(c)
            if block.left_out is not None:
                at_label.masked_fill_(block.left_out, 0)
            p.scatter_add_(1, y, at_label)
            if block.copied:
                flat[samples, :, block.voxels] = p
        return gradient, None, None, None, None


class _RegionSums(torch.autograd.Function):
    """As _ClassSums, of K regions, t_k where the label is one of the k-th, and p = sigmoid(logits).

    members: (K, classes), 1 where a label belongs to a region. entropy: of -log p where t, else -log(1 - p), over
    voxels and regions; counted: voxels times regions.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, classes: int, ignore: int | None, members: Tensor
    ) -> tuple[Tensor, ...]:
        shape = (3, len(logits), len(members))
        overlap, predicted, true = logits.new_zeros(shape, dtype=torch.float64).unbind()
        entropy, voxels = overlap.new_zeros(()), overlap.new_zeros(())
        for block in _blocks(logits, target, ignore, classes, check=True):
            t = _truth(members.to(block.x.dtype), block.y)
            # softplus(x) - t x; torch's softplus is no slower, but cut off above 20
            surprise = (1 - t).mul_(block.x).sub_(torch.nn.functional.logsigmoid(block.x))
            p = torch.sigmoid(block.x, out=block.scratch)
            if block.left_out is not None:
                for part in (p, t, surprise):
                    part.masked_fill_(block.left_out, 0)
            entropy += surprise.sum(2).sum(dtype=torch.float64)
            predicted[block.samples] += p.sum(2)
            overlap[block.samples] += p.mul_(t).sum(2)
            labels = _histogram(block, classes)
            true[block.samples] += labels @ members.T.double()
            voxels += labels.sum()
        ctx.save_for_backward(logits, target, members)
        ctx.ignore, ctx.classes = ignore, classes
        counted = voxels * len(members)
        ctx.mark_non_differentiable(true, counted)
        return overlap, predicted, true, entropy, counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """p_k (1 - p_k) (a_k + b_k t_k) + c (p_k - t_k), in _ClassSums' letters."""
        logits, target, members = ctx.saved_tensors
        dtype = _precision(logits.dtype)
        b, a, _, c, _ = (gradient.to(dtype) for gradient in gradients)
        gradient, flat = _empty_like(logits)
        for block in _blocks(logits, target, ctx.ignore, ctx.classes, check=False):
            t = _truth(members.to(dtype), block.y)
            p = torch.sigmoid(block.x, out=block.scratch)
            slope = torch.addcmul(a[block.samples, :, None], t, b[block.samples, :, None])
            slope = torch.ops.aten.sigmoid_backward(slope, p).add_(p.sub_(t).mul_(c))
            if block.left_out is not None:
                slope.masked_fill_(block.left_out, 0)
            flat[block.samples, :, block.voxels] = slope
        return gradient, None, None, None, None


class _Block(NamedTuple):
    """n samples and v voxels of them, in the precision of the sums."""

    x: Tensor  # (n, K, v) logits, consecutive along v
    copied: bool  # whether x is not the logits themselves, so that it may be written to
    scratch: Tensor  # as x
    y: Tensor  # (n, 1, v) int64, 0 where it does not count
    bins: Tensor  # (n v,) y + classes * sample
    left_out: Tensor | None  # (n, 1, v) bool: what does not count; None: nothing
    samples: slice
    voxels: slice


def _blocks(
    logits: Tensor, target: Tensor, ignore: int | None, classes: int, *, check: bool
) -> Iterator[_Block]:
    """Parts of samples, or whole samples where these are small. check: ValueError for labels that are not classes."""
    flat, labels, dtype = logits.detach().flatten(2), target.flatten(1), _precision(logits.dtype)
    batch, channels, size = flat.shape
    # Elsewhere than on the CPU starting an operator costs more than memory.
    budget = _BLOCK if logits.device.type == "cpu" else max(1, flat.numel())
    v = max(1, min(size, budget // channels))
    n = max(1, min(batch, budget // (channels * v)))
    copied = flat.dtype != dtype or flat.stride(2) != 1
    buffers = torch.empty((1 + copied, n * channels * v), dtype=dtype, device=logits.device)
    for samples in (slice(i, i + n) for i in range(0, batch, n)):
        for voxels in (slice(i, i + v) for i in range(0, size, v)):
            x, y, left_out = flat[samples, :, voxels], labels[samples, None, voxels], None
            if ignore is not None:
                left_out = y == ignore
                y = y.masked_fill(left_out, 0)
            if check:
                _check_labels(y, classes, ignore)
            bins = y if len(y) == 1 else y + classes * torch.arange(len(y), device=y.device).view(-1, 1, 1)
            scratch, *other = (buffer[: x.numel()].view(x.shape) for buffer in buffers)
            x = other[0].copy_(x) if copied else x
            yield _Block(x, copied, scratch, y, bins.reshape(-1), left_out, samples, voxels)


def _histogram(block: _Block, classes: int, weights: Tensor | None = None) -> Tensor:
    """(n, classes) float64: how many voxels there are of each label, or the sums of their weights (n, 1, v)."""
    if weights is None and block.left_out is not None:
        weights = ~block.left_out
    weights = None if weights is None else weights.reshape(-1).double()
    n = len(block.y)
    return torch.bincount(block.bins, weights, minlength=n * classes).view(n, classes).double()


def _truth(members: Tensor, labels: Tensor) -> Tensor:
    """(K, classes) and labels (n, 1, v) -> (n, K, v): what `members` has for them."""
    n, k = len(labels), len(members)
    return members.expand(n, -1, -1).gather(2, labels.expand(-1, k, -1))


def _empty_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor for the gradient of x (N, K, ...), channels-last if x is, and its view (N, K, voxels)."""
    flat = x.flatten(2)
    batch, channels, size = flat.shape
    if flat.stride(1) == 1 and channels > 1:
        flat = _empty((batch, size, channels), x.dtype, x.device).transpose(1, 2)
    else:
        flat = _empty((batch, channels, size), x.dtype, x.device)
    return flat.unflatten(2, x.shape[2:]), flat


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """In reused memory where we have some: fresh memory costs as much as writing to it."""
    return (
        memory.empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)
    )


def _precision(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class Counts:
    """Dice per structure over everything that was added: voxels are counted, then divided ("pseudo Dice").

    Args: as SegmentationLoss has them; structures None are the classes 1..classes - 1.

    >>> counts = Counts(None, classes=3, ignore=None, group=False)
    >>> logits = torch.tensor([[[9.0, 0, 0, 9]], [[0, 9, 9, 0]], [[0, 0, 0, 0]]]).unsqueeze(0)
    >>> counts.add(logits, torch.tensor([[[0, 1, 0, 1]]]))
    >>> counts.dice()  # nobody has class 2
    [0.5, nan]
    """

    def __init__(
        self, structures: Sequence[tuple[int, ...]] | None, *, classes: int, ignore: int | None, group: bool
    ) -> None:
        _check_structures("Counts", structures, classes, ignore)
        self.classes, self.ignore, self.group = classes, ignore, group
        self.members = _members(structures, classes)
        self.channels = classes if structures is None else len(structures)
        self.reset()

    def reset(self) -> None:
        """As if nothing had been added."""
        self.sums = torch.zeros((3, self.channels), dtype=torch.int64)  # both, predicted, true

    def add(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> None:
        """logits (N, K, ...), of a list the first; target (N, ...) int64."""
        output = logits if isinstance(logits, Tensor) else logits[0]
        _check_shapes("Counts", output, target, self.channels)
        x, y = output.detach(), target
        if self.ignore is not None:
            keep = y != self.ignore
            x, y = x.movedim(1, -1)[keep].T[None], y[keep][None]
        if not y.numel():
            return
        _check_labels(y, self.classes, self.ignore)
        if self.members is None:
            # torch's argmax over channels takes 25 times as long as its max
            pairs = y.reshape(-1) * self.classes + x.max(1).indices.reshape(-1)
            table = torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)
            found = torch.stack([table.diagonal(), table.sum(0), table.sum(1)])
        else:
            p, t = (x > 0).flatten(2), _truth(self.members.to(x.device).bool(), y.flatten(1)[:, None])
            found = torch.stack([(part).sum((0, 2)) for part in (p & t, p, t)])
        self.sums += found.cpu()

    def dice(self) -> list[float]:
        """One per structure; nan where neither truth nor prediction has it. With `group` every process must call,
        and all get the same."""
        sums = self.sums.clone()
        if self.group:
            sums = sums.to(_group_device())
            distributed.all_reduce(sums)
        rows = sums[:, 1 if self.members is None else 0 :].T.tolist()
        return [2 * both / (p + t) if p + t else math.nan for both, p, t in rows]


def _group_device() -> str:
    """NCCL sums only what is on a GPU."""
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


def _members(structures: Sequence[tuple[int, ...]] | None, classes: int) -> Tensor | None:
    """(K, classes): 1 where a label belongs to a region."""
    if structures is None:
        return None
    rows = torch.zeros(len(structures), classes)
    for row, values in zip(rows, structures, strict=True):
        row[list(values)] = 1
    return rows


def _check_structures(
    who: str, structures: Sequence[tuple[int, ...]] | None, classes: int, ignore: int | None
) -> None:
    if classes < 2:
        raise ValueError(f"{who}: expected two classes (label values) or more, received {classes}")
    if ignore is not None and 0 <= ignore < classes:
        raise ValueError(
            f"{who}: the value to ignore must not be a class, 0..{classes - 1}, received {ignore}"
        )
    if structures is None:
        return
    if not structures:
        raise ValueError(f"{who}: expected at least one region, received none; None stands for classes")
    for values in structures:
        if not values or not all(0 <= value < classes for value in values):
            raise ValueError(
                f"{who}: a region is made of label values in 0..{classes - 1}, received {values}"
            )


def _check_shapes(who: str, output: Tensor, target: Tensor, channels: int) -> None:
    if output.ndim < 3 or output.shape[1] != channels:
        raise ValueError(
            f"{who}: the output must be (N, {channels}, ...), one channel per structure, "
            f"received {tuple(output.shape)}"
        )
    expected = output.shape[:1] + output.shape[2:]
    if target.shape != expected or target.dtype != torch.int64:
        raise ValueError(
            f"{who}: an output of shape {tuple(output.shape)} needs int64 labels of shape {tuple(expected)}, "
            f"received {target.dtype} of {tuple(target.shape)}; cut the labels as the images are"
        )


def _check_labels(y: Tensor, classes: int, ignore: int | None) -> None:
    low, high = (int(v) for v in y.aminmax())
    if low < 0 or high >= classes:
        also = "" if ignore is None else f" (or {ignore}, which does not count)"
        raise ValueError(
            f"labels must be in 0..{classes - 1}{also}, received values from {low} to {high}; check the label map"
        )
