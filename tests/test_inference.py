"""Sliding windows against a voxel-by-voxel reference and known answers, and scans to label maps."""

import itertools
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from convoxel.inference import predict_labels, sliding_window_inference
from convoxel.inference.maps import Maps, entropy_of, probabilities_of
from convoxel.volume import Volume, VolumeError, read

IMAGES = {1: (2, 3, 11), 2: (2, 2, 10, 7), 3: (1, 2, 6, 9, 7)}


def image(rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(IMAGES[rank], generator=generator, dtype=torch.float64).to(dtype)


def tilt(x):
    """A predictor whose answer depends on where in the window a voxel lies: misplaced windows show."""
    ramp = sum(
        (2.0 + axis) * torch.arange(n, dtype=x.dtype).reshape([-1] + [1] * (x.ndim - 3 - axis))
        for axis, n in enumerate(x.shape[2:])
    )
    return torch.cat([x[:, :1] * (1 + ramp), x.sum(1, keepdim=True) - ramp, x[:, -1:]], 1)


def reference(x, roi, overlap, gaussian, sigma=0.125):
    """The definition, one window and one voxel at a time, in float64; the image is not smaller than roi."""
    rank = len(roi)
    positions = []
    for n, r, o in zip(x.shape[2:], roi, overlap, strict=True):
        step, axis = max(1, int(r * (1 - o))), [0]
        while axis[-1] + r < n:
            axis.append(min(axis[-1] + step, n - r))
        positions.append(axis)
    total, weight = 0, 0
    for start in itertools.product(*positions):
        window = (slice(None), slice(None), *(slice(s, s + r) for s, r in zip(start, roi, strict=True)))
        g = torch.ones(roi, dtype=torch.float64)
        for p in itertools.product(*map(range, roi)):
            d2 = sum(((i - (r - 1) / 2) / (sigma * r)) ** 2 for i, r in zip(p, roi, strict=True))
            g[p] = max(np.exp(-d2 / 2), 1e-3) if gaussian else 1
        y = torch.zeros(len(x), 3, *x.shape[2:], dtype=torch.float64)
        y[window] = tilt(x[window].double()) * g
        w = torch.zeros(x.shape[2:], dtype=torch.float64)
        w[window[2 : 2 + rank]] = g
        total, weight = total + y, weight + w
    return total / weight


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize(
    "rank, roi, overlap",
    [
        (1, (4,), (0.25,)),
        (1, (11,), (0.5,)),
        (2, (4, 3), (0.25, 0.5)),
        (2, (1, 7), (0.0, 0.9)),
        (3, (4, 5, 3), (0.5, 0.25, 0.6)),
    ],
)
def test_numbers(rank, roi, overlap, gaussian):
    x = image(rank)
    mode = "gaussian" if gaussian else "constant"
    y = sliding_window_inference(x, roi, 3, tilt, overlap, mode)
    torch.testing.assert_close(y.double(), reference(x, roi, overlap, gaussian), rtol=1e-5, atol=1e-4)
    assert y.dtype == torch.float32
    for settings in [{"buffer_steps": 1}, {"buffer_steps": 2, "buffer_dim": 0}, {"sw_batch_size": 100}]:
        again = sliding_window_inference(
            x, roi, **{"sw_batch_size": 1, **settings}, predictor=tilt, overlap=overlap, mode=mode
        )
        torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("roi", [4, 40, None, 0, -1, "mixed"])
@pytest.mark.parametrize("padding_mode", ["constant", "replicate"])
def test_identity_returns_the_image(rank, roi, padding_mode):
    x = image(rank, torch.float64)
    roi = [None, 4, 40][:rank] if roi == "mixed" else roi
    y = sliding_window_inference(x, roi, 2, lambda w: w, mode="gaussian", padding_mode=padding_mode)
    torch.testing.assert_close(y, x, rtol=1e-14, atol=1e-14)


def test_integers_are_exact():
    """Constant weights and small integers: every bit has to be right."""
    x = torch.arange(2 * 9 * 8.0).reshape(1, 2, 9, 8)
    assert torch.equal(sliding_window_inference(x, 8, 4, lambda w: w, 0.75), x)


def test_positions_and_batches():
    """What the predictor is given, in order: starts 0, 3, 6 and 0, 3 with the last window moved back."""
    x = image(2)
    seen = []

    def predictor(windows, coords, scale, *, shift):
        for window, where in zip(windows, coords, strict=True):
            assert torch.equal(window[None], x[tuple(where)])
        seen.append([(w[0].start, w[2].start, w[3].start) for w in coords])
        return windows * scale + shift

    plain = dict.fromkeys(["sw_device", "device"]) | {"with_coord": True}
    y = sliding_window_inference(x, (4, 4), 5, predictor, **plain, scale=2.0, shift=1.0)
    wanted = [(n, a, b) for n in (0, 1) for a in (0, 3, 6) for b in (0, 3)]
    assert seen == [wanted[:5], wanted[5:10], wanted[10:]]
    torch.testing.assert_close(y, 2 * x + 1)
    seen.clear()
    sliding_window_inference(x, 4, 5, predictor, **plain, buffer_steps=1, scale=1.0, shift=0.0)
    assert sorted(sum(seen, [])) == wanted and [len(s) for s in seen] == [3] * 4
    positional = (0.25, "constant", 0.125, "constant", 0.0, None, None, False, None, None, None, -1, True)
    sliding_window_inference(x, 4, 5, predictor, *positional, 2.0, shift=1.0)


def test_two_windows_blend_by_hand():
    """Roi 4 on 6 voxels, overlap 0.5: windows at 0 and 2 say 0 and 1; voxels 2, 3 are shared."""
    outer, inner = np.exp(-(3**2) / 2), np.exp(-1 / 2)  # sigma 0.5 voxels, 1.5 and 0.5 from the middle

    def answer(windows, coords):
        return torch.stack(
            [torch.full_like(w, float(c[2].start == 2)) for w, c in zip(windows, coords, strict=True)]
        )

    for mode, middle in [
        ("constant", [0.5, 0.5]),
        ("gaussian", [outer / (outer + inner), inner / (outer + inner)]),
    ]:
        y = sliding_window_inference(torch.zeros(1, 1, 6), 4, 2, answer, 0.5, mode, with_coord=True)
        torch.testing.assert_close(y[0, 0], torch.tensor([0, 0, *middle, 1, 1], dtype=torch.float32))


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_padding_is_symmetric_and_cropped(mode):
    x = image(2)
    seen = []

    def predictor(windows):
        seen.append(windows)
        return windows

    y = sliding_window_inference(
        x, (13, 7), 2, predictor, padding_mode=mode, cval=5.0 if mode == "constant" else 0.0
    )
    wanted = F.pad(x, (0, 0, 1, 2), mode=mode, value=5.0 if mode == "constant" else None)
    assert torch.equal(seen[0], wanted)
    assert torch.equal(y, x)


# --- outputs of other kinds ---------------------------------------------------------------------------


def test_outputs_at_their_own_scale():
    x = image(2, torch.float64)[..., :8, :6].repeat_interleave(2, 2).repeat_interleave(2, 3)  # even blocks

    def predictor(w):
        return {
            "same": w,
            "up": F.interpolate(w, scale_factor=3, mode="nearest")[:, :1],
            "down": F.avg_pool2d(w, 2),
        }

    y = sliding_window_inference(x, 8, 3, predictor, overlap=0.5, mode="gaussian")
    assert list(y) == ["same", "up", "down"]
    for name, wanted in predictor(x).items():
        torch.testing.assert_close(y[name], wanted, msg=name)
    small = sliding_window_inference(x[..., :6, :6], 12, 1, predictor)
    assert small["down"].shape[2:] == (2, 2) and small["up"].shape == (2, 1, 18, 18)
    odd = sliding_window_inference(x[..., :10, :7], (13, 9), 1, lambda w: w[..., ::2, ::3])
    assert odd.shape[2:] == (5, 3)  # round(begin * scale) to round(end * scale), as MONAI


def test_windows_that_fall_between_voxels_of_the_output_begin_at_the_one_before():
    """Ten voxels, windows of five at 0, 2, 4, 5, answered by two voxels each: they begin at 0, 0, 1, 2."""

    def answer(windows, coords):
        begin = torch.tensor([float(c[2].start) for c in coords])
        return begin[:, None, None].expand(-1, 1, 2)

    y = sliding_window_inference(torch.zeros(1, 1, 10), 5, 3, answer, 0.5, with_coord=True)
    assert y.tolist() == [[[1.0, 2.0, 4.5, 5.0]]]


@pytest.mark.parametrize(
    "wrap, kind",
    [
        (lambda w: (w, 2 * w), tuple),
        (lambda w: [w, 2 * w], tuple),
        (lambda w: (w,), torch.Tensor),
        (lambda w: {"a": w}, dict),
    ],
)
def test_containers(wrap, kind):
    x = image(2)
    for steps in (None, 1):
        y = sliding_window_inference(x, 4, 3, wrap, buffer_steps=steps)
        assert type(y) is kind
        first = y if kind is torch.Tensor else y["a"] if kind is dict else y[0]
        torch.testing.assert_close(first, x)
        if kind is tuple:
            torch.testing.assert_close(y[1], 2 * x)


def test_dtypes():
    x = image(2)
    half = sliding_window_inference(x.bfloat16(), 4, 3, lambda w: w, 0.75, "gaussian")
    assert torch.equal(half, x.bfloat16())  # summed in float32: not one rounding is lost
    assert sliding_window_inference(x, 4, 3, lambda w: w.double()).dtype == torch.float32
    counts = (x * 10).to(torch.int16)
    assert torch.equal(sliding_window_inference(counts, 4, 3, lambda w: w), counts.float())
    assert sliding_window_inference(counts, 4, 3, lambda w: w.double()).dtype == torch.float64


# --- weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1, 1)])
def test_own_weight_map(lead):
    weights = torch.zeros(4)
    weights[1:3] = 1  # trust the two middle voxels alone
    weights[[0, 3]] = 1e-6

    def answer(windows, coords):
        return torch.stack(
            [torch.full_like(w, float(c[2].start)) for w, c in zip(windows, coords, strict=True)]
        )

    y = sliding_window_inference(
        torch.zeros(1, 1, 6), 4, 2, answer, 0.5, roi_weight_map=weights.reshape(*lead, 4), with_coord=True
    )
    torch.testing.assert_close(y[0, 0], torch.tensor([0, 0, 0, 2, 2, 2.0]), atol=1e-5, rtol=0)


def test_process_fn_changes_outputs_and_weights():
    x = image(2)
    seen = []

    def process(outputs, windows, weights):
        seen.append((type(outputs), outputs[0].shape, windows.shape, weights.shape))
        per_window = windows.abs().sum(1, keepdim=True) + 1  # other weights for every window
        return tuple(3 * y for y in outputs), per_window

    y = sliding_window_inference(x, 4, 5, tilt, process_fn=process)
    assert seen[0] == (tuple, (5, 3, 4, 4), (5, 2, 4, 4), (4, 4))
    top = bottom = 0
    for start in itertools.product((0, 3, 6), (0, 3)):
        where = (..., *(slice(s, s + 4) for s in start))
        weights = torch.zeros(2, 1, 10, 7)
        weights[where] = x[where].abs().sum(1, keepdim=True) + 1
        values = torch.zeros(2, 3, 10, 7)
        values[where] = 3 * tilt(x[where])
        top, bottom = top + weights * values, bottom + weights
    torch.testing.assert_close(y, top / bottom, rtol=1e-5, atol=1e-4)


# --- manners ------------------------------------------------------------------------------------------


def test_a_predictor_may_work_in_place():
    x = image(2)
    before = x.clone()
    sliding_window_inference(x, (10, 7), 1, lambda w: w.mul_(0))
    assert torch.equal(x, before)


def test_gradients_reach_the_parameters():
    x = image(2)
    scale = torch.ones(1, requires_grad=True)
    sliding_window_inference(x, 4, 3, lambda w: w * scale, mode="gaussian").sum().backward()
    torch.testing.assert_close(scale.grad, x.sum()[None], rtol=1e-4, atol=1e-4)


def test_progress_shows_a_bar(capsys):
    pytest.importorskip("tqdm")
    sliding_window_inference(image(2), 4, 3, lambda w: w, progress=True)
    assert "4/4" in capsys.readouterr().err


X = torch.zeros(1, 1, 8, 8)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"inputs": X[0]}, r"roi_size \(4, 4\) has 2 axes.*add a batch or channel axis"),
        ({"inputs": X[:0]}, "at least one voxel"),
        ({"roi_size": (4, 4, 4)}, "has 3 axes"),
        ({"sw_batch_size": 0}, "sw_batch_size must be at least 1"),
        ({"overlap": 1.0}, "at least 0 and below 1"),
        ({"overlap": -0.1}, "at least 0 and below 1"),
        ({"overlap": (0.5, 0.5, 0.5)}, "2 numbers"),
        ({"mode": "linear"}, '"constant" or "gaussian"'),
        ({"sigma_scale": 0.0}, "positive"),
        ({"padding_mode": "zeros"}, "padding_mode must be one of"),
        ({"padding_mode": "reflect", "roi_size": (40, 4)}, "reflect padding cannot add 32 voxels"),
        ({"padding_mode": "circular", "roi_size": (40, 4)}, "circular padding cannot add 32 voxels"),
        ({"roi_weight_map": torch.ones(4, 3)}, r"window's shape \(4, 4\), received \(4, 3\)"),
        ({"roi_weight_map": -torch.ones(4, 4)}, "negative"),
        ({"roi_weight_map": torch.zeros(4, 4)}, "sum to 0"),
        ({"buffer_steps": 1, "buffer_dim": 2}, "buffer_dim must be from -2 to 1"),
        ({"buffer_steps": -1}, "buffer_steps"),
        ({"predictor": lambda w: w.mean((2, 3))}, r"\(B, K, \*spatial\)"),
        ({"predictor": lambda w: w[:1]}, "B = 2"),
        ({"predictor": lambda w: w[:, :0]}, "expected real outputs"),
    ],
)
def test_wrong_arguments(settings, words):
    defaults = {"inputs": X, "roi_size": (4, 4), "sw_batch_size": 2, "predictor": lambda w: w}
    with pytest.raises(ValueError, match=words):
        sliding_window_inference(**(defaults | settings))


