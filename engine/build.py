"""Puts an engine together from a configuration: checkpoint, memory, kernels, model, scheduler, loop.

The one place that turns settings into objects. It decides nothing per request or per step.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch

from engine.attention.base import backends
from engine.attention.choose import Choice, choose_backend, make_backend
from engine.core.config import DEFAULT_CPU_POOL_BYTES, EngineConfig, resolve_auto, resolve_pool_groups
from engine.core.errors import ConfigError
from engine.core.growth import GrowthForecast
from engine.core.ledger import ADMISSION_RULES, KvLedger
from engine.core.loop import EngineLoop
from engine.core.policies import DEFAULT_CHUNK_TOKENS, ChunkSchedule, Pace, make_policy
from engine.core.request import SamplingParams
from engine.core.scheduler import Scheduler
from engine.exec.local import LocalExecutor
from engine.gpu import Progress, choose_device, prepare_gpu
from engine.kv.paged import PagedStore
from engine.kv.slots import SlotStore
from engine.kv.store import KvStore
from engine.loading.spec import ModelSpec, read_config
from engine.loading.weights import open_weights
from engine.models import models
from engine.parts.dummy import dummy_weights
from engine.parts.kernel_set import kernel_sets
from engine.parts.parts import Parts
from engine.parts.rope import rope_table
from engine.patching.artefact import Artefact
from engine.patching.reduction import load_reduction
from engine.patching.served import check_weights, fit, patch_folder
from engine.runner.device_sampler import DeviceSampler
from engine.runner.runner import Runner
from engine.runner.sampler import Sampler
from engine.scx.attention import Scx
from engine.scx.config import ALIASES, UNIX, ScxConfig, scx_config, session_bytes
from engine.scx.environment import with_environment
from engine.scx.sessions import Sessions
from vattention_ext import KvAllocator, KvGeometry

log = logging.getLogger(__name__)

STOCK_BYTES = 256 << 20  # of physical pages that a GPU's mapper keeps created ahead of need


def stop_ids_for(spec: ModelSpec, params: SamplingParams) -> frozenset[int]:
    """Every id that ends a sequence: the model's eos list, unless ignored, and the request's own."""
    return frozenset(() if params.ignore_eos else spec.eos_ids) | frozenset(params.stop_token_ids)


def free_memory_bytes() -> int:
    """What the system says can be had without swapping (MemAvailable of /proc/meminfo)."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable; give --kv-pool-bytes")


def geometry_of(spec: ModelSpec, config: EngineConfig, dtype: torch.dtype) -> KvGeometry:
    """The slabs of a resolved configuration."""
    assert config.max_model_len is not None
    try:
        return KvGeometry(
            layers=spec.layers,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            element_bytes=dtype.itemsize,
            max_tokens=config.max_model_len,
            slots=config.max_num_seqs,
            page_bytes=config.kv_page_bytes,
            layout=config.kv_layout,
        )
    except ValueError as error:  # names value, range and fix
        raise ConfigError(str(error)) from None


def fit_length(config: EngineConfig, geometry: KvGeometry, pool_groups: int, *, asked: bool) -> int:
    """max_model_len that one request can reach in this pool.

    Raises ConfigError when the user asked for more; a derived length is lowered, and the log says so.
    """
    length = geometry.max_tokens
    if geometry.groups_for(length) <= pool_groups:
        return length
    fits = pool_groups * geometry.page_bytes // geometry.token_bytes
    pool_bytes = pool_groups * geometry.group_bytes
    if asked:
        need = geometry.groups_for(length) * geometry.group_bytes
        raise ConfigError(
            f"--max-model-len {length} needs {need} bytes of KV and the pool has {pool_bytes}; "
            f"use --max-model-len {fits} or --kv-pool-bytes {need}"
        )
    if fits < 1:
        raise ConfigError(f"a KV pool of {pool_bytes} bytes holds no token; raise --kv-pool-bytes")
    log.warning("max_model_len lowered from %d to %d: the KV pool of %d bytes holds no more", length, fits, pool_bytes)
    return fits


