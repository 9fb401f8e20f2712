"""Documents from files, without copies, as one long row of base token ids on disk: what the vocabulary builder counts.

Memory is bounded by one batch of text and a few hundred bytes a document; the ids themselves lie in a file. It
knows nothing of n-grams, and its results depend on the texts and their order only.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from engine.core.errors import ConfigError, LoadError

BATCH_CHARS = 4 << 20
ONE_DOCUMENT_BYTES = 4 << 20
"""documents="auto": a text file of up to this is one document, a larger one is cut at blank lines."""
DOCUMENT_RULES = ("auto", "file", "paragraph", "line")

SHINGLE_TOKENS = 8
BINS, BANDS = 32, 8
NEAR = 0.6
"""Two documents are near copies when this share of their sketches agrees (an estimate of the Jaccard index of their
8-token shingles). With 8 bands of 4 bins a pair of index 0.8 is looked at with probability 0.98, of 0.6 with 0.67."""
MIN_SHINGLES = 16
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_ODD = 0x9E3779B97F4A7C15


class Encoder(Protocol):
    """What the corpus needs of a tokenizer."""

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text."""


@dataclass(frozen=True, slots=True)
class TokenStream:
    """Documents end to end. ids: (N,) uint32, on disk or in memory; starts: (documents + 1,) int64, first token of
    each document and N; chars and utf8_bytes: (documents,) int64; sha256: of the texts, in order; exact_copies and
    near_copies: documents left out; text_file: the texts end to end, if they were kept."""

    ids: Any
    starts: Any
    chars: Any
    utf8_bytes: Any
    sha256: str
    exact_copies: int = 0
    near_copies: int = 0
    text_file: Path | None = None

    @property
    def documents(self) -> int:
        """How many documents."""
        return len(self.starts) - 1

    def batches(self, limit_chars: int = BATCH_CHARS) -> Iterator[list[str]]:
        """The kept texts again, in order, in batches of about limit_chars."""
        assert self.text_file is not None
        with self.text_file.open("rb") as file:
            batch: list[str] = []
            chars = 0
            for size in self.utf8_bytes.tolist():
                batch.append(file.read(size).decode())
                chars += len(batch[-1])
                if chars >= limit_chars:
                    yield batch
                    batch, chars = [], 0
            if batch:
                yield batch


def read_documents(files: Sequence[str | Path], documents: str = "auto", field: str = "text") -> Iterator[str]:
    """The texts of .jsonl (one object a line, its `field`) and of any other, plain text files; each may be .gz.

    documents: how plain text is cut: "file", "paragraph" (blank lines), "line" or "auto". A folder stands for the
    .txt and .jsonl files under it, by name. Raises LoadError naming file, line and what is wrong.
    """
    if documents not in DOCUMENT_RULES:
        raise ConfigError(f"documents={documents!r} is not one of {', '.join(DOCUMENT_RULES)}")
    for file in expand(files):
        try:
            yield from _documents_of(file, documents, field)
        except UnicodeDecodeError as error:
            raise LoadError(f"{file}: is not UTF-8 ({error.reason} at byte {error.start} of a read); convert it "
                            "first") from None
        except (OSError, EOFError) as error:
            raise LoadError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def expand(files: Sequence[str | Path]) -> list[Path]:
    """The files, in the order given; a folder becomes its text files, sorted by path. Raises LoadError for none."""
    found: list[Path] = []
    for given in files:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = [inner for inner in path.rglob("*") if _stem(inner).endswith((".txt", ".jsonl"))]
            found += sorted((inner for inner in inside if inner.is_file()), key=lambda inner: inner.as_posix())
        elif path.is_file():
            found.append(path)
        else:
            raise LoadError(f"corpus {str(given)[:200]!r}: there is no such file or folder")
    if not found:
        raise LoadError("the corpus has no files; give .txt or .jsonl files (or .gz of them), or a folder of them")
    return found


def _stem(path: Path) -> str:
    """The name without .gz, in lower case."""
    return path.name.lower().removesuffix(".gz")


