"""A patched vocabulary in memory: Artefact, and the two ways in which new ids are given out.

What must hold between its numbers is invariants.py's, its files are artefact_files.py's, encoding is
engine/tokenization/patched.py's.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.patching.base import BaseVocabulary
from engine.patching.errors import BadMerge, IdsNotContiguous

FORMAT, VERSION = "tessera-patch", 1

CONFIG_MARK = "tessera_patch"
"""The key of config.json that says: the ids in this file and generation_config.json are patched ids."""

KINDS = ("patch", "appended-merges")


@dataclass(frozen=True)
class Artefact:
    """One patched vocabulary; ids are ints, pieces are base ids throughout.

    base_sha256: canonical hash of the base tokenizer (base.py); base_vocab_size: one more than its highest id.
    kind: "patch" = removal, then leftmost matching of n-grams; "appended-merges" = the BPE itself has more merges.
    removed: base id -> base ids it is spelled with instead, in text order. ngrams: pieces, in priority order.
    old_ids: per new id, the base ids whose text and embeddings it stands for. new_id_of: kept base id -> new id.
    ngram_ids: new id of each n-gram. merges: appended-merges only, (left, right) new ids of ngram_ids[i].
    meta: JSON facts that change no id: provenance, add_bos, statistics.
    """

    base_sha256: str
    base_vocab_size: int
    kind: str
    removed: dict[int, tuple[int, ...]]
    ngrams: tuple[tuple[int, ...], ...]
    old_ids: tuple[tuple[int, ...], ...]
    new_id_of: dict[int, int]
    ngram_ids: tuple[int, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    merges: tuple[tuple[int, int], ...] = ()

    @property
    def vocab_size(self) -> int:
        """V: the number of new ids, and of rows of both embedding matrices."""
        return len(self.old_ids)

    @functools.cached_property
    def sha256(self) -> str:
        """Names the vocabulary: base, kind and every array, not meta. Part of any key that caches by ids."""
        digest = hashlib.sha256(f"{FORMAT} {VERSION} {self.kind} {self.base_sha256} {self.base_vocab_size}".encode())
        for name, array in sorted(to_arrays(self).items()):
            digest.update(f" {name} {array.size} ".encode() + array.tobytes())
        return digest.hexdigest()


def allocate(base: BaseVocabulary, removed: Mapping[int, Sequence[int]], ngrams: Sequence[Sequence[int]],
             meta: Mapping[str, Any] | None = None) -> Artefact:
    """The ids of our own builder: n-grams, in priority order, take the ids of removed tokens, ascending, then those
    after the base's last; no kept token moves. Every n-gram stands for its own pieces.

    Raises IdsNotContiguous when fewer n-grams are added than tokens removed.
    """
    free = sorted(removed)
    if len(ngrams) < len(free):
        raise IdsNotContiguous(f"{len(free)} tokens are removed but only {len(ngrams)} n-grams added, which leaves "
                               f"unused ids; remove {len(ngrams)} at most")
    ngram_ids = (*free, *range(base.vocab_size, base.vocab_size + len(ngrams) - len(free)))
    old_ids: list[tuple[int, ...]] = [(token,) for token in range(base.vocab_size)]
    old_ids += [()] * (len(ngrams) - len(free))
    for new_id, pieces in zip(ngram_ids, ngrams, strict=True):
        old_ids[new_id] = tuple(pieces)
    kept = {token: token for token in range(base.vocab_size) if token not in removed}
    return Artefact(base.sha256, base.vocab_size, "patch", {token: tuple(removed[token]) for token in free},
                    tuple(tuple(pieces) for pieces in ngrams), tuple(old_ids), kept, ngram_ids, dict(meta or {}))


def allocate_merges(base: BaseVocabulary, merges: Sequence[tuple[int, int]],
                    meta: Mapping[str, Any] | None = None) -> Artefact:
    """Kind appended-merges: merge i makes new id base.vocab_size + i of two earlier ids; nothing is removed.

    Raises BadMerge for a merge of a token that is not made yet.
    """
    old_ids: list[tuple[int, ...]] = [(token,) for token in range(base.vocab_size)]
    for left, right in merges:
        if not (0 <= left < len(old_ids) and 0 <= right < len(old_ids)):
            raise BadMerge(f"merge {len(old_ids) - base.vocab_size} joins {left} and {right}; allowed: ids below "
                           f"{len(old_ids)}")
        old_ids.append(old_ids[left] + old_ids[right])
    return Artefact(base.sha256, base.vocab_size, "appended-merges", {}, tuple(old_ids[base.vocab_size:]),
                    tuple(old_ids), {token: token for token in range(base.vocab_size)},
                    tuple(range(base.vocab_size, len(old_ids))), dict(meta or {}),
                    tuple((left, right) for left, right in merges))


def to_arrays(artefact: Artefact) -> dict[str, npt.NDArray[np.int32]]:
    """The arrays of the file, little-endian int32."""
    removed = sorted(artefact.removed.items())
    new_id_of: npt.NDArray[np.int32] = np.full(artefact.base_vocab_size, -1, "<i4")
    if artefact.new_id_of:
        new_id_of[list(artefact.new_id_of)] = list(artefact.new_id_of.values())
    arrays = {"new_id_of": new_id_of, "ngram_ids": np.array(artefact.ngram_ids, "<i4"),
              "merges": np.array(artefact.merges, "<i4").reshape(-1, 2),
              "removed_ids": np.array([token for token, _ in removed], "<i4")}  # fmt: skip
    for name, rows in (("removed", [parts for _, parts in removed]), ("ngram", artefact.ngrams),
                       ("old", artefact.old_ids)):
        arrays[f"{name}_offsets"], arrays[f"{name}_parts"] = _ragged(rows)
    return arrays


def _ragged(rows: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Rows of several lengths as offsets (rows + 1) and their items in a row."""
    offsets: npt.NDArray[np.int32] = np.zeros(len(rows) + 1, "<i4")
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return offsets, np.array([item for row in rows for item in row], "<i4")
