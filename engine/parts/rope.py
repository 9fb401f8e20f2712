"""Rotary position tables with the scalings that checkpoints ask for: linear, dynamic NTK, llama3, YaRN.

Sources: Su et al. 2021 (rotary), Peng et al. 2023 (YaRN, sections 3.1-3.4), Meta's Llama 3.1 release for llama3.
A table is made once per engine for positions 0..max_model_len-1.
"""

from __future__ import annotations

import math

import torch

from engine.loading.spec import RopeSpec


def _inverse_frequencies(base: float, head_dim: int) -> torch.Tensor:
    """(D/2,) float32: base ** (-2i / D)."""
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)


def _llama3(frequencies: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Divide low frequencies by the factor, keep high ones, blend between by wavelength."""
    wavelength = 2 * math.pi / frequencies
    turns = rope.original_positions / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn_attention_factor(rope: RopeSpec) -> float:
    """What cosines and sines are multiplied by: as given, else 0.1 ln(factor) + 1, with the mscale refinements."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def strength(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return strength(rope.mscale) / strength(rope.mscale_all_dim)
    return strength(1.0)


def _yarn(frequencies: torch.Tensor, rope: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """YaRN's "NTK by parts" and its attention factor (Peng et al. 2023, 3.2 and 3.4)."""

    def dim_of(turns: float) -> float:
        """The (fractional) dimension that makes `turns` rotations over the original context."""
        return head_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)  # 1 where the frequency is high enough to be left alone
    scaled = frequencies / rope.factor * (1 - keep) + frequencies * keep
    return scaled, _yarn_attention_factor(rope)


def rope_table(rope: RopeSpec, head_dim: int, max_positions: int, max_trained: int) -> torch.Tensor:
    """Cosines and sines of every position. Returns (max_positions, 2, D/2) float32.

    max_positions: the engine's max_model_len; max_trained: the checkpoint's max_position_embeddings. Dynamic NTK
    uses one base for max_positions, so that a token's rotation never depends on how long its sequence became.
    """
    base, attention_factor = rope.theta, 1.0
    if rope.kind == "dynamic" and max_positions > max_trained:
        stretch = rope.factor * max_positions / max_trained - (rope.factor - 1)
        base *= stretch ** (head_dim / (head_dim - 2))
    frequencies = _inverse_frequencies(base, head_dim)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif rope.kind == "yarn":
        frequencies, attention_factor = _yarn(frequencies, rope, head_dim)
    angles = torch.arange(max_positions).float()[:, None] * frequencies  # (P, D/2)
    return torch.stack([angles.cos(), angles.sin()], dim=1) * attention_factor
