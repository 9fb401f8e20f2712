"""Text in which special strings are only text: Inert, a second copy of a tokenizer that knows no special string.

In the copy every special token goes by a secret name. What a chat template writes is renamed before it is encoded;
what users write is not, so nobody can spell a token that ends a text or changes the speaker. Everything else of the
text is encoded in one pass by the same rules as ever, so ordinary chats get the ids they always had.
(The library's own switch, encode_special_tokens, holds for a whole text, and would have to be flipped under others.)
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any, NamedTuple

import tokenizers

from engine.core.errors import LoadError
from engine.tokenization.vocabulary import Part


class Joined(NamedTuple):
    """Parts as one text for the copy. bounds: where parts meet, as character indexes, rising."""

    text: str
    bounds: list[int]


class Inert:
    """firm: the special tokens' strings. names: those, and the marks among the other added tokens (some vocabularies
    do not call all of theirs special): `<|...|>`, and what the chat template's source writes of `<...>` and `[...]`.
    The rest (HTML tags, runs of spaces, rare letters) are added tokens that ordinary texts consist of, and stay.
    names -> secret name. pattern: finds any of them, the longest first."""

    def __init__(self, backend: tokenizers.Tokenizer, template: str | None) -> None:
        definition = json.loads(backend.to_str())
        added = definition.get("added_tokens") or []
        nonce = secrets.token_hex(16)
        self.firm = frozenset(token["content"] for token in added if token["special"] and token["content"])
        marks = {token["content"] for token in added if _is_mark(token["content"])}
        spelled = {text for text in marks if text in (template or "") or _is_control(text)}
        # Brackets, because some added tokens match only where no letter is beside them.
        self.names = {text: f"<{nonce}{number}>" for number, text in enumerate(sorted(self.firm | spelled))}
        self.pattern = re.compile("|".join(map(re.escape, sorted(self.names, key=len, reverse=True))) or r"(?!)")
        ids = {self.names.get(token["content"], token["content"]): token["id"] for token in added}
        _rename(definition, self.names, ids)
        try:
            self.backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises no narrower one
            raise LoadError("tokenizer.json's special strings cannot be told from text: its vocabulary without them is "
                            f"refused: {str(error)[:160]}") from None
        for name, token in ids.items():
            if self.backend.token_to_id(name) != token:
                raise LoadError(f"added token {token} of tokenizer.json cannot be told from text: its vocabulary "
                                "numbers it in another way; use a BPE vocabulary")

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which no special string counts; nothing is added."""
        return list(self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def join(self, parts: Iterable[Part]) -> Joined:
        """One text for `backend`: special strings count where a part says so."""
        texts, bounds, length = [], [], 0
        for text, parse_special in parts:
            texts.append(self.pattern.sub(lambda found: self.names[found[0]], text) if parse_special else text)
            length += len(texts[-1])
            bounds.append(length)
        return Joined("".join(texts), bounds[:-1])


def _is_control(text: str) -> bool:
    """`<|fim_prefix|>` and the like, also with the full-width bar."""
    return len(text) > 4 and text[0] == "<" and text[-1] == ">" and {text[1], text[-2]} <= {"|", "\uff5c"}


def _is_mark(text: str) -> bool:
    return len(text) > 2 and (text[0], text[-1]) in (("<", ">"), ("[", "]"))


def _rename(definition: dict[str, Any], names: dict[str, str], ids: dict[str, int]) -> None:
    """Give the tokens their secret names in a tokenizer.json. ids: name -> id of every added token.

    The old name leaves the vocabulary; but what a rule of the model still names (a merge's side, the unknown token)
    stays. Raises LoadError for a merge that makes one of them: ordinary text would become that token.
    """
    model = definition["model"]
    for token in definition["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    definition["post_processor"] = None
    vocab = model["vocab"]
    if not isinstance(vocab, dict):  # Unigram: a list of [piece, score], numbered by place
        for name, token in ids.items():
            if token < len(vocab):
                vocab[token][0] = name
        return
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model.get("merges", ())]
    made = next((text for merge in merges if (text := "".join(merge)) in names), None)
    if made is not None:
        raise LoadError(f"tokenizer.json: a merge makes {made[:80]!r}, which is a special token too, so users' text "
                        "cannot be told from it; take the merge out, or use the model's own tokenizer.json")
    used = {model.get("unk_token"), *(part for merge in merges for part in merge)}
    for text in names:
        if text not in used:
            vocab.pop(text, None)
    vocab |= ids  # an added token gets the id of the piece of its name, or else the next one: name them all
