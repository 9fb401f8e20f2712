"""Ranges of the pool settings, for the native allocator and the model alike. Knows neither."""

from __future__ import annotations


def require_pool(
    pool_groups: int, release_after_s: float, floor_groups: int, max_mappings: int | None, stock_groups: int
) -> None:
    """Raises ValueError naming the first pool setting that is out of range."""
    if pool_groups < 1:
        raise ValueError(f"pool_groups={pool_groups} is less than 1; give the pool at least one group")
    if not release_after_s >= 0:
        raise ValueError(f"release_after_s={release_after_s} is not in 0..inf seconds")
    if not 0 <= floor_groups <= pool_groups:
        raise ValueError(f"floor_groups={floor_groups} is not in 0..{pool_groups} (pool_groups)")
    if not 0 <= stock_groups <= pool_groups:
        raise ValueError(f"stock_groups={stock_groups} is not in 0..{pool_groups} (pool_groups)")
    if max_mappings is not None and max_mappings < 1:
        raise ValueError(f"max_mappings={max_mappings} is less than 1; leave it out for the driver's own budget")
