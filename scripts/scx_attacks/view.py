"""What an attacker sees (View), what is public of a scheme (Rules), what it answers (Guess), and its Score.

It knows neither models nor attacks. A View holds arrays only; there is no field for a key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

BOOTSTRAP_DRAWS = 500
SHORTLIST = 256


@dataclass(frozen=True, slots=True)
class Rules:
    """What Kerckhoffs grants: how a scheme works, not its keys. 0 = the feature is off.

    scheme: "plain" or a name of --scx-scheme. seal_tokens: rows of full blocks of that many tokens are shuffled, per
    KV head. segment_tokens: a fresh key every so many tokens.
    """

    scheme: str
    seal_tokens: int = 0
    segment_tokens: int = 0

    @property
    def label(self) -> str:
        """For tables."""
        seal = f" + seal {self.seal_tokens}" if self.seal_tokens else ""
        return self.scheme + seal + (f" + segments {self.segment_tokens}" if self.segment_tokens else "")


@dataclass(frozen=True, slots=True)
class View:
    """One request's rows of one layer as they lie on the untrusted side, in float32.

    k, v: (n, G, D); row i is position i, but within a sealed block. V3 adds what crosses while it is computed:
    q: (n, H, D), each row under the key of its own segment, and live_k: (n, G, D), the keys as they were written,
    before any sealing.
    """

    rules: Rules
    layer: int
    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor | None = None
    live_k: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """n."""
        return self.k.shape[0]

    def part(self, first: int, last: int) -> View:
        """V1 of rows first..last - 1; `first` begins a block."""
        return View(self.rules, self.layer, self.k[first:last], self.v[first:last])

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Rows first..last - 1 among which the order is unknown; the unsealed tail is one row each."""
        size, n = self.rules.seal_tokens or 1, self.tokens
        full = n // size * size
        return [(at, at + size) for at in range(0, full, size)] + [(at, at + 1) for at in range(full, n)]


@dataclass(frozen=True, slots=True)
class Guess:
    """An attack's answer. distance: (n, V), the smaller the likelier that candidate is that row's token.

    bag: (n,) how many rows share the answer: within a sealed block only the set of its tokens can be told, so that
    the first bag candidates are all guesses.
    """

    distance: torch.Tensor
    bag: torch.Tensor


@dataclass(frozen=True, slots=True)
class Score:
    """How well tokens were recovered. Rates in 0..1; ci: 95 % bootstrap interval of top1; chance: top1 by guessing.

    prefix: tokens recovered from the start of the attacked range without a mistake. bits: mean log2 of the true
    token's place (0 = always first; guessing: about log2(V) - 1.44).
    """

    top1: float
    top10: float
    prefix: int
    bits: float
    ci: tuple[float, float]
    chance: float
    tokens: int


def places(guess: Guess, truth: torch.Tensor) -> np.ndarray:
    """How far down the true token stands, 0 = recovered. truth: (n,) columns of guess.distance. Returns (n,).

    Ties count half against the attacker, so that a constant distance is chance and not a hit.
    """
    mine = guess.distance.gather(1, truth[:, None])  # (n, 1)
    better = (guess.distance < mine).sum(1)
    equal = (guess.distance == mine).sum(1) - 1
    found: np.ndarray = torch.div(better + equal / 2.0, guess.bag, rounding_mode="floor").double().numpy()
    return found


def score(each: list[np.ndarray], chance: float) -> Score:
    """The Score of some prompts' places; the prefix is the longest of them. chance: of one guess."""
    place = np.concatenate(each)
    hit = place < 1
    rng = np.random.default_rng(0)
    means = hit[rng.integers(0, hit.size, (BOOTSTRAP_DRAWS, hit.size))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    exact = [int(np.flatnonzero(one >= 1)[0]) if (one >= 1).any() else len(one) for one in each]
    return Score(
        top1=float(hit.mean()),
        top10=float((place < 10).mean()),
        prefix=max(exact),
        bits=float(np.log2(place + 1).mean()),
        ci=(float(low), float(high)),
        chance=chance,
        tokens=int(hit.size),
    )


def square_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared L2 of every pair. a: (n, f); b: (m, f). Returns (n, m)."""
    return a.pow(2).sum(1)[:, None] + b.pow(2).sum(1)[None] - 2 * a @ b.T


def absolute_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """L1 of every pair. a: (n, f); b: (m, f). Returns (n, m).

    Exact for the SHORTLIST nearest by L2; the others, which no rank of interest depends on, get what L1 is to L2 for
    Gaussian differences. Over a whole vocabulary that is ten times as fast.
    """
    far = square_distance(a, b).clamp_min(0).sqrt() * (2 * a.shape[1] / math.pi) ** 0.5
    short = far.topk(min(SHORTLIST, b.shape[0]), largest=False).indices  # (n, s)
    return far.scatter(1, short, (a[:, None] - b[short]).abs().sum(-1))


def match(view: View, seen: torch.Tensor, known: torch.Tensor, norm: int = 2) -> Guess:
    """Nearest candidates by features per KV head. seen: (n, G, f) of the view; known: (V, G, f).

    norm: 2 = squared L2, 1 = L1. In a sealed block heads are shuffled apart, so a candidate's distance is the sum
    over heads of its nearest row there.
    """
    measure = square_distance if norm == 2 else absolute_distance
    bag = torch.ones(view.tokens, dtype=torch.int64)
    if not view.rules.seal_tokens:
        return Guess(measure(seen.flatten(1), known.flatten(1)), bag)
    heads = [measure(seen[:, g], known[:, g]) for g in range(seen.shape[1])]  # G x (n, V)
    distance = torch.empty_like(heads[0])
    for first, last in view.blocks:
        distance[first:last] = sum(head[first:last].amin(0) for head in heads)
        bag[first:last] = last - first
    return Guess(distance, bag)
