"""scripts.corpora: held-out documents share no passage with training ones, and a wrong package is refused."""

from __future__ import annotations

import gzip
import io
import random
import zipfile
from pathlib import Path

import pytest

from engine.core.errors import LoadError
from scripts.corpora import (
    COPY,
    SHARED,
    SOURCES,
    check_hash,
    legal_texts,
    medical_abstracts,
    shingles,
    split,
)

WORDS = [f"word{index}" for index in range(500)]


def document(rng: random.Random, words: int = 120) -> list[str]:
    return rng.choices(WORDS, k=words)


def corpus(seed: int, documents: int = 200) -> list[str]:
    """Documents of which a third quote a passage of another, some nearly whole."""
    rng = random.Random(seed)
    texts = [document(rng) for _ in range(documents)]
    for index in range(0, documents, 3):
        source, size = rng.choice(texts), rng.choice([30, 60, 110])
        texts[index][:size] = source[:size]
    return [" ".join(words) for words in texts]


@pytest.mark.parametrize("seed", range(5))
def test_no_passage_stands_on_both_sides(seed: int) -> None:
    """What is measured on was not learnt; the documents are chosen so that a careless split would share some."""
    texts = corpus(seed)
    found = split(texts, 0.3)
    learnt = set().union(*map(shingles, found.train))
    assert found.held_out and len(found.train) > 50
    for text in found.held_out:
        marks = shingles(text)
        assert len(marks & learnt) <= SHARED * len(marks)
    seen: set[int] = set()
    for text in (text for text in texts if text in {*found.train, *found.held_out}):
        marks = shingles(text)
        assert len(marks & seen) <= COPY * len(marks)
        seen |= marks

    assert found.copies == len(texts) - len(found.train) - len(found.held_out) > 0


def test_the_split_depends_on_texts_alone() -> None:
    """Another run, the same sets: which side a document is on is a hash of its text."""
    assert split(corpus(1), 0.2) == split(corpus(1), 0.2)
    assert split(["too short"] * 3, 0.2).short == 3


def test_archives_are_read(tmp_path: Path) -> None:
    """Abstracts without tags and with their characters, licences without the data block before them."""
    xml = ("<Article><Abstract><AbstractText Label='A'>Beta &lt; 0.05, <i>in vitro</i>.</AbstractText>"
           "<AbstractText>More.</AbstractText></Abstract></Article>")  # fmt: skip
    packed = io.BytesIO()
    with gzip.open(packed, "wb") as file:
        file.write(xml.encode())
    with zipfile.ZipFile(tmp_path / "texts.whl", "w") as archive:
        archive.writestr("data/a.xml.gz", packed.getvalue())
        archive.writestr("x/data/licenses/some.LICENSE", "---\nkey: some\n---\n\nYou may.\n")
        archive.writestr("x/data/licenses/some.yml", "key: other")
    with zipfile.ZipFile(tmp_path / "texts.whl") as archive:
        assert list(medical_abstracts(archive)) == ["Beta < 0.05, in vitro. More."]
        assert list(legal_texts(archive)) == ["You may."]


def test_another_package_is_refused(tmp_path: Path) -> None:
    """The figures belong to one file; a changed one is named."""
    (tmp_path / "other.whl").write_bytes(b"other")
    with pytest.raises(LoadError, match="SHA-256"):
        check_hash(tmp_path / "other.whl", SOURCES["legal"])
