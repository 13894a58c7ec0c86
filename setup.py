"""Only what pyproject.toml cannot say: the compiled modules, and that they serve every Python from 3.11 on.

With UBLKPOOL_CHECKED=1 in the environment, as `make setup` sets it, also the queue core that asserts its invariants.
"""

import os

from setuptools import setup

_modules = [
    "src/ublkpool/ublk/_native_build.py:ffibuilder",
    "src/ublkpool/bufpool/engine/_engine_build.py:ffibuilder",
]
if os.environ.get("UBLKPOOL_CHECKED") == "1":
    _modules.append("src/ublkpool/ublk/_native_build.py:checked")

setup(cffi_modules=_modules, options={"bdist_wheel": {"py_limited_api": "cp311"}})
