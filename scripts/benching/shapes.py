"""Shapes of well-known models, for measuring speed with random weights: a folder with config.json and a tokenizer.

`--shape NAME` with the engine's `--load-format dummy` is the only way in; weights are made on the device
(engine/parts/dummy.py). Every id of the tokenizer stands for one ASCII word, so that a streamed answer has one event a
token. Nothing here says anything about a model's answers.
"""

from __future__ import annotations

import json
import string
from itertools import product
from pathlib import Path
from typing import Any

_COMMON = {"rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1}


def _llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, vocab: int, positions: int,
           theta: float = 10000.0, **more: Any) -> dict[str, Any]:  # fmt: skip
    """A config.json of the Llama block."""
    return {
        **_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
        "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
        "max_position_embeddings": positions, "rope_theta": theta, "tie_word_embeddings": False, **more,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    # 16,384 positions (the model has 8,192): the length that the peer's published figures were measured with
    "llama3-8b": _llama(32, 4096, 14336, 32, 8, 128, 128256, 16384, 500000.0),
    "llama2-7b": _llama(32, 4096, 11008, 32, 32, 128, 32000, 4096),
    # v0.3: no sliding window, and then the block is Llama's
    "mistral-7b": _llama(32, 4096, 14336, 32, 8, 128, 32768, 32768, 1000000.0),
    "qwen2-1.5b": _llama(28, 1536, 8960, 12, 2, 128, 151936, 32768, 1000000.0, tie_word_embeddings=True,
                         architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
    "smollm2-135m": _llama(30, 576, 1536, 9, 3, 64, 49152, 8192, 100000.0, tie_word_embeddings=True),
    "tiny": _llama(2, 64, 160, 4, 2, 16, 512, 1024),  # for tests: no model has it
}  # fmt: skip


def write_folder(name: str, folder: Path, positions: int = 0) -> Path:
    """Write config.json and tokenizer.json of a shape, with at least so many positions, which change no figure but how
    long a request may be. Returns the folder. Raises ValueError naming the known ones."""
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is unknown; known: {', '.join(SHAPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[name] | {"max_position_embeddings": max(positions, SHAPES[name]["max_position_embeddings"])}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(config["vocab_size"])))
    return folder


def _tokenizer(vocab: int) -> dict[str, Any]:
    """A vocabulary of `vocab` different words of four letters, each behind a space; texts cannot be encoded with it."""
    words = product(string.ascii_lowercase, repeat=4)
    pieces = {"Ġ" + "".join(word): i for i, word in zip(range(vocab), words, strict=False)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": pieces,
                  "merges": []},
    }  # fmt: skip
