"""Prometheus for tests: Debian's programs, unpacked into the cache, and a server that scrapes one exporter.

The package is fetched and checked like the test guest's, and is not installed: no service starts on this machine.  The
server listens on a port of the loopback that the kernel gives it.
"""

import json
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.guest.apt_archive import OS_RELEASE, Archive, release_codename
from support.guest.cache import default_cache, unpack

DEADLINE_S = 120
SCRAPE_S = 1
_CONFIG = """
global: {{scrape_interval: {interval}s, scrape_timeout: {interval}s, evaluation_interval: {interval}s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: ublkpool
    static_configs: [{{targets: ["{target}"]}}]
"""


def fetch_prometheus() -> Path:
    """The directory that has `prometheus` and `promtool`, fetched unless the cache has it.  Raises `ArchiveError`."""
    path = default_cache() / "prometheus"
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix="prometheus-", suffix=".partial", dir=path.parent))
        try:
            archive = Archive.of_this_host(staging)
            package = archive.newest(release_codename(OS_RELEASE.read_text()), "prometheus")
            unpack([package], staging / "root", archive.download)
            _rename(staging / "root", path)
        finally:
            shutil.rmtree(staging)
    return path / "usr/bin"


def _rename(made: Path, path: Path) -> None:
    try:
        made.rename(path)
    except OSError:
        # Another fetch has finished first.
        if not path.is_dir():
            raise


class Prometheus:
    """A server that runs; `ask` is its HTTP API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/"

    def ask(self, what: str, **parameters: str) -> Any:
        """The data of the answer to an API call.  Raises `OSError` for a query that the server refuses."""
        url = self._url + what + "?" + urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, expression: str) -> list[Any]:
        """The series that the expression has now."""
        found: list[Any] = self.ask("query", query=expression)["result"]
        return found

    def until(self, expression: str) -> list[Any]:
        """The series of the expression as soon as there is one."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not (found := self.values(expression)):
            assert time.monotonic() < deadline_s, f"no result: {expression}"
            time.sleep(0.1)
        return found


@contextmanager
def running_prometheus(target: str, rules: Path, directory: Path) -> Iterator[Prometheus]:
    """A server that scrapes `target`, HOST:PORT, and evaluates `rules`; its data is in `directory`."""
    config = directory / "prometheus.yml"
    config.write_text(_CONFIG.format(interval=SCRAPE_S, rules=rules, target=target))
    log = directory / "prometheus.log"
    command = [
        str(fetch_prometheus() / "prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={directory}/data",
        "--web.listen-address=127.0.0.1:0",
        "--log.level=info",
    ]
    with log.open("w") as words:
        process = subprocess.Popen(command, stderr=words, stdout=words, cwd=directory)
    try:
        yield Prometheus(_port(process, log))
    finally:
        process.kill()
        process.wait()


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """The port on which the server listens: among its sockets, since its log has the one that was asked for."""
    deadline_s = time.monotonic() + DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline_s:
        if "Server is ready" in log.read_text() and (port := _listening(process.pid)):
            return port
        time.sleep(0.05)
    raise AssertionError(f"prometheus does not serve: {log.read_text()[-2000:]}")


def _listening(pid: int) -> int:
    """The port of a listening TCP socket of this process, 0 if it has none."""
    links = [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
            return int(fields[1].rpartition(":")[2], 16)
    return 0
