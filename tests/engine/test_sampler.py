"""The sampler keeps its promises: argmax at temperature 0, filters in order, and no randomness but (seed, index)."""

from __future__ import annotations

import math

import pytest
import torch

from engine.core.errors import RequestError
from engine.core.request import SamplingParams
from engine.runner.sampler import Pick, RawRows, Sampler, sample_row, uniform


def pick(index: int = 0, stop: frozenset[int] = frozenset(), **params: object) -> Pick:
    """A Pick with the given sampling fields."""
    return Pick(SamplingParams(**params), index, stop)  # type: ignore[arg-type]


def slow_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The filtered distribution written out with full sorts, in float64: (V,) probabilities."""
    scaled = (logits / params.temperature).double()
    if params.min_p > 0:
        scaled = scaled.masked_fill(scaled < scaled.max() + math.log(params.min_p), -math.inf)
    if params.top_k > 0:
        kept = torch.topk(scaled, params.top_k).indices
        mask = torch.full_like(scaled, -math.inf)
        mask[kept] = scaled[kept]
        scaled = mask
    probs = torch.softmax(scaled, 0)
    if params.top_p < 1:
        ordered, ids = torch.sort(probs, descending=True, stable=True)
        drop = ids[ordered.cumsum(0) - ordered >= params.top_p]
        probs[drop] = 0
        probs /= probs.sum()
    return probs


def test_temperature_zero_is_argmax_and_needs_no_seed() -> None:
    """Greedy rows take the first maximum, whatever their neighbours do."""
    logits = torch.randn(5, 100)
    assert Sampler(100)(logits.clone(), [pick(temperature=0.0)] * 5).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.6),
        SamplingParams(temperature=1.0, min_p=0.2),
        SamplingParams(temperature=0.9, top_k=20, top_p=0.8, min_p=0.01),
        SamplingParams(temperature=5.0, top_p=0.999),
    ],
)
def test_inverse_distribution_matches_the_slow_one(params: SamplingParams) -> None:
    """Sweeping the point over [0, 1) yields each token in proportion to the filtered distribution."""
    logits = torch.randn(600, generator=torch.Generator().manual_seed(3)) * 3
    want = slow_distribution(logits, params)
    points = 4000
    counts = torch.zeros(600, dtype=torch.float64)
    for i in range(points):
        counts[sample_row(logits, params, (i + 0.5) / points)] += 1
    assert (counts / points - want).abs().max() < 1.5 / points + 1e-4
    assert not counts[want == 0].any()


def test_draws_depend_on_seed_and_index_only() -> None:
    """A row's token is the same alone, in a batch, and at another place in the batch."""
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1))
    picks = [pick(index=i, seed=40 + i, temperature=1.0) for i in range(4)]
    together = Sampler(1000)(logits.clone(), picks).tolist()
    for i in (3, 1, 0, 2):
        assert Sampler(1000)(logits[i : i + 1].clone(), [picks[i]]).tolist() == [together[i]]


def test_uniform_is_flat_and_uncorrelated() -> None:
    """Counter-based numbers: mean, spread and neighbours look uniform along index and along seed."""
    for numbers in ([uniform(7, i) for i in range(20000)], [uniform(i, 7) for i in range(20000)]):
        draws = torch.tensor(numbers, dtype=torch.float64)
        assert 0 <= float(draws.min()) and float(draws.max()) < 1
        assert abs(float(draws.mean()) - 0.5) < 0.01
        assert abs(float(draws.var()) - 1 / 12) < 0.005
        assert abs(float(torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1])) < 0.03


def test_min_tokens_bans_every_stop_id_until_then() -> None:
    """eos cannot come out before min_tokens outputs, and can at once after."""
    logits = torch.zeros(1, 50)
    logits[0, 7] = 10.0
    stop = frozenset({7})
    assert Sampler(50)(logits.clone(), [pick(0, stop, temperature=0.0, min_tokens=2)]).tolist() != [7]
    assert Sampler(50)(logits.clone(), [pick(2, stop, temperature=0.0, min_tokens=2)]).tolist() == [7]


def test_a_poisoned_row_ends_alone() -> None:
    """NaN or infinite logits give -1 for that row and leave the others as they are."""
    logits = torch.randn(3, 20)
    want = logits.argmax(-1).tolist()
    logits[1, 4] = float("nan")
    assert Sampler(20)(logits, [pick(temperature=0.0)] * 3).tolist() == [want[0], -1, want[2]]


def test_a_bias_is_added_before_everything_else_and_to_its_row_alone() -> None:
    """Before temperature, top_k and the ban of min_tokens, which no bias lifts."""
    logits = torch.zeros(3, 50)
    picks = [pick(temperature=0.0, logit_bias={7: 3.0, 9: 2.0}),
             pick(temperature=0.0, stop=frozenset((7,)), min_tokens=4, logit_bias={7: 100.0, 9: 2.0}),
             pick(temperature=1.0, seed=1, top_k=1, logit_bias={11: 0.5})]  # fmt: skip
    assert Sampler(50)(logits.clone(), picks).tolist() == [7, 9, 11]
    assert not any(one.greedy for one in picks) and pick(temperature=0.0).greedy
    assert not pick(temperature=0.0, logprobs=0).greedy  # a captured graph has no logits to tell


def test_logprobs_are_of_the_logits_before_they_are_changed() -> None:
    """Each row as many as it wants; bit for bit what it gets alone; the picked token first, even an unlikely one."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(2)) * 5
    picks = [pick(temperature=0.0, logprobs=2), pick(temperature=0.0), pick(temperature=0.0, logprobs=0),
             pick(temperature=0.0, logprobs=5, logit_bias={3: 100.0})]  # fmt: skip
    changed = logits.clone()
    raw = RawRows(changed, picks)
    picked = Sampler(300)(changed, picks)
    ids, values = raw.logprobs(picked)
    assert raw.rows == [0, 2, 3] and ids.shape == (3, 6) and ids[2, 0] == 3
    truth = torch.log_softmax(logits.double(), dim=-1)
    for place, (row, count) in enumerate(zip(raw.rows, (2, 0, 5), strict=True)):
        assert ids[place].tolist() == [picked[row], *logits[row].topk(count).indices, *[-1] * (5 - count)]
        kept = ids[place, : count + 1]
        torch.testing.assert_close(values[place, : count + 1].double(), truth[row, kept], atol=1e-5, rtol=0)
        alone = RawRows(logits[row : row + 1], [picks[row]]).logprobs(picked[row : row + 1])
        assert torch.equal(alone[0][0], kept) and torch.equal(alone[1][0], values[place, : count + 1])


@pytest.mark.parametrize("huge", [10**400, -(10**400), 10**5000], ids=("401", "-401", "5001"))
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "logit_bias", "top_k", "max_tokens"])
def test_huge_integers_are_refused_as_any_other_number(field: str, huge: int) -> None:
    """They have no float, and from 4,300 digits on Python writes none of them into a message."""
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: {5: huge} if field == "logit_bias" else huge})  # type: ignore[arg-type]
