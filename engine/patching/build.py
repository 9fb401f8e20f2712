"""`python -m scripts.patch build`: a patched vocabulary from a base tokenizer and a corpus, with its report.

The same inputs give the same files on every machine: nothing depends on hashes of Python, on threads, on chunk sizes
or on the day. It puts the steps of this folder one behind the other and knows no model weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tqdm import tqdm

from engine.core.errors import ConfigError
from engine.patching import artefact as artefacts
from engine.patching.appended import collect_words, extend_definition, learn_merges
from engine.patching.artefact_files import write
from engine.patching.base import BaseVocabulary, base_folder, base_of
from engine.patching.corpus import (
    DOCUMENT_RULES,
    Deduplicator,
    TokenStream,
    encode_corpus,
    every_nth,
    open_ids,
    read_documents,
)
from engine.patching.count import Joins
from engine.patching.remove import Removal, choose_removed, expand, first_merges
from engine.patching.report import Measured, document_chunks, measure, statistics, table
from engine.patching.select import Choice, Ngram, select_ngrams
from engine.tokenization.hf import HfTokenizer, load_base_tokenizer

REPORT_NAME = "report.json"
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
MAX_TOKENS, MAX_N = 1 << 20, 16
CHUNK_TOKENS = 4 << 20


@dataclass(frozen=True)
class Options:
    """What to build. base: a tokenizer folder; corpus, held_out and each of ood: files or folders of text.

    num_tokens: n-grams to add, and base tokens to remove for them (kind "patch"). max_n: base tokens an added one may
    stand for. held_out: () = held_out_fraction of the corpus is set aside. field, documents: see read_documents.
    scratch: folder for temporary files, about 20 bytes a token of the corpus.
    """

    base: Path
    corpus: tuple[Path, ...]
    num_tokens: int = 10_000
    max_n: int = 3
    within_word: bool = False
    kind: str = "patch"
    held_out: tuple[Path, ...] = ()
    held_out_fraction: float = 0.05
    ood: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    documents: str = "auto"
    text_field: str = "text"
    deduplicate: bool = True
    scratch: Path | None = None
    date: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.kind not in artefacts.KINDS:
            raise ConfigError(f"kind {self.kind!r} is not one of {', '.join(artefacts.KINDS)}")
        for name, value, high in (("num-tokens", self.num_tokens, MAX_TOKENS), ("max-n", self.max_n, MAX_N)):
            low = 1 if name == "num-tokens" else 2
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}; allowed: {low}..{high}")
        if not 0 <= self.held_out_fraction < 1:
            raise ConfigError(f"held-out-fraction is {self.held_out_fraction}; allowed: 0 up to, not including, 1")
        if taken := {"corpus", "held_out"} & set(self.ood):
            raise ConfigError(f"the name {sorted(taken)[0]!r} of another domain is taken; choose a different one")


@dataclass(frozen=True)
class _Base:
    """The base tokenizer in the forms that the steps need."""

    tokenizer: HfTokenizer
    definition: dict[str, Any]
    vocabulary: BaseVocabulary
    added: frozenset[int]

    @property
    def size(self) -> int:
        """V of the base."""
        return self.vocabulary.vocab_size


def build(options: Options, out: Path) -> dict[str, Any]:
    """Build, write patch.json, patch.safetensors and report.json (and, for appended merges, tokenizer.json) into
    `out`, and return the report. Raises ConfigError or LoadError for inputs that cannot be used."""
    tokenizer, definition = load_base_tokenizer(options.base)
    added = frozenset(token["id"] for token in definition.get("added_tokens") or ())
    base = _Base(tokenizer, definition, base_of(tokenizer.vocab(), tokenizer.table, definition), added)
    if options.scratch is not None:
        options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="patch-", dir=options.scratch) as scratch:
        work = Path(scratch)
        streams = _streams(options, base, work)
        if not len(streams["corpus"].ids):
            raise ConfigError("the corpus has no text to count; give files with text, or lower --held-out-fraction")
        made = (_patch if options.kind == "patch" else _appended)(options, base, streams, work)
    report = _report(options, base, streams["corpus"], made)
    out.mkdir(parents=True, exist_ok=True)
    meta = {"builder": {**report["options"], "corpus_sha256": streams["corpus"].sha256}, "statistics":
            report["statistics"]}  # fmt: skip
    if options.kind == "patch":
        made_artefact = artefacts.allocate(base.vocabulary, made.removed, made.ngrams, meta)
    else:
        made_artefact = artefacts.allocate_merges(base.vocabulary, made.merges, meta)
        (out / "tokenizer.json").write_text(made.definition, encoding="utf-8")
        folder = options.base if options.base.is_dir() else options.base.parent
        for name in COMPANIONS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
    write(made_artefact, out)
    report["artefact_sha256"] = made_artefact.sha256
    (out / REPORT_NAME).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return report


@dataclass
class _Made:
    """What the steps found, before it is given ids."""

    measured: dict[str, Measured]
    facts: dict[str, Any]
    rho_max: int = 1
    removed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    ngrams: list[Ngram] = field(default_factory=list)
    merges: list[tuple[int, int]] = field(default_factory=list)
    definition: str = ""


def _streams(options: Options, base: _Base, work: Path) -> dict[str, TokenStream]:
    """Every domain encoded, "corpus" first. One memory of what was seen: no held-out text is a copy of a training
    text, whichever files they come from."""
    seen = Deduplicator() if options.deduplicate else None
    keep = options.kind != "patch"
    split = None
    if not options.held_out and options.held_out_fraction > 0:
        split = (work / "held_out", every_nth(options.held_out_fraction, "build"))
    found: dict[str, TokenStream] = {}
    domains = {"corpus": options.corpus, **({"held_out": options.held_out} if options.held_out else {}), **options.ood}
    for number, (name, files) in enumerate(domains.items()):
        with _bar(options, f"encode {name}", "char") as bar:
            stream, aside = encode_corpus(
                read_documents(files, options.documents, options.text_field), base.tokenizer,
                work / f"domain-{number}", seen, split if name == "corpus" else None, bar.update, keep)
        found[name] = stream
        if aside is not None:
            found["held_out"] = aside
    return found


def _bar(options: Options, what: str, unit: str, total: int | None = None) -> Any:
    return tqdm(desc=what, unit=unit, total=total, unit_scale=unit != "n-gram", disable=not options.progress,
                file=sys.stderr, leave=False)


def _joins(options: Options, base: _Base) -> Joins:
    """Tokens that may stand in n-grams: no added ones (special or not), no single bytes of byte fallback."""
    piece_table = base.vocabulary.table
    usable = np.array([bool(piece) for piece in piece_table.pieces], bool)
    usable[sorted(base.added | piece_table.special_ids | piece_table.byte_ids)] = False
    opens = np.array([piece[:1].isspace() for piece in piece_table.pieces], bool)
    return Joins(usable, opens if options.within_word else None)


def acceptable(pieces: Sequence[bytes]) -> Callable[[Ngram], bool]:
    """The rule for whole n-grams: valid UTF-8 (no parts of characters), and not digits only, whose tokens models rely
    on to compute. pieces: bytes of every id."""

    def accept(ngram: Ngram) -> bool:
        try:
            text = b"".join(pieces[token] for token in ngram).decode()
        except UnicodeDecodeError:
            return False
        return not text.strip().isdigit()

    return accept


def _patch(options: Options, base: _Base, streams: Mapping[str, TokenStream], work: Path) -> _Made:
    """Kind "patch": removal first, so that n-grams are counted in text that is spelled with what stays."""
    stream = streams["corpus"]
    frequencies = _frequencies(stream, base.size)
    merges = first_merges(base.definition)
    never = base.added | base.vocabulary.special_ids | base.vocabulary.table.byte_ids
    removals = choose_removed(merges, frequencies.tolist(), options.num_tokens, never)
    while True:
        parts = {removal.token: removal.parts for removal in _first(removals, len(removals), merges)}
        spelled = _respell(stream, parts, frequencies, base.size, work)
        with (_bar(options, "count n-grams", "token") as counted,
              _bar(options, "choose n-grams", "n-gram", len(removals)) as chosen):
            choices = select_ngrams(spelled, _joins(options, base), len(removals), options.max_n, work,
                                    acceptable(base.vocabulary.table.pieces), counted.update, chosen.update)
        if len(choices) == len(removals):
            break
        removals = removals[:len(choices)]
    ngrams = in_priority(choices)
    parts = {removal.token: removal.parts for removal in _first(removals, len(removals), merges)}
    measured = {name: measure(domain, parts, ngrams, base.size) for name, domain in streams.items()}
    return _Made(measured, {
        "requested": options.num_tokens, "added": len(ngrams), "removed": len(removals),
        "removed_absent_from_corpus": sum(int(frequencies[removal.token]) == 0 for removal in removals),
        "removal_cost_tokens": sum(removal.cost for removal in removals),
        "expected_saving_tokens": sum(choice.saving for choice in choices),
        "ngrams_by_length": {str(n): sum(len(ngram) == n for ngram in ngrams) for n in range(2, options.max_n + 1)},
        "dead_ngrams": {
            **_dead(ngrams, parts),
            **{f"unused_in_{name}": int((domain.uses == 0).sum()) for name, domain in measured.items()}},
    }, max(map(len, parts.values()), default=1), parts, ngrams)  # fmt: skip


def _dead(ngrams: Sequence[Ngram], removed: Mapping[int, Any]) -> dict[str, int]:
    """n-grams that no text can give; the way they are chosen and ordered leaves none, which is counted, not assumed."""
    from engine.patching.invariants import dead_ngrams

    dead = dead_ngrams(ngrams, removed)
    return {"removed_piece": len(dead.removed_piece), "prefix_dominated": len(dead.prefix_dominated)}


def in_priority(choices: Sequence[Choice]) -> list[Ngram]:
    """Longer n-grams first, then in the order chosen: no n-gram is ever hidden by one that it begins with."""
    order = sorted(range(len(choices)), key=lambda index: (-len(choices[index].ngram), index))
    return [choices[index].ngram for index in order]


def _frequencies(stream: TokenStream, size: int) -> Any:
    """(V,) int64: occurrences of each base id."""
    total: Any = np.zeros(size, np.int64)
    for first in range(0, len(stream.ids), CHUNK_TOKENS):
        total += np.bincount(stream.ids[first:first + CHUNK_TOKENS], minlength=size)
    return total


def _first(removals: Sequence[Removal], count: int, merges: Mapping[int, tuple[int, int, int]]) -> list[Removal]:
    """The first removals with the parts that they have when only these are made."""
    kept = {removal.token for removal in removals[:count]}
    spelled: dict[int, tuple[int, ...]] = {}

    def parts_of(token: int) -> tuple[int, ...]:
        if token not in kept:
            return (token,)
        if token not in spelled:
            left, right, _ = merges[token]
            spelled[token] = parts_of(left) + parts_of(right)
        return spelled[token]

    return [Removal(removal.token, parts_of(removal.token), removal.cost) for removal in removals[:count]]


def _respell(stream: TokenStream, parts: Mapping[int, tuple[int, ...]], frequencies: Any, size: int, work: Path
             ) -> TokenStream:
    """The corpus with removed tokens taken apart; the stream itself when it has none of them."""
    if not any(frequencies[token] for token in parts):
        return stream
    path = work / "respelled"
    lengths: Any = np.zeros(stream.documents, np.int64)
    with path.open("wb") as file:
        for first, last in document_chunks(stream.starts, CHUNK_TOKENS):
            low, high = int(stream.starts[first]), int(stream.starts[last])
            ids, grown = expand(np.asarray(stream.ids[low:high]), parts, size)
            ids.tofile(file)
            lengths[first:last] = np.diff(np.concatenate(([0], np.cumsum(grown)))[stream.starts[first:last + 1] - low])
    return TokenStream(open_ids(path), np.concatenate(([0], np.cumsum(lengths))), stream.chars, stream.utf8_bytes,
                       stream.sha256)


def _appended(options: Options, base: _Base, streams: Mapping[str, TokenStream], work: Path) -> _Made:
    """Kind "appended-merges": learn rules, write them behind the base's, and encode every domain with the result."""
    first_merges(base.definition)  # refuses what is not such a BPE
    backend = _backend(json.dumps(base.definition))
    with _bar(options, "count words", "char", int(streams["corpus"].chars.sum())) as bar:
        words = collect_words(streams["corpus"].batches(), backend, bar.update)
    with _bar(options, "learn merges", "n-gram", options.num_tokens) as bar:
        found = learn_merges(words, _joins(options, base), base.vocabulary.strings, options.num_tokens, options.max_n,
                             bar.update)
    definition = extend_definition(base.definition, base.vocabulary.strings, found)
    longer = _backend(definition)
    measured = {name: _measure_text(stream, longer, base.size, len(found)) for name, stream in streams.items()}
    return _Made(measured, {
        "requested": options.num_tokens, "added": len(found), "removed": 0,
        "expected_saving_tokens": sum(merge.saving for merge in found),
        "dead_ngrams": {f"unused_in_{name}": int((domain.uses == 0).sum()) for name, domain in measured.items()},
    }, 1, merges=[(merge.left, merge.right) for merge in found], definition=definition)  # fmt: skip


