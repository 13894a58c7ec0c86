"""Module names of earlier versions, for backends that were written for them.

The daemon starts a backend again after an upgrade, and its author's imports must still work.  Python asks this finder
only for modules that no other finder has.

importlib.abc is for the type checker alone, because it imports a dozen modules at each start of a command.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Loader
else:
    Loader = object

_BUFPOOL = "ublkpool.bufpool"
_SDK = (
    *(
        "backend",
        "batch",
        "calls",
        "claim",
        "client",
        "client_buffers",
        "keeper",
        "links",
        "loader",
        "options",
    ),
    *("process", "ring_links", "serving", "slots", "store_identity", "zeromq_links"),
)
_ENGINE = ("file_facts", "native", "ring_driver")
_POOL = ("arena", "broker", "device_leases", "lease", "limits")
MOVED = {
    **{f"{_BUFPOOL}.{name}": f"{_BUFPOOL}.sdk.{name}" for name in _SDK},
    **{f"{_BUFPOOL}.{name}": f"{_BUFPOOL}.engine.{name}" for name in _ENGINE},
    **{f"{_BUFPOOL}.{name}": f"{_BUFPOOL}.pool.{name}" for name in _POOL},
}
"""The earlier name of each module, and today's."""


class _Loader(Loader):
    """Fills a module with the names of another module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary module."""

    def exec_module(self, module: ModuleType) -> None:
        """See the class.  Dunder names stay the module's own."""
        moved = importlib.import_module(self._name)
        module.__dict__.update({key: value for key, value in vars(moved).items() if not key.startswith("__")})


class EarlierNames:
    """Finds a moved module under its earlier name, with a `DeprecationWarning`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        name = MOVED.get(fullname)
        if name is None:
            return None
        warnings.warn(f"{fullname} is now {name}", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, _Loader(name))


def find_earlier_names() -> None:
    """Install the finder, once."""
    if not any(isinstance(each, EarlierNames) for each in sys.meta_path):
        sys.meta_path.append(EarlierNames())
