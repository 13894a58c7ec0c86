"""The metrics: their names and values, what they are made of, and a daemon that does not answer."""

import asyncio
import math
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain_text

from support.fakes.daemon import FakeDaemon, running_daemon
from ublkpool.daemon import latency
from ublkpool.daemon.metrics import source
from ublkpool.daemon.metrics.collector import render
from ublkpool.daemon.metrics.families import BUCKETS_S, FAMILIES, distribution
from ublkpool.daemon.metrics.pages import Pages
from ublkpool.daemon.metrics.source import Snapshot, Source, by_connection, by_path, open_streams
from ublkpool.daemon.metrics.usage import Owner, ProcessUsage, Usages
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.daemon.status import (
    BackendStatus,
    Bucket,
    ClientStats,
    DaemonStatus,
    DeviceStats,
    DeviceStatus,
    Histogram,
    Latencies,
    OpCounts,
    PoolStats,
    ProcessStatus,
    QueueStats,
    WorkerStatus,
)

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running_daemon(tmp_path) as running:
        yield running


def device(name: str, **fields: Any) -> DeviceStatus:
    given: dict[str, Any] = {
        "id": 0,
        "path": "/dev/ublkb0",
        "state": "live",
        "size_bytes": 1 << 30,
        "queues": 2,
        "depth": 64,
        "need_get_data": True,
        "placement": "pool",
        "recovery": "reissue",
        "workers": (WorkerStatus(queue=0, pid=100), WorkerStatus(queue=1, pid=101)),
        "backend": BackendStatus(kind="file", pid=99, attached=True),
        "epoch": 3,
    }
    return DeviceStatus(name=name, **{**given, **fields})


def full_snapshot() -> Snapshot:
    """A snapshot in which every metric has a value."""
    durations = latency.from_counts([1] * (len(latency.BOUNDS_NS) + 1), 5_000_000_000)
    queue = QueueStats(
        queue=1,
        requests=OpCounts(read=3, write=2, flush=1),
        bytes=OpCounts(read=12288, write=8192),
        failed=OpCounts(write=4),
        oldest_request_s=2.5,
        in_flight=5,
        buffers_held=6,
        latency=Latencies(read=durations, buffer_wait=durations, backend=durations),
        counters={"replays": 7, "buffers_lent": 2, "violations": 8, "timeouts": 9},
    )
    stats = DeviceStats(
        name="vol0",
        queues=(queue,),
        pool=PoolStats(size_bytes=1 << 23, huge_bytes=1 << 21, buffer_count=20, free_count=14, lent_count=2),
        cut_offs={"silence": 3},
        clients=ClientStats(slice_bytes=4096, lent_count=1, resting_count=2, free_count=5),
    )
    status = DaemonStatus(
        version="1.2.3",
        processes=(ProcessStatus(role="supervisor", pid=1),),
        memory_bytes=7,
        memory_max_bytes=9,
        prepared=2,
        prepared_wanted=3,
    )
    usage = ProcessUsage(Owner("worker", "vol0", "1"), 1.5, 4096, 1000.25)
    return Snapshot(True, 0.25, ((device("vol0"), stats),), status, (usage,))


def samples(text: bytes, parse: Callable[[str], Any] = plain_text) -> dict[tuple[str, frozenset[Any]], float]:
    """Every sample by its name and labels."""
    found = [sample for family in parse(text.decode()) for sample in family.samples]
    by_key = {(each.name, frozenset(each.labels.items())): each.value for each in found}
    assert len(by_key) == len(found), "a sample comes twice"
    return by_key


def of(text: bytes, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset(labels.items())]


def test_the_document_has_the_table_of_all_metrics() -> None:
    rows = [
        f"| `{each.exposed}` | {each.kind} | {', '.join(f'`{label}`' for label in each.labels)} | "
        f"{each.help.removesuffix('.')} |"
        for each in FAMILIES
    ]
    document = (ROOT / "docs" / "METRICS.md").read_text().splitlines()
    assert [line for line in document if line.startswith("| `ublkpool_")] == rows


