"""Is the engine right on a GPU? `python -m scripts.gpu_correctness [--only TEXT] [--budget-s N] [--json FILE]`.

Tiny random models and SmolLM2 go through the whole engine under every backend, both layouts, graphs on and off and the
main schedules (scripts/gpu_cases.py). Each greedy token is judged by one pass in float32, TF32 off, over the prompt and
our answer: of `transformers` or, without it, of this engine's plain kernels on the CPU, which the CPU suite holds to
transformers. In float32 every token must be equal, but where the judge's two best logits differ by less than 2e-4; in
bfloat16 the first difference must stand where they differ by less than BF16_GAP. Sampled requests must give the same
tokens in graphs and without. Prints a line a case and, last, a plain count; status 1 if a case failed. tests/gpu runs
the same cases. `--device cpu` tries the cases themselves: each backend's stand-in on the CPU runs them.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
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
from engine.core.errors import TesseraError
from engine.core.request import Request, SamplingParams
from engine.exec.local import LocalExecutor
from engine.loading.resolve import has_default_model, resolve_model
from engine.runner.batch import Row, pack
from scripts.benching.environment import heading
from scripts.gpu_cases import POOL_BYTES, SMOLLM2, Case, cases, write_checkpoint

__all__ = ["Case", "Models", "cases", "make_judge", "run_case", "skip_reason", "write_checkpoint"]

TIE = 2e-4  # of float32 logits, as in the CPU suite
# by model, about three standard deviations of the error of a difference of two logits (docs/gpu.md)
BF16_GAP = {"llama": 1.5, SMOLLM2: 1.0}
SMOLLM2_VARIABLE = "TESSERA_SMOLLM2"  # a folder or .gguf file of SmolLM2, where it cannot be fetched


@dataclass
class Found:
    """What a case gave: tokens compared, ties among them, the widest of their gaps, and what was wrong."""

    compared: int = 0
    ties: int = 0
    widest: float = 0.0
    wrong: list[str] = field(default_factory=list)


Judge = Callable[[Sequence[int]], torch.Tensor]


def make_judge(folder: Path, *, plain: bool = False) -> tuple[str, Judge]:
    """Who judges, and token ids to (N, V) float32 logits. plain: this engine, though transformers is here."""
    if not plain and importlib.util.find_spec("transformers") is not None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

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


class Models:
    """Each model's folder and judge, made when first asked for. A judge is asked once about each text."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._made: dict[str, tuple[Path, Judge]] = {}
        self.judged_by = ""

    def of(self, name: str) -> tuple[Path, Judge]:
        """Folder and judge."""
        if name not in self._made:
            folder = self._scratch / name
            if name == SMOLLM2:
                folder = resolve_model(os.environ.get(SMOLLM2_VARIABLE), progress=False)
            else:
                write_checkpoint(folder, name)
            self.judged_by, judge = make_judge(folder)
            texts = functools.cache(judge)
            self._made[name] = (folder, lambda ids: texts(tuple(ids)))
        return self._made[name]


def params_of(number: int, case: Case) -> SamplingParams:
    """Greedy, or every other kind of rule in turn."""
    if not case.sampled:
        return SamplingParams(temperature=0.0, max_tokens=case.load.outputs, ignore_eos=True)
    rules: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 30, "top_p": 0.8}]
    return SamplingParams(temperature=0.8, seed=number, max_tokens=case.load.outputs, ignore_eos=True,
                          **rules[number % 5])  # fmt: skip


def answers(folder: Path, case: Case, device: str, **more: Any) -> list[list[int]]:
    """Every prompt's tokens, all requests at once. more: settings beside the case's. Raises AssertionError when one
    ends otherwise, memory is held, or nothing was preempted where that was the point."""
    settings = {"dtype": "float32", "max_num_seqs": 24, "chunk_tokens": 128, "kv_pool_bytes": POOL_BYTES,
                "max_model_len": 512, **case.settings, **more}  # fmt: skip
    if settings.get("scheduler") in ("vllm", "orca", "faster_transformer") or settings.get("dynamic_chunking"):
        del settings["chunk_tokens"]
    if device == "cpu" and backends[case.backend].caps.device != "any":
        settings["attention_backend"] = "torch_paged" if backends[case.backend].caps.paged else "auto"
    engine = build_engine(EngineConfig(model=str(folder), device=device, **settings))
    assert isinstance(engine.executor, LocalExecutor)
    given: dict[str, list[int]] = {}
    for number, prompt in enumerate(case.prompts()):
        given[str(number)] = []
        engine.add(Request(str(number), tuple(prompt), params_of(number, case), 0.0))
    try:
        while engine.has_work:
            for update in engine.step():
                given[update.request_id] += update.tokens
                assert update.finish_reason in (None, "length"), f"{update.finish_reason}: {update.error}"
        stats = engine.stats()
        held, preempted = stats["kv_groups_in_use"], stats["preempted_total"]
        assert held == 0, f"{held} page groups are still in use"
        assert preempted > 0 or not case.preempts, "nothing was preempted; the case proves nothing"
    finally:
        engine.close()
    return list(given.values())


