"""The whole engine on a GPU against transformers in float32, TF32 off: graphs and none, both layouts, short chunks.

A token may differ from the oracle's only where the oracle itself finds both as good, within GAP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import build_engine
from engine.core.config import EngineConfig
from engine.core.request import Request, SamplingParams
from tests.models import TINY_VOCAB, tiny_llama_dir

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = "cuda"
PROMPTS, OUTPUTS, GAP = 16, 24, 1e-3


def answers(folder: Path, settings: dict[str, Any], prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of every prompt, all at once."""
    config = EngineConfig(
        model=str(folder), device=DEVICE, dtype="float32", kv_pool_bytes=1 << 30, max_num_seqs=PROMPTS, **settings
    )
    engine = build_engine(config)
    out: dict[str, list[int]] = {f"{i}": [] for i in range(len(prompts))}
    try:
        params = SamplingParams(temperature=0.0, max_tokens=OUTPUTS, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            engine.add(Request(f"{i}", tuple(prompt), params, 0.0))
        while engine.has_work:
            for update in engine.step():
                out[update.request_id] += update.tokens
    finally:
        engine.close()
    return list(out.values())


@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True}, {"kv_layout": "per_layer"}, {"chunk_tokens": 7}])
def test_greedy_tokens_are_the_oracle_s(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Prompts of 1 to 196 tokens, 24 tokens each; the oracle sees the engine's own tokens, so one slip is one wrong."""
    from transformers import LlamaForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    folder = tiny_llama_dir(
        tmp_path, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64
    )
    prompts = [[(7 * i + j * j) % TINY_VOCAB for j in range(1 + 13 * i)] for i in range(PROMPTS)]
    found = answers(folder, settings, prompts)
    judge = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    for prompt, tokens in zip(prompts, found, strict=True):
        assert len(tokens) == OUTPUTS
        with torch.inference_mode():
            logits = judge(torch.tensor([[*prompt, *tokens[:-1]]], device=DEVICE)).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(tokens, device=DEVICE)[:, None])[:, 0]
        assert float((logits.max(dim=1).values - chosen).max()) <= GAP
