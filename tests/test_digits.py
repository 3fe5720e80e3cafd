"""The classic example of the README: as written, it learns."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
PATH = Path(__file__).parent.parent / "examples" / "digits.py"


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are too small to share: two threads would mostly wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reaches_97_percent_on_images_it_has_not_seen(digits, capsys):
    model, result = digits.main()
    assert sorted(result) == ["accuracy", "loss"]
    assert result["accuracy"] >= 0.97 and result["loss"] < 0.15
    assert model.count_params() == 121_930
    assert list(model.history.history) == ["loss", "accuracy"] and len(model.history.history["loss"]) == 10
    assert "epoch 10/10" in (bar := capsys.readouterr().err) and "accuracy 0.9" in bar

    lines: list[str] = []
    model.summary(print_fn=lines.append)
    rows = [line.split() for line in lines[0].splitlines()]
    assert ["total", "121,930"] in rows
    assert [row[-1] for row in rows if row[1:2] in (["(Conv2d)"], ["(Linear)"])] == [
        "320",
        "18,496",
        "102,464",
        "650",
    ]
    assert "(N, 64, 5, 5)" in lines[0]


def test_data_and_parameters(digits):
    x_train, x_test, y_train, y_test = digits.load_data()
    assert x_train.shape == (1347, 1, 28, 28) and x_test.shape == (450, 1, 28, 28)
    assert x_train.dtype == "float32" and sorted(set(y_test)) == list(range(10))
    assert abs(x_train.mean()) < 1e-4 and abs(x_train.std() - 1) < 1e-4
    model = digits.build_model()
    with torch.no_grad():
        output = model(torch.from_numpy(x_test[:3]))
    torch.testing.assert_close(output.sum(1), torch.ones(3))
    assert model.count_params() == 121_930
