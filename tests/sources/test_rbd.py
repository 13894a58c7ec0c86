"""The backend rbd against a real cluster: operations, deaths, who may write, growth, trouble of the cluster."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pytest

from support.ceph.cluster import POOL, Cluster, Shape
from support.ceph.serving import host, options, said
from support.fakes.worker import DEADLINE_S, FakeWorker, finish
from support.stopping import stop
from ublkpool.bufpool import wire
from ublkpool.bufpool.wire import Flag, Kind, Op
from ublkpool.testing import Report
from ublkpool.testing import check_backend as check_backend

BLOCK = 4096
SIZE_BYTES = 16 << 20
EXPIRE_S = 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    shape = Shape(stores=("memstore",), replicas=1, settings={"mon_allow_pool_size_one": "true"})
    with Cluster(tmp_path_factory.mktemp("ceph") / "cluster", shape) as cluster:
        yield cluster


@pytest.fixture
def image(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A new image's name."""
    name = f"i{abs(hash(request.node.nodeid)) % 10**8}"
    cluster.rbd("create", "--size", f"{SIZE_BYTES >> 20}M", f"{POOL}/{name}")
    yield name


@pytest.fixture(params=["zeromq", "ring"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(FakeWorker, "transport", request.param)
    return str(request.param)


def block(number: int) -> bytes:
    return number.to_bytes(4, "big") * (BLOCK // 4)


def until(what: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < give_up_s
        time.sleep(0.05)


def test_every_operation_reaches_the_image(
    cluster: Cluster, image: str, tmp_path: Path, transport: str
) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        attach = a.serve()
        assert (attach.size_bytes, attach.volatile_cache, attach.read_only) == (SIZE_BYTES, True, False)
        for number in range(8):
            assert a.worker.write(number * BLOCK, block(number), flags=Flag.FUA if number % 2 else 0) == BLOCK
        assert a.worker.do(Op.FLUSH) == 0
        assert a.worker.do(Op.WRITE_ZEROES, 0, BLOCK) == 0
        assert a.worker.do(Op.WRITE_ZEROES, BLOCK, BLOCK, flags=Flag.NOUNMAP | Flag.FUA) == 0
        assert a.worker.do(Op.DISCARD, 4 << 20, 4 << 20) == 0
        assert a.worker.read(0, 4 * BLOCK) == bytes(2 * BLOCK) + block(2) + block(3)
        a.stop()
    exported = tmp_path / "exported"
    cluster.rbd("export", f"{POOL}/{image}", str(exported))
    assert exported.read_bytes()[: 8 * BLOCK] == bytes(2 * BLOCK) + b"".join(map(block, range(2, 8)))


def test_every_promise_is_kept_over_kills_stops_and_fences(
    cluster: Cluster, image: str, check_backend: Callable[..., Report]
) -> None:
    report = check_backend("rbd", options(cluster, image), seconds=0, seed=35, deadline_s=60)
    assert min(report.counts["kill"], report.counts["fence"]) >= 2, "once over each transport"
    assert report.counts["stop"] >= 3


def test_the_lock_is_kept_from_every_other_client_and_given_back_at_the_end(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        attach = a.serve()
        status = cluster.rbd("lock", "ls", f"{POOL}/{image}")
        assert attach.owner in status
        a.stop()
    assert cluster.rbd("lock", "ls", f"{POOL}/{image}") == ""


def test_a_successor_of_a_killed_backend_serves_at_once_and_the_dead_one_is_excluded(
    cluster: Cluster, image: str, tmp_path: Path, transport: str
) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        before = a.serve()
        assert a.worker.write(0, block(1)) == BLOCK
        a.kill()
        began_s = time.monotonic()
        after = a.serve()
        assert a.worker.write(BLOCK, block(2)) == BLOCK
        # By itself the cluster takes 30 s to notice the death.
        assert time.monotonic() - began_s < 25
        assert a.worker.read(0, 2 * BLOCK) == block(1) + block(2)
        assert after.identity == before.identity and after.owner != before.owner
        listed = cluster.commands({"prefix": "osd blocklist ls"})[0]
        assert before.owner in listed and after.owner not in listed
        a.stop()


def test_a_backend_killed_between_its_lock_and_its_attach_costs_its_successor_no_waiting(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        for _ in range(2):
            a.start()
            unanswered = a.worker.receive_attach()
            a.kill()
            assert a.owner != unanswered.owner, "the daemon has no such owner on record"
        began_s = time.monotonic()
        after = a.serve()
        # By itself the cluster takes 30 s to notice the death.
        assert time.monotonic() - began_s < 25
        assert a.worker.write(0, block(1)) == BLOCK
        listed = cluster.commands({"prefix": "osd blocklist ls"})[0]
        assert unanswered.owner in listed and after.owner not in listed
        a.stop()


def test_killed_under_load_again_and_again_no_answered_write_is_lost(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    kills_under_load(cluster, image, tmp_path, 3)


@pytest.mark.long
def test_killed_under_load_fifty_times_no_answered_write_is_lost(
    cluster: Cluster, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waits_s = kills_under_load(cluster, image, tmp_path, 50)
    with capsys.disabled():
        print(
            f"\nrbd: {len(waits_s)} kills under load; first answer after a kill: "
            f"median {median(waits_s):.2f} s, {min(waits_s):.2f} to {max(waits_s):.2f} s"
        )


def kills_under_load(cluster: Cluster, image: str, tmp_path: Path, times: int) -> list[float]:
    """Write each tag's own block with rising numbers; what was unanswered is sent again to the successor.

    For each kill the seconds until all of that was answered.
    """
    tags, waits_s = range(16), []
    with host(tmp_path / "a", cluster, image) as a:
        a.serve()
        wanted = dict.fromkeys(tags, 0)
        for turn in range(times):
            for _ in range(5 + turn % 7):
                write_all(a.worker, wanted)
            sent = start_all(a.worker, wanted)
            began_s = time.monotonic()
            a.kill()
            a.worker.hang_up()
            a.serve()
            # The worker's part: the same requests again, in their order.
            a.worker.send(0, [each._replace(flags=each.flags | Flag.REPLAY) for each in sent])
            answered(a.worker, len(sent))
            waits_s.append(time.monotonic() - began_s)
            for tag in tags:
                assert a.worker.read(tag * BLOCK, BLOCK, tag=tag) == block(wanted[tag]), (turn, tag)
        a.stop()
    return waits_s


def start_all(worker: FakeWorker, wanted: dict[int, int]) -> list[wire.Descriptor]:
    sent = []
    for tag in wanted:
        wanted[tag] += 1
        request = worker.describe(Kind.REQUEST, Op.WRITE, tag * BLOCK, BLOCK, tag=tag)
        worker.pool[request.buffer : request.buffer + BLOCK] = block(wanted[tag])
        sent.append(request)
    worker.send(0, sent)
    return sent


def answered(worker: FakeWorker, count: int) -> None:
    for _ in range(count):
        answer = worker.receive()
        assert (answer.kind, answer.result) == (Kind.DONE, BLOCK)


def write_all(worker: FakeWorker, wanted: dict[int, int]) -> None:
    answered(worker, len(start_all(worker, wanted)))


def test_another_host_takes_over_on_command_only_and_the_first_one_ends_with_the_reason(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    with host(tmp_path / "a", cluster, image) as a, host(tmp_path / "b", cluster, image) as b:
        a.serve()
        assert a.worker.write(0, block(1)) == BLOCK
        b.takes_over = True
        b.serve()
        assert b.worker.read(0, BLOCK) == block(1)
        assert b.worker.write(0, block(2)) == BLOCK
        excluded = said(a.worker)
        assert (
            isinstance(excluded, wire.Excluded)
            and "another client has taken the image over" in excluded.reason
        )
        assert a.process is not None
        status, log = finish(a.process)
        assert status != 0 and "blocklisted" in log
        b.stop()


@pytest.mark.long
def test_a_host_that_comes_back_waits_for_the_one_that_took_over_and_says_who_it_is(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    with host(tmp_path / "a", cluster, image) as a, host(tmp_path / "b", cluster, image) as b:
        a.serve()
        b.takes_over = True
        b.serve()
        assert a.process is not None
        finish(a.process)
        # Its owner is on record, and the lock is another's.
        again = a.start()
        a.worker.answer_question()
        status, log = finish(again)
        assert status != 0 and f"locked by {b.owner}" in log and "--take-over" in log
        assert b.worker.write(0, block(2)) == BLOCK
        b.stop()


def test_an_image_that_another_host_has_served_meanwhile_is_not_served_to_a_disk_that_was_there(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    with host(tmp_path / "a", cluster, image) as a, host(tmp_path / "b", cluster, image) as b:
        a.serve()
        a.kill()
        b.takes_over = True
        b.serve()
        b.stop()
        # The lock is free, and A's clients know data from before.
        again = a.start()
        a.worker.described = {**a.worker.described, "path": "/dev/ublkb0"}
        a.worker.answer_question()
        status, log = finish(again)
        assert status != 0 and f"{b.owner} has served the image since" in log
        # Another disk, whose clients know nothing yet.
        a.serve()
        a.stop()


def test_a_write_that_is_on_its_way_while_another_host_takes_over_is_refused(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    with host(tmp_path / "a", cluster, image) as a, host(tmp_path / "b", cluster, image) as b:
        a.serve()
        assert a.process is not None
        late = a.worker.describe(Kind.REQUEST, Op.WRITE, 0, BLOCK)
        a.worker.pool[late.buffer : late.buffer + BLOCK] = block(1)
        stop(a.process.pid)
        a.worker.send(0, [late])
        b.takes_over = True
        b.serve()
        assert b.worker.write(0, block(2)) == BLOCK
        os.kill(a.process.pid, signal.SIGCONT)
        assert isinstance(said(a.worker), wire.Excluded)
        finish(a.process)
        assert b.worker.read(0, BLOCK) == block(2)
        assert a.worker.is_silent(), "the late write was not answered"
        b.stop()


def test_a_client_that_hears_nothing_ends_before_the_cluster_may_forget_it(
    image: str, cluster: Cluster, tmp_path: Path
) -> None:
    with host(tmp_path / "a", cluster, image, blocklist_expire=str(EXPIRE_S)) as a:
        a.serve()
        assert a.process is not None
        stopped = stopped_servers(cluster)
        began_s = time.monotonic()
        try:
            status, log = finish(a.process)
        finally:
            stopped()
        assert status == -signal.SIGKILL, log
        assert time.monotonic() - began_s < EXPIRE_S
        assert "not heard from the cluster" in log
        a.serve()
        a.stop()


def stopped_servers(cluster: Cluster) -> Callable[[], None]:
    """Stop every process of the cluster, as a network that is cut would; call the result to let them go on."""
    pids = [pid for pid, _ in cluster.servers.recorded().values()]
    for pid in pids:
        stop(pid)

    def go_on() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    return go_on


def test_a_cluster_that_does_not_answer_is_a_pause(
    cluster: Cluster, image: str, tmp_path: Path, transport: str
) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        a.serve()
        assert a.worker.write(0, block(1)) == BLOCK
        go_on = stopped_servers(cluster)
        try:
            wanted = dict.fromkeys(range(16), 1)
            sent = start_all(a.worker, wanted)
            assert a.worker.is_silent(for_s=2)
        finally:
            go_on()
        answered(a.worker, len(sent))
        assert a.worker.read(0, BLOCK) == block(2)
        a.stop()


def test_a_full_cluster_is_a_pause_for_writes(cluster: Cluster, image: str, tmp_path: Path) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        a.serve()
        piece = os.urandom(64 << 10)
        for at in range(0, SIZE_BYTES, len(piece)):
            assert a.worker.write(at, piece) == len(piece)
        try:
            set_full_ratio(cluster, 0.001)
            until(lambda: "1 full osd" in cluster.commands({"prefix": "health"})[0])
            request = a.worker.describe(Kind.REQUEST, Op.WRITE, 0, BLOCK)
            a.worker.pool[request.buffer : request.buffer + BLOCK] = block(3)
            a.worker.send(0, [request])
            assert a.worker.is_silent(for_s=2)
        finally:
            set_full_ratio(cluster, 0.95)
        answered(a.worker, 1)
        assert a.worker.read(0, BLOCK) == block(3)
        a.stop()


def set_full_ratio(cluster: Cluster, full: float) -> None:
    """From which part of its room on an OSD counts as full."""
    ratios = {"full": full, "backfillfull": full * 0.9, "nearfull": full * 0.8}
    cluster.commands(*({"prefix": f"osd set-{name}-ratio", "ratio": ratio} for name, ratio in ratios.items()))


def test_osds_and_monitors_that_die_and_come_back_cost_no_answered_write(tmp_path: Path) -> None:
    shape = Shape(stores=("memstore", "memstore"), replicas=2)
    with Cluster(tmp_path / "cluster", shape) as cluster, host(tmp_path / "a", cluster, "vol") as a:
        cluster.rbd("create", "--size", "16M", f"{POOL}/vol")
        a.serve()
        wanted = dict.fromkeys(range(16), 0)
        write_all(a.worker, wanted)
        sent = start_all(a.worker, wanted)
        # Requests for it wait until the monitor counts it as dead; one copy is enough then.
        cluster.kill("osd.1")
        answered(a.worker, len(sent))
        write_all(a.worker, wanted)
        cluster.revive("osd.1")
        cluster.wait_until_up(2)
        write_all(a.worker, wanted)
        # The data path does not need the monitor.
        cluster.kill("mon.a")
        write_all(a.worker, wanted)
        cluster.revive("mon.a")
        cluster.wait_until_up(2)
        write_all(a.worker, wanted)
        for tag, number in wanted.items():
            assert a.worker.read(tag * BLOCK, BLOCK, tag=tag) == block(number)
        a.stop()


def test_an_end_while_the_cluster_does_not_answer_is_bounded(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        a.serve()
        assert a.process is not None
        go_on = stopped_servers(cluster)
        try:
            a.worker.detach()
            status, log = finish(a.process)
        finally:
            go_on()
        assert status == 1 and "without giving the lock back" in log
        a.serve()
        a.stop()


def test_the_size_of_its_objects_is_the_length_that_an_image_prefers(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    small = f"{image}small"
    cluster.rbd("create", "--size", "16M", "--object-size", "512K", f"{POOL}/{small}")
    for name, object_bytes in ((image, 4 << 20), (small, 512 << 10)):
        with host(tmp_path / name, cluster, name) as a:
            assert a.serve().optimal_io_bytes == object_bytes
            a.stop()


def test_a_snapshot_is_read_only_and_stays_as_it_was(cluster: Cluster, image: str, tmp_path: Path) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        a.serve()
        assert a.worker.write(0, block(1)) == BLOCK
        cluster.rbd("snap", "create", f"{POOL}/{image}@before", "--no-progress")
        assert a.worker.write(0, block(2)) == BLOCK
        caps = {"mon": "profile rbd", "osd": f"profile rbd-read-only pool={POOL}"}
        cluster.add_client("reader", caps)
        with host(tmp_path / "b", cluster, image, snapshot="before", id="reader") as b:
            attach = b.serve()
            assert (attach.read_only, attach.owner, attach.discard_max_bytes) == (True, "", 0)
            assert b.worker.read(0, BLOCK) == block(1)
            b.stop()
            # Beside the writer, with its data of now.
            del b.given["snapshot"]
            b.given["readonly"] = "on"
            assert b.serve().read_only
            assert b.worker.read(0, BLOCK) == block(2)
            b.stop()
        a.stop()


def test_an_image_that_grows_is_announced_and_served_up_to_its_end(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        a.start()
        a.worker.described = {"former_owner": "", "knows_resize": True}
        assert a.worker.accept().resizes
        cluster.rbd("resize", "--size", f"{2 * SIZE_BYTES >> 20}M", f"{POOL}/{image}", "--no-progress")
        assert said(a.worker) == wire.Grown(size_bytes=2 * SIZE_BYTES)
        assert a.worker.write(2 * SIZE_BYTES - BLOCK, block(1)) == BLOCK
        a.worker.tell(wire.Resize(size_bytes=3 * SIZE_BYTES))
        assert said(a.worker) == wire.Resized(size_bytes=3 * SIZE_BYTES)
        assert a.worker.write(3 * SIZE_BYTES - BLOCK, block(2)) == BLOCK
        a.stop()


def test_a_resize_waits_for_a_cluster_that_does_not_answer_and_is_answered_when_it_does(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        a.start()
        a.worker.described = {"former_owner": "", "knows_resize": True}
        a.worker.accept()
        assert a.worker.write(0, block(1)) == BLOCK
        go_on = stopped_servers(cluster)
        try:
            for size_bytes in (2 * SIZE_BYTES, 3 * SIZE_BYTES):
                a.worker.tell(wire.Resize(size_bytes=size_bytes))
            refused = said(a.worker)
            assert isinstance(refused, wire.Resized) and "is still growing" in refused.reason
        finally:
            go_on()
        assert said(a.worker) == wire.Resized(size_bytes=2 * SIZE_BYTES)
        assert a.worker.write(2 * SIZE_BYTES - BLOCK, block(2)) == BLOCK
        a.stop()


def test_an_image_that_became_shorter_than_its_device_ends_the_backend(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        a.serve()
        assert a.process is not None
        cluster.rbd(
            "resize", "--size", f"{SIZE_BYTES >> 21}M", "--allow-shrink", f"{POOL}/{image}", "--no-progress"
        )
        until(lambda: str(SIZE_BYTES // 2) in cluster.rbd("info", f"{POOL}/{image}", "--format", "json"))
        a.worker.send(0, [a.worker.describe(Kind.REQUEST, Op.WRITE, SIZE_BYTES - BLOCK, BLOCK)])
        status, log = finish(a.process)
        assert status != 0 and "shorter than its device" in log


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"image": "none"}, "ublkpool volume create rbd pool=rbd image=none"),
        ({"pool": "none"}, "no such pool"),
        ({"snapshot": "none"}, "no such snapshot"),
        ({"conf": "/none/ceph.conf"}, "conf=/none/ceph.conf: configuration: No such file"),
        ({"id": "stranger"}, "as client.stranger"),
        ({"blocklist_expire": "-1"}, "blocklist_expire=-1"),
    ],
)
def test_what_cannot_be_served_is_one_clear_line(
    cluster: Cluster, image: str, tmp_path: Path, wrong: dict[str, str], words: str
) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        a.given = {**a.given, **wrong}
        process = a.start()
        if "blocklist_expire" not in wrong:
            a.worker.answer_question()
        _, log = finish(process)
        last = log.strip().splitlines()[-1]
        assert "BackendError: rbd: " in last and words in last


def test_an_image_without_a_lock_is_served_read_only_at_most(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    cluster.rbd("feature", "disable", f"{POOL}/{image}", "fast-diff", "object-map", "exclusive-lock")
    with host(tmp_path / "a", cluster, image) as a:
        process = a.start()
        a.worker.answer_question()
        assert f"rbd feature enable {POOL}/{image} exclusive-lock" in finish(process)[1]
        a.given = {**a.given, "readonly": "on"}
        assert a.serve().read_only
        a.stop()


def test_an_image_whose_own_settings_would_lose_writes_is_refused(
    cluster: Cluster, image: str, tmp_path: Path
) -> None:
    cluster.rbd("config", "image", "set", f"{POOL}/{image}", "rbd_cache", "true")
    with host(tmp_path / "a", cluster, image) as a:
        process = a.start()
        a.worker.answer_question()
        assert f"rbd config image rm {POOL}/{image} rbd_cache" in finish(process)[1]


def test_the_generation_is_on_record_in_the_image(cluster: Cluster, image: str, tmp_path: Path) -> None:
    with host(tmp_path / "a", cluster, image) as a:
        a.worker.generation = 7
        assert a.serve().generation_seen == 0
        a.stop()
        a.worker.hang_up()
        assert a.serve().generation_seen == 7
        a.stop()
