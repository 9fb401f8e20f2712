"""serve: requests that arrive over time: TTFT, TBT, tokens a second and goodput, in this process or over HTTP.

In this process a token's time is when it leaves the engine's loop. With --http the server is started beside us, with
--url it is there already; then a time is when the client has read the event, and an event may hold several tokens
(details.events says how many there were). Floors: the prompt alone, a step of one decode.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from scripts.benching import drive, http_client
from scripts.benching.ceilings import Costs, Device, costs_of, decode_floor_s, measure_device, prefill_floor_s
from scripts.benching.ceilings import request_floor_s as alone_s
from scripts.benching.engines import DEFAULTS, add_model_flags, model_flags, opened
from scripts.benching.figures import Figure, Record, finish
from scripts.benching.metrics import Bounds, Timeline, goodput, latency, output_tok_s, quantile
from scripts.benching.options import add_run_flags, add_workload_flags, report_of, workloads_of
from scripts.benching.server import Server
from scripts.benching.workloads import Workload, random_prompts, warm_up

LATEST = 5  # first tokens that a record names with their prompts


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See --help."""
    add_model_flags(parser)
    add_workload_flags(parser, "online_mixed", online=True)
    add_run_flags(parser, 3)
    parser.add_argument("--http", action="store_true", help="start the server and stream from it")
    parser.add_argument("--url", default=None, help="stream from the server at this address, say http://127.0.0.1:8000")
    parser.add_argument("--vocab", type=int, default=32000, help="with --url: prompt ids are below this [32000]")
    parser.add_argument("--ttft-bound", type=float, default=1.0, help="goodput: seconds to the first token [1.0]")
    parser.add_argument("--tbt-bound", type=float, default=0.05, help="goodput: a request's p99 TBT, seconds [0.05]")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Measure every workload named. Returns 0."""
    if args.url and (args.http or args.model or args.shape or rest):
        raise ValueError("--url names a server that runs already; --http, a model and the engine's flags belong to one "
                         "that is started here")  # fmt: skip
    workloads = workloads_of(args)
    bounds = Bounds(args.ttft_bound, args.tbt_bound)
    if args.http or args.url:
        return _over_http(args, rest, workloads, bounds)
    with opened(args, rest) as engine:
        report = report_of(args, engine)
        for workload in workloads:
            engine.check_fits(workload)
        for workload in workloads:
            runs = drive.repeat(engine.loop, workload, engine.spec.vocab, args.runs)
            timelines = [one.timelines for one in runs]
            report.records.append(record_of(workload, timelines, bounds, "in process", (engine.costs, engine.device)))
    finish(report, args.json)
    return 0


def _over_http(
    args: argparse.Namespace, rest: Sequence[str], workloads: Sequence[Workload], bounds: Bounds
) -> int:
    with _served(args, rest) as (base, vocab, limits):
        report = report_of(args)
        model = http_client.first_model(base)
        report.environment |= {"model": model, "flags": list(rest)}
        report.ceilings = {} if limits is None else {"bytes_s": limits[1].bytes_s,
                                                     "product_flop_s": limits[1].product_flop_s}  # fmt: skip
        for workload in workloads:
            warm = warm_up(workload)
            asyncio.run(_whole(base, model, warm, random_prompts(warm, vocab, seed=1)))
            runs = []
            for number in range(args.runs):
                runs.append(asyncio.run(_whole(base, model, workload, random_prompts(workload, vocab))))
                print(f"{workload.name} over HTTP, run {number + 1}: {output_tok_s(runs[-1]):,.1f} output tok/s",
                      flush=True)  # fmt: skip
            report.records.append(record_of(workload, runs, bounds, "http", limits))
    finish(report, args.json)
    return 0


async def _whole(base: str, model: str, workload: Workload, prompts: list[list[int]]) -> list[Timeline]:
    """http_client.run; of several requests that failed, the first one's error."""
    try:
        return await http_client.run(base, model, workload, prompts)
    except ExceptionGroup as group:
        first = group.exceptions[0]
        raise first if isinstance(first, drive.NotProduced) else drive.NotProduced(f"{base}: {first!r}") from None


@contextlib.contextmanager
def _served(
    args: argparse.Namespace, rest: Sequence[str]
) -> Iterator[tuple[str, int, tuple[Costs, Device] | None]]:
    """(address, vocabulary, costs and device where they are known)."""
    if args.url:
        yield args.url.rstrip("/"), args.vocab, None
        return
    import torch

    from engine.build import resolve
    from engine.serve.flags import parse

    with model_flags(args) as (_, flags):
        flags = [*flags, *DEFAULTS, *rest]
        config, spec, _ = resolve(parse(flags, "scripts.bench").engine)
        device = measure_device(config.device, config.dtype)
        with Server(flags) as server:
            yield server.base, spec.vocab, (costs_of(spec, getattr(torch, config.dtype).itemsize), device)


def record_of(
    workload: Workload,
    runs: Sequence[Sequence[Timeline]],
    bounds: Bounds,
    variant: str,
    limits: tuple[Costs, Device] | None,
) -> Record:
    """Percentiles in milliseconds, rates, and their floors and ceilings where the model's costs are known."""
    found = [latency(timelines) for timelines in runs]
    floors = _floors(workload, *limits) if limits is not None else {}
    figures = []
    for name in ("ttft_p50", "ttft_p99", "ttft_max", "tbt_p50", "tbt_p99", "tbt_max"):
        values = tuple(1e3 * getattr(one, f"{name}_s") for one in found)
        figures.append(Figure(name, "ms", values, False, floors.get(name)))
    rates = tuple(output_tok_s(timelines) for timelines in runs)
    figures.append(Figure("out_tok_s", "tok/s", rates, True, floors.get("out_tok_s")))
    goods = tuple(goodput(timelines, bounds) for timelines in runs)
    figures.append(Figure("goodput", "req/s", goods, True, floors.get("goodput")))
    latest = [sorted(timelines, key=lambda one: -one.ttft_s)[:LATEST] for timelines in runs]
    details = {
        "requests": len(workload.items), "output_tokens": workload.output_tokens, "bounds_s": bounds._asdict(),
        "events": [sum(len(t.token_s) for t in timelines) for timelines in runs],
        "latest_ms_and_prompt_tokens": [[(round(1e3 * t.ttft_s), t.prompt_tokens) for t in some] for some in latest],
    }  # fmt: skip
    return Record(workload.name, tuple(figures), variant, details)


def _floors(workload: Workload, costs: Costs, device: Device) -> dict[str, float]:
    """What arrivals and machine allow. ttft: prompts alone; tbt: one decode; rates: nobody ends before it could."""
    prompts = [prefill_floor_s(costs, device, item.prompt_tokens) for item in workload.items]
    contexts = sorted(item.prompt_tokens + item.output_tokens / 2 for item in workload.items)
    tbt_ms = 1e3 * decode_floor_s(costs, device, 1, contexts[len(contexts) // 2])
    end_s = max(item.arrival_s + alone_s(costs, device, item) for item in workload.items)
    span_s = end_s - workload.items[0].arrival_s
    return {
        "ttft_p50": 1e3 * quantile(prompts, 0.5), "ttft_p99": 1e3 * quantile(prompts, 0.99),
        "ttft_max": 1e3 * max(prompts),
        "tbt_p50": tbt_ms, "tbt_p99": tbt_ms, "tbt_max": tbt_ms,
        "out_tok_s": workload.output_tokens / span_s, "goodput": len(workload.items) / span_s,
    }  # fmt: skip
