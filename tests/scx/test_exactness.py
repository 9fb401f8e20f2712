"""Encoded layers change what is cached, not what comes out; the whole matrix: `python -m scripts.scx exactness`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention.base import backends
from engine.core.errors import ConfigError
from engine.core.request import Request, SamplingParams
from engine.parts.cpu_kernels import CpuKernels
from engine.parts.layer import Attention, PreNormLayer
from engine.runner.batch import Row, pack
from engine.scx.attention import Scx, ScxAttention, shuffle_blocks
from engine.scx.errors import OutOfOrder
from engine.scx.schemes import row_bytes
from engine.scx.secure import LocalSecureSide, SealOrder
from scripts import scx_exactness
from scripts.scx_exactness import Case, Verdict, run_case
from tessera_kernels.native import OPS
from tests import models
from tests.engine import oracle

OUTPUTS = 16

# Every dtype, schedule, layout and backend with each scheme; every schedule with each dtype, layout, backend and extra.
LAYER_CASES = [
    Case(dtype, scheme, scx_exactness.SCHEDULES[(i + j) % 6], scx_exactness.LAYOUTS[(i + j // 2) % 2], backend, extra)
    for i, (scheme, extra) in enumerate(
        (scheme, extra) for extra in scx_exactness.EXTRAS for scheme in scx_exactness.SCHEMES
        if not ("segments" in extra and scheme == "perm-static")
    )
    for j, (dtype, backend) in enumerate(
        (("float32", "cpu_vattn"), ("bfloat16", "cpu_vattn"), ("bfloat16", "torch_vattn"), ("float32", "torch_vattn"),
         ("float16", "torch_vattn"))
    )
]  # fmt: skip


def case_id(case: Case) -> str:
    """A name without blanks."""
    return str(case).replace(", ", "-").replace(" ", "_")


def test_the_cases_are_a_fair_part_of_the_matrix() -> None:
    """What the comment above says, counted; and the whole matrix has every backend that an encoded layer may get."""
    values = {"dtype": scx_exactness.DTYPES, "scheme": scx_exactness.SCHEMES, "schedule": scx_exactness.SCHEDULES,
              "layout": scx_exactness.LAYOUTS, "backend": scx_exactness.BACKENDS["cpu"], "extra": scx_exactness.EXTRAS}
    pairs = [(one, other) for one in ("dtype", "layout", "backend") for other in ("scheme", "schedule")]
    for one, other in [*pairs, ("schedule", "scheme"), ("extra", "schedule")]:
        met = {(getattr(case, one), getattr(case, other)) for case in LAYER_CASES}
        assert met == set(product(values[one], values[other])), (one, other)
    slots = {name for name in backends.names() if not backends[name].caps.paged}
    assert slots == {name for fitting in scx_exactness.BACKENDS.values() for name in fitting}


@pytest.mark.parametrize("case", LAYER_CASES, ids=case_id)
def test_an_encoded_layer_equals_the_plain_one(case: Case) -> None:
    """Within the tolerances of the matrix, and no cached row is its plaintext."""
    if backends[case.backend].missing() is not None:
        pytest.skip(f"{case.backend} cannot run here")
    found: Verdict = run_case(case)
    assert found.passed, found


@pytest.mark.parametrize("scheme", ["rotate", "mix"])
def test_the_16_bit_error_over_roots(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix's one root is not a lucky one: several keep the limit, with room, since rows are rounded once. From
    projections that were rounded before, they are further off."""
    case = Case("bfloat16", scheme, "whole", "mega", "torch_vattn")
    ratios = [run_case(case, root=root).ratio for root in range(9)]
    assert max(ratios) <= scx_exactness.LIMITS[scheme] - 0.1
    open_scx = scx_exactness.open_scx
    monkeypatch.setattr(scx_exactness, "open_scx", lambda *args, **more: replace(open_scx(*args, **more), wide=False))
    assert min(run_case(case, root=root).ratio for root in range(3)) > max(ratios) + 0.05


