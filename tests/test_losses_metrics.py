"""Losses and metrics: values by hand, torch's own as reference, rules for empty and missed, errors."""

import doctest
import math

import pytest
import torch
from torch.nn import functional as F

from convoxel import losses, metrics

LOGITS = torch.tensor([[[2.0, -1.0, 0.5, 3.0], [0.0, 1.0, 0.5, -2.0], [-1.0, 0.0, 2.5, 0.0]]])
LABELS = torch.tensor([[0, 1, 2, 1]])


@pytest.mark.parametrize("module", [losses, metrics], ids=lambda m: m.__name__)
def test_the_examples_in_the_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("channel_axis", [False, True])
def test_cross_entropy_is_torchs_for_every_integer_label(dtype, channel_axis):
    labels = LABELS.to(dtype).unsqueeze(1) if channel_axis else LABELS.to(dtype)
    assert torch.equal(losses.get("cross_entropy")(LOGITS, labels), F.cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize("one_hot", [False, True])
def test_categorical_crossentropy_applies_no_softmax(one_hot):
    target = F.one_hot(LABELS, 3).movedim(-1, 1) if one_hot else LABELS
    value = losses.get("categorical_crossentropy")(LOGITS.softmax(1), target)
    torch.testing.assert_close(value, F.cross_entropy(LOGITS, LABELS))


def test_categorical_crossentropy_can_unlearn_a_confident_mistake():
    """p of the true class is 1e-26: the gradient through the softmax is still that of the logits."""
    x = torch.tensor([[60.0, 0.0]], requires_grad=True)
    losses.get("categorical_crossentropy")(x.softmax(1), torch.tensor([1])).backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_binary_cross_entropy_is_torchs(shape):
    p, t = torch.tensor([[0.1], [0.9], [0.5], [1.0]]), torch.tensor([0, 1, 1, 0])
    expected = F.binary_cross_entropy(p[:3], t[:3, None].float())
    torch.testing.assert_close(
        losses.get("binary_cross_entropy")(p[:3], t[:3].reshape(3, *shape[1:])), expected
    )
    assert math.isfinite(losses.get("binary_cross_entropy")(p, t))
    logits = torch.tensor([[-3.0], [0.0], [100.0], [-200.0]])
    expected = F.binary_cross_entropy_with_logits(logits, t[:, None].float())
    value = losses.get("binary_cross_entropy_with_logits")(logits, t.reshape(shape).bool())
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("classes", [1, 3])
def test_dice_is_its_formula(background, batch, classes):
    torch.manual_seed(0)
    x, y, s = torch.randn(2, classes, 3, 5), torch.randint(0, max(classes, 2), (2, 3, 5)), 0.3
    p = x.softmax(1) if classes > 1 else torch.cat([1 - x.sigmoid(), x.sigmoid()], 1)
    kinds = range(0 if background and classes > 1 else 1, p.shape[1])
    groups = [[0, 1]] if batch else [[0], [1]]
    scores = []
    for group in groups:
        for k in kinds:
            t, pk = (y[group] == k).float(), p[group, k]
            scores.append((2 * (pk * t).sum() + s) / (pk.sum() + t.sum() + s))
    value = losses.Dice(include_background=background, smooth=s, batch=batch)(x, y)
    torch.testing.assert_close(value, 1 - torch.stack(scores).mean())


def test_dice_of_empty_classes():
    """Nothing true: the loss is 0 where nothing is predicted and 1 where much is, as stated."""
    sure = torch.stack([torch.full((1, 100), 40.0), torch.zeros(1, 100)], 1)
    empty = torch.zeros(1, 100, dtype=torch.long)
    assert losses.Dice()(sure, empty).item() == pytest.approx(0, abs=1e-6)
    assert losses.Dice()(-sure, empty).item() == pytest.approx(1, abs=1e-6)
    assert losses.Dice()(sure, empty + 1).item() == pytest.approx(1, abs=1e-6)


def test_dice_ce_is_the_sum():
    value = losses.get("dice_ce")(LOGITS, LABELS)
    torch.testing.assert_close(value, losses.Dice()(LOGITS, LABELS) + F.cross_entropy(LOGITS, LABELS))
    x, y = LOGITS[:, :1], LABELS.clamp(max=1)
    expected = losses.Dice()(x, y) + F.binary_cross_entropy_with_logits(x, y[:, None].float())
    torch.testing.assert_close(losses.get("dice_ce")(x, y), expected)


@pytest.mark.parametrize("name", list(losses.NAMES))
def test_gradients(name):
    torch.manual_seed(0)
    probabilities = name in ("categorical_crossentropy", "binary_cross_entropy")
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    binary = name.startswith("binary")
    y = torch.randint(0, 2, (2, 3, 4)) if binary else torch.randint(0, 3, (2, 4))
    squash = (torch.sigmoid if binary else lambda v: v.softmax(1)) if probabilities else (lambda v: v)
    loss = losses.get(name)
    assert torch.autograd.gradcheck(lambda v: loss(squash(v), y), x)


@pytest.mark.parametrize("name", list(losses.NAMES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(name, dtype):
    x = LOGITS.softmax(1) if name in ("categorical_crossentropy", "binary_cross_entropy") else LOGITS
    y = F.one_hot(LABELS, 3).movedim(-1, 1) if name.startswith("binary") else LABELS
    exact = losses.get(name)(x, y).item()
    assert losses.get(name)(x.to(dtype), y).item() == pytest.approx(exact, rel=2e-2)


def test_deep_supervision_weighs_and_samples_at_voxel_centres():
    y = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, 1], [2, 2, 0, 0], [2, 2, 0, 1]]])
    half = torch.tensor([[[2, 1], [2, 1]]])
    assert torch.equal(losses.at_resolution(y, (2, 2)), half)
    torch.manual_seed(0)
    outputs = [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 2, 2), torch.randn(1, 3, 1, 1)]
    terms = [F.cross_entropy(o, t) for o, t in zip(outputs, (y, half, y[:, 2:3, 2:3]), strict=True)]
    expected = (4 * terms[0] + 2 * terms[1] + terms[2]) / 7
    torch.testing.assert_close(losses.get("cross_entropy")(outputs, y), expected)
    torch.testing.assert_close(
        losses.DeepSupervision(torch.nn.CrossEntropyLoss())(tuple(outputs), y), expected
    )


