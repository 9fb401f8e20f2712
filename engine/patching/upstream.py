"""Upstream's directories of pickles, read without unpickling: import_upstream, recover_base.

The opcodes are interpreted here: only those that make plain data are known, no name is ever looked up, and four
classes of the tokenizer libraries become inert records. The tensors' files are not opened at all (our rows follow
from the converter). It runs offline, never in a server. Formats: section 2.6 of our notes on AdaptiVocab.
"""

from __future__ import annotations

import json
import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.patching.artefact import Artefact
from engine.patching.base import BaseVocabulary, load_base
from engine.patching.errors import (
    IdCollision,
    IdsNotContiguous,
    MalformedUpstream,
    MissingFile,
    MissingPiece,
    PickleTooLarge,
    UnsafePickle,
)
from engine.patching.invariants import check

MAX_FILE_BYTES = 256 << 20
MAX_OPCODES = 20_000_000
MAX_STACK = 100_000
MAX_INT_BYTES = 8
MAX_PARTS = 1 << 24  # of all tokens together: a pickle may name one list any number of times

REMOVED, NGRAMS, CONVERTER = "removed_tokens.pkl", "added_ngrams.pkl", "inputs_ids_convert.pkl"
CONFIG, TOKENIZER = "config.pkl", "patch_tokenizer.pkl"
KNOWN_NAMES = frozenset((
    ("transformers.tokenization_utils_fast", "PreTrainedTokenizerFast"), ("tokenizers", "Tokenizer"),
    ("tokenizers", "AddedToken"), ("tokenizers.models", "Model"),
))  # fmt: skip


@dataclass
class Record:
    """What stands for an object of a known class: its name, and the state it was pickled with. It does nothing."""

    module: str
    name: str
    state: Any = None


@dataclass(frozen=True)
class _Name:
    module: str
    name: str


_MARK = object()


def _brief(value: Any) -> str:
    """A value in an error: text begins as it does, of all else only the type is told. A pickle of a few bytes may
    hold lists in lists that are written out in 2^n characters, or without end."""
    return repr(value[:60]) if type(value) is str else f"<{type(value).__name__}>"


@dataclass
class _Machine:
    """Pickle's stack machine for data alone. names: the classes that may be mentioned."""

    origin: str
    names: frozenset[tuple[str, str]]
    file_bytes: int = 0
    stack: list[Any] = field(default_factory=list)
    memo: list[Any] = field(default_factory=list)

    def refuse(self, what: str) -> UnsafePickle:
        """The error for anything that is not data."""
        return UnsafePickle(f"{self.origin}: {what}; only dictionaries, lists, tuples, text and numbers are read")

    def pop(self) -> Any:
        """The top; never a mark."""
        if not self.stack or self.stack[-1] is _MARK:
            raise self.refuse("the pickle takes more from its stack than is there")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """Everything above the last mark, which goes too."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise self.refuse("the pickle has no mark where one is needed")

    def top(self, kind: type) -> Any:
        """The top without taking it, which must be of a kind."""
        if not self.stack or type(self.stack[-1]) is not kind:
            raise self.refuse(f"an item is added to something that is no {kind.__name__}")
        return self.stack[-1]

    def put_items(self, items: list[Any]) -> None:
        """Keys and values into the dictionary on top. Keys are flat, so that hashing cannot recurse."""
        target = self.top(dict)
        if len(items) % 2:
            raise self.refuse("a dictionary gets a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            flat = type(key) in (str, int) or (type(key) is tuple and all(type(part) is str for part in key))
            if not flat:
                raise self.refuse(f"a dictionary key is a {type(key).__name__}")
            target[key] = value

    def remember(self, index: int) -> None:
        """Memo entries are numbered in order; a number ahead of that would only reserve memory."""
        if index != len(self.memo) or not self.stack or self.stack[-1] is _MARK:
            raise self.refuse(f"memo entry {index} where {len(self.memo)} is next")
        self.memo.append(self.stack[-1])

    def recall(self, index: int) -> None:
        """Push what was remembered."""
        if not 0 <= index < len(self.memo):
            raise self.refuse(f"memo entry {index} of {len(self.memo)}")
        self.stack.append(self.memo[index])

    def name(self, module: Any, name: Any) -> None:
        """Push a class's name, if it is one of the known."""
        if type(module) is not str or type(name) is not str or (module, name) not in self.names:
            raise self.refuse(f"it asks for {_brief(module)}.{_brief(name)}")
        self.stack.append(_Name(module, name))

    def new(self) -> None:
        """An object of a known class: an inert record. Its arguments are dropped."""
        arguments, named = self.pop(), self.pop()
        if type(arguments) is not tuple or type(named) is not _Name:
            raise self.refuse("it makes an object of something that is no known class")
        self.stack.append(Record(named.module, named.name))

    def build(self) -> None:
        """Give a record its state."""
        state = self.pop()
        self.top(Record).state = state

    def frame(self, length: int) -> None:
        """Frames only group bytes, which are all here; one longer than the file is a lie all the same."""
        if length > self.file_bytes:
            raise self.refuse(f"a frame of {length} bytes in a file of {self.file_bytes}")

    def small_int(self, value: Any) -> None:
        """Push an integer of at most 64 bits."""
        if value.bit_length() > 8 * MAX_INT_BYTES:
            raise self.refuse("it holds a huge integer")
        self.stack.append(value)

    def tuple_of(self, count: int) -> None:
        """The last items as a tuple."""
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _append(machine: _Machine, _: Any) -> None:
    item = machine.pop()
    machine.top(list).append(item)