def test_names_have_base_units_and_one_prefix_and_help_is_a_sentence() -> None:
    assert len({each.name for each in FAMILIES}) == len(FAMILIES)
    for each in FAMILIES:
        assert each.name.startswith("ublkpool_")
        assert not each.name.endswith(("_total", "_info", "_count", "_sum", "_bucket", "_created"))
        assert not {"ms", "us", "ns", "kb", "mb", "percent"} & set(each.name.split("_"))
        assert each.help.endswith(".")
        assert "\n" not in each.help


def test_every_metric_has_a_value_in_both_formats() -> None:
    snapshot = full_snapshot()
    content_type, plain = render(snapshot, "")
    assert content_type.startswith("text/plain; version=0.0.4")
    content_type, text = render(snapshot, OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"# EOF\n")
    parse: Callable[[str], Any] = openmetrics
    exposed = {each.name for each in parse(text.decode())}
    assert exposed == {each.name for each in FAMILIES}
    assert samples(plain) == samples(text, openmetrics)


def test_the_values_are_those_of_the_daemon() -> None:
    _, text = render(full_snapshot(), "")
    queue = {"device": "vol0", "queue": "1"}
    assert of(text, "ublkpool_up") == 1
    assert of(text, "ublkpool_build_info", version="1.2.3") == 1
    assert of(text, "ublkpool_requests_total", op="read", **queue) == 3
    assert of(text, "ublkpool_requests_total", op="flush", **queue) == 1
    assert of(text, "ublkpool_request_bytes_total", op="write", **queue) == 8192
    assert of(text, "ublkpool_request_errors_total", op="write", **queue) == 4
    assert of(text, "ublkpool_oldest_request_age_seconds", **queue) == 2.5
    assert of(text, "ublkpool_device_cut_offs_total", device="vol0", reason="silence") == 3
    assert of(text, "ublkpool_device_cut_offs_total", device="vol0", reason="fence") == 0
    assert of(text, "ublkpool_requests_in_flight", **queue) == 5
    assert of(text, "ublkpool_buffers_held", **queue) == 6
    assert of(text, "ublkpool_replays_total", **queue) == 7
    assert of(text, "ublkpool_violations_total", **queue) == 8
    assert of(text, "ublkpool_timeouts_total", **queue) == 9
    assert of(text, "ublkpool_device_recoveries_total", device="vol0") == 2
    states = {
        each: of(text, "ublkpool_device_state", device="vol0", ublkpool_device_state=each)
        for each in ("waiting", "live", "quiesced", "recovering", "failed")
    }
    assert states == {"waiting": 0, "live": 1, "quiesced": 0, "recovering": 0, "failed": 0}
    pool = {
        each: of(text, "ublkpool_pool_buffers", device="vol0", state=each)
        for each in ("free", "stock", "lent")
    }
    assert pool == {"free": 14, "stock": 4, "lent": 2}
    slices = [
        of(text, "ublkpool_client_slices", device="vol0", state=each) for each in ("lent", "resting", "free")
    ]
    assert slices == [1, 2, 5]
    worker = {"role": "worker", **queue}
    assert of(text, "ublkpool_process_cpu_seconds_total", **worker) == 1.5
    assert of(text, "ublkpool_process_resident_memory_bytes", **worker) == 4096
    assert of(text, "ublkpool_process_start_time_seconds", **worker) == 1000.25


def test_what_a_device_does_not_have_has_no_value() -> None:
    alone = device("alone", answers="worker", size_bytes=None, backend=BackendStatus(), workers=())
    _, text = render(Snapshot(True, 0.0, ((alone, DeviceStats(name="alone", reason="no")),)), "")
    names = {name for name, _ in samples(text)}
    assert not names & {
        "ublkpool_device_backend_attached",
        "ublkpool_device_size_bytes",
        "ublkpool_client_slices",
        "ublkpool_requests_total",
        "ublkpool_build_info",
        "ublkpool_process_cpu_seconds_total",
    }
    assert of(text, "ublkpool_device_served", device="alone") == 1
    down = device("down", reason="no backend is attached, requests wait", backend=BackendStatus(kind="file"))
    _, text = render(Snapshot(True, 0.0, ((down, DeviceStats(name="down")),)), "")
    assert of(text, "ublkpool_device_served", device="down") == 0
    assert of(text, "ublkpool_device_backend_attached", device="down") == 0


