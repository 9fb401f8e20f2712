"""rho and expected growth: estimators against first principles, and that memory arithmetic never sees either."""

from __future__ import annotations

import ast
import math
import random
import re
import statistics
from pathlib import Path

import pytest

from engine.core.demand import (
    MIN_DOCUMENTS,
    PRIOR_BASE_TOKENS,
    WINDOW_BASE_TOKENS,
    RhoEstimator,
    RhoStatistics,
    advertise,
)
from engine.core.errors import ConfigError
from engine.core.growth import FEEDBACK, HISTORY, MIN_LONGER, Expected, GrowthForecast, OutputHistory
from engine.core.ledger import EXACT, KvLedger
from engine.core.plan import StepPlan, StepResult
from engine.core.sequence import Sequence
from tests.core.fakes import make_request, make_scheduler

ROOT = Path(__file__).resolve().parents[2]
GROUP_TOKENS = 16


def stored(rho: float, documents: int = 1000, base: int = 300_000, phi: float = 1.0) -> RhoStatistics:
    """Statistics of a domain."""
    return RhoStatistics("d", documents, base, round(rho * base), math.sqrt(phi / base), phi, rho, rho * 1.1, rho * 1.2,
                         max(6.0, rho * 1.2))


def texts(rng: random.Random, count: int, rho: float, phi: float = 1.0) -> list[tuple[int, int]]:
    """(base, patched) tokens of documents."""
    found = []
    for _ in range(count):
        base = max(4, round(rng.lognormvariate(5.0, 0.7)))
        found.append((base, max(1, round(rng.gauss(rho * base, math.sqrt(phi * base))))))
    return found


# ---------------------------------------------------------------- rho


def test_rho_is_a_ratio_of_sums_drawn_to_one() -> None:
    """Nothing seen: 1. Then (kappa + sum p) / (kappa + sum b), whichever side of 1; a mean of ratios would be 0.75."""
    rho = RhoEstimator()
    assert (rho.value, rho.se, rho.phi) == (1.0, 0.0, 0.0)
    rho.observe(1000, 1000)
    rho.observe(10, 5)
    assert rho.value == pytest.approx((PRIOR_BASE_TOKENS + 1005) / (PRIOR_BASE_TOKENS + 1010), abs=1e-5)
    for truth in (0.6, 1.4):
        rho = RhoEstimator()
        for base, patched in texts(random.Random(1), 4000, truth):
            rho.observe(base, patched)
        assert abs(rho.value - truth) < 0.03
        assert min(truth, 1) < rho.value < max(truth, 1)  # shrunk, never past either


def test_standard_error_agrees_with_a_bootstrap() -> None:
    """se^2 = n/(n-1) sum (p - rho b)^2 / (sum b)^2 is what redrawing the documents gives."""
    rng = random.Random(2)
    documents = texts(rng, 250, 0.8, phi=3.0)
    rho = RhoEstimator()
    for base, patched in documents:
        rho.observe(base, patched)
    ratios = []
    for _ in range(400):
        drawn = rng.choices(documents, k=len(documents))
        ratios.append(sum(p for _, p in drawn) / sum(b for b, _ in drawn))
    assert rho.se == pytest.approx(statistics.stdev(ratios), rel=0.15)
    assert rho.phi == pytest.approx(3.0, rel=0.3)


def test_upper_value_widens_for_short_texts_up_to_the_bound() -> None:
    """rho_hi(B) falls with B towards value + z se, is above 1 where it should be, and never above rho_max."""
    rho = RhoEstimator(stored(0.95))
    assert rho.high(64, 3.09) > 1 > rho.high(1 << 40, 3.09) > rho.value
    assert rho.high(1e-9, 3.09) == rho.rho_max == 6.0


