"""The benchmarks run, on a tiny shape: every command, in process and over HTTP; and they refuse to report fiction."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import engine
from engine.attention.base import backends
from engine.core.loop import EngineLoop
from engine.serve.cli import dispatch
from scripts import bench
from scripts.benching import attention, drive, engines, http_client, mapping, serve, startup
from scripts.benching.ceilings import Device
from scripts.benching.drive import NotProduced
from scripts.benching.workloads import Item, Workload, find
from tests.core.fakes import VOCAB, FakeExecutor, make_loop, make_scheduler
from vattention_ext import KvAllocator, KvGeometry

TINY = ["--shape", "tiny", "--dtype", "float32", "--max-num-seqs", "8", "--kv-pool-bytes", "64MiB", "--kv-page-bytes",
        "65536"]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings are not measured here, and the test process keeps its collector."""
    for module in (engines, attention, serve):
        monkeypatch.setattr(module, "measure_device", lambda kind, dtype: Device(kind, 1e10, 1e11))
    monkeypatch.setattr(engines, "settle_heap", lambda: None)


def figures_of(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    """The records of a run that ends well."""
    assert bench.main([*argv]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["command"] == argv[0] and found["environment"]["command_line"].startswith("python -m scripts.bench ")
    records: list[dict[str, Any]] = found["records"]
    assert all(record["workload"] and record["figures"] for record in records)
    return records


def medians(record: dict[str, Any]) -> dict[str, float]:
    """Figure -> median."""
    return {figure["name"]: figure["median"] for figure in record["figures"]}


def test_throughput_and_latency(capsys: pytest.CaptureFixture[str]) -> None:
    """Two workloads in one engine; every figure has runs and a ceiling above it."""
    first, second = figures_of(capsys, "throughput", *TINY, "--workload", "4x16+8,offline_chat", "--requests", "3",
                               "--shrink", "8", "--runs", "2")  # fmt: skip
    assert (first["workload"], second["workload"]) == ("4x16+8[:3]/8", "offline_chat[:3]/8")
    assert first["details"]["output_tokens"] == 3 and first["details"]["distinct_tokens"][0] >= 1
    for figure in first["figures"] + second["figures"]:
        assert len(figure["runs"]) == 2 and 0 < figure["of_ceiling"] < 1
    (alone,) = figures_of(capsys, "latency", *TINY, "--workload", "1x16+8", "--runs", "2")
    found = medians(alone)
    assert 0 < found["tbt_p50"] <= found["tbt_p99"] <= found["tbt_max"] and found["ttft"] > 0


def test_serve_in_process_and_over_http_count_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    """The client sees the tokens come, in real time; how many there were, the server says."""
    asked = ["--rate", "20", "--seconds", "0.5", "--shrink", "32", "--runs", "1"]
    (inside,) = figures_of(capsys, "serve", *TINY, *asked)
    (outside,) = figures_of(capsys, "serve", "--http", *TINY, *asked)
    assert (inside["variant"], outside["variant"]) == ("in process", "http")
    assert inside["details"]["output_tokens"] == outside["details"]["output_tokens"] == inside["details"]["events"][0]
    events, tokens = outside["details"]["events"][0], outside["details"]["output_tokens"]
    assert outside["details"]["requests"] < events <= tokens  # fewer where this machine is busy: the server joins them
    for record in (inside, outside):
        found = medians(record)
        assert 0 < found["ttft_p50"] <= found["ttft_p99"] <= found["ttft_max"]
        assert record["details"]["latest_ms_and_prompt_tokens"][0][0][0] == round(found["ttft_max"])
        assert 0 < found["tbt_p50"] <= found["tbt_max"]
        assert found["out_tok_s"] > 0


def test_attention_and_mapping(capsys: pytest.CaptureFixture[str]) -> None:
    """Twins in both layouts, work by work and over all; a page's verbs; stalls with and without looking ahead."""
    rows = figures_of(capsys, "attention", "--shape", "tiny", "--dtype", "float32", "--layers", "2", "--runs", "2",
                      "--work", "decode:2x64,chunk:8@64", "--backends", "torch_vattn,torch_paged")  # fmt: skip
    works, layouts = ("decode:2x64", "chunk:8@64"), ("mega", "per_layer")
    kept = {(row["workload"], row["variant"], row["figures"][0]["name"]): row["figures"][0]["runs"] for row in rows}
    assert list(kept) == [
        *((work, f"{name} {layout}", "time") for layout in layouts for work in works for name in attention.JUDGES),
        *((work, f"torch_vattn {layout}", "vattn / paged") for layout in layouts for work in works),
        *(("geometric mean", f"torch_vattn {layout}", "vattn / paged") for layout in layouts)]
    for layout in layouts:
        slabs, blocks = ([kept[work, f"{name} {layout}", "time"] for work in works] for name in attention.JUDGES)
        ratios = [[b / a for a, b in zip(*pair, strict=True)] for pair in zip(slabs, blocks, strict=True)]
        assert [kept[work, f"torch_vattn {layout}", "vattn / paged"] for work in works] == ratios
        assert kept["geometric mean", f"torch_vattn {layout}", "vattn / paged"] == pytest.approx(
            [(one * other) ** 0.5 for one, other in zip(*ratios, strict=True)])
    rows = figures_of(capsys, "mapping", *TINY, "--pages", "8", "--workload", "4x100+4", "--chunk-size", "64")
    assert rows[0]["variant"] == "memfd" and medians(rows[0])["create"] > 0
    assert [row["variant"] for row in rows[1:]] == [
        f"{kind}, look-ahead {ahead}" for ahead in ("on", "off") for kind in mapping.KINDS]
    assert all(0 <= medians(row)["stall_p50"] <= medians(row)["stall_max"] for row in rows[1:])


@pytest.mark.parametrize("layout", ["mega", "per_layer"])
def test_blocks_hold_the_same_work_as_slabs(layout: str) -> None:
    """Keys and values copied from slabs into the shuffled blocks give the slabs' answer."""
    parser = argparse.ArgumentParser()
    attention.add_flags(parser)
    args = parser.parse_args(["--shape", "tiny", "--dtype", "float32", "--layers", "2", "--block-tokens", "16"])
    spec, work = attention._spec(args), attention.parse_work("decode:3x300")
    with attention.slabs(spec, args, work, layout) as (slots, batch, q), \
            attention.blocks(spec, args, work, layout, 1) as (paged, placed, _):
        assert placed.paged is not None and placed.paged.block_tokens < 300  # a sequence has several
        assert sorted(set(paged.host_table.flatten())) == list(range(paged.host_table.size))
        k, v = slots.layer_views(1)
        theirs = paged.layer_views(1)
        for slot, row in zip(batch.slots.tolist(), placed.slots.tolist(), strict=True):
            for number, block in enumerate(paged.host_table[row].tolist()):
                first = number * paged.block_tokens
                count = min(paged.block_tokens, work.kv_len - first)
                for ours, view in zip((k, v), theirs, strict=True):
                    view[block, :count] = ours[slot, first : first + count]
        want = backends["torch_vattn"](spec).attend(q, k, v, batch)
        found = backends["torch_paged"](spec).attend(q, *theirs, placed)
        assert torch.equal(found, want)


@pytest.mark.parametrize(("least", "token_bytes", "multiple", "tokens"),
                         [(32, 65536, 1, 32), (32, 16384, 256, 256), (1, 64, 1, 64), (65, 64, 1, 128),
                          (16, 96, 1, 128), (3, 4096, 1, 3)])  # fmt: skip
def test_blocks_are_whole_pages(least: int, token_bytes: int, multiple: int, tokens: int) -> None:
    """The smallest size from `least` on that backend and geometry take."""
    assert attention.block_tokens(least, token_bytes, multiple) == tokens


def test_a_verb_is_counted_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call may map many pages; its time is all of theirs."""
    geometry, kept = KvGeometry(2, 2, 16, 4, 4096, 2, page_bytes=65536), []

    class Watched(KvAllocator):
        def stats(self) -> Any:
            kept.append(super().stats())
            return kept[-1]

    monkeypatch.setattr(mapping, "KvAllocator", Watched)
    opened: Any = SimpleNamespace(config=SimpleNamespace(kv_driver="memfd"), device=Device("cpu", 1e10, 1e11))
    record = mapping.verbs(geometry, opened, 16, 1)
    (stats,), pages = kept, record.details["pages"]
    assert pages == 16 and any(0 < stats.driver_calls[name] < pages for name in mapping.VERBS)
    for figure in record.figures[1:]:
        assert figure.unit == "us/page" and figure.runs == (stats.driver_time_us[figure.name] / pages,)


@pytest.mark.slow
def test_startup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that is really started, twice: a warm-up and one that counts."""
    monkeypatch.setattr(startup, "import_s", lambda module: 0.1)
    (record,) = figures_of(capsys, "startup", *TINY, "--runs", "1")
    assert medians(record)["ready"] > 0.1 and record["details"]["read_weights_s"] >= 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["throughput", *TINY, "--workload", "1x2000+1"], "--max-model-len"),
     (["throughput", *TINY, "--model", "x"], "give one"),
     (["throughput", "--workload", "none"], "known"),
     (["throughput", "--runs", "0"], "at least 1"),
     (["throughput", *TINY, "--chunk-sise", "3"], "unknown"),
     (["latency", *TINY, "--workload", "2x3+4"], "one at a time"),
     (["serve", "--url", "http://127.0.0.1:1", "--http"], "--url names a server"),
     (["serve", "--url", "http://127.0.0.1:1", "--seconds", "1"], "127.0.0.1:1"),
     (["attention", "--backends", "cpu_vatn"], "cpu_vattn"),
     (["startup", "--shape", "tiny", "--chunk-size", "0"], "not ready")],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 2 and the reason."""
    monkeypatch.setattr(startup, "import_s", lambda module: 0.1)
    assert bench.main(argv) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


def test_the_console_command_finds_the_checkout(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`tessera bench` runs them from a checkout, and from a wheel says where they are."""
    assert dispatch(["bench", "--help"]) == 0 and "throughput" in capfd.readouterr().out
    monkeypatch.setattr(engine, "__file__", str(tmp_path / "engine" / "__init__.py"))
    assert dispatch(["bench", "throughput"]) == 2 and "needs a checkout" in capfd.readouterr().err


