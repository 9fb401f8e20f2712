"""Temperature, min-p, top-k and top-p sampling of rows of logits on a GPU, without sorting.

It knows numbers only: rules come as a table and the point to draw at is one of them, so nothing here is random. A row
is cut into stretches, one program each, and is read twice, or once where neither top-k nor top-p is on. First its
elements are counted in bins of distance from the largest; from the counts the row's last program guesses in which few
bins the cuts and the draw lie. Then the elements of these are listed and the mass above them is summed, and the last
program finds cuts and draw among what is listed, by bisection over the float's bits. Where the guess was wrong, or a
list too short (thousands of equal logits), that program looks at the whole row instead: slow, and as right.

Masses are integers, in units of 2^-40 of the largest element's: a sum is the same in any order, so nobody else in the
batch can shift a draw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tessera_kernels.checks import require

# columns of a row of rules: temperature (0: greedy), log(min_p), top_p, top_k (0: off), point in [0, 1),
# then EDITS ids (-1: none) and as many numbers to add to their logits (-inf bans)
FIELDS = 5
LISTED = 4096  # elements that a list holds
SLACK = 2.0**-8  # of a mass: how far off the guess from counts may be

_BLOCK = tl.constexpr(8192)  # elements of a stretch
_LAUNCH = {"num_warps": 16, "maxnreg": 64}  # two programs fit into a processor
_UNIT = tl.constexpr(2.0**40)
_NONE = tl.constexpr(-(1 << 31))  # below every float's order
_BINS = tl.constexpr(4096)
_FIRST = tl.constexpr(116 << 8)  # bins are 256 to a power of two, from 2^-11 to 2^5; mass is 0 behind that
_KEYS = tl.constexpr(4)  # looked at side by side
# 64-bit numbers of a row in the workspace, before its bins of 32 bits
_COUNTED, _LISTING, _TOTAL, _ABOVE, _FILLED, _SPANS, _OVER, _HEAD, _STATE = (
    tl.constexpr(i) for i in (0, 1, 2, 3, 6, 9, 15, 16, 32)
)  # fmt: skip


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
def _mass(value, top):
    """exp(value - top), for top >= value, in units of 2^-40."""
    return (tl.exp(value - top) * _UNIT).to(tl.int64)


@triton.jit
def _mass_of(key, top):
    """The mass of the float that has this order."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return _mass(bits.to(tl.float32, bitcast=True), top)


@triton.jit
def _bin(distance):
    """The bin of a distance >= 0; a larger one is never in an earlier bin."""
    bits = distance.to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum((bits >> 15) - _FIRST, 0), _BINS - 1)


@triton.jit
def _weight(b, HALF: tl.constexpr):
    """exp(-distance) at the beginning of a bin, or in its middle."""
    bits = ((b + _FIRST) << 15) + HALF * (1 << 14)
    return tl.exp(-bits.to(tl.float32, bitcast=True))


if triton.knobs.runtime.interpret:

    @triton.jit
    def _count(bins):
        """Bins, and how often each stands among `bins` (_BLOCK,); -1 is none."""
        return tl.arange(0, _BINS), tl.histogram(tl.maximum(bins, 0), _BINS, mask=bins >= 0)

else:
    # Triton's histogram asks all threads about every bin. This one adds to a table in shared memory, each thread its
    # 16 elements, and each thread hands out 8 bins and their counts, in no order.
    _COUNT = tl.constexpr("\n".join([
        "{ .shared .align 4 .b32 sampled[4096]; .reg .b32 base, own, at, one; .reg .pred there;",
        "mov.u32 base, sampled; mov.u32 own, %tid.x; shl.b32 at, own, 2; add.u32 at, at, base; mov.u32 one, 0;",
        *(f"st.shared.u32 [at+{2048 * i}], one;" for i in range(8)),
        "bar.sync 0; mov.u32 one, 1;",
        *(f"setp.ge.s32 there, ${i}, 0; shl.b32 at, ${i}, 2; add.u32 at, at, base; @there red.shared.add.u32 [at], one;"
          for i in range(32, 48)),
        "bar.sync 0; shl.b32 at, own, 2; add.u32 at, at, base;",
        *(f"add.u32 ${i}, own, {512 * i}; ld.shared.u32 ${i + 16}, [at+{2048 * i}];" for i in range(8)),
        *(f"mov.u32 ${i}, 0; mov.u32 ${i + 16}, 0;" for i in range(8, 16)),
        "bar.sync 0; }",
    ]))  # fmt: skip
    _COUNT_OPERANDS = tl.constexpr(",".join(["=&r"] * 32 + ["r"] * 16))

    @triton.jit
    def _count(bins):
        """Bins, and how often each stands among `bins` (_BLOCK,); -1 is none."""
        return tl.inline_asm_elementwise(_COUNT, _COUNT_OPERANDS, [bins], dtype=(tl.int32, tl.int32), is_pure=False,
                                         pack=16)  # fmt: skip


