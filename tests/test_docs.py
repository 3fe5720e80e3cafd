"""The worked examples of docs/layers.md, run one after the other (also: python -m doctest docs/layers.md)."""

import doctest
import re
from pathlib import Path

import pytest

import convoxel

PAGE = (Path(__file__).parents[1] / "docs" / "layers.md").read_text()


def run(text: str) -> tuple[doctest.TestResults, str]:
    output: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, {}, "layers.md", "docs/layers.md", 0)
    return doctest.DocTestRunner().run(test, out=output.append), "".join(output)


def test_every_example_gives_what_the_page_says() -> None:
    convoxel.set_strict(True)
    results, output = run(PAGE)
    assert not results.failed, output
    assert results.attempted > 50
    served = {name for name, row in convoxel.stats().items() if row["served"]}
    assert {
        "conv",
        "conv_input_grad",
        "conv_weight_grad",
        "interpolate",
        "interpolate_grad",
        "norm",
        "norm_backward",
        "max_pool",
        "max_pool_input_grad",
        "avg_pool",
        "avg_pool_input_grad",
    } <= served


def test_every_family_has_formulas_for_both_ways_and_an_example() -> None:
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
    assert list(sections) == ["Linear", "Convolution", "Transposed convolution", "Pooling", "Normalisation",
                              "Activation", "Interpolation"]  # fmt: skip
    for name, text in sections.items():
        formulas = "".join(re.findall(r"^```\n(.*?)^```$", text, re.M | re.S))
        assert re.search(r"\by\b.* = ", formulas) and re.search(r"\bdx\b.* = ", formulas), name
        assert ">>> show(x.grad)" in text, name


@pytest.mark.parametrize("right,wrong", [("8.0, 8.0, 13.0", "8.0, 8.0, 7.0"), ("[3.0, 9.0]", "[3.0, 8.0]")])
def test_a_wrong_number_is_noticed(right: str, wrong: str) -> None:
    results, output = run(PAGE.replace(right, wrong))
    assert results.failed == 1 and wrong in output
