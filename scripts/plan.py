"""How many requests fit: capacity of a model folder, with its own vocabulary and patched, for traffic in base tokens.

    python -m scripts.plan MODEL --patch DIR --pool-bytes 8GiB --arrival-rate 2 --input-base-tokens 400
                           --output-base-tokens 250 [--domain NAME] [--json]

Memory is counted in engine tokens; rho (engine tokens for a base token) only turns the traffic into them. What is not
measured is 1. Nothing is started and no weight is read. Formulas: docs/vocabularies.md, "Cache sizing".
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from engine.core.config import EngineConfig, make
from engine.core.demand import PRIOR, RhoStatistics, advertise
from engine.core.errors import ConfigError
from engine.loading.spec import ModelSpec, read_config
from engine.patching.place import find
from engine.patching.reduction import Reduction, load_reduction
from vattention_ext import KvGeometry

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
PLANNED = ("kv_pool_bytes", "kv_page_bytes", "kv_layout", "dtype", "max_model_len", "token_reduction")


@dataclass(frozen=True)
class Traffic:
    """input, output: mean base tokens of a request. spread: standard deviation of the output over its mean.
    rate: requests a second. prefill_tokens_per_s, token_s: of the machine, in engine tokens; None = not given."""

    input: float
    output: float
    spread: float
    rate: float | None
    prefill_tokens_per_s: float | None
    token_s: float | None


@dataclass(frozen=True)
class Cost:
    """rho of a side, its standard error and its variance for each base token."""

    rho: float
    se: float = 0.0
    phi: float = 0.0

    @classmethod
    def of(cls, side: RhoStatistics | None, prior: float) -> Cost:
        """What was measured, or the prior, which says nothing of its own error."""
        return cls(prior) if side is None else cls(side.rho, side.se, side.phi)


@dataclass(frozen=True)
class Resident:
    """Memory of one running request at a random moment, in groups: mean, variance, and how far the mean moves when rho
    is wrong by one standard error (which it is for all requests alike)."""

    mean: float
    variance: float
    shared: float


def resident(traffic: Traffic, into: Cost, out: Cost, group_tokens: float) -> Resident:
    """The prompt, what was generated so far (seen at a random moment, long outputs are seen more often; outputs are
    taken as lognormal) and, on average, half a group of rounding."""
    stretch = 1 + traffic.spread**2
    output = out.rho * traffic.output
    age, age_2 = output * stretch / 2, output**2 * stretch**3 / 3
    tokens = into.rho * traffic.input + age
    variance = age_2 - age**2 + into.phi * traffic.input + out.phi * traffic.output
    shared = math.hypot(into.se * traffic.input, out.se * traffic.output * stretch / 2)
    return Resident(tokens / group_tokens + 0.5, variance / group_tokens**2 + 1 / 12, shared / group_tokens)


def most_at_once(pool_groups: int, one: Resident, risk: float) -> int:
    """The most requests n with n mean + z sqrt(n variance + (n shared)^2) <= pool."""
    z = NormalDist().inv_cdf(1 - risk)

    def fits(n: int) -> bool:
        return n * one.mean + z * math.sqrt(n * one.variance + (n * one.shared) ** 2) <= pool_groups

    low, high = 0, max(1, int(pool_groups / one.mean) + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def side_by_side(geometry: KvGeometry, pool_groups: int, traffic: Traffic, risk: float, into: Cost, out: Cost
                 ) -> dict[str, float | None]:
    """One column of the plan."""
    group_tokens = geometry.page_bytes / geometry.token_bytes
    prompt, output = into.rho * traffic.input, out.rho * traffic.output
    one = resident(traffic, into, out, group_tokens)
    most = most_at_once(pool_groups, one, risk)
    found: dict[str, float | None] = {
        "rho in": into.rho, "rho out": out.rho,
        "engine tokens a request": prompt + output,
        "groups a request, at its end": geometry.groups_for(math.ceil(prompt + output)),
        "groups a request, on average": one.mean,
        "requests at once, all at their end": pool_groups // geometry.groups_for(math.ceil(prompt + output)),
        "requests at once, at the risk": most,  # and so --max-num-seqs
    }  # fmt: skip
    if traffic.token_s is not None:
        seconds = output * traffic.token_s
        if traffic.prefill_tokens_per_s is not None:
            seconds += prompt / traffic.prefill_tokens_per_s
        found |= {"seconds a request": seconds, "requests a second, at most": most / seconds}
        if traffic.rate is not None:
            running = traffic.rate * seconds
            found |= {"requests at once, by Little's law": running, "part of the pool they hold":
                      running * one.mean / pool_groups}  # fmt: skip
    return found


def pool_of(options: argparse.Namespace, spec: ModelSpec, folder: Path, element_bytes: int, patched: bool
            ) -> tuple[int, dict[str, int]]:
    """Bytes of the pool, and how they came about. Raises ConfigError when neither size is given or nothing is left."""
    if options.kv_pool_bytes is not None:
        return options.kv_pool_bytes, {}
    if options.device_bytes is None:
        raise ConfigError("give --pool-bytes, or --device-bytes of the accelerator's memory")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"{folder}: has no *.safetensors to take from --device-bytes; give --pool-bytes")
    untied = spec.vocab * spec.hidden * element_bytes if patched and spec.tie else 0
    used = int(options.device_bytes * options.utilization)
    left = used - weights - untied - options.other_bytes
    if left < 1:
        raise ConfigError(f"--device-bytes {options.device_bytes}: {used} may be used, and weights and --other-bytes "
                          f"take {weights + untied + options.other_bytes}")
    return left, {"device bytes used": used, "weights": weights, "head of its own, once patched": untied,
                  "activations and graphs": options.other_bytes}  # fmt: skip


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed. Raises ConfigError."""
    given = {name: getattr(options, name) for name in PLANNED if getattr(options, name) is not None}
    config = make(EngineConfig, given)
    folder = Path(options.model)
    spec = read_config(folder)
    dtype = config.dtype if config.dtype != "auto" else spec.dtype
    length = config.max_model_len or spec.context_tokens
    if length > spec.context_tokens:
        raise ConfigError(f"--max-model-len {length} exceeds the model's {spec.context_tokens} positions")
    patch = find(options.patch) if options.patch else find(folder)
    if options.patch and patch is None:
        raise ConfigError(f"--patch {options.patch}: holds no artefact (patch.json)")
    reduction = load_reduction(config.token_reduction, patch, options.domain)
    try:
        geometry = KvGeometry(layers=spec.layers, kv_heads=spec.kv_heads, head_dim=spec.head_dim, max_tokens=length,
                              element_bytes=ELEMENT_BYTES[dtype], slots=1, page_bytes=config.kv_page_bytes,
                              layout=config.kv_layout)  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None
    options.kv_pool_bytes = config.kv_pool_bytes
    pool_bytes, taken = pool_of(options, spec, folder, ELEMENT_BYTES[dtype], patch is not None)
    groups = pool_bytes // geometry.group_bytes
    if groups < 1:
        raise ConfigError(f"a pool of {pool_bytes} bytes holds no group of {geometry.group_bytes}")
    traffic = Traffic(options.input_base_tokens, options.output_base_tokens, options.output_spread,
                      options.arrival_rate, options.prefill_tokens_per_s, options.token_s)
    columns = {"base": (Cost(1.0), Cost(1.0))}
    if patch is not None or reduction.into or reduction.out or reduction.prior != PRIOR:
        columns["patched"] = tuple(Cost.of(side, reduction.prior) for side in (reduction.into, reduction.out))  # type: ignore[assignment]
    return {
        "model": str(folder), "patch": None if patch is None else str(patch), "domain": reduction.domain,
        "risk": options.risk, "taken from the device": taken,
        "memory": _memory(geometry, pool_bytes, groups, reduction),
        "context": _context(length, spec.context_tokens, reduction, options),
        "requests": {name: side_by_side(geometry, groups, traffic, options.risk, *sides)
                     for name, sides in columns.items()},
        "warnings": [text for text in (reduction.warning, _unmeasured(reduction, columns)) if text],
    }  # fmt: skip


