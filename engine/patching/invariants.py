"""What must hold in a patched vocabulary before it may serve: check, check_rows, and the n-grams that never match.

Each condition is one function that raises one named error. It reads no file and encodes nothing.
Source: section 5 point 2 of our notes on AdaptiVocab (arXiv 2503.19693).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.patching import errors
from engine.patching.artefact import Artefact
from engine.patching.base import BaseVocabulary


def check(artefact: Artefact, base: BaseVocabulary | None = None, origin: str = "patched vocabulary") -> None:
    """Raise the named error of the first condition that does not hold. base: adds those on hash, pieces and text."""
    if base is not None:
        _check_base(artefact, base, origin)
    _check_ranges(artefact, origin)
    _check_bijection(artefact, base, origin)
    _check_removed(artefact, origin)
    _check_ngrams(artefact, origin)
    _check_merges(artefact, origin)
    if base is not None:
        _check_text(artefact, base, origin)


def check_rows(artefact: Artefact, rows: int, matrix: str) -> None:
    """An embedding matrix has one row for each new id. Raises WrongRows; matrix: its name in the message."""
    if rows != artefact.vocab_size:
        raise errors.WrongRows(f"{matrix} has {rows} rows, the patched vocabulary {artefact.vocab_size} ids; "
                               "the model was not made for this vocabulary: run `python -m scripts.patch apply`")


@dataclass(frozen=True)
class DeadNgrams:
    """n-grams (their index in priority order) that no text can produce; kept for their ids, never refused."""

    removed_piece: tuple[int, ...]
    prefix_dominated: tuple[int, ...]


def dead_ngrams(ngrams: Sequence[Sequence[int]], removed: object = frozenset()) -> DeadNgrams:
    """Those with a removed piece, and those with a proper prefix of higher priority. removed: supports `in`."""
    rank = {tuple(pieces): index for index, pieces in reversed(list(enumerate(ngrams)))}
    with_removed, dominated = [], []
    for index, pieces in enumerate(ngrams):
        if any(piece in removed for piece in pieces):  # type: ignore[operator]
            with_removed.append(index)
        elif any(rank.get(tuple(pieces[:length]), index) < index for length in range(1, len(pieces))):
            dominated.append(index)
    return DeadNgrams(tuple(with_removed), tuple(dominated))


def _check_base(artefact: Artefact, base: BaseVocabulary, origin: str) -> None:
    if artefact.base_sha256 != base.sha256 or artefact.base_vocab_size != base.vocab_size:
        raise errors.BaseMismatch(
            f"{origin}: belongs to the base tokenizer {artefact.base_sha256[:12]} ({artefact.base_vocab_size} ids), "
            f"the one given is {base.sha256[:12]} ({base.vocab_size} ids); give the tokenizer it was built on")


def _check_ranges(artefact: Artefact, origin: str) -> None:
    size, base_size = artefact.vocab_size, artefact.base_vocab_size
    if len(artefact.ngram_ids) != len(artefact.ngrams):
        raise errors.MalformedFile(f"{origin}: {len(artefact.ngrams)} n-grams but {len(artefact.ngram_ids)} ids")
    new = (("n-gram", artefact.ngram_ids), ("kept token", artefact.new_id_of.values()),
           ("merge", [side for pair in artefact.merges for side in pair]))
    old = (("removed token", artefact.removed), ("kept token", artefact.new_id_of),
           ("decomposition", [part for parts in artefact.removed.values() for part in parts]),
           ("n-gram", [part for parts in artefact.ngrams for part in parts]),
           ("converter", [part for parts in artefact.old_ids for part in parts]))
    for limit, groups in ((size, new), (base_size, old)):
        for what, ids in groups:
            bad = next((token for token in ids if not 0 <= token < limit), None)
            if bad is not None:
                raise errors.IdOutOfRange(f"{origin}: a {what} has the id {bad}; allowed: 0..{limit - 1}")


def _check_bijection(artefact: Artefact, base: BaseVocabulary | None, origin: str) -> None:
    taken: dict[int, str] = {}
    claims = [(new, f"base token {old}") for old, new in artefact.new_id_of.items()]
    claims += [(new, f"n-gram {index}") for index, new in enumerate(artefact.ngram_ids)]
    for new, who in claims:
        if new in taken:
            raise errors.IdCollision(f"{origin}: new id {new} is claimed by {taken[new]} and {who}")
        taken[new] = who
    if len(taken) != artefact.vocab_size:
        hole = next(new for new in range(artefact.vocab_size) if new not in taken)
        raise errors.IdsNotContiguous(f"{origin}: new id {hole} belongs to no token; the ids must be "
                                      f"0..{artefact.vocab_size - 1} without a gap")
    for old in range(artefact.base_vocab_size):
        kept, removed = old in artefact.new_id_of, old in artefact.removed
        if kept == removed and (kept or base is None or base.has(old)):
            if not kept and base is None:
                continue  # an id without a token may stay unmapped; only the base tells
            raise errors.KeptTokenUnmapped(f"{origin}: base token {old} is "
                                           f"{'both kept and removed' if kept else 'neither kept nor removed'}")
    for old, new in artefact.new_id_of.items():
        if artefact.old_ids[new] != (old,):
            raise errors.ConverterMismatch(f"{origin}: new id {new} is base token {old}, but its converter says "
                                           f"{list(artefact.old_ids[new][:8])}")


def _check_removed(artefact: Artefact, origin: str) -> None:
    removed = artefact.removed
    for token, parts in removed.items():
        if any(part in removed for part in parts):
            if _reaches(token, removed):
                raise errors.CyclicDecomposition(f"{origin}: removed token {token} decomposes into itself")
            part = next(part for part in parts if part in removed)
            raise errors.RemovedPart(f"{origin}: removed token {token} decomposes into {part}, which is removed too")
        if len(parts) < 2:
            raise errors.DecompositionTooShort(f"{origin}: removed token {token} has {len(parts)} parts; "
                                               "at least 2 are needed")


def _reaches(token: int, removed: dict[int, tuple[int, ...]]) -> bool:
    """Whether following decompositions from a token leads back to it. Iterative: a chain may be long."""
    seen: set[int] = set()
    stack = list(removed[token])
    while stack:
        part = stack.pop()
        if part == token:
            return True
        if part in removed and part not in seen:
            seen.add(part)
            stack += removed[part]
    return False


def _check_ngrams(artefact: Artefact, origin: str) -> None:
    seen: dict[tuple[int, ...], int] = {}
    for index, pieces in enumerate(artefact.ngrams):
        if len(pieces) < 2:
            raise errors.NgramTooShort(f"{origin}: n-gram {index} has {len(pieces)} pieces; at least 2 are needed")
        # Appended merges may make one text of the same pieces in two orders of merging; matching never sees those.
        if pieces in seen and artefact.kind == "patch":
            raise errors.DuplicateNgram(f"{origin}: n-grams {seen[pieces]} and {index} have the same pieces")
        seen[pieces] = index
        if not artefact.old_ids[artefact.ngram_ids[index]]:
            raise errors.NgramText(f"{origin}: n-gram {index} stands for no base token")


def _check_merges(artefact: Artefact, origin: str) -> None:
    if artefact.kind == "patch":
        if artefact.merges:
            raise errors.BadMerge(f"{origin}: has merges, which only kind appended-merges may have")
        return
    first = artefact.base_vocab_size
    if artefact.removed or len(artefact.merges) != len(artefact.ngrams):
        raise errors.BadMerge(f"{origin}: {len(artefact.merges)} merges for {len(artefact.ngrams)} new tokens and "
                              f"{len(artefact.removed)} removed; appended-merges needs one each and none removed")
    for index, (left, right) in enumerate(artefact.merges):
        new = artefact.ngram_ids[index]
        pieces = artefact.old_ids[left] + artefact.old_ids[right]
        if new != first + index or max(left, right) >= new or artefact.ngrams[index] != pieces:
            raise errors.BadMerge(f"{origin}: merge {index} ({left}, {right}) does not make new id {first + index} "
                                  "of two earlier tokens")


def _check_text(artefact: Artefact, base: BaseVocabulary, origin: str) -> None:
    """The conditions on what the ids spell."""
    specials, pieces_of = base.special_ids, base.table.pieces
    for token, parts in artefact.removed.items():
        if token in specials or any(part in specials for part in parts):
            raise errors.SpecialRemoved(f"{origin}: token {token} is removed, but it or a part of it is special")
        _check_pieces((token, *parts), base, f"{origin}: removed token {token}")
        if b"".join(pieces_of[part] for part in parts) != pieces_of[token]:
            raise errors.DecompositionText(f"{origin}: the parts {list(parts[:8])} do not spell removed token {token}")
    for index, pieces in enumerate(artefact.ngrams):
        old = artefact.old_ids[artefact.ngram_ids[index]]
        if any(part in specials for part in (*pieces, *old)):
            raise errors.SpecialInNgram(f"{origin}: n-gram {index} has a special token in it")
        _check_pieces((*pieces, *old), base, f"{origin}: n-gram {index}")
        if old != pieces and b"".join(map(pieces_of.__getitem__, old)) != b"".join(map(pieces_of.__getitem__, pieces)):
            raise errors.NgramText(f"{origin}: n-gram {index}: its pieces {list(pieces[:8])} and its converter "
                                   f"{list(old[:8])} spell different texts")


    if artefact.kind == "appended-merges":
        _check_spellings(artefact, base, origin)


def _check_spellings(artefact: Artefact, base: BaseVocabulary, origin: str) -> None:
    """A BPE names its tokens by their spelling: no merge may spell a token that there is already."""
    taken = set(base.ids)
    for index, pieces in enumerate(artefact.ngrams):
        spelled = "".join(base.strings[piece] or "" for piece in pieces)
        if spelled in taken:
            raise errors.BadMerge(f"{origin}: merge {index} spells {spelled[:40]!r}, which is a token already")
        taken.add(spelled)


def _check_pieces(ids: Sequence[int], base: BaseVocabulary, where: str) -> None:
    missing = next((token for token in ids if not base.has(token)), None)
    if missing is not None:
        raise errors.MissingPiece(f"{where} needs base id {missing}, which the base vocabulary does not have")
