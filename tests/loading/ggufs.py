"""GGUF files made from tiny checkpoints with the `gguf` package's writer, as llama.cpp's converter lays them out.

It does not use the reader under test; rows of q and k are permuted here as that converter permutes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from engine.loading.weights import open_weights

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's row order (halves) to GGUF's (pairs)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def tokenizer_metadata(definition: Mapping[str, Any], model: str, pre: str | None = None) -> dict[str, Any]:
    """The tokenizer.* keys for a tokenizer.json; a SentencePiece score is minus the rank of a piece's first merge."""
    vocab: dict[str, int] = dict(definition["model"]["vocab"])
    special = {}
    for token in definition["added_tokens"]:
        vocab[token["content"]] = token["id"]
        special[token["id"]] = 3 if token["special"] else 4
    size = max(vocab.values()) + 1
    tokens, types = [f"[PAD{number}]" for number in range(size)], [5] * size
    for token, number in vocab.items():
        is_byte = model == "llama" and len(token) == 6 and token.startswith("<0x")
        tokens[number] = token
        types[number] = special.get(number, 6 if is_byte else 1)
    found: dict[str, Any] = {"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": tokens,
                             "tokenizer.ggml.token_type": types}  # fmt: skip
    if model == "llama":
        types[0] = 2
        scores = [-1e6 if kind == 1 else 0.0 for kind in types]  # single characters are never the result of a merge
        for rank, merge in reversed(list(enumerate(definition["model"]["merges"]))):
            scores[vocab[merge.replace(" ", "")]] = -float(rank)
        found["tokenizer.ggml.scores"] = scores
    else:
        merges = definition["model"]["merges"]
        found["tokenizer.ggml.merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        found["tokenizer.ggml.pre"] = pre
    return found


def write_gguf(path: Path, folder: Path, arch: str, kind: str = "F32", **extra: Any) -> Path:
    """A GGUF file of a tiny checkpoint folder. kind: type of the matrices (F32, F16, BF16, Q8_0, Q4_0, ...), norms and
    biases stay F32. extra: further metadata by name, dots as double underscores, or `rope_freqs` as an array."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
    metadata = tokenizer_metadata(json.loads((folder / "tokenizer.json").read_text()), "gpt2", "gpt-2")
    for key, value in metadata.items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_string(key, value)
    for key, value in extra.items():
        if key != "rope_freqs":
            name = key.replace("__", ".")
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
            add[type(value)](name, value)
    if "rope_freqs" in extra:
        writer.add_tensor("rope_freqs.weight", np.asarray(extra["rope_freqs"], np.float32))
    quantised = gguf.GGMLQuantizationType[kind]
    with open_weights(folder) as weights:
        for name in weights.names():
            values = weights.get(name).to(torch.float32).numpy()
            if arch == "llama" and "q_proj" in name:
                values = permute(values, config["num_attention_heads"])
            elif arch == "llama" and "k_proj" in name:
                values = permute(values, config["num_key_value_heads"])
            if values.ndim == 1 or kind == "F32":
                writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
            else:
                raw = gguf.quantize(values, quantised)
                writer.add_tensor(gguf_name(name), raw, raw_dtype=None if kind == "F16" else quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