def test_a_histogram_keeps_every_duration_below_the_bound_that_it_was_below() -> None:
    assert BUCKETS_S[0] == 1.024e-06
    assert all(upper == 2 * lower for lower, upper in pairwise(BUCKETS_S))
    buckets = (
        Bucket(1.024e-06, 1),
        Bucket(latency.BOUNDS_S[2], 10),
        Bucket(BUCKETS_S[5], 100),
        Bucket(None, 1000),
    )
    shown = distribution(Histogram(count=1111, sum_ns=2_500_000_000, buckets=buckets))
    assert shown.cumulative == (1, 11, 11, 11, 11, *[111] * (len(BUCKETS_S) - 5))
    assert (shown.total, shown.sum_s) == (1111, 2.5)
    assert distribution(Histogram()) == ((0,) * len(BUCKETS_S), 0, 0.0)
    _, text = render(full_snapshot(), "")
    labels = {"device": "vol0", "queue": "1"}
    everything = of(text, "ublkpool_backend_duration_seconds_bucket", le="+Inf", **labels)
    assert (
        everything
        == of(text, "ublkpool_backend_duration_seconds_count", **labels)
        == len(latency.BOUNDS_NS) + 1
    )
    assert of(text, "ublkpool_backend_duration_seconds_sum", **labels) == 5


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "application/openmetrics-text; version=x",
        "application/openmetrics-text; version=" + "9" * 5000,
        "text/plain; version=",
        "text/plain; version=1.0.0; escaping=no",
        ",;=,;;\xff",
    ],
)
def test_any_accept_header_gets_a_page(accept: str) -> None:
    content_type, text = render(Snapshot(False, 0.0), accept)
    assert b"ublkpool_up 0.0\n" in text
    assert "\n" not in content_type


def write_stat(proc: Path, pid: int, start: int, ticks: int = 0, pages: int = 0) -> None:
    (proc / str(pid)).mkdir(exist_ok=True)
    fields = ["0"] * 40
    fields[11], fields[12], fields[19], fields[21] = str(ticks), str(ticks), str(start), str(pages)
    (proc / str(pid) / "stat").write_text(f"{pid} (a ) b) S {' '.join(fields[1:])}")


def test_a_process_that_has_ended_or_has_another_s_number_is_left_out(tmp_path: Path) -> None:
    usages = Usages(tmp_path)
    status = device("vol0")
    for pid, start in ((99, 500), (100, 600), (101, 700)):
        write_stat(tmp_path, pid, start, ticks=os.sysconf("SC_CLK_TCK"), pages=3)
    found = usages.of([status], None, asked_ticks=1000)
    assert [each.owner for each in found] == [
        ("worker", "vol0", "0"),
        ("worker", "vol0", "1"),
        ("backend", "vol0", ""),
    ]
    assert {each.cpu_s for each in found} == {2.0}
    assert {each.resident_bytes for each in found} == {3 * os.sysconf("SC_PAGE_SIZE")}
    assert math.isclose(found[1].start_s - found[0].start_s, 100 / os.sysconf("SC_CLK_TCK"), abs_tol=1e-5)
    # 100 is another process now, 101 has ended, and 99 began after the daemon was asked.
    write_stat(tmp_path, 100, 650)
    (tmp_path / "101" / "stat").unlink()
    assert usages.of([status], None, asked_ticks=400) == []
    assert [each.owner.role for each in usages.of([status], None, asked_ticks=1000)] == ["backend"]
    (tmp_path / "99" / "stat").write_text("")
    assert usages.of([status], None, asked_ticks=1000) == []


