"""Bad input: wrong shapes, channels, dtypes, devices, labels out of range. One clear message each, of one type, in
the words of what was called. (Files: test_volume.py and test_checkpoint.py; the command: test_cli.py.)"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import convoxel
from convoxel import functional as F
from convoxel import inference, losses, metrics, models, nn
from convoxel.volume import Volume
from every import ONE_OF_EACH

OPS = torch.ops.convoxel
X = torch.ones(2, 4, 8, 8)

# Layers and functions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "x", "error", "words"),
    [
        (nn.Conv2d(4, 6, 3), X[:, :3], RuntimeError,
         r"conv2d: .* size \(6, 4, 3, 3\), expected input to have 4 channels, but got 3 .* x \(2, 3, 8, 8\)"),
        (nn.Conv2d(4, 6, 3), X[:, :, 0, 0], RuntimeError, r"conv2d: expected 4D .*\(2, 4\); .*\(N, C, H, W\)"),
        (nn.Conv2d(4, 6, 3), X[:, :, :2], RuntimeError,
         r"conv2d: kernel size can't be greater .* x \(2, 4, 2, 8\) \(N, C, H, W\), kernel \(3, 3\).*enlarge"),
        (nn.Conv2d(4, 6, 3), X.double(), RuntimeError, r"conv2d: .*same dtype, received torch.float64.*convert"),
        (nn.Conv2d(4, 6, 3), X.byte(), RuntimeError, r"conv2d: torch takes this call \(dtype torch.uint8.*float\(\)"),
        (nn.Conv2d(4, 6, 3), X.numpy(), TypeError, r"conv2d\(\): argument 'input' must be Tensor, not ndarray"),
        (nn.Conv1d(4, 6, 3), torch.ones(2, 3, 9), RuntimeError, r"conv1d: .*have 4 channels, but got 3 "),
        (nn.Conv3d(4, 6, 3), torch.ones(2, 3, 4, 4, 4), RuntimeError, r"conv3d: .*have 4 channels, but got 3 "),
        (nn.ConvTranspose2d(4, 6, 2, 2), X[:, :3], RuntimeError,
         r"conv_transpose2d: .* \(4, 6, 2, 2\), expected input to have 4 channels, but got 3 .* x \(2, 3, 8, 8\)"),
        (nn.ConvTranspose2d(4, 6, 2, 2), X.double(), RuntimeError, r"conv_transpose2d: .*same dtype"),
        (nn.Linear(4, 2), torch.ones(3, 5), RuntimeError, r"linear: .*input \(3, 5\).*expects \(4,\)"),
        (nn.Linear(4, 2), torch.ones(3, 4).double(), RuntimeError, r"linear: .*same dtype.*convert"),
        (nn.MaxPool3d(4), torch.ones(1, 1, 3, 3, 3), RuntimeError, r"max_pool3d: .*\(3, 3, 3\).*enlarge"),
        (nn.AvgPool2d(2), X.bool(), NotImplementedError, r"avg_pool2d: torch takes this call \(dtype torch.bool"),
        (nn.BatchNorm2d(3), X, RuntimeError, r"batch_norm: running_mean should contain 4 elements.*not \(3,\)"),
        (nn.BatchNorm2d(4), X.double(), RuntimeError, r"batch_norm: mixed dtype: .*float64.*float32.*convert"),
        (nn.InstanceNorm2d(4, affine=True), X.double(), RuntimeError, r"instance_norm: mixed dtype: .*convert"),
        (nn.InstanceNorm2d(4), X[:, :, :1, :1], ValueError, r"instance_norm: .*more than 1 spatial.*enlarge"),
        (nn.GroupNorm(2, 6), X, RuntimeError, r"group_norm: weight should be a vector of 4.*received \(6,\)"),
        (nn.LayerNorm(7), X, RuntimeError, r"layer_norm: .*\[\*, 7\], but got input of size \(2, 4, 8, 8\)"),
        (nn.Upsample(scale_factor=2), [1.0], TypeError, r"interpolate\(\): argument 'input' must be Tensor, not list"),
        (nn.LeakyReLU(), None, TypeError, r"leaky_relu\(\): argument 'input' must be Tensor, not NoneType"),
    ],
)  # fmt: skip
def test_layers_say_what_expected_received_and_remedy(layer, x, error, words):
    with pytest.raises(error, match=words) as caught:
        layer(x)
    shown = caught.value.__cause__ or (not caught.value.__suppress_context__ and caught.value.__context__)
    assert caught.type is error and not shown  # nothing else is printed above it


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w: F.conv2d(X, w, torch.ones(5)), r"conv2d: expected bias of shape \(6,\), received \(5,\)"),
        (lambda w: F.conv2d(X, w, groups=3), r"conv2d: given groups=3, .*have 12 channels, but got 4"),
        (lambda w: F.conv2d(X, w, stride=(1, 0)), r"conv2d: non-positive stride .*received stride \(1, 0\)"),
        (
            lambda w: F.conv_transpose2d(X, w[:4], torch.ones(5)),
            r"conv_transpose2d: expected bias of shape \(4,\)",
        ),
    ],
)
def test_convolutions_speak_of_the_callers_axes(call, words):
    with pytest.raises(RuntimeError, match=words):
        call(torch.ones(6, 4, 3, 3))


@pytest.mark.parametrize("call", [c for c in ONE_OF_EACH if len(c.shapes) > 1], ids=str)
def test_tensors_on_several_devices_are_refused(call):
    """meta stands for any other device: a result there would be memory that nothing ever wrote."""
    for i in range(len(call.shapes)):
        tensors = call.tensors()
        tensors[i] = tensors[i].to("meta")
        with pytest.raises(RuntimeError, match=rf"^{call.name}: .*same device, .*cpu and some on meta; move"):
            call(F, *tensors)


def test_operators_refuse_several_devices_without_the_layers_in_front():
    x, w, how = torch.ones(1, 2, 3, 3, 3), torch.ones(2, 2, 3, 3, 3), ((1,) * 3, (0,) * 3, (1,) * 3, 1)
    with pytest.raises(RuntimeError, match="conv: expected all tensors on the same device"):
        OPS.conv(x, w.to("meta"), None, *how)
    with pytest.raises(RuntimeError, match="norm: expected all tensors on the same device"):
        OPS.norm(x, torch.ones(2, device="meta"), None, 1, False, 1e-5)


@pytest.mark.parametrize("call", ONE_OF_EACH, ids=str)
def test_the_meta_device_gives_shapes(call):
    y = call(F, *(t.to("meta") for t in call.tensors()))
    assert y.device.type == "meta" and y.shape == call(F, *call.tensors()).shape


# Model API ----------------------------------------------------------------------------------------------

IMAGES, CLASSES = np.ones((6, 1, 8, 8), np.float32), np.arange(6) % 3
MAPS = np.arange(6 * 64).reshape(6, 8, 8) % 3


def classifier(loss="cross_entropy"):
    last = [nn.Softmax(1)] if loss == "categorical_crossentropy" else []
    model = convoxel.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3), *last)
    model.compile("sgd", loss, ["accuracy"])
    return model


def segmenter(loss="dice_ce"):
    model = convoxel.Model(models.UNet(2, 1, 3, features=(2, 4)))
    model.compile("sgd", loss, ["dice"])
    return model


@pytest.mark.parametrize(
    ("make", "x", "y", "error", "words"),
    [
        (classifier, IMAGES.repeat(3, 1), CLASSES, ValueError, r"Conv2d needs x with 1 channels .*\(6, 3, 8, 8\)"),
        (classifier, IMAGES[:, 0], CLASSES, ValueError, r"\(N, C, H, W\), received \(6, 8, 8\).*x\[:, None\]"),
        (classifier, IMAGES[..., :6], CLASSES, RuntimeError, r"linear: .*features \(48,\).*expects \(72,\)"),
        (classifier, (IMAGES * 255).astype("u1"), CLASSES, TypeError, "floating point.*uint8; convert it"),
        (classifier, IMAGES.astype(str), CLASSES, TypeError, "expected an array of numbers, received dtype <U32"),
        (classifier, IMAGES.tolist(), CLASSES, ValueError, r"y goes with an array x; a list .*numpy.asarray"),
        (classifier, None, CLASSES, TypeError, "expected arrays .*received NoneType"),
        (classifier, IMAGES, CLASSES[:4], ValueError, r"differ in length: x \(6, 1, 8, 8\) and y \(4,\)"),
        (classifier, IMAGES, CLASSES / 2, TypeError, "cross_entropy: labels must be integers.*float32; convert"),
        (classifier, IMAGES, np.eye(3)[CLASSES], TypeError, r"labels must be integers.*one-hot.*argmax\(1\)"),
        (classifier, IMAGES, CLASSES.tolist(), TypeError, "y must be a numpy array or a torch tensor, received list"),
        (segmenter, IMAGES.repeat(3, 1), MAPS, ValueError, r"UNet expects .* 1 input channels, .*\(6, 3, 8, 8\)"),
        (segmenter, IMAGES[..., :7], MAPS[..., :7], ValueError, r"divisible by \(2, 2\).*received \(8, 7\); pad"),
        (segmenter, IMAGES, MAPS[..., :7], ValueError, r"labels of shape \(6, 8, 8\), received \(6, 8, 7\); cut"),
        (segmenter, IMAGES, MAPS / 2, TypeError, "labels must be integers.*float32; convert them"),
        (lambda: segmenter("binary_cross_entropy_with_logits"), IMAGES, MAPS, ValueError,
         r"must have the output's shape \(6, 3, 8, 8\).*received \(6, 8, 8\); .*cross_entropy"),
    ],
)  # fmt: skip
def test_fit_and_evaluate_refuse_what_cannot_be_meant(make, x, y, error, words):
    for verb in ("fit", "evaluate"):
        with pytest.raises(error, match=words):
            getattr(make(), verb)(x, y, verbose=0)


@pytest.mark.parametrize(("move", "values"), [(1, "1 to 3"), (-1, "-1 to 1"), (255, "255 to 257")])
@pytest.mark.parametrize(
    ("make", "y"),
    [
        *((lambda loss=loss: classifier(loss), CLASSES) for loss in ("cross_entropy", "categorical_crossentropy")),
        *((lambda loss=loss: segmenter(loss), MAPS) for loss in ("cross_entropy", "dice", "dice_ce")),
    ],
)  # fmt: skip
def test_labels_out_of_range(make, y, move, values):
    words = rf"labels must be in 0\.\.2 for an output of 3 channels, received values from {values}; check"
    for call in (
        lambda model: model.fit(IMAGES, y + move, verbose=0),
        lambda model: model.fit(IMAGES, y, validation_data=(IMAGES, y + move), verbose=0),
        lambda model: model.evaluate(IMAGES, y + move, verbose=0),
    ):
        with pytest.raises(ValueError, match=words):
            call(make())


@pytest.mark.parametrize("judge", [losses.CrossEntropy(), losses.Dice(), metrics.Accuracy(), metrics.Dice(),
                                   metrics.IoU()], ids=lambda j: type(j).__name__)  # fmt: skip
@pytest.mark.parametrize("wrong", [-1, 3])
def test_one_label_out_of_range_among_many_stops_losses_and_metrics(judge, wrong):
    output, labels = torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2, 0, 1]] * 2)
    labels[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"labels must be in 0\.\.2 .*received values from .*{wrong}"):
        judge.update(output, labels) if isinstance(judge, metrics.Metric) else judge(output, labels)


def test_callbacks_must_be_callbacks():
    with pytest.raises(
        TypeError, match="callbacks must be convoxel.callbacks.Callback objects, received str"
    ):
        classifier().fit(IMAGES, CLASSES, verbose=0, callbacks="csv")


# Scans --------------------------------------------------------------------------------------------------


def test_a_scan_with_other_channels_than_the_network():
    scan = Volume(np.ones((2, 8, 8, 8), np.float32), (1, 1, 1))
    with pytest.raises(ValueError, match=r"1 input channels, received shape \(1, 2, 8, 8, 8\)"):
        inference.predict_labels(models.UNet(3, 1, 2, features=(2, 4)), scan, patch_size=8)


def test_windows_are_of_tensors():
    with pytest.raises(TypeError, match=r"sliding_window_inference: expected a tensor .*received ndarray; "):
        inference.sliding_window_inference(np.ones((1, 1, 8, 8)), 4, 1, lambda x: x)


# The command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"CONVOXEL_ISA": "mmx"}, "ISA 'mmx' is not available: "),
        ({"CONVOXEL_STRICT": "maybe"}, "CONVOXEL_STRICT=maybe: expected 1 or 0"),
        ({"CONVOXEL_CONV_ALGORITHM": "fft"}, "CONVOXEL_CONV_ALGORITHM=fft: expected one of auto, direct"),
    ],
)
def test_a_wrong_setting_stops_the_command_in_one_line(setting, words):
    command = [sys.executable, "-m", "convoxel", "info"]
    done = subprocess.run(command, env={**os.environ, **setting}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"convoxel: {words}")
