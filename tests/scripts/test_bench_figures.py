"""The arithmetic of the benchmarks, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from engine.loading.spec import read_config
from scripts import bench, draw_online
from scripts.benching import attention, ceilings, compare, figures, metrics, shapes
from scripts.benching.figures import Figure, Record, Report
from scripts.benching.workloads import Item, find

H200 = ceilings.Device("H200", 4.24e12, 790e12)  # as measured for the published ceilings


def timeline(arrival_s: float, token_s: list[float], prompt: int = 10) -> metrics.Timeline:
    """A request that was served so."""
    return metrics.Timeline(arrival_s, prompt, token_s, len(token_s))


class TestMetrics:
    """TTFT from arrival; TBT over all pairs of all requests; rates over first arrival to last token."""

    two = (timeline(0.0, [1.0, 1.1, 1.3]), timeline(2.0, [2.5, 3.0], prompt=5))

    def test_latency(self) -> None:
        """TTFTs 1.0 and 0.5; gaps 0.1, 0.2, 0.5."""
        found = metrics.latency(self.two)
        assert found.ttft_p50_s == pytest.approx(0.75) and found.ttft_p99_s == pytest.approx(0.995)
        assert found.tbt_p50_s == pytest.approx(0.2) and found.tbt_p99_s == pytest.approx(0.494)
        assert found.tbt_max_s == pytest.approx(0.5) and found.ttft_max_s == 1.0

    def test_rates(self) -> None:
        """5 outputs and 15 prompt tokens in 3 seconds."""
        assert metrics.output_tok_s(self.two) == pytest.approx(5 / 3)
        assert metrics.total_tok_s(self.two) == pytest.approx(20 / 3)

    @pytest.mark.parametrize(
        ("ttft_s", "tbt_s", "good"), [(1.0, 0.5, 2), (0.9, 0.5, 1), (1.0, 0.3, 1), (0.4, 1.0, 0), (1.0, 0.19, 0)]
    )
    def test_goodput_counts_requests_that_keep_both_bounds(self, ttft_s: float, tbt_s: float, good: int) -> None:
        """The first has p99 TBT 0.199, the second 0.5."""
        assert metrics.goodput(self.two, metrics.Bounds(ttft_s, tbt_s)) == pytest.approx(good / 3)

    def test_one_token_has_no_gap(self) -> None:
        """And is good by its TTFT alone."""
        alone = [timeline(0.0, [0.5])]
        assert metrics.latency(alone)[3:] == (0, 0, 0)
        assert metrics.goodput(alone, metrics.Bounds(0.5, 0.0)) == pytest.approx(2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ceilings.Costs:
    """Llama-3-8B in bf16."""
    return ceilings.costs_of(read_config(shapes.write_folder("llama3-8b", tmp_path_factory.mktemp("shape"))), 2)


class TestCeilings:
    """Bytes over bandwidth, operations over rate; the published floors of Llama-3-8B on an H200 come out."""

    def test_costs(self, llama: ceilings.Costs) -> None:
        """13.96 GB of layers and 1.05 GB of head, 128 KiB of KV a token, 15.0 GFLOP a sampled token."""
        assert llama.weight_bytes == pytest.approx(13.96e9 + 1.05e9, rel=1e-3)
        assert llama.kv_bytes == 128 << 10
        assert llama.layer_flops + llama.head_flops == pytest.approx(15.0e9, rel=2e-3)
        assert llama.pair_flops == 4 * 32 * 32 * 128

    def test_a_type_without_instructions_is_multiplied_as_float32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a CPU; a GPU's rate is that of its own type."""
        rates = {torch.float32: 60e9, torch.bfloat16: 5e9}
        monkeypatch.setattr(ceilings, "_product_flop_s", lambda kind, dtype: rates[dtype])
        monkeypatch.setattr(ceilings, "_bytes_s", lambda kind: 1e10)
        assert ceilings.measure_device("cpu", "bfloat16").product_flop_s == 60e9
        rates[torch.bfloat16] = 90e9
        assert ceilings.measure_device("cpu", "bfloat16").product_flop_s == 90e9

    def test_a_decode_step_is_bound_by_bytes(self, llama: ceilings.Costs) -> None:
        """3.54 ms, 282 steps a second; each sequence's cache on top."""
        assert ceilings.decode_floor_s(llama, H200, 1, 0) == pytest.approx(3.54e-3, rel=2e-3)
        more = ceilings.decode_floor_s(llama, H200, 64, 2048) - ceilings.decode_floor_s(llama, H200, 64, 0)
        assert more == pytest.approx(64 * 2048 * (128 << 10) / 4.24e12)

    def test_a_long_prompt_is_bound_by_operations(self, llama: ceilings.Costs) -> None:
        """8,192 tokens: products and half a square of attention; a short one still reads the weights."""
        products = 8192 * llama.layer_flops + llama.head_flops
        attention_flops = 8192 * 8193 / 2 * llama.pair_flops
        assert ceilings.prefill_floor_s(llama, H200, 8192) == pytest.approx((products + attention_flops) / 790e12)
        assert ceilings.prefill_floor_s(llama, H200, 1) > llama.weight_bytes / 4.24e12

    def test_a_workload_takes_as_many_steps_as_its_longest_answer(self) -> None:
        """By hand: weights 100 B, 1 FLOP a token; bandwidth 10 B/s, rate 1 FLOP/s; a cached token 1 B."""
        costs = ceilings.Costs(100, 1, 0, 1, 0)
        device = ceilings.Device("by hand", 10, 1)
        items = [Item(0.0, 3, 2), Item(0.0, 1, 4)]
        # 4 steps of 100 B against 8 tokens run: 40 s; cache: 3 + 1 and 3 * 1 + 6 decoded, 3 + 1 prefilled: 1.7 s
        assert ceilings.workload_floor_s(costs, device, items, 8) == pytest.approx(40 + (4 + 9 + 4) / 10)
        # one at a time: 6 outputs are 6 steps
        assert ceilings.workload_floor_s(costs, device, items, 1) == pytest.approx(60 + 1.7)

    def test_no_request_ends_before_it_could_alone(self, llama: ceilings.Costs) -> None:
        """A lone stream cannot hide its prompt behind its own decodes."""
        item = find("single_stream").items[0]
        alone = ceilings.request_floor_s(llama, H200, item)
        assert ceilings.workload_floor_s(llama, H200, [item], 512) == alone
        assert 256 / alone == pytest.approx(278, abs=4)  # 282 by the bytes of weights alone

    def test_attention_work(self) -> None:
        """Pairs of a causal chunk: all earlier tokens, and half of its own square."""
        assert attention.parse_work("decode:64x2048").pairs == 64 * 2048
        assert attention.parse_work("prefill:4").pairs == 10
        assert attention.parse_work("chunk:2@5").pairs == 4 + 5
        for wrong in ("decode:64", "chunk:6@5", "prefill:0", "x"):
            with pytest.raises(ValueError, match="decode:NxL"):
                attention.parse_work(wrong)

    def test_twins(self) -> None:
        """A paged backend at the same work and layout gives a ratio; above 1, contiguous is faster."""
        times = {"fa_vattn mega": 2.0, "fa_paged mega": 3.0, "fa_paged per_layer": 1.0, "triton_vattn mega": 1.0}
        records = [Record("prefill:4", (Figure("time", "us", (us,), False),), name) for name, us in times.items()]
        (found,) = attention.twins(records)
        assert found.variant == "fa_vattn mega" and found.figures[0].median == 1.5


