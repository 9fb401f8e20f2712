"""Which base tokens give their ids away: those whose loss costs least, each spelled by the tokens it was merged from.

A removed token stands for the two parts of its first merge rule, each taken apart further if it is removed too; so
parts join to the token, there are at least two, and none is removed. It does not know what takes the ids.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.core.errors import LoadError

FREE_PARTS = 4
"""A removal that leaves no token with more parts than this is as good as any other: only above it does the worst case
(the hard bound of the token-reduction factor) weigh more than how rare the token is in general."""


@dataclass(frozen=True, slots=True)
class Removal:
    """A token, its parts when all removals of the list are made, and the tokens that its loss added to the corpus."""

    token: int
    parts: tuple[int, ...]
    cost: int


def first_merges(definition: Mapping[str, Any], origin: str = "tokenizer.json") -> dict[int, tuple[int, int, int]]:
    """Token -> (left, right, number of the rule) of its first merge rule, for a BPE tokenizer.json.

    Rules whose parts or result are not in the vocabulary are passed over. Raises LoadError for another model.
    """
    model = definition.get("model")
    bpe = isinstance(model, dict) and model.get("type") in ("BPE", None)
    if not bpe or not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        raise LoadError(f"{origin}: its model is not a BPE with merges; vocabularies are patched for BPE only")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise LoadError(f"{origin}: its BPE marks parts of words (continuing_subword_prefix, end_of_word_suffix), "
                        "which is not supported")
    vocab = model["vocab"]
    found: dict[int, tuple[int, int, int]] = {}
    for number, rule in enumerate(model["merges"]):
        left, right = rule.split(" ") if isinstance(rule, str) else rule
        token, parts = vocab.get(left + right), (vocab.get(left), vocab.get(right))
        if left and right and token is not None and None not in parts and token not in found:
            found[token] = (*parts, number)
    return found


def choose_removed(merges: Mapping[int, tuple[int, int, int]], frequencies: Sequence[int], count: int,
                   never: frozenset[int] = frozenset()) -> list[Removal]:
    """Up to `count` tokens in the order of removal, each the one that then costs the corpus least.

    merges: as first_merges; tokens without a rule stay. frequencies: (V,) occurrences in the encoded corpus. never:
    ids that stay. Cost: occurrences (those inside tokens already taken apart included) x (parts - 1), exactly what the
    corpus grows by. Equal costs: fewest parts beyond FREE_PARTS in the worst spelling, then the latest merge rule
    (learnt last, so rarest in general), then the higher id.
    """
    work = _Removals(merges, frequencies)
    heap = [(work.key(token), token) for token in merges if token not in never]
    heapq.heapify(heap)
    while heap and len(work.order) < count:
        key, token = heap[0]
        now = work.key(token)
        if now != key:
            heapq.heapreplace(heap, (now, token))
            continue
        heapq.heappop(heap)
        work.remove(token)
    return [Removal(token, work.parts[token], cost) for token, cost in work.order]


class _Removals:
    """The removals so far and what another would cost; every key only grows while others are removed."""

    def __init__(self, merges: Mapping[int, tuple[int, int, int]], frequencies: Sequence[int]) -> None:
        self._merges = merges
        self._frequency = [int(value) for value in frequencies]
        self._users: dict[int, set[int]] = {}  # token -> removed tokens with it among their parts
        self.parts: dict[int, tuple[int, ...]] = {}
        self.order: list[tuple[int, int]] = []

    def _spelled(self, token: int) -> tuple[int, ...]:
        left, right, _ = self._merges[token]
        return self.parts.get(left, (left,)) + self.parts.get(right, (right,))

    def key(self, token: int) -> tuple[int, int, int, int]:
        """(cost, worst number of parts, order of the rule, order of the id)."""
        length = len(self._spelled(token))
        worst = max([length, FREE_PARTS, *(
            len(self.parts[user]) + self.parts[user].count(token) * (length - 1)
            for user in self._users.get(token, ()))])
        return self._frequency[token] * (length - 1), worst, -self._merges[token][2], -token

    def remove(self, token: int) -> None:
        """Take a token apart, everywhere."""
        spelled = self._spelled(token)
        self.order.append((token, self._frequency[token] * (len(spelled) - 1)))
        for part in spelled:
            self._frequency[part] += self._frequency[token]
        self._frequency[token] = 0
        users = {token, *self._users.pop(token, ())}
        self.parts[token] = spelled
        for user in users - {token}:
            self.parts[user] = tuple(part for old in self.parts[user]
                                     for part in (spelled if old == token else (old,)))
        for part in spelled:
            self._users.setdefault(part, set()).update(users)


def expand(ids: Any, parts: Mapping[int, tuple[int, ...]], vocab_size: int) -> tuple[Any, Any]:
    """Take the removed tokens in a row of ids apart. ids: (N,). Returns (ids (M,) uint32, lengths (N,) int64)."""
    length: Any = np.ones(vocab_size, np.int64)
    for token, spelled in parts.items():
        length[token] = len(spelled)
    lengths = length[ids]
    if int(lengths.max(initial=1)) == 1:
        return np.asarray(ids, np.uint32), lengths
    offsets: Any = np.zeros(vocab_size, np.int64)
    offsets[:] = np.cumsum(length) - length
    table: Any = np.repeat(np.arange(vocab_size, dtype=np.uint32), length)
    for token, spelled in parts.items():
        table[offsets[token]:offsets[token] + len(spelled)] = spelled
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return table[np.repeat(offsets[ids], lengths) + within], lengths
