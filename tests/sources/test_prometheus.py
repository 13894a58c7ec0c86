"""A real Prometheus: it takes our page, our alert rules and every query of the dashboard."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.fakes.daemon import FakeDaemon, running_daemon
from support.prometheus import Prometheus, fetch_prometheus, running_prometheus
from ublkpool.daemon.metrics.families import FAMILIES
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig

ROOT = Path(__file__).parents[2]
RULES = ROOT / "config" / "ublkpool-alerts.yml"
DASHBOARD = json.loads((ROOT / "config" / "ublkpool-dashboard.json").read_text())
VARIABLES = {"$__rate_interval": "10s", "$instance": ".*", "$device": ".*"}
PANELS = [each for each in DASHBOARD["panels"] if each["type"] != "row"]
METRIC = re.compile(r"\bublkpool_\w+")
SUFFIXES = re.compile(r"_(bucket|sum|count)$")


@pytest.fixture(scope="module")
def promtool() -> Path:
    return fetch_prometheus() / "promtool"


@contextmanager
def running_exporter(run_dir: Path) -> Iterator[str]:
    """An exporter of this run directory's daemon; HOST:PORT of its page."""
    command = [sys.executable, "-m", "ublkpool.daemon", "metrics", "--listen", "127.0.0.1:0"]
    command += ["--run-dir", str(run_dir), "--log-format", "human"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            found = re.search(r" at http://(\S+)/metrics$", process.stderr.readline().rstrip())
            assert found is not None
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Prometheus, FakeDaemon]]:
    """A daemon with two devices, its exporter, and a Prometheus that scrapes it."""
    run_dir = tmp_path_factory.mktemp("run")
    with running_daemon(run_dir) as daemon:
        for name, backend in (("vol0", BackendConfig(kind="memory")), ("vol1", None)):
            device = DeviceConfig(name=name, size_bytes=1 << 30, backend=backend)
            daemon.call(daemon.service.add(device, lambda text: None))
        with (
            running_exporter(run_dir) as target,
            running_prometheus(target, RULES, tmp_path_factory.mktemp("prometheus")) as prometheus,
        ):
            prometheus.until("ublkpool_up == 1")
            yield target, prometheus, daemon


def _page(target: str) -> str:
    return subprocess.run(
        ["curl", "-sS", f"http://{target}/metrics"], check=True, capture_output=True, text=True
    ).stdout


def test_promtool_finds_no_fault_with_the_page(
    promtool: Path, scene: tuple[str, Prometheus, FakeDaemon]
) -> None:
    text = _page(scene[0])
    check = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
    bad = text.replace("ublkpool_requests_total", "ublkpool_requests")
    check = subprocess.run([promtool, "check", "metrics"], input=bad, capture_output=True, text=True)
    assert "ublkpool_requests" in check.stderr


def test_the_alert_rules_are_valid_and_fire_when_they_should(promtool: Path) -> None:
    tests = ROOT / "tests" / "sources" / "alert_rules.test.yml"
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(tests)]):
        done = subprocess.run([promtool, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    alerts = set(re.findall(r"- alert: (\w+)", RULES.read_text()))
    fired = set(re.findall(r"alertname: (\w+)\n\s+eval_time: \w+\n\s+exp_alerts:", tests.read_text()))
    assert fired == alerts


def test_rules_and_dashboard_know_only_metrics_that_exist() -> None:
    exposed = {each.exposed for each in FAMILIES}
    labels = {label for each in FAMILIES for label in each.labels}
    for text in (RULES.read_text(), *(target["expr"] for panel in PANELS for target in panel["targets"])):
        named = {SUFFIXES.sub("", name) if name not in exposed else name for name in METRIC.findall(text)}
        assert named <= exposed | labels | {"ublkpool_device_state"}


def test_prometheus_has_every_metric_of_a_scrape(scene: tuple[str, Prometheus, FakeDaemon]) -> None:
    target, prometheus, _ = scene
    known = set(prometheus.ask("label/__name__/values"))
    wanted = {
        re.sub(r"\{.*", "", line).split()[0]
        for line in _page(target).splitlines()
        if not line.startswith("#")
    }
    assert wanted <= known
    (up,) = prometheus.values('up{job="ublkpool"}')
    assert up["value"][1] == "1"
    assert prometheus.values('ublkpool_requests_total{device="vol0", op="read"}')[0]["value"][1] == "3"
    (scraped,) = prometheus.ask("targets")["activeTargets"]
    assert scraped["lastError"] == ""


def test_prometheus_evaluates_our_rules(scene: tuple[str, Prometheus, FakeDaemon]) -> None:
    _, prometheus, daemon = scene
    prometheus.until('ALERTS{alertname="UblkpoolDeviceWithoutBackend", device="vol1", alertstate="pending"}')
    daemon.service.states["vol1"] = "failed"
    prometheus.until('ALERTS{alertname="UblkpoolDeviceFailed", device="vol1", alertstate="firing"}')
    (group,) = prometheus.ask("rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert not prometheus.values('ALERTS{device="vol0"}')


def _expression(text: str) -> str:
    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    return text


def test_every_query_of_the_dashboard_has_a_result(scene: tuple[str, Prometheus, FakeDaemon]) -> None:
    prometheus = scene[1]
    for panel in PANELS:
        for target in panel["targets"]:
            assert "$" not in _expression(target["expr"])
            prometheus.until(_expression(target["expr"]))
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            query = _expression(variable["query"]["query"])
            series = re.sub(r"^label_values\((.*), \w+\)$", r"\1", query)
            assert series != query
            assert prometheus.until(series)


def test_the_dashboard_has_what_grafana_asks_of_one() -> None:
    """Its JSON model, as Grafana's documentation describes it; Grafana itself is in no package of Debian's."""
    assert {"uid", "title", "schemaVersion", "version", "panels", "templating", "time", "refresh"} <= set(
        DASHBOARD
    )
    assert len(DASHBOARD["uid"]) <= 40
    ids = [each["id"] for each in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "instance", "device"}
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat", "table")
        _check_panel(panel)


def _check_panel(panel: dict[str, Any]) -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["title"]
    assert panel["datasource"] == source
    assert panel["fieldConfig"]["defaults"]["unit"]
    references = [each["refId"] for each in panel["targets"]]
    assert len(set(references)) == len(references) > 0
    for target in panel["targets"]:
        assert target["datasource"] == source
