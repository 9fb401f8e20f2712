"""Argument checks shared by the launchers: one line each, with the value found and the value wanted.

It knows shapes and strides; it never reads an element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tessera_kernels import native

if TYPE_CHECKING:
    from tessera_kernels import _cpu


def require(condition: bool, message: str, *values: object) -> None:
    """Raises ValueError(message % values) unless `condition`."""
    if not condition:
        raise ValueError(message % values)


def require_rows(name: str, x: torch.Tensor, width: int, dtype: torch.dtype) -> None:
    """`x` is (N, width), `dtype`, contiguous."""
    if x.dim() != 2 or x.shape[1] != width or x.dtype is not dtype or not x.is_contiguous():
        raise ValueError(
            f"{name} is {tuple(x.shape)} {x.dtype} with strides {x.stride()}; want (N, {width}) {dtype} contiguous"
        )


def require_ints(name: str, x: torch.Tensor, length: int) -> None:
    """`x` is (length,) int32, contiguous."""
    if x.dim() != 1 or x.shape[0] != length or x.dtype is not torch.int32 or not x.is_contiguous():
        raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}; want ({length},) torch.int32 contiguous")


def kv_view(k_view: torch.Tensor, v_view: torch.Tensor, dtype: torch.dtype) -> _cpu.KvView:
    """The two (S, C, G, D) views as the C++ side takes them; both must have the same shape and strides."""
    if k_view.dim() != 4 or k_view.shape != v_view.shape or k_view.stride() != v_view.stride():
        raise ValueError(
            f"k_view is {tuple(k_view.shape)} {k_view.stride()} and v_view {tuple(v_view.shape)} {v_view.stride()}; "
            "want equal (S, C, G, D) shapes and strides"
        )
    slot_stride, token_stride, head_stride, dim_stride = k_view.stride()
    if dim_stride != 1 or k_view.dtype is not dtype or v_view.dtype is not dtype:
        raise ValueError(
            f"k_view is {k_view.dtype} with head stride {dim_stride} and v_view {v_view.dtype}; "
            f"want {dtype} with contiguous heads"
        )
    slots, max_tokens = k_view.shape[:2]
    made: _cpu.KvView = native.extension().KvView(
        k_view.data_ptr(), v_view.data_ptr(), slot_stride, token_stride, head_stride, slots, max_tokens
    )
    return made
