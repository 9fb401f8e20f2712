"""What encoded rows leak, attacked: the table of docs/scx.md in small, on the engine's own slabs.

A tiny random Llama in bfloat16; keys and nonces are fixed, so that a red run repeats. The attacks get weights and
views, never keys (scripts/scx_attacks).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.scx.keys import Scope, Secret, SessionKeys
from engine.scx.schemes import maps_of, schemes
from engine.tokenization import load_tokenizer
from scripts.scx_attacks import collision, gates, known, link, rows, scores
from scripts.scx_attacks.capture import PLAIN, Device, Engine
from scripts.scx_attacks.public import PublicModel
from scripts.scx_attacks.table import Probe, Table
from scripts.scx_attacks.text import PASSAGES
from scripts.scx_attacks.view import Guess, Rules, View, places
from tessera_kernels.head_maps import map_heads
from tests.models import smollm2_dir, tiny_llama_dir

VOCAB, HEAD_DIM, DEEP = 2048, 32, 2
PROMPTS, TOKENS, CHUNK = 3, 256, 100
SEGMENT = HEAD_DIM // 4
SCHEMES = (
    Rules("perm-static"), Rules("perm"), Rules("rotate"), Rules("mix"), Rules("perm", seal_tokens=16),
    Rules("mix", seal_tokens=16), Rules("mix", segment_tokens=SEGMENT),
    Rules("mix", seal_tokens=SEGMENT, segment_tokens=SEGMENT),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_fixtures() -> Iterator[None]:
    """As conftest's, for this module's fixtures, which are made before it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 heads over 2 KV heads of 32, 4 layers, 2048 tokens."""
    return tiny_llama_dir(tmp_path_factory.mktemp("leakage"), vocab_size=VOCAB, hidden_size=256, num_hidden_layers=4,
                          num_attention_heads=8, num_key_value_heads=2, intermediate_size=512)  # fmt: skip


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "root"
    file.write_text(bytes(range(32)).hex())
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def prompts() -> list[torch.Tensor]:
    """Random tokens, and a passage that comes twice (A8 needs equal tokens)."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(VOCAB, (TOKENS,), generator=generator) for _ in range(PROMPTS)]
    for prompt in made:
        prompt[200:220] = prompt[20:40]
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> PublicModel:
    return PublicModel(folder, DEEP + 1)


@pytest.fixture(scope="module")
def table(model: PublicModel, prompts: list[torch.Tensor]) -> Table:
    return Table(model, Probe(prompts, DEEP, range(40, 46), pool=256, pairs=4))


@pytest.fixture(scope="module")
def capture(folder: Path, key_file: Path) -> Engine:
    return Engine(folder, (0, DEEP), "bfloat16", key_file, CHUNK)


def test_attacks_take_no_keys() -> None:
    """An attack's arguments are public weights, views, known tokens and numbers: there is no way in for a key."""
    allowed = {"PublicModel", "View", "torch.Tensor", "list[Rows]", "range", "str", "bool"}
    attacks = [rows.nearest_value, rows.nearest_key, rows.sorted_values, rows.sorted_magnitudes, rows.norm_fingerprint,
               rows.scaled_norms, known.known_plaintext, collision.collide, scores.self_scores, scores.pairwise_scores,
               link.equal_rows, link.reuse_alarm, link.linked]  # fmt: skip
    for attack in attacks:
        assert {p.annotation for p in inspect.signature(attack).parameters.values()} <= allowed, attack
    assert {field.name for field in View.__dataclass_fields__.values()} == {"rules", "layer", "k", "v", "q", "live_k"}


def test_plain_falls_to_every_attack(table: Table, capture: Engine) -> None:
    """An attack that does not work on plain rows would prove nothing about encoded ones."""
    assert gates.problems([table.row(Rules(PLAIN), capture)]) == []


