"""The state that a forked process shares with its parent."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from ublkpool.daemon import lifetime
from ublkpool.daemon.settings.config import ServeConfig

_PARENT = """
import gc, os, sys
from ublkpool.workers.process import fork_child, share_heap

share_heap()
loaded = gc.get_freeze_count()
made = [[] for _ in range(100)]
reader, writer = os.pipe()

def tell():
    os.write(writer, str(gc.get_freeze_count() - loaded).encode())
    return 0

pid = fork_child(tell, [writer], "child")
os.waitpid(pid, 0)
print(loaded, gc.get_freeze_count() - loaded, int(os.read(reader, 100)))
"""


def test_garbage_collection_skips_objects_from_before_the_fork_in_parent_and_child() -> None:
    """An object that is looked at is written to, and its page is shared no longer."""
    said = subprocess.check_output([sys.executable, "-c", _PARENT], text=True, env={**os.environ})
    loaded, of_the_parent, of_the_child = map(int, said.split())
    assert loaded > 10_000
    assert of_the_parent == 0, (
        "a fork freezes nothing in the parent, whose garbage would stay for ever, nor thaws"
    )
    assert of_the_child >= 100, "the child never looks at what its parent made before the fork"


def test_the_daemon_freezes_its_heap_before_its_first_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Runner:
        def __init__(self, **_: object) -> None:
            """Runs nothing."""

        def __enter__(self) -> "Runner":
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing is left to be ended."""

        def run(self, serving: Coroutine[Any, Any, int]) -> int:
            serving.close()
            order.append("serves")
            return 0

    monkeypatch.setattr("ublkpool.ublk.control.get_features", lambda: 0)
    monkeypatch.setattr(lifetime, "leave_for_own_view", lambda used: -1)
    monkeypatch.setattr(lifetime, "share_heap", lambda: order.append("shared"))
    monkeypatch.setattr(asyncio, "Runner", Runner)
    assert lifetime.serve(ServeConfig(run_dir=Path("/nowhere"))) == 0
    assert order == ["shared", "serves"]
