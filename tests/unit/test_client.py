"""`ublkpool.client`: the same calls, blocking and for asyncio, against the real admin server."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from functools import partial
from inspect import iscoroutinefunction, signature
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from support.fakes.daemon import FakeDaemon, running_daemon
from ublkpool import client as public
from ublkpool.client import AsyncClient, Client
from ublkpool.daemon.admin import async_client, wire
from ublkpool.daemon.admin import client as blocking_client
from ublkpool.daemon.events.event import decode
from ublkpool.daemon.events.kinds import BackendDied
from ublkpool.daemon.events.tell import Events

DIED = BackendDied(kind="file", pid=7, was_cut_off=False)
DEADLINE_S = 120
GUIDE = Path(__file__).parents[2] / "docs/CLIENT.md"
MEMORY = {"kind": "memory"}


class Awaited:
    """An `AsyncClient` whose methods are called as those of `Client`."""

    def __init__(self, run_dir: Path, **callbacks: Any) -> None:
        self._client = AsyncClient(run_dir, **callbacks)

    def __getattr__(self, name: str) -> Any:
        return partial(self._run, name)

    def _run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        async def call() -> Any:
            async with asyncio.timeout(DEADLINE_S):
                return await getattr(self._client, name)(*args, **kwargs)

        return asyncio.run(call())

    def events(self, *args: Any, **kwargs: Any) -> Iterator[public.Event]:
        """Each event in a turn of a loop of its own."""
        with asyncio.Runner() as runner:
            found = self._client.events(*args, **kwargs)
            try:
                while True:
                    try:
                        yield runner.run(asyncio.wait_for(anext(found), DEADLINE_S))
                    except StopAsyncIteration:
                        return
            finally:
                runner.run(found.aclose())


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running_daemon(tmp_path) as running:
        yield running


@pytest.fixture(params=[Client, Awaited], ids=["blocking", "asyncio"])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(daemon: FakeDaemon, make: Any) -> Any:
    return make(daemon.run_dir)


def record(daemon: FakeDaemon, *texts: str) -> None:
    async def tell() -> None:
        for each in texts:
            daemon.service.events.record(DIED, each, device="vol0")

    daemon.call(tell())


async def until(condition: Any) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    for name in (each for each in vars(Client) if not each.startswith("_")):
        blocking, awaited = getattr(Client, name), getattr(AsyncClient, name)
        assert signature(blocking).parameters == signature(awaited).parameters, name
        assert name == "events" or iscoroutinefunction(awaited), name


def test_each_call_reaches_the_daemon_and_has_a_typed_answer(daemon: FakeDaemon, client: Any) -> None:
    added = client.add({"name": "vol0", "size": "1M", "queues": 2, "backend": MEMORY}, take_over=True)
    assert isinstance(added, public.DeviceStatus) and added.size_bytes == 1 << 20
    assert daemon.service.take_overs == [True]
    client.add(public.DeviceConfig(name="vol1", backend=public.BackendConfig(kind="memory")))
    assert [each.name for each in client.devices()] == ["vol0", "vol1"]
    assert client.wait_live("vol0", 5.0) == added
    [stats] = client.stats("vol0")
    assert isinstance(stats, public.DeviceStats) and stats.queues[0].requests.read == 3
    assert [each.name for each in client.stats()] == ["vol0", "vol1"]
    assert client.daemon().version == "1.2.3"
    settings = {each.key: each.value for each in client.set("vol0", {"iops_max": 100})}
    assert settings["iops_max"] == "100"
    assert client.resize("vol0", 512, True) == public.ResizeResult(
        before_bytes=1 << 20, after_bytes=(1 << 20) + 512
    )
    client.drain("vol0", flush=False, timeout_s=3.0)
    assert daemon.service.drains == [("vol0", False, 3.0)]
    client.resume("vol0")
    client.rebind("vol1")
    assert (daemon.service.resumed, daemon.service.rebound) == (["vol0"], ["vol1"])
    daemon.service.reloaded = [public.Reloaded(name="vol0", done="x")]
    assert client.reload() == daemon.service.reloaded
    assert client.delete("vol0", force=True, keeps_stores=True) == ["vol0"]
    assert (daemon.service.forced, daemon.service.forgot) == ({True}, [False])
    assert client.delete(None) == ["vol1"]
    client.shut_down(final=False)
    client.stop()
    assert daemon.service.shutdowns == [False] and daemon.service.stopped


def test_progress_is_told(daemon: FakeDaemon, make: Any) -> None:
    heard: list[str] = []
    make(daemon.run_dir, on_progress=heard.append).add({"name": "vol0"})
    assert heard == ["creating vol0"]


def test_what_the_daemon_refuses_is_an_error_of_its_own_class(client: Any, daemon: FakeDaemon) -> None:
    client.add({"name": "vol0"})
    with pytest.raises(public.DeviceExists, match="there is such a device already"):
        client.add({"name": "vol0"})
    with pytest.raises(public.NoSuchDevice) as unknown:
        client.delete("vol1")
    assert (unknown.value.code, unknown.value.status) == ("no-device", 1)
    with pytest.raises(public.TimedOut, match=r"within 0\.01 s"):
        client.wait_live("vol0", 0.01)
    with pytest.raises(public.RemoteError, match="unknown option bad") as refused:
        client.add({"name": "b", "backend": {"kind": "memory", "bad": 1}})
    assert type(refused.value) is public.RemoteError and refused.value.status == 2
    assert issubclass(public.RemoteError, public.DaemonError)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"name": "vol0", "size": "1Q"}, "size: "),
        ({"name": "vol0", "sise": 1}, "sise: unknown key"),
        ({"name": "vol0", "backend": {"kind": "./none.py"}}, "backend.kind: "),
        (public.DeviceConfig(name="vol0", queues=0), "Expected `int` >= 1"),
    ],
)
def test_a_wrong_description_is_refused_before_the_daemon_is_asked(
    client: Any, daemon: FakeDaemon, device: Any, message: str
) -> None:
    with pytest.raises(public.ConfigError, match=re.escape(message)):
        client.add(device)
    assert daemon.server.statistics()["requests"] == 0


def test_without_a_daemon_the_error_says_so(tmp_path: Path, make: Any) -> None:
    with pytest.raises(public.DaemonUnreachable, match="the daemon is not running; start it with"):
        make(tmp_path).devices()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "admin.sock"))
    with pytest.raises(public.DaemonUnreachable, match="a daemon that was killed left this socket"):
        make(tmp_path).devices()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", public.DaemonUnreachable),
        (b"garbage\n", public.BadAnswer),
        (b'{"ok":true,"result":5}\n', public.BadAnswer),
        # A later daemon's: fields and a code that this client does not know.
        (b'{"ok":false,"error":"no","status":1,"code":"new","hint":1}\n', public.RemoteError),
        (
            b'{"ok":false,"error":"bad request: version 1","status":2,"code":"version","speaks":7}\n',
            public.OtherVersion,
        ),
    ],
)
def test_an_answer_of_another_version_is_an_error_of_its_own_class(
    tmp_path: Path, make: Any, answer: bytes, error: type[public.DaemonError]
) -> None:
    with answering(tmp_path, answer), pytest.raises(error) as raised:
        make(tmp_path).devices()
    assert type(raised.value) is error
    if isinstance(raised.value, public.OtherVersion):
        assert raised.value.speaks == 7


def test_fields_of_a_later_daemon_are_passed_over(tmp_path: Path, make: Any) -> None:
    with answering(tmp_path, b'{"ok":true,"result":{"version":"9","colour":"blue"},"took_s":1}\n'):
        assert make(tmp_path).daemon() == public.DaemonStatus(version="9")


class answering:
    """A daemon that gives one client this answer, and hangs up."""

    def __init__(self, run_dir: Path, answer: bytes) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(run_dir / "admin.sock"))
        self._listener.listen()
        self._thread = threading.Thread(target=self._answer, args=(answer,))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._thread.join(DEADLINE_S)
        self._listener.close()

    def _answer(self, answer: bytes) -> None:
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rb") as lines:
            lines.readline()
            connection.sendall(answer)


@pytest.mark.parametrize("speaks", [0, 2])
def test_a_client_of_another_version_is_told_which_one_the_daemon_speaks(
    daemon: FakeDaemon, client: Any, monkeypatch: pytest.MonkeyPatch, speaks: int
) -> None:
    line = re.sub(rb'"v":1', b'"v":%d' % speaks, wire.encode_line(wire.ListRequest()))
    for module in (blocking_client, async_client):
        monkeypatch.setattr(module, "encode_line", lambda request: line)
    with pytest.raises(public.OtherVersion, match=f"version {speaks}, this daemon speaks 1") as refused:
        client.devices()
    assert refused.value.speaks == public.ADMIN_VERSION == 1


def test_what_an_earlier_daemon_does_not_know_is_a_bad_request(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (blocking_client, async_client):
        monkeypatch.setattr(module, "encode_line", lambda request: b'{"v":1,"op":"later"}\n')
    with pytest.raises(public.BadRequest, match="later") as refused:
        client.devices()
    assert refused.value.status == 2


def test_an_add_that_takes_longer_than_its_caller_waits_is_given_up(daemon: FakeDaemon, client: Any) -> None:
    daemon.service.hold_adds = asyncio.Event()
    with pytest.raises(public.DaemonSilent, match=r"did not answer within 0\.2 s$"):
        client.add({"name": "vol0"}, timeout_s=0.2)
    daemon.call(until(lambda: daemon.service.adds_cancelled == 1))
    daemon.call(until(lambda: not daemon.server._operations.tasks))
    assert client.devices() == []


def test_the_time_that_the_connection_takes_counts(
    daemon: FakeDaemon, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection takes so long when a busy daemon's queue of connections is full."""
    real, late_s = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + late_s[0])
    connect, open_ = blocking_client._connect, async_client._open

    def connect_late(path: Path, timeout_s: float | None) -> socket.socket:
        connection = connect(path, timeout_s)
        late_s[0] += 60
        return connection

    async def open_late(path: Path, timeout_s: float | None) -> Any:
        streams = await open_(path, timeout_s)
        late_s[0] += 60
        return streams

    monkeypatch.setattr(blocking_client, "_connect", connect_late)
    monkeypatch.setattr(async_client, "_open", open_late)
    daemon.service.hold_adds = asyncio.Event()
    begun_s = real()
    with pytest.raises(public.DaemonSilent, match="did not answer within 50 s"):
        client.add({"name": "vol0"}, timeout_s=50)
    assert real() - begun_s < 40


