"""What is set for the whole process, the machine underneath, and what survives copies, threads and forks."""

import ast
import re
from pathlib import Path

import convoxel
from convoxel import _C


def test_the_stub_has_every_bound_name_and_argument() -> None:
    stub = Path(convoxel.__file__).with_name("_C.pyi")
    declared = {
        node.name: [a.arg for a in node.args.args]
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    bound = {}
    for name in dir(_C):
        if not name.startswith("_"):
            signature = (getattr(_C, name).__doc__ or "").split("->")[0]
            bound[name] = re.findall(r"(\w+): ", signature)
    assert declared == bound
