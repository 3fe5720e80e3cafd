"""What an evaluation found: scores of every case, summaries, comparisons; as CSV, JSON and a table."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cases import Case
from .scoring import LESIONS, METRICS, PERFECT, Scores, absent, status
from .statistics import RESAMPLES, Comparison, Summary, compare, summarize

ALL = "all"
RULE = (
    "missed or false: Dice, IoU, surface Dice, precision, recall 0, HD95 the diagonal of the field of view; "
    "in neither truth nor prediction: no score, not counted; no prediction file: all of it missed"
)
_LESS_IS_BETTER = ("hd95_mm", "volume_error_ml", "volume_error_percent", "lesions_missed", "lesions_false")


@dataclass(frozen=True)
class Result:
    """Scores of one model, and of a second on the same cases if there is one.

    scores: case -> structure -> metric -> value, None where there is none. values: the label values of each
    structure. tolerances: of surface_dice, in mm. dataset: the dataset.json that was read. unmatched:
    predictions without a truth, not scored. other: the second model.
    """

    cases: list[Case]
    scores: dict[str, dict[str, Scores]]
    values: dict[str, tuple[int, ...]]
    tolerances: dict[str, float]
    dataset: Path | None = None
    ignore: int | None = None
    unmatched: list[str] = field(default_factory=list)
    seed: int = 0
    other: Result | None = None

    @property
    def missing(self) -> list[str]:
        """Cases without a prediction's file, scored as if nothing had been predicted."""
        return [case.name for case in self.cases if case.prediction is None]

    @property
    def metrics(self) -> tuple[str, ...]:
        first = next(iter(next(iter(self.scores.values())).values()))
        return METRICS + (LESIONS if LESIONS[0] in first else ())

    def counts(self, structure: str) -> Counter[str]:
        """How many cases are "scored" (both there), "missed", "false" and "absent"."""
        return Counter(status(found[structure]) for found in self.scores.values())

    def array(self, metric: str) -> NDArray[np.float64]:
        """(cases, structures), nan where there is no score."""
        return np.array(
            [[_number(found[name][metric]) for name in self.values] for found in self.scores.values()]
        )

    @cached_property
    def summary(self) -> dict[str, dict[str, Summary]]:
        """structure -> metric -> mean, median and interval; "all": over the structures."""
        found: dict[str, dict[str, Summary]] = {name: {} for name in (*self.values, ALL)}
        for metric in self.metrics:
            each, overall = summarize(self.array(metric), self.seed)
            for name, summary in zip(found, (*each, overall), strict=True):
                found[name][metric] = summary
        return found

    @cached_property
    def comparison(self) -> dict[str, dict[str, Comparison]]:
        """structure -> metric -> this model minus the other; ValueError without another.

        Volume errors are compared by their size. Where only one model has a score, because the structure is
        not there and the other rightly predicted none, the other has the best score: nobody's fault is dropped.
        """
        if self.other is None:
            raise ValueError("comparison: there is no second model; evaluate(..., against=FOLDER)")
        found: dict[str, dict[str, Comparison]] = {name: {} for name in self.values}
        for metric in (m for m in self.metrics if not m.endswith("ed_ml") and m != "truth_ml"):
            differences = self._fair(self.other, metric) - self.other._fair(self, metric)
            several = compare(differences, metric not in _LESS_IS_BETTER, self.seed)
            for name, comparison in zip(found, several, strict=True):
                found[name][metric] = comparison
        return found

    def _fair(self, rival: Result, metric: str) -> NDArray[np.float64]:
        """Values to compare, (cases, structures)."""
        values = self.array(metric)
        for i, j in np.argwhere(np.isnan(values) & ~np.isnan(rival.array(metric))):
            case, name = self.cases[i].name, list(self.values)[j]
            if status(self.scores[case][name]) == "absent":
                values[i, j] = PERFECT.get(metric, 0.0)
        return np.abs(values) if metric.startswith("volume_error") else values

    def worst(self, number: int) -> list[tuple[Case, str]]:
        """The cases and structures of lowest Dice, lowest first; those without a score are left out."""
        by_name = {case.name: case for case in self.cases}
        dice = [
            (found["dice"], case, name)
            for case, structures in self.scores.items()
            for name, found in structures.items()
            if found["dice"] is not None
        ]
        return [(by_name[case], name) for _, case, name in sorted(dice)[:number]]

    def to_csv(self) -> str:
        """Lines of case,label,metric,value; n/a where there is no score."""
        stream = io.StringIO()
        lines = csv.writer(stream, lineterminator="\n")
        lines.writerow(("case", "label", "metric", "value"))
        for case, structures in self.scores.items():
            for name, found in structures.items():
                for metric, value in found.items():
                    lines.writerow((case, name, metric, "n/a" if value is None else f"{value:.8g}"))
        return stream.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts and lists."""
        structures = {
            name: {
                "values": list(self.values[name]),
                "tolerance_mm": self.tolerances[name],
                **_counts(self.counts(name)),
                "metrics": {metric: asdict(s) for metric, s in self.summary[name].items()},
            }
            for name in self.values
        }
        content: dict[str, Any] = {
            "rule": RULE,
            "interval": f"95 %, percentile bootstrap of {RESAMPLES} draws of cases, seed {self.seed}",
            "dataset": None if self.dataset is None else str(self.dataset),
            "ignored_value": self.ignore,
            "missing_predictions": self.missing,
            "predictions_without_truth": self.unmatched,
            "structures": structures,
            ALL: {metric: asdict(s) for metric, s in self.summary[ALL].items()},
            "cases": {
                case: {name: {"status": status(f), **f} for name, f in found.items()}
                for case, found in self.scores.items()
            },
        }
        if self.other is not None:
            content["comparison"] = {
                name: {metric: asdict(c) for metric, c in found.items()}
                for name, found in self.comparison.items()
            }
            content["against"] = self.other.to_json()
        return content

    def __str__(self) -> str:
        return "\n".join(table(self))


def completed(scores: dict[str, dict[str, Scores]], names: list[str], lesions: bool) -> dict[str, Any]:
    """The same with every structure in every case: those that were in neither file are absent."""
    return {
        case: {name: found.get(name) or absent(lesions) for name in names} for case, found in scores.items()
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _counts(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in ("scored", "missed", "false", "absent")}


def table(result: Result) -> Iterator[str]:
    """Lines: each structure with its counts, means and 95 % intervals; then the comparison."""
    rows: list[tuple[str, ...]] = [
        ("", "cases", "missed", "false", "n/a", "Dice", "HD95, mm", "surface Dice", "volume, %")
    ]
    for name in result.values:
        c, s = result.counts(name), result.summary[name]
        numbers = c["scored"] + c["missed"] + c["false"], c["missed"], c["false"], c["absent"]
        rows.append((name, *map(str, numbers), *_means(s)))
    if len(result.values) > 1:
        rows.append(("mean", "", "", "", "", *_means(result.summary[ALL])))
    yield from _aligned(rows)
    if LESIONS[0] in result.metrics:
        yield ""
        yield from _aligned([("lesions", "found", "missed", "false"), *_lesions(result)])
    if result.other is not None:
        yield "\nthis model minus the other, the same cases:"
        yield from _aligned(list(_compared(result)))


def _means(summary: dict[str, Summary]) -> Iterator[str]:
    for metric, digits in (("dice", 3), ("hd95_mm", 1), ("surface_dice", 3), ("volume_error_percent", 1)):
        yield _with_interval(summary[metric].mean, summary[metric].interval, digits)


def _with_interval(
    mean: float | None, interval: tuple[float, float] | None, digits: int, sign: str = ""
) -> str:
    if mean is None:
        return "n/a"
    between = (
        "" if interval is None else f" ({interval[0]:{sign}.{digits}f} to {interval[1]:{sign}.{digits}f})"
    )
    return f"{mean:{sign}.{digits}f}{between}"


def _lesions(result: Result) -> Iterator[tuple[str, ...]]:
    for i, name in enumerate(result.values):
        yield name, *(f"{np.nansum(result.array(metric)[:, i]):.0f}" for metric in LESIONS)


def _compared(result: Result) -> Iterator[tuple[str, ...]]:
    yield "", "cases", "Dice", "p", "wins", "losses", "HD95, mm", "surface Dice"
    for name, found in result.comparison.items():
        dice = found["dice"]
        others = ((found["hd95_mm"], 1), (found["surface_dice"], 3))
        yield (
            name,
            str(dice.n),
            _with_interval(dice.difference, dice.interval, 3, "+"),
            "n/a" if dice.p is None else f"{dice.p:.2g}",
            str(dice.wins),
            str(dice.losses),
            *(_with_interval(c.difference, c.interval, digits, "+") for c, digits in others),
        )


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
