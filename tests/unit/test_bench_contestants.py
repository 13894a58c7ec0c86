"""The table of contestants, and the order of the rounds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest
from bench import measure as measuring
from bench import nbd_clients, ours
from bench.accounts import Books, Cpu
from bench.cells import CELLS, NBD_CELLS, RBD_CELLS, Cell, FioError, FioNumbers
from bench.contestants import (
    ALONE,
    INSIDE,
    PEERS,
    ZERO_COPY,
    Contestant,
    contestants,
    nbd_contestants,
    ours_over,
    quick,
    rbd_contestants,
    table_of,
)
from bench.measure import measure
from bench.ours import transports
from bench.peers import has_zero_copy
from bench.rbd_results import RBD_BASELINE
from bench.results import CLUSTER, Result
from bench.stage import NBDKIT, Disk, Disks, Stage, StageError, put_to_sleep, wake_up
from bench.syscalls import SyscallsError
from bench.targets import TARGETS

from support.vm.daemon import eventually


def test_names_are_unique_and_so_are_the_names_of_their_devices() -> None:
    table = contestants(["zeromq", "ring"])
    assert len({each.name for each in table}) == len({each.slug for each in table}) == len(table)


def test_each_of_ours_runs_over_each_transport() -> None:
    table = contestants(["zeromq", "ring"])
    kinds = {over: {each.kind for each in table if each.transport == over} for over in ("zeromq", "ring")}
    assert kinds["zeromq"] == kinds["ring"] and "null, backend" in kinds["ring"]


def test_without_the_option_there_is_one_transport() -> None:
    assert transports("--device NAME") == [""]
    assert transports("--transport [auto|ring|zeromq]") == ["zeromq", "ring"]


def test_only_selects_contestants_by_name() -> None:
    assert [each.name for each in contestants([""], "^kublk null")] == ["kublk null", "kublk null -g"]


def test_zero_copy_is_measured_where_the_kernel_has_it() -> None:
    extra = {each.name for each in contestants([""], with_zero_copy=True)} - {
        each.name for each in contestants([""])
    }
    assert extra == {each.name for each in ZERO_COPY} >= {"kublk loop -z", "file inside zero copy"}
    assert has_zero_copy("7.3.4+deb13-cloud-amd64") and has_zero_copy("6.16.1")
    assert not has_zero_copy("6.12.107+deb13") and not has_zero_copy("6.1.0") and not has_zero_copy("")


def test_quick_has_all_contestants_of_the_targets() -> None:
    names = {(each.kind, each.transport) for each in quick(contestants(["zeromq", "ring"]))}
    for target in TARGETS:
        assert (target.baseline, "") in names
        assert {(kind, target.transport) for kind in target.kinds} <= names
    assert len(names) < len(contestants(["zeromq", "ring"])) * 3 / 4


def test_quick_has_all_of_ours_with_one_transport() -> None:
    assert {each.name for each in quick(contestants([""]))} >= {each.name for each in ours_over("")}


def test_every_target_names_existing_contestants() -> None:
    kinds = {each.kind for each in (*PEERS, *ALONE, *INSIDE, *ours_over("ring"))}
    for target in TARGETS:
        assert {target.baseline, *target.kinds} <= kinds


@pytest.mark.parametrize("part", ["daemon", NBDKIT, CLUSTER])
def test_all_contestants_but_the_measured_one_are_stopped(part: str) -> None:
    with Popen(["sleep", "60"]) as own, Popen(["sleep", "60"]) as shared:
        disks = Disks(Disk("/dev/x", {"server": [own.pid], part: [shared.pid]}))
        put_to_sleep(disks)
        eventually(lambda: _state(own.pid) == "T", "the server sleeps")
        eventually(lambda: _state(shared.pid) == "S", "the other does what it did")
        wake_up(disks)
        eventually(lambda: _state(own.pid) == "S", "the server goes on")
        own.kill()
        shared.kill()
        own.wait()
        wake_up(disks)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_depth_1_may_have_a_disk_of_its_own() -> None:
    disk, single = Disk("/dev/nbd0", {}), Disk("/dev/nbd1", {})
    assert [Disks(disk, single).disk_for(cell).node for cell in CELLS] == ["/dev/nbd1", *["/dev/nbd0"] * 3]
    assert Disks(disk, single).all() == [disk, single]
    assert Disks(disk).all() == [disk]


class Course:
    """Contestants that only record what is done with them; some fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: tuple[str, str] = ("", "")) -> None:
        self.runs: list[tuple[str, str]] = []
        self.stopped: list[str] = []
        self._fails = fails
        monkeypatch.setattr(measuring, "run_fio", self._run_fio)
        monkeypatch.setattr(measuring, "syscalls_of", self._syscalls_of)
        monkeypatch.setattr(measuring, "idle_load", lambda seconds: 0.0)
        self.kernel_counts = True

    def contestant(self, name: str, starts: bool = True) -> Contestant:
        @contextmanager
        def start(stage: Stage, slug: str) -> Iterator[Disks]:
            if not starts:
                raise StageError("no such module")
            yield Disks(Disk(name, {}))
            self.stopped.append(name)

        return Contestant(name, start, "kernel", "")

    def _run_fio(self, disk: Disk, cell: Cell, runtime_s: float) -> tuple[FioNumbers, tuple[Books, Books]]:
        if (disk.node, cell.name) == self._fails:
            raise FioError("fio ended with 1")
        self.runs.append((disk.node, cell.name))
        books = [
            Books(Cpu(0.0, 0.0), {"fio": Cpu(0.0, 0.0)}, 0),
            Books(Cpu(1.0, 2.0), {"fio": Cpu(0.5, 0.5)}, 1000),
        ]
        return FioNumbers(1000.0, 4096e3, 10.0), (books[0], books[1])

    def _syscalls_of(self, disk: Disk, cell: Cell, runtime_s: float) -> dict[str, float]:
        if not self.kernel_counts:
            raise SyscallsError("no histogram triggers")
        return {"server": 2.0}

    def measure(self, *table: Contestant, exact: bool = False, mode: str = "quick") -> Result:
        result = Result(
            kernel="", date="", mode=mode, cpus=2, emulated=True, exact=exact, rounds=2, runtime_s=1.0
        )
        stage = Stage(Path("/nowhere"), Path("/nowhere"))
        measure(stage, table, result, lambda text: None, lambda each: None)
        return result


