"""The smallest use of SCX, as SCX-vLLM's users write it: `python -m scripts.scx example [MODEL]`.

The same questions to a plain engine and to one whose first and last layers are encoded; greedy, in float32, so the
answers are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from scx.keys import get_scx_config, scx_env_init

from engine import LLM, SamplingParams

QUESTIONS = ("What is the capital of France?", "Name three rivers.", "Why is the sky blue?")


def main(argv: Sequence[str]) -> int:
    """Ask both engines. 1 when an answer differs."""
    parser = argparse.ArgumentParser(prog="python -m scripts.scx example", description=__doc__)
    parser.add_argument("model", nargs="?", help="folder, GGUF or hub id; default SmolLM2-135M-Instruct")
    model = parser.parse_args(argv).model
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    sampling = SamplingParams(temperature=0.0, max_tokens=32)
    answers: list[list[str]] = []
    layers = ""
    for encode in (False, True):
        scx_env_init(layers if encode else "", "cpu")  # SCX_ENC_LAYERS, SCX_SECURE_DEVICE; before the engine is built
        with LLM(model, dtype="float32", max_model_len=512, kv_pool_bytes=256 << 20) as llm:
            layers = f"0,{llm.spec.layers - 1}"
            answers.append([one.outputs[0].text for one in llm.chat(conversations, sampling, use_tqdm=False)])
        print(f"encoded layers: {get_scx_config().enc_layers or 'none'}")
        for question, answer in zip(QUESTIONS, answers[-1], strict=True):
            print(f"  {question} {answer!r}")
    scx_env_init()
    print("the answers are the same" if answers[0] == answers[1] else "THE ANSWERS DIFFER")
    return 0 if answers[0] == answers[1] else 1
