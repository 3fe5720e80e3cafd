"""MONAI's training with the one line added: it runs, learns the same and returns the same kind of things."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("monai")
pytest.importorskip("ignite")
PATH = Path(__file__).parent.parent / "examples" / "monai_training.py"


@pytest.mark.filterwarnings("ignore")  # MONAI's and ignite's own
def test_before_and_after_end_in_the_same_place(capsys):
    spec = importlib.util.spec_from_file_location("monai_training", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PATCH, module.SCAN = 32, 40
    before, after = module.main(iterations=12, scans=2)
    assert before.dice > 0.3 and abs(before.dice - after.dice) < 0.05
    assert min(before.step, after.step, before.scan, after.scan) > 0
    assert "s an iteration" in capsys.readouterr().out