def test_each_exporter_finds_the_same_start_of_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stat").write_text("cpu  1 2 3\nbtime 1795700000\nprocesses 9\n")
    write_stat(tmp_path, 99, start=250 * os.sysconf("SC_CLK_TCK"))
    status = DaemonStatus(version="1", processes=(ProcessStatus(role="supervisor", pid=99),))
    now_s = time.time()
    for passed_s in (0.0, 0.4, 0.9):
        monkeypatch.setattr(time, "time", lambda passed_s=passed_s: now_s + passed_s)
        (usage,) = Usages(tmp_path).of([], status, asked_ticks=1 << 60)
        assert usage.start_s == 1795700250.0


def test_without_the_kernels_boot_time_a_process_has_a_start_all_the_same(tmp_path: Path) -> None:
    write_stat(tmp_path, 99, start=0)
    status = DaemonStatus(version="1", processes=(ProcessStatus(role="supervisor", pid=99),))
    (usage,) = Usages(tmp_path).of([], status, asked_ticks=1 << 60)
    assert abs(usage.start_s - (time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))) < 60


def test_a_process_of_this_machine_has_time_and_memory() -> None:
    usages = Usages()
    status = DaemonStatus(version="1", processes=(ProcessStatus(role="supervisor", pid=os.getpid()),))
    (usage,) = usages.of([], status, usages.ticks())
    assert usage.owner == ("supervisor", "", "")
    assert usage.cpu_s > 0
    assert usage.resident_bytes > 1 << 20


def test_a_scrape_has_every_device_of_the_daemon(daemon: FakeDaemon) -> None:
    for name in ("a", "b"):
        config = DeviceConfig(name=name, size_bytes=1 << 30, backend=BackendConfig(kind="memory"))
        daemon.call(daemon.service.add(config, lambda text: None))

    async def test() -> None:
        snapshot = await by_path(daemon.run_dir).take()
        assert (snapshot.is_up, snapshot.trouble) == (True, "")
        assert [(status.name, stats.name) for status, stats in snapshot.devices] == [("a", "a"), ("b", "b")]
        assert snapshot.daemon is not None
        assert snapshot.daemon.version == "1.2.3"
        assert [each.owner.role for each in snapshot.processes] == ["supervisor"]

    in_loop(test)


def test_a_daemon_that_comes_back_is_up_again(tmp_path: Path) -> None:
    async def taken(scraped: Source) -> bool:
        return (await scraped.take()).is_up

    scraped = by_path(tmp_path)
    with asyncio.Runner() as runner:
        assert not runner.run(taken(scraped))
        with running_daemon(tmp_path):
            assert runner.run(taken(scraped))
        assert not runner.run(taken(scraped))
        with running_daemon(tmp_path):
            assert runner.run(taken(scraped))


def test_a_watcher_s_connection_may_only_look(daemon: FakeDaemon) -> None:
    ours, theirs = socket.socketpair()
    serving = asyncio.run_coroutine_threadsafe(daemon.server.serve_watcher(ours), daemon.loop)
    with theirs:
        theirs.settimeout(DEADLINE_S)
        lines = theirs.makefile("rb")
        for request in (b'{"v":1,"op":"stop"}\n', b'{"v":1,"op":"del","names":null}\n'):
            theirs.sendall(request)
            assert b"this connection may only look" in lines.readline()
        theirs.sendall(b'{"v":1,"op":"list"}\n')
        assert lines.readline() == b'{"ok":true,"result":[]}\n'
        lines.close()
    serving.result(DEADLINE_S)
    assert not daemon.service.stopped


