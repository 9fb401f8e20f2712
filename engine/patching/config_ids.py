"""Token ids inside config.json and generation_config.json, from the base vocabulary's to the patched one's.

It knows which keys hold ids; it opens no file and does not know what a token is for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from engine.core.errors import LoadError

log = logging.getLogger(__name__)

ID_ENDINGS = ("_token_id", "_token_ids", "_words_ids")
ID_KEYS = ("suppress_tokens", "begin_suppress_tokens")
MAX_DEPTH = 8


class IdMap:
    """Base id -> new id, or why there is none. new_id_of: kept base ids; removed: base ids without a new one;
    base_vocab: number of base ids."""

    def __init__(self, new_id_of: Mapping[int, int], removed: Mapping[int, object], base_vocab: int) -> None:
        self._new_id_of = new_id_of
        self._removed = removed
        self._base_vocab = base_vocab

    def __call__(self, token: int, where: str) -> int | None:
        """The new id; None for an id that the base vocabulary has no token for (-1, or a padding row's).

        Raises LoadError, naming key and id, for a removed token: no single new id means the same.
        """
        if not 0 <= token < self._base_vocab:
            log.warning("%s: id %d has no token in the base vocabulary and is left out", where, token)
            return None
        if token in self._new_id_of:
            return self._new_id_of[token]
        kind = "was removed by" if token in self._removed else "is not kept by"
        raise LoadError(f"{where}: base id {token} {kind} this patch, so no single new id means the same; build the "
                        "patch so that it keeps this token, or take the id out of the file")


def remap_ids(values: Mapping[str, Any], ids: IdMap, origin: str) -> dict[str, Any]:
    """A copy of a configuration object with every id in it mapped. origin names it in errors.

    Keys: *_token_id (eos may be a list), *_token_ids, *_words_ids (lists of lists), suppress_tokens,
    begin_suppress_tokens, forced_decoder_ids ([[position, id]]), sequence_bias ([[[ids], bias]]). An id without a
    base token becomes null, or leaves its list. Raises LoadError for a removed token or a value that is no id.
    """
    mapped = dict(values)
    for key, value in values.items():
        where = f"{origin}: {key}"
        if key == "forced_decoder_ids" and value is not None:
            mapped[key] = [[position, _mapped(token, ids, where)] for position, token in _pairs(value, where)]
        elif key == "sequence_bias" and value is not None:
            mapped[key] = [[_mapped(tokens, ids, where), bias] for tokens, bias in _pairs(value, where)]
        elif key.endswith(ID_ENDINGS) or key in ID_KEYS:
            mapped[key] = _mapped(value, ids, where)
    return mapped


def _mapped(value: Any, ids: IdMap, where: str, depth: int = 0) -> Any:
    """An id, None, or a list of either, mapped."""
    if value is None:
        return None
    if isinstance(value, list) and depth < MAX_DEPTH:
        found = [_mapped(item, ids, where, depth + 1) for item in value]
        return [item for item in found if item is not None]
    if isinstance(value, bool) or not isinstance(value, int):
        raise LoadError(f"{where}={str(value)[:80]!r} is not a token id, nor a list of them")
    return ids(value, where)


def _pairs(value: Any, where: str) -> list[tuple[Any, Any]]:
    """A list of two-element lists."""
    if not isinstance(value, list) or not all(isinstance(item, list) and len(item) == 2 for item in value):
        raise LoadError(f"{where}={str(value)[:80]!r} is not a list of pairs")
    return [(first, second) for first, second in value]