def _append_all(machine: _Machine, _: Any) -> None:
    items = machine.pop_to_mark()
    machine.top(list).extend(items)


def _set_item(machine: _Machine, _: Any) -> None:
    value = machine.pop()
    machine.put_items([machine.pop(), value])


def _named_on_stack(machine: _Machine, _: Any) -> None:
    name = machine.pop()
    machine.name(machine.pop(), name)


_DO: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, a: None, "FRAME": lambda m, a: m.frame(a),
    "MARK": lambda m, a: m.stack.append(_MARK), "POP": lambda m, a: m.pop() and None,
    "NONE": lambda m, a: m.stack.append(None), "NEWTRUE": lambda m, a: m.stack.append(True),
    "NEWFALSE": lambda m, a: m.stack.append(False), "BINFLOAT": _push,
    "BININT": _push, "BININT1": _push, "BININT2": _push, "LONG1": lambda m, a: m.small_int(a),
    "SHORT_BINUNICODE": _push, "BINUNICODE": _push, "SHORT_BINBYTES": _push, "BINBYTES": _push,
    "EMPTY_DICT": lambda m, a: m.stack.append({}), "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()), "TUPLE1": lambda m, a: m.tuple_of(1),
    "TUPLE2": lambda m, a: m.tuple_of(2), "TUPLE3": lambda m, a: m.tuple_of(3),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_to_mark())), "APPEND": _append, "APPENDS": _append_all,
    "SETITEM": _set_item, "SETITEMS": lambda m, a: m.put_items(m.pop_to_mark()),
    "MEMOIZE": lambda m, a: m.remember(len(m.memo)), "BINPUT": lambda m, a: m.remember(a),
    "LONG_BINPUT": lambda m, a: m.remember(a), "BINGET": lambda m, a: m.recall(a),
    "LONG_BINGET": lambda m, a: m.recall(a), "STACK_GLOBAL": _named_on_stack,
    "GLOBAL": lambda m, a: m.name(*a.split(" ", 1)), "NEWOBJ": lambda m, a: m.new(), "BUILD": lambda m, a: m.build(),
}  # fmt: skip


def read_pickle(path: Path, names: frozenset[tuple[str, str]] = frozenset()) -> Any:
    """The data of a pickle file. names: (module, class) that may occur, as Records.

    Raises MissingFile, PickleTooLarge, or UnsafePickle naming the opcode, class or fault.
    """
    if not path.is_file():
        raise MissingFile(f"{path}: is missing; give a directory that upstream's code saved")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise PickleTooLarge(f"{path}: has {path.stat().st_size} bytes; allowed: {MAX_FILE_BYTES}")
    machine = _Machine(str(path), names, path.stat().st_size)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(path.read_bytes())):
            if opcode.name == "STOP":
                break
            action = _DO.get(opcode.name)
            if action is None:
                raise machine.refuse(f"it uses the opcode {opcode.name}")
            if count >= MAX_OPCODES or len(machine.stack) >= MAX_STACK:
                raise PickleTooLarge(f"{path}: needs more than {MAX_OPCODES} opcodes or a stack above {MAX_STACK}")
            action(machine, argument)
    except (ValueError, OverflowError, TypeError, UnicodeError, MemoryError) as error:
        raise UnsafePickle(f"{path}: is damaged: {str(error)[:120]}") from None
    result = machine.pop()
    if machine.stack:
        raise machine.refuse("items are left on its stack")
    return result


