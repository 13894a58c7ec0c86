"""Every asyncio task of the daemon has an owner, so that no task fails silently.

A task is made by `Background`, `beside`, an `asyncio.TaskGroup`, or inside a call of `owned`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ublkpool

ROOT = Path(ublkpool.__path__[0])
OWNERS = ("daemon/processes/background.py", "daemon/processes/beside.py")
MAKERS = ("create_task", "ensure_future")


def tasks_without_owner(source: str) -> list[int]:
    """The lines that make a task which no group and no `owned` owns."""
    tree = ast.parse(source)
    groups = set(_groups(tree))
    owned = {id(task) for call in _calls(tree, ("owned",)) for task in call.args}
    return [
        call.lineno
        for call in _calls(tree, MAKERS)
        if id(call) not in owned and _receiver(call) not in groups
    ]


def _calls(tree: ast.AST, names: tuple[str, ...]) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in names:
                yield node


def _receiver(call: ast.Call) -> str:
    is_method = isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)
    return call.func.value.id if is_method else ""  # type: ignore[attr-defined]


def _groups(tree: ast.AST) -> Iterator[str]:
    """The names that `async with asyncio.TaskGroup() as NAME` binds, and parameters of that type."""
    for node in ast.walk(tree):
        if isinstance(node, ast.withitem) and isinstance(node.optional_vars, ast.Name):
            if "TaskGroup" in ast.unparse(node.context_expr):
                yield node.optional_vars.id
        elif isinstance(node, ast.arg) and node.annotation and "TaskGroup" in ast.unparse(node.annotation):
            yield node.arg


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("asyncio.create_task(work())", [1]),
        ("task = loop.create_task(work())\nasyncio.ensure_future(more())", [1, 2]),
        ("kept = owned('vol0', asyncio.ensure_future(work()))", []),
        ("async def f():\n  async with asyncio.TaskGroup() as group:\n    group.create_task(work())", []),
        ("def f(group: asyncio.TaskGroup) -> None:\n  group.create_task(work())", []),
        ("async def f():\n  async with other() as group:\n    group.create_task(work())", [3]),
    ],
)
def test_a_task_without_an_owner_is_found(source: str, lines: list[int]) -> None:
    assert tasks_without_owner(source) == lines


def test_every_task_of_the_daemon_has_an_owner() -> None:
    found = {
        f"{name}:{line}"
        for part in ("daemon", "workers")
        for path in sorted((ROOT / part).rglob("*.py"))
        if (name := str(path.relative_to(ROOT))) not in OWNERS
        for line in tasks_without_owner(path.read_text())
    }
    assert not found, "give each of these tasks a Background, beside, a TaskGroup or owned()"
