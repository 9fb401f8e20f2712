"""The ways to run the engine on a GPU that scripts.gpu_correctness judges, and the tiny checkpoints they run on.

It names settings, prompts and weights; it neither builds an engine nor judges an answer.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LLAMA: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "model_type": "llama",
    "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32",
}  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
# config.json of each tiny model. Three layers: in float32 a token's 12 KiB do not divide a page of 2 MiB, in the mega
# layout. The window begins at the second layer and is shorter than most prompts. Heads are alike, so that kernels are.
TINY: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied-rope": {**LLAMA, "num_hidden_layers": 3, "tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE},
    "qwen2": {**LLAMA, "num_hidden_layers": 2, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
              "use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1},
}  # fmt: skip
SMOLLM2 = "SmolLM2"
VOCAB = {SMOLLM2: 49152}
POOL_BYTES = 32 * (4 << 20)  # of 2 MiB pages, mega, float32: 128 tokens a group; so some wait and some are preempted


@dataclass(frozen=True)
class Load:
    """How many prompts, their shortest and longest in tokens, and how many tokens each gets."""

    requests: int = 24
    longest: int = 300
    outputs: int = 24
    shortest: int = 1

    def prompts(self, vocab: int) -> list[list[int]]:
        """Seeded ids of mixed lengths, shortest and longest among them."""
        rng = random.Random(11)
        drawn = (rng.randint(self.shortest, self.longest) for _ in range(self.requests - 2))
        return [[rng.randrange(3, vocab) for _ in range(length)] for length in (self.shortest, self.longest, *drawn)]


WHOLE = Load()
SMALL = Load(requests=10, longest=200, outputs=12)


@dataclass(frozen=True)
class Case:
    """One way to run the engine. preempts: it proves nothing unless a sequence was preempted."""

    name: str
    settings: dict[str, Any]
    sampled: bool = False
    model: str = "llama"
    load: Load = WHOLE
    preempts: bool = False

    @property
    def backend(self) -> str:
        """Whose attention it runs on."""
        return str(self.settings["attention_backend"])

    @property
    def half(self) -> bool:
        """Whether it runs in bfloat16."""
        return self.settings.get("dtype") == "bfloat16"

    def prompts(self) -> list[list[int]]:
        """Its prompts' ids."""
        return self.load.prompts(VOCAB.get(self.model, LLAMA["vocab_size"]))


# orders of work, as in tests/engine/test_oracle.py
SCHEDULES: dict[str, dict[str, Any]] = {
    "chunks of 1": {"chunk_tokens": 1}, "chunks of 7": {"chunk_tokens": 7}, "chunks of 64": {"chunk_tokens": 64},
    "chunks of 512": {"chunk_tokens": 512}, "per_layer, chunks of 7": {"kv_layout": "per_layer", "chunk_tokens": 7},
    "one at a time": {"max_num_seqs": 1}, "few slots": {"max_num_seqs": 3}, "policy vllm": {"scheduler": "vllm"},
    "policy orca": {"scheduler": "orca", "max_model_len": 384},
    "policy faster_transformer": {"scheduler": "faster_transformer", "max_model_len": 384},
    "policy simple_chunking": {"scheduler": "simple_chunking", "chunk_tokens": 64},
    "dynamic chunking": {"dynamic_chunking": True, "low_chunk_tokens": 32, "high_chunk_tokens": 64,
                         "chunk_schedule_max_tokens": 100, "chunk_schedule_stages": 4},
    "upstream admission": {"admission": "upstream"},
}  # fmt: skip


def cases() -> list[Case]:
    """Backends x layouts x graphs in float32, then in bfloat16, schedules, other models, sampling."""
    made = []
    for layout in ("mega", "per_layer"):
        for eager in (False, True):
            how = f"{layout} {'eager' if eager else 'graphs'}"
            for name in ("triton_vattn", "triton_paged"):
                made.append(Case(f"{name} {how}", {"attention_backend": name, "kv_layout": layout,
                                                   "enforce_eager": eager}))  # fmt: skip
        made.append(Case(f"torch_vattn {layout}", {"attention_backend": "torch_vattn", "kv_layout": layout}))
    made.append(Case("torch_paged", {"attention_backend": "torch_paged"}, load=SMALL))
    half = {"dtype": "bfloat16"}
    for name in ("triton_vattn", "fa_vattn", "fi_vattn", "triton_paged", "fi_paged", "fa_paged"):
        for layout in ("mega", "per_layer"):
            settings: dict[str, Any] = {**half, "attention_backend": name, "kv_layout": layout}
            if name == "fa_paged":
                settings |= {"kv_page_bytes": 2 << 20, "kv_pool_bytes": 4 * POOL_BYTES}
            made.append(Case(f"{name} bfloat16 {layout}", settings))
    for name in ("triton_vattn", "fa_vattn", "torch_vattn"):
        settings = {**half, "attention_backend": name, "enforce_eager": True}
        made.append(Case(f"{name} bfloat16 eager", settings, load=SMALL))
    made += scheduled("triton_vattn", {}, group_tokens=128) + scheduled("fa_vattn", half, group_tokens=256)
    for model in TINY:
        if model != "llama":
            made.append(Case(f"triton_vattn {model}", {"attention_backend": "triton_vattn"}, model=model,
                             load=Load(12, 300, 12)))  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        made.append(Case(f"triton_vattn {SMOLLM2} {dtype}", {"attention_backend": "triton_vattn", "dtype": dtype},
                         model=SMOLLM2, load=Load(6, 60, 24)))  # fmt: skip
    made.append(Case("triton_vattn sampled", {"attention_backend": "triton_vattn"}, sampled=True))
    return made


def scheduled(backend: str, more: dict[str, Any], group_tokens: int) -> list[Case]:
    """A backend under every order of work. group_tokens: that a page group of the tiny Llama holds, mega."""
    base = {"attention_backend": backend, "max_num_seqs": SMALL.requests, **more}
    label = f"{backend} bfloat16" if more else backend
    made = [Case(f"{label} {name}", {**base, **settings}, load=SMALL) for name, settings in SCHEDULES.items()]
    # prompts end just before their first group does, and the pool has no second one for all that are admitted
    tight = Load(6, group_tokens - 2, 20, shortest=group_tokens - 12)
    for policy in ("sarathi", "vllm", "simple_chunking"):
        settings = {**base, "scheduler": policy, "kv_pool_bytes": 4 * (4 << 20), "max_model_len": 3 * group_tokens}
        made.append(Case(f"{label} {policy} preempts", settings, load=tight, preempts=True))
    return made


def write_checkpoint(folder: Path, model: str = "llama") -> None:
    """config.json and model.safetensors of a tiny model; every weight random, norms and biases too."""
    from safetensors.torch import save_file

    shape = TINY[model]
    generator = torch.Generator().manual_seed(0)

    def noise(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator) * scale

    width, ffn, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    heads, groups, dim = (shape[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    tensors = {"model.embed_tokens.weight": noise(vocab, width), "lm_head.weight": noise(vocab, width),
               "model.norm.weight": 1 + noise(width, scale=0.1)}  # fmt: skip
    if shape["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    shapes = {"self_attn.q_proj": (heads * dim, width), "self_attn.k_proj": (groups * dim, width),
              "self_attn.v_proj": (groups * dim, width), "self_attn.o_proj": (width, heads * dim),
              "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}  # fmt: skip
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, (out, into) in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = noise(out, into, scale=1.5 * into**-0.5)
            if shape["model_type"] == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{prefix}.{name}.bias"] = noise(out, scale=0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = 1 + noise(width, scale=0.1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