def test_a_hung_daemon_is_down_and_its_late_answers_are_not_taken_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "DEADLINE_S", 0.05)

    async def test() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        scraped = by_connection(await open_streams(ours))
        for _ in range(3):
            snapshot = await scraped.take()
            assert not snapshot.is_up
            assert "has not answered" in snapshot.trouble
        # It was asked once: what it owes is awaited before it is asked again.
        assert theirs.recv(4096).count(b"\n") == 1
        monkeypatch.setattr(source, "DEADLINE_S", DEADLINE_S)
        late = b'{"ok":true,"result":[{"late":true}]}\n'
        theirs.sendall(late)
        taking = asyncio.ensure_future(scraped.take())
        loop = asyncio.get_running_loop()
        for answer in (b'{"ok":true,"result":[]}\n', b'{"ok":false,"error":"unknown","status":2}\n'):
            assert (await loop.sock_recv(theirs, 4096)).endswith(b"\n")
            theirs.sendall(answer)
        snapshot = await taking
        assert (snapshot.is_up, snapshot.devices, snapshot.daemon) == (True, (), None)
        theirs.close()
        assert not (await scraped.take()).is_up
        assert not (await scraped.take()).is_up

    in_loop(test)


@pytest.mark.parametrize("answer", [b"garbage\n", b"\xff\n", b'{"ok":true,"result":5}\n', b'{"ok":true', b""])
def test_a_daemon_that_answers_nonsense_is_down(answer: bytes, tmp_path: Path) -> None:
    async def test() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(answer)
            writer.close()

        server = await asyncio.start_unix_server(serve, tmp_path / "admin.sock")
        async with server:
            snapshot = await by_path(tmp_path).take()
        assert not snapshot.is_up
        assert snapshot.trouble

    in_loop(test)


@pytest.mark.parametrize(
    ("answer", "is_broken"),
    [
        (b"nonsense\n", True),
        (b'{"ok":true,"result":5}\n', True),
        (b"\xff\n", True),
        (b'{"ok":true', False),
        (b"", False),
    ],
    ids=["no JSON", "no list", "binary", "cut short", "hung up"],
)
def test_the_only_connection_is_broken_by_nonsense_and_not_by_the_daemons_end(
    answer: bytes, is_broken: bool
) -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        scraped = by_connection(await open_streams(ours))

        async def answered() -> None:
            with theirs, suppress(ConnectionError):
                await asyncio.get_running_loop().sock_recv(theirs, 4096)
                await asyncio.get_running_loop().sock_sendall(theirs, answer)

        answering = asyncio.ensure_future(answered())
        for _ in range(2):
            assert not (await scraped.take()).is_up
        assert scraped.broken.is_set() == is_broken
        await answering

    in_loop(test)


def test_scrapes_at_once_and_soon_after_share_one_question_to_the_daemon() -> None:
    async def test() -> None:
        taken = 0
        now_s = 100.0
        gate = asyncio.Event()

        async def take() -> Snapshot:
            nonlocal taken
            taken += 1
            await gate.wait()
            return Snapshot(True, float(taken))

        pages = Pages(take, lambda: now_s)
        given_up = asyncio.ensure_future(pages.page("", False))
        asked = [asyncio.ensure_future(pages.page("", False)) for _ in range(20)]
        await asyncio.sleep(0)
        given_up.cancel()
        gate.set()
        found = await asyncio.gather(*asked)
        assert taken == 1
        assert len({id(each.body) for each in found}) == 1
        # Headers of all kinds fill no memory.
        for number in range(20):
            await pages.page(f"x/{number}", False)
        assert len(pages._texts) <= 4
        assert taken == 1
        compressed = await pages.page("", True)
        assert compressed.is_compressed
        assert len(compressed.body) < len(found[0].body)
        now_s += 1.0
        assert b"duration_seconds 2.0\n" in (await pages.page("", False)).body
        assert taken == 2

    in_loop(test)


def test_a_daemon_that_is_down_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        found = iter(
            [Snapshot(False, 0, trouble="gone"), Snapshot(False, 0, trouble="gone"), Snapshot(True, 0)]
        )
        now_s = 0.0

        async def take() -> Snapshot:
            return next(found)

        pages = Pages(take, lambda: now_s)
        for _ in range(3):
            now_s += 10
            await pages.page("", False)

    with caplog.at_level("INFO", "ublkpool.metrics"):
        in_loop(test)
    assert caplog.messages == ["the daemon does not answer: gone", "the daemon answers again"]