def test_stored_figures_count_as_traffic_seen() -> None:
    """They begin the sums, with their se and phi; much new traffic outweighs them."""
    figures = stored(0.7, phi=2.0)
    rho = RhoEstimator(figures)
    assert rho.value == pytest.approx(0.7) and rho.phi == pytest.approx(2.0)
    assert rho.se == pytest.approx(figures.se, rel=0.01)
    vast = RhoEstimator(stored(0.7, documents=10**6, base=10**9))
    before = vast.value
    for base, patched in texts(random.Random(3), 6000, 0.72):  # about one half-life
        vast.observe(base, patched)
    assert vast.value - before == pytest.approx(0.01, abs=0.004) and vast.alarms == 0


@pytest.mark.parametrize("seed", range(5))
def test_drift_alarm_falls_back_to_one(seed: int) -> None:
    """Steady traffic raises none; another domain raises one within two windows, and rho starts again at 1."""
    rng = random.Random(seed)
    rho = RhoEstimator()
    for base, patched in texts(rng, 2000, 0.7):
        rho.observe(base, patched)
    assert rho.alarms == 0 and rho.value < 0.75
    seen, lowest = 0, rho.value
    for base, patched in texts(rng, 1000, 1.05):
        rho.observe(base, patched)
        seen += base
        if rho.alarms:
            break
        lowest = min(lowest, rho.value)
    assert rho.alarms == 1 and seen <= 2 * WINDOW_BASE_TOKENS + 4000
    assert rho.value == 1.0