@pytest.mark.parametrize("old, new", [(5, 2), (7, 3), (6, 4), (4, 8)])
def test_at_resolution_is_torchs_nearest_exact(old, new):
    values = torch.arange(old)[None]
    expected = F.interpolate(values[None].double(), size=new, mode="nearest-exact")[0].long()
    assert torch.equal(losses.at_resolution(values, (new,)), expected)


@pytest.mark.parametrize("name", ["cross_entropy", "dice", "dice_ce", "categorical_crossentropy"])
def test_labels_that_do_not_fit(name):
    loss, p = losses.get(name), LOGITS.softmax(1)
    with pytest.raises(ValueError, match=r"labels must be in 0..2 .*3 channels, received values from 0 to 3"):
        loss(p, torch.tensor([[0, 1, 2, 3]]))
    with pytest.raises(ValueError, match="received values from -1 to 2"):
        loss(p, torch.tensor([[0, -1, 2, 1]]))
    with pytest.raises(ValueError, match=r"integer labels of shape \(1, 4\), received \(1, 5\)"):
        loss(p, torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(TypeError, match=r"labels must be integers.*float32.*\.long\(\)"):
        loss(p, LABELS.float())


def loss_of(name, output, target):
    return lambda: losses.get(name)(output, target)


P, ZEROS = LOGITS.softmax(1), torch.zeros
CCE, CE, BCE = "categorical_crossentropy", "cross_entropy", "binary_cross_entropy"


@pytest.mark.parametrize(
    "call, message",
    [
        (loss_of(CCE, LOGITS, LABELS), r"must be probabilities in \[0, 1\], received -2 to 3; .*nn.Softmax"),
        (loss_of(CCE, LOGITS.sigmoid(), LABELS), "the output must sum to 1 over axis 1"),
        (loss_of(CCE, P, ZEROS(1, 3, 4)), "the one-hot target must sum to 1 over axis 1"),
        (loss_of(CE, LOGITS[:, :1], LABELS * 0), "one output channel .*with_logits"),
        (loss_of(CE, LABELS[0], LABELS), r"must be \(N, K, ...\), received \(4,\)"),
        (loss_of("dice", ZEROS(2, 3), ZEROS(2).long()), "dice: the output needs spatial axes"),
        (lambda: losses.Dice(smooth=0), "smooth must be above 0"),
        (loss_of(BCE, ZEROS(2, 1), ZEROS(3)), r"shape \(2, 1\) .*received \(3,\)"),
        (loss_of(BCE, ZEROS(2, 1) + 1.5, ZEROS(2)), "received 1.5 to 1.5; .*nn.Sigmoid"),
        (
            loss_of(BCE, ZEROS(2, 1), ZEROS(2) + 7),
            r"targets must be in \[0, 1\], received values from 7 to 7",
        ),
        (lambda: losses.get("mse"), "unknown loss 'mse'; expected one of cross_entropy, "),
        (lambda: metrics.get("auc"), "unknown metric 'auc'; expected one of accuracy, dice, iou"),
        (lambda: metrics.get(["dice", metrics.Dice(True)]), "different names.*received dice"),
        (lambda: metrics.get(metrics.Mean(F.l1_loss, name="loss")), "'loss' is taken"),
        (lambda: metrics.Dice().update(ZEROS(1, 1, 4), LABELS), "one output channel needs a threshold"),
    ],
)
def test_what_does_not_fit_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call", [lambda: losses.get(3), lambda: metrics.get([3]), lambda: losses.get(losses.Dice)]
)
def test_names_or_objects_only(call):
    with pytest.raises(TypeError, match="must be a name .* received"):
        call()


