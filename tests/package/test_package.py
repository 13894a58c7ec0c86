"""The source distribution and the wheel that `make wheel` built; the wheel runs where there is no compiler.

Required packages come from this environment, so that no package index is needed.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_MODULES = ("ublkpool.ublk._native", "ublkpool.bufpool.engine._engine")
_PROBE = f"""
import {", ".join(_MODULES)}
from ublkpool.daemon import lifetime
from ublkpool.workers import process
print(ublkpool.__file__)
for line in open("/proc/self/maps"):
    if "liburing" in line:
        print(line)
"""


@pytest.fixture(scope="module")
def dist() -> Path:
    """The source distribution and the wheel that `make package` has built."""
    found = ROOT / "dist"
    if not (found / ".wheel").exists():
        raise LookupError(f"{found} has no packages: run `make wheel`")
    return found


def _only(dist: Path, pattern: str) -> Path:
    (found,) = dist.glob(pattern)
    return found


def _shipped() -> set[str]:
    """The files of the repository that belong in a source distribution."""
    wanted = [
        ROOT / "CHANGELOG.md",
        ROOT / "SECURITY.md",
        *ROOT.glob("config/*"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("docs/**/*.svg"),
        *ROOT.glob("examples/*.py"),
    ]
    wanted += [each for kind in ("*.c", "*.h", "Makefile") for each in ROOT.glob(f"examples/c/{kind}")]
    names = {str(each.relative_to(ROOT)) for each in wanted}
    for package in ("ublk", "bufpool", "workers", "daemon", "backends"):
        kinds = ("**/*.py", "**/*.pyi", "**/csrc/*.c", "**/csrc/*.h")
        sources = [each for kind in kinds for each in (ROOT / package).glob(kind)]
        names |= {f"src/ublkpool/{each.relative_to(ROOT)}" for each in sources}
    return names | {"LICENSE", "README.md", "pyproject.toml", "setup.py"}


def test_the_source_distribution_has_all_sources_config_unit_rules_docs_and_the_licence(dist: Path) -> None:
    with tarfile.open(_only(dist, "*.tar.gz")) as archive:
        names = {each.name.partition("/")[2] for each in archive.getmembers()}
    assert not _shipped() - names
    assert not [each for each in names if each.endswith((".so", ".o"))]


def test_the_wheel_serves_every_python_from_3_11_on(dist: Path) -> None:
    wheel = _only(dist, "*.whl")
    assert "-cp311-abi3-manylinux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (archive.read(each).decode() for each in names if each.endswith("/METADATA"))
    modules = [each for each in names if each.endswith(".so")]
    assert sorted(modules) == [f"{each.replace('.', '/')}.abi3.so" for each in sorted(_MODULES)]
    required = {
        line.split()[1].partition(">")[0] for line in about.splitlines() if line.startswith("Requires-Dist")
    }
    assert {"cffi", "click", "msgspec", "pyzmq"} <= required


def test_its_modules_name_no_library_directory_of_the_machine_that_built_them(
    dist: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(_only(dist, "*.whl")) as archive:
        modules = [each for each in archive.namelist() if each.endswith(".so")]
        archive.extractall(tmp_path, modules)
    for each in modules:
        entries = subprocess.run(
            ["readelf", "-d", tmp_path / each], capture_output=True, text=True, check=True
        ).stdout
        assert "(NEEDED)" in entries
        assert "RPATH" not in entries and "RUNPATH" not in entries


def test_it_installs_and_runs_where_there_is_no_compiler(dist: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    python, bare = prefix / "bin" / "python", {"PATH": str(prefix / "bin"), "HOME": str(tmp_path)}
    assert shutil.which("cc", path=bare["PATH"]) is None and shutil.which("gcc", path=bare["PATH"]) is None
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run(
        [*pip, str(_only(dist, "*.whl"))], check=True, env={**bare, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    )
    site = next(prefix.glob("lib/python*/site-packages"))
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def run(*command: str) -> str:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, env=bare, cwd=tmp_path
        ).stdout

    assert "Serve Linux block devices" in run(str(prefix / "bin" / "ublkpool"), "--help")
    assert run(str(prefix / "bin" / "ublkpool"), "--version").startswith("ublkpool ")
    doctor = subprocess.run(
        [prefix / "bin" / "ublkpool", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=bare,
        cwd=tmp_path,
    )
    assert "driver" in {each["check"] for each in json.loads(doctor.stdout)["findings"]}
    # A backend's process, its rings and its memory, without a driver.
    check = ("backend", "check", "memory", "size=16M", "--seconds", "0.2", "--transport", "ring")
    assert "every promise was kept" in run(str(prefix / "bin" / "ublkpool"), *check)
    assert run(str(python), "-c", _PROBE).splitlines() == [str(site / "ublkpool" / "__init__.py")]
    for name in ("ublkpool.service", "99-ublkpool.rules", "ublkpool.toml", "examples/demo_null.py"):
        assert (prefix / "share" / "ublkpool" / name).is_file(), name
    for name in ("OPERATIONS.md", "pictures/top.svg"):
        assert (prefix / "share" / "doc" / "ublkpool" / name).is_file(), name
    # With the compiler of this machine: the installed examples find the installed header.
    examples = prefix / "share" / "ublkpool" / "examples" / "c"
    subprocess.run(["make", "-s", "-C", examples, f"BUILD={tmp_path}"], check=True)
    assert (tmp_path / "zeromq_disk").is_file() and (tmp_path / "ring_disk").is_file()
