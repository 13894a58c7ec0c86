"""Whether a Python file is a plugin of nbdkit, found out without running it.

A plugin runs as `__main__` and imports a module that exists for plugins only, so a file is judged by its text.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

_PREAD_ARGUMENTS = (3, 4)
"""`pread(h, count, offset)` of API version 1, `pread(h, buf, offset, flags)` of version 2."""


def is_plugin(path: Path) -> bool:
    """Whether the file imports `nbdkit`, sets `API_VERSION`, names nbdkit in its first line, or has its functions.

    A file that imports ublkpool, or whose `get_size` takes no argument, is a backend of ublkpool's own.  False for a
    file that is missing or is not Python: the caller says what is wrong with it.
    """
    try:
        source = path.read_bytes()
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return False
    imported = set(_imported(tree))
    if "ublkpool" in imported:
        return False
    if "nbdkit" in imported or _is_nbdkit_script(source):
        return True
    arguments = {each.name: len(each.args.args) for each in tree.body if isinstance(each, ast.FunctionDef)}
    if "API_VERSION" in _names(tree):
        return arguments.get("get_size") != 0
    return arguments.get("get_size") == 1 and arguments.get("pread") in _PREAD_ARGUMENTS


def _is_nbdkit_script(source: bytes) -> bool:
    first = source.partition(b"\n")[0]
    return first.startswith(b"#!") and b"nbdkit" in first


def _imported(tree: ast.Module) -> Iterator[str]:
    """The first component of each module that is imported anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name.partition(".")[0] for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _names(tree: ast.Module) -> Iterator[str]:
    """The names that the file's top level assigns or imports."""
    for node in tree.body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.ImportFrom):
            yield from (each.asname or each.name for each in node.names)
        yield from (each.id for each in targets if isinstance(each, ast.Name))
