"""A short run of tests/campaigns/mutate.py; the long one has a command of its own."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from convoxel.volume import Volume, write

pytest.importorskip("nibabel")
pytest.importorskip("pydicom")
sys.path.insert(0, str(Path(__file__).parent / "campaigns"))

import mutate  # noqa: E402


def test_damaged_files_are_refused_or_read(capsys):
    assert mutate.mutations(100, seed=4) == []
    total = capsys.readouterr().out.splitlines()[-2]
    assert total.startswith("all, seed 4") and 40 < int(total.split(", ")[-1].split()[0]) < 95, total


def test_what_nibabel_and_pydicom_ship(capsys):
    assert mutate.shipped_files(renamed=False) == []
    counts = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert int(counts["nibabel: sound, volume"]) > 7 and int(counts["pydicom: sound, volume"]) > 10


def test_the_campaign_notices(tmp_path):
    """A child that dies, one that does not answer, one that takes memory, one that raises."""
    assert mutate.fault({"outcome": "refused", "faults": "", "taken": 1 << 20}) == ""
    assert "MiB" in mutate.fault({"outcome": "refused", "faults": "", "taken": 1 << 30})
    assert mutate.fault({"outcome": "volume", "faults": "", "taken": 1 << 30, "voxels": 1 << 30}) == ""
    write(Volume(np.ones((32, 1000, 1000), np.uint8), (1, 1, 1)), tmp_path / "large.mha")
    reader = mutate.Reader(60)
    try:
        answer = reader(tmp_path / "large.mha")
        assert answer["outcome"] == "volume" and 30 << 20 < answer["taken"] < 48 << 20, answer
        answer = reader(tmp_path / "nul\0.nii")
        assert answer["outcome"] == "refused", answer
        assert reader.child is not None
        reader.child.kill()
        assert reader(tmp_path / "a.nii")["outcome"] == "crashed"
        assert reader(tmp_path / "a.nii")["outcome"] == "refused"
        assert reader.child is not None
        reader.child.send_signal(signal.SIGSTOP)
        reader.seconds = 0.2
        assert reader(tmp_path / "a.nii")["outcome"] == "hung"
    finally:
        reader.close()
