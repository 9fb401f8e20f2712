"""Encoded layers on a GPU, right and at what cost: `python -m scripts.gpu_scx [--parts ...] [--budget-s N] [--json F]`.

Parts, in order: kernels (against float64), layers (scripts.scx_exactness on this device), engine (greedy tokens of a
tiny model judged in float32 as in scripts.gpu_correctness, by scheme, secure device, graphs, seal and segments);
admission (what opening and closing a session takes, every layer of the shape encoded); crossing (what an encode and a
decode by the secure device cpu consist of: copies, calls, the job on more and fewer threads); cost (decodes at batch
64 and a chat workload on random weights of a real shape, one plain engine and in turns with it encoded ones: layers 0
and last and all on this GPU or another, 0 and last with the secure device cpu or a worker, which run decodes only;
bytes and round trips beside the formula of docs/scx.md). The JSON is written after each line, so a cut-off loses
nothing; status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch

from engine.attention.choose import why_not
from engine.build import build_engine, resolve
from engine.core.config import EngineConfig
from engine.core.errors import ConfigError, TesseraError
from engine.core.loop import EngineLoop
from engine.loading.spec import ModelSpec
from engine.scx.config import ScxConfig
from engine.scx.keys import fresh_root
from engine.scx.open import side_of
from engine.scx.schemes import row_bytes
from engine.scx.secure import HeadShape, LocalSecureSide
from scripts import gpu_correctness as correctness
from scripts import scx_exactness
from scripts.benching import drive
from scripts.benching.environment import heading
from scripts.benching.shapes import SHAPES, write_folder
from scripts.benching.workloads import Workload, equal, find

CHECKS = ("kernels", "layers", "engine")
PARTS = (*CHECKS, "admission", "crossing", "cost")
SCHEMES = ("perm", "rotate", "mix", "perm-static")
BATCH, CONTEXT, DECODES = 64, 512, 140
SETTLED = 20  # decode steps at either end that do not count
OPENED = 20  # sessions of the admission part


@dataclass
class Session:
    """What was found so far, and how much time is left."""

    device: str
    ends_s: float
    file: Path | None
    secure: Sequence[str]  # devices, or "worker"
    found: dict[str, Any] = field(default_factory=dict)
    wrong: int = 0

    @property
    def devices(self) -> list[str]:
        """Secure devices of this process."""
        return [one for one in self.secure if one != "worker"]

    def spent(self) -> bool:
        """Whether nothing more may begin."""
        return perf_counter() > self.ends_s

    def keep(self, part: str, line: dict[str, Any]) -> None:
        """Add a line to a part's list and write everything down."""
        self.found.setdefault(part, []).append(line)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def judge(self, part: str, name: str, check: Callable[[], tuple[bool, str]]) -> None:
        """Run a check, print and keep what it says; what it raises is wrong, too."""
        if self.spent():
            self.keep(part, {"case": name, "verdict": "not run", "said": "the time is spent"})
            return
        began = perf_counter()
        try:
            good, said = check()
        except (TesseraError, AssertionError, RuntimeError, ValueError) as error:
            good, said = False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        self.wrong += not good
        self.keep(part, {"case": name, "verdict": "passed" if good else "WRONG", "said": said})
        verdict, taken_s = "passed" if good else "WRONG", perf_counter() - began
        print(f"{verdict:7} {part:8}{name:52}{taken_s:6.1f} s  {said}", flush=True)


# ---------------------------------------------------------------- is it right?


def kernels(session: Session) -> None:
    """Every kernel, both kinds of maps, several head shapes."""
    from scripts.gpu_checks import HEADS, Bench
    from scripts.gpu_scx_kernels import KINDS, check_heads, check_shuffle

    def judge(name: str, dtype: torch.dtype, found: Callable[[Bench], Any]) -> None:
        def check() -> tuple[bool, str]:
            results = list(found(Bench(session.device, dtype)))
            over = [f"{name}: {error:.3g}" for name, error, bound in results if not error <= bound]
            return not over, "; ".join(over[:2]) or f"{max(error for _, error, _ in results):.2g}"

        session.judge("kernels", f"{name} {str(dtype)[6:]}", check)

    for dtype in (torch.bfloat16, torch.float32):
        for kind in KINDS:
            for heads in HEADS if dtype is torch.bfloat16 else HEADS[:2]:
                judge(f"{kind} {heads}", dtype, lambda bench, k=kind, h=heads: check_heads(bench, k, *h))  # type: ignore[misc]
        for size in (16, 100):
            judge(f"blocks of {size}", dtype, lambda bench, size=size: check_shuffle(bench, size))  # type: ignore[misc]