def import_upstream(folder: str | Path, base: BaseVocabulary | str | Path) -> Artefact:
    """The artefact of an upstream directory, ids and priority order as they are there, every invariant checked.

    base: the base tokenizer it was made with (a folder, or loaded). Raises subclasses of ArtefactError.
    """
    place = Path(folder)
    vocabulary = base if isinstance(base, BaseVocabulary) else load_base(base)
    ids = vocabulary.ids

    def old_id(text: Any, where: str) -> int:
        if type(text) is not str or text not in ids:
            raise MissingPiece(f"{place}: {where}: the piece {_brief(text)} is not in the base vocabulary")
        return ids[text]

    removed_raw = _typed(read_pickle(place / REMOVED), dict, place / REMOVED)
    _check_parts(removed_raw.values(), place / REMOVED)
    removed = {old_id(text, REMOVED): tuple(old_id(part, REMOVED) for part in _typed(parts, list, place / REMOVED))
               for text, parts in removed_raw.items()}
    ngrams_raw = list(_typed(read_pickle(place / NGRAMS), dict, place / NGRAMS))
    ngrams = tuple(tuple(old_id(part, NGRAMS) for part in _typed(pieces, tuple, place / NGRAMS))
                   for pieces in ngrams_raw)
    converter = _converter(_typed(read_pickle(place / CONVERTER), dict, place / CONVERTER), place / CONVERTER)
    known = set(ngrams_raw)
    unused = [key for key in converter if type(key) is tuple and key not in known]
    missing = [pieces for pieces in ngrams_raw if pieces not in converter]
    if unused or missing:
        raise MalformedUpstream(f"{place / CONVERTER}: {len(missing)} n-grams of {NGRAMS} have no entry and "
                                f"{len(unused)} entries no n-gram")
    old_ids = _by_new_id(converter, place / CONVERTER)
    artefact = Artefact(
        vocabulary.sha256, vocabulary.vocab_size, "patch", removed, ngrams, old_ids,
        {old_id(text, CONVERTER): new for text, (_, new) in converter.items() if type(text) is str},
        tuple(converter[pieces][1] for pieces in ngrams_raw), _meta(place))
    check(artefact, vocabulary, str(place))
    return artefact


def recover_base(folder: str | Path, out: str | Path) -> Path:
    """Write the base tokenizer that upstream pickled (tokenizer.json, tokenizer_config.json) to a folder.

    Raises MalformedUpstream when there is none inside.
    """
    path = Path(folder) / TOKENIZER
    whole = _typed(read_pickle(path, KNOWN_NAMES), dict, path)
    live = whole.get("existing_tokenizer")
    state = live.state if isinstance(live, Record) and isinstance(live.state, dict) else {}
    backend = state.get("_tokenizer")
    raw = backend.state if isinstance(backend, Record) else None
    if type(raw) is not bytes:
        raise MalformedUpstream(f"{path}: holds no base tokenizer; give one with --base")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    options = state.get("init_kwargs")
    for key, value in options.items() if isinstance(options, dict) else ():
        held = value.state if isinstance(value, Record) else None
        text = held.get("content") if isinstance(held, dict) else value
        if key in ("bos_token", "eos_token", "unk_token", "pad_token") and type(text) is str:
            config[key] = text
    place = Path(out)
    place.mkdir(parents=True, exist_ok=True)
    (place / "tokenizer.json").write_bytes(raw)
    (place / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return place


def _converter(raw: Mapping[Any, Any], path: Path) -> dict[Any, tuple[tuple[int, ...], int]]:
    """token -> (old ids, new id)."""
    found = {}
    _check_parts((entry.get("old_indices") for entry in raw.values() if type(entry) is dict), path)
    for token, entry in raw.items():
        old = entry.get("old_indices") if type(entry) is dict else None
        old = [old] if type(old) is int else old
        new = entry.get("new_index") if type(entry) is dict else None
        if type(token) not in (str, tuple) or type(new) is not int or type(old) is not list or not all(
                type(item) is int for item in old):
            raise MalformedUpstream(f"{path}: the entry of {_brief(token)} has no old_indices and new_index")
        found[token] = (tuple(old), new)
    return found


def _by_new_id(converter: Mapping[Any, tuple[tuple[int, ...], int]], path: Path) -> tuple[tuple[int, ...], ...]:
    """Old ids in the order of new ids."""
    size = len(converter)
    rows: list[tuple[int, ...] | None] = [None] * size
    for token, (old, new) in converter.items():
        if not 0 <= new < size:
            raise IdsNotContiguous(f"{path}: {_brief(token)} has the new id {new}; allowed: 0..{size - 1}")
        if rows[new] is not None:
            raise IdCollision(f"{path}: two tokens have the new id {new}, one of them {_brief(token)}")
        rows[new] = old
    return tuple(row or () for row in rows)


def _meta(place: Path) -> dict[str, Any]:
    """Provenance; models of upstream never saw a beginning-of-text token."""
    meta: dict[str, Any] = {"source": "upstream", "add_bos": False}
    if (place / CONFIG).is_file():
        config = _typed(read_pickle(place / CONFIG), dict, place / CONFIG)
        plain = {key: value for key, value in config.items()
                 if type(key) is str and type(value) in (str, int, bool, type(None))}
        meta["upstream_config"] = plain
    return meta


def _check_parts(rows: Iterable[Any], path: Path) -> None:
    """Raise PickleTooLarge before lists are copied that together have more parts than any vocabulary."""
    parts = sum(len(row) for row in rows if type(row) is list)
    if parts > MAX_PARTS:
        raise PickleTooLarge(f"{path}: its tokens have {parts} parts together; allowed: {MAX_PARTS}")


def _typed(value: Any, kind: type, path: Path) -> Any:
    """The value, if it is of a kind. Raises MalformedUpstream."""
    if type(value) is not kind:
        raise MalformedUpstream(f"{path}: holds a {type(value).__name__} where a {kind.__name__} is needed")
    return value
