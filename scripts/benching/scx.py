"""scx: output tokens a second of plain and of encoded layers, over lengths of prompt and answer.

A cell of the grid is `--requests` equal requests at once, random prompts of exactly so many tokens. Each round opens
every variant's engine in turn and runs every cell once; the ratio to plain is taken within a round. With --budget-s the
plain engine of the first round decides which cells fit, and all variants run these. What a variant moved to and from
its secure side stands beside the formula.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from engine.core.clock import MonotonicClock
from scripts.benching import drive
from scripts.benching.ceilings import workload_floor_s
from scripts.benching.drive import Run
from scripts.benching.engines import Opened, add_model_flags, opened
from scripts.benching.figures import Figure, Record, Report, columns, finish, shown
from scripts.benching.options import report_of, split_names
from scripts.benching.throughput import record_of
from scripts.benching.workloads import Workload, equal, warm_up

PLAIN = "plain"
GRIDS = {  # prompts, outputs, requests, rounds: as SCX-vLLM's document has it; what a CPU does in minutes; --quick
    "cuda": ("1k,4k,8k,32k", "512,1024,2048,4096", 16, 1),
    "cpu": ("256,1k", "32,128", 4, 3),
    "quick": ("1k,4k,8k,32k", "512", 8, 1),
    "quick cpu": ("256", "32", 4, 1),
}
RESERVE = 0.9  # of the budget: encoded engines are slower than the plain one that decides


@dataclass(slots=True)
class Cell:
    """One workload. runs: of each variant, one a round; plain_ratio: seconds of plain over seconds, each round."""

    workload: Workload
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def plain_ratio(self, variant: str) -> list[float]:
        """Throughput of a variant over plain's of the same round."""
        pairs = zip(self.runs.get(PLAIN, ()), self.runs.get(variant, ()), strict=False)
        return [plain.seconds / run.seconds for plain, run in pairs]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See --help."""
    add_model_flags(parser)
    parser.add_argument("--json", type=Path, default=None, help="also write the report here")
    parser.add_argument("--rounds", type=int, help=f"[cuda {GRIDS['cuda'][3]}, cpu {GRIDS['cpu'][3]}]")
    parser.add_argument("--prompts", help=f"tokens, k = 1,024 [cuda {GRIDS['cuda'][0]}, cpu {GRIDS['cpu'][0]}]")
    parser.add_argument("--outputs", help=f"tokens [cuda {GRIDS['cuda'][1]}, cpu {GRIDS['cpu'][1]}]")
    parser.add_argument("--cells", help="PROMPT+OUTPUT with commas instead of a grid: what --budget-s left out before")
    parser.add_argument("--requests", type=int, help=f"at once [cuda {GRIDS['cuda'][2]}, cpu {GRIDS['cpu'][2]}]")
    parser.add_argument("--variants", default="plain,0,first+last", help="plain, first+last, all, or layers: 0 or 0:27")
    parser.add_argument("--scheme", default="perm", help="of encoded layers [perm]")
    parser.add_argument("--secure-device", default=None, help="cpu, cuda:N or worker [the compute device]")
    parser.add_argument("--page-seal", action="store_true", help="with sealed blocks")
    parser.add_argument("--budget-s", type=float, default=0.0, help="leave out cells and rounds that do not fit [none]")
    parser.add_argument("--quick", action="store_true", help="the shortest outputs, fewer requests, one round")


def lengths(text: str) -> list[int]:
    """`1k,512` to [1024, 512]. Raises ValueError."""
    found = []
    for word in split_names(text.lower()):
        digits = word.removesuffix("k")
        if not digits.isdigit() or not int(digits):
            raise ValueError(f"{word!r} is not a number of tokens (say 512 or 4k)")
        found.append(int(digits) * (1024 if word.endswith("k") else 1))
    return found


def cells_of(text: str) -> list[tuple[int, int]]:
    """`32k+1024,1k+2048` to [(32768, 1024), (1024, 2048)]. Raises ValueError."""
    found = []
    for word in split_names(text):
        sizes = lengths(word.replace("+", ","))
        if len(sizes) != 2:
            raise ValueError(f"{word!r} is not a cell, PROMPT+OUTPUT (say 32k+1024)")
        found.append((sizes[0], sizes[1]))
    return found


def layers_of(variant: str, layers: int) -> str:
    """--scx-layers of a variant; nothing for plain."""
    if variant == PLAIN:
        return ""
    return f"0,{layers - 1}" if variant == "first+last" else variant.replace(":", ",")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Measure the grid. Returns 0."""
    named = [word for word in rest if word.replace("_", "-").startswith("--scx-")]
    if named:
        raise ValueError(f"{named[0]} would be every variant's; use --variants, --scheme, --secure-device, --page-seal")
    device = device_of(rest)
    preset = GRIDS[device if not args.quick else "quick" if device == "cuda" else "quick cpu"]
    requests, rounds = args.requests or preset[2], args.rounds or preset[3]
    if args.cells and (args.prompts or args.outputs):
        raise ValueError("--cells names prompts and outputs; leave out --prompts and --outputs")
    # short answers first, so that a budget leaves every prompt length in
    outputs, prompts = lengths(args.outputs or preset[1]), lengths(args.prompts or preset[0])
    sizes = cells_of(args.cells) if args.cells else [(prompt, output) for output, prompt in product(outputs, prompts)]
    args.positions = max(prompt for prompt, _ in sizes) + max(output for _, output in sizes)
    cells = [Cell(equal(requests, prompt, output)) for prompt, output in sizes]
    variants = split_names(args.variants)
    if variants[:1] != [PLAIN]:
        raise ValueError(f"--variants {args.variants} must begin with plain, which the others are compared with")
    grid = Grid(args, rest, device, cells, MonotonicClock())
    for number in range(rounds):
        if not grid.round(number, variants):
            break
    report = grid.report
    assert report is not None
    report.records += grid.records(variants)
    print("\n" + grid.table(variants))
    finish(report, args.json)
    return 0