def _backend(definition: str) -> tokenizers.Tokenizer:
    """The library's tokenizer for a tokenizer.json, without truncation and padding."""
    backend = tokenizers.Tokenizer.from_str(definition)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _measure_text(stream: TokenStream, backend: tokenizers.Tokenizer, base_size: int, added: int) -> Measured:
    """Encode a stream's texts again with another tokenizer."""
    patched: list[int] = []
    uses: Any = np.zeros(base_size + added, np.int64)
    for batch in stream.batches():
        rows = [encoding.ids for encoding in backend.encode_batch_fast(batch, add_special_tokens=False)]
        patched += map(len, rows)
        for row in rows:
            uses += np.bincount(np.array(row, np.int64), minlength=len(uses))
    return Measured(np.diff(stream.starts), np.array(patched, np.int64), stream.chars, uses[base_size:],
                    stream.sha256)


def _report(options: Options, base: _Base, stream: TokenStream, made: _Made) -> dict[str, Any]:
    """Everything that report.json says; nothing in it depends on paths or the clock."""
    report = {
        "format": "tessera-patch-report", "version": 1,
        "options": {"kind": options.kind, "num_tokens": options.num_tokens, "max_n": options.max_n,
                    "within_word": options.within_word, "deduplicate": options.deduplicate},
        "base": {"sha256": base.vocabulary.sha256, "vocab_size": base.size},
        "corpus": {"sha256": stream.sha256, "documents": stream.documents, "base_tokens": len(stream.ids),
                   "characters": int(stream.chars.sum()), "utf8_bytes": int(stream.utf8_bytes.sum()),
                   "exact_copies": stream.exact_copies, "near_copies": stream.near_copies},
        "rho_max": made.rho_max, **made.facts,
        "statistics": {name: statistics(domain.base, domain.patched, domain.chars, made.rho_max, domain.sha256)
                       for name, domain in made.measured.items()},
    }  # fmt: skip
    if options.date is not None:
        report["date"] = options.date
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m scripts.patch build`."""
    add = parser.add_argument
    add("--base", required=True, metavar="TOKENIZER",
        help="folder with the base's tokenizer.json, .gguf file or hub id")
    add("--corpus", type=Path, nargs="+", required=True, metavar="FILE",
        help=".jsonl (one object a line) or plain text files, or folders of them; .gz is read too")
    add("--out", type=Path, required=True, metavar="DIR", help="where the vocabulary and report.json go")
    add("--num-tokens", type=int, default=10_000, help="n-grams to add, and tokens to remove for them (%(default)s)")
    add("--max-n", type=int, default=3, help="base tokens an added one may stand for (%(default)s)")
    add("--within-word", action="store_true", help="n-grams may not span words (saves about half as much)")
    add("--kind", choices=artefacts.KINDS, default="patch",
        help="patch: swap tokens for n-grams; appended-merges: extend the BPE, never more tokens than the base")
    add("--held-out", type=Path, nargs="+", default=(), metavar="FILE", help="text to measure on, not to learn from")
    add("--held-out-fraction", type=float, default=0.05,
        help="without --held-out: the share of documents set aside, by a hash of their text (%(default)s)")
    add("--ood", nargs="+", action="append", default=[], metavar="NAME=FILE",
        help="another domain to measure on; may be repeated")
    add("--documents", choices=DOCUMENT_RULES, default="auto",
        help="how plain text is cut into documents (auto: a file is one, above 4 MiB each paragraph)")
    add("--field", default="text", help="the field of .jsonl with the text (%(default)s)")
    add("--keep-copies", action="store_true", help="do not leave out documents that are (nearly) copies")
    add("--scratch", type=Path, metavar="DIR", help="folder for temporary files, about 20 bytes a corpus token")
    add("--date", help="a date to note in the report; left out by default so that equal inputs give equal files")
    add("--no-progress", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Build as the flags say and print the table. Returns the exit status."""
    options = Options(
        base=base_folder(args.base, not args.no_progress), corpus=tuple(args.corpus),
        num_tokens=args.num_tokens, max_n=args.max_n,
        within_word=args.within_word, kind=args.kind, held_out=tuple(args.held_out),
        held_out_fraction=args.held_out_fraction, ood=_domains(args.ood), documents=args.documents,
        text_field=args.field, deduplicate=not args.keep_copies, scratch=args.scratch, date=args.date,
        progress=not args.no_progress)
    report = build(options, args.out)
    print(f"{report['added']} tokens added, {report['removed']} removed; corpus: {report['corpus']['documents']} "
          f"documents, {report['corpus']['base_tokens']} tokens "
          f"({report['corpus']['exact_copies']} exact and {report['corpus']['near_copies']} near copies left out)")
    print(table(report["statistics"]))
    print("dead n-grams: " + ", ".join(f"{name} {count}" for name, count in report["dead_ngrams"].items()))
    print(f"worst case: {report['rho_max']} tokens for one of the base's; written to {args.out}")
    return 0


def _domains(groups: Sequence[Sequence[str]]) -> dict[str, tuple[Path, ...]]:
    """--ood NAME=FILE FILE ... -> {NAME: files}. Raises ConfigError without a name."""
    found: dict[str, tuple[Path, ...]] = {}
    for group in groups:
        name, equals, first = group[0].partition("=")
        if not (name and equals and first):
            raise ConfigError(f"--ood {group[0][:80]!r} has no name; write --ood NAME=FILE")
        found[name] = (*found.get(name, ()), Path(first), *map(Path, group[1:]))
    return found
