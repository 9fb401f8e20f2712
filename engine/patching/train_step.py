"""The arithmetic of light fine-tuning: which parameters learn, one optimiser step, bits per byte, snapshots.

It knows torch and transformers' causal models; it knows no corpus files, no command line and no output folder.
Snapshots are safetensors; nothing is pickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
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
    first, last: numbers of blocks from either end. lora_rank > 0: rank-limited updates (peft) inside those blocks
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
    chosen = {}
    for name, parameter in model.named_parameters():
        found = LAYER.search(name)
        inside = found is not None and int(found[1]) in blocks
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


def make_optimiser(trained: Mapping[str, torch.nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with the paper's betas; vectors (norm gains, biases) do not decay."""
    matrices = [parameter for parameter in trained.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in trained.values() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=BETAS)


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


def train_step(model: Any, optimiser: torch.optim.Optimizer, blocks: npt.NDArray[np.int32],
               byte_counts: npt.NDArray[np.int64], micro_batch: int, rate: float, seed: int, amp: bool) -> Loss:
    """One update from blocks [B, context], `micro_batch` of them at a time (it divides B).

    seed: of this step's dropout, so that a resumed run draws the same. amp: bfloat16 autocast.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    for group in optimiser.param_groups:
        group["lr"] = rate
    total = 0.0
    parts = len(blocks) // micro_batch
    for part in range(parts):
        ids = torch.from_numpy(blocks[part * micro_batch : (part + 1) * micro_batch].astype(np.int64)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        (loss / parts).backward()
        total += float(loss.detach()) / parts
    if not math.isfinite(total):
        raise ConfigError(f"the loss became {total}; start again with a lower --learning-rate")
    learning = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(learning, CLIP_NORM)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    targets = blocks[:, 1:]
    return Loss(total, int(targets.size), int(byte_counts[targets].sum()))


@torch.no_grad()
def evaluate(model: Any, documents: Iterable[tuple[list[int], int]], context: int, start: int, amp: bool) -> Loss:
    """Loss over held-out documents, each scored whole, from its first token on, after the id `start`.

    documents: (ids, UTF-8 bytes of the text). Windows of `context` tokens overlap by half; every token counts once.
    """
    device = next(model.parameters()).device
    nats, tokens, utf8_bytes = 0.0, 0, 0
    model.eval()
    for ids, size in documents:
        for window in windows([start, *ids], context):
            row = torch.tensor([window.ids], device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = model(input_ids=row).logits[0, window.first - 1 : -1]
            nats += float(torch.nn.functional.cross_entropy(logits.float(), row[0, window.first :], reduction="sum"))
        tokens += len(ids)
        utf8_bytes += size
    model.train()
    return Loss(nats / max(1, tokens), tokens, utf8_bytes)


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
            optimiser.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": moments[0],
                                          "exp_avg_sq": moments[1]}  # fmt: skip
