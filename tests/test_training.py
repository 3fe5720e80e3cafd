"""`convoxel train`: from a folder of scans to a network, through every kind of interruption to the same bits."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from convoxel import cli, importers, volume
from convoxel.phantom import make_dataset
from convoxel.training import loop, run, state
from convoxel.training.cases import find_cases
from convoxel.training.processes import Processes
from convoxel.training.settings import Settings, as_yaml, read_settings, settings_from
from convoxel.training.state import Epoch, Progress
from convoxel.training.structures import Structures

pytest.importorskip("nibabel")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

TINY = {"patch_size": [16, 24, 24], "base_features": 4, "batch_size": 2, "epochs": 2, "steps_per_epoch": 3,
        "validation_patches": 2, "preview_every": 0, "tensorboard": False, "workers": 0}  # fmt: skip


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """Five CT scans of 24 x 40 x 40 voxels, so small that an epoch takes a second."""
    folder = tmp_path_factory.mktemp("data") / "Dataset001_Phantom"
    return make_dataset(folder, cases=5, test_cases=0, shape=(24, 40, 40), spacing=(9.0, 8.0, 8.0))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def begin(phantoms, cache, tmp_path):
    """A run with the tiny settings and some of one's own."""

    def open_run(name="run", **settings):
        return run.open_run(phantoms, tmp_path / name, {**TINY, **settings}, cache=cache)

    return open_run


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model)


def same_bits(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def rows(folder: Path) -> list[dict[str, str]]:
    """The log without what depends on the clock."""
    with (folder / "log.csv").open() as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "seconds" not in k and k != "waited"} for row in found]