@triton.jit
def _last(arrived, STRETCHES: tl.constexpr):
    """Whether this program is the last of its row here; then it sees what the others wrote."""
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == STRETCHES - 1
    tl.debug_barrier()
    return last


@triton.jit
def _in_order(x, masses, low, point, top, temperature, V: tl.constexpr, STRETCHES: tl.constexpr):
    """Index of the element, in the order of the vocabulary, in whose mass the running one passes point * all."""
    s = tl.arange(0, triton.next_power_of_2(STRETCHES))
    each = tl.load(masses + s, mask=s < STRETCHES, other=0, cache_modifier=".cg")
    through = tl.cumsum(each, 0)
    total = tl.sum(each, 0)
    target = tl.minimum((point * total.to(tl.float64)).to(tl.int64), total - 1)
    stretch = tl.sum((through <= target).to(tl.int32), 0)
    before = tl.sum(tl.where(s < stretch, each, 0), 0)
    at = stretch * _BLOCK + tl.arange(0, _BLOCK)
    value = tl.div_rn(tl.load(x + at, mask=at < V, other=-float("inf")), temperature)
    mass = tl.where((_order(value) >= low) & (at < V), _mass(value, top), 0)
    return tl.min(tl.where(before + tl.cumsum(mass, 0) > target, at, V), 0)


@triton.jit
def _guess(state, table, top_k, top_p, point, slack, LISTED: tl.constexpr):
    """Writes down which bins to list: three spans of first and end, of top-k's cut, of top-p's and of the draw; or one
    span of all that is kept, where a list holds that. table: the row's counts."""
    b = tl.arange(0, _BINS)
    counts = tl.load(table + b, cache_modifier=".cg")
    total = tl.load(state + _TOTAL, cache_modifier=".cg").to(tl.float32) / _UNIT
    seen = tl.cumsum(counts, 0)
    guess = tl.cumsum(counts.to(tl.float32) * _weight(b, True), 0)
    guess = guess * (total / tl.max(guess, 0))
    end = tl.max(tl.where(counts > 0, b + 1, 0), 0)
    # between which two numbers the kept mass is
    least, most = total, total
    k_first = tl.sum((seen < top_k).to(tl.int32), 0)
    cut = (top_k > 0) & (k_first < _BINS - 1)  # who lies in the last bin has no mass
    k_first = tl.where(cut, k_first, 0)
    k_end = tl.where(cut, k_first + 1, 0)
    over = tl.max(tl.where(b < k_first, seen, 0), 0)
    least = tl.where(cut, tl.max(tl.where(b < k_first, guess, 0.0), 0), least)
    most = tl.where(cut, tl.max(tl.where(b < k_end, guess, 0.0), 0), most)
    end = tl.where(cut, k_end, end)
    nucleus = top_p < 1
    share = top_p.to(tl.float32)
    least = tl.where(nucleus, least * share, least) * (1 - slack)
    most = tl.where(nucleus, most * share, most) * (1 + slack)
    p_first = tl.minimum(tl.sum((guess < least).to(tl.int32), 0), end - 1)
    p_end = tl.minimum(tl.sum((guess < most).to(tl.int32), 0) + 1, end)
    end = tl.where(nucleus, p_end, end)
    most = tl.where(nucleus, most + _weight(p_first, False), most)  # the element that reaches top-p is kept
    p_first, p_end = tl.where(nucleus, p_first, 0), tl.where(nucleus, p_end, 0)
    at = point.to(tl.float32)
    d_first = tl.minimum(tl.sum((guess <= at * least * (1 - slack)).to(tl.int32), 0), end - 1)
    d_end = tl.minimum(tl.sum((guess <= at * most * (1 + slack)).to(tl.int32), 0) + 1, end)
    end = tl.where(cut, k_end, end)
    head = tl.max(tl.where(b < end, seen, 0), 0) <= LISTED
    tl.store(state + _HEAD, head.to(tl.int64))
    tl.store(state + _OVER, tl.where(head, 0, over).to(tl.int64))
    tl.store(state + _SPANS, tl.where(head, 0, k_first).to(tl.int64))
    tl.store(state + _SPANS + 1, tl.where(head, end, k_end).to(tl.int64))
    tl.store(state + _SPANS + 2, tl.where(head, 0, p_first).to(tl.int64))
    tl.store(state + _SPANS + 3, tl.where(head, 0, p_end).to(tl.int64))
    tl.store(state + _SPANS + 4, tl.where(head, 0, d_first).to(tl.int64))
    tl.store(state + _SPANS + 5, tl.where(head, 0, d_end).to(tl.int64))


