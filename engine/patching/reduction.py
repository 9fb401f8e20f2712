"""Where the figures of rho come from: the statistics stored in an artefact, a file, or a number.

A file is JSON with any of: `statistics` and `statistics_out` (domain -> figures, as in an artefact's meta and in
report.json), `artefact_sha256` (whose figures they are), `output_base_tokens` (lengths of finished outputs in base
tokens), or `rho` with its `provenance`. What no text can cost more than is the artefact's own to say, not a file's. It
knows no traffic; what is done with the figures is engine/core/demand.py's and growth.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.demand import PRIOR, Demand, RhoEstimator, RhoStatistics
from engine.core.errors import ConfigError, LoadError
from engine.core.growth import HISTORY
from engine.patching.place import JSON_NAME, MAX_JSON_BYTES
from engine.tokenization.jsonfile import read_object

if TYPE_CHECKING:
    from engine.patching.artefact import Artefact

STATISTICS, STATISTICS_OUT, LENGTHS = "statistics", "statistics_out", "output_base_tokens"
SHA256 = "artefact_sha256"
DEFAULT_DOMAIN = "held_out"
IN_SAMPLE = "corpus"  # the texts that the vocabulary was made for: its figures flatter
LOWEST, HIGHEST = 0.01, 100.0


@dataclass(frozen=True)
class Reduction:
    """What is known of rho before any traffic. into, out: the sides, None = nothing. prior: believed of a side without
    statistics. base_lengths: outputs of an earlier deployment [base tokens]. warning: what is wrong with the source."""

    domain: str
    into: RhoStatistics | None = None
    out: RhoStatistics | None = None
    prior: float = PRIOR
    base_lengths: tuple[int, ...] = ()
    warning: str | None = None

    def demand(self) -> Demand:
        """Estimators that begin with it."""
        return Demand(*(RhoEstimator(side, prior=self.prior) for side in (self.into, self.out)))


def load_reduction(setting: str | None, patch: Path | None, domain: str | None = None) -> Reduction:
    """What `--token-reduction` and `--token-reduction-domain` say. patch: the artefact's folder, if there is one.

    setting: None or "auto" = the artefact's own figures; a file; or a number, which is taken and warned about. Raises
    ConfigError or LoadError naming what cannot be used.
    """
    name = domain or DEFAULT_DOMAIN
    number = _number(setting)
    if number is not None:
        return Reduction(name, prior=number, warning=_unfounded(number, "--token-reduction"))
    artefact = None
    if patch is not None:
        from engine.patching.artefact_files import read  # numpy is imported only where it is needed

        artefact = read(patch)
    if setting is None or setting == "auto":
        if patch is None or artefact is None:
            return Reduction(name)
        place, source = patch / JSON_NAME, {**artefact.meta, SHA256: artefact.sha256}
    else:
        place = Path(setting)
        if not place.is_file():
            raise ConfigError(f"--token-reduction {setting[:200]!r} is neither auto, a number nor a file")
        source = read_object(place, MAX_JSON_BYTES)
    try:
        return _from_json(source, name, artefact, required=domain is not None)
    except ConfigError as error:
        raise LoadError(f"{place}: {error}") from None


def rho_max_in(artefact: Artefact) -> int:
    """The most tokens that one base token of a text can become: the parts of the longest removed one."""
    return max(map(len, artefact.removed.values()), default=1)


def _from_json(source: Mapping[str, Any], domain: str, artefact: Artefact | None, *, required: bool) -> Reduction:
    certain = {} if artefact is None else {"rho_max": rho_max_in(artefact)}
    into, out = _side(source, STATISTICS, domain, certain), _side(source, STATISTICS_OUT, domain, {})
    if required and into is None and out is None:
        known = sorted({*_domains(source, STATISTICS), *_domains(source, STATISTICS_OUT)})
        raise ConfigError(f"has no figures of domain {domain[:80]!r}; it has: {', '.join(known) or 'none'}")
    lengths = source.get(LENGTHS, [])
    if not isinstance(lengths, list) or any(type(n) is not int or not 0 <= n < 1 << 32 for n in lengths):
        raise ConfigError(f"{LENGTHS} is not a list of numbers of tokens")
    prior, warning = PRIOR, None
    if "rho" in source and (into is None or out is None):
        prior = _in_range(source["rho"])
        if not str(source.get("provenance") or "").strip():
            warning = _unfounded(prior, "`rho` without `provenance`")
    if domain == IN_SAMPLE:
        warning = "figures of the texts that the vocabulary was made for flatter it; name another domain"
    if artefact is not None and (into is not None or out is not None):
        if SHA256 not in source:
            unnamed = f"the figures do not say of which vocabulary they are ({SHA256}); they are taken for this one's"
            warning = unnamed if warning is None else f"{warning}; {unnamed}"
        elif source[SHA256] != artefact.sha256:
            raise ConfigError(f"its figures are of another vocabulary than this one, {artefact.sha256[:12]} "
                              f"({SHA256}); measure them again")
    return Reduction(domain, into, out, prior, tuple(lengths[-HISTORY:]), warning)


def _domains(source: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = source.get(key)
    return found if isinstance(found, dict) else {}


def _side(source: Mapping[str, Any], key: str, domain: str, certain: Mapping[str, int]) -> RhoStatistics | None:
    """One domain of one side; None when it was not measured (or on too few texts to say how sure it is). certain:
    figures that count whatever is stored."""
    fields = _domains(source, key).get(domain)
    if not isinstance(fields, dict) or not isinstance(fields.get("documents"), int) or fields["documents"] < 2:
        return None
    return RhoStatistics.of(domain, {**fields, **certain})


def _number(setting: str | None) -> float | None:
    """The number that a setting is, if it is one."""
    try:
        value = float(setting or "")
    except ValueError:
        return None
    return _in_range(value)


def _in_range(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not LOWEST <= value <= HIGHEST:
        raise ConfigError(f"rho {value!r} is not a number in {LOWEST}..{HIGHEST}")
    return float(value)


def _unfounded(rho: float, source: str) -> str:
    return (f"{source}: rho {rho:g} comes without its texts, side and error, so nothing is advertised by it and live "
            "traffic overrules it; measure it with `python -m scripts.patch verify DIR --text FILES --domain NAME "
            "--store`, or give a file with `rho` and `provenance`")
