"""Which products go to the vendor's library: what the table names, where it can be run. No GPU is needed for that."""

from __future__ import annotations

import pytest
import torch

from tessera_kernels import cublaslt


def test_a_choice_that_is_not_there_goes_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another driver may propose fewer algorithms or refuse one: that is found out before a product is run."""
    product = cublaslt.Product.__new__(cublaslt.Product)
    product.proposals, product._made = [cublaslt._Proposal()] * 2, {}

    def refuse(settings: tuple[int, ...]) -> cublaslt._Proposal:
        raise cublaslt.LibraryError(f"no {settings}")

    monkeypatch.setattr(product, "algorithm", refuse)
    monkeypatch.setattr(cublaslt, "product", lambda *shape: product)
    monkeypatch.setattr(cublaslt, "_ranks", lambda name: {"8x4": {"16": 1, "32": 2, "48": [1] * 9}})
    found = {m: cublaslt._measured.__wrapped__(m, 8, 4, torch.bfloat16, "a GPU") for m in (16, 32, 48, 64)}
    assert found == {16: 1, 32: None, 48: None, 64: None}


def test_tensors_that_lie_otherwise_go_to_pytorch() -> None:
    """Proposals are for addresses that are multiples of 256 bytes, and for rows without gaps."""
    flat = torch.empty(4096, dtype=torch.bfloat16)
    start = -flat.data_ptr() % 256 // 2
    whole = flat[start : start + 1024].view(8, 128)
    assert cublaslt._lies_well(whole) and cublaslt._lies_well(whole[1:])
    assert not cublaslt._lies_well(whole[:, :64])
    assert not cublaslt._lies_well(flat[start + 8 : start + 1032].view(8, 128))
