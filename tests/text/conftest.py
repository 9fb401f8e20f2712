"""Vocabularies for tests/text: real ones where they can be fetched, and the tiny one that is made here.

It does not know what is tested with them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from engine.tokenization import HfTokenizer, load_tokenizer
from tests.models import npm_tokenizer_dir, smollm2_dir, write_tiny_tokenizer

NPM = ("gpt2", "llama3", "llama3_2", "qwen2_5", "llama2", "mistral_nemo", "deepseek_v3")
REAL = ("smollm2", *NPM)


@functools.cache
def real_dir(name: str) -> Path:
    """The folder of a real vocabulary; skips the test where it cannot be had."""
    return smollm2_dir() if name == "smollm2" else npm_tokenizer_dir(name)


@functools.cache
def real(name: str) -> HfTokenizer:
    """A real vocabulary, loaded once a session."""
    return load_tokenizer(real_dir(name))


@functools.cache
def of_transformers(name: str) -> Any:
    """The same vocabulary as transformers loads it: the judge.

    llama2 through the class that takes tokenizer.json as it is: version 5's LlamaTokenizer builds another one, which
    does not put SentencePiece's prefix before a text that begins with a space.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    return (PreTrainedTokenizerFast if name == "llama2" else AutoTokenizer).from_pretrained(real_dir(name))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny vocabulary."""
    folder = tmp_path_factory.mktemp("tiny-tokenizer")
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> HfTokenizer:
    """The tiny vocabulary: 512 pieces, byte-level."""
    return load_tokenizer(tiny_dir)
