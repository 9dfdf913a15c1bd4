"""Numbers for Prometheus, in a registry of the application's own.

Labels are bounded: routes are those of the application, models those that it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deltaw.serving.http.record import Record
from deltaw.serving.http.served import Load

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Seconds: from a token of a small model to an answer of a large one.
_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_WHOLE = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_GAUGES = {
    "running": "Texts that are being written",
    "waiting": "Texts that are not yet begun",
    "pages_used": "Pages of keys and values in use",
    "pages": "Pages of keys and values there are",
    "adapters_loaded": "Adapters in memory",
}


class _Gauges(Collector):
    """What an engine is doing, asked for when somebody looks."""

    def __init__(self, load: Callable[[], Load], in_hand: Callable[[], int]) -> None:
        self._load = load
        self._in_hand = in_hand

    def collect(self) -> Iterator[GaugeMetricFamily]:
        load = self._load()
        for name, told in _GAUGES.items():
            yield GaugeMetricFamily(f"deltaw_{name}", told, getattr(load, name))
        yield GaugeMetricFamily("deltaw_in_hand", "Texts in hand, waiting or running", self._in_hand())


class Metrics:
    """Counts requests and tokens, and how long they take.

    Args:
        load: what the engine is doing. in_hand: texts that the server has taken in.
    """

    def __init__(self, load: Callable[[], Load], in_hand: Callable[[], int]) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        registry = self._registry
        self._requests = Counter(
            "deltaw_requests", "Requests", ("route", "status", "model"), registry=registry
        )
        self._prompt = Counter("deltaw_prompt_tokens", "Tokens of prompts", ("model",), registry=registry)
        self._cached = Counter(
            "deltaw_cached_prompt_tokens", "Tokens of prompts that were reused", ("model",), registry=registry
        )
        self._written = Counter(
            "deltaw_completion_tokens", "Tokens that were written", ("model",), registry=registry
        )
        self._finished = Counter(
            "deltaw_texts", "Texts by why they ended", ("model", "finish"), registry=registry
        )
        self._seconds = Histogram(
            "deltaw_request_seconds", "Time of a request", ("route",), buckets=_WHOLE, registry=registry
        )
        self._first = Histogram(
            "deltaw_first_token_seconds",
            "Time from a request's arrival to its first token",
            buckets=_FIRST,
            registry=registry,
        )
        self._token = Histogram(
            "deltaw_token_seconds",
            "Time per token of a request after its first, over its texts",
            buckets=_TOKEN,
            registry=registry,
        )
        registry.register(_Gauges(load, in_hand))

    def count(self, record: Record, route: str, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        self._requests.labels(route, str(status), record.model).inc()
        self._seconds.labels(route).observe(seconds)
        if record.prompt_tokens and record.finishes:
            self._prompt.labels(record.model).inc(record.prompt_tokens)
            self._cached.labels(record.model).inc(record.cached_tokens)
        if record.completion_tokens:
            self._written.labels(record.model).inc(record.completion_tokens)
        for finish in record.finishes:
            self._finished.labels(record.model, finish).inc()
        if record.first_token is None or record.last_token is None:
            return
        self._first.observe(record.first_token - record.began)
        if record.completion_tokens > 1:
            self._token.observe((record.last_token - record.first_token) / (record.completion_tokens - 1))

    def shown(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)
