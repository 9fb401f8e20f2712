"""Is an artefact, and this implementation, right? against_reference, speed: `python -m scripts.patch verify`.

The reference directory holds what the published code produced: two artefacts with texts, tokens, ids and decodes,
and token-level cases of its merge rule. It is read where it lies; nothing of it is part of the project.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gzip
import hashlib
import json
import statistics
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.clock import MonotonicClock, wall_s
from engine.core.errors import ConfigError
from engine.core.growth import HISTORY
from engine.patching.artefact_files import read, write
from engine.patching.base import base_folder, load_base
from engine.patching.corpus import read_documents
from engine.patching.errors import ArtefactError
from engine.patching.invariants import dead_ngrams
from engine.patching.merging import Merger
from engine.patching.place import find
from engine.patching.reduction import LENGTHS, STATISTICS, STATISTICS_OUT, rho_max_in
from engine.patching.report import statistics as rho_statistics
from engine.patching.report import table
from engine.patching.upstream import import_upstream
from engine.tokenization.hf import load_base_tokenizer
from engine.tokenization.patched import PatchedTokenizer, load_patched

MAX_EXTRACTED_BYTES = 256 << 20
REPEATS = 5
BASES = ("A_llama_withinword", "S_synthetic_priority")
VECTORS = "merge_rule_vectors.json.gz"


@dataclass(frozen=True, slots=True)
class Agreement:
    """One reference set: its name, how many cases were compared, and what differed (first few, without texts)."""

    name: str
    cases: int
    differences: tuple[str, ...]


def against_reference(folder: Path) -> list[Agreement]:
    """Every reference set of a folder, in upstream mode. Raises ConfigError when there is none."""
    found = [compare_base(folder / f"{name}.tar.gz") for name in BASES if (folder / f"{name}.tar.gz").is_file()]
    if (folder / VECTORS).is_file():
        found.append(compare_vectors(folder / VECTORS))
    if not found:
        raise ConfigError(f"{folder}: holds none of {', '.join(f'{name}.tar.gz' for name in BASES)}, {VECTORS}")
    return found


def compare_base(archive: Path) -> Agreement:
    """One archived upstream directory with its base and cases.json: imported, written, read, and compared on tokens,
    ids and both decodes of every text, and on the ids of the ends of texts."""
    name = archive.name.removesuffix(".tar.gz")
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(archive) as tar:
            if sum(member.size for member in tar.getmembers()) > MAX_EXTRACTED_BYTES:
                raise ConfigError(f"{archive}: unpacks to more than {MAX_EXTRACTED_BYTES} bytes")
            tar.extractall(scratch, filter="data")
        place = Path(scratch) / name
        artefact = import_upstream(place, place / "base")
        write(artefact, place / "imported")
        tokenizer = load_patched(place / "base", place / "imported", upstream=True)
        expected = json.loads((place / "cases.json").read_bytes())
    different = [] if tokenizer.artefact == artefact else ["the artefact read is not the one written"]
    if (tokenizer.bos_id, tokenizer.eos_ids) != (expected["bos_token_id"], (expected["eos_token_id"],)):
        different.append(f"bos {tokenizer.bos_id}, eos {tokenizer.eos_ids}")
    for index, case in enumerate(expected["cases"]):
        different += [f"case {index}: {what}" for what in _case_differences(tokenizer, case)]
    return Agreement(name, len(expected["cases"]), tuple(different))


def _case_differences(tokenizer: PatchedTokenizer, case: Mapping[str, Any]) -> list[str]:
    """What of one text differs."""
    ids = tokenizer.encode(case["text"])
    names = [list(token) if isinstance(token, tuple) else token for token in tokenizer.names(case["text"])]
    traced, offsets = tokenizer.encode_with_offsets(case["text"])
    checks = {
        "tokens": names == case["tokens"], "ids": ids == case["ids"],
        "decode": tokenizer.decode(case["ids"]) == case["decode_skip"],
        "decode with specials": tokenizer.decode(case["ids"], False) == case["decode_keep"],
        "ids with offsets": traced == ids and len(offsets) == len(ids),
    }  # fmt: skip
    return [what for what, same in checks.items() if not same]


def compare_vectors(file: Path) -> Agreement:
    """Token-level cases of the merge rule: {ngrams_in_priority_order, removed, cases: [{tokens, expected}]}."""
    sets = json.loads(gzip.decompress(file.read_bytes()))
    different, count = [], 0
    for number, given in enumerate(sets):
        merge, id_of, ngrams = _vector_merger(given)
        for index, case in enumerate(given["cases"]):
            count += 1
            wanted = [id_of[item] if isinstance(item, str) else len(id_of) + ngrams.index(tuple(item))
                      for item in case["expected"]]
            ids = [id_of[token] for token in case["tokens"]]
            if merge(ids) != wanted or merge.traced(ids).ids != wanted:
                different.append(f"set {number}, case {index}")
    return Agreement("merge rule", count, tuple(different))


def _vector_merger(given: Mapping[str, Any]) -> tuple[Merger, dict[str, int], list[tuple[str, ...]]]:
    """(merger, piece -> id, n-grams); n-gram i has the id after all pieces' plus i."""
    ngrams = [tuple(pieces) for pieces in given["ngrams_in_priority_order"]]
    used = [*ngrams, *given["removed"].values(), given["removed"], *(case["tokens"] for case in given["cases"])]
    id_of = {piece: index for index, piece in enumerate(sorted({piece for pieces in used for piece in pieces}))}
    removed = {id_of[piece]: [id_of[part] for part in parts] for piece, parts in given["removed"].items()}
    kept = {index: index for index in id_of.values()}
    return (Merger(len(id_of), removed, [[id_of[piece] for piece in pieces] for pieces in ngrams],
                   range(len(id_of), len(id_of) + len(ngrams)), kept), id_of, ngrams)


