"""Temperature, min-p, top-k and top-p sampling of rows of logits on a GPU, one program a row, without sorting.

It knows numbers only: rules come as a table and the point to draw at is one of them, so nothing here is random. Every
cut is found by bisection over the float's bits with sums over the row, so a row is read a few dozen times from the
cache instead of being sorted; sums are of float32 weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tessera_kernels.checks import require

# columns of a row of rules: temperature (0: greedy), log(min_p), top_p, top_k (0: off), point in [0, 1),
# then EDITS ids (-1: none) and as many numbers to add to their logits (-inf bans)
FIELDS = 5
_BLOCK = 1024


@triton.jit
def _edit_kernel(logits, rules, row_stride, WIDTH: tl.constexpr, FIRST: tl.constexpr, EDITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EDITS)
    at = rules + row * WIDTH + FIRST + e
    index = tl.load(at).to(tl.int64)
    add = tl.load(at + EDITS).to(tl.float32)
    place = logits + row * row_stride + index
    value = tl.load(place, mask=index >= 0, other=0.0)
    # a ban also silences what is not finite
    tl.store(place, tl.where(add == -float("inf"), add, value + add), mask=index >= 0)


@triton.jit
def _order(x):
    """float32 as int32 that sort like them; -0 counts as +0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weight_of(key, top):
    """exp(value - top) of the float that has this order."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return tl.exp(bits.to(tl.float32, bitcast=True) - top)


@triton.jit
def _scaled(x, start, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """Scaled logits at start.. (-inf past the row)."""
    c = start + tl.arange(0, BLOCK)
    return tl.div_rn(tl.load(x + c, mask=c < V, other=-float("inf")), temperature)


@triton.jit
def _above(x, keys, top, temperature, COUNT: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    """(8,) float64: how many elements, or which mass, lie above each of the (8,) int32 keys."""
    acc = tl.zeros((8, BLOCK), tl.float32)
    for start in range(0, V, BLOCK):
        value = _scaled(x, start, temperature, V, BLOCK)
        if COUNT:
            weight = tl.full((BLOCK,), 1.0, tl.float32)
        else:
            weight = tl.exp(value - top)
        acc += tl.where(_order(value)[None, :] > keys[:, None], weight[None, :], 0.0)
    return tl.sum(acc.to(tl.float64), 1)


@triton.jit
def _search(x, low, high, bound, top, temperature, COUNT: tl.constexpr, OR_EQUAL: tl.constexpr, V: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """The smallest key in low..high above which lies less than `bound` (OR_EQUAL: at most); high is one."""
    outside = low.to(tl.int64) - 1
    inside = high.to(tl.int64)
    i = tl.arange(0, 8) + 1
    while inside - outside > 1:
        keys = outside + (inside - outside) * i // 8  # (8,) int64
        above = _above(x, keys.to(tl.int32), top, temperature, COUNT, V, BLOCK)
        if OR_EQUAL:
            good = above <= bound
        else:
            good = above < bound
        # the first key may be `outside` itself, which is never good by what it is
        good = good & (keys > outside)
        found = tl.min(tl.where(good, keys, inside), 0)
        outside = tl.max(tl.where(keys < found, keys, outside), 0)
        inside = found
    return inside.to(tl.int32)


@triton.jit
def _at(x, key, top, temperature, COUNT: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    """What lies above one key, and how many elements have it, both float64."""
    above = tl.max(_above(x, tl.zeros((8,), tl.int32) + key, top, temperature, COUNT, V, BLOCK), 0)
    same = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        value = _scaled(x, start, temperature, V, BLOCK)
        inside = start + tl.arange(0, BLOCK) < V
        same += ((_order(value) == key) & inside).to(tl.float32)
    return above, tl.sum(same, 0).to(tl.float64)


@triton.jit
def _lowest_from(x, key, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest order at or above `key` that an element has."""
    least = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    for start in range(0, V, BLOCK):
        order = _order(_scaled(x, start, temperature, V, BLOCK))
        least = tl.minimum(least, tl.where(order >= key, order, 0x7FFFFFFF))
    return tl.min(least, 0)


