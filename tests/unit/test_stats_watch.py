"""`ublkpool stats --watch`: its loop under a clock of the test, its views, and the command as a process."""

import fcntl
import io
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from support.fakes.daemon import FakeDaemon, running_daemon
from ublkpool.daemon.cli import devices, watch_views
from ublkpool.daemon.cli.commands import INTERRUPTED, cli
from ublkpool.daemon.cli.reader import ReaderGone, print_text
from ublkpool.daemon.cli.render import format_duration, plain_text, stats_tables, terminal_size
from ublkpool.daemon.cli.watch import RETRY_S_MAX, Watch
from ublkpool.daemon.cli.watch_views import Blocks, JsonLines, Screen, fitting, make_view, rates_table
from ublkpool.daemon.errors import DaemonError, DaemonUnreachable, RemoteError
from ublkpool.daemon.latency import BOUNDS_NS, from_counts
from ublkpool.daemon.rates import Interval, Measured, Meter
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import DeviceStats, Latencies, OpCounts, QueueStats

COMMAND = (sys.executable, "-m", "ublkpool.daemon", "stats", "--watch", "0.1")
BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
DEADLINE_S = 120
HEADERS = [
    *("NAME", "R/S", "W/S", "R", "B/S", "W", "B/S", "R", "P50", "R", "P99", "W", "P50", "W", "P99"),
    *("ACTIVE", "OTHER/S", "ERRORS/S", "REASON"),
]
AWAY = DaemonUnreachable("no such socket")
GONE = RemoteError("vol0: no such device", 1)


def device(
    name: str = "vol0", reads: int = 0, reason: str = "", latency: Latencies | None = None
) -> DeviceStats:
    queue = QueueStats(
        queue=0,
        requests=OpCounts(read=reads),
        bytes=OpCounts(read=4096 * reads),
        in_flight=3,
        latency=latency or Latencies(),
    )
    return DeviceStats(name=name, reason=reason, queues=(queue,))


def latency_of(bucket: int, count: int) -> Latencies:
    counts = [0] * (len(BOUNDS_NS) + 1)
    counts[bucket] = count
    return Latencies(read=from_counts(counts, count))


class Ended(Exception):
    """The answers of the test are used up."""


class Script:
    """Answers in turn; the clock moves while the loop waits, and by `late_s` while it asks."""

    def __init__(self, answers: Sequence[DaemonError | list[DeviceStats]], late_s: dict[int, float]) -> None:
        self.answers = list(answers)
        self.late_s = late_s
        self.now_s = 1000.0
        self.asked_at: list[float] = []
        self.shown: list[Interval] = []
        self.said: list[str] = []

    def ask(self) -> list[DeviceStats]:
        if len(self.asked_at) == len(self.answers):
            raise Ended
        self.asked_at.append(self.now_s)
        answer = self.answers[len(self.asked_at) - 1]
        self.now_s += self.late_s.get(len(self.asked_at), 0.0)
        if isinstance(answer, DaemonError):
            raise answer
        return answer

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds

    def show(self, interval: Interval) -> None:
        self.shown.append(interval)

    def say(self, text: str) -> None:
        self.said.append(text)

    def rates(self) -> list[float | None]:
        found = [each.rates for interval in self.shown for each in interval.devices]
        return [rates.requests_per_s.read if rates else None for rates in found]


def played(
    *answers: DaemonError | list[DeviceStats], interval_s: float = 1.0, late_s: dict[int, float] | None = None
) -> Script:
    script = Script(answers, late_s or {})
    loop = Watch(script.ask, script, interval_s, lambda: script.now_s, script.wait, lambda: 0.0)
    with pytest.raises(Ended):
        loop.run()
    return script


def test_each_interval_is_read_at_its_end() -> None:
    script = played(*([device(reads=each)] for each in (0, 20, 60)), interval_s=2.0)
    assert script.asked_at == [1000.0, 1002.0, 1004.0]
    assert script.rates() == [None, 10.0, 20.0] and script.said == []
    assert [each.elapsed_s for each in script.shown] == [None, 2.0, 2.0]
    assert script.shown[0].time == "1970-01-01T00:00:00.000Z"


def test_a_late_answer_delays_no_later_reading_and_none_is_made_up_for() -> None:
    script = played(*([device(reads=100 * each)] for each in range(4)), late_s={2: 0.4, 3: 5.2})
    assert script.asked_at == pytest.approx([1000.0, 1001.0, 1002.0, 1008.0])
    assert script.rates() == [
        None,
        pytest.approx(100 / 1.4, abs=0.01),
        pytest.approx(100 / 5.8, abs=0.01),
        125.0,
    ]


