"""`convoxel bench`: what convoxel gains on this machine, over torch and over other engines.

Each kind of work is a module with SUMMARY, `add_arguments` and `run`; `convoxel bench` alone is `bench layers hot`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from . import accuracy, compare, layers, network, scaling, targets

WORKS: dict[str, Any] = {
    "layers": layers,
    "network": network,
    "accuracy": accuracy,
    "scaling": scaling,
    "compare": compare,
    "targets": targets,
}


def add_arguments(parser: argparse.ArgumentParser, parents: Sequence[argparse.ArgumentParser] = ()) -> None:
    """`parents` hold what every command takes."""
    kinds = parser.add_subparsers(dest="work", metavar="WORK", required=True)
    for name, module in WORKS.items():
        summary = module.SUMMARY[0].upper() + module.SUMMARY[1:] + "."
        sub = kinds.add_parser(name, help=module.SUMMARY, description=summary, parents=parents)
        module.add_arguments(sub)


def run(args: argparse.Namespace) -> int:
    return WORKS[args.work].run(args)


def complete(argv: Sequence[str]) -> list[str]:
    """The command line with the word `layers` after `bench`, where it was left out.

    >>> complete(["bench", "--problem", "relu n1 c8 i64x64"])
    ['bench', 'layers', '--problem', 'relu n1 c8 i64x64']
    """
    words = list(argv)
    if "bench" in words[:2]:  # --traceback may come first
        at = words.index("bench") + 1
        at += words[at : at + 1] == ["--traceback"]
        if words[at : at + 1] not in [[name] for name in (*WORKS, "--help", "-h")]:
            words.insert(at, "layers")
    return words