def within_mappings(config: EngineConfig, pool_groups: int, addressable_groups: int) -> int:
    """The part of the pool that the system can map (Linux: vm.max_map_count mappings a process).

    Raises ConfigError when the user sized the pool beyond it; a derived pool is lowered, and the log says so.
    """
    if pool_groups <= addressable_groups:
        return pool_groups
    fix = "use a larger --kv-page-bytes, a smaller pool or --max-num-seqs, or raise vm.max_map_count"
    if config.kv_pool_bytes is not None or config.kv_pool_groups is not None or addressable_groups < 1:
        raise ConfigError(
            f"the KV pool has {pool_groups} page groups and the system can map {addressable_groups} of them; {fix}"
        )
    log.warning("KV pool lowered from %d to %d page groups: %s", pool_groups, addressable_groups, fix)
    return addressable_groups


def build_runner(
    spec: ModelSpec, config: EngineConfig, pool_groups: int, *, kernels: str = "auto", progress: Progress | None = None
) -> Runner:
    """Memory, weights and model. config: resolved; kernels: a kernel set's name ("auto" = the fastest that fits).

    progress(done, total) is called after each tensor.
    """
    assert config.max_model_len is not None
    dtype: torch.dtype = getattr(torch, config.dtype)
    device = torch.device(config.device)
    choice = choose_attention(spec, config, device)
    caps = backends[choice.prefill].caps
    if caps.paged and scx_config(config, spec) is not None:
        raise ConfigError(
            f"--scx-layers needs a cache of slots, and --attention-backend {choice.prefill} keeps blocks; use auto"
        )
    kernel_name = kernels
    if kernels == "auto":
        kernel_name = "cuda" if device.type == "cuda" else "torch" if caps.paged else fastest_kernels(dtype)
    set_threads(config.threads or 1, kernel_name)
    kernel_set = kernel_sets[kernel_name]()
    log.info("kernel set %s, %s threads", kernel_name, config.threads)
    store = make_store(spec, config, pool_groups, device, choice)
    scx = scx_of(spec, config, store.geometry, device)
    with dummy_weights(device) if config.load_format == "dummy" else open_weights(config.model or "") as source:
        total, done = len(source.names()), 0

        def count() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, max(done, total))

        parts = Parts(
            spec,
            source,
            kernel_set,
            make_backend(choice, spec),
            store,
            dtype=dtype,
            max_model_len=config.max_model_len,
            device=device,
            on_tensor=count,
            scx=scx,
        )
        model = models[spec.architecture](parts)
    sampler = (DeviceSampler if device.type == "cuda" else Sampler)(spec.vocab, kernel_set.argmax)
    sessions = Sessions(scx) if scx is not None else None
    return Runner(
        model, store, sampler, device, scx=sessions,
        replayable=backends[choice.decode].caps.graphs and (scx is None or scx.secure.in_stream),
    )  # fmt: skip


def choose_attention(spec: ModelSpec, config: EngineConfig, device: torch.device) -> Choice:
    """Attention backends by phase, from what was measured on this device; the log says why the others lost."""
    measured = None
    if device.type == "cuda":
        from tessera_kernels.triton_support import tuning

        measured = tuning(torch.cuda.get_device_name(device)).get("phases", {}).get(str(spec.head_dim))
    choice = choose_backend(config.attention_backend, config.device, config.dtype, spec.head_dim, measured)
    lost = "; ".join(f"not {name}: {', '.join(why)}" for name, why in choice.lost.items())
    log.info("attention backend %s for prompts, %s for decodes (%s)", choice.prefill, choice.decode, lost)
    return choice