def test_an_absent_daemon_is_told_of_once_and_waited_for() -> None:
    ended = DaemonUnreachable("the daemon ended before it answered; its log says why")
    script = played(
        [device()], [device(reads=5)], ended, AWAY, AWAY, [device(reads=90)], [device(reads=97)], AWAY
    )
    assert script.said == [f"{ended}; waiting for it", f"{AWAY}; waiting for it"]
    assert script.rates() == [None, 5.0, None, 7.0], "no interval has the absence in it"


def test_a_long_interval_does_not_delay_the_return() -> None:
    script = played([device()], AWAY, AWAY, [device(reads=1)], [device(reads=2)], interval_s=600.0)
    steps = [after - before for before, after in zip(script.asked_at, script.asked_at[1:], strict=False)]
    assert steps == [600.0, RETRY_S_MAX, RETRY_S_MAX, 600.0]


def test_a_device_that_is_gone_is_told_of_and_waited_for() -> None:
    script = played([device(reads=9)], GONE, GONE, [device(reads=1)], [device(reads=3)])
    assert script.said == ["vol0: no such device; waiting for it"]
    assert script.rates() == [None, None, 2.0]


def test_each_kind_of_absence_is_told_of() -> None:
    assert played([device()], GONE, AWAY, GONE).said == [
        f"{each}; waiting for it" for each in (GONE, AWAY, GONE)
    ]


@pytest.mark.parametrize("error", [AWAY, GONE])
def test_what_is_not_there_at_the_start_is_an_error(error: DaemonError) -> None:
    script = Script([error], {})
    with pytest.raises(type(error)):
        Watch(script.ask, script, 1.0, lambda: script.now_s, script.wait).run()
    assert script.said == []


def test_an_answer_that_makes_no_sense_is_not_waited_for() -> None:
    script = Script([[device()], DaemonError("the daemon's answer makes no sense")], {})
    with pytest.raises(DaemonError):
        Watch(script.ask, script, 1.0, lambda: script.now_s, script.wait).run()


def intervals(*readings: list[DeviceStats]) -> Iterator[Interval]:
    meter = Meter()
    for second, reading in enumerate(readings):
        yield meter.read(reading, float(second), f"T{second}")


def test_lines_of_json_are_of_whole_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    view = JsonLines()
    for each in intervals([device()], [device(reads=5), device("vol1")], [device(), device("vol1", 7)]):
        view.show(each)
    view.say("the daemon is away")
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(each["time"], each["name"], each["requests_per_s"]["read"]) for each in lines] == [
        ("T1", "vol0", 5.0),
        ("T2", "vol1", 7.0),
    ]
    assert err == "ublkpool: the daemon is away\n"


def test_there_is_a_block_for_each_interval(capsys: pytest.CaptureFixture[str]) -> None:
    view = Blocks()
    slow = latency_of(40, 50)
    for each in intervals([device()], [device(reads=50, latency=slow)], []):
        view.show(each)
    view.say("the daemon is away")
    out, err = capsys.readouterr()
    first, second, rest = out.split("\n\n")
    assert [line.split() for line in first.splitlines()] == [
        ["T1", "1.0", "s"],
        HEADERS,
        ["vol0", "50", "0", "200K", "0", "852us", "916us", "3"],
    ]
    assert second.splitlines()[0] == "T2  1.0 s" and len(second.splitlines()) == 2 and rest == ""
    assert err == "ublkpool: the daemon is away\n"


@pytest.mark.parametrize("view", [JsonLines(), Blocks()])
def test_a_line_that_cannot_be_told_ends_it_only_with_the_reader(
    monkeypatch: pytest.MonkeyPatch, view: JsonLines | Blocks
) -> None:
    def fail(lines: list[str]) -> None:
        raise BrokenPipeError

    def end() -> None:
        raise ReaderGone

    monkeypatch.setattr(watch_views, "complain", fail)
    monkeypatch.setattr(watch_views, "check_reader", lambda: None)
    view.say("the daemon is away")
    monkeypatch.setattr(watch_views, "check_reader", end)
    with pytest.raises(ReaderGone):
        view.say("the daemon is away")


def test_a_device_without_a_whole_interval_has_a_row_without_rates() -> None:
    table = rates_table(Interval("T", 1.0, [Measured(device(reason="no backend is attached"), None)]))
    assert table.rows == [("vol0", *[""] * 8, "3", "", "", "no backend is attached")]
    assert len(table.headers) == len(table.rows[0])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def size(monkeypatch: pytest.MonkeyPatch, columns: int, lines: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))


def frames(text: str) -> list[list[str]]:
    """The lines that each drawing shows."""
    return [each.splitlines() for each in text.split("\x1b[H\x1b[J")[1:]]


