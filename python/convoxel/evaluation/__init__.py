"""How good segmentations are: scores of cases, intervals, two models compared. User page: docs/evaluate.md.

What is missed is never dropped and has the worst score there is (the rule: `scoring`). Needs scipy, nibabel,
and matplotlib for pictures: pip install "convoxel[evaluate]".
"""

from __future__ import annotations

from .command import add_arguments, run_command
from .folders import evaluate
from .picture import worst_cases
from .result import Result
from .scoring import scores
from .statistics import Comparison, Summary

__all__ = [
    "Comparison",
    "Result",
    "Summary",
    "add_arguments",
    "evaluate",
    "run_command",
    "scores",
    "worst_cases",
]
