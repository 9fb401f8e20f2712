"""The garbage collector's share of a step, made small: for a process that does nothing but run the engine.

A step makes thousands of small tuples, all freed by reference counts when it ends. Python's collector nevertheless
starts every 700 allocations, and every few dozen steps walks everything that start-up made (modules, weights'
tensors, the model): 5 ms in a bare interpreter, far more with torch loaded. This module knows nothing of the engine.
"""

from __future__ import annotations

import gc

YOUNG_THRESHOLD = 50_000  # live allocations before a young collection; a step of 8,192 sequences makes about 33,000


def settle_heap() -> None:
    """Call once, when start-up is done: collect, exempt what exists from collection, and collect less often.

    It changes the whole process, so a library must not call it; the engine process and the benchmarks do.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_THRESHOLD, 20, 20)