def test_an_add_whose_callback_raises_is_given_up_while_the_error_is_kept(
    daemon: FakeDaemon, make: Any
) -> None:
    def refuse(text: str) -> None:
        raise ZeroDivisionError(text)

    daemon.service.hold_adds = asyncio.Event()
    with pytest.raises(ZeroDivisionError) as kept:
        make(daemon.run_dir, on_progress=refuse).add({"name": "vol0"})
    daemon.call(until(lambda: daemon.service.adds_cancelled == 1))
    assert str(kept.value) == "creating vol0"


def test_a_task_that_is_cancelled_gives_its_add_up(daemon: FakeDaemon) -> None:
    daemon.service.hold_adds = asyncio.Event()

    async def begin_and_cancel() -> None:
        call = asyncio.create_task(AsyncClient(daemon.run_dir).add({"name": "vol0"}))
        await until(lambda: daemon.server.statistics()["operations"] == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(begin_and_cancel())
    daemon.call(until(lambda: daemon.service.adds_cancelled == 1))


def test_events_are_iterated_and_followed_over_restarts(tmp_path: Path, make: Any) -> None:
    events, found = Events(), list[str]()
    waited: list[str] = []
    following = make(tmp_path, on_wait=waited.append).events(follow=True, waits=True)
    with closing(following):
        for life in range(2):
            with running_daemon(tmp_path, events) as daemon:
                record(daemon, f"{life} a", f"{life} b")
                found += [each.text for each in islice(following, 2 + life)]
                daemon.call(daemon.server.close())
                # No client can be told before the daemon's end.
                record(daemon, f"{life} c")
            lines = events.after(0, most=100).lines
            events = Events(earlier=[event for line in lines if (event := decode(line.rstrip()))])
    assert found == ["0 a", "0 b", "0 c", "1 a", "1 b"]


def test_without_follow_the_iterator_ends_and_begins_after_a_number(daemon: FakeDaemon, client: Any) -> None:
    record(daemon, "one", "two", "three")
    first, *rest = client.events()
    assert (first.text, first.code, first.device) == ("one", "backend-died", "vol0")
    assert list(client.events(first.seq)) == rest
    assert list(client.events(names="vol1")) == []
    assert list(client.events(since="9999")) == []


def test_a_follower_is_refused_where_no_daemon_has_answered(tmp_path: Path, make: Any) -> None:
    with pytest.raises(public.DaemonUnreachable):
        next(make(tmp_path).events(follow=True))


def test_an_iterator_that_is_closed_leaves_no_connection(daemon: FakeDaemon) -> None:
    record(daemon, "one")

    async def follow() -> None:
        async with aclosing(AsyncClient(daemon.run_dir).events(follow=True)) as events:
            assert isinstance(events, AsyncGenerator)
            async for event in events:
                assert event.text == "one"
                break

    asyncio.run(follow())
    with closing(Client(daemon.run_dir).events(follow=True)) as events:
        assert isinstance(events, Generator) and next(events).text == "one"
    record(daemon, "two")
    daemon.call(until(lambda: daemon.server.statistics()["connections"] == 0))


def test_threads_share_a_client(daemon: FakeDaemon) -> None:
    client = Client(daemon.run_dir)
    names = [f"vol{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        added = list(threads.map(lambda name: client.add({"name": name, "backend": MEMORY}), names))
        assert [each.name for each in added] == names
        assert list(threads.map(lambda name: client.delete(name), names)) == [[name] for name in names]
    assert client.devices() == []


def test_the_run_directory_is_the_environments_unless_one_is_named(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UBLKPOOL_RUN_DIR", str(daemon.run_dir))
    assert Client().devices() == []
    with pytest.raises(public.DaemonUnreachable):
        Client(daemon.run_dir / "other").devices()


def test_importing_the_client_is_light() -> None:
    code = "import json, sys, ublkpool.client; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = json.loads(out)
    assert "ublkpool.daemon.admin.client" in loaded
    heavy = (
        "click",
        "textual",
        "zmq",
        "cffi",
        "asyncio",
        "posix_ipc",
        "prometheus_client",
        "multiprocessing",
    )
    assert [each for each in loaded if each.split(".")[0] in heavy] == []
    # Of the daemon, only what a client needs: no server, no device, no C module.
    assert [
        each
        for each in loaded
        if re.search(r"\.(server|supervisor|device|kernel|_native|_engine|ublk)$", each)
    ] == []


def test_a_name_that_the_module_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        _ = public.Klient


def test_the_examples_of_the_guide_run(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UBLKPOOL_RUN_DIR", str(daemon.run_dir))
    examples = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, str(GUIDE), "exec"), {"__name__": "__main__"})
        assert not daemon.service.configs and daemon.service.take_overs
        daemon.service.take_overs.clear()