def report(path: Path, rate: tuple[float, ...], ttft: tuple[float, ...], command: str = "serve") -> Path:
    """A report of one workload, written as a benchmark does."""
    made = Report(command, {"commit": path.stem, "settings": {"chunk_tokens": 512}}, {})
    made.records.append(Record("w", (Figure("out_tok_s", "tok/s", rate, True, 200.0),
                                     Figure("ttft", "ms", ttft, False, 5.0)), "in process"))  # fmt: skip
    figures.finish(made, path)
    return path


class TestReportsAndCompare:
    """Ratios above 1 are better, whichever way a figure counts; noise comes from the repeats."""

    def test_a_figure_knows_its_ceiling(self) -> None:
        """Rates over it, times under it."""
        assert Figure("r", "x", (90.0, 100.0, 120.0), True, 200.0).of_ceiling == 0.5
        assert Figure("t", "x", (10.0,), False, 5.0).of_ceiling == 0.5
        assert Figure("r", "x", (90.0, 100.0, 120.0), True).noise == pytest.approx(0.3)
        assert Figure("t", "x", (0.0,), False, 5.0).of_ceiling is None

    def test_the_table_prints_the_ceiling_beside_each_figure(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """And the last line is the whole report."""
        report(tmp_path / "a.json", (100.0, 110.0), (10.0,))
        lines = capsys.readouterr().out.splitlines()
        assert "ceiling" in lines[1] and "52.5 %" in lines[2] and "50.0 %" in lines[3]
        assert json.loads(lines[-1]) == json.loads((tmp_path / "a.json").read_text())
        assert json.loads(lines[-1])["records"][0]["workload"] == "w"

    def test_ratios_and_verdicts(self, tmp_path: Path) -> None:
        """20 % more tokens with 10 % of noise is better; a TTFT doubled from 10 to 20 ms is 0.5."""
        a = figures.load(report(tmp_path / "a.json", (95.0, 100.0, 105.0), (10.0, 10.0)))
        b = figures.load(report(tmp_path / "b.json", (120.0, 120.0, 121.0), (20.0, 20.0)))
        rate, ttft = compare.changes(a, b)
        assert rate.ratio == pytest.approx(1.2) and rate.noise == pytest.approx(0.1) and rate.verdict == "better"
        assert ttft.ratio == pytest.approx(0.5) and ttft.verdict == "worse"
        noisy = dataclasses.replace(ttft, noise=0.6)
        assert noisy.verdict == "within noise" and ttft.fails(0.95) and not noisy.fails(0.95) and not rate.fails(0.95)
        assert dataclasses.replace(ttft, noise=None).fails(0.95), "without repeats nothing excuses it"

    @pytest.mark.parametrize(
        ("below", "status"), [([], 0), (["--fail-below", "0.95"], 1), (["--fail-below", "0.4"], 0)]
    )
    def test_the_exit_status(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], below: list[str], status: int
    ) -> None:
        """1 for a regression below the bound that was given; what differs between the runs is said first."""
        paths = [str(report(tmp_path / f"{name}.json", (100.0,), (ms,))) for name, ms in (("a", 10.0), ("b", 20.0))]
        capsys.readouterr()
        assert bench.main(["compare", *paths, *below]) == status
        said = capsys.readouterr().out
        assert "differs: commit: a / b" in said and "0.500x" in said and ("regression" in said) == bool(status)

    def test_what_is_no_report_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """One line, exit status 2: other JSON, no file, reports of two commands."""
        good = str(report(tmp_path / "a.json", (1.0,), (1.0,)))
        other = str(report(tmp_path / "b.json", (1.0,), (1.0,), "latency"))
        (tmp_path / "c.json").write_text("[]")
        for path in (str(tmp_path / "c.json"), str(tmp_path / "none.json"), other):
            assert bench.main(["compare", good, path]) == 2
            assert capsys.readouterr().err.startswith("error: ")


def test_the_picture_of_the_online_figures_is_of_their_records(tmp_path: Path) -> None:
    """Drawn anew from benchmarks/results it has the same points as the one in docs/."""
    draw_online.main(["--out", str(tmp_path / "online.svg")])
    drawn, kept = ((path / "online.svg").read_text("utf-8") for path in (tmp_path, draw_online.OUT.parent))
    points = re.compile(r'<use xlink:href="#m\w+" x="([\d.]+)" y="([\d.]+)"')
    assert len(points.findall(kept)) > 12
    assert points.findall(drawn) == points.findall(kept)