@triton.jit
def _nth_equal(x, key, nth, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """Index of the nth (from 0) element of that order."""
    seen = tl.zeros((), tl.int32)
    found = tl.zeros((), tl.int32)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        same = ((_order(_scaled(x, start, temperature, V, BLOCK)) == key) & (c < V)).to(tl.int32)
        count = seen + tl.cumsum(same, 0)
        found = tl.maximum(found, tl.max(tl.where((same > 0) & (count == nth + 1), c, 0), 0))
        seen += tl.sum(same, 0)
    return found


@triton.jit
def _in_order(x, low, target, top, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """Index of the element, in the order of the vocabulary, in whose weight the running mass passes `target`."""
    before = tl.zeros((), tl.float64)
    found = tl.full((), V, tl.int32)
    last = tl.zeros((), tl.int32)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = _scaled(x, start, temperature, V, BLOCK)
        weight = tl.where((_order(value) >= low) & (c < V), tl.exp(value - top), 0.0).to(tl.float64)
        running = before + tl.cumsum(weight, 0)
        found = tl.minimum(found, tl.min(tl.where((running > target) & (weight > 0), c, V), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, c, 0), 0))
        before += tl.sum(weight, 0)
    return tl.where(found < V, found, last)


@triton.jit
def _sample_kernel(logits, picked, rules, row_stride, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    rule = rules + row * WIDTH
    temperature = tl.load(rule).to(tl.float32)
    best = tl.load(picked + row)
    if (temperature <= 0) | (best < 0):  # greedy, or not finite: the largest stands
        return
    x = logits + row * row_stride
    top = tl.div_rn(tl.load(x + best), temperature)
    low = _order(top + tl.load(rule + 1).to(tl.float32))
    high = _order(top)
    top_p = tl.load(rule + 2)
    top_k = tl.load(rule + 3)
    point = tl.load(rule + 4)
    # how many of the elements that equal the lowest kept one are kept; the first by index are
    ties_kept = tl.full((), 1 << 30, tl.float64)
    if top_k > 0:
        low = _search(x, low, high, top_k, top, temperature, True, False, V, BLOCK)
        above, ties = _at(x, low, top, temperature, True, V, BLOCK)
        ties_kept = top_k - above
    above, ties = _at(x, low, top, temperature, False, V, BLOCK)
    ties_kept = tl.minimum(ties_kept, ties)
    weight = _weight_of(low, top).to(tl.float64)
    mass = above + ties_kept * weight
    if top_p < 1:
        bound = top_p * mass
        nucleus = _search(x, low, high, bound, top, temperature, False, False, V, BLOCK)
        above, ties = _at(x, nucleus, top, temperature, False, V, BLOCK)
        ties = tl.where(nucleus == low, ties_kept, ties)
        weight = _weight_of(nucleus, top).to(tl.float64)
        reach = tl.ceil((bound - above) / tl.maximum(weight, 1e-300))
        ties_kept = tl.minimum(tl.maximum(reach, 1.0), ties)
        mass = above + ties_kept * weight
        low = nucleus
    target = point * mass
    if (top_k > 0) | (top_p < 1):  # falling order, equals by index
        key = _search(x, low, high, target, top, temperature, False, True, V, BLOCK)
        key = _lowest_from(x, key, temperature, V, BLOCK)
        above, ties = _at(x, key, top, temperature, False, V, BLOCK)
        ties = tl.where(key == low, ties_kept, ties)
        weight = _weight_of(key, top).to(tl.float64)
        nth = tl.floor((target - above) / tl.maximum(weight, 1e-300))
        nth = tl.maximum(tl.minimum(nth, ties - 1), 0.0).to(tl.int32)
        token = _nth_equal(x, key, nth, temperature, V, BLOCK)
    else:
        token = _in_order(x, low, target, top, temperature, V, BLOCK)
    tl.store(picked + row, token.to(tl.int64))


def _check(logits: torch.Tensor, rules: torch.Tensor) -> int:
    """Raises ValueError for a wrong shape, dtype or stride. Returns the number of edits a row."""
    require(logits.dim() == 2 and logits.dtype is torch.float32 and logits.stride(1) == 1,
            "logits is %s %s; want (R, V) torch.float32 with contiguous rows", tuple(logits.shape),
            logits.dtype)  # fmt: skip
    require(rules.dim() == 2 and rules.dtype is torch.float64 and rules.is_contiguous()
            and rules.shape[0] == logits.shape[0] and rules.shape[1] >= FIELDS and (rules.shape[1] - FIELDS) % 2 == 0,
            "rules is %s %s; want (%d, %d + 2 E) torch.float64 contiguous", tuple(rules.shape), rules.dtype,
            logits.shape[0], FIELDS)  # fmt: skip
    edits: int = (rules.shape[1] - FIELDS) // 2
    require(edits & (edits - 1) == 0, "rules hold %d edits a row; want a power of two or none", edits)
    return edits


def edit_logits(logits: torch.Tensor, rules: torch.Tensor) -> None:
    """Adds each rule's numbers to the logits of its ids, in place; ids of a row differ. Safe in a CUDA graph.

    logits (R, V) fp32; rules (R, FIELDS + 2 E) fp64, see FIELDS. Ids are trusted. Raises ValueError for a wrong
    shape, dtype or stride.
    """
    edits = _check(logits, rules)
    if edits and logits.shape[0]:
        _edit_kernel[(logits.shape[0],)](logits, rules, logits.stride(0), WIDTH=rules.shape[1], FIRST=FIELDS,
                                         EDITS=edits, num_warps=1)  # fmt: skip


def sample_rows(logits: torch.Tensor, rules: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """Replaces the largest element by a drawn one where a row's temperature is above 0, in place; returns picked.

    logits (R, V) fp32; rules (R, FIELDS + 2 E) fp64, see FIELDS; picked (R,) int64: the index of each row's largest
    element, or -1 for a row to be left alone. min-p, then top-k, then top-p; the draw is the element of the kept ones
    (falling, equals by index; in the vocabulary's order when neither top-k nor top-p is on) in which the running mass
    passes point * mass. Safe in a CUDA graph. Raises ValueError for a wrong shape, dtype or stride. Reference:
    engine.runner.sampler.sample_row. Sources: Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024,
    arXiv:2407.01082 (min-p).
    """
    _check(logits, rules)
    rows, vocab = logits.shape
    require(picked.shape == (rows,) and picked.dtype is torch.int64 and picked.is_contiguous(),
            "picked is %s %s; want (%d,) torch.int64 contiguous", tuple(picked.shape), picked.dtype, rows)  # fmt: skip
    if rows:
        block = min(_BLOCK, max(128, triton.next_power_of_2(vocab)))
        _sample_kernel[(rows,)](logits, picked, rules, logits.stride(0), V=vocab, WIDTH=rules.shape[1], BLOCK=block,
                                num_warps=8)  # fmt: skip
    return picked