@pytest.mark.parametrize("rules", SCHEMES, ids=lambda rules: rules.label)
def test_schemes(table: Table, capture: Engine, rules: Rules) -> None:
    """Each scheme holds where it should, and falls where it must (gates.py), A7 always among that."""
    found = table.row(rules, capture)
    assert gates.problems([found]) == []
    falls = {"perm": ("A2", "A3", "A4", "A6"), "rotate": ("A4", "A6")}.get(rules.scheme.removesuffix("-static"), ())
    if not rules.segment_tokens and not rules.seal_tokens:
        falls += ("A5 D", "A5 2D")  # one fixed linear map falls to D known tokens, a rotation or permutation to fewer
        falls += () if rules.scheme == "mix" else ("A5 D/4",)
        assert found.rates["A8 recall"][0] > gates.WORKS
    for attack in falls:
        assert found.recovery[attack].top1 > gates.WORKS, attack
    if rules.segment_tokens:
        assert found.rates["A8 recall"][0] < 0.05


@pytest.mark.parametrize("scheme", ["perm", "rotate", "mix"])
def test_chance_over_many_keys(model: PublicModel, scheme: str) -> None:
    """The gates' "near chance" is strict here: over the whole vocabulary under several keys, nearest neighbours find at
    most five times what guessing finds, and so do sorted coordinates of rotated and mixed rows at length 1."""
    known, everyone = model.first_rows(), torch.arange(VOCAB)
    hits = {"A1": [], "A2": [], "A3": []}  # type: ignore[var-annotated]
    for number in range(8):
        keys = SessionKeys(Secret(bytearray(range(32))), number.to_bytes(16, "big"), Scope(b"tiny", scheme))
        maps = maps_of(schemes[scheme](), keys, [0], 2, HEAD_DIM)
        v = map_heads(known.v, maps.v, torch.zeros(VOCAB, dtype=torch.int32))
        view = View(Rules(scheme), 0, v, v)
        hits["A1"].append(places(rows.nearest_value(model, view), everyone) < 1)
        if scheme != "perm" and number == 0:
            hits["A2"].append(places(rows.sorted_values(model, view, shape_only=True), everyone) < 1)
            hits["A3"].append(places(rows.sorted_magnitudes(model, view, shape_only=True), everyone) < 1)
    for name, each in hits.items():
        assert not each or np.mean(each) <= gates.CHANCE_FACTOR / VOCAB, name


def test_gates_notice(table: Table, capture: Engine) -> None:
    """A scheme that is weaker than its name fails: permuted rows handed in as `mix`, plain ones as `perm`."""
    permuted = table.row(Rules("perm"), capture)
    assert any("A4" in line for line in gates.problems([replace(permuted, rules=Rules("mix"))]))
    plain = table.row(Rules(PLAIN), capture)
    said = gates.problems([replace(plain, rules=Rules("perm"))])
    assert any("A1 V" in line for line in said) and any("A8" in line for line in said)
    assert len(gates.problems([replace(permuted, rules=Rules(PLAIN))])) >= 3
    assert permuted.linked_rows == 4 * TOKENS and not gates.problems([permuted])
    linked = replace(permuted, rates=permuted.rates | {"A9 raw": (0.03, 1 / TOKENS)})
    assert any("A9 links 3.0% of raw rows" in line for line in gates.problems([linked]))


@pytest.mark.parametrize("scheme", ["perm", "rotate", "mix"])
def test_key_reuse_raises_the_alarm(folder: Path, key_file: Path, prompts: list[torch.Tensor], scheme: str) -> None:
    """An engine that gave two requests one nonce is caught by A8; with two nonces it is silent."""
    views = []
    with Device(folder, Rules(scheme), dtype="bfloat16", max_tokens=TOKENS, layers="0", key_file=key_file) as device:
        for nonce in (b"one nonce 123456", b"one nonce 123456", b"another one 1234"):
            request = device.open(TOKENS, nonce)
            device.feed(request, prompts[0], CHUNK)
            views.append(device.view(request, 0))
            device.close(request)
    assert link.reuse_alarm(views[0], views[1])
    assert not link.reuse_alarm(views[0], views[2])