@pytest.mark.parametrize("answer", [None, (), "text", [None], {"a": 3}])
def test_a_predictor_that_returns_no_tensor(answer):
    with pytest.raises(TypeError, match="expected a tensor, or a tuple"):
        sliding_window_inference(X, 4, 2, lambda w: answer)


def test_a_predictor_that_changes_its_mind():
    answers = iter([torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4)])
    with pytest.raises(ValueError, match=r"\(B, 1, 4, 4\) at first"):
        sliding_window_inference(X, 4, 2, lambda w: next(answers))
    pairs = iter([(X[..., :4, :4].repeat(2, 1, 1, 1),) * n for n in (1, 2)])
    with pytest.raises(ValueError, match="1 outputs at first, now 2"):
        sliding_window_inference(X, 4, 2, lambda w: next(pairs))


@pytest.mark.parametrize("seed", range(20))
def test_monai_has_the_same_numbers(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monai = pytest.importorskip("monai.inferers.utils", exc_type=ImportError)
        rng = np.random.default_rng(seed)
        rank = seed % 3 + 1
        x = torch.from_numpy(rng.normal(size=(2, 2, *rng.integers(3, 14, rank))))
        roi = rng.integers(2, 12, rank).tolist()
        settings = {"overlap": float(rng.choice([0, 0.25, 0.6])), "mode": ["constant", "gaussian"][seed % 2]}
        theirs = monai.sliding_window_inference(x.clone(), roi, 3, tilt, **settings)
    torch.testing.assert_close(sliding_window_inference(x, roi, 3, tilt, **settings), theirs)


# --- a scan to its labels -----------------------------------------------------------------------------


class Threshold(torch.nn.Module):
    """Class k where the first channel is nearest to k; exact for any window and weights."""

    def __init__(self, classes=3):
        super().__init__()
        self.centres = torch.nn.Parameter(torch.arange(float(classes)))
        self.frozen = torch.nn.BatchNorm3d(1).eval()
        self.modes = set()

    def forward(self, x):
        self.modes.add((self.training, torch.is_grad_enabled(), x.dtype))
        return -((x[:, :1] - self.centres[:, None, None, None]) ** 2)


AFFINE = np.array([[0, 2, 0, -30], [-0.5, 0, 0, 12.5], [0, 0, 4, -7], [0, 0, 0, 1]], float)


@pytest.mark.parametrize("shape", [(9, 12, 10), (2, 9, 12, 10), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.float64])
def test_labels_on_the_volumes_grid(tmp_path, shape, dtype):
    wanted = np.random.default_rng(0).integers(0, 3, shape)
    volume = Volume(wanted.astype(dtype), None, AFFINE)
    labels = predict_labels(
        Threshold(), volume, patch_size=(4, 6, 5), batch_size=3, out=tmp_path / "a.nii.gz"
    )
    truth = wanted[0] if wanted.ndim == 4 else wanted
    assert labels.dtype == np.uint8 and np.array_equal(labels.array, truth)
    assert labels.same_grid(volume, tolerance=0)
    again = read(tmp_path / "a.nii.gz")
    assert np.array_equal(again.array, truth) and np.array_equal(again.affine, AFFINE)


def test_reoriented_and_read_only_volumes():
    values = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.float32)
    values.flags.writeable = False
    volume = Volume(values, None, AFFINE)
    for turned in (volume, volume.reorient("LPI")):
        assert np.array_equal(predict_labels(Threshold(), turned, patch_size=4).array, turned.array)