def speed(folder: Path, patch: Path, texts: Sequence[str], repeats: int = REPEATS) -> dict[str, float]:
    """Seconds to encode the texts one by one, the base tokenizer's own encode and ours, alternating; the median of
    the repeats' ratios is `ratio` (ours in parts of the base's speed)."""
    plain, _ = load_base_tokenizer(folder)
    patched = load_patched(folder, patch)
    clock = MonotonicClock()
    rows = []
    for _ in range(repeats):
        before_s = clock.now_s()
        base_tokens = sum(len(plain.backend.encode(text, add_special_tokens=False).ids) for text in texts)
        between_s = clock.now_s()
        tokens = sum(len(patched.encode(text, False)) for text in texts)
        rows.append((between_s - before_s, clock.now_s() - between_s))
    return {"base_s": min(row[0] for row in rows), "patched_s": min(row[1] for row in rows),
            "ratio": statistics.median(base_s / patched_s for base_s, patched_s in rows),
            "base_tokens": base_tokens, "tokens": tokens, "ngrams": len(patched.artefact.ngrams)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `verify`."""
    parser.add_argument("patch", nargs="?", type=Path, metavar="DIR", help="an artefact, or a model folder with one")
    parser.add_argument("--base", metavar="TOKENIZER", help="what it was built on: folder with tokenizer.json, .gguf "
                        "file or hub id (default: DIR's own)")
    parser.add_argument("--against", type=Path, metavar="DIR", help="compare with the reference data of DIR")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE",
                        help="texts that must survive encode and decode as the base leaves them")
    parser.add_argument("--emitted", type=Path, nargs="+", default=[], metavar="FILE",
                        help="outputs of the served model, JSON lines with `token_ids`: rho of what it emits")
    parser.add_argument("--domain", metavar="NAME", help="measure rho of --text and --emitted under this name")
    parser.add_argument("--store", action="store_true", help="keep the figures of --domain in the artefact")
    parser.add_argument("--speed", action="store_true", help="time encoding of --text beside the base's own")


def run(args: argparse.Namespace) -> int:
    """Verify; 1 when anything differs."""
    if args.patch is None and args.against is None:
        raise ConfigError("nothing to verify: give an artefact's folder, or --against DIR")
    failed = False
    if args.against is not None:
        for agreement in against_reference(args.against):
            failed |= bool(agreement.differences)
            print(f"{agreement.name}: {agreement.cases} cases, {len(agreement.differences)} differences")
            for line in agreement.differences[:10]:
                print(f"  {line}")
    if args.store and args.domain is None:
        raise ConfigError("--store needs --domain NAME")
    if args.patch is not None:
        failed |= _verify_artefact(args)
        if args.domain is not None:
            measure_domain(args)
    return int(failed)


def measure_domain(args: argparse.Namespace) -> None:
    """rho of --text (side in) and of --emitted (side out): printed, and with --store kept in the artefact's meta."""
    patch = find(args.patch)
    assert patch is not None
    if not (args.text or args.emitted):
        raise ConfigError("--domain needs --text FILES or --emitted FILES to measure")
    tokenizer = load_patched(base_folder(args.base) if args.base else args.patch, patch)
    # A removed token becomes its parts; a model may spell a base token with any tokens, each of a byte at least.
    most = {STATISTICS: rho_max_in(tokenizer.artefact),
            STATISTICS_OUT: tokenizer.base.max_token_bytes}  # fmt: skip
    meta = dict(tokenizer.artefact.meta)
    date = datetime.datetime.fromtimestamp(wall_s(), datetime.UTC).date().isoformat()
    for key, files in ((STATISTICS, args.text), (STATISTICS_OUT, args.emitted)):
        if not files:
            continue
        emitted = key == STATISTICS_OUT
        texts, tokens = _emitted(tokenizer, files) if emitted else _encoded(tokenizer, files)
        base = [len(row.ids) for row in tokenizer.base.backend.encode_batch_fast(texts, add_special_tokens=False)]
        digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
        chars = np.array([len(text) for text in texts])
        figures = rho_statistics(np.array(base), np.array(tokens), chars, most[key], digest)
        meta[key] = {**meta.get(key, {}), args.domain: {**figures, "date": date}}
        if emitted:
            meta[LENGTHS] = base[-HISTORY:]
        print(f"side {'out' if emitted else 'in'}:\n{table({args.domain: figures})}")
    if args.store:
        write(dataclasses.replace(tokenizer.artefact, meta=meta), patch)
        print(f"stored in {patch}")


def _encoded(tokenizer: PatchedTokenizer, files: Sequence[Path]) -> tuple[list[str], list[int]]:
    """Documents, and the engine tokens of each."""
    texts = list(read_documents(files))
    return texts, [len(ids) for ids in tokenizer.encode_batch(texts, False)]


def _emitted(tokenizer: PatchedTokenizer, files: Sequence[Path]) -> tuple[list[str], list[int]]:
    """The text of each output, and its engine tokens without the special ones (they end it, they spell nothing)."""
    texts, tokens = [], []
    for file in files:
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            try:
                ids = json.loads(line)["token_ids"]
                spelling = [token for token in ids if token not in tokenizer.special_ids]
                texts.append(tokenizer.decode(spelling))
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{file}:{number}: is not a JSON object with a list `token_ids`") from None
            tokens.append(len(spelling))
    return texts, tokens


def _verify_artefact(args: argparse.Namespace) -> bool:
    """Invariants, dead n-grams, texts and speed; whether something failed."""
    patch = find(args.patch)
    if patch is None:
        raise ArtefactError(f"{args.patch}: holds no artefact (patch.json)")
    folder = base_folder(args.base) if args.base else args.patch
    if not args.base and not (folder / "tokenizer.json").is_file():
        if args.text or args.emitted or args.speed:
            raise ConfigError(f"{folder}: holds no tokenizer.json, and --text, --emitted and --speed need the base: "
                              "give --base")
        artefact = read(patch)
        print(f"{patch}: the numbers fit ({artefact.vocab_size} ids); give --base to check what they spell")
        return False
    artefact = read(patch, base=load_base(folder))
    dead = dead_ngrams(artefact.ngrams, artefact.removed) if artefact.kind == "patch" else dead_ngrams(())
    print(f"{patch}: every invariant holds ({artefact.vocab_size} ids, {len(artefact.removed)} removed, "
          f"{len(artefact.ngrams)} n-grams, {len(dead.removed_piece)} with a removed piece, "
          f"{len(dead.prefix_dominated)} behind a prefix)")
    texts = list(read_documents(args.text, "paragraph")) if args.text else []
    failed = False
    if texts:
        plain, _ = load_base_tokenizer(folder)
        patched = load_patched(folder, patch)
        lost = sum(patched.decode(patched.encode(text, False)) != plain.decode(plain.encode(text, False))
                   for text in texts)
        print(f"{len(texts)} texts: {lost} decode otherwise than the base's own ids")
        failed = lost > 0
    if args.speed:
        if not texts:
            raise ConfigError("--speed needs --text FILE")
        print(json.dumps(speed(folder, patch, texts)))
    return failed