@pytest.mark.parametrize("columns", [80, 200])
def test_a_screen_shows_the_last_interval_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    size(monkeypatch, columns, 24)
    view = Screen(Terminal())
    for each in intervals([device()], [device(reads=50, latency=latency_of(40, 50), reason="no backend")]):
        view.show(each)
    view.say("the daemon is away")
    first, second, third = frames(capsys.readouterr().out)
    assert first[0] == "T0  counting" and second[0] == "T1  1.0 s"
    for line in second:
        assert len(line) <= columns
    assert {"vol0", "50", "200K", "852us", "916us", "3"} <= set(" ".join(second).split())
    assert "no backend" in " ".join(second)
    assert third == ["the daemon is away", *second]


def test_a_screen_never_has_more_lines_than_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size(monkeypatch, 80, 24)
    many = [device(f"volume-{number}", reads=number, reason="x" * 200) for number in range(40)]
    view = Screen(Terminal())
    for each in intervals(many, many):
        view.show(each)
    view.say("y" * 100)
    for lines in frames(capsys.readouterr().out):
        assert sum(-(-len(line) // 80) for line in lines) <= 23
        assert lines[-1].endswith(" more lines; name a device to see it alone")


def test_lines_that_fit_are_all_shown_and_others_counted() -> None:
    lines = ["a", "b" * 15, "c"]
    assert fitting(lines, 10, 4) == lines
    assert fitting(lines, 10, 3) == ["a", "2 more lin"]
    assert fitting(["", ""], 10, 2) == ["", ""]


@pytest.mark.parametrize(("term", "is_screen"), [("xterm", True), ("dumb", False), (None, False)])
def test_a_terminal_that_can_is_drawn_on(
    monkeypatch: pytest.MonkeyPatch, term: str | None, is_screen: bool
) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    if term is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", term)
    assert isinstance(make_view(as_json=False), Screen if is_screen else Blocks)
    assert isinstance(make_view(as_json=True), JsonLines)


def test_the_size_of_what_is_no_terminal_is_80_by_24(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("LINES", raising=False)
    assert terminal_size(io.StringIO()) == (80, 24)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (4.5e-7, "0.45us"),
        (8.53e-5, "85.3us"),
        (9.9949e-6, "9.99us"),
        (9.996e-6, "10.0us"),
        (0.000_999_4, "999us"),
        (0.000_999_6, "1.00ms"),
        (0.0123, "12.3ms"),
        (0.9996, "1.00s"),
        (68.7, "68.7s"),
    ],
)
def test_a_duration_has_three_digits_and_a_unit(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_table_of_stats_has_latencies_where_some_were_counted() -> None:
    queues, _ = stats_tables([device(latency=latency_of(40, 50)), device("idle")])
    assert queues.headers[-4:] == ("READ P50", "READ P99", "WRITE P50", "WRITE P99")
    assert [row[-4:] for row in queues.rows] == [("852us", "916us", "", ""), ("", "", "", "")]
    assert "852us" in plain_text(queues, 80)


def arguments(monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[Result, list[tuple[object, ...]]]:
    """What the command makes of its arguments."""
    called: list[tuple[object, ...]] = []
    monkeypatch.setattr("ublkpool.daemon.cli.watch.watch", lambda *given: called.append(given[:3]))
    assert devices.stats.name == "stats"
    return CliRunner().invoke(cli, ["stats", *args]), called


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        ("--watch", (None, 1.0, False)),
        ("--watch vol0", ("vol0", 1.0, False)),
        ("vol0 --watch", ("vol0", 1.0, False)),
        ("--watch 2.5 vol0", ("vol0", 2.5, False)),
        ("--watch=.5 --json", (None, 0.5, True)),
        ("--watch --json vol0", ("vol0", 1.0, True)),
        ("--watch -- 5", ("5", 1.0, False)),
        ("--watch 1e3", ("1e3", 1.0, False)),
        ("--watch 86400", (None, 86400.0, False)),
    ],
)
def test_the_seconds_may_be_left_out(
    monkeypatch: pytest.MonkeyPatch, args: str, meant: tuple[object, ...]
) -> None:
    result, called = arguments(monkeypatch, *args.split())
    assert (result.exit_code, called) == (0, [meant]), result.stderr


@pytest.mark.parametrize(
    "args", ["--watch 0", "--watch -1", "--watch=nan", "--watch=", "--watch=1s", "--watch 86401"]
)
def test_seconds_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, args: str) -> None:
    result, called = arguments(monkeypatch, *args.split())
    assert (result.exit_code, called) == (2, [])
    assert "expected seconds from 0.1 to 86400" in result.stderr and result.stderr.count("\n") == 1