class TestDrive:
    """Real time on a fake executor: times count from arrivals, and only whole answers count."""

    def test_times_count_from_the_arrival(self) -> None:
        """A request that arrives later is added later; its TTFT does not include the wait for it."""
        loop, _ = make_loop(make_scheduler(groups=200))
        workload = Workload("late", (Item(0.0, 5, 6), Item(0.3, 5, 3)))
        found = drive.run(loop, workload, VOCAB)
        first, second = found.timelines
        assert first.token_s[-1] < 0.3 <= second.token_s[0] and 0 < second.ttft_s < 0.3
        assert (first.num_tokens, second.num_tokens) == (6, 3) and found.steps >= 9 and found.seconds >= 0.3
        assert found.distinct_tokens > 3 and found.preempted == 0 and len(found.step_s) >= 9

    def test_a_failure_is_no_figure(self) -> None:
        """One request that ends with an error ends the benchmark."""
        loop, _ = make_loop(make_scheduler(), fail=1.0)
        with pytest.raises(NotProduced, match="error"):
            drive.run(loop, find("2x5+7"), VOCAB)

    def test_too_few_tokens_are_no_figure(self) -> None:
        """The model's length ends an answer early."""
        loop = EngineLoop(make_scheduler(max_model_len=20), FakeExecutor(8))
        with pytest.raises(NotProduced, match="made 15 tokens of 17"):
            drive.run(loop, find("2x5+17"), VOCAB)


