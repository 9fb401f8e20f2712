"""Sampling on the device draws the token that the row sampler of the CPU draws, for every mix of rules.

Without a GPU it runs under Triton's interpreter: TRITON_INTERPRET=1 python -m pytest tests/gpu/test_sampling.py
"""

from __future__ import annotations

import math
import random

import pytest
import torch

pytest.importorskip("triton")
import triton

from engine.core.request import SamplingParams
from engine.runner.device_sampler import DeviceSampler, GraphRules, choose
from engine.runner.sampler import Pick, Sampler, torch_argmax, uniform
from tessera_kernels import triton_sample

INTERPRETED = bool(triton.knobs.runtime.interpret)
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
ROWS, VOCABS = (16, (40, 1500)) if INTERPRETED else (256, (40, 1500, 128256))
NEAR = 1e-5  # of the kept mass: float32 rounding of a sum over a vocabulary


def drawn_rules(rng: random.Random, rows: int) -> list[Pick]:
    """Every kind of rule, mixed."""
    picks = []
    for _ in range(rows):
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.3, 1.0, 1.7]), top_k=rng.choice([0, 0, 1, 5, 50, 10**6]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.5, 0.01]), min_p=rng.choice([0.0, 0.0, 0.05, 0.5]),
            seed=rng.randrange(1 << 60), min_tokens=rng.choice([0, 3]),
            logit_bias=rng.choice([{}, {3: 5.0, 30: -100.0}]))  # fmt: skip
        picks.append(Pick(params, rng.randrange(5), frozenset(rng.sample(range(40), rng.choice([0, 2, 5])))))
    return picks


def near_a_boundary(logits: torch.Tensor, pick: Pick, mine: int, judge: int) -> bool:
    """Whether two tokens differ by rounding alone: next to each other where the point falls, or at the cut of top-p."""
    params = pick.params
    biased = logits.double()
    for token, bias in params.logit_bias:
        biased[token] += bias
    scaled = biased / params.temperature
    weights = (scaled - scaled.max()).exp()
    if params.top_k > 0 or params.top_p < 1:
        order = torch.sort(scaled, descending=True, stable=True).indices
    else:
        order = torch.arange(len(scaled))
    running = weights[order].cumsum(0)
    place = {int(token): i for i, token in enumerate(order)}
    low, high = sorted((place[mine], place[judge]))
    between = float(running[high - 1] - running[low]) if high > low else 0.0
    # a shifted cut of top-p moves the point by at most one element's share
    slack = NEAR if params.top_p == 1 else float(weights.max() / running[-1]) * 1e-3 + NEAR
    return between <= slack * float(running[-1])


@pytest.mark.parametrize("vocab", VOCABS)
def test_draws_as_the_judge(vocab: int) -> None:
    """Greedy, tempered, cut and banned rows in one batch; a differing token must lie on a float boundary."""
    rng = random.Random(vocab)
    logits = torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    picks = drawn_rules(rng, ROWS)
    logits[3, 2], logits[4] = float("nan"), float("-inf")
    want = Sampler(vocab)(logits.clone(), picks).tolist()
    got = DeviceSampler(vocab, torch_argmax)(logits.clone().to(DEVICE), picks).tolist()
    differing = [i for i in range(ROWS) if got[i] != want[i]]
    assert got[3] == got[4] == -1
    assert len(differing) <= ROWS // 100
    for i in differing:
        assert near_a_boundary(logits[i], picks[i], got[i], want[i]), (picks[i], got[i], want[i])


SHAPES = {
    "flat": lambda noise: noise, "narrow": lambda noise: noise / 100, "far from zero": lambda noise: noise / 2 - 300,
    "one bin": lambda noise: noise * 1e-5, "peaked": lambda noise: noise + 40 * (noise > 3),
    "halves": lambda noise: (2 * noise).bfloat16().float(), "one ahead": lambda noise: noise + 9 * (noise > 3.3),
}  # fmt: skip


