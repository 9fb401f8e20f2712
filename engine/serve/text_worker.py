"""A process that turns text into ids and back: `python -m engine.serve.text_worker TOKENIZER_FOLDER [PATCH_FOLDER]`.

It exists to be killed: a chat template or a tokenizer that takes too long must not stop anybody else. It reads one job
from its standard input, writes one answer to its standard output, and dies with its parent. It knows no HTTP.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.core.errors import TesseraError, named
from engine.serve import child, wire

ADDRESS_SPACE_BYTES = 8 << 30  # a template that builds a huge text meets MemoryError, not the machine's limit


def count_both(tokenizer: Any, tokens: Sequence[int]) -> wire.Counted:
    """Tokens of a text in the base vocabulary and in the engine's; special ones spell nothing and do not count."""
    spelling = [token for token in tokens if token not in tokenizer.special_ids]
    plain = getattr(tokenizer, "base", tokenizer)
    return wire.Counted(len(plain.encode(tokenizer.decode(spelling), add_special_tokens=False)), len(spelling))


def answer(tokenizer: Any, job: wire.ToText) -> wire.FromText:
    """Do one job. A fault of the text or the template becomes a TextError that quotes neither."""
    try:
        if isinstance(job, wire.CountBoth):
            return count_both(tokenizer, job.tokens)
        if isinstance(job, wire.Decode):
            decoder = getattr(tokenizer, "base", tokenizer) if job.base else tokenizer
            return wire.Decoded(decoder.decode(job.tokens, skip_special_tokens=False))
        if isinstance(job, wire.Convert):
            ids = tokenizer.from_base_ids(job.tokens)
            return wire.Encoded(ids, len(ids), len(job.tokens))
        if isinstance(job, wire.Encode):
            ids, base_ids = tokenizer.encode_both(job.text, job.add_special_tokens)
        else:
            parts = tokenizer.render_parts(job.messages, add_generation_prompt=True)
            size = sum(len(part.text.encode("utf-8", "surrogatepass")) for part in parts)
            if size > job.max_bytes:
                return wire.TextError(f"the rendered messages have {size} bytes; the model's context holds "
                                      f"at most {job.max_bytes}")
            ids, base_ids = tokenizer.encode_parts(parts)
        fits = len(ids) <= job.max_tokens
        return wire.Encoded(ids if fits else [], len(ids), len(base_ids), base_ids if fits and job.both else [])
    except TesseraError as error:
        return wire.TextError(str(error)[:1000])
    except MemoryError:
        return wire.TextError("the text needs more memory than one request may use")
    except Exception as error:
        return wire.TextError(f"the text cannot be processed ({type(error).__name__})")


def main(folder: str, patch: str | None = None) -> int:
    """Load the tokenizer, say so, then answer until the parent closes the pipe."""
    child.die_with_parent()
    child.leave_signals_to_parent()
    writer = child.FrameWriter(child.claim_stdout())
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    from engine.tokenization import load_tokenizer
    from engine.tokenization.vocabulary import Part

    try:
        tokenizer = load_tokenizer(folder, patch)
        if tokenizer.chat_template is not None:
            tokenizer.encode_parts([Part("x", False)])  # makes what the first chat would wait for
    except TesseraError as error:
        writer.send(wire.TextError(named(error)[:4096]))
        return 2
    writer.send(wire.TextReady(min(tokenizer.max_token_bytes, 1 << 20), tokenizer.chat_template is not None))
    while True:
        try:
            job = child.read_frame(0, wire.decode_to_text)
        except (msgspec.DecodeError, ValueError) as error:
            writer.send(wire.TextError(f"the text cannot be processed ({type(error).__name__})"))
            continue
        if job is None:
            return 0
        writer.send(answer(tokenizer, job))


if __name__ == "__main__":
    try:
        os._exit(main(*sys.argv[1:3]))
    except BrokenPipeError:
        os._exit(1)
