"""nbdkit's own Python plugins under `ublkpool backend check`: kills, stops and fences, over both transports."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.fakes.worker import FakeWorker, finish, spawn
from support.nbdkit.servers import IMAGEIO_CLIENT, image_server, set_credentials
from support.nbdkit.source_package import fetch_plugins
from support.sources.s3 import BUCKET, S3Server
from ublkpool.bufpool.wire import Kind, Op
from ublkpool.testing import Report, report_on
from ublkpool.testing import check_backend as check_backend

SIZE = 1 << 20
EXAMPLES = "plugins/python/examples"
S3, OBJECT = "plugins/S3/S3.py", 128 << 10
Check = Callable[..., Report]


@pytest.fixture(scope="session")
def plugins() -> Path:
    return fetch_plugins()


def s3_options(server: S3Server, tmp_path: Path) -> dict[str, str]:
    """Each test has a key of its own: moto keeps objects as long as the process lives."""
    place = {"endpoint-url": server.endpoint, "bucket": BUCKET, "key": tmp_path.name}
    return {**place, "size": "512K", "object-size": str(OBJECT)}


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


def test_s3_keeps_every_promise_with_one_request_at_a_time(
    plugins: Path, tmp_path: Path, check_backend: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its PUTs have no condition: only the store can keep a dead process's late PUT from newer data."""
    set_credentials(monkeypatch)
    with S3Server() as server:
        server.refuses_the_dead = True
        plugin, options = str(plugins / S3), s3_options(server, tmp_path)
        alone = {"queues": 1, "depth": 1, "max_io_bytes": 64 << 10}
        report = check_backend(plugin, options, seconds=0, seed=35, deadline_s=60, **alone)
    assert min(report.counts["kill"], report.counts["fence"]) >= 2, "once over each transport"
    assert {"READ", "WRITE", "FLUSH", "DISCARD", "WRITE_ZEROES"} <= report.counts.keys()


def test_s3_undoes_zeros_beside_a_write_to_the_same_object(
    plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It deletes objects without the lock that its writes take: the check's promise `zeroes`, at any larger depth."""
    set_credentials(monkeypatch)
    with S3Server() as server, FakeWorker(tmp_path) as worker:
        process = spawn(tmp_path, plugins / S3, s3_options(server, tmp_path))
        worker.accept()
        assert worker.write(0, b"old." * (OBJECT // 4)) == OBJECT
        server.hold(lambda method, _path: method == "PUT")
        write = worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096, tag=1)
        worker.pool[write.buffer : write.buffer + 4096] = b"new." * 1024
        worker.send(0, [write])
        (put,) = server.held(1)
        assert worker.do(Op.WRITE_ZEROES, 0, OBJECT) == 0
        assert worker.read(0, OBJECT) == bytes(OBJECT)
        put.release()
        assert worker.answer_of(write).result == 4096
        assert worker.read(4096, 4096) == b"old." * 1024
        worker.detach()
        assert finish(process)[0] == 0


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
