"""Flags and the YAML file: precedence, near names, every problem at once, key files, exit status 2 with no trace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.core.errors import ConfigError
from engine.serve.flags import build_parser, parse
from tests.serve.harness import ROOT


def problems(*argv: str) -> list[str]:
    """The lines that these flags are refused with."""
    with pytest.raises(ConfigError) as caught:
        parse(argv, "test")
    return str(caught.value).split("\n")


def test_flag_beats_file_beats_default(tmp_path: Path) -> None:
    """And the file's keys are the flags' names, however spelled."""
    file = tmp_path / "serve.yaml"
    file.write_text("max-num-seqs: 7\nchunk_size: 64\nport: 9001\nmodel_name: org/name\nkv-release-after: never\n"
                    "served-model-name: [a, b]\nseed:\n")
    found = parse(["--config", str(file), "--chunk_size=32", "--port", "9002"], "test")
    assert (found.engine.max_num_seqs, found.engine.chunk_tokens, found.server.port) == (7, 32, 9002)
    assert (found.engine.model, found.server.served_model_name, found.engine.seed) == ("org/name", ("a", "b"), 0)
    assert found.server.host == "127.0.0.1"


def test_the_spellings_of_the_seeds_work() -> None:
    """The user's own documents start servers with these."""
    found = parse(["--model_name", "x/y", "--model_attention_backend", "torch_vattn", "--model_block_size", "2097152",
                   "--model_tensor_parallel_degree", "1"], "test")
    assert (found.engine.model, found.engine.attention_backend) == ("x/y", "torch_vattn")
    assert found.engine.kv_page_bytes == 2097152


def test_a_model_may_stand_alone_and_switches_take_no_value() -> None:
    """`tessera serve MODEL --enforce-eager`."""
    found = parse(["org/name", "--enforce-eager"], "test")
    assert found.engine.model == "org/name" and found.engine.enforce_eager
    assert not parse(["--no-enforce-eager"], "test").engine.enforce_eager
    assert "beside --model" in problems("a", "--model", "b")[0]


BAD = [
    (["--prot", "9000"], "flag --prot is unknown; did you mean '--port'?"),
    (["--prot=9000"], "flag --prot is unknown; did you mean '--port'?"),
    (["--port"], "--port needs a value"),
    (["--port", "65536"], "0..65535"),
    (["--port", "http"], "not an integer"),
    (["a", "b"], "not expected"),
    (["-x"], "flag -x is unknown"),
    (["--api-key", ""], "non-empty"),
    (["--api-key", "abc"], "4 or more"),
    (["--api-key-file", "/does/not/exist"], "No such file"),
    (["--config", "/does/not/exist.yaml"], "No such file"),
    (["--config"], "--config needs a value"),
    (["--trust-remote-code"], "ever executed"),
    (["--trust_remote_code=true"], "ever executed"),
    (["--block-size", "16"], "--kv-page-bytes"),
    (["--attention-backend", "flashinfer"], "block tables"),
    (["--log-level", "verbose"], "known: debug"),
    (["--grace", "-1"], "0.0..86400.0"),
    (["--served-model-name", "a,,b"], "list of names"),
    (["--max-model-len", "1e99"], "not an integer"),
    (["--max-model-len", "9" * 5000], "not an integer"),
]


@pytest.mark.parametrize(("argv", "words"), BAD, ids=[" ".join(argv)[:40] for argv, _ in BAD])
def test_bad_flags_are_refused_by_name(argv: list[str], words: str) -> None:
    """One problem, one line."""
    found = problems(*argv)
    assert len(found) == 1 and words in found[0]


BAD_FILES = [
    ("prot: 9000\n", "'prot' is unknown; did you mean 'port'?"),
    ("- a\n- b\n", "holds a list"),
    ("just text", "holds a str"),
    ("port: [1]\n", "not an integer"),
    ("port: yes\n", "not an integer"),
    ("a: b: c\n", "mapping values"),
    ("port: 1\nport_: &a [*a]\n", "unknown"),
    ("model: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    ("chunk_size: 1\nmax_num_batched_tokens: 2\n", "given twice"),
    ("trust_remote_code: true\n", "ever executed"),
    ("dtype: 3\n", "not a non-empty text"),
    ("api_key: secret-key\n", "chmod 600"),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES, ids=[words for _, words in BAD_FILES])
def test_a_bad_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """Unknown keys are errors, YAML cannot construct objects, keys must not lie about readable."""
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    file.chmod(0o644)
    assert any(words in line for line in problems("--config", str(file)))


def test_key_files(tmp_path: Path) -> None:
    """One key a line, comments allowed; readable by others, empty or short is refused."""
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key\n\nsecond-key\n")
    file.chmod(0o600)
    assert parse(["--api-key-file", str(file), "--api-key", "third-key"], "test").api_keys == (
        "third-key", "first-key", "second-key")  # fmt: skip
    file.chmod(0o640)
    assert "chmod 600" in problems("--api-key-file", str(file))[0]
    file.chmod(0o600)
    file.write_text("# nothing\n")
    assert "holds no key" in problems("--api-key-file", str(file))[0]


def test_all_problems_at_once_status_2_no_traceback() -> None:
    """What a user sees: one line each on standard error, nothing started."""
    done = subprocess.run(
        [sys.executable, "-m", "engine.api_server", "--prot", "1", "--dtype", "int9", "--port", "x", "--api-key", "a"],
        cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 4 and "Traceback" not in done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize(("argv", "status", "words"), [
    ([], 2, "usage: tessera"), (["help"], 0, "serve"), (["sevre"], 2, "did you mean 'serve'"),
    (["--version"], 0, "tessera "), (["serve", "--help"], 0, "--kv-page-bytes"),
    (["serve", "--port"], 2, "needs a value"),
])  # fmt: skip
def test_the_console_command(argv: list[str], status: int, words: str) -> None:
    """`tessera` says what there is; a wrong word suggests the right one."""
    code = "import sys; from engine.serve.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == status and words in done.stdout + done.stderr


def test_help_names_every_flag_of_the_promise() -> None:
    """The names users know are there, with defaults."""
    text = build_parser("tessera serve").format_help()
    promised = ("--model --tokenizer --dtype --max-model-len --max-num-seqs --gpu-memory-utilization --kv-pool-bytes "
                "--tensor-parallel-size --enforce-eager --seed --served-model-name --api-key --host --port --scheduler "
                "--chunk-size --kv-page-bytes --kv-layout --attention-backend --config")  # fmt: skip
    assert not [flag for flag in promised.split() if f"{flag} " not in text]
