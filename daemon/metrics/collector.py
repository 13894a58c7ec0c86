"""One snapshot as the client library's metric families, and the page that a scraper asks for.

Owns the translation of `families.py`; the library chooses the format by the scraper's Accept header and writes it.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ublkpool.daemon.metrics.families import BUCKETS_S, FAMILIES, Distribution, Family
from ublkpool.daemon.metrics.source import Snapshot

_KINDS: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "info": InfoMetricFamily,
    "stateset": StateSetMetricFamily,
}
_BOUNDS = tuple(f"{bound:.12g}" for bound in BUCKETS_S)


class SnapshotCollector(Collector):
    """Collects one snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """Every family that has a value now."""
        for family in FAMILIES:
            metric = (
                _histogram(family, self._snapshot)
                if family.kind == "histogram"
                else _plain(family, self._snapshot)
            )
            if metric.samples:
                yield metric


def _plain(family: Family, snapshot: Snapshot) -> Metric:
    metric: Any = _KINDS[family.kind](family.name, family.help, labels=family.labels)
    for labels, value in family.read(snapshot):
        metric.add_metric(labels, value)
    assert isinstance(metric, Metric)
    return metric


def _histogram(family: Family, snapshot: Snapshot) -> Metric:
    metric = HistogramMetricFamily(family.name, family.help, labels=family.labels)
    for labels, value in family.read(snapshot):
        assert isinstance(value, Distribution)
        buckets = [*zip(_BOUNDS, value.cumulative, strict=True), ("+Inf", value.total)]
        metric.add_metric(labels, buckets, value.sum_s)
    return metric


def render(snapshot: Snapshot, accept: str) -> tuple[str, bytes]:
    """The content type and the text for a scraper with this Accept header.

    An Accept header that the library makes nothing of counts as none.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(snapshot))
    try:
        encode, content_type = choose_encoder(accept)
        return content_type, encode(registry)
    except (ValueError, TypeError):
        encode, content_type = choose_encoder("")
        return content_type, encode(registry)