def test_many_classes():
    volume = Volume(np.array([[[0.0, 299.0, 256.0]]], np.float32), (1, 1, 1))
    labels = predict_labels(Threshold(300), volume, patch_size=None)
    assert labels.dtype == np.uint16 and labels.array.tolist() == [[[0, 299, 256]]]


def test_the_model_runs_in_eval_mode_and_gets_its_modes_back():
    model = Threshold().train()
    model.frozen.eval()
    predict_labels(model, Volume(np.zeros((4, 4, 4), np.uint8), (1, 1, 1)), patch_size=4)
    assert model.modes == {(False, False, torch.float32)}
    assert model.training and not model.frozen.training
    with pytest.raises(RuntimeError):
        predict_labels(torch.nn.Conv3d(2, 2, 1).train(), Volume(np.zeros((4, 4, 4)), (1, 1, 1)), patch_size=4)


def blank(fill=0.0):
    return Volume(np.full((4, 4, 4), fill, np.float32), (1, 1, 1))


@pytest.mark.parametrize(
    "model, volume, error, words",
    [
        (Threshold(), np.zeros((4, 4, 4)), TypeError, "expected a Volume, received ndarray"),
        (Threshold(), blank(np.nan), ValueError, "64 of 64 voxels are NaN"),
        (Threshold(1), blank(), ValueError, "one channel"),
        (lambda x: (x, x), blank(), TypeError, "deep supervision"),
        (lambda x: x[..., ::2], blank(), ValueError, "of the same B, d, h, w"),
        (lambda x: torch.cat([x, x * np.nan], 1), blank(), ValueError, "logits are NaN"),
    ],
)
def test_wrong_models_and_volumes(model, volume, error, words):
    with pytest.raises(error, match=words):
        predict_labels(model, volume, patch_size=4)


