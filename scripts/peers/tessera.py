"""This engine behind the same pipes as its peers, so that both are timed alike; see vllm_cpu.py for the protocol.

`settings` in the first line are further fields of EngineConfig, for this engine only.
"""

import json
import os
import sys

from engine.core.clock import MonotonicClock


def main() -> None:
    """Serve runs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.readline())
    import engine

    settings = {"max_model_len": setup["max_model_len"], "max_num_seqs": len(setup["prompts"]), **setup["settings"]}
    llm = engine.LLM(setup["model"], dtype=setup["dtype"], **settings)
    params = [
        engine.SamplingParams(temperature=0, ignore_eos=True, max_tokens=count) for count in setup["output_tokens"]
    ]
    print(json.dumps({"ready": f"tessera {engine.__version__}"}), file=answers, flush=True)
    clock = MonotonicClock()
    for _ in sys.stdin:
        start_s = clock.now_s()
        outputs = llm.generate(setup["prompts"], params, use_tqdm=False)
        seconds = clock.now_s() - start_s
        count = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds": seconds, "output_tokens": count}), file=answers, flush=True)


main()
