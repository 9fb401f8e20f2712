"""Recorded schedules, ours and upstream's, replayed whole; mutations noticed; random worlds against a second
scheduler that shares no code with ours.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from scripts import replay_schedule
from scripts.replay_schedule import MUTATIONS, Recording, Replay, Rules, load
from tests.core.upstream_model import record
from tests.core.workloads import own_worlds, world

OWN = sorted((Path(__file__).parent / "recordings").glob("*.json.gz"))
REFERENCE_FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "schedules"
REFERENCE = sorted(REFERENCE_FOLDER.glob("*.json.gz"))

needs_reference = pytest.mark.skipif(not REFERENCE, reason=f"no recordings in {REFERENCE_FOLDER}")


def replay(recording: Recording) -> replay_schedule.Outcome:
    return Replay(recording, Rules(), memory=True).run()


def of_world(seed: int, *, overrun: int = 1) -> Recording:
    config, workload = world(seed)
    for entry in workload:
        entry["max_tokens"] *= overrun
    made = record(config, workload, 1500)
    return Recording(f"world {seed}", made["config"], made["workload"], made["events"])


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_own_recordings_are_equal_to_the_end(path: Path) -> None:
    """Batch, order, preempted, ignored, free groups, running and waiting agree at every event."""
    outcome = replay(load(str(path)))
    assert outcome.difference is None
    assert (outcome.stopped is not None) == ("smallpool" in path.name), "only smallpool re-admits its own victim"
    assert outcome.compared >= 30


@needs_reference
def test_reference_recordings_are_equal_to_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    """The command on upstream's own recordings: every event of each, none stopped early, exit status 0."""
    assert replay_schedule.main(["--memory", *map(str, REFERENCE)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for path, line in zip(REFERENCE, lines, strict=True):
        events = json.loads(gzip.decompress(path.read_bytes()))["events"]
        count = sum(event["event"] == "schedule" for event in events)
        assert line == f"{path}: {count} events, 0 mismatches"


@needs_reference
def test_the_second_scheduler_makes_upstreams_recordings_byte_for_byte() -> None:
    """The judge of the random worlds is itself judged: fed with upstream's configurations it makes their events."""
    for path in REFERENCE:
        recorded = json.loads(gzip.decompress(path.read_bytes()))
        made = record(recorded["config"], recorded["workload"], max_events=100_000)
        assert made["events"] == recorded["events"], path.name


def test_committed_recordings_are_what_the_second_scheduler_makes() -> None:
    """Nobody edited a recording until it passed. `python -m tests.core.workloads` writes them anew."""
    for path in OWN:
        config, workload = own_worlds()[path.name.removesuffix(".json.gz")]
        assert json.loads(gzip.decompress(path.read_bytes())) == json.loads(json.dumps(record(config, workload)))


@pytest.mark.parametrize("files", [OWN, pytest.param(REFERENCE, marks=needs_reference)], ids=["own", "reference"])
def test_each_mutation_is_caught(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Every broken rule makes at least one recording differ."""
    assert replay_schedule.main(["--mutate", *map(str, files)]) == 0
    out = capsys.readouterr().out
    for name in MUTATIONS:
        assert f"mutation {name!r}: caught by" in out


def test_mutate_fails_when_the_recordings_cannot_catch(capsys: pytest.CaptureFixture[str]) -> None:
    """A recording without memory pressure says nothing about victims, and the command says that."""
    vllm = next(str(path) for path in OWN if path.name.startswith("vllm"))
    easy = load(vllm)
    config = easy.config | {"num_gpu_blocks": 4000, "scheduler": "orca", "scheduler_params": {}}
    made = record(config, easy.workload)
    recording = dataclasses.replace(easy, config=config, events=made["events"])
    assert not replay_schedule.mutate([recording], Rules())
    assert "mutation 'wrong victim': NOT CAUGHT" in capsys.readouterr().out


def test_a_difference_is_reported_with_exit_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Change one chunk length in a good recording: the event and both sides are named."""
    data = json.loads(gzip.decompress(OWN[0].read_bytes()))
    events = [event for event in data["events"] if event["event"] == "schedule" and event["scheduled"]]
    events[7]["scheduled"][0]["prompt_tokens"] += 1
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(data))
    assert replay_schedule.main([str(path)]) == 1
    assert f"iteration {events[7]['iteration']}" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"{}", b"\x1f\x8bbroken", b"[1, 2]"])
def test_what_is_not_a_recording_is_refused(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2 and one line naming the file, no traceback."""
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    assert replay_schedule.main([str(path)]) == 2
    assert "bad.json is not a recorded schedule" in capsys.readouterr().err


def test_a_recording_of_other_rules_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A variant whose policy differs by design is not compared."""
    data = json.loads(gzip.decompress(OWN[0].read_bytes()))
    data["config"]["variant"] = "lean"
    path = tmp_path / "lean.json"
    path.write_text(json.dumps(data))
    assert replay_schedule.main([str(path)]) == 2
    assert "'lean'" in capsys.readouterr().err


@pytest.mark.parametrize("first", range(0, 240, 40))
def test_random_worlds_equal_the_second_scheduler(first: int) -> None:
    """Five policies, ties, over-long prompts, pipelines, tiny pools: equal to the end or upstream's fault."""
    for seed in range(first, first + 40):
        outcome = replay(of_world(seed))
        assert outcome.difference is None, (seed, outcome.difference)


def test_random_worlds_reach_every_case() -> None:
    """The worlds of the test above are not all easy: each fault of upstream, and preemption, occurs among them."""
    seen: Counter[str] = Counter()
    for seed in range(240):
        recording = of_world(seed)
        outcome = replay(recording)
        preempted = any(event.get("preempted") for event in recording.events)
        seen["preempted, to the end"] += preempted and outcome.stopped is None
        seen["ignored"] += any(event.get("ignored") for event in recording.events)
        for quirk in ("QUIRK 4", "QUIRK 9"):
            seen[quirk] += quirk in (outcome.stopped or "")
    assert seen["preempted, to the end"] >= 30
    assert seen["ignored"] >= 30
    assert seen["QUIRK 4"] >= 5
    assert seen["QUIRK 9"] >= 1


def test_requests_beyond_the_models_length_replay_too() -> None:
    """Upstream decodes past max_model_len and beyond the dynamic schedule; finishing comes from the recording."""
    for seed in range(500, 560):
        outcome = replay(of_world(seed, overrun=3))
        assert outcome.difference is None, (seed, outcome.difference)


def test_upstreams_livelock_is_named() -> None:
    """A lone sequence that preempted itself never runs again there; here it does, and the report says why."""
    config, _ = own_worlds()["sarathi_smallpool"]
    config |= {"num_gpu_blocks": 16, "max_model_len": 4096}
    made = record(config, [{"id": "0", "arrival": 0.0, "prompt_tokens": 200, "max_tokens": 200}])
    assert made["summary"]["outcome"] == "livelock"
    outcome = replay(Recording("livelock", made["config"], made["workload"], made["events"]))
    assert outcome.difference is not None and "QUIRKs 7 and 8" in outcome.difference
    assert outcome.compared >= 42
