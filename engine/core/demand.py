"""How many engine tokens a text costs for each base token: the factor rho, how sure we are of it, and who says so.

rho = patched tokens / base tokens of the same text. It turns demand that is expressed in base tokens into engine
tokens and nothing else: no page, slot or length limit knows it, and a text may cost more than the base (rho > 1).
It knows no text, no memory and no request. Estimators: sections 6.2 and 6.3 of our notes on AdaptiVocab
(arXiv 2503.19693); what they are used for: docs/vocabularies.md, "Cache sizing".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.core.errors import ConfigError

log = logging.getLogger(__name__)

SIDES = ("in", "out")  # of a request: what is encoded, what the model emits
PRIOR = 1.0  # what is believed of a domain that nobody measured
PRIOR_BASE_TOKENS = 2e4  # how much text the prior is worth (kappa)
HALF_LIFE_BASE_TOKENS = 1e6
WINDOW_BASE_TOKENS = 1 << 14  # text after which the alarm looks
ALARM_SE = 4.0
MOST = 1 << 53  # of any figure: sums of squares of such numbers are still floats
LEAST_RATIO = 1e-4  # no token stands for ten thousand of the base
MIN_DOCUMENTS = 30  # fewer say too little of their own spread to raise an alarm

_FIELDS = {"documents": int, "base_tokens": int, "patched_tokens": int, "se": float, "phi": float, "q50": float,
           "q95": float, "q99": float, "rho_max": float}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RhoStatistics:
    """What was measured for one domain and side, as engine/patching/report.py stores it.

    documents: held-out texts. se: standard error of rho. phi: variance of the engine tokens left over, for each base
    token. q50, q95, q99: of the documents' own ratios. rho_max: engine tokens that one base token can become.
    """

    domain: str
    documents: int
    base_tokens: int
    patched_tokens: int
    se: float
    phi: float
    q50: float
    q95: float
    q99: float
    rho_max: float
    characters: int | None = None
    date: str | None = None
    corpus_sha256: str | None = None

    def __post_init__(self) -> None:
        numbers = [getattr(self, name) for name in _FIELDS]
        if not all(0 <= number <= MOST for number in numbers):
            raise ConfigError(f"statistics of {self.domain[:80]!r}: every figure must be in 0..{MOST}")
        if self.documents < 2 or not 0 < self.patched_tokens <= self.rho_max * self.base_tokens:
            raise ConfigError(f"statistics of {self.domain[:80]!r}: {self.documents} documents, {self.base_tokens} "
                              f"base and {self.patched_tokens} patched tokens, rho_max {self.rho_max}; at least 2 "
                              "documents and 1..rho_max * base_tokens are needed")
        if not LEAST_RATIO <= min(self.rho, self.q50) or not self.q50 <= self.q95 <= self.q99 <= self.rho_max:
            raise ConfigError(f"statistics of {self.domain[:80]!r}: {LEAST_RATIO} <= q50 <= q95 <= q99 <= rho_max, or "
                              f"{LEAST_RATIO} <= rho, does not hold")

    @property
    def rho(self) -> float:
        """The ratio of sums."""
        return self.patched_tokens / self.base_tokens

    @classmethod
    def of(cls, domain: str, fields: Mapping[str, object]) -> RhoStatistics:
        """From stored JSON. Raises ConfigError naming the domain and the field that is missing or no number."""
        values: dict[str, object] = {}
        for name, kind in _FIELDS.items():
            value = fields.get(name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST
            if not good or (kind is int and value != int(value)):  # type: ignore[call-overload]
                raise ConfigError(f"statistics of {domain[:80]!r}: field {name} is missing or no number in 0..{MOST}; "
                                  "`python -m scripts.patch verify DIR --text FILES --domain NAME --store` measures it")
            values[name] = kind(value)
        characters = fields.get("characters")
        values["characters"] = characters if type(characters) is int and 0 < characters <= MOST else None
        for name in ("date", "corpus_sha256"):
            text = fields.get(name)
            values[name] = text[:80] if isinstance(text, str) else None
        return cls(domain, **values)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Advertised:
    """A context of `engine_tokens` in base tokens. likely: what `confidence` of the domain's documents get; safe: what
    any text gets; mean: the average one, for planning, never to be promised."""

    engine_tokens: int
    likely: int
    confidence: float
    safe: int
    mean: int


def advertise(engine_tokens: int, statistics: RhoStatistics) -> Advertised:
    """The context of max_model_len engine tokens in base tokens (section 6.3): floor(L / q99), floor(L / rho_max)."""
    return Advertised(engine_tokens, math.floor(engine_tokens / statistics.q99), 0.99,
                      math.floor(engine_tokens / statistics.rho_max), math.floor(engine_tokens / statistics.rho))


class _Sums:
    """Weighted sums over documents of base tokens b and patched tokens p, enough for rho, its residuals and its se."""

    __slots__ = ("base", "bb", "bp", "documents", "patched", "pp")

    def __init__(self) -> None:
        self.documents = self.base = self.patched = self.bb = self.bp = self.pp = 0.0

    def add(self, base: float, patched: float) -> None:
        """One more document."""
        self.documents += 1
        self.base += base
        self.patched += patched
        self.bb += base * base
        self.bp += base * patched
        self.pp += patched * patched

    def take(self, other: _Sums) -> None:
        """The other's documents, too."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def scale(self, part: float) -> None:
        """Let everything count for `part` of what it did."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) * part)

    @property
    def rho(self) -> float:
        """The ratio of sums; PRIOR without text."""
        return self.patched / self.base if self.base else PRIOR

    def residual_squares(self) -> float:
        """sum (p - rho b)^2."""
        rho = self.rho
        return max(0.0, self.pp - 2 * rho * self.bp + rho * rho * self.bb)

    @property
    def phi(self) -> float:
        """Residual variance for each base token."""
        return self.residual_squares() / self.base if self.base else 0.0

    @property
    def se(self) -> float:
        """se^2 = n / (n - 1) * sum (p - rho b)^2 / (sum b)^2; 0 while nothing can be said of it."""
        if self.documents <= 1 or not self.base:
            return 0.0
        return math.sqrt(self.documents / (self.documents - 1) * self.residual_squares()) / self.base


def _stored_sums(stored: RhoStatistics) -> _Sums:
    """Sums with the rho, phi and number of documents of stored statistics, worth at most what live traffic could be."""
    sums = _Sums()
    rho, base = stored.rho, float(stored.base_tokens)
    sums.documents, sums.base, sums.patched = float(stored.documents), base, float(stored.patched_tokens)
    sums.bb = base * base / stored.documents
    sums.bp, sums.pp = rho * sums.bb, rho * rho * sums.bb + stored.phi * base
    sums.scale(min(1.0, HALF_LIFE_BASE_TOKENS / math.log(2) / base))
    return sums


class RhoEstimator:
    """rho of one side of a server's traffic: decayed sums of what was seen, drawn towards a prior.

    stored: an earlier measurement of this side: its rho is the prior, and it counts as traffic that was already seen.
    prior: without one, 1 or a number that somebody vouches for. Never clamped to 1. All methods take O(1).
    """

    def __init__(self, stored: RhoStatistics | None = None, *, prior: float = PRIOR) -> None:
        self.prior = prior if stored is None else stored.rho
        self.rho_max = math.inf if stored is None else stored.rho_max
        self.alarms = 0
        self.documents = self.base_tokens = self.patched_tokens = 0  # seen live, not decayed
        self._past = _stored_sums(stored) if stored is not None else _Sums()
        self._window = _Sums()

    def observe(self, base_tokens: int, patched_tokens: int) -> None:
        """One text was seen: its tokens in the base vocabulary and in the engine's."""
        if base_tokens <= 0 or patched_tokens < 0:
            return
        self.documents += 1
        self.base_tokens += base_tokens
        self.patched_tokens += patched_tokens
        self._past.scale(0.5 ** (base_tokens / HALF_LIFE_BASE_TOKENS))
        self._window.add(base_tokens, patched_tokens)
        if self._window.base >= WINDOW_BASE_TOKENS:
            self._close_window()

    def _close_window(self) -> None:
        """Compare a full window with what came before; take it in, or forget everything and believe in 1 again."""
        past, window = self._past, self._window
        self._window = _Sums()
        spread = math.sqrt(past.se**2 + max(past.phi / window.base, window.se**2))
        known = past.documents >= MIN_DOCUMENTS and window.documents >= 2
        if known and abs(window.rho - past.rho) > ALARM_SE * spread:
            log.warning("rho drifted from %.3f to %.3f (more than %.0f standard errors of %.4f): back to %.0f",
                        past.rho, window.rho, ALARM_SE, spread, PRIOR)
            self.alarms += 1
            self.prior = PRIOR
            self._past = _Sums()
            return
        past.take(window)

    def _all(self) -> _Sums:
        both = _Sums()
        both.take(self._past)
        both.take(self._window)
        return both

    @property
    def value(self) -> float:
        """(kappa * prior + sum p) / (kappa + sum b)."""
        base, patched = self._past.base + self._window.base, self._past.patched + self._window.patched
        return (PRIOR_BASE_TOKENS * self.prior + patched) / (PRIOR_BASE_TOKENS + base)

    @property
    def se(self) -> float:
        """Standard error that every request shares: one wrong rho is wrong for all of them."""
        return self._all().se

    @property
    def phi(self) -> float:
        """Variance of a request's own engine tokens for each base token."""
        return self._all().phi

    def high(self, base_tokens: float, z: float) -> float:
        """Upper value for one text: min(rho_max, value + z * sqrt(se^2 + phi / base_tokens))."""
        seen = self._all()
        return min(self.rho_max, self.value + z * math.sqrt(seen.se**2 + seen.phi / base_tokens))


class Demand:
    """rho of both sides of one server's traffic. They never stand in for each other: the input's belongs to the
    vocabulary and the texts, the output's to what the model emits."""

    def __init__(self, into: RhoEstimator | None = None, out: RhoEstimator | None = None) -> None:
        self.sides = {"in": into or RhoEstimator(), "out": out or RhoEstimator()}

    def observe(self, side: str, base_tokens: int, patched_tokens: int) -> None:
        """Counts of one sampled text of a side."""
        self.sides[side].observe(base_tokens, patched_tokens)

    def stats(self) -> dict[str, float]:
        """Gauges and totals of each side."""
        found: dict[str, float] = {}
        for side, rho in self.sides.items():
            found |= {f"rho_{side}": rho.value, f"rho_{side}_se": rho.se, f"rho_{side}_alarms_total": rho.alarms,
                      f"rho_{side}_sampled_base_tokens_total": rho.base_tokens}  # fmt: skip
        return found
