"""Greedy tokens equal transformers', in float32, under every schedule; logits within 1e-4."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runner.batch import Row, pack
from tessera_kernels import native
from tests import models
from tests.engine import oracle

COUNT, OUTPUTS, LONGEST = 64, 12, 150
FAMILIES = {
    "llama-gqa": (models.tiny_llama_dir, {}),
    "llama-tied-llama3-rope": (
        models.tiny_llama_dir,
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama-linear-rope": (
        models.tiny_llama_dir,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-yarn-rope": (
        models.tiny_llama_dir,
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2": (models.tiny_qwen2_dir, {}),
}  # fmt: skip


@dataclass
class Family:
    """A checkpoint and what the oracle says about 64 prompts."""

    folder: Path
    oracle: Any
    prompts: list[list[int]]
    truths: list[oracle.Truth]

    def judge(self, outputs: list[list[int]]) -> oracle.Verdict:
        """Compare outputs with the truths."""
        verdict = oracle.Verdict()
        for truth, ours in zip(self.truths, outputs, strict=True):
            oracle.compare(truth, ours, verdict)
        return verdict


def make_family(name: str, folder: Path) -> Family:
    """Write the checkpoint, ask the oracle."""
    make, overrides = FAMILIES[name]
    path = make(folder, 11, **overrides)
    judge = oracle.load_oracle(path)
    prompts = oracle.prompts(COUNT, judge.config.vocab_size, 5, 1, LONGEST)
    return Family(path, judge, prompts, [oracle.greedy_truth(judge, prompt, OUTPUTS) for prompt in prompts])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    """The family that goes through every schedule."""
    yield make_family("llama-gqa", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_the_oracle(name: str, tmp_path: Path) -> None:
    """Architectures, biases, tied heads and rope scalings, with the fast kernels and the judge's."""
    family = make_family(name, tmp_path)
    for kernels, backend in (("auto", "auto"), ("torch", "torch_vattn")):
        engine = oracle.make_engine(family.folder, kernels=kernels, attention_backend=backend)
        family.judge(oracle.run_greedy(engine, family.prompts, OUTPUTS)).check()
        engine.close()