def secure_devices(device: str) -> tuple[str, ...]:
    """What there is: the compute device itself, another one where there is one, the host, a process of its own."""
    if device != "cuda":
        return "cpu", "worker"
    return ("cuda:0", "cuda:1", "cpu", "worker") if torch.cuda.device_count() > 1 else ("cuda:0", "cpu", "worker")


def layers(session: Session) -> None:
    """One encoded layer against the plain one and float64, on hybrid batches and on resumed sequences, by every
    attention backend of slots that runs here."""
    for secure, scheme, dtype in product(session.devices, SCHEMES, scx_exactness.DTYPES):
        known = scx_exactness.BACKENDS[session.device]
        found = [name for name in known if not why_not(name, session.device, dtype, 64)]
        cases = [(name, *work) for name in found for work in (("hybrid", ""), ("preempt and resume", "sealed"))]
        cases += [(found[0], "hybrid", "sealed segments")] if scheme == "mix" else []
        for backend, schedule, extra in cases:
            case = scx_exactness.Case(dtype, scheme, schedule, "mega", backend, extra)

            def check(case: scx_exactness.Case = case, secure: str = secure) -> tuple[bool, str]:
                v = scx_exactness.run_case(case, 64, session.device, secure)
                said = f"distance {v.distance:.2g}, error x{v.ratio:.3f}, {v.same_rows} rows in plaintext"
                return v.passed, said

            session.judge("layers", f"{secure} {case}", check)