def test_the_help_names_the_option_and_the_fields() -> None:
    text = CliRunner().invoke(cli, ["stats", "--help"]).stdout
    assert "--watch [SECONDS]" in text
    for field in ("interval_s", "requests_per_s", "bytes_per_s", "errors_per_s", "latency"):
        assert field in text


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running_daemon(tmp_path) as made:
        made.service.configs["vol0"] = DeviceConfig(name="vol0")
        yield made


@contextmanager
def watcher(
    run_dir: Path, *args: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        # Tests that run in the background of a script inherit that SIGINT is ignored.
        ["env", "--default-signal=INT", *COMMAND, "--run-dir", str(run_dir), *args],
        stdout=stdout,
        stderr=stderr,
        text=True,
        env={**BUFFERED, "TERM": "xterm"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def next_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    return line


@pytest.mark.parametrize("args", [["--json"], []], ids=["json", "blocks"])
def test_ctrl_c_ends_it(daemon: FakeDaemon, args: list[str]) -> None:
    with watcher(daemon.run_dir, *args) as process:
        next_line(process)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == INTERRUPTED and "Traceback" not in error


@pytest.mark.parametrize("interval", ["0.1", "86400"], ids=["busy", "waiting"])
def test_it_ends_with_its_reader(daemon: FakeDaemon, interval: str) -> None:
    with watcher(daemon.run_dir, "--json", "--watch", interval) as process:
        if interval == "0.1":
            next_line(process)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 0
        assert process.stderr is not None and process.stderr.read() == ""


def test_without_stdout_it_ends(daemon: FakeDaemon) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "--run-dir", str(daemon.run_dir)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_goes_on_with_the_next_daemon(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with running_daemon(tmp_path) as first:
            first.service.configs["vol0"] = DeviceConfig(name="vol0")
            # Both outputs in one pipe, which the test never leaves full.
            process = stack.enter_context(watcher(tmp_path, "--json", stderr=subprocess.STDOUT))
            assert json.loads(next_line(process))["name"] == "vol0"
        while (line := next_line(process)).startswith("{"):
            pass
        assert line.startswith("ublkpool: ") and line.endswith("; waiting for it\n")
        with running_daemon(tmp_path) as second:
            second.service.configs["vol1"] = DeviceConfig(name="vol1")
            assert json.loads(next_line(process))["name"] == "vol1"


def test_without_a_daemon_it_fails_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--run-dir", str(tmp_path)], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"ublkpool: {tmp_path}/admin.sock: no such socket")


def test_a_device_that_is_unknown_at_the_start_fails_in_one_line(daemon: FakeDaemon) -> None:
    with watcher(daemon.run_dir, "nothing") as process:
        out, error = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, out, error) == (1, "", "ublkpool: nothing: no such device\n")


def test_on_a_terminal_the_table_is_refreshed_in_place(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("LINES", raising=False)
    daemon.service.configs.update((f"v{number}", DeviceConfig(name=f"v{number}")) for number in range(50))
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    seen = ""
    with os.fdopen(ours, "rb", buffering=0) as screen, watcher(daemon.run_dir, stdout=its) as process:
        os.close(its)
        while seen.count("\x1b[H\x1b[J") < 4:
            seen += os.read(ours, 1 << 16).decode()
        process.send_signal(signal.SIGINT)
        # EIO: the process has ended; until then it must not wait for room on the terminal.
        with suppress(OSError):
            while screen.read(1 << 16):
                pass
        assert process.wait(DEADLINE_S) == INTERRUPTED
    for lines in frames(seen.replace("\r\n", "\n"))[:3]:
        assert len(lines) == 23 and lines[-1].startswith("31 more lines")
        assert lines[2].startswith("vol0") and all(len(line) <= 80 for line in lines)


def test_rare_values_take_no_room_where_they_are_0() -> None:
    busy = DeviceStats(
        name="vol0", queues=(QueueStats(queue=0, requests=OpCounts(flush=1, discard=2), errors=20),)
    )
    first, last = intervals([DeviceStats(name="vol0", queues=(QueueStats(queue=0),))], [busy])
    assert first.devices[0].rates is None
    [row] = rates_table(last).rows
    assert row[-4:] == ("0", "3.0", "20", "")
    [row] = rates_table(Interval("T", 1.0, list(intervals([busy], [busy]))[1].devices)).rows
    assert row[-4:] == ("0", "", "", "")


def test_each_text_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
    print_text("one\n")
    assert raw.getvalue() == b"one\n"


LOSES_ITS_READER = """
import os, sys
from ublkpool.daemon.cli.reader import ends_with_reader, print_text
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(writer)
os.close(reader)
with ends_with_reader():
    print_text("one")
    sys.exit("it was printed")
"""


def test_what_a_gone_reader_has_not_read_is_no_error_at_the_exit() -> None:
    command = [sys.executable, "-c", LOSES_ITS_READER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=BUFFERED)
    assert (done.returncode, done.stderr) == (0, "")
