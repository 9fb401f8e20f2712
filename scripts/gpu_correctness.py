"""Is the engine right on a GPU? `python -m scripts.gpu_correctness [--only TEXT] [--budget-s N] [--json FILE]`.

A tiny random Llama goes through the whole engine under every backend, both layouts, graphs on and off and the main
schedules; each greedy token is judged by one pass of `transformers` (or, without it, of this engine's plain kernels on
the CPU, which the CPU suite holds to transformers) in float32 over the prompt and our answer, TF32 off. In float32
every token must be equal, but where the judge's two best logits differ by less than 2e-4; in bfloat16 the first
difference must stand where they differ by less than BF16_GAP. Sampled requests must give the same tokens in graphs and
without. Prints a line a case and, last, a plain count; status 1 if a case failed. tests/gpu runs the same cases.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from engine.attention.base import backends
from engine.build import build_engine, build_runner, resolve
from engine.core.config import EngineConfig
from engine.core.errors import ConfigError
from engine.core.request import Request, SamplingParams
from engine.exec.local import LocalExecutor
from engine.runner.batch import Row, pack
from scripts.benching.environment import heading

TIE = 2e-4  # of float32 logits, as in the CPU suite
BF16_GAP = 1.5  # logits of the tiny model have a standard deviation of 11.6; on a CPU in bfloat16 0.81 was seen
SHAPE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "model_type": "llama",
    "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32",
}  # fmt: skip
REQUESTS, LONGEST, OUTPUTS = 24, 300, 24
POOL_BYTES = 32 * (4 << 20)  # of 2 MiB pages, mega, float32: 128 tokens a group; so some wait and some are preempted


@dataclass(frozen=True)
class Case:
    """One way to run the engine."""

    name: str
    settings: dict[str, Any]
    sampled: bool = False

    @property
    def backend(self) -> str:
        """Whose attention it runs on."""
        return str(self.settings["attention_backend"])


@dataclass
class Found:
    """What a case gave: tokens compared, ties among them, and what was wrong."""

    compared: int = 0
    ties: int = 0
    wrong: list[str] = field(default_factory=list)


def cases() -> list[Case]:
    """Backends x layouts x graphs, then schedules, then bfloat16, then sampling."""
    made = []
    for layout in ("mega", "per_layer"):
        for eager in (False, True):
            how = f"{layout} {'eager' if eager else 'graphs'}"
            for name in ("triton_vattn", "triton_paged"):
                made.append(Case(f"{name} {how}", {"attention_backend": name, "kv_layout": layout,
                                                   "enforce_eager": eager}))  # fmt: skip
        made.append(Case(f"torch_vattn {layout}", {"attention_backend": "torch_vattn", "kv_layout": layout}))
    base = {"attention_backend": "triton_vattn"}
    schedules: dict[str, dict[str, Any]] = {
        "chunks of 33": {"chunk_tokens": 33}, "policy vllm": {"scheduler": "vllm"},
        "policy orca": {"scheduler": "orca", "max_model_len": 384, "kv_pool_bytes": 3 * POOL_BYTES},
        "policy faster_transformer": {"scheduler": "faster_transformer", "max_model_len": 384,
                                      "kv_pool_bytes": 3 * POOL_BYTES},
        "policy simple_chunking": {"scheduler": "simple_chunking"},
        "one at a time": {"max_num_seqs": 1},
    }  # fmt: skip
    made += [Case(f"triton_vattn {name}", {**base, **settings}) for name, settings in schedules.items()]
    half = {"dtype": "bfloat16"}
    for name in ("triton_vattn", "fa_vattn", "fi_vattn", "triton_paged", "fi_paged", "fa_paged"):
        for layout in ("mega", "per_layer"):
            settings: dict[str, Any] = {**half, "attention_backend": name, "kv_layout": layout}
            if name == "fa_paged":
                settings |= {"kv_page_bytes": 2 << 20, "kv_pool_bytes": 4 * POOL_BYTES}
            made.append(Case(f"{name} bfloat16 {layout}", settings))
    made.append(Case("triton_vattn sampled", base, sampled=True))
    return made


def write_checkpoint(folder: Path) -> None:
    """config.json and model.safetensors of the tiny Llama; every weight random, norms too."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    width, ffn = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    heads, groups, dim = (SHAPE[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    tensors = {"model.embed_tokens.weight": noise(512, width), "lm_head.weight": noise(512, width),
               "model.norm.weight": 1 + noise(width, scale=0.1)}  # fmt: skip
    shapes = {"self_attn.q_proj": (heads * dim, width), "self_attn.k_proj": (groups * dim, width),
              "self_attn.v_proj": (groups * dim, width), "self_attn.o_proj": (width, heads * dim),
              "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}  # fmt: skip
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        for name, (out, into) in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = noise(out, into, scale=1.5 * into**-0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = 1 + noise(width, scale=0.1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")


Judge = Callable[[Sequence[int]], torch.Tensor]


def make_judge(folder: Path, *, plain: bool = False) -> tuple[str, Judge]:
    """Who judges, and token ids to (N, V) float32 logits. plain: this engine, though transformers is here."""
    if not plain and importlib.util.find_spec("transformers") is not None:
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

        def by_transformers(ids: Sequence[int]) -> torch.Tensor:
            logits: torch.Tensor = model(torch.tensor([list(ids)])).logits[0]
            return logits

        return "transformers", by_transformers
    config, spec, groups = resolve(EngineConfig(model=str(folder), device="cpu", dtype="float32", max_num_seqs=1,
                                                kv_pool_bytes=256 << 20,
                                                attention_backend="torch_vattn"))  # fmt: skip
    runner = build_runner(spec, config, groups, kernels="torch")

    def by_plain_kernels(ids: Sequence[int]) -> torch.Tensor:
        slot = runner.store.borrow(len(ids))
        batch = pack([Row(slot, 0, list(ids), True)])
        batch.sample_rows = torch.arange(len(ids))
        logits = runner.model(batch)
        runner.store.give_back(slot)
        return logits

    return "this engine's plain kernels on the CPU", by_plain_kernels


def prompts() -> list[list[int]]:
    """Seeded ids of mixed lengths, 1 and LONGEST among them."""
    rng = random.Random(11)
    lengths = [1, LONGEST, *(rng.randint(1, LONGEST) for _ in range(REQUESTS - 2))]
    return [[rng.randrange(3, 512) for _ in range(length)] for length in lengths]


def params_of(number: int, sampled: bool) -> SamplingParams:
    """Greedy, or every other kind of rule in turn."""
    if not sampled:
        return SamplingParams(temperature=0.0, max_tokens=OUTPUTS, ignore_eos=True)
    rules: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 30, "top_p": 0.8}]
    return SamplingParams(temperature=0.8, seed=number, max_tokens=OUTPUTS, ignore_eos=True, **rules[number % 5])


def answers(folder: Path, settings: dict[str, Any], *, sampled: bool, device: str = "cuda") -> list[list[int]]:
    """Every prompt's tokens, all requests at once. Raises AssertionError when one ends otherwise or memory is held."""
    defaults = {"dtype": "float32", "max_num_seqs": 24, "chunk_tokens": 128, "kv_pool_bytes": POOL_BYTES,
                "max_model_len": 512}  # fmt: skip
    if settings.get("scheduler") in ("vllm", "orca", "faster_transformer"):
        del defaults["chunk_tokens"]
    engine = build_engine(EngineConfig(model=str(folder), device=device, **{**defaults, **settings}))
    assert isinstance(engine.executor, LocalExecutor)
    given: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts()):
        given[str(number)] = []
        engine.add(Request(str(number), tuple(prompt), params_of(number, sampled), 0.0))
    try:
        while engine.has_work:
            for update in engine.step():
                given[update.request_id] += update.tokens
                assert update.finish_reason in (None, "length"), f"{update.finish_reason}: {update.error}"
        held = engine.stats()["kv_groups_in_use"]
        assert held == 0, f"{held} page groups are still in use"
    finally:
        engine.close()
    return list(given.values())


