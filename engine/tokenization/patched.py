"""A patched vocabulary behind the Tokenizer protocol: PatchedTokenizer, load_patched.

Text -> the base tokenizer's ids -> removed tokens by their parts -> n-grams -> new ids; and back through the base
ids that each new id stands for. Special tokens are single ids that no n-gram contains, so nothing merges across one.
The kind appended-merges runs the base's own BPE with more merges instead. It knows no requests.
"""

from __future__ import annotations

import functools
import itertools
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from engine.core.errors import LoadError, RequestError
from engine.patching.artefact import CONFIG_MARK, Artefact
from engine.patching.artefact_files import read
from engine.patching.base import BaseVocabulary, base_of
from engine.patching.merging import Merger
from engine.tokenization.hf import HfTokenizer, check_unicode, configured_ends, load_base_tokenizer
from engine.tokenization.inert import Inert, Joined
from engine.tokenization.jsonfile import read_optional_object
from engine.tokenization.vocabulary import Encoded, Part, PieceTable


class PatchedTokenizer:
    """A Tokenizer (see vocabulary.py) whose ids may stand for several base pieces. Make it with load_tokenizer.

    add_special_tokens adds what the base would add, unless the artefact says add_bos false (imported ones do: their
    models were trained without). upstream: for verification, as the published code behaves: special strings in the
    text are parsed, nothing is ever added, and the unknown token comes out as its BASE id.
    """

    def __init__(self, base: HfTokenizer, vocabulary: BaseVocabulary, artefact: Artefact, bos_id: int | None,
                 eos_ids: tuple[int, ...], upstream: bool = False) -> None:
        self.base = base
        self.artefact = artefact
        self._vocabulary = vocabulary
        self.table = _patched_table(vocabulary.table, artefact)
        self.vocab_size = artefact.vocab_size
        self.special_ids = self.table.special_ids
        self.bos_id, self.eos_ids = bos_id, eos_ids
        self.chat_template = base.chat_template
        self.named_specials = dict(base.named_specials)
        self._adds = not upstream and artefact.meta.get("add_bos") is not False
        self._unknown = _unknown_ids(base, artefact) if upstream else None
        self._merger: Merger | None = None
        self._backend = base.backend
        if artefact.kind == "patch":
            self._merger = Merger(artefact.base_vocab_size, artefact.removed, artefact.ngrams, artefact.ngram_ids,
                                  artefact.new_id_of)
        else:
            self._backend = _with_merges(base.backend, vocabulary, artefact)

    @functools.cached_property
    def max_token_bytes(self) -> int:
        """The most bytes of text that one id can stand for, decoded or spelled as in the vocabulary."""
        decoded = max(map(len, self.table.pieces), default=1)
        if not self.table.byte_runs:
            return max(1, decoded)
        spelled = [len((text or "").encode()) for text in self._vocabulary.strings]
        return max(1, decoded, *(sum(spelled[token] for token in old) for old in self.artefact.old_ids))

    @functools.cached_property
    def _inert(self) -> Inert:
        """The copy of the backend for text that users write."""
        return self.base.inert if self._merger is not None else Inert(self._backend, self.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """Ids of a text. parse_special: False reads `</s>` and the like as ordinary text (what users write).

        Raises RequestError for text that is not valid Unicode.
        """
        return self.encode_batch([text], add_special_tokens, parse_special=parse_special)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True, *, parse_special: bool = True
                     ) -> list[list[int]]:
        """encode of each. The library uses all cores unless TOKENIZERS_PARALLELISM forbids it."""
        for text in texts:
            check_unicode(text)
        add = add_special_tokens and self._adds
        if parse_special:
            return [self._second(item.ids)
                    for item in self._backend.encode_batch_fast(list(texts), add_special_tokens=add)]
        found = self._inert.backend.encode_batch(list(texts), add_special_tokens=False)
        return [self._second(self._backend.post_process(item, None, add).ids) for item in found]

    def encode_both(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """See Tokenizer."""
        base_ids = self.base.encode(text, add_special_tokens and self._adds)
        if self._merger is None:
            return Encoded(self.encode(text, add_special_tokens), base_ids)
        return Encoded(self._second(base_ids), base_ids)

    def encode_parts(self, parts: Sequence[Part]) -> Encoded:
        """See Tokenizer. The base encodes the text whole, as without a patch; a base token across a boundary stays
        alone. An appended merge across one is taken apart again."""
        joined = self._inert.join(parts)
        check_unicode(joined.text)
        if self._merger is None:
            return Encoded(self._apart(joined), self.base.encode_parts(parts).base_ids)
        found = self._inert.backend.encode(joined.text, add_special_tokens=False)
        base_ids, ids = list(found.ids), []
        for begin, end in _stretches(found.offsets, joined.bounds):
            ids += self._second(base_ids[begin:end])
        return Encoded(ids, base_ids)

    def _apart(self, joined: Joined) -> list[int]:
        """Ids of appended-merges: a new id across a boundary by the base ids that it stands for."""
        found = self._inert.backend.encode(joined.text, add_special_tokens=False)
        ids: list[int] = []
        for token, (first, last) in zip(found.ids, found.offsets, strict=True):
            new = token >= self.artefact.base_vocab_size  # then its new ids begin (invariants.py)
            across = new and bisect_right(joined.bounds, first) != bisect_right(joined.bounds, last - 1)
            ids += self.artefact.old_ids[token] if across else (token,)
        return ids

    def from_base_ids(self, ids: Sequence[int]) -> list[int]:
        """See Tokenizer."""
        for token in ids:
            if token not in self.artefact.new_id_of and token not in self.artefact.removed:
                self.to_new_id(token)  # raises
        if self._merger is not None:
            return self._merger(ids)
        text = self.base.decode(ids, skip_special_tokens=False)
        # Merges work on texts: ids that are not the base's encoding of theirs keep themselves, as its merges kept them.
        if self.base.encode(text, add_special_tokens=False) == list(ids):
            return self.encode(text, add_special_tokens=False)
        return [self.artefact.new_id_of[token] for token in ids]

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True
                            ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters [begin, end) of the text it covers.

        A token of several pieces reaches from its first to its last; a removed token's span is divided by its
        parts' lengths (a character that two parts share belongs to both). Raises RequestError as encode does.
        """
        check_unicode(text)
        found = self._backend.encode(text, add_special_tokens=add_special_tokens and self._adds)
        if self._merger is None:
            return list(found.ids), list(found.offsets)
        merged = self._merger.traced(found.ids)
        spans: list[tuple[int, int]] = []
        by_origin = zip(merged.origins, merged.pieces, strict=True)
        for index, parts in itertools.groupby(by_origin, key=lambda pair: pair[0]):
            spans += _divide(text, found.offsets[index], [self._piece_bytes(piece) for _, piece in parts])
        bounds = itertools.pairwise([*merged.starts, len(spans)])
        offsets = [(spans[start][0], spans[end - 1][1]) for start, end in bounds]
        return [self._compatible(token) for token in merged.ids], offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; ids the vocabulary does not have stand for nothing."""
        return self.base.decode(self.to_base_ids(ids), skip_special_tokens)

    def to_base_ids(self, ids: Sequence[int]) -> list[int]:
        """The base ids that ids stand for; not what the base would encode their text to."""
        old = self.artefact.old_ids
        return [part for token in ids if 0 <= token < len(old) for part in old[token]]

    def to_new_id(self, base_id: int) -> int:
        """The one new id of a base id. Raises RequestError for a removed one, which has none, or an unknown one."""
        if base_id in self.artefact.new_id_of:
            return self.artefact.new_id_of[base_id]
        why = "was removed" if base_id in self.artefact.removed else "is not in the base vocabulary"
        raise RequestError(f"base token {base_id} {why}: no single token of the patched vocabulary means the same; "
                           "use ids of the patched vocabulary, or text")

    def token_bytes(self, token: int) -> bytes:
        """Bytes an id stands for; b"" for special and unknown ids."""
        return b"" if token in self.special_ids else self.table.piece(token)

    def token_name(self, token: int) -> str | tuple[str, ...]:
        """A kept token's spelling in the base vocabulary, an n-gram's pieces' spellings."""
        pieces = self._ngram_of.get(token)
        strings = self._vocabulary.strings
        if pieces is not None:
            return tuple(strings[piece] or "" for piece in pieces)
        return strings[self.artefact.old_ids[token][0]] or ""

    def names(self, text: str) -> list[str | tuple[str, ...]]:
        """The tokens of a text as upstream's tokenize names them."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.token_name(token) for token in (ids if self._merger is None else self._merger(ids))]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The messages in the model's chat template."""
        return self.base.render_chat(messages, add_generation_prompt)

    def render_parts(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[Part]:
        """See Tokenizer."""
        return self.base.render_parts(messages, add_generation_prompt)

    @functools.cached_property
    def _ngram_of(self) -> dict[int, tuple[int, ...]]:
        """New id -> its pieces, n-grams only."""
        return dict(zip(self.artefact.ngram_ids, self.artefact.ngrams, strict=True))

    def _second(self, ids: list[int]) -> list[int]:
        """Everything after the base's encoding."""
        new = ids if self._merger is None else self._merger(ids)
        if self._unknown is not None and self._unknown[0] in new:
            return [self._compatible(token) for token in new]
        return new

    def _compatible(self, token: int) -> int:
        """upstream: the unknown token's base id instead of its new one."""
        return self._unknown[1] if self._unknown is not None and token == self._unknown[0] else token

    def _piece_bytes(self, token: int) -> int:
        """Length of a base piece in bytes."""
        return len(self._vocabulary.table.pieces[token])


def load_patched(path: Path, patch: Path, upstream: bool = False) -> PatchedTokenizer:
    """The tokenizer of a model folder (or tokenizer.json) patched by an artefact's folder.

    bos and eos come from generation_config.json and config.json; where config.json does not say that its ids are
    patched ones, they are base ids and are mapped. Raises ArtefactError (a LoadError) naming what does not hold.
    """
    base, definition = load_base_tokenizer(path)
    vocabulary = base_of(base.vocab(), base.table, definition)
    artefact = read(patch, base=vocabulary)
    folder = path.parent if path.is_file() else path
    if CONFIG_MARK in read_optional_object(folder / "config.json"):
        ends = configured_ends(folder, artefact.vocab_size)
        for key in ends:
            own = vocabulary.ids.get(base.named_specials.get(key, ""))
            ends[key] = ends[key] or (() if own is None else (_mapped(own, artefact, patch),))
        return PatchedTokenizer(base, vocabulary, artefact, next(iter(ends["bos_token"]), None), ends["eos_token"],
                                upstream)
    bos_id = None if base.bos_id is None else _mapped(base.bos_id, artefact, patch)
    return PatchedTokenizer(base, vocabulary, artefact, bos_id,
                            tuple(_mapped(token, artefact, patch) for token in base.eos_ids), upstream)


def _mapped(token: int, artefact: Artefact, patch: Path) -> int:
    """The new id of a token that begins or ends texts."""
    if token not in artefact.new_id_of:
        raise LoadError(f"{patch}: base token {token}, which begins or ends this model's texts, is not kept; build the "
                        "patch so that it keeps it")
    return artefact.new_id_of[token]


def _patched_table(table: PieceTable, artefact: Artefact) -> PieceTable:
    """The bytes of every new id."""
    new_of = artefact.new_id_of
    pieces = [b"".join([table.pieces[token] for token in old]) for old in artefact.old_ids]
    mixed = {}
    if table.byte_runs:
        mixed = {new: tuple((table.pieces[token], token in table.byte_ids) for token in old)
                 for new, old in enumerate(artefact.old_ids)
                 if len(old) > 1 and not table.byte_ids.isdisjoint(old)}
    return PieceTable(pieces, frozenset(new_of[token] for token in table.special_ids if token in new_of),
                      table.byte_runs, frozenset(new_of[token] for token in table.byte_ids if token in new_of),
                      table.strip, table.strip_text, mixed)


def _unknown_ids(base: HfTokenizer, artefact: Artefact) -> tuple[int, int] | None:
    """(new id, base id) of the base's unknown token."""
    text = base.named_specials.get("unk_token")
    old = None if text is None else base.backend.token_to_id(text)
    return None if old is None or old not in artefact.new_id_of else (artefact.new_id_of[old], old)


def _with_merges(backend: tokenizers.Tokenizer, vocabulary: BaseVocabulary, artefact: Artefact) -> tokenizers.Tokenizer:
    """The base with the artefact's merges after its own: no text gets more tokens than before."""
    definition = json.loads(backend.to_str())
    model = definition["model"]
    spelled = ["".join(vocabulary.strings[token] or "" for token in old) for old in artefact.old_ids]
    # Added tokens get the id of the piece of the same name, or else the next one: name them all.
    vocab = {token["content"]: token["id"] for token in definition.get("added_tokens") or ()} | model["vocab"]
    vocab |= {spelled[new]: new for new in artefact.ngram_ids}
    model["vocab"] = vocab
    model["merges"] = [*model["merges"], *([spelled[left], spelled[right]] for left, right in artefact.merges)]
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def _stretches(offsets: Sequence[tuple[int, int]], bounds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of consecutive tokens that lie between the same two bounds; a token across one is a stretch of
    its own. offsets: characters of each token; bounds: characters, rising."""
    begin, key = 0, (-1, -1)
    for index, (first, last) in enumerate(offsets):
        # One key a side of a bound; a token across one has another on its left than on its right.
        found = (bisect_right(bounds, first), bisect_right(bounds, max(first, last - 1)))
        if found != key or found[0] != found[1]:
            if index > begin:
                yield begin, index
            begin, key = index, found
    if len(offsets) > begin:
        yield begin, len(offsets)


def _divide(text: str, span: tuple[int, int], lengths: list[int]) -> list[tuple[int, int]]:
    """The characters of each part of a span, by the parts' bytes. A part's bytes beyond the span's (a prefix that the
    normaliser added) are taken off the beginning."""
    if len(lengths) == 1:
        return [span]
    begin, end = span
    at_byte = list(itertools.accumulate((len(char.encode()) for char in text[begin:end]), initial=0))
    extra = sum(lengths) - at_byte[-1]
    spans, reached = [], -extra
    for length in lengths:
        low, high = max(0, reached), max(0, reached + length)
        first = max(index for index, byte in enumerate(at_byte) if byte <= low)
        last = next((index for index, byte in enumerate(at_byte) if byte >= high), len(at_byte) - 1)
        spans.append((begin + first, begin + max(first, last)))
        reached += length
    return spans
