"""What a module would hold, told by its source without running it: an import might take torch along, or a simulator.

Only what a source rules out for certain is told; where names may come to be in other ways, the answer is None.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Whoever uses one of these may bind names, or find modules, that no statement shows.
EVASIVE = {
    "globals",
    "f_globals",
    "import_module",
    "__import__",
    "locals",
    "vars",
    "exec",
    "setattr",
    "modules",
    "__dict__",
    "__getattr__",
    "__path__",
}
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Names:
    """The names a module binds, and those of them that it defines as functions and classes itself."""

    bound: frozenset[str] = frozenset()
    defined: frozenset[str] = frozenset()


def find_module(module: str) -> ModuleSpec | None:
    """As importlib.util.find_spec, but the packages above it are not imported; None where there is no such file."""
    name, *parts = module.split(".")
    spec = importlib.util.find_spec(name)
    for part in parts:
        name = f"{name}.{part}"
        if spec is None or spec.submodule_search_locations is None:
            return None
        path = list(spec.submodule_search_locations)
        found = (finder.find_spec(name, path) for finder in sys.meta_path)  # those of editable installations too
        spec = next((one for one in found if one is not None), None)
    return spec


def names_of(spec: ModuleSpec) -> Names | None:
    """What the module binds at its top level; None if its source does not tell."""
    if spec.origin is None and spec.submodule_search_locations is not None:
        return Names()  # a folder without __init__.py
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
        top_level = list(_top_level(tree))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # the import says it better
    bound = {name for node in top_level for name in _bound_by(node)}
    for node in ast.walk(tree):
        if not EVASIVE.isdisjoint(_mentioned(node)):
            return None
        if isinstance(node, ast.Global):
            bound.update(node.names)
        elif isinstance(node, ast.NamedExpr):  # in a decorator, a default value or a class's bases it binds here
            bound.add(node.target.id)
    if not bound.isdisjoint(("*", "__getattr__")):
        return None
    return Names(frozenset(bound), frozenset(node.name for node in top_level if isinstance(node, SCOPES)))


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    """Every node outside the bodies of functions and classes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, SCOPES):
            yield from _top_level(child)


def _bound_by(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Name(id=name, ctx=ast.Store()):
            return [name]
        case ast.alias(name=name, asname=asname):
            return [asname or name.split(".")[0]]
        case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
            return [name]
    return []


def _mentioned(node: ast.AST) -> tuple[str, ...]:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return (name,)
        case ast.alias(name=name):
            return (name,)
    return ()