def outputs_for(classes: list[int], k: int) -> torch.Tensor:
    """Logits (1, k, n) whose argmax is `classes`."""
    return F.one_hot(torch.tensor([classes]), k).movedim(-1, 1).float()


@pytest.mark.parametrize("name, expected", [("dice", (4 / 5, 2 / 4)), ("iou", (2 / 3, 1 / 3))])
def test_overlap_counts_the_whole_set_not_the_mean_of_batches(name, expected):
    """Batch 1 has one voxel of class 1 and misses it; batch 2 has two and hits both."""
    metric = metrics.get(name)[0]
    metric.update(outputs_for([0, 0, 2], 3), torch.tensor([[1, 0, 0]]))
    metric.update(outputs_for([1, 1, 2, 0, 0], 3), torch.tensor([[1, 1, 2, 2, 0]]))
    assert metric.per_class()[1:] == pytest.approx(expected)
    assert metric.result() == pytest.approx(sum(expected) / 2)
    metric.reset()
    metric.update(outputs_for([1], 3), torch.tensor([[1]]))
    assert metric.result() == 1


@pytest.mark.parametrize("name", ["dice", "iou"])
def test_nothing_improves_by_missing(name):
    def score(predicted, true):
        metric = metrics.get(name)[0]
        metric.update(outputs_for(predicted, 3), torch.tensor([true]))
        return metric.result(), metric.per_class()

    value, per_class = score([0, 1, 0], [0, 1, 2])  # class 2 missed
    assert value == 0.5 and per_class[2] == 0
    value, per_class = score([0, 1, 2], [0, 1, 0])  # class 2 invented
    assert value == 0.5 and per_class[2] == 0
    value, per_class = score([0, 1, 0], [0, 1, 0])  # class 2 in neither: no score, left out
    assert value == 1 and math.isnan(per_class[2])
    value, _ = score([0, 0, 0], [0, 0, 0])
    assert math.isnan(value)


def test_background_counts_only_if_asked():
    values = []
    for background in (False, True):
        metric = metrics.Dice(include_background=background)
        metric.update(outputs_for([0, 0, 0, 1], 2), torch.tensor([[0, 0, 1, 1]]))
        values.append(metric.result())
    assert values == pytest.approx([2 / 3, (4 / 5 + 2 / 3) / 2])


@pytest.mark.parametrize(
    "target", [torch.tensor([1, 0, 1]), torch.tensor([[1], [0], [1]]), torch.tensor([1.0, 0, 1])]
)
@pytest.mark.parametrize("threshold, right", [(0.0, 2 / 3), (0.5, 1.0)])
def test_one_channel_is_cut_at_the_threshold(target, threshold, right):
    accuracy = metrics.Accuracy(threshold=threshold)
    accuracy.update(torch.tensor([[0.9], [0.1], [0.6]]), target)
    assert accuracy.result() == pytest.approx(right)


def test_metrics_take_one_hot_truth_and_deep_supervision():
    accuracy = metrics.Accuracy()
    outputs = [outputs_for([0, 1, 1], 2), torch.zeros(1, 2, 1)]
    accuracy.update(outputs, torch.tensor([[0, 1, 0]]))
    accuracy.update(outputs_for([0, 1], 2), outputs_for([0, 1], 2).long())
    assert accuracy.result() == 4 / 5
    assert math.isnan(metrics.Accuracy().result())


def test_labels_out_of_range_stop_a_metric_too():
    with pytest.raises(ValueError, match="dice: labels must be in 0..1"):
        metrics.Dice().update(torch.zeros(1, 2, 4), LABELS)
    dice = metrics.Dice()
    dice.update(torch.zeros(1, 3, 4), LABELS)
    with pytest.raises(ValueError, match="2 classes after 3"):
        dice.update(torch.zeros(1, 2, 4), LABELS * 0)
