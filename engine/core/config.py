"""Every setting of the engine and the server: one typed field each, from which flags, help and checks are derived.

It does not know argparse or YAML (engine/serve/flags.py reads those), torch, or what a machine has: whoever knows
passes facts to the `resolve_*` functions, which return a new configuration. Frozen stays frozen.

A field is a `knob`: its default, its range and its help in one place. `make` accepts every spelling users know
(dashes or underscores, the aliases), turns text into values and reports all problems at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.core.errors import ConfigError
from engine.core.knobs import GIB, MIB, field_problems, knob, near, parse_value, settings, value_problem
from engine.core.registry import Registry

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_CHUNK_TOKENS = 512
DEFAULT_CPU_POOL_BYTES = 4 * GIB  # without --kv-pool-bytes a CPU takes no more than this
LINUX_PAGE_BYTES = 4096
DEFAULT_SEAL_TOKENS = 16
CHUNK_STEP_TOKENS = 32  # both ends of a dynamic chunking schedule are multiples of this

DTYPES = ("auto", "bfloat16", "float16", "float32")
DTYPE_SPELLINGS = {"bf16": "bfloat16", "half": "float16", "fp16": "float16", "float": "float32", "fp32": "float32"}
# Read from the folders: a new policy or backend is a file there and nothing here.
POLICIES = tuple(Registry[object]("policy", "engine.core.policies").names())
BACKENDS = ("auto", *Registry[object]("attention backend", "engine.attention").names())
SCX_SCHEMES = tuple(Registry[object]("SCX scheme", "engine.scx").names())
POLICIES_WITHOUT_CHUNKS = ("orca", "faster_transformer")
_NOT_BUILT = "is not built; use auto"
REFUSED_BACKENDS = {
    **dict.fromkeys(("fa3_vattn", "fa_vattn_sync", "fi_vattn_sync"), _NOT_BUILT),
    **dict.fromkeys(("flashinfer", "flash_attn"), "is called fi_paged or fa_paged here (block tables), or fi_vattn or "
                    "fa_vattn (contiguous)"),
}

# Flags of related engines whose meaning cannot be honoured: refused by name, never ignored.
REFUSED_SETTINGS = {
    "trust_remote_code": "nothing from a model folder is ever executed, so there is no such switch; leave it out",
    "block_size": "there are no blocks of tokens; --kv-page-bytes (alias --model_block_size) sets bytes a page",
    "swap_space": "a preempted request is recomputed, never swapped; leave it out",
    "disable_log_requests": "requests are never logged; leave it out",
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine process needs. `None` and "auto" are decided by the resolve_* functions, when facts are in.

    Raises ConfigError with every problem, one a line.
    """

    model: str | None = knob(
        None, aliases=("model-name",), group="model", default_text=DEFAULT_MODEL,
        help="folder (config.json, tokenizer.json, *.safetensors), .gguf file or model hub id")
    tokenizer: str | None = knob(
        None, group="model", default_text="the model's", help="folder with another tokenizer.json")
    patch: str | None = knob(
        None, group="model", aliases=("patch-tokenizer-path",), default_text="the model folder's patch/, if it has one",
        help="folder of a patched vocabulary (docs/vocabularies.md) that the model was made for")
    dtype: str = knob(
        "auto", choices=DTYPES, spellings=DTYPE_SPELLINGS, aliases=("model-dtype",), group="model",
        help="arithmetic of weights and KV; auto = the checkpoint's (bfloat16 for a quantised GGUF)")
    load_format: str = knob(
        "auto", choices=("auto", "safetensors", "dummy"), aliases=("model-load-format",), group="model",
        help="weights are read from safetensors only; auto converts a GGUF once into the cache",
        refused={"pt": "torch.load executes what a file says; convert it to safetensors",
                 "npcache": "not read; convert it to safetensors",
                 "gguf": "give the .gguf file to --model and leave this at auto"})
    max_model_len: int | None = knob(
        None, lo=1, hi=1 << 24, aliases=("model-max-model-len",), group="model",
        default_text="the model's, or what the pool holds", help="prompt and output tokens of one request at most")
    max_num_seqs: int = knob(
        128, lo=1, hi=8192, aliases=("replica-scheduler-max-batch-size",), group="scheduler",
        help="requests that run at once (each has one slot of virtual memory)")
    gpu_memory_utilization: float = knob(
        0.9, lo=0.01, hi=1.0, group="memory",
        help="part of the device's memory to use; on a CPU: of free memory, at most 4 GiB of KV")
    kv_pool_bytes: int | None = knob(
        None, lo=LINUX_PAGE_BYTES, hi=1 << 46, group="memory", default_text="from --gpu-memory-utilization",
        help="physical KV memory exactly; 4GiB, 512MiB or a number")
    kv_pool_groups: int | None = knob(
        None, lo=1, hi=1 << 34, aliases=("num-gpu-blocks-override",), group="memory",
        default_text="from --kv-pool-bytes", help="the same, counted in page groups")
    kv_page_bytes: int = knob(
        2 * MIB, lo=LINUX_PAGE_BYTES, hi=GIB, aliases=("model-block-size",), group="memory",
        help="unit of physical KV memory: a multiple of 4096 (memfd); 2097152 as on a GPU")
    kv_layout: str = knob(
        "mega", choices=("mega", "per_layer"), group="memory",
        help="mega: one page holds all layers of some tokens; per_layer: one layer's")
    kv_driver: str = knob(
        "auto", choices=("auto", "memfd", "cuda"), group="memory", help="who maps pages; auto = what the device needs")
    kv_release_after_s: float = knob(
        math.inf, lo=0.0, hi=1e9, infinite="never", flag="kv-release-after", group="memory",
        help="seconds after which a finished request's kept pages go back to the system; never = when needed")
    kv_clear: bool = knob(
        False, group="memory", default_text="on when there are several API keys",
        help="give a request's pages back as soon as it ends, so that whoever gets them next reads zeros")
    kv_floor_groups: int = knob(
        0, lo=0, hi=1 << 34, group="memory", help="page groups that --kv-release-after leaves mapped")
    scheduler: str = knob(
        "sarathi", choices=POLICIES, aliases=("replica-scheduler-provider", "scheduler-type", "scheduling-policy"),
        group="scheduler", help="which policy fills a step")
    chunk_tokens: int | None = knob(
        None, lo=1, hi=1 << 20, flag="chunk-size", group="scheduler",
        aliases=("max-num-batched-tokens", "sarathi-scheduler-chunk-size", "simple-chunking-scheduler-chunk-size",
                 "vllm-scheduler-max-tokens-in-batch"),
        default_text="512; policy vllm: --max-model-len",
        help="token budget of a step (sarathi, simple_chunking) or of a batch of prompts (vllm)")
    admission: str = knob(
        "exact", choices=("exact", "upstream"), group="scheduler",
        help="when a sequence may grow: exact = a page is free if it needs one; upstream = as published")
    admission_risk: float | None = knob(
        None, lo=1e-9, hi=0.5, group="scheduler", default_text="off: only the watermark is left free",
        help="leave free what running requests are expected to grow by, at this risk; fewer preemptions, more waiting")
    token_reduction: str | None = knob(
        None, group="scheduler", default_text="auto: what the patch's artefact stores",
        help="patched tokens for a base token: auto, a file of figures, or a number (warned about)")
    token_reduction_domain: str | None = knob(
        None, group="scheduler", default_text="held_out", help="which of the stored domains the traffic is like")
    dynamic_chunking: bool = knob(
        False, flag="enable-dynamic-chunking-schedule", group="scheduler",
        aliases=("enable-dynamic-chunking", "sarathi-scheduler-enable-dynamic-chunking-schedule"),
        help="sarathi: chunks shrink as a prompt's computed part grows")
    low_chunk_tokens: int | None = knob(
        None, lo=CHUNK_STEP_TOKENS, hi=1 << 20, flag="low-chunk-size", group="scheduler",
        aliases=("sarathi-scheduler-low-chunk-size",), default_text="128 with dynamic chunking",
        help="smallest chunk; a multiple of 32")
    high_chunk_tokens: int | None = knob(
        None, lo=CHUNK_STEP_TOKENS, hi=1 << 20, flag="high-chunk-size", group="scheduler",
        aliases=("sarathi-scheduler-high-chunk-size",), default_text="2048 with dynamic chunking",
        help="largest chunk; a multiple of 32")
    chunk_schedule_max_tokens: int | None = knob(
        None, lo=1, hi=1 << 24, aliases=("sarathi-scheduler-chunk-schedule-max-tokens",), group="scheduler",
        default_text="--max-model-len with dynamic chunking", help="prompt tokens over which the chunks shrink")
    chunk_schedule_stages: int | None = knob(
        None, lo=1, hi=4096, aliases=("sarathi-scheduler-chunk-schedule-stages",), group="scheduler",
        default_text="16 with dynamic chunking", help="number of different chunk sizes")
    chunk_schedule_budget: str = knob(
        "request", choices=("request", "step"), group="scheduler",
        help="dynamic chunking: request = each prompt fills the step up to its own size (as published); "
             "step = the smallest size of a step's prompts bounds the step")
    prompt_order: str = knob(
        "arrival", choices=("arrival", "shortest", "deadline"), group="scheduler",
        help="sarathi: which prompts of the first 512 in line get a step's tokens first: the oldest; those with the "
             "fewest tokens left (a prompt that waited counts as shorter, so none starves); or the shortest that "
             "make no other miss --ttft-target-ms (one prompt in a hundred may be put off so that the others make it, "
             "and those that take most of it by themselves wait)")
    ttft_target_ms: float | None = knob(
        None, lo=1.0, hi=3600000.0, group="scheduler", default_text="none",
        help="--prompt-order deadline: from arrival to the first token [ms]")
    tbt_target_ms: float | None = knob(
        None, lo=0.1, hi=60000.0, group="scheduler", default_text="chunks of a fixed size",
        help="sarathi: chunks of at most --chunk-size, as large as steps with decodes last this long [ms]")
    tbt_bound_ms: float | None = knob(
        None, lo=0.1, hi=60000.0, group="scheduler", default_text="--tbt-target-ms",
        help="how long such a step may last while many prompts keep waiting [ms]")
    attention_backend: str = knob(
        "auto", choices=BACKENDS, refused=REFUSED_BACKENDS, aliases=("model-attention-backend",), group="engine",
        help="who computes attention over the slots")
    device: str = knob(
        "auto", choices=("auto", "cpu", "cuda"), group="engine",
        help="where the model runs; auto = a GPU that the kernels run on (sm_80 or later, with Triton), else the CPU")
    seed: int = knob(
        0, lo=0, hi=(1 << 63) - 1, group="engine",
        help="seeds requests that bring none: the same requests in the same order give the same samples")
    threads: int | None = knob(
        None, lo=1, hi=1024, group="engine", default_text="one for each usable core", help="threads of a step")
    tensor_parallel_size: int = knob(
        1, lo=1, hi=1024, aliases=("model-tensor-parallel-degree",), group="engine", help="only 1 is built")
    pipeline_parallel_size: int = knob(
        1, lo=1, hi=1024, aliases=("model-pipeline-parallel-degree",), group="engine", help="only 1 is built")
    enforce_eager: bool = knob(
        False, group="engine", help="never record the step as a graph (a CPU never does)")
    scx_layers: str | None = knob(
        None, may_be_empty=True, group="scx", default_text="SCX_ENC_LAYERS, else none: SCX is off",
        help='layers whose queries, keys and values are encoded: 0,27 or all or "" (docs/scx.md says what it protects)')
    scx_secure_device: str | None = knob(
        None, group="scx", default_text="SCX_SECURE_DEVICE, else cpu",
        help="where keys and maps live: cpu or cuda:N, in this process (no isolation); worker, a process of its own; "
             "unix:PATH, one that runs (python -m engine.scx.secure_worker)")
    scx_scheme: str | None = knob(
        None, choices=SCX_SCHEMES, spellings={"perm_static": "perm-static"}, group="scx", default_text="perm",
        help="secret maps: permutations, orthogonal (rotate) or invertible (mix) matrices; perm-static is for tests")
    scx_page_seal: bool = knob(
        False, group="scx", help="shuffle the cached tokens of an encoded layer within blocks that are full")
    scx_seal_tokens: int | None = knob(
        None, lo=2, hi=1024, group="scx", default_text="16 with --scx-page-seal", help="tokens of a sealed block")
    scx_segment_tokens: int | None = knob(
        None, lo=1, hi=1 << 20, group="scx", default_text="one key a request",
        help="a fresh key for every so many tokens of a request; slow, attention runs once a key")
    scx_key_file: str | None = knob(
        None, group="scx", default_text="a fresh secret for this process",
        help="root secret: a file with 64 hexadecimal digits that only its owner may read")
    scx_debug: bool | None = knob(
        None, group="scx", default_text="SCX_ENABLE_DEBUG, else false",
        help="log layers, device and shapes of the secure side; never keys or tensors")

    def __post_init__(self) -> None:
        problems = field_problems(self) or engine_problems(self)
        if problems:
            raise ConfigError("\n".join(problems))


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the HTTP process needs beside the engine's settings."""

    host: str = knob("127.0.0.1", group="server", help="address to listen on; 0.0.0.0 is every interface")
    port: int = knob(8000, lo=0, hi=65535, group="server", help="TCP port; 0 takes a free one")
    served_model_name: tuple[str, ...] = knob(
        (), group="server", default_text="--model",
        help="what clients call the model; several: separate with commas")
    api_key: str | None = knob(
        None, group="access", default_text="none: every route is open",
        help="bearer key of every route but /health, /ready, /metrics and / (others see argv: prefer a file)")
    api_key_file: str | None = knob(
        None, group="access", default_text="none", help="file with keys, one a line, only its owner may read")
    admin_key: str | None = knob(
        None, group="access", default_text="none: no admin routes", help="another key, for admin routes")
    metrics_key: str | None = knob(
        None, group="access", default_text="none: /metrics is open", help="bearer key of /metrics")
    grace_s: float = knob(
        30.0, lo=0.0, hi=86400.0, flag="grace", group="server",
        help="seconds that running requests may take to finish after SIGTERM")
    max_waiting: int = knob(
        2048, lo=1, hi=1 << 20, group="server",
        help="samples in the server at once; more are answered 503 with Retry-After")
    text_workers: int = knob(
        2, lo=1, hi=64, group="server", help="processes that render chat templates and encode text")
    stall_abort_s: float = knob(
        60.0, lo=0.1, hi=86400.0, flag="stall-abort", group="server",
        help="a client that reads nothing for so many seconds loses its request")
    log_level: str = knob(
        "info", choices=("debug", "info", "warning", "error"), group="server", help="least level of log lines")

    def __post_init__(self) -> None:
        problems = field_problems(self) or server_problems(self)
        if problems:
            raise ConfigError("\n".join(problems))


