"""A `forward` whose calls wait: the same statements, in which `x = self.norm(x)` and `x = self.act(x)` build a chain.

Networks call their layers one by one; to run convolution, norm and activation as one, somebody has to know that
the one's output goes into the next and nowhere else. In a Sequential that is plain. In other modules it is written
in the source of `forward`, and this file reads it there:

    out = self.norm1(out)           out = call(self.norm1, out)
    out = self.lrelu(out)     ->    out = call(self.lrelu, out)
    self.log(out)                   out = force(out); self.log(out)

`call` and `force` are chain.py's: a chain waits until somebody needs its value. Only a name that the very next
statements overwrite, extend (`+=`) or return may hold one, and nothing but plain names and attributes is evaluated
while it waits, so nobody can see the difference: a statement of any other kind forces the chain first.

What cannot be read with certainty is left as it is, and the report says why: no source, source that is not what
was compiled, decorators, lambdas, generators.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import CellType, CodeType, FunctionType
from typing import Any, cast

from . import chain

HELPERS = {
    "convoxel_call": chain.call,
    "convoxel_force": chain.force,
    "convoxel_add": chain.add,
    "convoxel_beside": chain.beside,
}
SCOPES = (
    ast.Lambda,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Yield,
    ast.YieldFrom,
    ast.Await,
)


class Unreadable(Exception):
    """Why a forward stays as it is."""


@cache
def lazily(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function (self, x, ...) with calls that wait; x may be a chain, and so may the result.

    Raises:
        Unreadable: with the reason, where the source does not tell with certainty what the function does.
    """
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        raise Unreadable("its forward is no plain function")
    tree = _source(function)
    _Deferred(tree).rewrite()
    free = function.__code__.co_freevars
    code = _compiled(tree, function, (*free, *HELPERS))
    cells = dict(zip(free, function.__closure__ or (), strict=True))
    cells |= {name: CellType(value) for name, value in HELPERS.items()}
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__,
                        tuple(cells[name] for name in code.co_freevars))  # fmt: skip
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__ = function.__qualname__
    return made


def _source(function: FunctionType) -> ast.FunctionDef:
    """The function's definition, if what its file says is what runs."""
    code = function.__code__
    try:
        text = "".join(inspect.findsource(function)[0])
        tree, compiled = ast.parse(text), compile(text, code.co_filename, "exec", dont_inherit=True)
    except (OSError, TypeError, SyntaxError, ValueError):
        raise Unreadable("its source cannot be found") from None
    if code not in _codes(compiled):
        raise Unreadable("its source is not what was compiled")
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and (node.name, node.lineno) == (code.co_name, code.co_firstlineno)
    ]
    if len(found) != 1 or found[0].decorator_list:
        raise Unreadable("its forward is no plain function")
    if any(isinstance(node, SCOPES) for s in found[0].body for node in ast.walk(s)):
        raise Unreadable("its forward has a function, a lambda, a generator or a global name inside")
    return found[0]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A code and all inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _compiled(definition: ast.FunctionDef, like: FunctionType, free: Iterable[str]) -> CodeType:
    """The definition's code, `free` being names of a scope around it. A class of the original name is around that:
    Python renames `self.__x` by it."""
    _strip(definition)
    owner = like.__qualname__.rpartition(".")[0].rpartition(".")[2]
    owner = owner if owner.isidentifier() else "_"
    tree: Any = ast.parse(f"class {owner}:\n    def around({', '.join(free)}):\n        pass")
    tree.body[0].body[0].body = [definition]
    code = compile(ast.fix_missing_locations(tree), like.__code__.co_filename, "exec", dont_inherit=True)
    for _ in range(3):  # the class's, the scope's, the function's own
        code = next(c for c in code.co_consts if isinstance(c, CodeType))
    return code


def _strip(definition: ast.FunctionDef) -> None:
    """Without what is evaluated where it is defined: the function's code is all that is taken."""
    every = definition.args
    every.defaults = [ast.Constant(None) for _ in every.defaults]
    every.kw_defaults = [d and ast.Constant(None) for d in every.kw_defaults]
    for a in (*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg):
        if a is not None:
            a.annotation = None
    definition.returns = None


