"""The arithmetic of light fine-tuning: which parameters learn, one optimiser step, bits per byte, snapshots.

It knows torch and transformers' causal models; it knows no corpus files, no command line and no output folder.
Snapshots are safetensors; nothing is pickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.core.errors import ConfigError, LoadError
from engine.patching.train_data import windows

LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
BETAS = (0.9, 0.95)
CLIP_NORM = 1.0
LORA_ALPHA_PER_RANK = 4
LORA_DROPOUT = 0.1
NOT_SCORED = -100
"""Target of a position that no loss is taken of."""
SCORED_TOKENS = {"cuda": 8_192}
"""Tokens of held-out windows that go through the model at once; elsewhere one window does."""


def load_model(folder: Path, device: str) -> Any:
    """transformers' own model, every parameter frozen and in its stored dtype. Raises LoadError, one line."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise LoadError(f"{folder}: transformers cannot load it: {(str(error).splitlines() or [''])[0][:200]}"
                        ) from None
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # off the file's mapping, onto memory aligned alike in every run: same sums
    model.config.use_cache = False
    model.requires_grad_(False)
    model.train()
    return model.to(device)


def choose_trainable(model: Any, first: int, last: int, lora_rank: int = 0,
                     frozen_dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    """Let embedding, head and the first and last blocks learn; their parameters by name, in float32.

    What does not learn becomes frozen_dtype, outside those blocks; in them it stays float32, for adapters are added
    to it in the end.
    first, last: numbers of blocks from either end; where they are all blocks, the last norm learns too, so the whole
    model does. lora_rank > 0: rank-limited updates (peft) inside those blocks
    instead of their own weights; embedding and head learn whole in any case, for the n-grams' rows are new.
    Source: AdaptiVocab, section on fine-tuning; the released code leaves the first block frozen, here it learns.
    Raises ConfigError when the model has fewer blocks.
    """
    indices = [int(found[1]) for name, _ in model.named_parameters() if (found := LAYER.search(name))]
    layers = 1 + max(indices, default=-1)
    if min(first, last) < 0 or first + last > layers:
        raise ConfigError(f"--first-blocks {first} and --last-blocks {last}: the model has {layers} blocks; they must "
                          "be at least 0 and no more than that together")
    blocks = {*range(first), *range(layers - last, layers)}
    if lora_rank and blocks:
        _add_lora(model, lora_rank, sorted(blocks))
    ends = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    whole = first + last == layers
    chosen = {}
    for name, parameter in model.named_parameters():
        found = LAYER.search(name)
        inside = whole if found is None else int(found[1]) in blocks
        parameter.data = parameter.data.to(torch.float32 if inside or id(parameter) in ends else frozen_dtype)
        if id(parameter) in ends or (inside and (not lora_rank or ".lora_" in name)):
            parameter.requires_grad_(True)
            chosen[name] = parameter
    return chosen


def _add_lora(model: Any, rank: int, blocks: list[int]) -> None:
    """Adapters beside every linear layer of the chosen blocks. Raises ConfigError without the library."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(f"--lora-rank {rank} needs the library peft: pip install peft") from None
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                     if isinstance(module, torch.nn.Linear) and LAYER.search(name + ".")})
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=LORA_ALPHA_PER_RANK * rank, lora_dropout=LORA_DROPOUT,
                                       target_modules=linear, layers_to_transform=blocks), model)


def learned_weights(model: Any, trained: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """What differs from the checkpoint, under the checkpoint's names; adapters are added into their layers."""
    found = {name: parameter.detach() for name, parameter in trained.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if any(key.startswith(f"{name}.lora_") for key in trained):
            delta = module.get_delta_weight("default")
            found[f"{name}.weight"] = module.base_layer.weight.detach().float() + delta.detach().float()
    return found


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to the peak, then half a cosine to zero. step: 0 .. steps - 1."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimiser(trained: Mapping[str, torch.nn.Parameter], weight_decay: float,
                   rows: frozenset[str] = frozenset(), row_rate: float = 1.0) -> torch.optim.AdamW:
    """AdamW with the paper's betas; vectors (norm gains, biases) do not decay.

    rows: names of embedding and head, which learn at row_rate times the others' rate.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained.items() if p.dim() > 1 and name in rows], "rate": row_rate},
        {"params": [p for name, p in trained.items() if p.dim() > 1 and name not in rows]},
        {"params": [p for p in trained.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = all(parameter.is_cuda for parameter in trained.values())
    return torch.optim.AdamW([{"rate": 1.0, "weight_decay": weight_decay, **group} for group in groups
                              if group["params"]], lr=0.0, betas=BETAS, fused=fused)  # fmt: skip


def rows_of(model: Any, trained: Mapping[str, torch.nn.Parameter]) -> frozenset[str]:
    """Names of embedding and head among what learns."""
    ends = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return frozenset(name for name, parameter in trained.items() if id(parameter) in ends)


def compile_blocks(model: Any) -> None:
    """Let torch.compile fuse each block: one compilation serves all that are alike. Losses differ in the last bits."""
    for name, module in model.named_modules():
        found = LAYER.search(f"{name}.")
        if found is not None and found.end() == len(name) + 1:
            module.compile(dynamic=False)


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean nats a predicted token, how many there were, and the UTF-8 bytes they stand for."""

    nats: float
    tokens: int
    utf8_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Comparable between vocabularies, unlike nats a token."""
        return self.nats * self.tokens / (math.log(2) * max(1, self.utf8_bytes))


def nats_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean nats, in float32. logits: [B, T, V]; targets: [B, T], NOT_SCORED where none is."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NOT_SCORED)


def train_step(model: Any, optimiser: torch.optim.Optimizer, blocks: npt.NDArray[np.int32], micro_batch: int,
               rate: float, seed: int, amp: bool, loss_of: Any = nats_of) -> torch.Tensor:
    """One update from blocks [B, context], `micro_batch` of them at a time (it divides B).

    seed: of this step's dropout, so that a resumed run draws the same. amp: bfloat16 autocast. loss_of: nats_of, or
    a compiled one. Returns the mean nats a token on the model's device: reading it waits for the device, so it is
    the caller who says when, and who checks that it is finite.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    for group in optimiser.param_groups:
        group["lr"] = rate * group["rate"]
    total = torch.zeros((), device=device)
    parts = len(blocks) // micro_batch
    for part in range(parts):
        ids = _on(device, blocks[part * micro_batch : (part + 1) * micro_batch])
        targets = ids.roll(-1, 1)  # a view without the last position would be copied, and is as large as the logits
        targets[:, -1] = NOT_SCORED
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(input_ids=ids).logits
        loss = loss_of(logits, targets)
        (loss / parts).backward()
        total += loss.detach() / parts
    learning = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(learning, CLIP_NORM)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return total


def _on(device: torch.device, ids: npt.NDArray[np.int32]) -> torch.Tensor:
    """Ids as int64 on the device, without waiting for what it is doing."""
    wide = torch.from_numpy(ids.astype(np.int64))
    return wide.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else wide.to(device)


@torch.no_grad()
def evaluate(model: Any, documents: Iterable[tuple[list[int], int]], context: int, start: int, amp: bool) -> Loss:
    """Loss over held-out documents, as document_nats scores them."""
    scored = list(documents)
    tokens = sum(len(ids) for ids, _ in scored)
    nats = sum(document_nats(model, [ids for ids, _ in scored], context, start, amp))
    return Loss(nats / max(1, tokens), tokens, sum(size for _, size in scored))


@torch.no_grad()
def document_nats(model: Any, documents: list[list[int]], context: int, start: int, amp: bool) -> list[float]:
    """Nats of each document, scored whole, from its first token on, after the id `start`.

    Windows of `context` tokens overlap by half; every token counts once. Several windows of similar length go
    through the model together, filled up behind their ends, which no earlier position sees.
    """
    device = next(model.parameters()).device
    rows = [(place, window) for place, ids in enumerate(documents) for window in windows([start, *ids], context)]
    rows.sort(key=lambda row: -len(row[1].ids))
    at_once = max(1, SCORED_TOKENS.get(device.type, 0) // context)
    total = torch.zeros(len(documents), dtype=torch.float64, device=device)
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # lengths differ: each would be compiled anew
        for some in _several(rows, at_once):
            length = max(len(window.ids) for _, window in some)
            ids: npt.NDArray[np.int32] = np.full((len(some), length), start, np.int32)
            targets: npt.NDArray[np.int32] = np.full((len(some), length), NOT_SCORED, np.int32)
            for row, (_, window) in enumerate(some):
                ids[row, : len(window.ids)] = window.ids
                targets[row, window.first - 1 : len(window.ids) - 1] = window.ids[window.first :]
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = model(input_ids=_on(device, ids)).logits
            nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), _on(device, targets).flatten(),
                                                     reduction="none", ignore_index=NOT_SCORED)  # fmt: skip
            places = torch.tensor([place for place, _ in some], device=device)
            total.index_add_(0, places, nats.view(len(some), length).sum(1).double())
    model.train()
    found: list[float] = total.tolist()
    return found


