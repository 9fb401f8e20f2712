"""The judge of the whole engine: `transformers` on the same weights, and the comparison rule for greedy tokens.

Every token must be equal, except where the oracle's own two best logits are closer than TIE: there, a difference is a
tie, it is counted, and that prompt's comparison stops.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.build import build_engine
from engine.core.config import EngineConfig
from engine.core.loop import EngineLoop
from engine.core.request import Request, SamplingParams

TIE = 2e-4


@dataclass
class Truth:
    """The oracle's greedy continuation of one prompt. gaps: best minus second logit, for each token."""

    prompt: list[int]
    tokens: list[int]
    gaps: list[float]


@dataclass
class Verdict:
    """What a comparison found; `wrong` must be empty and ties rare."""

    compared: int = 0
    ties: int = 0
    wrong: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Assert equality under the tie rule: at most 0.1 % of the tokens compared may be ties."""
        print(f"{self.compared} tokens compared, {self.ties} ties, {len(self.wrong)} wrong")
        assert not self.wrong, self.wrong[:3]
        assert self.compared > 0
        assert self.ties <= max(1, self.compared // 1000), f"{self.ties} ties in {self.compared} tokens"


def prompts(count: int, vocab: int, seed: int, shortest: int, longest: int) -> list[list[int]]:
    """Seeded random ids of mixed length, shortest and longest among them."""
    rng = random.Random(seed)
    lengths = [shortest, longest] + [rng.randint(shortest, longest) for _ in range(count - 2)]
    return [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]


def load_oracle(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@torch.inference_mode()
def greedy_truth(oracle: Any, prompt: list[int], count: int) -> Truth:
    """Token by token with the oracle's own cache."""
    truth = Truth(prompt, [], [])
    ids, cache = torch.tensor([prompt]), None
    for _ in range(count):
        out = oracle(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = torch.topk(out.logits[0, -1].float(), 2)
        truth.tokens.append(int(best.indices[0]))
        truth.gaps.append(float(best.values[0] - best.values[1]))
        ids = torch.tensor([[truth.tokens[-1]]])
    return truth


@torch.inference_mode()
def judge_forced(oracle: Any, prompt: list[int], ours: Sequence[int], verdict: Verdict) -> None:
    """One oracle pass over prompt + our output: equal to comparing greedy runs, up to the first difference."""
    logits = oracle(torch.tensor([[*prompt, *ours[:-1]]])).logits[0, len(prompt) - 1 :].float()
    best = torch.topk(logits, 2, dim=-1)
    gaps = (best.values[:, 0] - best.values[:, 1]).tolist()
    compare(Truth(prompt, best.indices[:, 0].tolist(), gaps), ours, verdict)


def compare(truth: Truth, ours: Sequence[int], verdict: Verdict) -> None:
    """Add one prompt to a verdict."""
    if len(ours) != len(truth.tokens):
        verdict.wrong.append(f"{len(ours)} tokens, not {len(truth.tokens)}, for a prompt of {len(truth.prompt)}")
    for i, (mine, theirs, gap) in enumerate(zip(ours, truth.tokens, truth.gaps, strict=False)):
        verdict.compared += 1
        if mine != theirs:
            if gap < TIE:
                verdict.ties += 1
            else:
                verdict.wrong.append(f"prompt of {len(truth.prompt)}: output {i} is {mine}, not {theirs}; gap {gap}")
            return


def make_engine(folder: Path, *, kernels: str = "auto", **settings: Any) -> EngineLoop:
    """An engine in float32 with a small pool unless told otherwise."""
    defaults: dict[str, Any] = {"dtype": "float32", "kv_pool_bytes": 64 << 20, "max_num_seqs": 64}
    return build_engine(EngineConfig(model=str(folder), **{**defaults, **settings}), kernels=kernels)


def run_greedy(engine: EngineLoop, many: Sequence[list[int]], count: int, *, alone: bool = False) -> list[list[int]]:
    """`count` greedy tokens for each prompt, all at once or one after the other."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    outputs: dict[str, list[int]] = {}
    groups = [[i] for i in range(len(many))] if alone else [list(range(len(many)))]
    for group in groups:
        for i in group:
            outputs[str(i)] = []
            engine.add(Request(str(i), tuple(many[i]), params, arrival_s=float(i) * 1e-6))
        steps = 0
        while engine.has_work:
            for update in engine.step():
                outputs[update.request_id] += update.tokens
                assert update.finish_reason in (None, "length"), update
            steps += 1
            assert steps < 200_000, "the engine makes no progress"
    return [outputs[str(i)] for i in range(len(many))]
