"""The command `convoxel doctor`: findings as text for people, and as JSON for programs."""

from __future__ import annotations

import argparse
import errno
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from .catalogue import SEVERITIES, Finding
from .examine import Examination, look_over

_SHOWN = 3  # files per fault, unless all are asked for


def summary(examination: Examination, everything: bool = False) -> Iterator[str]:
    """Lines of text: faults by severity, a few files for each, and the remedy.

    everything: every file rather than the first three of each fault.
    """
    yield examination.subject
    for _, group in groupby(examination.findings, lambda f: (f.severity, f.name)):
        same = list(group)
        yield f"\n{same[0].severity:<9} {same[0].name}" + (f"  ({len(same)} times)" if len(same) > 1 else "")
        shown = same if everything else same[:_SHOWN]
        yield from (f"    {f.path}: {f.found}" for f in shown)
        if len(shown) < len(same):
            yield f"    ... and {len(same) - len(shown)} more (--all lists them)"
        yield f"    -> {same[0].remedy}"
    yield f"\n{_count(examination.findings)} in {examination.files} file{'s' * (examination.files != 1)}"


def _count(findings: list[Finding]) -> str:
    counts = Counter(f.severity for f in findings)
    words = {"error": ("error", "errors"), "doubtful": ("doubtful", "doubtful"), "note": ("note", "notes")}
    return ", ".join(f"{counts[s]} {words[s][counts[s] != 1]}" for s in SEVERITIES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `convoxel doctor`."""
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a scan, a folder of scans, or a dataset's folder"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the findings as JSON")
    parser.add_argument(
        "--all", action="store_true", help="list every file, not the first three of each fault"
    )


def run_command(args: argparse.Namespace) -> int:
    """`convoxel doctor`: 0 when nothing is an error, otherwise 1."""
    if args.json and not Path(args.json).absolute().parent.is_dir():  # now, not after the reading
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist", args.json)
    examinations = []
    for path in args.paths:
        start = time.perf_counter()
        examinations.append(look_over(path, progress=sys.stderr.isatty()))
        print(*summary(examinations[-1], args.all), sep="\n", end=f", {time.perf_counter() - start:.1f} s\n")
    if args.json:
        content = [
            {
                "path": str(path),
                "subject": e.subject,
                "files": e.files,
                "findings": [asdict(f) for f in e.findings],
            }
            for path, e in zip(args.paths, examinations, strict=True)
        ]
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n")
    return int(any(f.severity == "error" for e in examinations for f in e.findings))