def test_a_cell_runs_on_every_contestant_before_the_next_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch)
    course.measure(course.contestant("a"), course.contestant("b"))
    cells = [cell for _, cell in course.runs]
    assert cells == [cell.name for _ in range(2) for cell in CELLS for _ in "ab"]
    assert [name for name, _ in course.runs[:2]] != [name for name, _ in course.runs[-2:]]
    assert sorted(course.stopped) == ["a", "b"]


def test_cpu_time_is_counted_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch)
    sample = course.measure(course.contestant("a")).samples[0]
    assert (sample.machine_us, sample.parts_us) == (3000.0, {"fio": (500.0, 500.0)})


def test_system_calls_are_counted_in_runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch)
    result = course.measure(course.contestant("a"))
    assert [(each.cell, each.parts) for each in result.syscalls] == [
        (cell.name, {"server": 2.0}) for cell in CELLS[:2]
    ]


def test_an_exact_run_does_not_count_system_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch)
    assert course.measure(course.contestant("a"), exact=True).syscalls == []


def test_a_kernel_that_cannot_count_fails_no_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch)
    course.kernel_counts = False
    result = course.measure(course.contestant("a"))
    assert result.syscalls == [] and not result.failed


def test_a_contestant_that_does_not_start_is_reported_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    course = Course(monkeypatch)
    result = course.measure(course.contestant("a", starts=False), course.contestant("b"))
    assert result.failed
    assert [(each.name, each.error) for each in result.parties if each.error] == [
        ("a", "StageError: no such module")
    ]
    assert len(result.samples) == 2 * len(CELLS)


def test_a_contestant_that_fails_later_is_stopped_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    course = Course(monkeypatch, fails=("a", CELLS[1].name))
    result = course.measure(course.contestant("a"), course.contestant("b"))
    assert course.stopped == ["a", "b"]
    assert [each.contestant for each in result.samples].count("a") == 1
    assert [each.contestant for each in result.samples].count("b") == 2 * len(CELLS)
    assert [each.name for each in result.parties if each.error] == ["a"]


def test_mode_nbd_runs_its_own_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch)
    course.measure(course.contestant("a"), mode="nbd")
    assert [cell for _, cell in course.runs] == [cell.name for _ in range(2) for cell in NBD_CELLS]


def test_mode_rbd_runs_its_own_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch)
    course.measure(course.contestant("a"), mode="rbd")
    assert [cell for _, cell in course.runs] == [cell.name for _ in range(2) for cell in RBD_CELLS]