Config = TypeVar("Config", EngineConfig, ServerConfig)


# ---------------------------------------------------------------- checks across fields


def _chunk_problems(config: EngineConfig) -> list[str]:
    problems = []
    if config.scheduler in POLICIES_WITHOUT_CHUNKS and config.chunk_tokens is not None:
        problems.append(
            f"--chunk-size {config.chunk_tokens}: policy {config.scheduler} runs whole prompts without a budget; "
            "leave it out or use --scheduler sarathi")
    if not config.dynamic_chunking:
        for name, flag in (("low_chunk_tokens", "low-chunk-size"), ("high_chunk_tokens", "high-chunk-size"),
                           ("chunk_schedule_max_tokens", "chunk-schedule-max-tokens"),
                           ("chunk_schedule_stages", "chunk-schedule-stages")):
            if getattr(config, name) is not None:
                problems.append(f"--{flag} {getattr(config, name)} needs --enable-dynamic-chunking-schedule")
        return problems
    if config.scheduler != "sarathi":
        problems.append(f"--enable-dynamic-chunking-schedule needs --scheduler sarathi, not {config.scheduler}")
    if config.chunk_tokens is not None:
        problems.append(f"--chunk-size {config.chunk_tokens} contradicts --enable-dynamic-chunking-schedule; "
                        "use --low-chunk-size and --high-chunk-size")
    low, high = config.low_chunk_tokens or 128, config.high_chunk_tokens or 2048
    for flag, value in (("low-chunk-size", low), ("high-chunk-size", high)):
        if value % CHUNK_STEP_TOKENS:
            problems.append(f"--{flag} {value} is not a multiple of {CHUNK_STEP_TOKENS}")
    if low > high:
        problems.append(f"--low-chunk-size {low} is above --high-chunk-size {high}")
    return problems


