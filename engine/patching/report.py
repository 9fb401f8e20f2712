"""What a patched vocabulary gains: its factor rho = patched tokens / base tokens by domain, with uncertainty.

Also the plain matcher that the figures come from: removed tokens taken apart, then the longest n-gram at each place
from the left (what the priority rule amounts to when longer n-grams come first). It does not choose anything.
Source of the estimator: section 6.2 of our notes on AdaptiVocab (arXiv 2503.19693): ratio of sums, never clamped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.patching.corpus import TokenStream
from engine.patching.remove import expand

CHUNK_TOKENS = 4 << 20
RESAMPLES = 1000
SEED = 20250319
_SHIFT = np.uint64(32)


class Matcher:
    """n-grams as a trie in sorted arrays: the longest that begins at every position, all positions at once."""

    def __init__(self, ngrams: Sequence[tuple[int, ...]], vocab_size: int) -> None:
        self._firsts: Any = np.zeros(vocab_size, bool)
        self._firsts[[ngram[0] for ngram in ngrams]] = True
        self._keys: list[Any] = []  # level n - 2: sorted (number of the prefix << 32 | id)
        self._ends: list[Any] = []  # and the n-gram that ends there, -1 = none
        numbers: dict[tuple[int, ...], int] = {}
        place = {ngram: index for index, ngram in enumerate(ngrams)}
        for n in range(2, max(map(len, ngrams), default=1) + 1):
            nodes = sorted({ngram[:n] for ngram in ngrams if len(ngram) >= n})
            heads = [node[0] if n == 2 else numbers[node[:-1]] for node in nodes]
            lasts = np.array([node[-1] for node in nodes], np.uint64)
            self._keys.append((np.array(heads, np.uint64) << _SHIFT) | lasts)
            self._ends.append(np.array([place.get(node, -1) for node in nodes], np.int64))
            numbers = {node: number for number, node in enumerate(nodes)}

    def longest(self, ids: Any, begins: Any) -> tuple[Any, Any]:
        """(lengths (N,) uint8, n-grams (N,) int32, -1 = none) of the longest match at each position.

        ids: (N,) uint32; begins: (N,) bool, positions that a match may begin at but not run across.
        """
        lengths: Any = np.ones(len(ids), np.uint8)
        found: Any = np.full(len(ids), -1, np.int32)
        at = np.flatnonzero(self._firsts[ids])
        node = ids[at].astype(np.uint64)
        for level, (keys, ends) in enumerate(zip(self._keys, self._ends)):
            step = level + 1
            inside = at + step < len(ids)
            at, node = at[inside], node[inside]
            inside = ~begins[at + step]
            at, node = at[inside], node[inside]
            asked = (node << _SHIFT) | ids[at + step]
            number = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
            hit = keys[number] == asked
            at, number = at[hit], number[hit]
            node = number.astype(np.uint64)
            full = ends[number] >= 0
            lengths[at[full]] = step + 1
            found[at[full]] = ends[number[full]]
        return lengths, found


@dataclass(frozen=True, slots=True)
class Measured:
    """Tokens of each document. base, patched, chars: (documents,) int64; uses: (n-grams,) int64, how often each was
    matched; sha256: of the texts."""

    base: Any
    patched: Any
    chars: Any
    uses: Any
    sha256: str


def measure(stream: TokenStream, removed: Mapping[int, tuple[int, ...]], ngrams: Sequence[tuple[int, ...]],
            vocab_size: int, chunk_tokens: int = CHUNK_TOKENS) -> Measured:
    """Encode a stream of base ids with a patched vocabulary and count."""
    matcher = Matcher(ngrams, vocab_size)
    base = np.diff(stream.starts)
    patched: Any = np.zeros(stream.documents, np.int64)
    uses: Any = np.zeros(len(ngrams), np.int64)
    for first, last in document_chunks(stream.starts, chunk_tokens):
        low, high = int(stream.starts[first]), int(stream.starts[last])
        ids, lengths = expand(np.asarray(stream.ids[low:high]), removed, vocab_size)
        ends = np.concatenate(([0], np.cumsum(lengths)))
        starts = ends[stream.starts[first:last + 1] - low]
        begins: Any = np.zeros(len(ids) + 1, bool)
        begins[starts] = True
        steps, found = matcher.longest(ids, begins)
        taken: Any = np.zeros(len(ids), bool)
        taken[_walk(steps)] = True
        patched[first:last] = np.diff(np.concatenate(([0], np.cumsum(taken)))[starts])
        matched = found[taken]
        uses += np.bincount(matched[matched >= 0], minlength=len(ngrams))
    return Measured(base, patched, stream.chars, uses, stream.sha256)


def document_chunks(starts: Any, chunk_tokens: int) -> Iterable[tuple[int, int]]:
    """Ranges of whole documents of about chunk_tokens; a longer document stands alone."""
    first = 0
    while first < len(starts) - 1:
        last = int(np.searchsorted(starts, starts[first] + chunk_tokens, "right")) - 1
        last = min(max(last, first + 1), len(starts) - 1)
        yield first, last
        first = last


def _walk(steps: Any) -> Any:
    """Positions visited from 0 when each position says how far the next one is."""
    jumps = steps.tobytes()
    visited: list[int] = []
    place, size = 0, len(jumps)
    note = visited.append
    while place < size:
        note(place)
        place += jumps[place]
    return np.array(visited, np.int64)


def statistics(base: Any, patched: Any, chars: Any, rho_max: float, sha256: str, resamples: int = RESAMPLES
               ) -> dict[str, Any]:
    """The stored fields of section 6.2 for one domain, and tokens per character. base, patched, chars: (documents,).

    se is from the residuals, ci95 from a bootstrap over documents (seeded, so the same everywhere). {} without text.
    """
    used = base > 0
    base, patched, chars = base[used], patched[used], chars[used]
    n, total_base, total = len(base), int(base.sum()), int(patched.sum())
    if not n:
        return {"documents": 0}
    rho = total / total_base
    squares = float(np.square(patched - rho * base).sum())
    low, high = _bootstrap(base, patched, resamples)
    quantiles = np.quantile(patched / base, [0.5, 0.95, 0.99], method="higher")
    figures = {
        "rho": rho, "se": (n / (n - 1) * squares / total_base**2) ** 0.5 if n > 1 else None,
        "ci95_low": low, "ci95_high": high, "q50": quantiles[0], "q95": quantiles[1], "q99": quantiles[2],
        "max": (patched / base).max(), "phi": squares / total_base, "rho_max": float(rho_max),
        "tokens_per_char_before": total_base / int(chars.sum()), "tokens_per_char_after": total / int(chars.sum()),
    }  # fmt: skip
    rounded = {name: None if value is None else round(float(value), 6) for name, value in figures.items()}
    return {"documents": n, "base_tokens": total_base, "patched_tokens": total, "characters": int(chars.sum()),
            "corpus_sha256": sha256, **rounded}


def _bootstrap(base: Any, patched: Any, resamples: int) -> tuple[float, float]:
    """95 % interval of the ratio of sums when documents are drawn again."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    ratios = np.empty(resamples)
    for draw in range(resamples):
        chosen = generator.integers(0, len(base), len(base))
        ratios[draw] = patched[chosen].sum() / base[chosen].sum()
    interval: Any = np.quantile(ratios, [0.025, 0.975])
    return float(interval[0]), float(interval[1])


def table(domains: Mapping[str, Mapping[str, Any]]) -> str:
    """The statistics as lines of text, one domain a line."""
    titles = ("domain", "documents", "tokens/char before", "after", "rho [95 % CI]", "q50", "q95", "q99", "max")
    lines: list[tuple[str, ...]] = [titles]
    for name, stats in domains.items():
        if not stats.get("documents"):
            lines.append((name, "0", *[""] * 7))
            continue
        lines.append((
            name, f"{stats['documents']}", f"{stats['tokens_per_char_before']:.4f}",
            f"{stats['tokens_per_char_after']:.4f}",
            f"{stats['rho']:.4f} [{stats['ci95_low']:.4f}, {stats['ci95_high']:.4f}]",
            *(f"{stats[key]:.3f}" for key in ("q50", "q95", "q99", "max"))))
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return "\n".join("  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                               for column, (cell, width) in enumerate(zip(line, widths))) for line in lines)
