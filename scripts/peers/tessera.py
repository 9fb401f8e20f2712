"""This engine behind the same pipes as its peers, so that both are timed alike; see vllm_cpu.py for the protocol."""

import json
import os
import sys
import time


def main() -> None:
    """Serve runs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.readline())
    import engine

    llm = engine.LLM(setup["model"], dtype=setup["dtype"], max_model_len=2048, max_num_seqs=len(setup["prompts"]))
    params = engine.SamplingParams(temperature=0, ignore_eos=True, max_tokens=setup["output_tokens"])
    print(json.dumps({"ready": f"tessera {engine.__version__}"}), file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        outputs = llm.generate(setup["prompts"], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        count = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds": seconds, "output_tokens": count}), file=answers, flush=True)


main()
