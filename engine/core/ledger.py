"""The one account of KV memory, in closed form: free = total - sum over sequences of groups(reserved tokens).

It counts page groups. It never sees a page, a slot, a byte or a tensor: `groups_for(tokens)` is all it is told, and
whoever maps memory may still refuse; that is `withhold`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.core.errors import ConfigError, InvariantError, Refusal

NO_LIMIT_TOKENS = 1 << 40


@dataclass(frozen=True, slots=True)
class AdmissionRule:
    """When a sequence may start and grow. Presets: UPSTREAM (as published, for replay) and EXACT (serving).

    watermark: part of all groups that an admission leaves free. watermark_when_idle: also while nothing runs (then
    something may wait forever). append_only_when_needed: a decode is refused only if it needs a group and none is
    free; otherwise whenever none is free. requeue_by_arrival: a victim goes back in order of arrival instead of to
    the front. preemption_cap: after so many preemptions a sequence waits until it fits whole and is then never a
    victim (None: never). ignore_restarted: the head-of-line length check applies to what already ran, too.
    """

    name: str
    watermark: float
    watermark_when_idle: bool
    append_only_when_needed: bool
    requeue_by_arrival: bool
    preemption_cap: int | None
    ignore_restarted: bool


UPSTREAM = AdmissionRule(
    name="upstream",
    watermark=0.01,
    watermark_when_idle=True,
    append_only_when_needed=False,
    requeue_by_arrival=False,
    preemption_cap=None,
    ignore_restarted=True,
)
EXACT = AdmissionRule(
    name="exact",
    watermark=0.01,
    watermark_when_idle=False,
    append_only_when_needed=True,
    requeue_by_arrival=True,
    preemption_cap=3,
    ignore_restarted=False,
)
ADMISSION_RULES = {rule.name: rule for rule in (UPSTREAM, EXACT)}


class KvLedger:
    """Reservations of sequences against a pool.

    total_groups: the pool, >= 1. groups_for(tokens): groups that hold so many tokens; 0 for 0, never falling.
    Raises ConfigError when the pool is empty.
    """

    def __init__(self, total_groups: int, groups_for: Callable[[int], int], rule: AdmissionRule = EXACT) -> None:
        if total_groups < 1:
            raise ConfigError(f"total_groups={total_groups} holds no token; the pool needs at least 1 group")
        self.total_groups = total_groups
        self.groups_for = groups_for
        self.rule = rule
        self.free_groups = total_groups
        self.watermark_groups = int(rule.watermark * total_groups)
        self.whole_groups = 0  # held by sequences that reserved up to their end
        self.withheld_groups = 0  # believed free, but refused by who maps memory
        self._held: dict[int, int] = {}
        self._whole: set[int] = set()
        self._covers: dict[int, int] = {}  # groups -> tokens they hold; filled on demand
        self._limit_tokens = NO_LIMIT_TOKENS
        self._context_tokens: int | None = None

    def bind(self, *, limit_tokens: int, reserve_context: bool) -> None:
        """Tell an unused ledger the longest sequence, and whether each one reserves that much from the start.

        Such a reservation (orca, faster_transformer) has no watermark: nothing that runs will ever grow.
        Raises ConfigError when one such reservation is more than the pool.
        """
        if self._held:
            raise InvariantError("bind() on a ledger that is in use")
        self._limit_tokens = limit_tokens
        self._covers.clear()
        if reserve_context:
            self._context_tokens = limit_tokens
            self.watermark_groups = 0
            need = self.groups_for(limit_tokens)
            if need > self.total_groups:
                raise ConfigError(
                    f"this policy reserves max_model_len={limit_tokens} tokens = {need} groups for each request and "
                    f"the pool has {self.total_groups}; use a shorter --max-model-len or a larger pool"
                )

    @property
    def reserved_groups(self) -> int:
        """Groups held by all sequences together."""
        return self.total_groups - self.free_groups - self.withheld_groups

    def resize(self, total_groups: int, fit_tokens: int) -> None:
        """Another size of the pool. Nobody loses what it holds: while that is more, free_groups is negative, nothing
        is admitted, and who needs a group is refused (the scheduler then preempts).

        fit_tokens: what one sequence must still reach with the pool to itself. Raises ConfigError when it could not;
        nothing has changed then.
        """
        watermark_groups = 0 if self._context_tokens else int(self.rule.watermark * total_groups)
        usable = total_groups - (watermark_groups if self.rule.watermark_when_idle else 0)
        need = self.groups_for(self._context_tokens or fit_tokens)
        if total_groups < 1 or need > usable:
            raise ConfigError(f"a pool of {total_groups} groups leaves {max(0, usable)} to one sequence, and one needs "
                              f"{need}")  # fmt: skip
        held = self.reserved_groups
        self.total_groups, self.watermark_groups = total_groups, watermark_groups
        self.withheld_groups = min(self.withheld_groups, max(0, total_groups - held))
        self.free_groups = total_groups - held - self.withheld_groups

    def fit_tokens(self) -> int:
        """Tokens that one sequence can reach with the pool to itself, limit included."""
        usable = self.total_groups - (self.watermark_groups if self.rule.watermark_when_idle else 0)
        return self._cover(0, usable) if usable > 0 else 0

    def may_admit(self, tokens: int) -> Refusal | None:
        """None if a sequence of `tokens` known tokens may start now, else why not (in groups)."""
        need = self.groups_for(self._context_tokens or tokens)
        idle = not self._held and not self.rule.watermark_when_idle
        if self.free_groups - need >= (0 if idle else self.watermark_groups):
            return None
        return Refusal("pages", need, self.free_groups)

    def may_finish(self, length_cap: int, others_cap: int | None) -> Refusal | None:
        """None if a sequence can reach `length_cap` tokens whatever else happens, else why not (in groups).

        others_cap: None for an ordinary sequence: it must fit beside those that reserved their end. For one about to
        reserve its own end: the largest cap of the ordinary sequences that run; the largest of them must still fit
        beside it, so that the oldest never has to be preempted.
        """
        need = self.groups_for(length_cap)
        beside = 0 if others_cap is None else self.groups_for(others_cap)
        if self.whole_groups + need + beside <= self.total_groups:
            return None
        return Refusal("pages", need + beside, self.total_groups - self.whole_groups)

    def reserve(self, seq_id: int, tokens: int, *, whole: bool = False) -> int:
        """Take the groups of `tokens` tokens for a new sequence. Returns how many tokens they hold."""
        if seq_id in self._held:
            raise InvariantError(f"sequence {seq_id} holds memory already")
        tokens = self._context_tokens or tokens
        groups = self.groups_for(tokens)
        if groups > self.free_groups:
            raise InvariantError(f"reserve({tokens} tokens) needs {groups} groups, {self.free_groups} are free")
        self._held[seq_id] = groups
        self.free_groups -= groups
        if whole:
            self._whole.add(seq_id)
            self.whole_groups += groups
        return self._cover(tokens, groups)

    def may_append(self, seq_id: int, tokens: int) -> bool:
        """Whether a running sequence may have `tokens` tokens now (see AdmissionRule.append_only_when_needed)."""
        need = self.groups_for(tokens) - self._held[seq_id]
        if need <= 0 and self.rule.append_only_when_needed:
            return True
        return self.free_groups > 0 and need <= self.free_groups

    def grow(self, seq_id: int, tokens: int) -> int:
        """Take what a running sequence lacks for `tokens` tokens. Returns how many tokens it may have then."""
        held = self._held[seq_id]
        groups = self.groups_for(tokens)
        if groups - held > self.free_groups:
            raise InvariantError(f"grow to {tokens} tokens lacks {groups - held} groups, {self.free_groups} are free")
        if groups > held:
            self._held[seq_id] = groups
            self.free_groups -= groups - held
        return self._cover(tokens, self._held[seq_id])

    def release(self, seq_id: int) -> int:
        """Give back everything a sequence holds. Returns how many groups that were."""
        groups = self._held.pop(seq_id)
        self.free_groups += groups
        if seq_id in self._whole:
            self._whole.remove(seq_id)
            self.whole_groups -= groups
        return groups

    def withhold(self) -> None:
        """Memory was refused though we thought some free: believe in none until restore() says otherwise."""
        if self.free_groups > 0:
            self.withheld_groups += self.free_groups
            self.free_groups = 0

    def restore(self, groups: int | None = None) -> None:
        """Believe again in `groups` of the withheld groups (None: in all)."""
        back = self.withheld_groups if groups is None else min(groups, self.withheld_groups)
        self.withheld_groups -= back
        self.free_groups += back

    def holds(self, seq_id: int) -> int:
        """Groups held by one sequence; 0 for one that holds nothing."""
        return self._held.get(seq_id, 0)

    def _cover(self, tokens: int, groups: int) -> int:
        """The most tokens that `groups` groups hold; `tokens` is known to fit. Gallops, then bisects; cached."""
        found = self._covers.get(groups)
        if found is not None:
            return found
        low, step = tokens, 1
        while low + step <= self._limit_tokens and self.groups_for(low + step) <= groups:
            low += step
            step *= 2
        high = min(low + step, self._limit_tokens + 1)  # the first count known not to fit
        while high - low > 1:
            middle = (low + high) // 2
            if self.groups_for(middle) <= groups:
                low = middle
            else:
                high = middle
        self._covers[groups] = low
        return low

    def check(self, reserved_tokens: Mapping[int, int] | None = None) -> None:
        """Raise InvariantError unless the books balance; with reserved tokens by seq_id, unless they are covered."""
        held = sum(self._held.values())
        balanced = self.free_groups + self.withheld_groups + held == self.total_groups
        if not balanced or (self.free_groups < 0 and held <= self.total_groups):
            raise InvariantError(
                f"free {self.free_groups} + withheld {self.withheld_groups} + held {held} != {self.total_groups}"
            )
        if sum(self._held[seq_id] for seq_id in self._whole) != self.whole_groups:
            raise InvariantError(f"whole_groups={self.whole_groups} is not what {len(self._whole)} sequences hold")
        if reserved_tokens is None:
            return
        if reserved_tokens.keys() != self._held.keys():
            raise InvariantError(f"holders {sorted(self._held)} are not the running {sorted(reserved_tokens)}")
        for seq_id, tokens in reserved_tokens.items():
            if self.groups_for(tokens) > self._held[seq_id]:
                raise InvariantError(f"sequence {seq_id} has {tokens} tokens in {self._held[seq_id]} groups")
