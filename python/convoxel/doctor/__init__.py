"""Looks a scan or a dataset over before hours are lost: what is wrong or doubtful, where, and the remedy.

`examine` here; every fault by name (`catalogue`), files (`scans`, `labels`), folders (`dataset`), a case
(`cases`), all cases (`cohort`), the command (`report`). User page: docs/doctor.md.
"""

from __future__ import annotations

from .catalogue import CATALOGUE, Finding
from .examine import Examination, examine, look_over
from .report import add_arguments, run_command

__all__ = ["CATALOGUE", "Examination", "Finding", "add_arguments", "examine", "look_over", "run_command"]
