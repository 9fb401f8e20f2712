"""Tiny checkpoints for tests/loading, made once a session.

It does not know what is tested with them; tests that damage files copy them first.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.loading.ggufs import write_gguf
from tests.models import tiny_llama_dir, tiny_qwen2_dir


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, fp32, untied, one file."""
    return tiny_llama_dir(tmp_path_factory.mktemp("llama"), seed=1)


@pytest.fixture(scope="session")
def sharded_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied Llama, bf16, several shards with an index."""
    return tiny_llama_dir(tmp_path_factory.mktemp("sharded"), seed=2, dtype="bfloat16", tie_word_embeddings=True,
                          max_shard_size="60KB")  # fmt: skip


@pytest.fixture(scope="session")
def qwen2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2, fp32."""
    return tiny_qwen2_dir(tmp_path_factory.mktemp("qwen2"), seed=3)


@pytest.fixture(scope="session")
def llama_gguf(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> Path:
    """The tiny Llama as a GGUF file, Q8_0."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama_dir, "llama", "Q8_0")
