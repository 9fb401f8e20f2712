"""`python -m scripts.scx leakage`: the table of docs/scx.md on a real model, its record and its picture.

Keys and nonces are fixed, so that the figures repeat; a scheme's strength does not depend on which keys it drew.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from engine.core.errors import ConfigError
from engine.loading.resolve import resolve_model
from engine.tokenization import load_tokenizer
from scripts.benching.environment import environment
from scripts.scx_attacks import gates
from scripts.scx_attacks.capture import PLAIN, Engine
from scripts.scx_attacks.public import PublicModel
from scripts.scx_attacks.table import Probe, Row, Table
from scripts.scx_attacks.text import PASSAGES
from scripts.scx_attacks.view import Rules

COLUMNS = ("A1 V", "A1 K", "A2", "A3", "A4", "A5 0", "A5 D/4", "A5 D", "A5 2D", "A5 half", "A6", "A7 self", "A7")
RATES = ("A8 recall", "A8 reuse", "A9 raw", "A9 sorted", "A9 norms", "A9 gram", "A9 projection")
CHUNK_TOKENS = 100
COLLISION_TOKENS = 24  # positions of A6
FIXED_ROOT = bytes(range(32))  # of a measurement; never of a server


def schemes(block_tokens: int) -> list[Rules]:
    """The rows of the table."""
    return [
        Rules(PLAIN), Rules("perm-static"), Rules("perm"), Rules("rotate"), Rules("mix"),
        Rules("perm", seal_tokens=block_tokens), Rules("mix", seal_tokens=block_tokens),
        Rules("mix", segment_tokens=block_tokens),
        Rules("mix", seal_tokens=block_tokens, segment_tokens=block_tokens),
    ]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Measure, print, write. 1 when a gate does not hold, 2 and one line for what the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m scripts.scx leakage", description=__doc__.splitlines()[2])
    parser.add_argument("--model", default=None, help="folder, GGUF or hub id; default SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16", help="of the engine under attack")
    parser.add_argument("--tokens", type=int, default=224, help="tokens of each prompt; more than twice the head size")
    parser.add_argument("--pool", type=int, default=128, help="candidates of A6 a position, the true token among them")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, default=None, help="also write the record here")
    parser.add_argument("--picture", type=Path, default=None, help="also draw the heat map here (.svg or .png)")
    try:
        return _measure(parser.parse_args(argv))
    except ConfigError as error:
        print(f"{parser.prog}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _measure(args: argparse.Namespace) -> int:
    began = perf_counter()
    torch.set_num_threads(args.threads)
    logging.getLogger("engine").setLevel(logging.ERROR)  # its statement of threats is what this measures
    folder = resolve_model(args.model)
    probe, model = _probe(folder, args)
    table = Table(model, probe)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        key_file = Path(scratch) / "root"
        key_file.touch(mode=0o600)
        key_file.write_text(FIXED_ROOT.hex())
        short = first_layers(folder, probe.deep + 1, Path(scratch) / "model")
        engine = Engine(short, (0, probe.deep), args.dtype, key_file, CHUNK_TOKENS)
        for rules in schemes(max(2, model.spec.head_dim // 4)):
            rows.append(table.row(rules, engine))
            print(f"{perf_counter() - began:6.1f} s  {rules.label}", flush=True)
    broken = gates.problems(rows)
    print("\n" + as_table(rows))
    for line in broken:
        print(f"GATE {line}")
    name = args.model or "SmolLM2-135M-Instruct"
    record = {"model": name, "dtype": args.dtype, "tokens": args.tokens, "prompts": len(probe.prompts),
              "deep_layer": probe.deep, "pool": args.pool, "vocab": model.vocab, "head_dim": model.spec.head_dim,
              "environment": environment("scx", sys.argv[1:]), "seconds": perf_counter() - began,
              "cpu_seconds": process_time(),
              "gates": broken, "rows": [row.as_json() for row in rows]}  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(_rounded(record), indent=1) + "\n")
    if args.picture:
        from scripts.scx_attacks.picture import draw

        draw(rows, args.picture, f"{name}, {args.dtype}")
    print(json.dumps({"model": name, "seconds": round(record["seconds"]), "cpu_seconds": round(record["cpu_seconds"]),
                      "gates_broken": len(broken)}))  # fmt: skip
    return 1 if broken else 0


def _probe(folder: Path, args: argparse.Namespace) -> tuple[Probe, PublicModel]:
    """The passages as tokens, the model with as many layers as the attacks need. Raises ConfigError for --tokens."""
    tokenizer = load_tokenizer(folder)
    prompts = [torch.tensor(tokenizer.encode(passage)) for passage in PASSAGES]
    longest = min(len(prompt) for prompt in prompts)
    depth = PublicModel(folder, 1).spec
    if not 2 * depth.head_dim < args.tokens <= longest:
        raise ConfigError(f"--tokens {args.tokens} is outside {2 * depth.head_dim + 1}..{longest} for this model")
    deep = min(8, depth.layers - 1)
    first = args.tokens // 2
    prompts = [prompt[: args.tokens] for prompt in prompts]
    probe = Probe(prompts, deep, range(first, first + COLLISION_TOKENS), args.pool)
    return probe, PublicModel(folder, deep + 1)


def first_layers(folder: Path, layers: int, into: Path) -> Path:
    """The same model without its later layers, which do not change what the earlier ones write: a third of the time."""
    into.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (into / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    (into / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return into


def as_table(rows: list[Row]) -> str:
    """Two Markdown tables: per cent of tokens recovered (A1-A7), per cent of rows or pairs matched (A8, A9); empty =
    the attack does not apply."""
    recovered = {row.rules.label: {name: one.top1 for name, one in row.recovery.items()} for row in rows}
    matched = {row.rules.label: {name: value for name, (value, _) in row.rates.items()} for row in rows}
    return "\n\n".join(_markdown(columns, cells) for columns, cells in ((COLUMNS, recovered), (RATES, matched)))


def _markdown(columns: Sequence[str], cells: dict[str, dict[str, float]]) -> str:
    """Scheme -> column -> share, as a table in per cent."""
    lines = ["| scheme | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for scheme, row in cells.items():
        shares = (f"{100 * row[name]:.1f}" if name in row else "" for name in columns)
        lines.append(f"| {scheme} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    """The same with numbers to five places."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value