@pytest.mark.parametrize("slack", [None, -0.4])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_distribution(monkeypatch: pytest.MonkeyPatch, shape: str, slack: float | None) -> None:
    """Nuclei of few elements and of thousands, ties by the hundred, cuts far down; and the same where what is counted
    leads to wrong places, so that whole rows must be looked at."""
    vocab, rows = (9000, 12) if INTERPRETED else (128256, 64)
    if slack is not None:
        monkeypatch.setattr(triton_sample, "SLACK", slack)
    rng = random.Random(shape)
    logits = SHAPES[shape](torch.randn(rows, vocab, generator=torch.Generator().manual_seed(5)))
    rules = [{"top_p": 0.9}, {"top_k": 50}, {"top_k": 50, "top_p": 0.5}, {"top_k": vocab // 2, "top_p": 0.95},
             {"top_p": 0.01}, {"top_k": vocab - 1}, {"min_p": 0.05, "top_p": 0.95}, {"top_p": 0.999999},
             {"top_k": vocab // 2}, {"top_k": 1}, {}, {"min_p": 0.3}]  # fmt: skip
    picks = [Pick(SamplingParams(temperature=rng.choice([0.3, 1.0, 1.7]), seed=rng.randrange(1 << 40), **rules[i % 12]),
                  i, frozenset()) for i in range(rows)]  # fmt: skip
    want = Sampler(vocab)(logits.clone(), picks).tolist()
    got = DeviceSampler(vocab, torch_argmax)(logits.clone().to(DEVICE), picks).tolist()
    for i, pick in enumerate(picks):
        equal = logits[i, got[i]] / pick.params.temperature == logits[i, want[i]] / pick.params.temperature
        assert got[i] == want[i] or equal or near_a_boundary(logits[i], pick, got[i], want[i]), pick


def test_a_row_of_one_value() -> None:
    """More equal logits than a list holds: top-k and top-p keep the first ids."""
    vocab = triton_sample.LISTED + 500
    picks = [Pick(SamplingParams(temperature=1.0, seed=i, **rule), 0, frozenset())
             for i in range(2) for rule in ({"top_k": 4500}, {"top_p": 0.5})]  # fmt: skip
    got = DeviceSampler(vocab, torch_argmax)(torch.zeros(4, vocab, device=DEVICE), picks).tolist()
    assert got == [math.floor(uniform(i, 0) * kept) for i in range(2) for kept in (4500, vocab // 2)]


def test_equal_logits_fall_to_lower_ids() -> None:
    """All logits equal: top-k keeps the first k ids and the point falls among them in order."""
    logits = torch.zeros(8, 100, device=DEVICE)
    picks = [Pick(SamplingParams(temperature=1.0, top_k=10, seed=i), 0, frozenset()) for i in range(8)]
    got = DeviceSampler(100, torch_argmax)(logits, picks).tolist()
    assert got == [math.floor(uniform(i, 0) * 10) for i in range(8)]


def test_frequencies_are_the_distribution() -> None:
    """Many draws of one row spread as softmax does; a mutation of the draw would show."""
    rows = 48 if INTERPRETED else 4096
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=DEVICE).repeat(rows, 1)
    picks = [Pick(SamplingParams(temperature=1.0, top_p=0.999999, seed=i), 3, frozenset()) for i in range(rows)]
    got = torch.tensor(DeviceSampler(4, torch_argmax)(logits, picks).tolist())
    want = logits[0].cpu().softmax(0) * rows
    counts = torch.bincount(got, minlength=4)
    assert float(((counts - want) ** 2 / want).sum()) < 16.3  # chi square, 3 degrees of freedom, p = 0.001


def test_rules_of_a_graph_change_between_steps() -> None:
    """One table, loaded anew: sampled rows, then plain ones again, and a row with too many bans does not fit."""
    device = torch.device(DEVICE)
    rules = GraphRules(4, 40, device)
    logits = torch.randn(4, 40, device=device)
    many = Pick(SamplingParams(temperature=0.0, min_tokens=9), 0, frozenset(range(9)))
    few = Pick(SamplingParams(temperature=0.0, min_tokens=9), 0, frozenset({int(logits[0].argmax())}))
    hot = Pick(SamplingParams(temperature=1.0, seed=3), 0, frozenset())
    plain = Pick(SamplingParams(temperature=0.0), 0, frozenset())
    told = Pick(SamplingParams(temperature=1.0, logprobs=2), 0, frozenset())
    assert rules.fits([few, hot]) and not rules.fits([many]) and not rules.fits([told])
    for picks in ([few, hot], [plain] * 4, [hot] * 3, [plain]):
        rules.load(picks)
        got = choose(logits.clone(), rules.table, torch_argmax).tolist()
        padded = [*picks, *[plain] * (4 - len(picks))]
        assert got == Sampler(40)(logits.cpu().clone(), padded).tolist()