class After:
    """Asks to stop after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def difference(a: Path, b: Path) -> float:
    """Relative, of all weights together."""
    ours, theirs = weights(a), weights(b)
    apart = sum(float((ours[key] - theirs[key]).square().sum()) for key in ours)
    return (apart / sum(float(t.square().sum()) for t in theirs.values())) ** 0.5


# -- settings ----------------------------------------------------------------------------------------------


def test_settings_go_through_yaml(tmp_path):
    chosen = Settings(patch_size=(8, 16, 16), learning_rate=1e-4, precision="bfloat16", patience=7)
    path = tmp_path / "s.yaml"
    path.write_text(as_yaml(chosen.to_json()))
    assert settings_from(read_settings(path), str(path)) == chosen
    path.write_text("learning_rate: 1e-4\nclip: null\nepochs: 3\n")  # a word to YAML 1.1
    assert settings_from(read_settings(path), str(path)) == Settings(learning_rate=1e-4, clip=None, epochs=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", "no setting 'epoch'; there are rank, network"),
        ("epochs: many", "epochs: expected int, received 'many'"),
        ("epochs: 0", "epochs: expected at least 1, received 0"),
        ("patch_size: [16, 16]", "patch_size: expected 3 numbers above 0"),
        ("patch_size: 16", "patch_size: expected a list of whole numbers | None, received 16"),
        ("optimizer: adam", "optimizer: expected one of sgd, adamw, received 'adam'"),
        ("mirror: 1", "mirror: expected bool, received 1"),
        ("foreground: 2", "foreground is a share from 0 to 1"),
        ("memory: lots", "memory='lots': expected bytes"),
        ("- 3", "expected lines such as"),
        ("a: [", "no YAML"),
    ],
)
def test_wrong_settings_are_refused_in_words(text, words, phantoms, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(text)
    argv = ["train", str(phantoms), "-o", str(tmp_path / "run"), "--settings", str(tmp_path / "s.yaml")]
    assert cli.main(argv) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_setting_has_a_flag():
    parser = cli.build_parser()
    argv = "--no-mirror --elastic --patch-size 8 16 16 --memory 2GB --clip 3 --rank 3 --patience 7 --spacing 2 1 1"
    args = parser.parse_args(["train", "D", "-o", "O", *argv.split()])
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    assert {name: value for name, value in given.items() if value is not None} == {
        "mirror": False, "elastic": True, "patch_size": [8, 16, 16], "memory": "2GB", "clip": 3.0, "rank": 3,
        "patience": 7, "spacing": [2.0, 1.0, 1.0],
    }  # fmt: skip


# -- a run -------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(begin, tmp_path):
    """Trained, judged on the held-out scan, and ready to predict."""
    made = begin(preview_every=1, tensorboard=True)
    said: list[str] = []
    model = run.train(made, "0", say=said.append)
    result = run.judge(made, "0")
    folder = made.fold_folder("0")
    assert {path.name for path in folder.iterdir()} == {
        "best.safetensors", "curve.png", "events", "log.csv", "model.safetensors", "previews", "state.safetensors",
        "validation",
    }  # fmt: skip
    assert len(rows(folder)) == 2 and "epoch 2/2: loss" in said[-1] and "liver" in said[-1]
    assert sorted(path.name for path in (folder / "previews").iterdir()) == [
        "epoch_0001.png",
        "epoch_0002.png",
    ]
    held_out = made.cases("0")[1]
    assert [case.name for case in result.cases] == held_out
    for name in held_out:
        labels = volume.read(folder / "validation" / f"{name}.nii.gz")
        truth = volume.read(made.dataset.folder / "labelsTr" / f"{name}.nii.gz")
        assert labels.same_grid(truth, 0.01)
    scan = volume.read(made.dataset.cases[0].images[0])
    one, whole = importers.load(model), importers.load(made.folder)
    assert np.array_equal(one.predict([scan], mirror=False).array, whole.predict([scan], mirror=False).array)
    assert yaml.safe_load((made.folder / "settings.yaml").read_text())["steps_per_epoch"] == 3
    assert json.loads((made.folder / "plan.json").read_text())["plan"]["reasons"]


@pytest.mark.parametrize("steps", range(7))
def test_stopped_after_any_step_it_goes_on_with_the_same_bits(steps, begin, straight):
    made = begin(f"stopped{steps}")
    if steps < 6:
        with pytest.raises(loop.Stopped):
            run.train(made, "0", stop=After(steps))
    model = run.train(begin(f"stopped{steps}"), "0")
    assert same_bits(model, straight) and rows(model.parent) == rows(straight.parent)
    assert same_bits(model.with_name("best.safetensors"), straight.with_name("best.safetensors"))


@pytest.fixture(scope="module")
def straight(phantoms, cache, tmp_path_factory) -> Path:
    """The model of a run that nothing interrupted."""
    return run.train(run.open_run(phantoms, tmp_path_factory.mktemp("straight"), TINY, cache=cache), "0")


@pytest.mark.parametrize("change", [{"workers": 2}, {"checkpointing": True}])
def test_what_may_change_does_not_change_the_bits(change, begin, straight):
    with pytest.raises(loop.Stopped):
        run.train(begin(), "0", stop=After(2))
    assert same_bits(run.train(begin(**change), "0"), straight)


def test_the_seed_decides(begin, straight):
    assert difference(run.train(begin(seed=1), "0"), straight) > 1e-3


@pytest.mark.parametrize("change", [{"epochs": 3}, {"learning_rate": 0.02}, {"patch_size": [16, 16, 16]}])
def test_another_run_does_not_go_on_here(change, begin):
    """Once it is begun: until then it is planned as often as one likes."""
    begin()
    begin(**change)
    begin().fold_folder("0").mkdir()
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"holds a run with {name} .* not .*give another -o"):
        begin(**change)


def test_other_cases_do_not_go_on_here(begin, phantoms, tmp_path, cache):
    begin().fold_folder("0").mkdir()
    other = make_dataset(tmp_path / "Dataset002_Other", cases=4, test_cases=0, shape=(24, 40, 40))
    with pytest.raises(ValueError, match=r"holds a run on other cases \(5, now 4\)"):
        run.open_run(other, tmp_path / "run", TINY, cache=cache)


@pytest.mark.parametrize("fold", ["7", "x"])
def test_folds_that_are_not_there(fold, begin):
    with pytest.raises(ValueError, match="there is no fold .*; expected 0 to 4, or all"):
        run.train(begin(), fold)


def test_a_full_disk_loses_nothing(begin, straight, monkeypatch):
    made = begin()
    with pytest.raises(loop.Stopped):
        run.train(made, "0", stop=After(2))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("convoxel.checkpoint.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run.train(made, "0")
    assert not list(made.fold_folder("0").glob(".*"))
    assert same_bits(run.train(made, "0"), straight)


def test_killed_between_state_and_log_the_log_is_made_up_for(begin, straight):
    made = begin(tensorboard=True)
    run.train(made, "0")
    folder = made.fold_folder("0")
    for name in ("log.csv", "curve.png"):
        (folder / name).unlink()
    run.train(made, "0")
    assert rows(folder) == rows(straight.parent) and (folder / "curve.png").is_file()


def test_a_damaged_state_is_named(begin):
    made = begin()
    with pytest.raises(loop.Stopped):
        run.train(made, "0", stop=After(2))
    path = made.fold_folder("0") / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="state.safetensors is no whole safetensors checkpoint"):
        run.train(made, "0")


def test_the_state_keeps_everything(tmp_path):
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    epoch = Epoch(1, 3, 0.1 + 0.2, (None, 1 / 3), 1 / 3, 1 / 3, 0.01, 1.0, 0.3, 0.0)
    progress = Progress(step=4, epochs=[epoch], loss_sum=0.7, best=1 / 3, best_epoch=1, seconds=2.5)
    state.save(tmp_path / "s.safetensors", network, optimizer, progress, {"fold": [1]})
    other = torch.nn.Linear(2, 2)
    fresh = torch.optim.AdamW(other.parameters(), fused=True)
    assert state.load(tmp_path / "s.safetensors", other, fresh) == (progress, {"fold": [1]})
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(value, fresh.state[b][key]) for key, value in optimizer.state[a].items())


# -- learning ----------------------------------------------------------------------------------------------


def test_it_learns(begin):
    """The liver of scans that were not trained on, in less than a hundred steps."""
    made = begin(epochs=3, steps_per_epoch=30, base_features=8, validation_patches=8, optimizer="adamw",
                 learning_rate=3e-3, augment=False)  # fmt: skip
    run.train(made, "0")
    log = rows(made.fold_folder("0"))
    assert float(log[-1]["loss"]) < 0.8 * float(log[0]["loss"])
    assert float(log[-1]["dice liver"]) > 0.7


def test_what_diverges_stops_with_its_batch(begin, capsys):
    made = begin(learning_rate=1e30)
    with pytest.raises(
        FloatingPointError, match=r"step \d: the loss is .* patches were from phantom_\d+, phantom_\d+"
    ):
        run.train(made, "0")
    path = next(made.fold_folder("0").glob("not_finite_step_*.npz"))
    batch = np.load(path)
    assert batch["x"].shape == (2, 1, 16, 24, 24) and batch["y"].shape == (2, 16, 24, 24)
    assert set(batch["cases"]) <= set(made.dataset.names)


def test_patience_ends_it(begin):
    made = begin(learning_rate=1e-12, epochs=9, patience=2, steps_per_epoch=1)
    run.train(made, "0")
    log = rows(made.fold_folder("0"))
    best = max(range(len(log)), key=lambda i: (float(log[i]["running_dice"]), -i))
    assert len(log) == best + 1 + 2 < 9
    assert made.fold_folder("0").joinpath("model.safetensors").is_file()


def test_parts_of_a_batch_are_the_batch(begin):
    whole, parts = (
        begin("whole", epochs=1, steps_per_epoch=1),
        begin("parts", epochs=1, steps_per_epoch=1, accumulate=2),
    )
    assert difference(run.train(parts, "0"), run.train(whole, "0")) < 1e-6


def test_torchs_kernels_learn_the_same(begin, straight):
    assert difference(run.train(begin("torch", engine="torch"), "0"), straight) < 1e-3


def test_a_batch_that_cannot_be_shared(begin):
    with pytest.raises(ValueError, match=r"a batch of 2 cannot be shared by 3 process\(es\) in 1 part"):
        run.train(begin(), "0", group=Processes(0, 3))
    with pytest.raises(ValueError, match="2 patches cannot be computed in 3 equal parts"):
        begin("parts", accumulate=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"network": "residual"},
        {"rank": 2, "patch_size": [32, 32]},
        {"precision": "bfloat16", "batch_dice": True},
        {"optimizer": "adamw", "deep_supervision": False, "mirror": False, "elastic": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_kinds_of_training(settings, begin):
    made = begin(epochs=1, steps_per_epoch=2, **settings)
    run.train(made, "0")
    assert run.judge(made, "0").cases


@pytest.mark.parametrize("kind", ["regions", "ignore", "two channels", "the Decathlon's folders"])
def test_kinds_of_datasets(kind, tmp_path):
    folder, names = tmp_path / "Dataset003_Other", ("liver", "spleen", "kidneys", "vessels", "lesion")
    make_dataset(folder, cases=3, test_cases=0, shape=(24, 40, 40), spacing=(9.0, 8.0, 8.0),
                 modalities=("T1", "T2") if kind == "two channels" else ("CT",),
                 format="msd" if kind == "the Decathlon's folders" else "nnunet")  # fmt: skip
    about = json.loads((folder / "dataset.json").read_text())
    if kind == "regions":
        names = ("liver", "others", "lesion")
        about |= {"labels": {"background": 0, "liver": [1, 5], "others": [2, 3, 4], "lesion": 5},
                  "regions_class_order": [1, 2, 5]}  # fmt: skip
    elif kind == "ignore":
        names = ("liver", "spleen", "kidneys", "vessels")
        about["labels"] = {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3, "vessels": 4, "ignore": 5}
    (folder / "dataset.json").write_text(json.dumps(about))
    made = run.open_run(folder, tmp_path / "run", {**TINY, "epochs": 1, "cross_validation": 3})
    run.train(made, "0")
    assert made.structures.names == names and set(run.judge(made, "0").summary) >= set(names)


def test_too_few_cases_for_the_folds(begin):
    with pytest.raises(
        ValueError, match="5 cases cannot make 9 folds.*set cross_validation, or .* --folds all"
    ):
        begin(cross_validation=9).cases("0")


def test_all_cases(begin):
    made = begin(epochs=1, steps_per_epoch=1)
    assert made.cases("all") == (made.dataset.names, [])
    assert run.train(made, "all").is_file() and run.judge(made, "all") is None


def test_structures(phantoms):
    found = Structures.of(find_cases(phantoms))
    assert found.names == ("liver", "spleen", "kidneys", "vessels", "lesion") and found.heads == 6
    labels = torch.tensor([[0, 1], [5, 2]])
    logits = torch.nn.functional.one_hot(labels, 6).movedim(-1, 0).float()
    assert torch.equal(found.masks(labels), found.predicted(logits))
    assert found.masks(labels)[0].tolist() == [[False, True], [False, False]]


# -- the command -------------------------------------------------------------------------------------------


def command(phantoms: Path, out: Path, cache: Path, *flags: str, processes: int = 0) -> list[str]:
    (out.parent / "tiny.yaml").write_text(as_yaml(TINY))
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    )
    return [sys.executable, *launcher, "-m", "convoxel", "train", str(phantoms), "-o", str(out), "--cache", str(cache),
            "--settings", str(out.parent / "tiny.yaml"), *flags]  # fmt: skip


def test_the_command(phantoms, cache, tmp_path, capsys):
    out = tmp_path / "run"
    argv = command(phantoms, out, cache)[3:]
    assert cli.main([*argv, "--plan-only", "--epochs", "7"]) == 0 and not (out / "fold_0").exists()
    assert "7 epochs of 3 steps" in capsys.readouterr().out
    assert cli.main([*argv, "--plan-only"]) == 0
    assert "2 epochs of 3 steps" in capsys.readouterr().out
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert "epoch 2/2" in text and "held-out scans" in text and "convoxel predict" in text
    assert cli.main(["train", str(phantoms), "-o", str(out), "--cache", str(cache)]) == 0
    assert "trained already, 2 epochs" in capsys.readouterr().out


def test_killed_and_interrupted_it_goes_on(phantoms, cache, tmp_path, straight):
    """SIGKILL once it has a state, SIGINT later, then to the end: what an uninterrupted run becomes.

    Not to the last bit: about one start of a process in a hundred differs there, on a busy machine (the campaign
    kill.py counts them, benchmarks/results/train.md says what is known).
    """
    out = tmp_path / "run"
    argv = command(phantoms, out, cache)
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        log = tmp_path / f"log{number}"
        with log.open("w") as file:
            process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT)
            wanted = "epoch 1/2" if number == signal.SIGKILL else "goes on at step"
            limit = time.monotonic() + 120
            while wanted not in log.read_text() and process.poll() is None and time.monotonic() < limit:
                time.sleep(0.005)
            process.send_signal(number)
            assert process.wait(60) == code, log.read_text()
    assert subprocess.run(argv, capture_output=True).returncode == 0
    assert difference(out / "fold_0" / "model.safetensors", straight) < 1e-5


def test_two_processes_are_one_with_the_joined_batch(phantoms, cache, tmp_path, straight):
    out = tmp_path / "run"
    argv = command(phantoms, out, cache, processes=2)
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert difference(out / "fold_0" / "model.safetensors", straight) < 1e-5
