"""The two tiny base vocabularies, once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.patching.base import BaseVocabulary
from tests.patch.bases import tiny_base


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """bytes and pieces -> the tokenizer's folder."""
    return {kind: tmp_path_factory.mktemp(kind) for kind in ("bytes", "pieces")}


@pytest.fixture(scope="session")
def bases(folders: dict[str, Path]) -> dict[str, BaseVocabulary]:
    """bytes and pieces -> the vocabulary."""
    return {kind: tiny_base(folder, kind) for kind, folder in folders.items()}
