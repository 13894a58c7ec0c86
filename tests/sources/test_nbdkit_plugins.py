"""nbdkit's own Python plugins, served here and by the real nbdkit side by side: the same requests, the same results.

The plugins come from Debian's source package (`support/nbdkit/source_package.py`).
"""

import base64
import pickle
import random
import site
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from support.fakes.worker import FakeWorker, finish, spawn
from support.nbdkit import client as nbd
from support.nbdkit.client import NbdClient, NbdError, real_nbdkit
from support.nbdkit.servers import IMAGEIO_CLIENT, image_server, object_server, set_credentials
from support.nbdkit.source_package import fetch_plugins
from ublkpool.bufpool.wire import Flag, Kind, Op

SIZE = 1 << 20
REQUESTS = 100
LENGTH_MAX = 32 << 10
EXAMPLES = "plugins/python/examples"


class Request(NamedTuple):
    """One request to both; a write's data comes from its number."""

    op: Op
    offset: int
    length: int
    flags: Flag
    number: int

    @property
    def data(self) -> bytes:
        return random.Random(self.number).randbytes(self.length) if self.op == Op.WRITE else b""


Answer = tuple[int, bytes]


class Sides(NamedTuple):
    """A plugin served twice, and where each keeps its data."""

    worker: FakeWorker
    client: NbdClient


@pytest.fixture(scope="session")
def plugins() -> Path:
    return fetch_plugins()


@contextmanager
def served_twice(
    directory: Path,
    plugin: Path,
    ours: Mapping[str, str],
    theirs: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Sides]:
    """`plugin` served by us with the options `ours`, and by nbdkit with `theirs`; both must end cleanly."""
    log = directory / "nbdkit.log"
    with FakeWorker(directory) as worker:
        process = spawn(directory, plugin, ours)
        try:
            worker.accept()
            with real_nbdkit(plugin, ours if theirs is None else theirs, log, environment or {}) as client:
                yield Sides(worker, client)
            worker.detach()
            status, said = finish(process)
        finally:
            process.kill()
            process.wait()
        assert status == 0, said


def our_answer(worker: FakeWorker, request: Request) -> Answer:
    assert worker.attach is not None
    op = request.op
    if op == Op.WRITE_ZEROES and not worker.attach.write_zeroes_max_bytes:
        # What the kernel does for such a disk.
        fua = int(request.flags & Flag.FUA)
        return max(0, -worker.write(request.offset, bytes(request.length), flags=fua)), b""
    if op == Op.WRITE:
        return max(0, -worker.write(request.offset, request.data, flags=int(request.flags))), b""
    sent = worker.describe(Kind.REQUEST, op, request.offset, request.length, flags=int(request.flags))
    worker.send(0, [sent])
    result = worker.answer_of(sent).result
    if op != Op.READ or result < 0:
        return max(0, -result), b""
    assert result == request.length
    return 0, worker.pool[sent.buffer : sent.buffer + result]


def their_answer(client: NbdClient, request: Request) -> Answer:
    commands = {
        Op.READ: nbd.READ,
        Op.WRITE: nbd.WRITE,
        Op.FLUSH: nbd.FLUSH,
        Op.DISCARD: nbd.TRIM,
        Op.WRITE_ZEROES: nbd.WRITE_ZEROES,
    }
    flags = nbd.FLAG_FUA if request.flags & Flag.FUA else 0
    if request.flags & Flag.NOUNMAP:
        flags |= nbd.FLAG_NO_HOLE
    return client.request(commands[request.op], request.offset, request.length, request.data, flags)