class _Deferred:
    """Rewrites one definition in place. `waiting` is the name that may hold a chain where the walk stands."""

    def __init__(self, definition: ast.FunctionDef) -> None:
        self.definition = definition
        names = definition.args.posonlyargs + definition.args.args
        self.waiting = names[1].arg if len(names) > 1 else None

    def rewrite(self) -> None:
        self.definition.body = self._block(self.definition.body)

    def _block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """The statements, nothing waiting at their end."""
        done: list[ast.stmt] = []
        for s in statements:
            for new in self._statement(s):
                done.append(ast.copy_location(new, s))
        ended = bool(done) and isinstance(done[-1], ast.Return | ast.Raise | ast.Break | ast.Continue)
        return done if ended else [*done, *self._forced()]

    def _forced(self) -> list[ast.stmt]:
        """The statement that makes the waiting name a tensor."""
        name, self.waiting = self.waiting, None
        return [] if name is None else [_assign(name, _helper("force", _load(name)))]

    def _statement(self, s: ast.stmt) -> list[ast.stmt]:
        if isinstance(s, ast.Pass) or isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant):
            return [s]
        if isinstance(s, ast.If):
            return self._if(s)
        if isinstance(s, ast.For | ast.While):
            before = self._forced()
            s.body, s.orelse = self._block(s.body), self._block(s.orelse) if s.orelse else []
            return [*before, s]
        if isinstance(s, ast.Return) and s.value is not None:
            return self._return(s)
        target = _target(s)
        if target and isinstance(s, ast.AugAssign) and target == self.waiting:
            if isinstance(s.op, ast.Add) and _plain(s.value) and not _reads(s.value, target):
                return [_assign(target, _helper("add", _load(target), s.value))]
        elif target and isinstance(s, ast.Assign | ast.AnnAssign) and _chain(s.value):
            moves = self._passes(s.value) and (self.waiting == target or self._read_once())
            before = [] if moves else self._forced()
            self.waiting = target
            return [*before, _assign(target, _call(cast(ast.expr, s.value)))]
        return [*self._forced(), s]

    def _if(self, s: ast.If) -> list[ast.stmt]:
        """A chain may wait while a plain question is asked; what the answer leads to has it forced, unless it only
        sends other names through layers."""
        name = self.waiting
        waits = name is not None and _plain(s.test) and not _reads(s.test, name)
        before = [] if waits else self._forced()
        blocks = []
        for block in (s.body, s.orelse):
            if name is not None and waits and (aside := _aside(block, name)):
                blocks.append(aside)
                continue
            self.waiting = name if waits and block else None
            start = [ast.copy_location(f, block[0]) for f in self._forced()]
            blocks.append([*start, *self._block(block)])
        s.body, s.orelse = blocks
        self.waiting = name if waits else None
        return [*before, s]

    def _return(self, s: ast.Return) -> list[ast.stmt]:
        passes = isinstance(s.value, ast.Name) and s.value.id == self.waiting
        if s.value is not None and _chain(s.value):
            passes = self._passes(s.value)
            s.value = _call(s.value)
        before = self._forced()
        return [s] if passes else [*before, s]

    def _passes(self, value: ast.expr | None) -> bool:
        """Whether the chain call `value` reads the waiting name once, as what the innermost call is given."""
        rest: list[ast.AST] = []
        while isinstance(value, ast.Call) and _chain(value):
            rest += [value.func, *value.args[1:], *value.keywords]
            value = value.args[0]
        if self.waiting is None:
            return True
        alone = isinstance(value, ast.Name) and value.id == self.waiting
        return alone and not any(_reads(node, self.waiting) for node in rest)

    def _read_once(self) -> bool:
        """Whether one place in the whole definition reads the waiting name: nobody asks for it after that."""
        name, reads = self.waiting, 0
        for node in ast.walk(self.definition):
            changed = node.target if isinstance(node, ast.AugAssign) else None
            for n in (node, changed):
                loads = n is changed or isinstance(getattr(n, "ctx", None), ast.Load)
                reads += isinstance(n, ast.Name) and n.id == name and loads
        return reads == 1


def _target(s: ast.stmt) -> str | None:
    """The one plain name that a statement assigns."""
    targets = s.targets if isinstance(s, ast.Assign) else [getattr(s, "target", None)]
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


def _chain(value: ast.expr | None) -> bool:
    """Whether this is a call f(x, ...) in which nothing but x takes more than reading names."""
    return (
        isinstance(value, ast.Call)
        and bool(value.args)
        and not isinstance(value.args[0], ast.Starred)
        and all(_plain(node) for node in (value.func, *value.args[1:], *(k.value for k in value.keywords)))
    )


def _aside(block: list[ast.stmt], waiting: str) -> list[ast.stmt]:
    """The statements beside the waiting name; none where one of them is more than a call whose result goes to another
    name."""
    done: list[ast.stmt] = []
    for s in block:
        target, value = _target(s), s.value if isinstance(s, ast.Assign | ast.AnnAssign) else None
        if target in (None, waiting) or not isinstance(value, ast.Call) or not _chain(value):
            return []
        if not _plain(value.args[0]) or _reads(value, waiting):
            return []
        made = _helper("beside", _load(waiting), value.func, *value.args)
        made.keywords = value.keywords
        done.append(ast.copy_location(_assign(cast(str, target), ast.copy_location(made, s)), s))
    return done


def _plain(node: ast.expr) -> bool:
    """Whether evaluating this only reads names, attributes, items and constants, or asks `hasattr` and `is`."""
    allowed = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Tuple, ast.UnaryOp, ast.BinOp, ast.BoolOp,
               ast.Compare, ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)  # fmt: skip
    asked = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
    parts = node.args if asked and isinstance(node, ast.Call) else [node]
    return all(isinstance(n, allowed) for part in parts for n in ast.walk(part))


def _reads(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def _call(value: ast.expr) -> ast.expr:
    """f(g(x), ...) as call(f, call(g, x), ...)."""
    if not isinstance(value, ast.Call) or not _chain(value):
        return value
    made = _helper("call", value.func, _call(value.args[0]), *value.args[1:])
    made.keywords = value.keywords
    return ast.copy_location(made, value)


def _helper(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(f"convoxel_{name}", ast.Load()), [*arguments], [])


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _assign(name: str, value: ast.expr) -> ast.Assign:
    return ast.Assign([ast.Name(name, ast.Store())], value)
