"""Backends that were written for an earlier version's module names go on after an upgrade."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from ublkpool.bufpool.earlier_names import MOVED

BACKEND = """
from ublkpool.bufpool.backend import Backend, Device, Hint, Properties, Request
from ublkpool.bufpool.batch import Batch
from ublkpool.bufpool.claim import open_alone
from ublkpool.bufpool.client_buffers import ClientBuffer
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sizes import ByteSize
from ublkpool.bufpool.slots import Slots
from ublkpool.bufpool.store_identity import identify
from ublkpool.bufpool.wire import Identity
from ublkpool.bufpool.sdk import backend

assert Backend is backend.Backend
"""


@pytest.mark.parametrize(("earlier", "today"), MOVED.items())
def test_each_earlier_name_leads_to_the_same_objects(earlier: str, today: str) -> None:
    sys.modules.pop(earlier, None)
    with pytest.warns(DeprecationWarning, match=today):
        found = importlib.import_module(earlier)
    moved = importlib.import_module(today)
    public = [key for key in vars(moved) if not key.startswith("__")]
    assert public and all(vars(found)[key] is vars(moved)[key] for key in public)
    assert moved.__name__ == today and moved.__spec__ is not None and moved.__spec__.name == today


def test_a_backend_with_the_imports_of_an_earlier_version_still_loads(tmp_path: Path) -> None:
    program = tmp_path / "mine.py"
    program.write_text(BACKEND)
    subprocess.run([sys.executable, str(program)], check=True)


def test_a_name_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("ublkpool.bufpool.never_was")