def test_mode_rbd_has_each_client_of_a_cluster_and_ours_over_the_faster_transport() -> None:
    peers = ["rbd-nbd", RBD_BASELINE, "rbd-nbd, our settings", "qemu-nbd", "krbd"]
    names = [each.name for each in rbd_contestants(["zeromq", "ring"])]
    ours = ["rbd, ring", "rbd, ceph_defaults=on, ring", "rbd, inside", "rbd, inside, lent"]
    assert names == [*peers, *ours]
    assert all(each.stores for each in rbd_contestants(["ring"])), (
        "each has its image's lock before it is measured"
    )
    assert [each.name for each in rbd_contestants([""], "^rbd$")] == ["rbd"]


def test_each_mode_has_its_own_table() -> None:
    assert {each.name for each in table_of("rbd", ["ring"])} & {"krbd", "nbd-client", "loop"} == {"krbd"}
    assert {each.name for each in table_of("nbd", ["ring"])} & {"krbd", "nbd-client", "loop"} == {
        "nbd-client"
    }
    assert {each.name for each in table_of("full", ["ring"])} & {"krbd", "nbd-client", "loop"} == {"loop"}


def test_clients_that_a_cluster_must_hear_are_never_stopped() -> None:
    with Popen(["sleep", "60"]) as own:
        disks = Disks(Disk("/dev/x", {"server": [own.pid]}), may_sleep=False)
        put_to_sleep(disks)
        # A stopped process would not end.
        own.terminate()
        own.wait(10)
    assert own.returncode == -15


def test_a_shared_context_is_entered_once_and_left_with_the_stage(tmp_path: Path) -> None:
    seen: list[str] = []

    @contextmanager
    def make() -> Iterator[int]:
        seen.append("entered")
        yield 7
        seen.append("left")

    with Stage(tmp_path, Path("/nowhere")) as stage:
        assert stage.shared_context("one", make) == stage.shared_context("one", make) == 7
        assert seen == ["entered"]
    assert seen == ["entered", "left"]


def test_mode_nbd_has_the_kernels_client_and_ours_over_each_transport() -> None:
    table = nbd_contestants(["zeromq", "ring"])
    assert {(each.kind, each.transport) for each in table} == {
        ("nbd-client", ""),
        *((kind, over) for kind in ("nbd", "nbd, unflushed=0") for over in ("zeromq", "ring")),
    }
    assert len({each.slug for each in table}) == len(table)
    assert [each.name for each in nbd_contestants(["ring"], "^nbd, ring")] == ["nbd, ring"]


def test_a_shared_process_is_started_once_and_ends_with_the_stage(tmp_path: Path) -> None:
    with Stage(tmp_path, Path("/nowhere")) as stage:
        pid = stage.shared_process("one", ["sleep", "60"])
        assert (
            stage.shared_process("one", ["sleep", "60"])
            == pid
            != stage.shared_process("two", ["sleep", "60"])
        )
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()


def test_the_clients_of_mode_nbd_are_at_one_server_with_as_many_connections_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, configs = [], []

    @contextmanager
    def client(socket: Path) -> Iterator[str]:
        commands.append(socket)
        yield "/dev/nbd0"

    def backend(kind: str, **config: object) -> ours.Start:
        configs.append((kind, config))

        @contextmanager
        def start(stage: Stage, name: str) -> Iterator[Disks]:
            yield Disks(Disk("/dev/ublkb0", {"worker": [1], "backend": [2]}, name))

        return start

    monkeypatch.setattr(nbd_clients, "load_module", lambda name: None)
    monkeypatch.setattr(nbd_clients, "nbd_client", client)
    monkeypatch.setattr(nbd_clients, "shared_nbdkit", lambda stage: (stage.directory / "shared.sock", 3))
    monkeypatch.setattr(ours, "backend", backend)
    stage, parts = Stage(tmp_path, Path("/nowhere")), {}
    for each in nbd_contestants(["ring"]):
        with each.start(stage, each.slug) as disks:
            parts[each.kind] = disks.all()[0].parts
    socket = tmp_path / "shared.sock"
    assert commands == [socket]
    assert configs == [
        ("nbd", {"transport": "ring", "options": {"socket": socket, "connections": ours.QUEUES}}),
        (
            "nbd",
            {"transport": "ring", "options": {"socket": socket, "connections": ours.QUEUES, "unflushed": 0}},
        ),
    ]
    ours_have = {"worker": [1], "backend": [2], NBDKIT: [3]}
    assert parts == {"nbd-client": {NBDKIT: [3]}, "nbd": ours_have, "nbd, unflushed=0": ours_have}