def _pace_problems(config: EngineConfig) -> list[str]:
    target, bound, problems = config.tbt_target_ms, config.tbt_bound_ms, []
    if config.prompt_order != "arrival" and (config.scheduler != "sarathi" or config.dynamic_chunking):
        problems.append(f"--prompt-order {config.prompt_order} needs --scheduler sarathi without a dynamic chunking "
                        "schedule")
    if config.prompt_order == "deadline" and None in (config.ttft_target_ms, target):
        problems.append("--prompt-order deadline needs --ttft-target-ms and --tbt-target-ms, say 1000 and 20")
    if config.prompt_order != "deadline" and config.ttft_target_ms is not None:
        problems.append(f"--ttft-target-ms {config.ttft_target_ms} needs --prompt-order deadline")
    if target is None:
        return problems if bound is None else [*problems, f"--tbt-bound-ms {bound} needs --tbt-target-ms"]
    if bound is not None and bound < target:
        problems.append(f"--tbt-bound-ms {bound} is below --tbt-target-ms {target}")
    if config.scheduler != "sarathi" or config.dynamic_chunking:
        problems.append(f"--tbt-target-ms {target} needs --scheduler sarathi without a dynamic chunking schedule")
    return problems


def engine_problems(config: EngineConfig) -> list[str]:
    """Every contradiction between fields, and every value that is well-formed but not built."""
    problems = _chunk_problems(config) + _pace_problems(config)
    if config.admission_risk is not None and config.admission != "exact":
        problems.append(f"--admission-risk {config.admission_risk} needs --admission exact")
    if config.admission_risk is not None and config.scheduler in POLICIES_WITHOUT_CHUNKS:
        problems.append(f"--admission-risk {config.admission_risk}: policy {config.scheduler} reserves the whole "
                        "context, so nothing grows; leave it out")
    for flag, degree in (("tensor-parallel-size", config.tensor_parallel_size),
                         ("pipeline-parallel-size", config.pipeline_parallel_size)):
        if degree != 1:
            problems.append(f"--{flag} {degree}: this build runs the model in one process; use --{flag} 1")
    if config.kv_page_bytes % LINUX_PAGE_BYTES:
        below = max(1, config.kv_page_bytes // LINUX_PAGE_BYTES) * LINUX_PAGE_BYTES
        problems.append(f"--kv-page-bytes {config.kv_page_bytes} is not a multiple of {LINUX_PAGE_BYTES} "
                        f"(the system's page); use {below} or {2 * MIB}")
    if config.kv_pool_bytes is not None and config.kv_pool_groups is not None:
        problems.append("--kv-pool-bytes and --num-gpu-blocks-override (page groups) both size the pool; give one")
    if config.kv_pool_bytes is not None and config.kv_pool_bytes < 2 * config.kv_page_bytes:
        problems.append(f"--kv-pool-bytes {config.kv_pool_bytes} holds less than one page of K and one of V; "
                        f"use at least {2 * config.kv_page_bytes}, or a smaller --kv-page-bytes")
    return problems + _scx_problems(config)


def _scx_problems(config: EngineConfig) -> list[str]:
    problems = []
    if config.scx_seal_tokens is not None and not config.scx_page_seal:
        problems.append(f"--scx-seal-tokens {config.scx_seal_tokens} needs --scx-page-seal")
    seal = config.scx_seal_tokens or DEFAULT_SEAL_TOKENS
    if config.scx_segment_tokens and config.scx_page_seal and config.scx_segment_tokens % seal:
        problems.append(f"--scx-segment-tokens {config.scx_segment_tokens} is not a multiple of the {seal} tokens of a "
                        "sealed block, so a block would hold two keys")
    if config.scx_segment_tokens and config.scx_scheme == "perm-static":
        problems.append("--scx-segment-tokens needs a key for each request; perm-static has one for all of them")
    return problems


def server_problems(config: ServerConfig) -> list[str]:
    """Keys that are no keys: an empty or short secret is an error, never "no check"."""
    problems = []
    for flag in ("api_key", "admin_key", "metrics_key"):
        key = getattr(config, flag)
        if key is not None and (len(key) < 4 or not key.isascii() or not key.isprintable() or " " in key):
            problems.append(f"--{flag.replace('_', '-')} must be 4 or more printable ASCII signs, no spaces")
    if config.admin_key is not None and config.admin_key == config.api_key:
        problems.append("--admin-key must differ from --api-key")
    return problems


# ---------------------------------------------------------------- from names and text


def make(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A configuration from names as users spell them. Raises ConfigError with every problem, one a line.

    values: any accepted name -> text or typed value. Unknown and refused names, bad values and contradictions are
    all reported together.
    """
    known = settings(kind)
    by_name = {name: setting for setting in known for name in setting.names}
    problems: list[str] = []
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        key = str(name).lstrip("-").replace("-", "_").lower()
        setting = by_name.get(key)
        if setting is None:
            reason = REFUSED_SETTINGS.get(key)
            problems.append(f"--{key.replace('_', '-')}: {reason}" if reason
                            else f"setting {str(name)!r} is unknown{near(key, list(by_name))}")
            continue
        parsed[setting.name] = parse_value(setting, value)
        problem = value_problem(setting, parsed[setting.name])
        if problem:
            problems.append(problem)
            del parsed[setting.name]
    try:
        config = kind(**parsed)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


# ---------------------------------------------------------------- what `auto` means, once the facts are known


def resolve_auto(
    config: EngineConfig, *, checkpoint_dtype: str, max_positions: int, usable_cores: int, device: str = "cpu"
) -> EngineConfig:
    """Every "auto" and None that model and machine decide; the pool, and whether the length fits it, come later.

    checkpoint_dtype: as config.json says ("bfloat16", ...). max_positions: tokens the model was made for.
    Raises ConfigError when an explicit length is beyond the model's.
    """
    if config.max_model_len is not None and config.max_model_len > max_positions:
        raise ConfigError(f"--max-model-len {config.max_model_len} exceeds the model's {max_positions} positions; "
                          f"use at most {max_positions}")
    dtype = config.dtype if config.dtype != "auto" else DTYPE_SPELLINGS.get(checkpoint_dtype, checkpoint_dtype)
    if dtype not in DTYPES[1:]:
        raise ConfigError(f"the checkpoint's dtype {dtype!r} is not served; use --dtype {', '.join(DTYPES[1:])}")
    driver = "cuda" if device == "cuda" else "memfd"
    if config.kv_driver not in ("auto", driver):
        raise ConfigError(f"--kv-driver {config.kv_driver} cannot map memory of device {device}; use {driver} or auto")
    resolved = dataclasses.replace(
        config, dtype=dtype, device=device, kv_driver=driver,
        max_model_len=config.max_model_len or max_positions, threads=config.threads or usable_cores)
    return resolve_chunks(resolved)


def resolve_chunks(config: EngineConfig) -> EngineConfig:
    """The step's token budget by policy, None for orca and faster_transformer; needs config.max_model_len."""
    length = config.max_model_len
    if length is None:
        raise ConfigError("max_model_len must be resolved before the chunk size")
    if config.dynamic_chunking:
        return dataclasses.replace(
            config, low_chunk_tokens=config.low_chunk_tokens or 128,
            high_chunk_tokens=config.high_chunk_tokens or 2048,
            chunk_schedule_max_tokens=config.chunk_schedule_max_tokens or length,
            chunk_schedule_stages=config.chunk_schedule_stages or 16)
    if config.chunk_tokens is not None or config.scheduler in POLICIES_WITHOUT_CHUNKS:
        return config
    return dataclasses.replace(config, chunk_tokens=length if config.scheduler == "vllm" else DEFAULT_CHUNK_TOKENS)


def resolve_pool_groups(
    config: EngineConfig, *, group_bytes: int, free_bytes: int, most_bytes: int = DEFAULT_CPU_POOL_BYTES
) -> int:
    """Page groups of the pool. group_bytes: physical bytes of one group; free_bytes: memory the machine can give.

    Raises ConfigError when not even one group fits.
    """
    if config.kv_pool_groups is not None:
        return config.kv_pool_groups
    pool_bytes = config.kv_pool_bytes
    if pool_bytes is None:
        pool_bytes = min(int(free_bytes * config.gpu_memory_utilization), most_bytes)
    if pool_bytes < group_bytes:
        raise ConfigError(f"a KV pool of {pool_bytes} bytes holds no page group of {group_bytes} bytes; "
                          f"use --kv-pool-bytes {group_bytes} or more, or a smaller --kv-page-bytes")
    return pool_bytes // group_bytes
