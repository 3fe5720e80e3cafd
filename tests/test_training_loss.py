"""The training loss against formulas written plainly, its gradients, two processes against one, and Counts."""

import doctest
import math

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from convoxel import losses
from convoxel.training import loss as loss_module
from convoxel.training.loss import Counts, SegmentationLoss

REGIONS = ((1, 2, 3), (2,), (3, 1))
SIZES = {"2d": (7, 6), "3d": (4, 3, 5)}
FORMATS = {"2d": torch.channels_last, "3d": torch.channels_last_3d}


def made(structures=None, ignore=None, batch_dice=False, group=False, classes=4) -> SegmentationLoss:
    return SegmentationLoss(structures, classes=classes, ignore=ignore, batch_dice=batch_dice, group=group)


def batch(size=(4, 3, 5), n=3, channels=4, ignore=None, dtype=torch.float64, seed=0):
    """Logits, and labels 0..3 of which a third is to be ignored."""
    g = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(n, channels, *size, generator=g).to(dtype),
        torch.randint(0, 4, (n, *size), generator=g),
    )
    if ignore is not None:
        y[torch.rand(y.shape, generator=g) < 0.3] = ignore
    return x, y


def plain(x, y, structures, ignore, batch_dice):
    """What SegmentationLoss says that it is, voxel by voxel."""
    x = x.flatten(2).movedim(1, -1)  # (N, voxels, K)
    y = y.flatten(1)
    counts = torch.ones_like(y, dtype=torch.bool) if ignore is None else y != ignore
    inside, labels = x[counts], y[counts]
    if structures is None:
        p, kinds = x.softmax(-1), [(k,) for k in range(1, x.shape[-1])]
        p = p[..., 1:]
        entropy = -inside.log_softmax(-1).gather(1, labels[:, None]).sum() / max(len(labels), 1)
    else:
        p, kinds = x.sigmoid(), structures
        t = torch.stack([sum(labels == v for v in values) for values in kinds], -1).to(x.dtype)
        entropy = F.binary_cross_entropy_with_logits(inside, t, reduction="sum") / max(t.numel(), 1)
    scores = []
    for rows in [slice(None)] if batch_dice else [[n] for n in range(len(x))]:
        for k, values in enumerate(kinds):
            chosen = p[rows][counts[rows]][:, k]
            true = sum(y[rows][counts[rows]] == v for v in values).to(x.dtype)
            scores.append((2 * (chosen * true).sum() + 1e-5) / (chosen.sum() + true.sum() + 1e-5))
    return 1 - torch.stack(scores).mean() + entropy