def _documents_of(file: Path, documents: str, field: str) -> Iterator[str]:
    raw: Any = gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")  # noqa: SIM115
    with raw, io.TextIOWrapper(raw, encoding="utf-8", newline=None) as lines:
        if _stem(file).endswith((".jsonl", ".ndjson")):
            yield from _json_lines(lines, file, field)
            return
        whole = documents == "file"
        if documents == "auto":
            head = lines.read(ONE_DOCUMENT_BYTES)
            whole = len(head) < ONE_DOCUMENT_BYTES
            rest: Iterable[str] = _lines_after(head, lines) if not whole else ()
            if whole:
                yield head
        elif whole:
            yield lines.read()
        else:
            rest = lines
        if not whole:
            yield from rest if documents == "line" else _paragraphs(rest)


def _lines_after(head: str, lines: IO[str]) -> Iterator[str]:
    """The lines of a text whose beginning was already read."""
    *complete, last = head.split("\n")
    yield from (line + "\n" for line in complete)
    yield last + lines.readline()
    yield from lines


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Runs of lines that are not blank."""
    block: list[str] = []
    for line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block)
            block = []
    if block:
        yield "".join(block)


def _json_lines(lines: IO[str], file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LoadError(f"{file}:{number}: is not valid JSON: {str(error)[:120]}") from None
        text = value.get(field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise LoadError(f"{file}:{number}: has no string {field!r}; name the field that holds the text with "
                            "--field")
        yield text


class Deduplicator:
    """Remembers documents and tells copies: the same words, or nearly the same row of tokens.

    Exact: SHA-256 of the words, white space aside. Near: one-permutation MinHash (Li, Owen, Zhang 2012) over 8-token
    shingles with banding. The first of several copies counts. About 1.5 KB of memory a document.
    """

    def __init__(self) -> None:
        self._exact: set[bytes] = set()
        self._bands: dict[int, int] = {}
        self._sketches: list[Any] = []

    def is_copy(self, text: str) -> bool:
        """Whether the words were seen before; remembers them."""
        digest = hashlib.sha256(" ".join(text.split()).encode()).digest()[:16]
        if digest in self._exact:
            return True
        self._exact.add(digest)
        return False

    def near_copies(self, batch: Sequence[Any]) -> list[bool]:
        """For each row of ids (n,) uint32, in order, whether it is nearly one seen before; remembers the others."""
        result = []
        for sketch in sketches(batch):
            filled = sketch != _EMPTY
            if not filled.any():
                result.append(False)
                continue
            near = False
            keys = _band_keys(sketch)
            for other in sorted({self._bands[key] for key in keys if key in self._bands}):
                known = self._sketches[other]
                either = filled | (known != _EMPTY)
                near = near or float(((sketch == known) & filled).sum()) >= NEAR * float(either.sum())
            if not near:
                for key in keys:
                    self._bands.setdefault(key, len(self._sketches))
                self._sketches.append(sketch)
            result.append(near)
        return result


def sketches(batch: Sequence[Any]) -> Any:
    """(documents, BINS) uint64: the least hash in each bin of a document's shingles; all ones where there is none,
    and for documents of fewer than MIN_SHINGLES shingles (an estimate from them would be noise)."""
    table: Any = np.full((len(batch), BINS), _EMPTY, np.uint64)
    for row, ids in enumerate(batch):
        count = len(ids) - SHINGLE_TOKENS + 1
        if count < MIN_SHINGLES:
            continue
        mixed = (np.asarray(ids, np.uint64) + np.uint64(1)) * np.uint64(_ODD)
        mixed ^= mixed >> np.uint64(29)
        value: Any = np.zeros(count, np.uint64)
        for shift in range(SHINGLE_TOKENS):
            value = value * np.uint64(0x100000001B3) + mixed[shift:shift + count]
        value ^= value >> np.uint64(31)
        value *= np.uint64(0xBF58476D1CE4E5B9)
        value ^= value >> np.uint64(27)
        np.minimum.at(table[row], (value % np.uint64(BINS)).astype(np.intp), value)
    return table


def _band_keys(sketch: Any) -> list[int]:
    """One number per band that has a hash at all; the band's number is mixed in."""
    keys = []
    for band, part in enumerate(sketch.reshape(BANDS, BINS // BANDS)):
        if (part != _EMPTY).any():
            keys.append(int.from_bytes(hashlib.blake2b(part.tobytes(), digest_size=8, salt=bytes([band])).digest(),
                                       "little"))
    return keys


class StreamWriter:
    """Collects encoded documents into a TokenStream whose ids lie in `path`."""

    def __init__(self, path: Path, keep_text: bool = False) -> None:
        self._path = path
        self._file = path.open("wb")
        self._text_file = path.with_name(path.name + "-text") if keep_text else None
        self._text = self._text_file.open("wb") if self._text_file is not None else None
        self._starts, self._chars, self._bytes = [0], [], []  # type: ignore[var-annotated]
        self._hash = hashlib.sha256()
        self.exact_copies = self.near_copies = 0

    def add(self, text: str, ids: Any) -> None:
        """Append a document. ids: (n,) uint32."""
        raw = text.encode()
        self._hash.update(len(raw).to_bytes(8, "little") + raw)
        ids.tofile(self._file)
        if self._text is not None:
            self._text.write(raw)
        self._starts.append(self._starts[-1] + len(ids))
        self._chars.append(len(text))
        self._bytes.append(len(raw))

    def __enter__(self) -> StreamWriter:
        """The writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._file.close()
        if self._text is not None:
            self._text.close()

    def finish(self) -> TokenStream:
        """The stream; its ids are read from the file as they are needed."""
        self.__exit__()
        return TokenStream(open_ids(self._path), np.array(self._starts, np.int64), np.array(self._chars, np.int64),
                           np.array(self._bytes, np.int64), self._hash.hexdigest(), self.exact_copies,
                           self.near_copies, self._text_file)


def open_ids(path: Path) -> Any:
    """(N,) uint32 over a file; numpy cannot map an empty one."""
    return np.asarray(np.memmap(path, np.uint32, "r")) if path.stat().st_size else np.zeros(0, np.uint32)


def encode_corpus(texts: Iterable[str], encoder: Encoder, path: Path, seen: Deduplicator | None = None,
                  held_out: tuple[Path, Callable[[str], bool]] | None = None,
                  progress: Callable[[int], object] | None = None, keep_text: bool = False,
                  batch_chars: int = BATCH_CHARS) -> tuple[TokenStream, TokenStream | None]:
    """Encode documents, without special tokens, in batches; copies are left out if `seen` is given.

    held_out: (file, rule): documents for which the rule holds go to a second stream. progress: told the characters
    done. keep_text: the streams can give their texts again. Blank documents are left out. The result does not
    depend on batch_chars.
    """
    with contextlib.ExitStack() as stack:
        main = stack.enter_context(StreamWriter(path, keep_text))
        other, rule = None, every_nth(0.0)
        if held_out is not None:
            other, rule = stack.enter_context(StreamWriter(held_out[0], keep_text)), held_out[1]
        for batch in _batches(texts, main, seen, batch_chars):
            rows = [np.asarray(ids, np.uint32) for ids in encoder.encode_batch(batch, add_special_tokens=False)]
            near = seen.near_copies(rows) if seen is not None else [False] * len(rows)
            main.near_copies += sum(near)
            for text, ids, copy in zip(batch, rows, near):
                if not copy:
                    (other if other is not None and rule(text) else main).add(text, ids)
            if progress is not None:
                progress(sum(map(len, batch)))
        return main.finish(), other.finish() if other is not None else None


def _batches(texts: Iterable[str], writer: StreamWriter, seen: Deduplicator | None, limit_chars: int
             ) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for raw in texts:
        text = raw.encode("utf-8", "replace").decode()  # JSON may spell a lone surrogate
        if not text.strip():
            continue
        if seen is not None and seen.is_copy(text):
            writer.exact_copies += 1
            continue
        batch.append(text)
        chars += len(text)
        if chars >= limit_chars:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def every_nth(fraction: float, purpose: str = "") -> Callable[[str], bool]:
    """A rule that sets about `fraction` of the documents aside, by a hash of the text: the same on every machine.

    Rules of different purposes are independent; of one purpose, those of a smaller fraction are among a larger one's.
    """
    limit = int(fraction * (1 << 32))

    def aside(text: str) -> bool:
        digest = hashlib.blake2b(text.encode(), digest_size=4, person=purpose.encode()).digest()
        return int.from_bytes(digest, "big") < limit

    return aside