def device_of(rest: Sequence[str]) -> str:
    """cuda or cpu: the engine's --device among its flags."""
    for word, after in zip(rest, [*rest[1:], ""], strict=False):
        if word == "--device" or word.startswith("--device="):
            name = after if word == "--device" else word.partition("=")[2]
            return "cuda" if name.startswith("cuda") else "cpu"
    return "cpu"


@dataclass(slots=True)
class Grid:
    """The measurement: cells and what they gave, and the clock that a budget runs on."""

    args: argparse.Namespace
    rest: Sequence[str]
    device: str
    cells: list[Cell]
    clock: MonotonicClock
    report: Report | None = None
    made: dict[tuple[str, str], Record] = field(default_factory=dict)  # by variant and workload, the last round's
    began_s: float = -1.0

    @property
    def left_s(self) -> float:
        """Of the budget."""
        spent_s = self.clock.now_s() - self.began_s
        return self.args.budget_s - spent_s if self.args.budget_s else float("inf")

    def round(self, number: int, variants: Sequence[str]) -> bool:
        """Every variant, every cell once. False when the budget holds no more of it."""
        if number == 0:
            self.began_s = self.clock.now_s()
        start_s, began = self.clock.now_s(), self.left_s
        for variant in variants:
            deciding = number == 0 and variant == PLAIN
            share_s = began * RESERVE / len(variants) if deciding else float("inf")
            self._variant(variant, share_s)
            if self.left_s <= 0:
                print(f"--budget-s {self.args.budget_s:g} is used up", flush=True)
                return False
        return self.left_s > 1.1 * (self.clock.now_s() - start_s)

    def _variant(self, variant: str, share_s: float) -> None:
        """One engine, its cells. share_s: seconds that this may take; cells that would not fit are dropped for all."""
        start_s = self.clock.now_s()
        with opened(self.args, [*self.rest, *self._flags(variant)]) as engine:
            if self.report is None:
                self.report = report_of(self.args, engine)
                self._drop_long(engine)
            keep, last = [], 0.0
            for cell in self.cells:
                floor_s = workload_floor_s(engine.costs, engine.device, cell.workload.items, len(cell.workload.items))
                expected_s = floor_s * last
                spent_s = self.clock.now_s() - start_s
                if spent_s + expected_s > share_s or self.left_s < expected_s:
                    print(f"left out: {cell.workload.name} would take about {expected_s:.0f} s of --budget-s",
                          flush=True)  # fmt: skip
                    continue
                drive.run(engine.loop, warm_up(cell.workload, 1, 4), engine.spec.vocab, seed=1, label="warm-up")
                before = traffic_of(engine)
                took = drive.run(engine.loop, cell.workload, engine.spec.vocab, label=f"{variant} {cell.workload.name}")
                cell.runs.setdefault(variant, []).append(took)
                last = max(last, took.seconds / floor_s)
                record = record_of(cell.workload, cell.runs[variant], engine)
                record.details.update(self._details(variant, engine, before, cell.workload))
                print(f"{cell.workload.name}, {variant}: {took.seconds:.2f} s, "
                      f"{cell.workload.output_tokens / took.seconds:,.1f} output tok/s", flush=True)  # fmt: skip
                self.made[variant, cell.workload.name] = record
                keep.append(cell)
            if share_s < float("inf"):
                self.cells = keep

    def _flags(self, variant: str) -> list[str]:
        """The engine's flags of a variant. --scx-layers is always there, so that no variable of SCX-vLLM counts."""
        if variant == PLAIN:
            return ["--scx-layers", ""]
        assert self.report is not None  # plain came first
        layers = layers_of(variant, self.report.environment["layers"])
        device = self.args.secure_device or ("cuda:0" if self.device == "cuda" else "cpu")
        seal = ["--scx-page-seal"] if self.args.page_seal else []
        return ["--scx-layers", layers, "--scx-scheme", self.args.scheme, "--scx-secure-device", device, *seal]

    def _drop_long(self, engine: Opened) -> None:
        """Leave out what this model is too short for."""
        assert self.report is not None
        self.report.environment["layers"] = engine.spec.layers
        limit = engine.loop.scheduler.length_limit
        for cell in self.cells:
            if cell.workload.longest_tokens > limit:
                print(f"left out: {cell.workload.name} is longer than the {limit} tokens that this engine takes")
        self.cells = [cell for cell in self.cells if cell.workload.longest_tokens <= limit]
        if not self.cells:
            raise ValueError(f"no cell is within the {limit} tokens that this engine takes; use shorter --prompts")

    def _details(
        self, variant: str, engine: Opened, before: tuple[int, int, int], workload: Workload
    ) -> dict[str, Any]:
        """What one run moved, beside the formula; after a preemption it is more, since tokens run again."""
        if variant == PLAIN:
            return {}
        from engine.scx.schemes import row_bytes

        spec, layers = engine.spec, layers_of(variant, engine.spec.layers)
        count = engine.spec.layers if layers == "all" else len(layers.split(","))
        calls, came, went = (now - then for now, then in zip(traffic_of(engine), before, strict=True))
        tokens = workload.prompt_tokens + workload.output_tokens - len(workload.items)  # a last token is never run
        item = 4 if engine.config.dtype == "float32" else 2
        formula = row_bytes(self.args.scheme, spec.heads, spec.kv_heads, spec.head_dim, item)
        return {"layers": layers, "scheme": self.args.scheme, "secure_device": engine.config.scx_secure_device,
                "page_seal": self.args.page_seal, "bytes_to_secure": came, "bytes_from_secure": went,
                "bytes_a_token_and_layer": (came + went) / tokens / count,
                "formula_bytes_a_token_and_layer": sum(formula),
                "round_trips": calls, "round_trips_a_token": calls / tokens}  # fmt: skip

    def records(self, variants: Sequence[str]) -> list[Record]:
        """Of every variant and cell that ran, with the ratio to plain."""
        found = []
        for cell, variant in product(self.cells, variants):
            record = self.made.get((variant, cell.workload.name))
            if record is None:
                continue
            ratios = tuple(cell.plain_ratio(variant))
            figures = record.figures if variant == PLAIN else (*record.figures, Figure("of_plain", "x", ratios, True))
            found.append(Record(cell.workload.name, figures, variant=variant, details=record.details))
        return found

    def table(self, variants: Sequence[str]) -> str:
        """Cells down, variants across: output tokens a second and per cent of plain."""
        rows: list[tuple[str, ...]] = [("prompt", "output", "requests", *(f"{name} [out tok/s]" for name in variants))]
        for cell in self.cells:
            _, prompt, output = cell.workload.items[0]
            words = [f"{prompt:,}", f"{output:,}", str(len(cell.workload.items))]
            for variant in variants:
                runs, ratios = cell.runs.get(variant, []), cell.plain_ratio(variant)
                if not runs:
                    words.append("not run")
                    continue
                rate = shown(statistics.median(cell.workload.output_tokens / run.seconds for run in runs))
                words.append(rate if variant == PLAIN else f"{rate} ({100 * statistics.median(ratios):.1f} %)")
            rows.append(tuple(words))
        return columns(rows)


def traffic_of(engine: Opened) -> tuple[int, int, int]:
    """Calls, bytes in, bytes out of the secure side so far; zeros for a plain engine."""
    executor: Any = engine.loop.executor
    if executor.runner.scx is None:
        return 0, 0, 0
    traffic = executor.runner.scx.scx.secure.traffic
    return traffic.calls, traffic.bytes_in, traffic.bytes_out
