"""lm-eval's tasks on engine.LLM, plain or with encoded layers: `pip install lm-eval`, then

    python -m scripts.scx lm-eval --tasks lambada_openai [--layers 0,29 --scheme perm] [--limit 200]

Most tasks fetch their texts from a hub. Where there is none, --cloze FILE.jsonl (scripts.corpora) makes a task of the
passages of `scripts.scx accuracy`, scored by lm-eval. The server's completions route is no way in for tasks that score
given answers, since `echo` with `logprobs` is refused there; --task-folder writes the passages as a task that
generates, for lm-eval's `local-completions`, and ends. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine import LLM, SamplingParams
from engine.core.errors import ConfigError
from scripts.benching.environment import environment
from scripts.scx_accuracy import ANSWER_TOKENS, clozes, python_reference, read_corpus
from scripts.scx_scoring import score

CLOZE, GENERATED = "tessera_cloze", "tessera_cloze_generated"
TEXTS = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {texts}
test_split: test
doc_to_text: "{{{{passage}}}}"
"""
# what lm-eval's own LAMBADA asks: is the last word, as it stands, the likeliest continuation?
SCORED = TEXTS + """output_type: loglikelihood
doc_to_target: "{{{{' ' + word}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
# what `scripts.scx accuracy` asks: does the answer begin with that word?
ANSWERED = TEXTS + """output_type: generate_until
doc_to_target: "{{{{word}}}}"
generation_kwargs: {{until: [], max_gen_toks: {tokens}, do_sample: false, temperature: 0.0}}
filter_list:
  - name: first word
    filter:
      - {{function: regex, regex_pattern: '^\\s*([A-Za-z]+)'}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
"""


def continuation(llm: LLM, context: str, answer: str) -> tuple[float, bool]:
    """(logarithm of the answer's probability after the context, whether each of its tokens was the likeliest). An empty
    context is the token that texts end with. A context longer than the engine takes loses its beginning."""
    stripped = context.rstrip()  # blanks belong to the word behind them, in most vocabularies
    answer = context[len(stripped) :] + answer
    before = llm.tokenizer.encode(stripped) if stripped else [llm.tokenizer.eos_ids[0]]
    whole = llm.tokenizer.encode(stripped + answer) if stripped else before + llm.tokenizer.encode(answer)
    count = len(whole) - len(before)
    found = score(llm, whole[-llm.engine.scheduler.length_limit :])
    return float(found.logprobs[-count:].sum()), bool(found.likeliest[-count:].all())


def rolling(llm: LLM, text: str) -> float:
    """Logarithm of a text's probability, in windows of the engine's length that do not overlap, each token once."""
    end, total = llm.tokenizer.eos_ids[0], 0.0
    tokens, most = llm.tokenizer.encode(text), llm.engine.scheduler.length_limit - 1
    for start in range(0, len(tokens), most):
        first = end if start == 0 else tokens[start - 1]
        total += float(score(llm, [first, *tokens[start : start + most]]).logprobs.sum())
    return total


def generated(llm: LLM, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Answers to (context, what lm-eval says of how to generate)."""
    rules = []
    for _, wanted in requests:
        stop = wanted.get("until") or ()
        rules.append(SamplingParams(
            max_tokens=int(wanted.get("max_gen_toks", 256)), stop=(stop,) if isinstance(stop, str) else tuple(stop),
            temperature=float(wanted.get("temperature", 0.0)) if wanted.get("do_sample") else 0.0))  # fmt: skip
    return [result.outputs[0].text for result in llm.generate([context for context, _ in requests], rules)]


def as_lm_eval(llm: LLM) -> Any:
    """The engine as lm-eval's model. Raises ConfigError where lm-eval is not installed."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ConfigError(f"lm-eval is not installed ({error}); pip install lm-eval") from None

    class Tessera(LM):  # type: ignore[misc]  # lm-eval has no types
        """What lm-eval asks of a model, answered by the functions above."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """See continuation()."""
            return [continuation(llm, *request.args) for request in tqdm(requests, disable=None)]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            """See rolling()."""
            return [rolling(llm, request.args[0]) for request in tqdm(requests, disable=None)]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """See generated()."""
            return generated(llm, [request.args for request in requests])

    return Tessera()


def write_task(corpus: Path | None, count: int, folder: Path) -> None:
    """The cloze tasks' files, for --include-path. corpus: None = Python's language reference."""
    passages = clozes(python_reference() if corpus is None else read_corpus(corpus), count)
    if not passages:
        raise ConfigError(f"--cloze {corpus}: no passage fits")
    folder.mkdir(parents=True, exist_ok=True)
    texts = folder.resolve() / "cloze.jsonl"
    lines = (json.dumps({"passage": one.passage, "word": one.word}) for one in passages)
    texts.write_text("\n".join(lines) + "\n", "utf-8")
    for name, task in ((CLOZE, SCORED), (GENERATED, ANSWERED)):
        (folder / f"{name}.yaml").write_text(task.format(name=name, texts=texts, tokens=ANSWER_TOKENS), "utf-8")


def main(argv: Sequence[str]) -> int:
    """Run the tasks. 2 and one line for what the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m scripts.scx lm-eval", description=__doc__)
    parser.add_argument("--tasks", default="", help="lm-eval's names, with commas")
    parser.add_argument("--cloze", type=Path, help="JSON lines with texts, to make a task of")
    parser.add_argument("--task-folder", type=Path, help="write the passages' tasks here (without --cloze, of Python's "
                                                         "language reference) and end")  # fmt: skip
    parser.add_argument("--include-path", type=Path, help="a folder with tasks of your own")
    parser.add_argument("--limit", type=int, default=200, help="documents of a task")
    parser.add_argument("--model", default=None)
    parser.add_argument("--layers", default="", help="encoded ones, as --scx-layers")
    parser.add_argument("--scheme", default="perm")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    logging.getLogger("engine").setLevel(logging.ERROR)
    try:
        return _run(args)
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if args.task_folder is not None:
        write_task(args.cloze, args.limit, args.task_folder)
        print(json.dumps({"tasks": [CLOZE, GENERATED], "include_path": str(args.task_folder)}))
        return 0
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not tasks and args.cloze is None:
        raise ConfigError("no task; give --tasks, or --cloze with texts")
    scx = {"scx_layers": args.layers} | ({"scx_scheme": args.scheme} if args.layers else {})
    pool = {"kv_pool_bytes": 1 << 30} if args.device == "cpu" else {}
    with tempfile.TemporaryDirectory() as scratch:
        if args.cloze is not None:
            write_task(args.cloze, args.limit, Path(scratch))
            tasks.append(CLOZE)
        folders = [str(folder) for folder in (args.include_path, Path(scratch)) if folder is not None]
        with LLM(args.model, dtype=args.dtype, device=args.device, max_model_len=args.max_model_len, max_num_seqs=16,
                 **pool, **scx) as llm:  # fmt: skip
            model = as_lm_eval(llm)
            import lm_eval
            from lm_eval.tasks import TaskManager

            found = lm_eval.simple_evaluate(model=model, tasks=tasks, limit=args.limit,
                                            task_manager=TaskManager(include_path=folders))  # fmt: skip
    record = {"workload": f"lm-eval-{'-'.join(tasks)}", "layers": args.layers,
              "scheme": args.scheme if args.layers else "plain",
              "model": args.model or "SmolLM2-135M-Instruct", "dtype": args.dtype, "limit": args.limit,
              "environment": environment("scx", sys.argv[1:]), "results": found["results"]}  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
    for name, figures in found["results"].items():
        print(name, {key: value for key, value in figures.items() if isinstance(value, float)})
    print(json.dumps(record, default=str))
    return 0
