"""A Hugging Face tokenizer folder behind the Tokenizer protocol: tokenizer.json run by the `tokenizers` library.

Encoding is what tokenizer.json says, nothing is guessed from class names; tokenizer_config.json adds the special
tokens' names and the chat template, generation_config.json and config.json the ids that end a text. Decoding never
tidies spaces: `clean_up_tokenization_spaces` is ignored, as transformers 5 does for BPE. It knows no requests.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from engine.core.errors import LoadError, RequestError
from engine.tokenization.byte_table import build_table
from engine.tokenization.chat import ChatTemplate, find_template
from engine.tokenization.inert import Inert
from engine.tokenization.jsonfile import parse_object, read_bytes, read_optional_object
from engine.tokenization.vocabulary import Encoded, Part, PieceTable

MAX_TOKENIZER_BYTES = 256 << 20
NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class HfTokenizer:
    """A Tokenizer (see vocabulary.py) over one folder. Make it with load_tokenizer (load.py)."""

    def __init__(self, backend: tokenizers.Tokenizer, table: PieceTable, named: Mapping[str, str],
                 chat: ChatTemplate | None, bos_id: int | None, eos_ids: tuple[int, ...]) -> None:
        self._backend = backend
        self._chat = chat
        self.table = table
        self.named_specials = dict(named)
        self.vocab_size = len(table.pieces)
        self.special_ids = table.special_ids
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.chat_template = chat.source if chat is not None else None

    @functools.cached_property
    def max_token_bytes(self) -> int:
        """The most bytes of text that one id can stand for: decoded, or spelled as in the vocabulary (where a space
        may be the three bytes of U+2581). Normalisers that shorten text (NFC) are not counted: a limit of
        max_tokens * max_token_bytes is far above any text they matter for."""
        decoded = max(map(len, self.table.pieces), default=1)
        if not self.table.byte_runs:
            return max(1, decoded)
        return max(1, decoded, *(len(piece.encode()) for piece in self._backend.get_vocab()))

    @functools.cached_property
    def inert(self) -> Inert:
        """The copy for text that users write; made when first asked for, which takes as long as loading did."""
        return Inert(self._backend, self.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """Ids of a text. parse_special: False reads `</s>` and the like as text. Raises RequestError for text that is
        not valid Unicode."""
        return self.encode_batch([text], add_special_tokens, parse_special=parse_special)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True, *, parse_special: bool = True
                     ) -> list[list[int]]:
        """encode of each. The library uses all cores unless TOKENIZERS_PARALLELISM forbids it."""
        for text in texts:
            check_unicode(text)
        if not parse_special:
            found = self.inert.backend.encode_batch(list(texts), add_special_tokens=False)
            return [list(self._backend.post_process(item, None, add_special_tokens).ids) for item in found]
        if len(texts) == 1:
            return [self._backend.encode(texts[0], add_special_tokens=add_special_tokens).ids]
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [item.ids for item in encoded]

    def encode_both(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """See Tokenizer."""
        ids = self.encode(text, add_special_tokens)
        return Encoded(ids, ids)

    def encode_parts(self, parts: Sequence[Part]) -> Encoded:
        """See Tokenizer. The text is encoded whole: a piece may join the end of one part and the beginning of the
        next, as it does where nobody tells them apart."""
        text = self.inert.join(parts).text
        check_unicode(text)
        ids = self.inert.encode(text)
        return Encoded(ids, ids)

    def from_base_ids(self, ids: Sequence[int]) -> list[int]:
        """The same: this vocabulary is its own base."""
        return list(ids)

    def to_new_id(self, base_id: int) -> int:
        """The same."""
        return base_id

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; ids the vocabulary does not have stand for nothing."""
        known = [token for token in ids if 0 <= token < self.vocab_size]
        return str(self._backend.decode(known, skip_special_tokens=skip_special_tokens))

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's object; not to be changed."""
        return self._backend

    @property
    def chat(self) -> ChatTemplate | None:
        """The compiled chat template."""
        return self._chat

    def vocab(self) -> dict[str, int]:
        """Spelling in the vocabulary -> id, added tokens included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def token_bytes(self, token: int) -> bytes:
        """Bytes an id stands for; b"" for special and unknown ids."""
        return b"" if token in self.special_ids else self.table.piece(token)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The messages in the model's chat template; encode the result with add_special_tokens=False.

        Raises RequestError when the model has no template or the template refuses the messages.
        """
        return self._template().render(messages, add_generation_prompt)

    def render_parts(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[Part]:
        """See Tokenizer. Raises RequestError as render_chat does, and where users' special strings cannot be told
        from the template's."""
        return self._template().parts(messages, self.inert.pattern, self.inert.firm, add_generation_prompt)

    def _template(self) -> ChatTemplate:
        if self._chat is None:
            raise RequestError("this model has no chat template; use completions, or put a chat_template.jinja into "
                               "its folder", "messages")
        return self._chat


def check_unicode(text: str) -> None:
    """Raises RequestError for a text that is not valid Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"the text has a lone surrogate at character {error.start}, which is not valid "
                           "Unicode; send the whole character", "prompt") from None


def load_base_tokenizer(path_or_name: str | Path) -> tuple[HfTokenizer, dict[str, Any]]:
    """The tokenizer without any patch, and its tokenizer.json. Raises LoadError as load_tokenizer does."""
    path = Path(path_or_name).expanduser()
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise LoadError(f"tokenizer {str(path_or_name)[:200]!r}: there is no such folder; give the folder with "
                        "tokenizer.json")
    file = path if path.suffix == ".json" and path.is_file() else folder / "tokenizer.json"
    backend, definition = _backend(file)
    config = read_optional_object(folder / "tokenizer_config.json")
    named = _named_specials(config)
    _mark_special(backend, config, named)
    table = build_table(backend, definition, str(file))
    template = find_template(folder, config)
    chat = ChatTemplate(template, named, str(folder)) if template is not None else None
    return HfTokenizer(backend, table, named, chat, *_text_ends(folder, backend, named)), definition


def _backend(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The library's tokenizer without truncation and padding, and the JSON it was made from."""
    if not file.is_file():
        also = " (a tokenizer.model alone is not read: convert it with transformers)" if (
            file.parent / "tokenizer.model").is_file() else ""
        raise LoadError(f"{file}: is missing; the model folder needs tokenizer.json{also}")
    raw = read_bytes(file, MAX_TOKENIZER_BYTES)
    definition = parse_object(raw, str(file))
    try:
        backend = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        backend.no_truncation()
        backend.no_padding()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic inside the library derives from BaseException
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise LoadError(f"{file}: is not a tokenizer that the tokenizers library {tokenizers.__version__} can "
                        f"load: {reason}") from None
    return backend, definition


def _named_specials(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... -> the token's text; each may be a string or an object with `content`."""
    named: dict[str, str] = {}
    for name in NAMED_SPECIALS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            named[name] = text
    return named


def _mark_special(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Make tokens special that only tokenizer_config.json calls so; never adds one the vocabulary does not have."""
    wanted = set(named.values())
    extra = config.get("additional_special_tokens")
    for item in extra if isinstance(extra, list) else []:
        text = item.get("content") if isinstance(item, dict) else item
        if isinstance(text, str) and text:
            wanted.add(text)
    listed = config.get("added_tokens_decoder")
    for item in listed.values() if isinstance(listed, dict) else []:
        if isinstance(item, dict) and item.get("special") is True and isinstance(item.get("content"), str):
            wanted.add(item["content"])
    already = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = sorted(text for text in wanted - already if text and backend.token_to_id(text) is not None)
    if missing:
        backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in missing])


def _text_ends(folder: Path, backend: tokenizers.Tokenizer, named: Mapping[str, str]
               ) -> tuple[int | None, tuple[int, ...]]:
    """(bos id, eos ids): generation_config.json, then config.json, then the tokenizer's own names."""
    size = backend.get_vocab_size(with_added_tokens=True)
    found: dict[str, tuple[int, ...]] = {}
    for key, ids in configured_ends(folder, size).items():
        own = backend.token_to_id(named[key]) if key in named else None
        found[key] = ids or (() if own is None else (own,))
    return next(iter(found["bos_token"]), None), found["eos_token"]


def configured_ends(folder: Path, size: int) -> dict[str, tuple[int, ...]]:
    """bos_token and eos_token -> ids below size, from generation_config.json, then config.json; () = in neither."""
    sources = [read_optional_object(folder / name) for name in ("generation_config.json", "config.json")]
    found: dict[str, tuple[int, ...]] = {}
    for key in ("bos_token", "eos_token"):
        found[key] = ()
        for source in sources:
            value = source.get(f"{key}_id")
            listed = value if isinstance(value, list) else [value]
            found[key] = tuple(dict.fromkeys(token for token in listed if type(token) is int and 0 <= token < size))
            if found[key]:
                break
    return found
