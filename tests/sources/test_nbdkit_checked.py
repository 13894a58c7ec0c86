"""nbdkit's own Python plugins under `ublkpool backend check`: kills, stops and fences, over both transports."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.nbdkit.servers import IMAGEIO_CLIENT, image_server
from support.nbdkit.source_package import fetch_plugins
from ublkpool.testing import Report, report_on
from ublkpool.testing import check_backend as check_backend

SIZE = 1 << 20
EXAMPLES = "plugins/python/examples"
Check = Callable[..., Report]


@pytest.fixture(scope="session")
def plugins() -> Path:
    return fetch_plugins()


def test_the_file_keeps_every_promise(plugins: Path, tmp_path: Path, check_backend: Check) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(SIZE))
    report = check_backend(str(plugins / EXAMPLES / "file.py"), {"file": disk}, seconds=1, deadline_s=60)
    assert report.counts["kill"] >= 2 and report.counts["fence"] >= 1


def test_the_url_keeps_every_promise(plugins: Path, check_backend: Check) -> None:
    with image_server(bytearray(range(256)) * (SIZE >> 8)) as url:
        report = check_backend(
            str(plugins / EXAMPLES / "url.py"), {"url": url}, seconds=0, deadline_s=60, transport="ring"
        )
    assert report.counts["kill"] >= 1


def test_imageio_keeps_every_promise(
    plugins: Path, tmp_path: Path, check_backend: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "library" / "ovirt_imageio"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "client.py").write_text(IMAGEIO_CLIENT)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    with image_server(bytearray(SIZE)) as url:
        options = {"transfer_url": url, "connections": "4"}
        plugin = str(plugins / EXAMPLES / "imageio.py")
        report = check_backend(plugin, options, seconds=0, deadline_s=60, transport="zeromq")
    assert report.counts["kill"] >= 1


def test_the_example_of_errors_fails_requests(plugins: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(SIZE))
    report = report_on(str(plugins / EXAMPLES / "error.py"), {"file": disk}, seconds=20, deadline_s=60)
    assert report.promise == "errors"


def test_the_ramdisk_forgets_at_its_death(plugins: Path) -> None:
    report = report_on(str(plugins / EXAMPLES / "ramdisk.py"), seconds=20, deadline_s=60)
    assert report.promise == "survives-kill"


def test_a_ramdisk_that_says_that_it_forgets_keeps_every_other_promise(
    plugins: Path, tmp_path: Path, check_backend: Check
) -> None:
    plugin = tmp_path / "ramdisk.py"
    shutil.copy(plugins / EXAMPLES / "ramdisk.py", plugin)
    plugin.write_text(plugin.read_text() + "\nsurvives_death = False\n")
    check_backend(str(plugin), seconds=1, deadline_s=60)
