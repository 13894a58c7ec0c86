"""Only what pyproject.toml cannot say: the compiled modules."""

from setuptools import setup

setup(
    cffi_modules=[
        "src/ublkpool/ublk/_native_build.py:ffibuilder",
        "src/ublkpool/bufpool/_fileio_build.py:ffibuilder",
    ]
)
