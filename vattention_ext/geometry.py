"""Sizes of a KV slab: what a token, a page group and a slot weigh. Numbers only; knows neither memory nor drivers.

Source: vAttention (arXiv 2405.04437), tensor slicing; differs: tokens may straddle pages, so nothing must divide.
"""

from __future__ import annotations

from dataclasses import dataclass

LAYOUTS: tuple[str, ...] = ("mega", "per_layer")
_BASE_PAGE_BYTES = 4096
_MAX_SLAB_BYTES = 1 << 47  # of addresses: what a process has on x86-64


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """Shape of the cache of one worker.

    layers L, kv_heads G, head_dim D, element_bytes: of the model, as this worker holds it. max_tokens C and slots S:
    the slab is virtually (S, C) tokens a plane. page_bytes: unit of physical memory. layout: "mega" has two planes, K
    and V, each (S, C, L, G, D); "per_layer" has 2 L planes, all K first, each (S, C, G, D).
    Raises ValueError naming value, range and fix.
    """

    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    max_tokens: int
    slots: int
    page_bytes: int = 2 << 20
    layout: str = "mega"

    def __post_init__(self) -> None:
        bounds = {
            "layers": 4096, "kv_heads": 4096, "head_dim": 65536, "element_bytes": 16,
            "max_tokens": 1 << 30, "slots": 1 << 16, "page_bytes": 1 << 36,
        }
        for name, high in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise ValueError(f"{name}={value!r} is not an integer in 1..{high}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is unknown; known: {', '.join(LAYOUTS)}")
        if self.page_bytes % _BASE_PAGE_BYTES:
            raise ValueError(f"page_bytes={self.page_bytes} is not a multiple of {_BASE_PAGE_BYTES}; use 2097152")
        if self.page_bytes < self.token_bytes:
            fix = -(-self.token_bytes // _BASE_PAGE_BYTES) * _BASE_PAGE_BYTES
            raise ValueError(
                f"page_bytes={self.page_bytes} is less than a token "
                f"({self.token_bytes} bytes in layout {self.layout!r}); use at least {fix}"
                + (" or layout 'per_layer'" if self.layout == "mega" else "")
            )
        if self.planes * self.region_bytes > _MAX_SLAB_BYTES:
            raise ValueError(
                f"{self.slots} slots of {self.max_tokens} tokens need {self.planes * self.region_bytes} bytes of "
                f"addresses, more than {_MAX_SLAB_BYTES}; lower max_model_len or max_num_seqs"
            )

    @property
    def planes(self) -> int:
        """Regions of addresses, and pages of a group: 2 (mega) or 2 L (per_layer)."""
        return 2 if self.layout == "mega" else 2 * self.layers

    @property
    def pages_per_group(self) -> int:
        """Same as planes."""
        return self.planes

    @property
    def token_bytes(self) -> int:
        """b: bytes of one token in one plane."""
        per_layer = self.kv_heads * self.head_dim * self.element_bytes
        return per_layer * self.layers if self.layout == "mega" else per_layer

    @property
    def groups_per_slot(self) -> int:
        """Groups that max_tokens need."""
        return -(-self.max_tokens * self.token_bytes // self.page_bytes)

    @property
    def slot_bytes(self) -> int:
        """Bytes from one slot to the next in every plane: whole pages."""
        return self.groups_per_slot * self.page_bytes

    @property
    def region_bytes(self) -> int:
        """Bytes of addresses of one plane."""
        return self.slots * self.slot_bytes

    @property
    def group_bytes(self) -> int:
        """Physical bytes of a group: one page in every plane."""
        return self.planes * self.page_bytes

    def groups_for(self, tokens: int) -> int:
        """Groups that hold `tokens` tokens of one slot: ceil(tokens * b / S).

        Raises ValueError outside 0..max_tokens.
        """
        if not 0 <= tokens <= self.max_tokens:
            raise ValueError(f"tokens={tokens} is not in 0..{self.max_tokens} (max_tokens of a slot)")
        return -(-tokens * self.token_bytes // self.page_bytes)

    def tokens_in(self, groups: int) -> int:
        """Whole tokens that lie in the first `groups` groups: min(floor(groups * S / b), max_tokens)."""
        return min(groups * self.page_bytes // self.token_bytes, self.max_tokens)

    def shareable_groups(self, tokens: int) -> int:
        """Groups that lie wholly inside the first `tokens` tokens: floor(tokens * b / S). What share() may take."""
        return tokens * self.token_bytes // self.page_bytes