def event(text: str, **more: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps({"choices": [{"text": text}], **more}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("body", "error"),
    [(event("a") + event("") + event("b", usage={"completion_tokens": 2}) + b"data: [DONE]\n\n", None),
     (event("a") + event("b", usage={"completion_tokens": 2}), r"without \[DONE\]"),
     (event("a", usage={"completion_tokens": 1}) + b"data: [DONE]\n\n", "made 1 tokens of 2 in 1 events"),
     (b'data: {"error": {"message": "the engine ended"}}\n\n', "the engine ended")],
)  # fmt: skip
@pytest.mark.parametrize("cut", [7, 1000])
def test_the_client_reads_chunks_wherever_they_are_cut(body: bytes, error: str | None, cut: int) -> None:
    """Events are lines, not chunks; one without text is no token; a stream that is not whole is an error."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(body), cut):
            part = body[start : start + cut]
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def ask() -> list[Any]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return list(await http_client.run(f"http://127.0.0.1:{port}", "m", find("1x3+2"), [[1, 2, 3]]))

    if error is None:
        (found,) = asyncio.run(ask())
        assert found.num_tokens == 2 and len(found.token_s) == 2 and found.ttft_s > 0
    else:
        with pytest.raises(ExceptionGroup) as group:
            asyncio.run(ask())
        assert group.group_contains(NotProduced, match=error)