@triton.jit
def _count_kernel(logits, picked, rules, work, tables, row_stride, slack, V: tl.constexpr, WIDTH: tl.constexpr,
                  STRETCHES: tl.constexpr, LISTED: tl.constexpr):  # fmt: skip
    stretch, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rule = rules + row * WIDTH
    best = tl.load(picked + row)
    if best < 0:
        return
    x = logits + row * row_stride
    top = tl.load(x + best)
    if not (tl.abs(top) < float("inf")):  # whoever comes later finds -1, or finds this
        if stretch == 0:
            tl.store(picked + row, -1)
        return
    temperature = tl.load(rule).to(tl.float32)
    if temperature <= 0:
        return
    top = tl.div_rn(top, temperature)
    low = _order(top + tl.load(rule + 1).to(tl.float32))
    top_p, top_k, point = tl.load(rule + 2), tl.load(rule + 3), tl.load(rule + 4)
    at = stretch * _BLOCK + tl.arange(0, _BLOCK)
    value = tl.div_rn(tl.load(x + at, mask=at < V, other=-float("inf")), temperature)
    kept = (at < V) & (_order(value) >= low)
    mass = tl.sum(tl.where(kept, _mass(value, top), 0), 0)
    state, table = work + row * (_STATE + _BINS // 2), tables + row * (2 * _STATE + _BINS) + 2 * _STATE
    falling = (top_k > 0) | (top_p < 1)
    if falling:
        bins, counts = _count(tl.where(kept, _bin(top - value), -1))
        tl.atomic_add(table + bins, counts, mask=counts > 0, sem="relaxed")
        tl.atomic_add(state + _TOTAL, mass, sem="relaxed")
    else:
        tl.store(state + _STATE + stretch, mass)
    if _last(state + _COUNTED, STRETCHES):
        if falling:
            _guess(state, table, top_k, top_p, point, slack, LISTED)
        else:
            token = _in_order(x, state + _STATE, low, point, top, temperature, V, STRETCHES)
            tl.store(picked + row, token.to(tl.int64))


@triton.jit
def _elements(x, listed, start, n, whole, low, wanted, top, temperature, EQUAL: tl.constexpr, LISTED: tl.constexpr):
    """Indices, orders (_NONE where there is nothing) and masses of elements start.. of a list of n, or of the row.
    EQUAL: only those of the order `wanted` are there, and they are ordered by falling index."""
    c = start + tl.arange(0, LISTED)
    at = tl.where(whole, c, tl.load(listed + c, mask=(c < n) & (not whole), other=0, cache_modifier=".cg"))
    value = tl.div_rn(tl.load(x + at, mask=c < n, other=-float("inf")), temperature)
    key = _order(value)
    there = (c < n) & (key >= low)
    if EQUAL:
        return tl.where(there & (key == wanted), -at, _NONE), tl.full((LISTED,), 1, tl.int64)
    else:
        return tl.where(there, key, _NONE), tl.where(there, _mass(value, top), 0)


@triton.jit
def _search(x, listed, n, whole, low, wanted, base, limit, top, temperature, COUNT: tl.constexpr, EQUAL: tl.constexpr,
            LISTED: tl.constexpr):  # fmt: skip
    """The smallest order that an element has above which lies at most `limit`, `base` of it not in the list; what lies
    above it, as mass and as count; and how many elements have it."""
    key0, mass0 = _elements(x, listed, 0, n, whole, low, wanted, top, temperature, EQUAL, LISTED)
    lowest = tl.where(key0 == _NONE, 0x7FFFFFFF, key0)
    least, most = tl.min(lowest, 0), tl.max(key0, 0)
    for start in range(LISTED, n, LISTED):
        key, mass = _elements(x, listed, start, n, whole, low, wanted, top, temperature, EQUAL, LISTED)
        least = tl.minimum(least, tl.min(tl.where(key == _NONE, 0x7FFFFFFF, key), 0))
        most = tl.maximum(most, tl.max(key, 0))
    outside, inside = least.to(tl.int64) - 1, most.to(tl.int64)
    i = tl.arange(0, _KEYS) + 1
    while inside - outside > 1:
        tried = outside + (inside - outside) * i // (_KEYS + 1)
        unit = tl.full((LISTED,), 1, tl.int64) if COUNT else mass0
        above = base + tl.sum(tl.where(key0[None, :] > tried[:, None], unit[None, :], 0), 1)
        for start in range(LISTED, n, LISTED):
            key, mass = _elements(x, listed, start, n, whole, low, wanted, top, temperature, EQUAL, LISTED)
            unit = tl.full((LISTED,), 1, tl.int64) if COUNT else mass
            above += tl.sum(tl.where(key[None, :] > tried[:, None], unit[None, :], 0), 1)
        good = (above <= limit) & (tried > outside)  # `outside` is not, by what it is
        found = tl.min(tl.where(good, tried, inside), 0)
        outside = tl.max(tl.where(tried < found, tried, outside), 0)
        inside = found
    above = tl.sum(tl.where(key0 > inside, mass0, 0), 0)
    over = tl.sum((key0 > inside).to(tl.int64), 0)
    same = tl.sum((key0 == inside).to(tl.int64), 0)
    for start in range(LISTED, n, LISTED):
        key, mass = _elements(x, listed, start, n, whole, low, wanted, top, temperature, EQUAL, LISTED)
        above += tl.sum(tl.where(key > inside, mass, 0), 0)
        over += tl.sum((key > inside).to(tl.int64), 0)
        same += tl.sum((key == inside).to(tl.int64), 0)
    return inside.to(tl.int32), above, over, same


@triton.jit
def _find(x, lists, state, which, low, limit, top, temperature, COUNT: tl.constexpr, V: tl.constexpr,
          LISTED: tl.constexpr):  # fmt: skip
    """_search() in the list of a span, or in the row where the list does not hold the answer; then, which of them."""
    listed = lists + which * LISTED
    n = tl.load(state + _FILLED + which, cache_modifier=".cg").to(tl.int32)
    above = tl.load(state + _ABOVE + which, cache_modifier=".cg")
    over = tl.load(state + _OVER, cache_modifier=".cg")
    base = over if COUNT else above
    key, mass = _elements(x, listed, 0, tl.minimum(n, LISTED), False, low, 0, top, temperature, False, LISTED)
    inside = tl.sum((key != _NONE).to(tl.int64), 0) if COUNT else tl.sum(mass, 0)
    whole = (n > LISTED) | (base > limit) | (base + inside <= limit)
    n = tl.where(whole, V, n)
    base = tl.where(whole, 0, base)
    key, found_above, found_over, same = _search(x, listed, n, whole, low, 0, base, limit, top, temperature, COUNT,
                                                 False, LISTED)  # fmt: skip
    found_above += tl.where(whole, 0, above)
    found_over += tl.where(whole, 0, over)
    return key, found_above, found_over, same, n, whole


@triton.jit
def _draw(x, lists, state, low, top_k, top_p, point, top, temperature, V: tl.constexpr, LISTED: tl.constexpr):
    """Index of the drawn element: cuts by top-k and top-p, then the draw, in falling order, equals by index."""
    head = tl.load(state + _HEAD, cache_modifier=".cg")
    mass = tl.load(state + _TOTAL, cache_modifier=".cg")
    # how many of the elements that equal the lowest kept one are kept; the first by index are
    ties_kept = tl.full((), 1 << 40, tl.int64)
    if (top_k > 0) & (tl.load(state + _SPANS + 1, cache_modifier=".cg") > 0):
        limit = top_k.to(tl.int64) - 1
        listed = tl.load(state + _FILLED, cache_modifier=".cg")
        if (head == 0) | (limit < listed):  # else top-k keeps all that min-p kept
            key, above, over, same, n, whole = _find(x, lists, state, 0, low, limit, top, temperature, True, V, LISTED)
            low = key
            ties_kept = limit + 1 - over
            mass = above + ties_kept * _mass_of(key, top)
    if top_p < 1:
        bound = top_p * mass.to(tl.float64)
        limit = tl.minimum(tl.ceil(bound).to(tl.int64), mass) - 1
        which = tl.where(head > 0, 0, 1)
        key, above, over, same, n, whole = _find(x, lists, state, which, low, limit, top, temperature, False, V, LISTED)
        same = tl.where(key == low, tl.minimum(ties_kept, same), same)
        one = tl.maximum(_mass_of(key, top), 1)
        reach = tl.ceil((bound - above.to(tl.float64)) / one.to(tl.float64)).to(tl.int64)
        ties_kept = tl.minimum(tl.maximum(reach, 1), same)
        mass = above + ties_kept * _mass_of(key, top)
        low = key
    target = tl.minimum((point * mass.to(tl.float64)).to(tl.int64), mass - 1)
    which = tl.where(head > 0, 0, 2)
    key, above, over, same, n, whole = _find(x, lists, state, which, low, target, top, temperature, False, V, LISTED)
    same = tl.where(key == low, tl.minimum(ties_kept, same), same)
    nth = (target - above) // tl.maximum(_mass_of(key, top), 1)
    nth = tl.maximum(tl.minimum(nth, same - 1), 0)
    index, above, over, same = _search(x, lists + which * LISTED, n, whole, low, key, 0, nth, top, temperature, True,
                                       True, LISTED)  # fmt: skip
    return -index


@triton.jit
def _draw_kernel(logits, picked, rules, work, lists, row_stride, V: tl.constexpr, WIDTH: tl.constexpr,
                 STRETCHES: tl.constexpr, LISTED: tl.constexpr):  # fmt: skip
    stretch, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rule = rules + row * WIDTH
    best = tl.load(picked + row)
    temperature = tl.load(rule).to(tl.float32)
    top_p, top_k, point = tl.load(rule + 2), tl.load(rule + 3), tl.load(rule + 4)
    if (best < 0) | (temperature <= 0):
        return
    if (top_k <= 0) & (top_p >= 1):
        return
    x = logits + row * row_stride
    top = tl.div_rn(tl.load(x + best), temperature)
    low = _order(top + tl.load(rule + 1).to(tl.float32))
    at = stretch * _BLOCK + tl.arange(0, _BLOCK)
    value = tl.div_rn(tl.load(x + at, mask=at < V, other=-float("inf")), temperature)
    kept = (at < V) & (_order(value) >= low)
    bins = _bin(top - value)
    state, lists = work + row * (_STATE + _BINS // 2), lists + row * 3 * LISTED
    for which in tl.static_range(3):
        first, end = tl.load(state + _SPANS + 2 * which), tl.load(state + _SPANS + 2 * which + 1)
        if end > first:
            inside = kept & (bins >= first) & (bins < end)
            if first > 0:
                above = tl.sum(tl.where(kept & (bins < first), _mass(value, top), 0), 0)
                tl.atomic_add(state + _ABOVE + which, above, sem="relaxed")
            count = tl.sum(inside.to(tl.int32), 0)
            if count > 0:
                start = tl.atomic_add(state + _FILLED + which, count.to(tl.int64), sem="relaxed").to(tl.int32)
                place = start + tl.cumsum(inside.to(tl.int32), 0) - 1
                tl.store(lists + which * LISTED + place, at, mask=inside & (place < LISTED))
    if _last(state + _LISTING, STRETCHES):
        token = _draw(x, lists, state, low, top_k, top_p, point, top, temperature, V, LISTED)
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
    element, which becomes -1 where that is not finite, or -1 for a row to be left alone. min-p, then top-k, then top-p;
    the draw is the element of the kept ones (falling, equals by index; in the vocabulary's order when neither top-k nor
    top-p is on) in which the running mass passes point * mass. Safe in a CUDA graph. Raises ValueError for a wrong
    shape, dtype or stride. Reference: engine.runner.sampler.sample_row. Sources: Holtzman et al. 2020, arXiv:1904.09751
    (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p).
    """
    _check(logits, rules)
    rows, vocab = logits.shape
    require(picked.shape == (rows,) and picked.dtype is torch.int64 and picked.is_contiguous(),
            "picked is %s %s; want (%d,) torch.int64 contiguous", tuple(picked.shape), picked.dtype, rows)  # fmt: skip
    if rows:
        stretches = triton.cdiv(vocab, _BLOCK.value)
        require(stretches <= _BINS.value // 2, "logits has %d columns; want at most %d", vocab,
                _BLOCK.value * _BINS.value // 2)  # fmt: skip
        tables = torch.zeros((rows, 2 * _STATE.value + _BINS.value), dtype=torch.int32, device=logits.device)
        work = tables.view(torch.int64)
        lists = torch.empty((rows, 3, LISTED), dtype=torch.int32, device=logits.device)
        grid, row_stride = (stretches, rows), logits.stride(0)
        shape = {"V": vocab, "WIDTH": rules.shape[1], "STRETCHES": stretches, "LISTED": LISTED, **_LAUNCH}
        _count_kernel[grid](logits, picked, rules, work, tables, row_stride, SLACK, **shape)
        _draw_kernel[grid](logits, picked, rules, work, lists, row_stride, **shape)
    return picked