def _memory(geometry: KvGeometry, pool_bytes: int, groups: int, reduction: Reduction) -> dict[str, float]:
    """What does not depend on the traffic."""
    token_bytes = geometry.token_bytes * geometry.planes
    found = {
        "pool bytes": pool_bytes, "groups": groups, "bytes of a group": geometry.group_bytes,
        "KV bytes of a token": token_bytes, "tokens of a page": geometry.page_bytes / geometry.token_bytes,
        "tokens of the pool": groups * geometry.page_bytes // geometry.token_bytes,
        "addresses of a slot, bytes": geometry.planes * geometry.region_bytes,
    }  # fmt: skip
    side = reduction.into
    if side is not None and side.characters:
        found["KV bytes of a character, base"] = token_bytes * side.base_tokens / side.characters
        found["KV bytes of a character, patched"] = token_bytes * side.patched_tokens / side.characters
    return found


def _context(length: int, positions: int, reduction: Reduction, options: argparse.Namespace) -> dict[str, float]:
    """max_model_len, what it is in base tokens, and the longest that a prompt of the mean length gets at the risk."""
    found: dict[str, float] = {"--max-model-len, engine tokens": length}
    wanted, prompt = options.serve_base_tokens, options.input_base_tokens
    if reduction.into is not None:
        told = advertise(length, reduction.into)
        found |= {f"base tokens, {told.confidence:.0%} of texts": told.likely, "base tokens, any text": told.safe,
                  "base tokens, mean (promise it to nobody)": told.mean}  # fmt: skip
        high = reduction.demand().sides["in"].high(prompt, NormalDist().inv_cdf(1 - options.risk))
        found[f"engine tokens of {prompt:g} base tokens, at the risk"] = math.ceil(high * prompt)
        if wanted is not None:
            found[f"--max-model-len for {wanted} base tokens"] = min(math.ceil(wanted * reduction.into.q99), positions)
    return found