@pytest.mark.parametrize("scheme", ["perm", "rotate", "mix"])
def test_a_wrong_key_gives_garbage(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded, or looked up, with another session's maps the output is off by more than half; with its own it is not.
    So the test above would notice a map that is not undone."""
    case = Case("float32", scheme, "chunks of 7", "mega", "torch_vattn")
    fill = LocalSecureSide._fill
    for wrong in ("out", "q"):

        def mixed_up(self: LocalSecureSide, slot: int, session: Any, wrong: str = wrong) -> None:
            fill(self, slot, session)
            for i, maps in enumerate(self._tables):
                own = getattr(maps, wrong)
                mixed = self._whole.clone()[:, 0, i].copy_(own)  # queries' and keys' may be one table
                mixed[slot] = own[slot].roll(1, 0)  # another head's
                self._tables[i] = maps._replace(**{wrong: mixed})

        with monkeypatch.context() as patch:
            patch.setattr(LocalSecureSide, "_fill", mixed_up)
            assert run_case(case).distance > 0.5
    assert run_case(case).passed


def test_shuffled_blocks_keep_their_rows() -> None:
    """Each KV head's rows change places alike in K and V, within their block and slot; all others stay."""
    k, v = torch.arange(2 * 12 * 2.0).view(2, 12, 2, 1), -torch.arange(2 * 12 * 2.0).view(2, 12, 2, 1)
    before = k.clone()
    order = torch.tensor([[[2, 0, 3, 1], [1, 3, 0, 2]]])
    shuffle_blocks(k, v, SealOrder(torch.tensor([1]), torch.tensor([4]), order))
    assert torch.equal(k, -v) and torch.equal(k[0], before[0])
    assert torch.equal(k[1, :4], before[1, :4]) and torch.equal(k[1, 8:], before[1, 8:])
    for head in range(2):
        assert torch.equal(k[1, 4:8, head], before[1, 4:8, head][order[0, head]])


# ---------------------------------------------------------------- whole engines


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A Llama and a Qwen2 of three layers, float32."""
    folder = tmp_path_factory.mktemp("tiny")
    yield {
        "llama": models.tiny_llama_dir(folder, 21, num_hidden_layers=3),
        "qwen2": models.tiny_qwen2_dir(folder, 22, num_hidden_layers=3),
    }


ENGINES: dict[str, dict[str, Any]] = {
    "perm": {"scx_scheme": "perm", "scx_layers": "0,2"},
    "rotate-all": {"scx_scheme": "rotate", "scx_layers": "all", "chunk_tokens": 7},
    "whole": {"scx_scheme": "mix", "scx_layers": "0,2", "scheduler": "orca", "max_model_len": 128,
              "kv_layout": "per_layer"},
    "ones": {"scx_scheme": "perm", "scx_layers": "all", "chunk_tokens": 1, "scx_page_seal": True},
    "mix-sealed": {"scx_scheme": "mix", "scx_layers": "all", "scx_page_seal": True, "chunk_tokens": 64},
    "static": {"scx_scheme": "perm-static", "scx_layers": "1", "kv_layout": "per_layer"},
    "torch": {"scx_scheme": "mix", "scx_layers": "0,2", "kernels": "torch", "attention_backend": "torch_vattn"},
    "segments": {"scx_scheme": "mix", "scx_layers": "0,2", "scx_segment_tokens": 16, "scx_page_seal": True,
                 "chunk_tokens": 32},
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_tokens_equal_the_plain_models(family: str, tiny: dict[str, Path]) -> None:
    """float32: token for token over hybrid batches, preemptions and both layouts; and the encoded layers did run."""
    many = oracle.prompts(12, models.TINY_VOCAB, 3, 1, 60)
    plain = oracle.make_engine(tiny[family])
    wanted = oracle.run_greedy(plain, many, OUTPUTS)
    plain.close()
    for name, settings in ENGINES.items():
        engine = oracle.make_engine(tiny[family], **settings)
        assert oracle.run_greedy(engine, many, OUTPUTS) == wanted, name
        assert engine.executor.runner.scx.scx.secure.traffic.calls > 0
        engine.close()


def test_a_sliding_window_over_encoded_rows(tmp_path: Path) -> None:
    """Without sealing, rows keep their places, so a window cuts the same rows: the plain tokens, which differ from a
    model's without a window."""
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    folders = [models.tiny_qwen2_dir(tmp_path, 27, **window), models.tiny_qwen2_dir(tmp_path / "whole", 27)]
    many = oracle.prompts(6, models.TINY_VOCAB, 8, 30, 60)
    outputs = []
    for folder, settings in [(folder, {}) for folder in folders] + [
        (folders[0], {"scx_layers": "all", "scx_scheme": scheme, "chunk_tokens": 7}) for scheme in ("perm", "mix")
    ]:
        engine = oracle.make_engine(folder, **settings)
        outputs.append(oracle.run_greedy(engine, many, OUTPUTS))
        engine.close()
    plain, without, *encoded = outputs
    assert encoded == [plain, plain] and plain != without


def test_scx_vllms_names_and_variables_reach_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint of LlamaSCXForCausalLM and SCX_ENC_LAYERS through engine.LLM: encoded, and the same tokens; without
    layers it is plain and says so; a variable that changes later is said to have no effect."""
    from engine import LLM

    folder = models.tiny_llama_dir(tmp_path, 23)
    rule, settings = SamplingParams(temperature=0.0, max_tokens=6), {"dtype": "float32", "kv_pool_bytes": 16 << 20}
    with LLM(str(folder), **settings) as plain:
        wanted = plain.generate([[7, 8, 9]], rule, use_tqdm=False)[0].outputs[0].token_ids
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaSCXForCausalLM"))
    with LLM(str(folder), **settings) as plain:
        assert plain.engine.executor.runner.scx is None
    assert "architecture LlamaSCXForCausalLM without --scx-layers: every layer is plain" in caplog.text
    monkeypatch.setenv("SCX_ENC_LAYERS", "0,1")
    with LLM(str(folder), **settings) as encoded:
        assert encoded.engine.executor.runner.scx.scx.config.layers == (0, 1)
        assert "obfuscation, not encryption" in caplog.text and "no isolation" in caplog.text
        monkeypatch.setenv("SCX_ENC_LAYERS", "0")
        assert encoded.generate([[7, 8, 9]], rule, use_tqdm=False)[0].outputs[0].token_ids == wanted
        assert "SCX_ENC_LAYERS changed after the engine was built" in caplog.text
    with pytest.raises(ConfigError, match=r"layer 2 is outside 0\.\.1"):
        LLM(str(folder), scx_layers="0,2", **settings)


def test_a_qwen2_checkpoint_under_scx_vllms_name(tmp_path: Path) -> None:
    """Qwen2SCXForCausalLM is built, with its biases, encoded, and says what Qwen2ForCausalLM says."""
    folder = models.tiny_qwen2_dir(tmp_path, 24)
    many = oracle.prompts(3, models.TINY_VOCAB, 6, 5, 30)
    plain = oracle.make_engine(folder)
    wanted = oracle.run_greedy(plain, many, 6)
    plain.close()
    config = folder / "config.json"
    config.write_text(config.read_text().replace("Qwen2ForCausalLM", "Qwen2SCXForCausalLM"))
    engine = oracle.make_engine(folder, scx_layers="all", scx_scheme="mix")
    assert engine.executor.runner.scx.scx.config.layers == (0, 1)
    assert oracle.run_greedy(engine, many, 6) == wanted
    engine.close()


def test_preempted_requests_resume_under_another_key(tiny: dict[str, Path]) -> None:
    """A pool too small for all: sessions are closed and opened again, and the tokens stay."""
    many = oracle.prompts(8, models.TINY_VOCAB, 5, 40, 80)
    plain = oracle.make_engine(tiny["llama"])
    wanted = oracle.run_greedy(plain, many, OUTPUTS)
    plain.close()
    settings = {"kv_page_bytes": 4096, "kv_pool_bytes": None, "max_model_len": 128, "kv_pool_groups": 46}
    for extra in ({}, {"scx_page_seal": True, "scx_scheme": "mix"}):
        engine = oracle.make_engine(tiny["llama"], scx_layers="0,2", **settings, **extra)
        assert oracle.run_greedy(engine, many, OUTPUTS) == wanted
        assert engine.stats()["preempted_total"] > 0, "nothing was preempted; the test proves nothing"
        sessions = engine.executor.runner.scx
        assert not sessions.namespaces and not sessions.scx.secure._sessions, "sessions outlive their requests"
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"scx_layers": "0,29"}, {"scx_layers": "0,29", "scx_scheme": "mix", "scx_page_seal": True},
    {"scx_layers": "all", "scx_scheme": "rotate"},
])  # fmt: skip
def test_smollm2_says_the_same(settings: dict[str, Any]) -> None:
    """The real model in float32, 24 prompts; ties as tests/engine/oracle.py settles them."""
    folder = models.smollm2_dir()
    many = oracle.prompts(24, 49152, 9, 1, 60)
    common = {"max_model_len": 512, "kv_pool_bytes": 1 << 30}
    engine = oracle.make_engine(folder, **common, **settings)
    outputs = oracle.run_greedy(engine, many, 16)
    engine.close()
    judge = oracle.load_oracle(folder)
    verdict = oracle.Verdict()
    for prompt, ours in zip(many, outputs, strict=True):
        oracle.judge_forced(judge, prompt, ours, verdict)
    verdict.check()


def cached(engine: Any, *chunks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V (length, G, D) of slot 0, layer by layer, after one prompt that ran in chunks of so many tokens."""
    runner, length = engine.executor.runner, sum(chunks)
    slot = runner.store.allocator.acquire(length)
    assert slot == 0 and runner.store.allocator.ensure(slot, length) is None
    if runner.scx is not None:
        runner.scx.scx.secure.open(slot, b"n" * 16)
    with torch.inference_mode():
        for count, end in zip(chunks, accumulate(chunks), strict=True):
            runner.model(pack([Row(slot, end - count, list(range(3 + end - count, 3 + end)), True)]))
    views = (runner.store.layer_views(layer) for layer in range(3))
    return [(k[0, :length].clone(), v[0, :length].clone()) for k, v in views]


@pytest.mark.parametrize("scheme", ["perm", "rotate", "mix"])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_only_encoded_layers_are_encoded_in_the_cache(scheme: str, kernels: str, tiny: dict[str, Path]) -> None:
    """No cached row of layer 1 is its plaintext; layer 0 before it equals the plain model's bit for bit, layer 2 behind
    it within rounding."""
    backend = {"attention_backend": "torch_vattn"} if kernels == "torch" else {}
    plain = oracle.make_engine(tiny["llama"], kernels=kernels, **backend)
    encoded = oracle.make_engine(tiny["llama"], kernels=kernels, scx_layers="1", scx_scheme=scheme, **backend)
    theirs, ours = cached(plain, 40), cached(encoded, 40)
    for a, b in zip(theirs[0], ours[0], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(theirs[1], ours[1], strict=True):
        assert not (a == b).all(dim=-1).any()
        same_size = torch.allclose(a.norm(dim=-1), b.norm(dim=-1), rtol=1e-4)
        assert same_size == (scheme != "mix")  # permutations and rotations keep norms: that is what they leak
    for a, b in zip(theirs[2], ours[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    plain.close()
    encoded.close()


def test_off_costs_nothing(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SCX nothing is transferred, the pieces are the very classes they were, no secure side exists, and plain
    layers of an encoded model stay fused; with it, calls and bytes are what the formula says."""
    transfers: list[tuple[int, int]] = []  # every one of this process, whoever counts it
    count = LocalSecureSide._count

    def counted(self: LocalSecureSide, incoming: int, outgoing: int, calls: int = 1) -> None:
        transfers.append((incoming, outgoing))
        count(self, incoming, outgoing, calls)

    monkeypatch.setattr(LocalSecureSide, "_count", counted)
    for name, text in (("SCX_ENC_LAYERS", ""), ("SCX_SECURE_DEVICE", "cpu"), ("SCX_ENABLE_DEBUG", "True")):
        monkeypatch.setenv(name, text)  # as SCX-vLLM's users switch it off
    plain = oracle.make_engine(tiny["llama"])
    encoded = oracle.make_engine(tiny["llama"], scx_layers="1")
    assert plain.executor.runner.scx is None
    kinds = [[type(layer) for layer in engine.executor.runner.model.layers] for engine in (plain, encoded)]
    assert kinds[1][0] is kinds[0][0] and kinds[1][2] is kinds[0][2] and kinds[1][1] is PreNormLayer
    layer = encoded.executor.runner.model.layers[1]
    assert isinstance(layer.attention, ScxAttention) and not isinstance(layer.attention, Attention)
    assert CpuKernels().fuse(layer) is layer
    many = oracle.prompts(3, models.TINY_VOCAB, 4, 5, 9)
    oracle.run_greedy(plain, many, 4)
    assert transfers == []
    oracle.run_greedy(encoded, many, 4)
    scx: Scx = encoded.executor.runner.scx.scx
    tokens = sum(len(prompt) + 3 for prompt in many)
    heads, groups, dim = 4, 2, 16
    formula = tokens * 4 * (heads + 2 * groups + heads) * dim  # qkv one way, then the output; as much comes back
    assert scx.secure.traffic.bytes_in == scx.secure.traffic.bytes_out == formula
    assert tuple(map(sum, zip(*transfers, strict=True))) == (formula, formula)
    assert scx.secure.traffic.calls == 2 * 4  # of one layer: a prefill step and three of decodes
    plain.close()
    encoded.close()


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("scheme", ["perm", "mix"])
def test_16_bit_projections_cross_in_float32_for_matrices_only(scheme: str, kernels: str, tmp_path: Path) -> None:
    """A bfloat16 Qwen2 (its projections have biases): permutations get the very rows that plain layers project,
    matrices get them before they are rounded; bytes are what row_bytes() says."""
    if kernels == "cpu" and torch.bfloat16 not in OPS:
        pytest.skip("this CPU has no kernels of this type")
    folder, seen = models.tiny_qwen2_dir(tmp_path, 25), []
    settings = {"attention_backend": "torch_vattn"} if kernels == "torch" else {}
    for each in (scheme, "perm"):
        engine = oracle.make_engine(folder, dtype="bfloat16", kernels=kernels, scx_layers="0", scx_scheme=each,
                                    **settings)  # fmt: skip
        scx: Scx = engine.executor.runner.scx.scx
        scx.observer = lambda view, layer, tensors: seen.append(tensors["qkv"].clone()) if "qkv" in tensors else None
        oracle.run_greedy(engine, [[5, 6, 7, 8, 9]], 1)
        traffic, shape = scx.secure.traffic, scx.secure.shape
        bytes_each = row_bytes(each, shape.heads, shape.kv_heads, shape.head_dim, 2)
        assert (traffic.bytes_in, traffic.bytes_out) == tuple(5 * size for size in bytes_each)
        engine.close()
    ours, rounded = seen
    assert ours.dtype is (torch.bfloat16 if scheme == "perm" else torch.float32)
    assert torch.equal(ours.bfloat16(), rounded)
    assert torch.equal(ours, rounded) == (scheme == "perm"), "nothing was lost to rounding: the test proves nothing"


def test_a_plain_engine_loads_no_cryptography(root: Path) -> None:
    """Start-up without SCX does not pay for it, and works where the library is missing."""
    code = "import sys, engine.build\nprint({'cryptography', 'engine.scx.keys'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_a_refusal_ends_its_requests_and_nothing_goes_on_in_plaintext(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail closed: the requests of the step end with an error and without a token; the next ones are served."""
    engine = oracle.make_engine(tiny["llama"], scx_layers="0,2")
    wanted = oracle.run_greedy(engine, [[5, 6, 7]], 4)
    secure = engine.executor.runner.scx.scx.secure
    with monkeypatch.context() as patch:
        patch.setattr(secure, "decode", lambda *_: (_ for _ in ()).throw(OutOfOrder("a planted refusal")))
        engine.add(Request("x", (5, 6, 7), SamplingParams(max_tokens=4), arrival_s=0.0))
        updates = [update for _ in range(3) if engine.has_work for update in engine.step()]
    assert [(update.request_id, update.tokens, update.finish_reason) for update in updates] == [("x", (), "error")]
    assert oracle.run_greedy(engine, [[5, 6, 7]], 4) == wanted
    engine.close()


def test_an_observer_sees_what_crosses_and_changes_nothing(tiny: dict[str, Path]) -> None:
    """Views in their order, with shapes; the cache's view is what stands in the slab; without one nothing is called."""
    seen: list[tuple[str, int, dict[str, torch.Tensor]]] = []

    def watch(view: str, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        seen.append((view, layer, {name: tensor.clone() for name, tensor in tensors.items()}))

    engine = oracle.make_engine(tiny["llama"], scx_layers="0,2")
    engine.executor.runner.scx.scx.observer = watch
    views = cached(engine, 12)
    assert [(view, layer) for view, layer, _ in seen] == [
        (view, layer) for layer in (0, 2) for view in ("V1", "V3", "V4", "V4")
    ]
    rows, queries, projected, output = (tensors for _, _, tensors in seen[:4])
    assert torch.equal(rows["k"], views[0][0]) and torch.equal(rows["v"], views[0][1])
    assert rows["positions"].tolist() == list(range(12)) and not rows["slots"].any()
    assert queries["q"].shape == (12, 4, 16) and projected["qkv"].shape == (12, 8 * 16)
    assert output["attended"].shape == output["decoded"].shape == (12, 64)
    assert not torch.equal(output["attended"], output["decoded"])
    engine.close()


def test_blocks_are_sealed_in_the_step_that_fills_them(tiny: dict[str, Path]) -> None:
    """Whether a prompt or a decode fills a block, its rows are shuffled before the next step reads them, and no row
    before that. The order crosses as the queries do, so V3 has it: by it, the slab is what V1 saw written."""
    seen: list[tuple[str, dict[str, torch.Tensor]]] = []

    def watch(view: str, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        seen.append((view, {name: tensor.clone() for name, tensor in tensors.items()}))

    engine = oracle.make_engine(tiny["llama"], scx_layers="1", scx_page_seal=True, scx_seal_tokens=4)
    engine.executor.runner.scx.scx.observer = watch
    keys, values = cached(engine, 10, 1, 1, 1)[1]
    filling, other = ["V1", "V3", "V4", "V3", "V4"], ["V1", "V3", "V4", "V4"]
    assert [view for view, _ in seen] == filling + other + filling + other
    written = [torch.cat([each[side] for _, each in seen if side in each]) for side in ("k", "v")]
    told = [each for _, each in seen if "order" in each]
    assert [each["firsts"].tolist() for each in told] == [[0, 4], [8]] and not any(each["slots"].any() for each in told)
    for side, wrote in zip((keys, values), written, strict=True):
        for each in told:
            for first, orders in zip(each["firsts"].tolist(), each["order"], strict=True):
                assert not torch.equal(side[first : first + 4], wrote[first : first + 4])
                for head, order in enumerate(orders):
                    assert torch.equal(side[first : first + 4, head], wrote[first + order, head])
        assert torch.equal(side[12:], wrote[12:])
    engine.close()