def random_requests(sides: Sides, seed: int, size_bytes: int = SIZE) -> Iterator[Request]:
    """Requests of every kind that the plugin can execute."""
    attach, choose = sides.worker.attach, random.Random(seed)
    assert attach is not None
    ops = [Op.READ]
    if not attach.read_only:
        ops += [Op.WRITE, Op.WRITE, Op.WRITE_ZEROES, *([Op.FLUSH] if attach.volatile_cache else [])]
        ops += [Op.DISCARD] if attach.discard_max_bytes else []
    for number in range(REQUESTS):
        op, flags = choose.choice(ops), Flag(0)
        has_fua = bool(sides.client.export.flags & nbd.CAN_FUA)
        if op in (Op.WRITE, Op.WRITE_ZEROES) and has_fua and choose.random() < 0.3:
            flags |= Flag.FUA
        if op == Op.WRITE_ZEROES and choose.random() < 0.5:
            flags |= Flag.NOUNMAP
        blocks = choose.randint(1, LENGTH_MAX // 512)
        start = choose.randrange(size_bytes // 512 - blocks + 1)
        length = 0 if op == Op.FLUSH else blocks * 512
        yield Request(op, 0 if op == Op.FLUSH else start * 512, length, flags, seed * REQUESTS + number)


def expect_the_same(sides: Sides, seed: int) -> int:
    """The same random requests to both; returns how many failed."""
    attach, export = sides.worker.attach, sides.client.export
    assert attach is not None and attach.size_bytes == export.size_bytes
    assert attach.read_only == bool(export.flags & nbd.CAN_NOT_WRITE)
    failed = 0
    whole = [Request(Op.READ, at, LENGTH_MAX, Flag(0), 0) for at in range(0, export.size_bytes, LENGTH_MAX)]
    for request in [*random_requests(sides, seed, export.size_bytes), *whole]:
        ours, theirs = our_answer(sides.worker, request), their_answer(sides.client, request)
        assert ours == theirs, f"seed {seed}: {request}: {ours[0]} here, {theirs[0]} in nbdkit"
        failed += bool(ours[0])
    return failed


@pytest.mark.parametrize("transport", ["zeromq", "ring"])
def test_the_ramdisk(plugins: Path, tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "transport", transport)
    with served_twice(tmp_path, plugins / EXAMPLES / "ramdisk.py", {"test1": "foo"}) as sides:
        assert expect_the_same(sides, 1) == 0


def files(directory: Path) -> tuple[dict[str, str], dict[str, str], Callable[[], list[bytes]]]:
    """The options for two equal files, and what is in them."""
    content = random.Random(0).randbytes(SIZE)
    paths = [directory / "ours.img", directory / "theirs.img"]
    for path in paths:
        path.write_bytes(content)
    ours, theirs = ({"file": str(each)} for each in paths)
    return ours, theirs, lambda: [each.read_bytes() for each in paths]


def test_the_file(plugins: Path, tmp_path: Path) -> None:
    ours, theirs, contents = files(tmp_path)
    with served_twice(tmp_path, plugins / EXAMPLES / "file.py", ours, theirs) as sides:
        assert expect_the_same(sides, 2) == 0
    here, there = contents()
    assert here == there


def test_the_example_of_errors(plugins: Path, tmp_path: Path) -> None:
    ours, theirs, contents = files(tmp_path)
    with served_twice(tmp_path, plugins / EXAMPLES / "error.py", ours, theirs) as sides:
        assert expect_the_same(sides, 3) >= REQUESTS // 3
    here, there = contents()
    assert here == there


def test_the_url(plugins: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(image_server(bytearray(random.Random(1).randbytes(SIZE))))
        options = {"url": f"{url}/disk.img"}
        sides = stack.enter_context(served_twice(tmp_path, plugins / EXAMPLES / "url.py", options))
        assert expect_the_same(sides, 4) == 0


def test_imageio(plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for oVirt's client, which talks to a server on loopback."""
    package = tmp_path / "library" / "ovirt_imageio"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "client.py").write_text(IMAGEIO_CLIENT)
    monkeypatch.syspath_prepend(package.parent)
    images = [bytearray(SIZE), bytearray(SIZE)]
    with ExitStack() as stack:
        urls = [stack.enter_context(image_server(each)) for each in images]
        ours, theirs = (
            {"transfer_url": f"{each}/images/ticket", "connections": "4", "secure": "no"} for each in urls
        )
        environment = {"PYTHONPATH": str(package.parent)}
        with served_twice(tmp_path, plugins / EXAMPLES / "imageio.py", ours, theirs, environment) as sides:
            assert expect_the_same(sides, 5) == 0
    assert images[0] == images[1] != bytearray(SIZE)


def test_s3(plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_credentials(monkeypatch)
    environment = {"PYTHONPATH": ":".join(site.getsitepackages())}
    objects: dict[str, bytes] = {}
    with object_server(objects) as url:
        common = {"endpoint-url": url, "bucket": "disks", "size": "1M", "object-size": "64k"}
        ours, theirs = ({**common, "key": each} for each in ("ours", "theirs"))
        with served_twice(tmp_path, plugins / "plugins/S3/S3.py", ours, theirs, environment) as sides:
            assert expect_the_same(sides, 6) == 0
    stored = [
        {key.rpartition("/")[2]: data for key, data in objects.items() if f"/{side}/" in key}
        for side in ("ours", "theirs")
    ]
    assert stored[0] == stored[1] != {}


@pytest.mark.parametrize("name", ["EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC"])
def test_the_errno_that_a_plugin_sets(plugins: Path, tmp_path: Path, name: str) -> None:
    """Of the first version of the API; NBD knows few other numbers."""
    read = Request(Op.READ, 0, 512, Flag(0), 0)
    with served_twice(tmp_path, plugins / "tests/python-error.py", {"error": name}) as sides:
        ours, theirs = our_answer(sides.worker, read), their_answer(sides.client, read)
    assert ours == theirs and ours[0] > 0


def test_a_script_with_a_first_line_for_nbdkit(plugins: Path, tmp_path: Path) -> None:
    """Its `pread` is broken for the version that it declares: both answer EIO."""
    read = Request(Op.READ, 0, 512, Flag(0), 0)
    with served_twice(tmp_path, plugins / "tests/shebang.py", {}) as sides:
        assert our_answer(sides.worker, read) == their_answer(sides.client, read) == (5, b"")


def start_here(directory: Path, plugin: Path, options: Mapping[str, str]) -> str:
    """What a start that must fail says."""
    with FakeWorker(directory) as worker:
        process = spawn(directory, plugin, options)
        if "config" not in plugin.read_text():
            worker.answer_question()
        status, said = finish(process)
    assert status != 0
    return said


@pytest.mark.parametrize(
    ("plugin", "options", "said"),
    [
        ("tests/python-exception.py", {"test": "simple"}, "this is the test string"),
        ("tests/python-exception.py", {"test": "traceback"}, "this is the test string"),
        ("tests/python-exception.py", {"colour": "red"}, "unknown config parameter"),
        (f"{EXAMPLES}/file.py", {}, "file parameter is required"),
        (f"{EXAMPLES}/file.py", {"nosuch": "1"}, "unknown parameter: nosuch"),
    ],
)
def test_a_start_that_fails_says_the_same_words(
    plugins: Path, tmp_path: Path, plugin: str, options: dict[str, str], said: str
) -> None:
    log = tmp_path / "nbdkit.log"
    with pytest.raises(NbdError), real_nbdkit(plugins / plugin, options, log, {}):
        pytest.fail("nbdkit served it")
    assert said in log.read_text()
    assert said in start_here(tmp_path, plugins / plugin, options)


CONFIGURED: list[dict[str, object]] = [
    {},
    {"can_write": False},
    {"can_flush": True},
    {"can_trim": True},
    {"can_zero": True},
    {"is_rotational": True},
    {"can_flush": True, "can_fua": "emulate"},
    {"can_flush": True, "can_fua": "native", "pwrite_expect_fua": True},
    {"can_zero": True, "zero_expect_may_trim": True},
    {"can_trim": True, "can_fua": "none"},
]


@pytest.mark.parametrize("configured", CONFIGURED, ids=str)
def test_the_plugin_of_nbdkits_own_tests(
    plugins: Path, tmp_path: Path, configured: dict[str, object]
) -> None:
    """It asserts the flags of each request itself, and fails a request that has others."""
    pickled = base64.b64encode(pickle.dumps({"size": SIZE, **configured})).decode()
    with served_twice(tmp_path, plugins / "tests/test-python-plugin.py", {"cfg": pickled}) as sides:
        attach, flags = sides.worker.attach, sides.client.export.flags
        assert attach is not None
        assert attach.size_bytes == sides.client.export.size_bytes
        assert attach.read_only == bool(flags & nbd.CAN_NOT_WRITE)
        assert attach.volatile_cache == bool(flags & nbd.CAN_FLUSH)
        assert attach.rotational == bool(flags & nbd.IS_ROTATIONAL)
        assert (attach.discard_max_bytes > 0) == bool(flags & nbd.CAN_TRIM)
        failed = 0
        for request in random_requests(sides, 7):
            ours, theirs = our_answer(sides.worker, request), their_answer(sides.client, request)
            assert ours == theirs, request
            failed += bool(ours[0])
        assert failed < REQUESTS