@pytest.mark.parametrize("name, words", [("none/a.nii", "folder does not exist"), ("a.png", "ends in .nii")])
def test_a_target_that_cannot_be_written_is_noticed_before_the_work(tmp_path, name, words):
    def model(x):
        raise AssertionError("the work had begun")

    with pytest.raises(VolumeError, match=words):
        predict_labels(model, blank(), patch_size=4, out=tmp_path / name)


def test_max_ram_too_small_says_what_would_do():
    calls = []

    def model(x):
        calls.append(x.shape)
        return torch.cat([x, -x], 1)

    with pytest.raises(ValueError, match="max_ram=([0-9]+) would do"):
        predict_labels(model, blank(), patch_size=2, max_ram=1000)
    assert len(calls) == 3  # the batches that were measured, of 27
    assert predict_labels(model, blank(), patch_size=2, max_ram=1 << 40).shape == (4, 4, 4)


MEASURE = """
import re, numpy as np, torch
from convoxel.inference import predict_labels
from convoxel.inference.machine import peak_memory, restart_peak
from convoxel.volume import Volume
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Conv3d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(16, 8, 1))
volume = Volume(np.ones((96, 128, 128), np.float32), (1, 1, 1))
settings = dict(patch_size=(32, 64, 64), overlap=0.25, batch_size=2, out="{out}")
try:
    predict_labels(model, volume, max_ram=1, **settings)
except ValueError as error:
    need = int(re.search("max_ram=([0-9]+) would", str(error))[1])
restart_peak()
predict_labels(model, volume, **settings)
print(need, peak_memory())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count the peak from the program's start")
def test_max_ram_holds_and_is_not_far_off(tmp_path):
    code = MEASURE.replace("{out}", str(tmp_path / "a.nii.gz"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    need, peak = map(int, re.findall("[0-9]+", run.stdout))
    assert peak <= need <= peak + (96 << 20), (need, peak)


def test_a_scan_on_another_spacing_mirrored_and_averaged():
    """Every option at once against the same computation done whole."""
    rng = np.random.default_rng(1)
    scan = Volume(rng.normal(0, 50, (11, 26, 17)).astype(np.int16), (3.0, 0.8, 1.1))
    nets = [torch.nn.Conv3d(1, 4, 3, padding=1) for _ in range(2)]
    grid = (22, 21, 19)  # of 1.5, 1 and 1 mm
    x = torch.from_numpy(scan.array[None, None].astype(np.float32))
    x = F.interpolate(x, grid, mode="trilinear") / 50
    with torch.no_grad():
        flips = [(), (2,), (4,), (2, 4)]
        mean = sum(net(x.flip(f)).flip(f) for net in nets for f in flips) / 8
        scores = F.interpolate(mean, scan.grid_shape, mode="trilinear")[0]
    best = scores.topk(2, 0).values
    clear = (best[0] - best[1] > 1e-5).numpy()
    labels = predict_labels(
        nets, scan, patch_size=None, spacing=(1.5, 1, 1), normalize=lambda a: a / 50, mirror_axes=(0, 2)
    )
    assert labels.same_grid(scan) and clear.mean() > 0.99
    assert np.array_equal(labels.array[clear], scores.argmax(0).numpy()[clear])


@pytest.mark.parametrize("regions", [None, (1, 2, 3)])
def test_maps_are_written(tmp_path, regions):
    scan = Volume(np.random.default_rng(2).normal(size=(7, 12, 9)).astype(np.float32), None, AFFINE)
    net = torch.nn.Conv3d(1, 3, 3, padding=1)
    paths = {"out": "l.nii.gz", "probabilities": "p.nii.gz", "entropy": "e.nii"}
    labels = predict_labels(net, scan, patch_size=(7, 12, 4), regions=regions, spacing=(4, 1, 1),
                            **{name: tmp_path / file for name, file in paths.items()})  # fmt: skip
    found = {name: read(tmp_path / file) for name, file in paths.items()}
    p, entropy = found["probabilities"].array.astype(float), found["entropy"].array
    assert all(v.same_grid(scan) for v in found.values()) and p.shape == (3, 7, 12, 9)
    wanted = p.argmax(0) if regions is None else ((p > 0.5) * np.array([1, 2, 3])[:, None, None, None]).max(0)
    assert np.array_equal(labels.array, wanted) and np.array_equal(found["out"].array, wanted)
    terms = p * np.log(p) + (0 if regions is None else (1 - p) * np.log(1 - p))
    np.testing.assert_allclose(entropy, -terms.sum(0), rtol=1e-4)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(paths.values())


def test_maps_of_a_part_of_the_scan(tmp_path):
    """A turned view: what lies outside is certain; a block goes to its own place, whatever its shape."""
    scan = Volume(np.zeros((5, 6, 7), np.float32), None, AFFINE)
    logits = np.random.default_rng(0).normal(size=(4, 6, 3, 2)).astype(np.float32)

    def frame(array):
        return array[..., 1:4, :, 2:6].swapaxes(-1, -3)[..., ::-1, :]  # (4, 6, 3), the second backwards

    for regions in (False, True):
        wanted = np.zeros((2, 5, 6, 7), np.float32)
        wanted[0] = not regions
        p = probabilities_of(logits, regions)
        frame(wanted)[...] = np.moveaxis(p, -1, 0)
        with Maps(scan, regions, tmp_path / "p.nii", tmp_path / "e.nii", frame) as maps:
            for z, y in ((slice(0, 1), slice(0, 6)), (slice(1, 4), slice(0, 2)), (slice(1, 4), slice(2, 6))):
                maps.add((z, y, slice(0, 3)), logits[z, y])
            assert maps.held == 4 * 5 * 6 * 7
            if sys.platform == "linux":
                assert str(tmp_path) not in Path("/proc/self/maps").read_text()  # nothing stays mapped
            maps.write()
        assert np.array_equal(read(tmp_path / "p.nii").array, wanted)
        entropy = np.zeros((5, 6, 7), np.float32)
        frame(entropy)[...] = entropy_of(p, regions)
        assert np.array_equal(read(tmp_path / "e.nii").array, entropy)


def test_maps_are_refused_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(VolumeError, match=r"p\.nrrd: expected a name that ends in \.nii or \.nii\.gz"):
        predict_labels(Threshold(), blank(), patch_size=2, probabilities=tmp_path / "p.nrrd")
    usage = type("Usage", (), {"free": 4 * 2 * 64 - 1})
    monkeypatch.setattr("convoxel.inference.maps.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(VolumeError, match=r"probabilities \(2, 4, 4, 4\) take"):
        predict_labels(Threshold(2), blank(), patch_size=2, probabilities=tmp_path / "p.nii")


def test_two_dimensional_networks_and_small_components():
    values = np.zeros((5, 16, 16), np.float32)
    values[1:4, 4:9, 4:9], values[4, 14, 14] = 2, 1
    scan = Volume(values, (1, 1, 1))

    def flat(x):
        assert x.shape[1:] == (1, 8, 8)
        return -((x - torch.arange(3.0)[:, None, None]) ** 2)

    assert np.array_equal(predict_labels(flat, scan, patch_size=(8, 8), batch_size=4).array, values)
    cleaned = predict_labels(flat, scan, patch_size=(8, 8), least_component=2).array
    assert cleaned.sum() == values.sum() - 1 and cleaned[4, 14, 14] == 0


def test_progress_prints_the_forecast_and_the_peak(capsys):
    predict_labels(Threshold(), blank(), patch_size=2, progress=True)
    printed = capsys.readouterr().err
    assert re.search(r"27 windows, about \d+ s of network, peak memory [\d.]+ [MG]B", printed)
    assert re.search(r"peak memory was [\d.]+ [MG]B", printed)


@pytest.mark.parametrize("failing", ["model", "stop"])
def test_interrupted_work_leaves_nothing(tmp_path, failing):
    calls = []

    def model(x):
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt if failing == "stop" else RuntimeError("broken")
        return torch.cat([x, -x], 1)

    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        predict_labels(model, blank(), patch_size=2, out=tmp_path / "a.nii", probabilities=tmp_path / "p.nii")
    assert len(calls) == 10 and not list(tmp_path.iterdir())