def stolen(device: Device, prompt: torch.Tensor, cached: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The rest of a prompt computed by the owner of the cache and by a thief, who put a copy of it under a session of
    their own. Returns layer 0's decoded attention and the logits, of the owner and of the thief."""
    owner, thief = (device.open(len(prompt), nonce) for nonce in (b"the owner's 1234", b"the thief's 1234"))
    for request in (owner, thief):
        device.feed(request, prompt[:cached], CHUNK)
    for layer in range(device.spec.layers):
        for mine, theirs in zip(device.slabs(thief, layer), device.slabs(owner, layer), strict=True):
            mine.copy_(theirs)
    logits = [device.feed(request, prompt[cached:], CHUNK) for request in (owner, thief)]
    return [request.all(0, "decoded")[cached:] for request in (owner, thief)], logits


@pytest.mark.parametrize("scheme", ["perm", "rotate", "mix"])
def test_stolen_slabs_are_garbage_under_another_key(
    folder: Path, key_file: Path, prompts: list[torch.Tensor], scheme: str
) -> None:
    """Under a wrong key attention comes out wrong by more than half, and other tokens follow."""
    with Device(folder, Rules(scheme), dtype="float32", max_tokens=TOKENS, key_file=key_file) as device:
        (right, wrong), logits = stolen(device, prompts[0], 200)
    assert (wrong - right).norm() / right.norm() > 0.5
    assert (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean() < 0.2


@pytest.mark.slow
def test_perplexity_of_a_real_model_explodes_under_another_key(key_file: Path) -> None:
    """SmolLM2 on English: with the right key it goes on reading, with a wrong one it reads noise."""
    real = smollm2_dir()
    prompt = torch.tensor(load_tokenizer(real).encode(PASSAGES[0]))[:160]
    with Device(real, Rules("perm"), dtype="bfloat16", max_tokens=len(prompt), key_file=key_file) as device:
        _, logits = stolen(device, prompt, 96)
    right, wrong = (torch.nn.functional.cross_entropy(one[:-1], prompt[97:]).exp() for one in logits)
    assert wrong > 20 * right, (right, wrong)  # measured: 51 and 4,546


def test_layers_left_out_and_the_compute_device_are_plain(
    model: PublicModel, folder: Path, key_file: Path, table: Table, prompts: list[torch.Tensor]
) -> None:
    """V2 and V4: with layer 0 encoded as well as can be, the next layers' slabs and what the compute device handles
    before encoding give the prompt away."""
    rules = Rules("mix", SEGMENT, SEGMENT)
    with Device(folder, rules, dtype="bfloat16", max_tokens=TOKENS, layers="0", key_file=key_file) as device:
        request = device.open(TOKENS, bytes(16))
        device.feed(request, prompts[0], CHUNK)
        open_layer = device.view(request, DEEP)
        qkv = request.all(0, "qkv")
    left_out = View(Rules(PLAIN), DEEP, open_layer.k, open_layer.v)
    guess = table.collide(left_out, "raw")
    assert (places(guess, torch.zeros(len(guess.bag), dtype=torch.int64)) < 1).all()
    v = qkv[:, -2 * HEAD_DIM :].unflatten(-1, (2, HEAD_DIM))
    seen = rows.nearest_value(model, View(Rules(PLAIN), 0, v, v))
    assert (places(seen, prompts[0]) < 1).mean() > gates.WORKS


def test_one_round_of_hadamard_falls_to_a3(model: PublicModel, prompts: list[torch.Tensor]) -> None:
    """Why `rotate` has two rounds: signs, a permutation and one public Hadamard matrix are undone by A3."""
    generator = torch.Generator().manual_seed(0)
    v = model.first_rows().v[prompts[0]].clone()
    for head in range(v.shape[1]):
        signs = torch.randint(0, 2, (HEAD_DIM,), generator=generator) * 2.0 - 1
        v[:, head] = (v[:, head] * signs)[:, torch.randperm(HEAD_DIM, generator=generator)] @ rows.hadamard(HEAD_DIM)
    view = View(Rules("rotate"), 0, v, v.bfloat16().float())
    share = lambda guess: (places(guess, prompts[0]) < 1).mean()  # noqa: E731
    assert share(rows.sorted_values(model, view)) < gates.LENGTHS_SEEP
    assert share(rows.sorted_magnitudes(model, view)) > gates.WORKS


def test_ties_are_no_hits() -> None:
    """A constant answer recovers nothing: ties count against the attacker."""
    constant = Guess(torch.zeros(4, VOCAB), torch.ones(4, dtype=torch.int64))
    assert (places(constant, torch.arange(4)) > VOCAB / 4).all()
