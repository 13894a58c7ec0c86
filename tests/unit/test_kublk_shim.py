"""The shim that replaces kublk for the kernel's selftests: its requests to the daemon, and its output."""

import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.vm import kublk_shim
from support.vm.kublk_server import answered

AWK = {"id": ("dev id", "[ :]", 3), "pid": ("pid", " +", 7), "state": ("state", " +", 11)}


class FakeAdmin:
    """A fake daemon on an admin socket; a device has the requested properties."""

    def __init__(self, run_dir: Path) -> None:
        self.asked: list[dict[str, Any]] = []
        self.devices: dict[str, dict[str, Any]] = {}
        self.refusal = ""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(run_dir / "admin.sock"))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as lines:
                self.asked.append(json.loads(lines.readline()))
                lines.write(json.dumps({"progress": "starting"}).encode() + b"\n")
                lines.write(json.dumps(self._answer(self.asked[-1])).encode() + b"\n")

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        if self.refusal:
            return {"ok": False, "error": self.refusal, "status": 1}
        result: Any = None
        if question["op"] == "add":
            device = question["device"]
            result = self.devices[device["name"]] = {
                "name": device["name"],
                "id": 5,
                "state": "live",
                "epoch": 1,
                "size_bytes": device.get("size_bytes"),
                "queues": device["queues"],
                "depth": device["depth"],
                "workers": [{"queue": 0, "pid": 4711, "cpu": None}],
            }
        elif question["op"] == "list":
            result = list(self.devices.values())
        elif question["op"] == "wait":
            result = self.devices[question["name"]]
        elif question["op"] == "del":
            for name in question["names"]:
                del self.devices[name]
        return {"ok": True, "result": result}

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[FakeAdmin]:
    (tmp_path / "features").write_text("SAFE_STOP_DEV\nSUPPORT_ZERO_COPY\nBIT_63\n")
    (tmp_path / "DELAY").write_text("/delay.py")
    queue = tmp_path / "sys" / "ublkb5" / "queue"
    queue.mkdir(parents=True)
    (queue / "io_timeout").write_text(kublk_shim.IO_TIMEOUT_MS)
    made = FakeAdmin(tmp_path)
    yield made
    made.close()


@pytest.fixture
def kublk(tmp_path: Path) -> Iterator[Any]:
    program, environment = tmp_path / "kublk", {
        **os.environ,
        "KUBLK_RUN_DIR": str(tmp_path),
        "KUBLK_STATE": str(tmp_path),
        "KUBLK_SYS_BLOCK": str(tmp_path / "sys"),
    }  # fmt: skip

    def call(words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [program, *words.split()],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    with answered(program, environment):
        yield call


def field(printed: str, what: str) -> str:
    """The value that the selftests parse from kublk's output."""
    pattern, separator, number = AWK[what]
    line = subprocess.run(["grep", pattern], input=printed, capture_output=True, text=True, check=True).stdout
    words = ["awk", *(["-F", separator] if what == "id" else []), f"{{print ${number}}}"]
    return subprocess.run(words, input=line, capture_output=True, text=True, check=True).stdout.strip()


def test_a_device_is_added_listed_and_deleted(admin: FakeAdmin, kublk: Any) -> None:
    added = kublk("add -t null -q 4 -d 32 -g -r 1 -i 1 -b --nthreads 8 --no_auto_part_scan")
    assert added.returncode == 0 and field(added.stdout, "id") == "5", added
    device = admin.asked[0]["device"]
    assert (device["queues"], device["depth"], device["need_get_data"]) == (4, 32, True)
    assert (device["recovery"], device["partitions"]) == ("reissue", False)
    assert device["backend"] == {"kind": "null", "options": {}, "cwd": "/"}
    listed = kublk("list -n 5").stdout
    assert (field(listed, "pid"), field(listed, "state")) == ("4711", "LIVE")
    assert kublk("del -n 5").returncode == 0
    assert (admin.asked[-1]["op"], admin.asked[-1]["force"]) == ("del", True)
    assert kublk("del -n 5").returncode == 1


@pytest.mark.parametrize(
    ("words", "kind", "options"),
    [
        ("-t loop a", "file", {"path": "{here}/a"}),
        ("-t stripe a a", "memory", {"size": "8192", "keep": "off"}),
        ("-t fault_inject --delay_us 2500000", "/delay.py", {"size": "67108864", "delay_ms": "2500.0"}),
    ],
)
def test_each_target_has_a_backend(
    admin: FakeAdmin, kublk: Any, tmp_path: Path, words: str, kind: str, options: dict[str, str]
) -> None:
    (tmp_path / "a").write_bytes(bytes(4096))
    assert kublk(f"add {words}").returncode == 0
    wanted = {key: value.format(here=tmp_path) for key, value in options.items()}
    assert admin.asked[0]["device"]["backend"] == {"kind": kind, "options": wanted, "cwd": "/"}
    assert admin.asked[0]["device"]["recovery"] == "none"


def test_a_device_that_was_recovered_is_quiesced_until_recover_is_called(
    admin: FakeAdmin, kublk: Any, tmp_path: Path
) -> None:
    kublk("add -t null -r 1")
    (device,) = admin.devices.values()
    device["state"] = "recovering"
    assert field(kublk("list -n 5").stdout, "state") == "QUIESCED"
    device.update(state="live", epoch=2)
    assert field(kublk("list -n 5").stdout, "state") == "QUIESCED"
    recovered = kublk("recover -n 5 -t null -r 1")
    assert recovered.returncode == 0 and field(recovered.stdout, "id") == "5"
    assert field(kublk("list -n 5").stdout, "state") == "LIVE"
    shutil.rmtree(tmp_path / "sys" / "ublkb5")
    for dead in ("failed", "waiting"):
        device["state"] = dead
        assert field(kublk("list -n 5").stdout, "state") == "DEAD"


def test_a_refusal_fails_with_its_reason(admin: FakeAdmin, kublk: Any) -> None:
    kublk("add -t null")
    admin.refusal = "it is in use"
    stopped = kublk("stop -n 5 --safe")
    assert stopped.returncode == 1 and "it is in use" in stopped.stderr
    assert (admin.asked[-1]["op"], admin.asked[-1]["force"]) == ("del", False)
    admin.refusal = ""
    assert kublk("stop -n 5 --safe").returncode == 0
    assert kublk("del -n 5").returncode == 0 and admin.asked[-1]["force"] is False


def test_features_that_the_shim_lacks_are_not_listed_and_unnamed_ones_are_unknown(
    admin: FakeAdmin, kublk: Any
) -> None:
    assert kublk("features").stdout.split("\n")[:-1] == ["UBLK_F_SAFE_STOP_DEV", "unknown BIT_63"]