def _unmeasured(reduction: Reduction, columns: dict[str, Any]) -> str | None:
    if "patched" not in columns or reduction.prior != PRIOR:
        return None
    sides = [name for name, side in (("in", reduction.into), ("out", reduction.out)) if side is None]
    return f"rho {' and '.join(sides)} of domain {reduction.domain} was not measured: 1 is taken" if sides else None


def render(result: dict[str, Any]) -> str:
    """The plan for people."""
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"

    lines = [f"{result['model']}, patch {result['patch']}, domain {result['domain']}, risk {result['risk']:g}"]
    for title in ("taken from the device", "memory", "context"):
        lines += ["", title] if result[title] else []
        lines += [f"  {name:42}{number(value):>16}" for name, value in result[title].items()]
    columns = result["requests"]
    lines += ["", f"{'requests':44}" + "".join(f"{name:>16}" for name in columns)]
    for name in columns["base"]:
        lines.append(f"  {name:42}" + "".join(f"{number(column[name]):>16}" for column in columns.values()))
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])


def _at_least(low: float, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number >= low (> low when `above`)."""
    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or value < low or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not a number {'above' if above else 'of at least'} {low:g}")
        return value

    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Flags; those of the engine have the engine's names and spellings."""
    parser = argparse.ArgumentParser(prog="plan", description=(__doc__ or "").split("\n", 1)[0])
    add, positive, count = parser.add_argument, _at_least(0, above=True), _at_least(0)
    add("model", metavar="MODEL", help="folder with config.json")
    add("--patch", metavar="DIR", help="artefact, or a model folder with one (default: MODEL's own)")
    add("--token-reduction", metavar="WHAT", help="auto, a file of figures, or a number (as the engine's flag)")
    add("--domain", metavar="NAME", help="stored domain that the traffic is like (default held_out)")
    add("--kv-pool-bytes", "--pool-bytes", metavar="N", help="physical KV memory; 8GiB, 512MiB or a number")
    add("--device-bytes", type=lambda text: int(positive(text)), metavar="N", help="or: memory of the device")
    add("--utilization", type=positive, default=0.9, help="part of it to use (%(default)s)")
    add("--other-bytes", type=lambda text: int(count(text)), default=0, help="activations and graphs (%(default)s)")
    add("--kv-page-bytes", metavar="N")
    add("--kv-layout", choices=("mega", "per_layer"))
    add("--dtype", metavar="NAME")
    add("--max-model-len", metavar="N", help="engine tokens (default: the model's)")
    add("--serve-base-tokens", type=int, metavar="N", help="say which --max-model-len serves so many base tokens")
    add("--arrival-rate", type=positive, metavar="R", help="requests a second")
    add("--input-base-tokens", type=positive, default=400.0, metavar="N", help="mean of a prompt (%(default)s)")
    add("--output-base-tokens", type=positive, default=250.0, metavar="N", help="mean of an output (%(default)s)")
    add("--output-spread", type=count, default=0.8, metavar="S", help="its deviation over its mean (%(default)s)")
    add("--prefill-tokens-per-s", type=positive, metavar="N", help="of the machine, in engine tokens")
    add("--token-s", type=positive, metavar="S", help="seconds from token to token of one request")
    add("--risk", type=positive, default=1e-3, help="that the running requests outgrow the pool (%(default)s)")
    add("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print the plan. Returns the exit status."""
    options = parse(arguments)
    try:
        if not options.risk < 0.5:
            raise ConfigError(f"--risk {options.risk} is not below 0.5")
        result = plan(options)
    except ConfigError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if options.json else render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