def engine_cases(device: str, secure_devices: Sequence[str], worker: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings of the whole engine: schemes with graphs, two without, seal, layouts; some on one secure device only; a
    worker."""
    base = {"attention_backend": "triton_vattn" if device == "cuda" else "torch_vattn", "scx_layers": "all"}
    more: list[tuple[str, dict[str, Any]]] = [
        ("mix sealed", {"scx_scheme": "mix", "scx_page_seal": True, "scx_seal_tokens": 8}),
        ("perm per_layer chunks of 33", {"kv_layout": "per_layer", "chunk_tokens": 33}),
        ("mix one at a time", {"scx_scheme": "mix", "max_num_seqs": 1}),
    ]
    once: list[tuple[str, dict[str, Any]]] = [
        ("perm sealed", {"scx_page_seal": True, "scx_seal_tokens": 16}),
        ("perm segments", {"scx_segment_tokens": 64}),
        ("rotate, layers 0 and 3", {"scx_scheme": "rotate", "scx_layers": "0,3"}),
    ]
    for i, secure in enumerate(secure_devices):
        cases = [(f"{scheme} graphs", {"scx_scheme": scheme, "enforce_eager": device != "cuda"}) for scheme in SCHEMES]
        cases += [(f"{scheme} eager", {"scx_scheme": scheme, "enforce_eager": True}) for scheme in ("perm", "mix")]
        for name, settings in [*cases, *more, *(once if i == 0 else ())]:
            yield f"{secure} {name}", {**base, "scx_secure_device": secure, **settings}
    if worker:  # waited for: in pieces
        base["scx_secure_device"] = "worker"
        yield "worker perm, layers 0 and 3", {**base, "scx_layers": "0,3"}
        yield "worker mix sealed chunks of 33", {**base, **more[0][1], "chunk_tokens": 33}


def engine(session: Session) -> None:
    """Every greedy token against the judge, in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tiny"
        correctness.write_checkpoint(folder)
        name, judge = correctness.make_judge(folder)
        print(f"judge: {name}", flush=True)
        for name, settings in engine_cases(session.device, session.devices, "worker" in session.secure):
            def check(settings: dict[str, Any] = settings, name: str = name) -> tuple[bool, str]:
                found = correctness.run_case(correctness.Case(name, settings), folder, judge, session.device)
                return not found.wrong, f"{found.compared} tokens, {found.ties} ties {'; '.join(found.wrong[:2])}"

            session.judge("engine", name, check)


# ---------------------------------------------------------------- what does it cost?


@dataclass
class Measured:
    """One engine and its runs. decode_ms: of a step of BATCH sequences; chat_tok_s: output tokens a second."""

    name: str
    loop: EngineLoop
    vocab: int
    ready_s: float
    decode_ms: list[float] = field(default_factory=list)
    chat_tok_s: list[float] = field(default_factory=list)
    traffic: dict[str, float] = field(default_factory=dict)

    def run(self, chat: Workload | None, decodes: Workload) -> None:
        """One run of each workload; what crossed is the last one's."""
        done = self._counted(decodes, "decode")
        steps = sorted(done.step_s[-DECODES + SETTLED : -SETTLED])
        self.decode_ms.append(1e3 * statistics.median(steps))
        if chat is not None:
            self.chat_tok_s.append(chat.output_tokens / self._counted(chat, "chat").seconds)

    def _counted(self, workload: Workload, label: str) -> Any:
        secure = self._secure()
        before = (secure.traffic.calls, secure.traffic.bytes_in + secure.traffic.bytes_out) if secure else (0, 0)
        done = drive.run(self.loop, workload, self.vocab, label=label)
        if secure:
            layers, rows = len(secure.config.layers), workload.prompt_tokens + workload.output_tokens
            calls, crossed = secure.traffic.calls - before[0], secure.traffic.bytes_in + secure.traffic.bytes_out
            self.traffic = {"bytes_per_token_layer": (crossed - before[1]) / rows / layers,
                            "round_trips_per_step_layer": calls / done.steps / layers,
                            "round_trips_per_token": calls / rows, "steps": done.steps}  # fmt: skip
        return done

    def _secure(self) -> Any:
        sessions = cast(Any, self.loop.executor).runner.scx
        return sessions.scx.secure if sessions is not None else None


def opened(name: str, folder: Path, device: str, settings: dict[str, Any]) -> tuple[Measured, ModelSpec]:
    """An engine, warm."""
    began = perf_counter()
    config = EngineConfig(model=str(folder), load_format="dummy", device=device, dtype="bfloat16", **settings)
    resolution = resolve(config)
    loop = build_engine(config, resolution=resolution)
    spec = resolution[1]
    drive.run(loop, equal(8, 40, 8), spec.vocab, seed=1, label="warm-up")
    return Measured(name, loop, spec.vocab, perf_counter() - began), spec


def admission(session: Session, asked: argparse.Namespace) -> None:
    """What the step that admits a request waits for: the host's time to open a session, and to close it."""
    shape = SHAPES[asked.shape]
    layers, heads = shape["num_hidden_layers"], shape["num_attention_heads"]
    dim, device = shape.get("head_dim") or shape["hidden_size"] // heads, torch.device(session.device)
    head_shape = HeadShape(heads, shape["num_key_value_heads"], dim, 2, 16)
    torch.set_num_threads(1)  # as engines do
    for secure in session.devices:
        for scheme in ("perm", "rotate", "mix"):
            config = ScxConfig(tuple(range(layers)), secure, scheme)
            make = side_of(config, device, torch.bfloat16) if device.type == "cuda" else LocalSecureSide
            side = make(config, head_shape, torch.zeros(16, 2, dim // 2), fresh_root(), b"", device, torch.bfloat16)
            taken: dict[str, list[float]] = {"draw_ms": [], "open_ms": [], "whole_ms": [], "close_ms": []}
            draw = side.scheme.draw

            def timed_draw(*given: Any, draw: Any = draw, times: list[float] = taken["draw_ms"]) -> None:
                began = perf_counter()
                draw(*given)
                times.append(1e3 * (perf_counter() - began))

            side.scheme.draw = timed_draw  # type: ignore[method-assign,assignment]
            for number in range(OPENED):
                began = perf_counter()
                side.open(0, number.to_bytes(16, "big"))
                taken["open_ms"].append(1e3 * (perf_counter() - began))
                if device.type == "cuda":
                    torch.cuda.synchronize()
                taken["whole_ms"].append(1e3 * (perf_counter() - began))
                began = perf_counter()
                side.close(0)
                taken["close_ms"].append(1e3 * (perf_counter() - began))
            side.shut()
            line = {name: statistics.median(times) for name, times in taken.items()}
            session.keep("admission", {"secure_device": secure, "scheme": scheme, "layers": layers, **line})
            print(f"admission {secure:6} {scheme:7} {layers} layers: open {line['open_ms']:.2f} ms on the host "
                  f"({line['draw_ms']:.2f} to draw), {line['whole_ms']:.2f} until the maps are there, "
                  f"close {line['close_ms']:.2f}", flush=True)


def crossing(session: Session, asked: argparse.Namespace) -> None:
    """Where the time of a round trip through the host goes."""
    if session.device != "cuda":
        print("crossing: a CPU has nothing to cross", flush=True)
        return
    from scripts.gpu_scx_crossing import measure

    for line in measure(SHAPES[asked.shape], asked.batch):
        session.keep("crossing", line)
        print(f"crossing {line['what']:58}{line['us']:9.1f} us", flush=True)


def cost(session: Session, asked: argparse.Namespace) -> None:
    """A plain engine beside encoded ones, in turns."""
    with tempfile.TemporaryDirectory(prefix="tessera-scx-") as scratch:
        folder = write_folder(asked.shape, Path(scratch, asked.shape))
        common = {"max_num_seqs": asked.max_num_seqs, "kv_pool_bytes": asked.pool_gib << 30}
        outer = f"0,{SHAPES[asked.shape]['num_hidden_layers'] - 1}"
        decodes = equal(asked.batch, asked.context, DECODES)
        chat = find("offline_chat", requests=asked.requests)
        plain, _ = opened("plain", folder, session.device, common)
        print(f"cost: plain engine ready after {plain.ready_s:.0f} s", flush=True)
        cases = []
        for secure in session.secure:
            fast = secure.startswith(session.device)  # all layers and chats, too
            cases += [(secure, layers, fast) for layers in (outer, "all")[: 1 + fast]]
        for secure, layers, chats in cases:
            workload = ", ".join(one.name for one in ((chat, decodes) if chats and not asked.no_chat else (decodes,)))
            head = {"workload": f"{asked.shape}: {workload}", "scheme": asked.scheme, "secure_device": secure,
                    "layers": layers}  # fmt: skip
            if session.spent():
                session.keep("cost", {**head, "verdict": "not run"})
                continue
            try:
                settings = {"scx_layers": layers, "scx_secure_device": secure, "scx_scheme": asked.scheme,
                            "enforce_eager": asked.eager}  # fmt: skip
                encoded, spec = opened(layers, folder, session.device, {**common, **settings})
                first = {name: len(getattr(plain, name)) for name in ("decode_ms", "chat_tok_s")}
                for round_ in range(asked.rounds):
                    if round_ and session.spent():
                        break
                    for one in (plain, encoded) if round_ % 2 == 0 else (encoded, plain):
                        one.run(chat if chats and not asked.no_chat else None, decodes)
                line = compared(encoded, plain, first)
                line["formula_bytes_per_token_layer"] = sum(
                    row_bytes(asked.scheme, spec.heads, spec.kv_heads, spec.head_dim, 2))  # fmt: skip
                encoded.loop.close()
                del encoded
            except (TesseraError, RuntimeError, ValueError, drive.NotProduced) as error:
                session.wrong += 1
                line = {"verdict": f"{type(error).__name__}: {str(error)[:300]}"}
            gc.collect()
            if session.device == "cuda":
                torch.cuda.empty_cache()
            session.keep("cost", {**head, **line})
            show({**head, **line})
        plain.loop.close()
    gc.collect()


def compared(encoded: Measured, plain: Measured, first: dict[str, int]) -> dict[str, Any]:
    """A line of the table. first: where plain's runs of this comparison begin, by list."""
    line: dict[str, Any] = {"ready_s": encoded.ready_s}
    for name in ("decode_ms", "chat_tok_s"):
        theirs, base = getattr(encoded, name), getattr(plain, name)[first[name] :]
        if theirs and base:
            mine, other = statistics.median(theirs), statistics.median(base)
            # off: how much of the plain throughput is gone
            off = 1 - other / mine if name == "decode_ms" else 1 - mine / other
            line |= {name: theirs, f"plain_{name}": base, f"{name}_off_percent": 100 * off}
    return {**line, **encoded.traffic}


def show(line: dict[str, Any]) -> None:
    """One line of the table."""
    said = f"cost {line['secure_device']:6} layers {line['layers']:5}"
    if "verdict" in line:
        print(said, line["verdict"], flush=True)
        return
    said += f" ready {line['ready_s']:.0f} s"
    for name, unit in (("decode_ms", "ms a step"), ("chat_tok_s", "tok/s chat")):
        if name in line:
            mine, other = statistics.median(line[name]), statistics.median(line[f"plain_{name}"])
            said += f"  {mine:9.2f} {unit} (plain {other:.2f}, {line[f'{name}_off_percent']:+.1f} % off)"
    if "bytes_per_token_layer" in line:
        said += (f"  {line['bytes_per_token_layer']:.0f} B a token and layer (formula "
                 f"{line['formula_bytes_per_token_layer']}), {line['round_trips_per_step_layer']:.2f} round trips a "
                 f"step and layer, {line['round_trips_per_token']:.3f} a token")  # fmt: skip
    print(said, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for. Exit status 1 when something was wrong."""
    parser = argparse.ArgumentParser(prog="scripts.gpu_scx", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--budget-s", type=float, default=290.0, help="nothing begins after so many seconds [290]")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--shape", default="llama3-8b", choices=tuple(SHAPES))
    parser.add_argument("--scheme", default="perm", choices=SCHEMES, help="of the cost part [perm]")
    parser.add_argument("--requests", type=int, default=300, help="of the chat workload [300]")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"sequences of the decode workload [{BATCH}]")
    parser.add_argument("--context", type=int, default=CONTEXT, help=f"their prompt tokens [{CONTEXT}]")
    parser.add_argument("--rounds", type=int, default=2, help="of each pair of engines [2]")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--pool-gib", type=int, default=24)
    parser.add_argument("--secure", nargs="+", choices=("cuda:0", "cuda:1", "cpu", "worker"),
                        help="secure devices [all that are here]")
    parser.add_argument("--eager", action="store_true", help="encoded engines of the cost part record no graphs")
    parser.add_argument("--no-bell", action="store_true",
                        help="secure device cpu: jobs are host functions of the driver, not a waiting thread's")
    parser.add_argument("--no-chat", action="store_true", help="decodes only")
    asked = parser.parse_args(arguments)
    chosen = asked.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device")
    logging.getLogger("engine").setLevel(logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = False
    if asked.no_bell:
        from engine.scx.on_host import HostSecureSide

        HostSecureSide.by_bell = False
    head = heading("gpu_scx", f"scx: {asked.parts}", arguments)
    session = Session(asked.device, perf_counter() + asked.budget_s, asked.json,
                      asked.secure or secure_devices(asked.device), head)  # fmt: skip
    checks = {"kernels": kernels, "layers": layers, "engine": engine}
    costs = {"admission": admission, "crossing": crossing, "cost": cost}
    for part in chosen:
        began = perf_counter()
        try:
            if part in checks:
                checks[part](session)
            else:
                costs[part](session, asked)
        except (ConfigError, ImportError, RuntimeError, ValueError) as error:
            session.wrong += 1
            session.keep(part, {"verdict": f"{type(error).__name__}: {str(error)[:300]}"})
            print(f"WRONG  {part}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        print(f"== {part}: {perf_counter() - began:.0f} s", flush=True)
    print(f"{session.wrong} wrong", flush=True)
    return int(session.wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