def make_store(
    spec: ModelSpec, config: EngineConfig, pool_groups: int, device: torch.device, choice: Choice
) -> KvStore:
    """Slots over mapped pages, or blocks over one pool for a backend that reads block tables."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    geometry = geometry_of(spec, config, dtype)
    caps = backends[choice.prefill].caps
    if not caps.paged:
        anchors = int(device.type == "cuda")  # see SlotStore
        geometry = dataclasses.replace(geometry, slots=geometry.slots + anchors)
        allocator = KvAllocator(
            geometry,
            driver=config.kv_driver,
            device=device.index or 0,
            pool_groups=pool_groups + anchors,
            release_after_s=config.kv_release_after_s,
            floor_groups=config.kv_floor_groups,
            stock_groups=min(pool_groups // 8, STOCK_BYTES // geometry.group_bytes) if device.type == "cuda" else 0,
        )
        return SlotStore(geometry, allocator, dtype, clear=config.kv_clear, anchor=bool(anchors))
    if device.type == "cuda" and config.kv_pool_bytes is None and config.kv_pool_groups is None:
        raise ConfigError(
            f"--attention-backend {choice.prefill} allocates its whole pool before the model is loaded, so its size "
            "cannot be measured; give --kv-pool-bytes"
        )
    store = PagedStore(geometry, pool_groups, dtype, device, clear=config.kv_clear)
    if store.block_tokens % caps.block_multiple:
        want = geometry.token_bytes * caps.block_multiple
        raise ConfigError(
            f"--attention-backend {choice.prefill} wants blocks of a multiple of {caps.block_multiple} tokens, and "
            f"--kv-page-bytes {geometry.page_bytes} holds {store.block_tokens}; use --kv-page-bytes {want}"
        )
    return store


def step_tokens(config: EngineConfig, geometry: KvGeometry) -> int:
    """Rows of the largest step that any policy makes: whole prompts, or a budget, and a token for every slot."""
    if config.scheduler in ("orca", "faster_transformer"):
        return geometry.slots * geometry.max_tokens
    budgets = (geometry.max_tokens, config.chunk_tokens or DEFAULT_CHUNK_TOKENS, config.high_chunk_tokens or 0)
    return max(budgets) + geometry.slots


def scx_of(spec: ModelSpec, config: EngineConfig, geometry: KvGeometry, device: torch.device) -> Scx | None:
    """What the encoded layers share; None when there are none."""
    asked = scx_config(config, spec)
    if asked is None:
        return None
    from engine.scx.open import open_scx  # loads cryptography

    rope = rope_table(spec.rope, spec.head_dim, geometry.max_tokens, spec.max_positions)
    return open_scx(asked, spec, rope, slots=geometry.slots, max_tokens=geometry.max_tokens, compute=device,
                    dtype=getattr(torch, config.dtype), step_tokens=step_tokens(config, geometry))  # fmt: skip


def reserve_maps(
    scx: ScxConfig, spec: ModelSpec, config: EngineConfig, geometry: KvGeometry, free_bytes: int
) -> int:
    """What the secure side's maps take from the pool's memory [bytes]. free_bytes: of the compute device.

    Without segments that is every slot's; maps of segments come with their tokens and are bounded, not reserved. A
    worker that somebody else runs has its own limit. Raises ConfigError when they do not fit where they lie.
    """
    session = session_bytes(scx, spec, geometry.max_tokens)
    if scx.segment_tokens or scx.secure_device.startswith(UNIX):
        return 0
    slots = geometry.slots + (config.device == "cuda")  # with the anchor's, see SlotStore
    need = slots * session
    same = scx.secure_device.startswith("cuda") == (config.device == "cuda")
    free = free_bytes if same else free_memory_bytes() if config.device == "cuda" else torch.cuda.mem_get_info()[0]
    if need > free:
        raise ConfigError(
            f"--scx-layers: the maps of {len(scx.layers)} layers and {geometry.slots} slots take {need} bytes and "
            f"{free} are free; lower --max-num-seqs, encode fewer layers, or use --scx-scheme perm")
    return need if same else 0


def set_threads(threads: int, kernel_name: str) -> None:
    """Threads of a step. Where the C++ kernels run, PyTorch's own pool would only take their cores: it gets one."""
    torch.set_num_threads(threads if kernel_name == "torch" else 1)
    if kernel_name == "cpu":
        from tessera_kernels import native

        native.set_threads(threads)


def fastest_kernels(dtype: torch.dtype) -> str:
    """`cpu` where the C++ kernels were built and this CPU runs them in this dtype, else `torch`."""
    try:
        from tessera_kernels import native
    except ImportError:
        log.warning("the C++ kernels are not built; running on PyTorch's. `pip install -e .` builds them")
        return "torch"
    return "cpu" if native.available(dtype) else "torch"


def read_model(config: EngineConfig) -> tuple[ModelSpec, Artefact | None]:
    """What config.json says of a model, and its patched vocabulary if it has one, whose ids the specification then has.

    Raises LoadError (WrongRows and others, see docs/vocabularies.md) when the two do not fit.
    """
    if config.model is None:
        raise ConfigError("no model folder; resolve_model() finds one")
    spec = read_config(Path(config.model), known=models.names())
    folder = patch_folder(config.model, config.patch, config.tokenizer)
    if folder is None:
        return spec, None
    artefact, spec = fit(config.model, folder, spec)
    if config.load_format != "dummy":
        with open_weights(config.model) as weights:
            check_weights(artefact, weights)
    return spec, artefact