def value_and_gradient(function, x, y):
    x = x.detach().requires_grad_()
    value = function(x, y)
    value.backward()
    return value.detach(), x.grad


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(loss_module, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


@pytest.mark.parametrize("rank", SIZES)
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_dice_ce(rank, batch_dice, last, dtype):
    x, y = batch(SIZES[rank], dtype=dtype)
    x = x.to(memory_format=FORMATS[rank] if last else torch.contiguous_format)
    value, gradient = value_and_gradient(made(batch_dice=batch_dice), x, y)
    exact, expected = value_and_gradient(losses.DiceCE(batch=batch_dice), x.double(), y)
    half = dtype == torch.bfloat16
    assert gradient.dtype == dtype and gradient.stride() == x.stride()
    assert value.dtype == (torch.float32 if half else dtype)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6 if dtype != torch.float64 else 1e-13, atol=0)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("structures", [None, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("ignore", [None, 4, 255, -1])
@pytest.mark.parametrize("block", [12, 240, 10**6])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_it_is_its_formula_in_blocks_of_any_size(structures, batch_dice, ignore, block, last, monkeypatch):
    """Blocks of a few voxels, of one sample, of two and of all."""
    monkeypatch.setattr(loss_module, "_BLOCK", block)
    x, y = batch(channels=4 if structures is None else 3, ignore=ignore)
    x = x.to(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    value, gradient = value_and_gradient(made(structures, ignore, batch_dice), x, y)
    exact, expected = value_and_gradient(lambda a, b: plain(a, b, structures, ignore, batch_dice), x, y)
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)
    if ignore is not None:
        assert not gradient.movedim(1, -1)[y == ignore].any()


@pytest.mark.parametrize("structures", [None, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("ignore", [None, 4])
def test_gradients(structures, batch_dice, ignore):
    x, y = batch((2, 3, 2), 2, 4 if structures is None else 3, ignore)
    assert torch.autograd.gradcheck(lambda v: made(structures, ignore, batch_dice)(v, y), x.requires_grad_())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x[:, :, :, :1].expand(-1, -1, -1, 9),
        lambda x: x.flip(1)[:, :, None],
    ],
)
def test_logits_that_are_views(view):
    x = batch((4, 6), 2)[0]
    y = torch.randint(0, 4, view(x)[:, 0].shape)
    ours = value_and_gradient(lambda a, b: made()(view(a), b), x, y)
    theirs = value_and_gradient(lambda a, b: losses.DiceCE()(view(a), b), x, y)
    torch.testing.assert_close(ours, theirs)


def test_backward_twice_gives_the_same_and_leaves_the_logits_alone():
    x, y = batch(dtype=torch.float32)
    kept, x = x.clone(), x.requires_grad_()
    value = made()(x, y)
    first, second = (torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(x, kept)


def test_deep_supervision_and_autocast():
    y = batch((8, 8))[1]
    outputs = [batch((n, n), dtype=torch.float32, seed=n)[0] for n in (8, 4, 2)]
    expected = losses.DiceCE()(outputs, y)
    torch.testing.assert_close(made()(outputs, y), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for structures in (None, REGIONS):
            x = outputs[0][:, : 4 if structures is None else 3]
            (inside,) = value_and_gradient(made(structures), x, y)[1:]
            with torch.autocast("cpu", enabled=False):
                (outside,) = value_and_gradient(made(structures), x, y)[1:]
            assert torch.equal(inside, outside)


@pytest.mark.parametrize("structures", [None, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_nothing_to_learn_from_is_zero(structures, batch_dice):
    x, y = batch(channels=4 if structures is None else 3, ignore=4)
    value, gradient = value_and_gradient(made(structures, 4, batch_dice), x, torch.full_like(y, 4))
    assert value == 0 and torch.equal(gradient, torch.zeros_like(x))
    x, y = batch((0, 3, 5), channels=4 if structures is None else 3)
    assert value_and_gradient(made(structures, None, batch_dice), x, y)[0] == 0


@pytest.mark.parametrize("structures", [None, REGIONS], ids=["classes", "regions"])
def test_huge_logits_are_finite_and_nan_shows(structures):
    x, y = batch(channels=4 if structures is None else 3, dtype=torch.float32)
    value, gradient = value_and_gradient(made(structures), x * 1e4, y)
    torch.testing.assert_close(value.double(), plain(x.double() * 1e4, y, structures, None, False))
    assert gradient.isfinite().all()
    x[1, 0, 0, 0, 0] = math.nan
    assert made(structures)(x, y).isnan()


# two processes

CASES = [
    (structures, ignore, batch_dice)
    for structures in (None, REGIONS)
    for ignore in (None, 4)
    for batch_dice in (False, True)
]


def joined_batch(structures, ignore):
    """Four samples, the second half with far fewer labels that count, at two resolutions."""
    channels = 4 if structures is None else 3
    x, y = batch((4, 4), 4, channels, ignore)
    if ignore is not None:
        y[2:, 1:] = ignore
    return x, batch((2, 2), 4, channels, seed=1)[0], y


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for structures, ignore, batch_dice in CASES:
        mine = slice(2 * rank, 2 * rank + 2)
        full, half, y = (part[mine] for part in joined_batch(structures, ignore))
        leaves = full.requires_grad_(), half.requires_grad_()
        value = made(structures, ignore, batch_dice, group=True)(leaves, y)
        gradients = torch.autograd.grad(value, leaves)
        counts = Counts(structures, classes=4, ignore=ignore, group=True)
        counts.add(full, y)
        found.append((value.detach(), gradients, counts.dice()))
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_learn_as_one_with_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), nprocs=2)
    for case, *both in zip(CASES, *(torch.load(tmp_path / f"{r}.pt") for r in range(2)), strict=True):
        structures, ignore, batch_dice = case
        full, half, y = joined_batch(structures, ignore)
        leaves = full.requires_grad_(), half.requires_grad_()
        value = made(structures, ignore, batch_dice)(leaves, y)
        # DistributedDataParallel halves the sum of the two gradients of every weight.
        expected = [2 * gradient for gradient in torch.autograd.grad(value, leaves)]
        for level in range(2):
            found = torch.cat([gradients[level] for _, gradients, _ in both])
            torch.testing.assert_close(found, expected[level], rtol=1e-12, atol=1e-16)
        counts = Counts(structures, classes=4, ignore=ignore, group=False)
        counts.add(full, y)
        for one_value, _, dice in both:
            torch.testing.assert_close(one_value, value.detach(), rtol=1e-13, atol=0)
            assert dice == counts.dice()


# Counts


def logits_of(predicted, classes=4):
    return F.one_hot(torch.tensor([predicted]), classes).movedim(-1, 1).float()


def test_counts_are_of_all_batches_together():
    counts = Counts(None, classes=4, ignore=4, group=False)
    counts.add([logits_of([[0, 1, 2, 1]]), None], torch.tensor([[[1, 1, 2, 4]]]))
    counts.add(logits_of([[1, 1, 2, 0]]), torch.tensor([[[1, 1, 0, 4]]]))
    counts.add(logits_of([[3, 3, 3, 3]]), torch.tensor([[[4, 4, 4, 4]]]))
    assert counts.dice()[:2] == [2 * 3 / (3 + 4), 2 * 1 / (2 + 1)] and math.isnan(counts.dice()[2])
    counts.reset()
    counts.add(logits_of([[3, 0, 0, 0]]), torch.tensor([[[1, 0, 0, 0]]]))
    assert counts.dice()[0] == counts.dice()[2] == 0 and math.isnan(counts.dice()[1])


def test_counts_of_regions():
    counts = Counts(((1, 2), (2,), (3,)), classes=4, ignore=4, group=False)
    x = torch.tensor([[1.0, 1, -1, -1, 1], [-1, 1, 1, -1, 1], [-1, -1, -1, -1, 1]])[None, :, None]
    counts.add(x, torch.tensor([[[1, 2, 2, 0, 4]]]))
    assert counts.dice()[:2] == [2 * 2 / (2 + 3), 1.0] and math.isnan(counts.dice()[2])


# what does not fit

X, Y = torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: made()(X[:, :3], Y), r"must be \(N, 4, ...\), .* received \(1, 3, 2, 2\)"),
        (lambda: made(REGIONS)(X, Y), r"must be \(N, 3, ...\)"),
        (lambda: made()(X, Y[:, :1]), r"int64 labels of shape \(1, 2, 2\), received torch.int64 of \(1, 1, 2\)"),
        (lambda: made()(X, Y.int()), "received torch.int32"),
        (lambda: made()(X, Y + 4), r"labels must be in 0..3, received values from 4 to 4"),
        (lambda: made(ignore=4)(X, Y + 5), r"in 0..3 \(or 4, which does not count\), received .* 5 to 5"),
        (lambda: made(REGIONS)(X[:, :3], Y - 1), "received values from -1 to -1"),
        (lambda: Counts(None, classes=4, ignore=None, group=False).add(X, Y + 4), "received values from 4"),
        (lambda: made(ignore=3), "the value to ignore must not be a class, 0..3, received 3"),
        (lambda: made(()), "at least one region, received none"),
        (lambda: made(((1,), (4,))), r"label values in 0..3, received \(4,\)"),
        (lambda: made(((1,), ())), r"label values in 0..3, received \(\)"),
        (lambda: made(classes=1), "two classes .* received 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()