@torch.inference_mode()
def run_case(case: Case, folder: Path, judge: Judge, device: str = "cuda") -> Found:
    """Run and judge one case."""
    found = Found()
    with torch.inference_mode(False):
        ours = answers(folder, case.settings, sampled=case.sampled, device=device)
    if case.sampled:
        with torch.inference_mode(False):
            theirs = answers(folder, {**case.settings, "enforce_eager": True}, sampled=True, device=device)
        found.compared = sum(map(len, ours))
        differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        found.ties = len(differing)  # a point may fall on a boundary between two tokens within rounding
        found.wrong = [f"requests {differing} differ"] if len(differing) > 1 else []
        return found
    bound = BF16_GAP if case.settings.get("dtype") == "bfloat16" else TIE
    for prompt, answer in zip(prompts(), ours, strict=True):
        if len(answer) != OUTPUTS:
            found.wrong.append(f"prompt of {len(prompt)}: {len(answer)} tokens, not {OUTPUTS}")
        best = judge([*prompt, *answer[:-1]])[len(prompt) - 1 :].topk(2, dim=-1)
        for i, token in enumerate(answer):
            found.compared += 1
            if token != int(best.indices[i, 0]):
                gap = float(best.values[i, 0] - best.values[i, 1])
                found.ties += gap < bound
                if gap >= bound:
                    found.wrong.append(f"prompt of {len(prompt)}: output {i} is {token}, not "
                                       f"{int(best.indices[i, 0])}; gap {gap:.4f}")  # fmt: skip
                break  # behind a tie the texts differ
    if bound == TIE and found.ties > max(1, found.compared // 1000):
        found.wrong.append(f"{found.ties} ties in {found.compared} tokens")
    return found


def skip_reason(case: Case) -> str | None:
    """Why this machine cannot run a case, or None."""
    missing = backends[case.backend].missing()
    return missing if missing else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases in order until the budget ends."""
    parser = argparse.ArgumentParser(prog="scripts.gpu_correctness", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--budget-s", type=float, default=480.0, help="no case starts after so many seconds")
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("0 passed, 0 failed, 0 skipped: PyTorch sees no CUDA device")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    head = heading("gpu_correctness", f"correctness: {asked.only or 'all cases'}, tiny Llama", arguments)
    began, counts, lines = perf_counter(), {"passed": 0, "failed": 0, "skipped": 0}, []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tiny"
        write_checkpoint(folder)
        name, judge = make_judge(folder)
        print(f"judge: {name}", flush=True)
        for case in cases():
            if asked.only not in case.name:
                continue
            start, why = perf_counter(), skip_reason(case)
            if why is None and start - began > asked.budget_s:
                why = f"the budget of {asked.budget_s:.0f} s is spent"
            said = why or ""
            verdict = "skipped"
            if why is None:
                try:
                    found = run_case(case, folder, judge)
                    verdict = "failed" if found.wrong else "passed"
                    said = f"{found.compared} tokens, {found.ties} ties {'; '.join(found.wrong[:2])}"
                except (AssertionError, ConfigError, RuntimeError, ValueError) as error:
                    verdict, said = "failed", f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            counts[verdict] += 1
            lines.append({"case": case.name, "verdict": verdict, "said": said})
            print(f"{verdict:8}{case.name:36}{perf_counter() - start:6.1f} s  {said}", flush=True)
            if asked.json:
                asked.json.write_text(json.dumps({**head, "judge": name, **counts, "cases": lines}, indent=1) + "\n",
                                      encoding="utf-8")  # fmt: skip
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