def _several(rows: list[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` rows."""
    return (rows[begin : begin + size] for begin in range(0, len(rows), size))


def save_tensors(path: Path, trained: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    """Weights (w.NAME) and both moments (m.NAME, v.NAME) in float32, as one safetensors file."""
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in trained.items():
        state = optimiser.state[parameter]
        for key, tensor in (("w", parameter.detach()), ("m", state["exp_avg"]), ("v", state["exp_avg_sq"])):
            tensors[f"{key}.{name}"] = tensor.cpu().contiguous()
    save_file(tensors, path)


def load_tensors(path: Path, trained: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer,
                 step: int) -> None:
    """save_tensors undone. step: updates done so far. Raises LoadError for another model's snapshot."""
    from engine.loading.safetensors_header import read_header

    found = {name: info.shape for name, info in read_header(path).items()}
    wanted = {f"{key}.{name}": tuple(parameter.shape) for name, parameter in trained.items() for key in "wmv"}
    if found != wanted:
        odd = sorted(set(found.items()) ^ set(wanted.items()))[0][0]
        raise LoadError(f"{path}: is not a snapshot of this model: tensor {odd!r} is in only one of them or has "
                        "another shape; remove the folder to start again")
    from safetensors import safe_open

    with safe_open(str(path), framework="pt", device="cpu") as tensors, torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors.get_tensor(f"w.{name}"))
            moments = [tensors.get_tensor(f"{key}.{name}").to(parameter.device) for key in "mv"]
            counted_on = parameter.device if optimiser.defaults["fused"] else torch.device("cpu")
            optimiser.state[parameter] = {"step": torch.tensor(float(step), device=counted_on),
                                          "exp_avg": moments[0], "exp_avg_sq": moments[1]}  # fmt: skip