def resolve(config: EngineConfig) -> tuple[EngineConfig, ModelSpec, int]:
    """Everything that model and machine decide: (resolved config, specification, groups of the pool)."""
    from tessera_kernels.cores import usable_cores

    spec, _ = read_model(config)
    config = with_environment(config)
    scx = scx_config(config, spec)
    if scx is None and spec.architecture in ALIASES:
        log.warning("architecture %s without --scx-layers: every layer is plain", spec.architecture)
    resolved = resolve_auto(
        config,
        checkpoint_dtype=spec.dtype,
        max_positions=spec.context_tokens,
        usable_cores=usable_cores(),
        device=choose_device(config.device),
    )
    dtype: torch.dtype = getattr(torch, resolved.dtype)
    geometry = geometry_of(spec, resolved, dtype)
    if resolved.device == "cuda":
        free_bytes, most_bytes = torch.cuda.mem_get_info()[0], 1 << 46
    else:
        free_bytes, most_bytes = free_memory_bytes(), DEFAULT_CPU_POOL_BYTES
    if scx is not None:
        free_bytes -= reserve_maps(scx, spec, resolved, geometry, free_bytes)
    pool_groups = resolve_pool_groups(
        resolved, group_bytes=geometry.group_bytes, free_bytes=free_bytes, most_bytes=most_bytes
    )
    length = fit_length(resolved, geometry, pool_groups, asked=config.max_model_len is not None)
    resolved = dataclasses.replace(resolved, max_model_len=length)
    return resolved, spec, pool_groups


def chunk_schedule(config: EngineConfig) -> ChunkSchedule | None:
    """The dynamic chunking schedule of a resolved configuration, if it has one."""
    if not config.dynamic_chunking:
        return None
    low, high = config.low_chunk_tokens, config.high_chunk_tokens
    over, stages = config.chunk_schedule_max_tokens, config.chunk_schedule_stages
    assert low and high and over and stages
    return ChunkSchedule(low, high, over, stages, config.chunk_schedule_budget)


def build_engine(
    config: EngineConfig,
    *,
    kernels: str = "auto",
    progress: Progress | None = None,
    resolution: tuple[EngineConfig, ModelSpec, int] | None = None,
) -> EngineLoop:
    """An engine in this process, ready to step. Raises ConfigError (LoadError) with value, range and fix.

    resolution: what resolve(config) said, for a caller that must know it too (free memory differs a moment later).
    """
    resolved, spec, pool_groups = resolution or resolve(config)
    runner = build_runner(spec, resolved, pool_groups, kernels=kernels, progress=progress)
    geometry = runner.store.geometry
    if resolved.device == "cuda":
        pool_groups = prepare_gpu(runner, spec, resolved, pool_groups, progress)
    pool_groups = within_mappings(config, pool_groups, runner.store.addressable_groups)
    rule = dataclasses.replace(ADMISSION_RULES[resolved.admission], growth_risk=resolved.admission_risk)
    ledger = KvLedger(pool_groups, geometry.groups_for, rule)
    patch = patch_folder(resolved.model or "", resolved.patch, resolved.tokenizer)
    reduction = load_reduction(resolved.token_reduction, patch, resolved.token_reduction_domain)
    if reduction.warning is not None:
        log.warning("%s", reduction.warning)
    demand = reduction.demand()
    forecast = None
    if rule.growth_risk is not None:
        group_tokens = geometry.page_bytes / geometry.token_bytes
        forecast = GrowthForecast(rule.growth_risk, group_tokens, demand.sides["out"], reduction.base_lengths)
    pace = None
    if resolved.tbt_target_ms is not None:
        pace = Pace(resolved.tbt_target_ms / 1e3, (resolved.tbt_bound_ms or resolved.tbt_target_ms) / 1e3)
    policy = make_policy(
        resolved.scheduler,
        max_model_len=geometry.max_tokens,
        chunk_tokens=None if resolved.dynamic_chunking else resolved.chunk_tokens,
        schedule=chunk_schedule(resolved),
        pace=pace,
        prompt_order=resolved.prompt_order,
        ttft_target_s=None if resolved.ttft_target_ms is None else resolved.ttft_target_ms / 1e3,
    )
    scheduler = Scheduler(
        policy,
        ledger,
        max_num_seqs=resolved.max_num_seqs,
        max_model_len=geometry.max_tokens,
        depth=2 if resolved.device == "cuda" else 1,
        ahead=resolved.device == "cuda",
        forecast=forecast,
        pace=pace,
    )
    store = runner.store
    return EngineLoop(scheduler, LocalExecutor(runner), executor_stats=store.stats, limit_memory=store.set_limit,
                      demand=None if patch is None else demand)