@torch.inference_mode()
def run_case(case: Case, folder: Path, judge: Judge, device: str = "cuda") -> Found:
    """Run and judge one case."""
    found = Found()
    with torch.inference_mode(False):
        ours = answers(folder, case, device)
    if case.sampled:
        with torch.inference_mode(False):
            theirs = answers(folder, case, device, enforce_eager=True)
        found.compared = sum(map(len, ours))
        differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        found.ties = len(differing)  # a point may fall on a boundary between two tokens within rounding
        found.wrong = [f"requests {differing} differ"] if len(differing) > 1 else []
        return found
    bound = BF16_GAP[case.model] if case.half else TIE
    for prompt, answer in zip(case.prompts(), ours, strict=True):
        if len(answer) != case.load.outputs:
            found.wrong.append(f"prompt of {len(prompt)}: {len(answer)} tokens, not {case.load.outputs}")
        best = judge([*prompt, *answer[:-1]])[len(prompt) - 1 :].topk(2, dim=-1)
        for i, token in enumerate(answer):
            found.compared += 1
            if token != int(best.indices[i, 0]):
                gap = float(best.values[i, 0] - best.values[i, 1])
                found.widest = max(found.widest, gap)
                found.ties += gap < bound
                if gap >= bound:
                    found.wrong.append(f"prompt of {len(prompt)}: output {i} is {token}, not "
                                       f"{int(best.indices[i, 0])}; gap {gap:.4f}")  # fmt: skip
                break  # behind a tie the texts differ
    if not case.half and found.ties > max(1, found.compared // 1000):
        found.wrong.append(f"{found.ties} ties in {found.compared} tokens")
    return found


def skip_reason(case: Case, device: str = "cuda") -> str | None:
    """Why this machine cannot run a case, or None."""
    if case.model == SMOLLM2 and not os.environ.get(SMOLLM2_VARIABLE) and not has_default_model():
        return f"SmolLM2 is not here; {SMOLLM2_VARIABLE} takes a folder or a .gguf file of it"
    return backends[case.backend].missing() if device == "cuda" else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases in order until the budget ends."""
    parser = argparse.ArgumentParser(prog="scripts.gpu_correctness", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--budget-s", type=float, default=480.0, help="no case starts after so many seconds")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("0 passed, 0 failed, 0 skipped: PyTorch sees no CUDA device")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    head = heading("gpu_correctness", f"correctness: {asked.only or 'all cases'}, tiny models", arguments)
    began, counts, lines = perf_counter(), {"passed": 0, "failed": 0, "skipped": 0}, []
    with tempfile.TemporaryDirectory() as scratch:
        models = Models(Path(scratch))
        for case in cases():
            if asked.only not in case.name:
                continue
            start, why = perf_counter(), skip_reason(case, asked.device)
            if why is None and start - began > asked.budget_s:
                why = f"the budget of {asked.budget_s:.0f} s is spent"
            said, line = why or "", {"case": case.name, "verdict": "skipped"}
            if why is None:
                try:
                    found = run_case(case, *models.of(case.model), asked.device)
                    line |= vars(found) | {"verdict": "failed" if found.wrong else "passed"}
                    said = f"{found.compared} tokens, {found.ties} ties {'; '.join(found.wrong[:2])}"
                except (AssertionError, TesseraError, RuntimeError, ValueError) as error:
                    line["verdict"] = "failed"
                    said = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            spent_s = perf_counter() - start
            counts[line["verdict"]] += 1
            lines.append({**line, "said": said, "s": round(spent_s, 2)})
            print(f"{line['verdict']:8}{case.name:42}{spent_s:6.1f} s  {said}", flush=True)
            if asked.json:
                told = {**head, "judge": models.judged_by, **counts, "cases": lines}
                asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(f"judge: {models.judged_by}")
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
