"""What is set for the whole process, the machine underneath, and what survives copies, threads and forks."""

import ast
import re
from pathlib import Path

import convoxel
from convoxel import _C


def test_the_stub_has_every_bound_name_and_argument() -> None:
    def arguments(node: ast.stmt) -> list[str]:
        if isinstance(node, ast.ClassDef):  # those of its __init__
            return next(arguments(f) for f in node.body if isinstance(f, ast.FunctionDef))
        return [a.arg for a in node.args.args] if isinstance(node, ast.FunctionDef) else []

    def documented(bound: type | object) -> list[str]:
        text = bound.__init__.__doc__ if isinstance(bound, type) else bound.__doc__
        return re.findall(r"(\w+): ", (text or "").split("->")[0])

    tree = ast.parse(Path(convoxel.__file__).with_name("_C.pyi").read_text())
    declared = {n.name: arguments(n) for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert declared == {n: documented(getattr(_C, n)) for n in dir(_C) if not n.startswith("_")}
