"""Who holds an API key is a tenant: keys of encoded layers are made of the root secret and of the tenant's.

Here the nonces are equal on purpose, so that nothing but the tenant keeps two requests apart.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
import torch

from engine.core.request import Request, SamplingParams
from engine.scx import sessions
from engine.scx.secure import Encoded, LocalSecureSide
from engine.serve.app import build_app
from engine.serve.services import Keys, Services, tenant_of
from scripts.scx_attacks.gates import near_chance
from scripts.scx_attacks.link import link_chance, link_rate, reuse_alarm
from scripts.scx_attacks.view import Rules, View
from scripts.scx_exactness import GROUPS, HEADS
from tests import models
from tests.engine import oracle
from tests.scx.workers import DIM, TOKENS, batch_of, config_of, remote, rows_of, side_of, worker_thread
from tests.serve.test_faults import DummyEngine
from tests.serve.test_faults import services as services  # a fixture

NONCE = b"n" * 16
ALICE, BOB = tenant_of(b"alice's key"), tenant_of(b"bob's key")
PER_REQUEST = ("perm", "rotate", "mix")


def encoded(scheme: str, tenant: bytes) -> tuple[LocalSecureSide, Encoded, str]:
    """One prompt of TOKENS rows under a tenant: the side, its rows, and their key's name."""
    side = side_of(config_of(scheme=scheme))
    assert isinstance(side, LocalSecureSide)
    name = side.open(0, NONCE, tenant=tenant)
    batch = batch_of((0, 0, TOKENS))
    return side, side.encode(0, rows_of(batch), batch), name


@pytest.mark.parametrize("scheme", PER_REQUEST)
def test_two_tenants_with_one_prompt_cannot_be_linked(scheme: str) -> None:
    """Raw nearest neighbours are at chance and no row is shared; the same tenant is recognised at once."""
    views = []
    for tenant in (ALICE, BOB, ALICE):
        _, rows, _ = encoded(scheme, tenant)
        views.append(View(Rules(scheme), 0, rows.k, rows.v))
    chance = link_chance(views[0])
    assert link_rate(views[0], views[1], "raw") <= near_chance(chance, TOKENS, 2)
    assert not reuse_alarm(views[0], views[1])
    assert link_rate(views[0], views[2], "raw") == 1 and reuse_alarm(views[0], views[2])


def attended(q: torch.Tensor, rows: Encoded) -> torch.Tensor:
    """(N, H * D) over a request's rows; every query sees all."""
    k, v = (side.repeat_interleave(HEADS // GROUPS, dim=1).transpose(0, 1) for side in (rows.k, rows.v))
    scores = q.transpose(0, 1) @ k.mT * DIM**-0.5
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def decoded(side: LocalSecureSide, out: torch.Tensor) -> torch.Tensor:
    """By the key of the session; again and again, which an engine cannot ask for."""
    step = side._awaiting[0]
    assert step is not None
    found = side.decode(0, out, step.batch)
    side._awaiting[0] = step
    return found


@pytest.mark.parametrize("scheme", PER_REQUEST)
def test_another_tenants_key_gives_garbage(scheme: str) -> None:
    """Attention over Alice's rows by her key is attention over Bob's by his; her rows queried, or decoded, by his key
    are off by more than half."""
    (alice, hers, name), (bob, his, other) = (encoded(scheme, tenant) for tenant in (ALICE, BOB))
    right = decoded(alice, attended(hers.q, hers))
    torch.testing.assert_close(decoded(bob, attended(his.q, his)), right, rtol=1e-4, atol=1e-5)
    for wrong in (decoded(bob, attended(hers.q, hers)), decoded(alice, attended(his.q, hers))):
        assert float((wrong - right).norm() / right.norm()) > 0.5
    assert name != other


def test_a_worker_keeps_tenants_apart(tmp_path: Path) -> None:
    """Over the wire: other names for other tenants, the local side's for the same one."""
    with worker_thread(tmp_path, same_nonces=True) as (path, _):
        side = remote(path)
        names = [side.open(slot, NONCE, tenant=tenant) for slot, tenant in enumerate((ALICE, BOB, b""))]
        side.shut()
    assert len(set(names)) == 3 and names[0] == encoded("perm", ALICE)[2]


def test_requests_carry_their_tenant_to_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through queue, plan and preemption, and in no text form."""
    monkeypatch.setattr(sessions.secrets, "token_bytes", lambda count: bytes(count))
    settings = {"kv_page_bytes": 4096, "kv_pool_bytes": None, "max_model_len": 128, "kv_pool_groups": 46}
    engine = oracle.make_engine(models.tiny_llama_dir(tmp_path, 41), scx_layers="0", scx_scheme="mix", **settings)
    runner = engine.executor.runner
    told: dict[str, set[bytes]] = {}
    opened = runner.scx.scx.secure.open

    def spy(slot: int, nonce: bytes, *, tenant: bytes = b"", epoch: int = 0) -> str:
        name = opened(slot, nonce, tenant=tenant, epoch=epoch)
        told.setdefault(name, set()).add(tenant)
        return str(name)

    monkeypatch.setattr(runner.scx.scx.secure, "open", spy)
    prompt = tuple(range(5, 65))
    for number in range(8):
        tenant = (ALICE, BOB)[number % 2]
        engine.add(Request(str(number), prompt, SamplingParams(max_tokens=24, ignore_eos=True), 0.0, tenant=tenant))
    while engine.has_work:
        engine.step()
    assert engine.stats()["preempted_total"] > 0, "no epoch was opened again"
    assert {tenant for tenants in told.values() for tenant in tenants} == {ALICE, BOB}
    assert all(len(tenants) == 1 for tenants in told.values())
    request = Request("x", (1,), SamplingParams(), 0.0, tenant=ALICE)
    assert "tenant" not in repr(request) and repr(ALICE) not in repr(request)
    engine.close()


def test_the_server_tells_the_engine_whose_key_it_was(services: Services) -> None:
    """Each API key is a tenant of its own; the key itself does not cross, and without keys there is no tenant."""
    body = {"prompt": [40, 41], "max_tokens": 2}

    async def job() -> None:
        transport = httpx.ASGITransport(build_app(services))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            assert (await http.post("/v1/completions", json=body)).status_code == 200
            services.api_keys = Keys(["alice's key", "bob's key"])
            for key in ("alice's key", "bob's key", "alice's key"):
                answer = await http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
                assert answer.status_code == 200
            refused = await http.post("/v1/completions", json=body, headers={"authorization": "Bearer eve's"})
            assert refused.status_code == 401

    asyncio.run(job())
    assert isinstance(services.engine, DummyEngine)
    assert [add.tenant for add in services.engine.adds] == [b"", ALICE, BOB, ALICE]
