"""What /metrics says, in Prometheus' text format; of this server's own registry."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Figures of one server since its start."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "ringworld_serve_requests",
            "Requests that have ended, by status; 499: the client had gone.",
            ["status"],
            registry=self.registry,
        )
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._answer = self._counter("answer_tokens", "Tokens of answers.")
        self._first = self._histogram("first_token_seconds", "From a request to its first token.")
        self._whole = self._histogram("request_seconds", "From a request to its end.")

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a figure that is read when it is asked for."""
        gauge = Gauge(f"ringworld_serve_{name}", text, registry=self.registry)
        gauge.set_function(read)

    def ended(self, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(str(status)).inc()
        self._whole.observe(seconds)

    def asked(self, tokens: int) -> None:
        """Count a prompt."""
        self._prompt.inc(tokens)

    def wrote(self, tokens: int) -> None:
        """Count tokens of answers."""
        self._answer.inc(tokens)

    def began(self, seconds: float) -> None:
        """Note when a request's first token came."""
        self._first.observe(seconds)

    def render(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"ringworld_serve_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"ringworld_serve_{name}", text, buckets=_SECONDS, registry=self.registry)