def test_a_few_documents_raise_no_alarm() -> None:
    """Below MIN_DOCUMENTS nothing is known of the spread."""
    rho = RhoEstimator()
    for _ in range(MIN_DOCUMENTS // 2):
        rho.observe(WINDOW_BASE_TOKENS // 2, WINDOW_BASE_TOKENS // 4)
        rho.observe(WINDOW_BASE_TOKENS // 2, WINDOW_BASE_TOKENS)
    assert rho.alarms == 0


def test_a_number_is_a_prior_and_traffic_overrules_it() -> None:
    """0.75 without a source holds as long as nobody saw a text."""
    rho = RhoEstimator(prior=0.75)
    assert rho.value == 0.75
    for base, patched in texts(random.Random(4), 3000, 1.2):
        rho.observe(base, patched)
    assert rho.value > 1.1


def test_advertised_context() -> None:
    """floor(L / q99) and floor(L / rho_max); the mean is larger, and a domain with q99 > 1 gets less than L."""
    told = advertise(8192, stored(0.75))
    assert (told.likely, told.safe, told.mean) == (math.floor(8192 / 0.9), 8192 // 6, math.floor(8192 / 0.75))
    assert advertise(8192, stored(1.0)).likely < 8192


@pytest.mark.parametrize("change", [
    {"documents": 1}, {"base_tokens": 0}, {"patched_tokens": 10**9}, {"se": math.nan}, {"q99": 0.1}, {"phi": -1.0},
    {"q50": True}, {"rho_max": None}, {"documents": 2.5}, {"base_tokens": 1e999}, {"base_tokens": 10**400},
    {"documents": 10**400}, {"se": 1e300}, {"phi": 10**400}, {"q50": 1e-320, "q95": 1e-320, "q99": 1e-320},
    {"patched_tokens": math.nan}, {"q99": math.inf, "rho_max": math.inf}, {"base_tokens": 1 << 50},
])  # fmt: skip
def test_stored_figures_are_checked(change: dict[str, object]) -> None:
    """A figure that cannot be is refused with the domain's name."""
    whole = {"documents": 10, "base_tokens": 1000, "patched_tokens": 800, "se": 0.01, "phi": 1.0, "q50": 0.8,
             "q95": 0.9, "q99": 1.1, "rho_max": 3.0}  # fmt: skip
    assert RhoStatistics.of("d", whole).rho == 0.8
    with pytest.raises(ConfigError, match="'d'"):
        RhoStatistics.of("d", whole | change)


# ---------------------------------------------------------------- how long outputs get


def finished(lengths: list[int], cut: int = 0) -> OutputHistory:
    """A history; `cut` ends those that reach it."""
    history = OutputHistory(RhoEstimator())
    for length in lengths:
        history.finished(min(length, cut) if cut else length, not cut or length < cut)
    return history


def test_history_conditions_on_what_was_produced() -> None:
    """Mean and variance of what lies beyond the memory held, among outputs longer than what was produced."""
    lengths = list(range(1, 201))
    found = finished(lengths).beyond(100, 120, 180)
    rest = [max(0, min(length, 180) - 120) for length in lengths if length > 100]
    assert found.tokens == pytest.approx(statistics.fmean(rest))
    assert found.variance == pytest.approx(statistics.pvariance(rest))
    assert found.chance == pytest.approx(sum(length > 120 for length in lengths) / 100)


def test_unknown_lengths_mean_up_to_the_cap() -> None:
    """No history, or fewer than MIN_LONGER outputs as long as this one: everything that was asked for."""
    assert OutputHistory(RhoEstimator()).beyond(0, 10, 500) == Expected(490, chance=1)
    history = finished([50] * 200)
    assert history.beyond(0, 0, 500).tokens == pytest.approx(50)
    assert history.beyond(50, 60, 500) == Expected(440, chance=1)
    assert finished([50] * 200 + [90] * (MIN_LONGER - 1)).beyond(60, 60, 500).tokens == 440


def test_cut_outputs_do_not_make_outputs_look_short() -> None:
    """Half of what clients asked for was cut at 100: the mean of what is known is not taken for the mean of all."""
    rng = random.Random(5)
    lengths = [round(rng.expovariate(1 / 150)) + 1 for _ in range(HISTORY)]
    history = finished(lengths, cut=100)
    naive = statistics.fmean(min(length, 100) for length in lengths)
    truth = statistics.fmean(min(length, 100) for length in lengths)
    assert history.beyond(0, 0, 100).tokens == pytest.approx(truth, rel=0.02)  # up to the cut there is no difference
    assert history.beyond(0, 0, 1000).tokens > 3 * naive  # beyond it nobody knows, so up to the cap
    mixed = OutputHistory(RhoEstimator())
    for index, length in enumerate(lengths):
        asked = 60 if index % 2 else 4000
        mixed.finished(min(length, asked), length < asked)
    assert mixed.beyond(0, 0, 4000).tokens == pytest.approx(statistics.fmean(lengths), rel=0.15)


def test_only_lengths_in_base_tokens_depend_on_rho() -> None:
    """What finishes here is counted in engine tokens, so a wrong rho leaves the history as it goes."""
    for value in (0.3, 1.0, 3.0):
        history = OutputHistory(RhoEstimator(prior=value), [100] * HISTORY)
        found = history.beyond(0, 0, 4000)
        assert found.tokens == pytest.approx(100 * value) and found.imported == pytest.approx(found.tokens)
        for _ in range(HISTORY):
            history.finished(80, True)
        assert history.beyond(0, 0, 4000) .tokens == pytest.approx(80)


# ---------------------------------------------------------------- the bound


def groups_for(tokens: int) -> int:
    """The ledger's."""
    return -(-tokens // GROUP_TOKENS)


def sequence(seq_id: int, done: int, cap: int = 2000, prompt: int = 40) -> Sequence:
    """A running sequence of `done` outputs with its memory."""
    made = Sequence(seq_id, make_request(f"r{seq_id}", prompt, cap), prompt + cap)
    made.known = prompt + done
    made.covered = groups_for(made.known) * GROUP_TOKENS
    return made


@pytest.mark.parametrize(("risk", "low", "high"), [(0.5, 0.25, 0.65), (0.05, 0.005, 0.09), (1e-3, 0.0, 0.004)])
def test_growth_stays_within_its_risk(risk: float, low: float, high: float) -> None:
    """Running sets at random moments: what they turn out to need is above the bound about as often as the risk says;
    and not far more seldom, so the bound is no mere large number."""
    rng = random.Random(6)

    def length() -> int:
        return 1 + min(1999, round(rng.lognormvariate(5.0, 0.7)))

    history = [length() for _ in range(HISTORY)]
    others = [length() for _ in range(20_000)]
    running_now = iter(rng.choices(others, weights=others, k=25_000))  # long outputs are seen running more often
    over, trials = 0, 1000
    for _ in range(trials // 100):
        rng.shuffle(history)
        forecast = GrowthForecast(risk, GROUP_TOKENS, RhoEstimator())
        for one in history:
            forecast.history.finished(one, True)
        for _ in range(100):
            needed = 0
            for seq_id in range(25):
                final = next(running_now)
                done = rng.randrange(final)
                running = sequence(seq_id, done)
                forecast.watch(running)
                needed += groups_for(40 + final) - groups_for(running.known)
            over += needed > forecast.groups()
            for seq_id in range(25):
                forecast.lost(seq_id)
    assert low <= over / trials <= high
    assert forecast.groups() == 0


def test_a_wrong_rho_is_wrong_for_all_at_once() -> None:
    """The shared error grows with the number of requests, not with its root: kept apart from the variances."""
    def margin(count: int, se: float) -> float:
        base = round(0.01 / se**2)
        rho = RhoEstimator(RhoStatistics("d", 100, base, base, se, 0.01, 0.8, 0.9, 1.0, 3.0))
        forecast = GrowthForecast(1e-3, 1.0, rho, [100] * HISTORY)
        mean = 0.0
        for seq_id in range(count):
            forecast.watch(sequence(seq_id, 0))
            mean += forecast.expect(sequence(seq_id, 0)).tokens
        return forecast.groups() - math.ceil(count / 2) - mean

    assert margin(400, 0.05) == pytest.approx(4 * margin(100, 0.05), rel=0.05)
    assert margin(400, 0.05) == pytest.approx(3.09 * 400 * 92 * 0.05, rel=0.05)  # 92: what is not held yet


def test_bookkeeping_is_of_what_runs() -> None:
    """Whoever ends, is preempted or grows is counted once; nothing is left when nothing runs. A whole reservation
    needs nothing more."""
    forecast = GrowthForecast(1e-3, GROUP_TOKENS, RhoEstimator(), [100] * HISTORY)
    first, second = sequence(1, 0), sequence(2, 0)
    forecast.watch(first)
    alone = forecast.groups()
    forecast.watch(second)
    assert forecast.groups() > alone and forecast.groups() == forecast.groups(Expected())
    second.known, second.covered = 100, 112
    forecast.watch(second)
    assert alone < forecast.groups() < 2 * alone
    forecast.lost(2)
    assert forecast.groups() == alone
    first.whole = True
    assert forecast.expect(first) == Expected()
    forecast.ended(first, by_itself=True)
    assert forecast.groups() == 0


def test_preemptions_raise_z_and_their_absence_lowers_it() -> None:
    """More than 1 % of FEEDBACK requests preempted: one step more careful; none: one less, never below the risk's."""
    forecast = GrowthForecast(1e-3, GROUP_TOKENS, RhoEstimator(), range(1, 200))
    forecast.watch(sequence(9_999, 0))
    before = forecast.groups()
    for expected, preempted in ((1, 10), (2, 10), (2, 1), (1, 0), (0, 0), (0, 0)):
        for index in range(preempted):
            forecast.lost(5_000 + index)
        for index in range(FEEDBACK):
            forecast.ended(sequence(index, 1), by_itself=False)
        assert forecast.cautious == expected
    assert forecast.stats()["growth_caution"] == 0
    forecast.cautious = 2
    assert forecast.groups() > before


# ---------------------------------------------------------------- what it may touch


def test_an_admission_leaves_the_growth_free_unless_nothing_runs() -> None:
    """may_admit with growth; alone on the pool a sequence starts whatever is expected, so nothing waits forever."""
    ledger = KvLedger(100, groups_for, EXACT)
    ledger.bind(limit_tokens=1600, reserve_context=False)
    assert ledger.may_admit(800, 1000) is None
    ledger.reserve(1, 160)
    assert ledger.may_admit(800, 40) is None
    refusal = ledger.may_admit(800, 41)
    assert refusal is not None and (refusal.reason, refusal.need, refusal.free) == ("pages", 50, 90)
    ledger.check()


def run_day(scale: float | None) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Tokens and totals of one day at a tight pool; scale: rho, None = no forecast. Checks the books throughout."""
    scheduler = make_scheduler(groups=40, max_num_seqs=16, max_model_len=400)
    if scale is not None:
        lengths = [10 + index % 90 for index in range(HISTORY)]
        scheduler.forecast = GrowthForecast(1e-3, GROUP_TOKENS, RhoEstimator(prior=scale), lengths)
    rng = random.Random(7)
    requests = [make_request(f"r{index}", 20 + rng.randrange(60), 10 + rng.randrange(90)) for index in range(60)]
    from tests.core.fakes import make_loop, run

    loop, _ = make_loop(scheduler)
    for request in requests:
        loop.add(request)
    seen = run(loop)
    assert scheduler.forecast is None or scheduler.forecast.groups() == 0
    assert scheduler.ledger.free_groups == scheduler.ledger.total_groups
    return {name: list(tokens) for name, tokens in seen.tokens.items()}, dict(scheduler.totals)


def test_rho_changes_waiting_and_preemptions_and_no_token() -> None:
    """rho forced to 0.3, 1 and 3, and no forecast at all: the same tokens; steps and preemptions are not the same."""
    days = {scale: run_day(scale) for scale in (None, 0.3, 1.0, 3.0)}
    tokens = [day[0] for day in days.values()]
    assert all(one == tokens[0] for one in tokens)
    steps = {scale: day[1]["steps"] for scale, day in days.items()}
    preempted = {scale: day[1]["preempted"] for scale, day in days.items()}
    assert steps[0.3] < steps[1.0] < steps[3.0]
    assert preempted[None] > preempted[3.0] == 0
    assert preempted[0.3] >= preempted[1.0]


MAY_KNOW = {
    "engine/build.py", "engine/core/demand.py", "engine/core/growth.py", "engine/core/draft.py",
    "engine/core/scheduler.py", "engine/core/loop.py", "engine/core/config.py", "engine/patching/reduction.py",
    "engine/patching/report.py", "engine/patching/verify.py", "engine/patching/build.py", "engine/serve/reduction.py",
    "engine/serve/metrics.py",
}  # fmt: skip
NAMES = re.compile(r"(^|_)rho(_|$)|token_reduction|Rho|Demand|demand|[Ff]orecast|engine\.core\.growth")


def names_in(source: str) -> set[str]:
    """Every name a module uses or imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        for value in (getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")):
            if isinstance(value, str):
                found.add(value)
    return found


def test_memory_arithmetic_knows_no_rho() -> None:
    """Ledger, allocator, slots, kernels, runner and attention name neither rho nor a forecast of it; only listed files
    may. The names of the list are used, so that it does not rot."""
    guilty = set()
    for folder in ("engine", "kernels", "vattention_ext"):
        for file in (ROOT / folder).rglob("*.py"):
            if any(NAMES.search(name) for name in names_in(file.read_text("utf-8"))):
                guilty.add(str(file.relative_to(ROOT)))
    assert guilty <= MAY_KNOW
    assert not {name for name in guilty if "ledger" in name or name.startswith(("engine/kv", "engine/runner", "vatt"))}
    assert guilty == MAY_KNOW


def test_without_a_forecast_nothing_is_asked() -> None:
    """The hot path of the default: no forecast object, and no growth in its gauges."""
    scheduler = make_scheduler()
    assert scheduler.forecast is None and "expected_growth_groups" not in scheduler.stats()
    assert isinstance(scheduler.plan(0.0), StepPlan) and StepResult(0).tokens == ()
