"""Named workloads: when each request arrives, how long its prompt is and how many tokens it must produce.

Seeded, so that two engines (and two commits) are asked the same. The lengths are those the peer's published figures
were measured with. It knows no engine and no tokens' meaning: prompts are random ids, never zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

SPELLED = re.compile(r"(\d+)x(\d+)\+(\d+)")


class Item(NamedTuple):
    """One request. arrival_s: from the start of the run; output_tokens: exactly so many, eos is ignored."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival, and the name that records carry."""

    name: str
    items: tuple[Item, ...]

    @property
    def prompt_tokens(self) -> int:
        """Of all requests together."""
        return sum(item.prompt_tokens for item in self.items)

    @property
    def output_tokens(self) -> int:
        """Of all requests together."""
        return sum(item.output_tokens for item in self.items)

    @property
    def longest_tokens(self) -> int:
        """Prompt and output of the longest request: what max_model_len must hold."""
        return max(item.prompt_tokens + item.output_tokens for item in self.items)

    def first(self, count: int) -> Workload:
        """Only the first requests; the name says so."""
        if not 1 <= count < len(self.items):
            return self
        return Workload(f"{self.name}[:{count}]", self.items[:count])

    def shrunk(self, divisor: int) -> Workload:
        """Every length divided (1 token at least), for machines that are too slow for the whole; the name says so."""
        if divisor == 1:
            return self
        items = (Item(a, max(1, p // divisor), max(1, o // divisor)) for a, p, o in self.items)
        return Workload(f"{self.name}/{divisor}", tuple(items))


def _lengths(rng: np.random.Generator, count: int, mean: float, sigma: float, low: int, high: int) -> list[int]:
    """`count` log-normal lengths, cut off at both ends, rounded down."""
    return [int(value) for value in np.clip(rng.lognormal(mean, sigma, count), low, high)]


def offline_chat(requests: int = 1000, seed: int = 1) -> Workload:
    """Chat-like: prompts of 8-2,048 tokens (median 143), answers of 8-1,024 (median 180), all there at once."""
    rng = np.random.default_rng(seed)
    prompts = _lengths(rng, requests, 5.0, 1.0, 8, 2048)
    outputs = _lengths(rng, requests, 5.2, 0.8, 8, 1024)
    return Workload("offline_chat", tuple(Item(0.0, p, o) for p, o in zip(prompts, outputs, strict=True)))


def online_mixed(rate: float, seconds: float, seed: int = 3) -> Workload:
    """Summarisation-like: Poisson arrivals, prompts of 64-8,000 tokens (median about 2,200), answers of 16-1,024."""
    rng = np.random.default_rng(seed)
    items: list[Item] = []
    arrival_s = float(rng.exponential(1 / rate))
    while arrival_s <= seconds:
        prompt, output = _lengths(rng, 1, 7.7, 0.6, 64, 8000)[0], _lengths(rng, 1, 5.3, 0.7, 16, 1024)[0]
        items.append(Item(arrival_s, prompt, output))
        arrival_s += float(rng.exponential(1 / rate))
    return Workload(f"online_mixed({rate:g}, {seconds:g})", tuple(items))


def equal(requests: int, prompt_tokens: int, output_tokens: int, name: str = "") -> Workload:
    """Requests of one length, all there at once."""
    spelled = f"{requests}x{prompt_tokens}+{output_tokens}"
    return Workload(name or spelled, (Item(0.0, prompt_tokens, output_tokens),) * requests)


OFFLINE: dict[str, Callable[[], Workload]] = {
    "single_stream": lambda: equal(1, 512, 256, "single_stream"),
    "decode_heavy": lambda: equal(256, 128, 512, "decode_heavy"),
    "offline_chat": offline_chat,
    "offline_long": lambda: equal(64, 8192, 128, "offline_long"),
}
NAMES = (*OFFLINE, "online_mixed", "NxI+O")


def find(name: str, *, rate: float = 8.0, seconds: float = 20.0, requests: int = 0, shrink: int = 1) -> Workload:
    """A workload by name, or by `NxI+O`: N requests of I prompt and O output tokens at once.

    rate [requests/s] and seconds are online_mixed's. requests: only the first so many, 0 = all. shrink divides lengths.
    Raises ValueError that names what is known.
    """
    found = SPELLED.fullmatch(name)
    if rate <= 0 or seconds <= 0 or shrink < 1:
        raise ValueError(f"rate={rate:g}, seconds={seconds:g} and shrink={shrink} must be above 0")
    if found is not None and all(int(part) > 0 for part in found.groups()):
        whole = equal(*(int(part) for part in found.groups()))  # type: ignore[arg-type]
    elif name == "online_mixed":
        whole = online_mixed(rate, seconds)
    elif name in OFFLINE:
        whole = OFFLINE[name]()
    else:
        raise ValueError(f"workload {name!r} is unknown; known: {', '.join(NAMES)} (say 16x256+128)")
    if not whole.items:
        raise ValueError(f"{whole.name} has no request; use a longer --seconds or a higher --rate")
    return whole.first(requests).shrunk(shrink)


def random_prompts(workload: Workload, vocab: int, seed: int = 0) -> list[list[int]]:
    """One list of ids in 0..vocab-1 a request, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, item.prompt_tokens).tolist() for item in workload.items]


def warm_up(workload: Workload, requests: int = 8, output_tokens: int = 8) -> Workload:
    """The first few requests, cut short, all at once: compiles and touches what the run needs."""
    items = (Item(0.0, i.prompt_tokens, min(i.output_tokens, output_tokens)) for i in workload.items[:requests])
    return replace(workload, name="warm-up", items=tuple(items))
