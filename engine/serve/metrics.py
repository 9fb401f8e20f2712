"""What /metrics shows. Counts and times only: no prompt, id, key or client address ever becomes a label.

Definitions: ttft = first token handed to the stream writer - request accepted by the server; time between tokens =
time between two deliveries of a sample, divided by the tokens of the second; queue time = first scheduled - accepted
(the engine measures it); e2e = last token - accepted. Times in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.core.demand import SIDES

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)

# What the engine's stats are called here: stats key -> (metric, help). Keys that are absent stay at zero.
GAUGES = {
    "running": ("tessera_requests_running", "samples in the running batch"),
    "waiting": ("tessera_requests_waiting", "samples that wait for a slot or for memory"),
    "ledger_groups_reserved": ("tessera_kv_groups_reserved", "page groups that admitted samples may still grow into"),
    "kv_groups_in_use": ("tessera_kv_groups_in_use", "page groups that hold tokens of live samples"),
    "kv_groups_kept": ("tessera_kv_groups_kept", "page groups kept mapped after their sample ended"),
    "kv_groups_look_ahead": ("tessera_kv_groups_look_ahead", "page groups mapped ahead of need"),
    "expected_growth_groups": ("tessera_kv_expected_growth_groups", "page groups that running samples may still ask "
                               "for, at --admission-risk"),
    "over_commit_groups": ("tessera_kv_over_commit_groups", "reserved and expected page groups beyond the pool"),
    "kv_mapped_bytes": ("tessera_kv_mapped_bytes", "physical KV bytes mapped"),
}
RHO_GAUGES = {"rho_{}": ("tessera_token_reduction_ratio", "engine tokens for a base token of the same text"),
              "rho_{}_se": ("tessera_token_reduction_se_ratio", "standard error of it")}  # fmt: skip
RHO_COUNTERS = {
    "rho_{}_sampled_base_tokens_total": ("tessera_token_reduction_sampled_base_tokens", "base tokens it was seen on"),
    "rho_{}_alarms_total": ("tessera_token_reduction_drift_alarms", "how often it left its past and began anew at 1"),
}
COUNTERS = {
    "preempted_total": ("tessera_preemptions", "samples that lost their memory and were recomputed"),
    "steps_total": ("tessera_engine_steps", "steps run"),
    "lost_steps_total": ("tessera_engine_lost_steps", "steps that raised; their requests ended with an error"),
    "step_errors": ("tessera_engine_errors", "calls of the engine that raised"),
    "kv_stall_us_total": ("tessera_kv_stall_microseconds", "time steps spent growing slots or waiting for the mapper"),
    "tokens_run_total": ("tessera_engine_tokens", "tokens run, prompts and outputs"),
}


class Metrics:
    """The registry of one server. Everything is made here, so that two servers in a process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.ttft_s = Histogram("tessera_ttft_seconds", "request accepted to first token", buckets=LONG_S, **own)
        self.between_s = Histogram("tessera_time_between_tokens_seconds", "token to token", buckets=SHORT_S, **own)
        self.queue_s = Histogram("tessera_queue_time_seconds", "accepted to first scheduled", buckets=LONG_S, **own)
        self.e2e_s = Histogram("tessera_e2e_seconds", "request accepted to last token", buckets=LONG_S, **own)
        self.requests = Counter("tessera_requests", "samples by how they ended", ["outcome"], **own)
        self.responses = Counter("tessera_http_responses", "responses by status", ["status"], **own)
        self.prompt_tokens = Counter("tessera_prompt_tokens", "prompt tokens accepted", **own)
        self.output_tokens = Counter("tessera_output_tokens", "tokens delivered", **own)
        self.failures = Counter("tessera_request_failures", "faults of ours that ended one request", **own)
        self.text_restarts = Counter("tessera_text_worker_restarts", "text workers killed and replaced", **own)
        self.dropped_lines = Counter("tessera_log_lines_dropped", "log lines that could not be written", **own)
        self.loop_lag_s = Gauge("tessera_event_loop_lag_seconds", "worst delay of the event loop, last second", **own)
        self._page_bytes = self._pages_per_group = 1
        self._pages_used = Gauge("tessera_kv_pages_used", "physical pages that hold tokens of live samples", **own)
        self._pages_mapped = Gauge("tessera_kv_pages_mapped", "physical pages mapped: used, kept and ahead", **own)
        self._pages_total = Gauge("tessera_kv_pages", "physical pages of the pool", **own)
        self._gauges = {key: Gauge(name, text, **own) for key, (name, text) in GAUGES.items()}
        self._domain = ""
        labels = ["domain", "side"]
        self._rho = {key: Gauge(name, text, labels, **own) for key, (name, text) in RHO_GAUGES.items()}
        self._rho_counts = {key: Counter(name, text, labels, **own) for key, (name, text) in RHO_COUNTERS.items()}
        self._counters = {key: Counter(name, text, **own) for key, (name, text) in COUNTERS.items()}
        self._counted: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        for outcome in ("stop", "length", "abort", "error"):
            self.requests.labels(outcome)

    def know_pages(self, page_bytes: int, pages_per_group: int, pool_groups: int) -> None:
        """What turns the engine's groups and bytes into pages."""
        self._page_bytes, self._pages_per_group = page_bytes, pages_per_group
        self._pages_total.set(pool_groups * pages_per_group)

    def know_domain(self, name: str) -> None:
        """Whose figures rho begins with."""
        self._domain = name

    def take_stats(self, values: Mapping[str, float]) -> None:
        """Take over what the engine reported: gauges as they are, counters by their increase."""
        for key, gauge in self._gauges.items():
            if key in values:
                gauge.set(values[key])
        if "ledger_groups_total" in values:  # an admin may have changed it
            self._pages_total.set(values["ledger_groups_total"] * self._pages_per_group)
        self._pages_used.set(values.get("kv_groups_in_use", 0.0) * self._pages_per_group)
        self._pages_mapped.set(values.get("kv_mapped_bytes", 0.0) / self._page_bytes)
        for side in SIDES if "rho_in" in values else ():
            for key, gauge in self._rho.items():
                gauge.labels(self._domain, side).set(values[key.format(side)])
            for key, counter in self._rho_counts.items():
                self._raise(counter.labels(self._domain, side), key.format(side), values)
        for key, counter in self._counters.items():
            self._raise(counter, key, values)

    def _raise(self, counter: Counter, key: str, values: Mapping[str, float]) -> None:
        """Bring a counter to what the engine says it is."""
        grown = values.get(key, 0.0) - self._counted.setdefault(key, 0.0)
        if grown > 0:
            counter.inc(grown)
            self._counted[key] += grown

    def take_dropped_lines(self, count: int) -> None:
        """Take over how many log lines were lost since the start."""
        self.dropped_lines.inc(count - self._counted.setdefault("dropped_lines", 0.0))
        self._counted["dropped_lines"] = count

    def text(self) -> bytes:
        """The exposition, Prometheus text format."""
        return generate_latest(self.registry)