SCHEDULES: dict[str, dict[str, Any]] = {
    "chunk-1": {"chunk_tokens": 1},
    "chunk-7": {"chunk_tokens": 7},
    "chunk-64": {"chunk_tokens": 64},
    "chunk-512": {"chunk_tokens": 512},
    "per-layer": {"kv_layout": "per_layer"},
    "per-layer-small-pages": {"kv_layout": "per_layer", "kv_page_bytes": 4096, "chunk_tokens": 7},
    "tokens-straddle-pages": {"kv_page_bytes": 4096, "chunk_tokens": 64},
    "vllm": {"scheduler": "vllm"},
    "orca": {"scheduler": "orca", "max_num_seqs": 9},
    "faster-transformer": {"scheduler": "faster_transformer", "max_num_seqs": 9},
    "simple-chunking": {"scheduler": "simple_chunking", "chunk_tokens": 64},
    "dynamic-chunking": {
        "dynamic_chunking": True, "low_chunk_tokens": 32, "high_chunk_tokens": 64,
        "chunk_schedule_max_tokens": 100, "chunk_schedule_stages": 4,
    },
    "few-slots": {"max_num_seqs": 3},
    "upstream-admission": {"admission": "upstream"},
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_equals_the_oracle(schedule: str, llama: Family) -> None:
    """Chunks, policies, layouts and page sizes change the order of work, never a token."""
    engine = oracle.make_engine(llama.folder, **SCHEDULES[schedule])
    llama.judge(oracle.run_greedy(engine, llama.prompts, OUTPUTS)).check()
    engine.close()


def test_alone_equals_together(llama: Family) -> None:
    """A batch of one gives what a batch of many gives."""
    engine = oracle.make_engine(llama.folder)
    llama.judge(oracle.run_greedy(engine, llama.prompts, OUTPUTS, alone=True)).check()
    engine.close()


@pytest.mark.parametrize("scheduler", ["sarathi", "vllm", "simple_chunking"])
def test_forced_preemption_changes_nothing(scheduler: str, llama: Family) -> None:
    """A pool that holds a few sequences: they are preempted and recomputed, and say the same."""
    settings: dict[str, Any] = {"kv_page_bytes": 4096, "kv_pool_bytes": None, "scheduler": scheduler}
    probe = oracle.make_engine(llama.folder, kv_page_bytes=4096)
    longest = probe.executor.runner.store.geometry.groups_for(LONGEST + OUTPUTS)
    probe.close()
    settings["kv_pool_groups"] = 2 * longest
    settings["max_model_len"] = LONGEST + OUTPUTS
    engine = oracle.make_engine(llama.folder, **settings)
    prompts = [prompt[: max(1, len(prompt) // 2)] for prompt in llama.prompts]
    truths = [oracle.greedy_truth(llama.oracle, prompt, 4 * OUTPUTS) for prompt in prompts[:24]]
    outputs = oracle.run_greedy(engine, prompts[:24], 4 * OUTPUTS)
    assert engine.stats()["preempted_total"] > 0, "nothing was preempted; the test proves nothing"
    verdict = oracle.Verdict()
    for truth, ours in zip(truths, outputs, strict=True):
        oracle.compare(truth, ours, verdict)
    verdict.check()
    engine.close()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_logits_within_tolerance(kernels: str, llama: Family) -> None:
    """Prefill logits of every prompt's last token, within 1e-4 of the oracle's."""
    engine = oracle.make_engine(llama.folder, kernels=kernels)
    runner = engine.executor.runner
    allocator = runner.store.allocator
    worst = 0.0
    with torch.inference_mode():
        for prompt in llama.prompts:
            slot = allocator.acquire(len(prompt))
            assert isinstance(slot, int) and allocator.ensure(slot, len(prompt)) is None
            ours = runner.model(pack([Row(slot, 0, prompt, True)]))[0]
            theirs = llama.oracle(torch.tensor([prompt])).logits[0, -1]
            worst = max(worst, float((ours - theirs).abs().max()))
            allocator.release(slot)
    engine.close()
    assert worst < 1e-4, worst


def test_smollm2_equals_the_oracle() -> None:
    """The real model: 64 prompts of mixed length through the engine, judged by one oracle pass over each output."""
    folder = models.smollm2_dir()
    engine = oracle.make_engine(folder, max_model_len=512, kv_pool_bytes=1 << 30)
    many = oracle.prompts(64, 49152, 9, 1, 60)
    outputs = oracle.run_greedy(engine, many, 8)
    engine.close()
    judge = oracle.load_oracle(folder)
    verdict = oracle.Verdict()
    for prompt, ours in zip(many, outputs, strict=True):
        oracle.judge_forced(judge, prompt, ours, verdict)
    verdict.check()


def test_dynamic_rope_uses_one_base_for_the_longest_sequence(tmp_path: Path) -> None:
    """Dynamic NTK: the base of max_model_len for every token, so the oracle is plain rope with that base."""
    trained, served, factor, theta = 128, 256, 2.0, 10000.0
    scaled = {"rope_type": "dynamic", "rope_theta": theta, "factor": factor}
    folder = models.tiny_llama_dir(tmp_path / "a", 3, max_position_embeddings=trained, rope_parameters=scaled)
    head_dim = oracle.load_oracle(folder).config.head_dim
    stretched = theta * (factor * served / trained - (factor - 1)) ** (head_dim / (head_dim - 2))
    for length, base in ((served, stretched), (trained, theta)):
        plain = {"rope_type": "default", "rope_theta": base}
        judge = oracle.load_oracle(
            models.tiny_llama_dir(tmp_path / str(length), 3, max_position_embeddings=served, rope_parameters=plain)
        )
        engine = oracle.make_engine(folder, max_model_len=length)
        many = oracle.prompts(16, judge.config.vocab_size, 4, 1, length - 20)
        verdict = oracle.Verdict()
        for prompt, ours in zip(many, oracle.run_greedy(engine, many, 8), strict=True):
            oracle.compare(oracle.greedy_truth(judge, prompt, 8), ours, verdict)
        engine.close()
        verdict.check()


def test_sliding_window_equals_the_oracle(tmp_path: Path) -> None:
    """Qwen2 with a window on its later layers: a query sees the window and no more, in chunks and decodes."""
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    folder = models.tiny_qwen2_dir(tmp_path, 5, **window)
    judge = oracle.load_oracle(folder)
    many = oracle.prompts(24, judge.config.vocab_size, 6, 1, 90)
    truths = [oracle.greedy_truth(judge, prompt, OUTPUTS) for prompt in many]
    for settings in ({}, {"chunk_tokens": 7}, {"kernels": "torch", "attention_backend": "torch_vattn"}):
        engine = oracle.make_engine(folder, **settings)
        verdict = oracle.Verdict()
        for truth, ours in zip(truths, oracle.run_greedy(engine, many, OUTPUTS), strict=True):
            oracle.compare(truth, ours, verdict)
        engine.close()
        verdict.check()


def test_bf16_does_not_depend_on_the_schedule() -> None:
    """The C++ kernels promise more than the oracle asks: in bf16, too, every schedule gives the same tokens."""
    folder = models.smollm2_dir()
    many = oracle.prompts(12, 49152, 13, 1, 80)
    settings: list[dict[str, Any]] = [
        {}, {"chunk_tokens": 7}, {"kv_layout": "per_layer", "chunk_tokens": 64}, {"scheduler": "vllm", "threads": 1},
    ]  # fmt: skip
    outputs = []
    for some in settings:
        engine = oracle.make_engine(folder, dtype="bfloat16", max_model_len=256, kv_pool_bytes=512 << 20, **some)
        if not native.available(torch.bfloat16):
            pytest.skip("this CPU has no bf16 kernels; PyTorch's promise nothing about batches")
        outputs.append(oracle.run_greedy(engine, many, 16))
        engine.close()
    assert all(output == outputs[0] for output in outputs[1:])
