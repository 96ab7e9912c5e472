"""An engine in a process of its own: killed, out of memory, poisoned by a request; no answer is lost or given twice."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crashing_engine
import pytest
from crashing_engine import FINE, POISON, REFUSED

from schemas.config.model import Sampling
from schemas.errors import UserError
from stages.contract import Context, ModelRef
from stages.engines.base import Request
from stages.engines.process import ProcessEngine


@pytest.fixture
def start(tmp_path: Path, make_config: Callable[..., Any], progress: Any) -> Iterator[Callable[..., ProcessEngine]]:
    """start(**files) -> the engine; closed at the end."""
    made: list[ProcessEngine] = []

    def make(max_num_seqs: int = 8, limits: dict[str, int] | None = None, **files: object) -> ProcessEngine:
        for name, value in files.items():
            (tmp_path / name.replace("_", "-")).write_text(str(value))
        config = make_config(kind="vllm", max_num_seqs=max_num_seqs)
        ctx = Context(config, 0, {}, {}, progress, limits=limits if limits is not None else {})
        made.append(ProcessEngine(crashing_engine.load, ctx, ModelRef("m", tmp_path, "d"), None))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def requests(n: int, **special: int) -> list[Request]:
    return [Request(f"r{i}", [special.get(f"r{i}", FINE)], Sampling(max_tokens=5), 0) for i in range(n)]


def answers(engine: ProcessEngine, asked: list[Request]) -> dict[str, str]:
    found = list(engine.stream(iter(asked)))
    assert Counter(c.id for c in found) == Counter(r.id for r in asked), "every request is answered once"
    return {c.id: c.error or c.text for c in found}


def lines(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().split("\n")[:-1]


def test_answers_come_back_stream_after_stream_from_one_process(start, tmp_path) -> None:
    engine = start()
    for _ in range(2):
        assert answers(engine, requests(50)) == {f"r{i}": f"answer to r{i}" for i in range(50)}
    assert answers(engine, []) == {}
    engine.close()
    assert [line.split()[-1] for line in lines(tmp_path, "starts")] == ["8", "closed"]


def test_a_killed_engine_is_started_again_and_only_what_was_in_flight_is_asked_again(start, tmp_path, progress) -> None:
    engine = start(die_after=30)
    assert set(answers(engine, requests(100)).values()) == {f"answer to r{i}" for i in range(100)}
    assert len(lines(tmp_path, "starts")) == 2
    twice = [name for name, n in Counter(lines(tmp_path, "asked")).items() if n > 1]
    assert 0 < len(twice) <= 24, "three times max_num_seqs are in flight"
    assert any("SIGKILL" in note and "asked again" in note for note in progress.notes)
    assert not any("max_num_seqs" in note for note in progress.notes), "one death is no lack of memory"


def test_an_engine_killed_from_outside_is_started_again(start) -> None:
    engine = start()
    stream = engine.stream(iter(requests(60)))
    found = [next(stream)]
    first = engine.pid
    os.kill(first, signal.SIGKILL)
    found += stream
    assert len({c.id for c in found}) == len(found) == 60
    assert engine.pid not in (None, first)


def test_a_request_that_brings_the_engine_down_fails_alone(start, tmp_path) -> None:
    engine = start()
    found = answers(engine, requests(60, r21=POISON))
    assert "failed 3 times" in found.pop("r21")
    assert set(found.values()) == {f"answer to r{i}" for i in range(60) if i != 21}


def test_a_request_that_the_engine_ends_with_an_error_is_asked_max_tries_times(start, tmp_path) -> None:
    found = answers(start(), requests(20, r4=REFUSED))
    assert found.pop("r4") == "failed 3 times, the last time: vLLM ended the request: abort"
    assert Counter(lines(tmp_path, "asked"))["r4"] == 3
    assert len(lines(tmp_path, "starts")) == 1


def test_memory_that_runs_out_halves_the_sequences_for_the_rest_of_the_run(start, tmp_path, progress) -> None:
    limits: dict[str, int] = {}
    assert len(answers(start(16, limits, room=5), requests(40))) == 40
    assert limits == {"engine.max_num_seqs": 4}
    assert sum("engine.max_num_seqs is" in note for note in progress.notes) == 2
    start(16, limits)
    assert lines(tmp_path, "starts")[-1].endswith(" 4")


def test_memory_that_lacks_at_the_start_halves_the_sequences_too(start, tmp_path) -> None:
    engine = start(16, start_room=4)
    assert [line.split()[1] for line in lines(tmp_path, "starts")] == ["16", "8", "4"]
    assert len(answers(engine, requests(10))) == 10


def test_no_memory_for_one_sequence_is_said_with_what_to_do(start) -> None:
    with pytest.raises(UserError, match=r"cannot start with m: .*No available memory.*gpu_memory_utilization"):
        start(4, start_room=0)


def test_a_request_without_memory_even_alone_fails_alone(start) -> None:
    found = answers(start(2, room=0), requests(1))
    assert "CUDA out of memory" in found["r0"]


def test_an_engine_that_only_dies_ends_the_stage_with_advice(start, monkeypatch) -> None:
    engine = start()
    everything = {f"r{i}": POISON for i in range(60)}
    with pytest.raises(UserError, match=r"died 12 times without answering.*SIGKILL.*same command continues"):
        list(engine.stream(iter(requests(60, **everything))))
    assert engine.pid is None


def test_an_engine_that_dies_while_it_starts_is_given_up(start, tmp_path) -> None:
    with pytest.raises(UserError, match=r"cannot start with m: its process ended by signal 11 \(SIGSEGV\)"):
        start(die_at_start=1)
    assert len(lines(tmp_path, "starts")) == 5


def test_a_device_that_others_have_is_waited_for_with_as_many_sequences(start, tmp_path, progress, monkeypatch) -> None:
    monkeypatch.setattr("stages.engines.process._BUSY_SECONDS", 0.0)
    start(16, taken=2)
    assert [line.split()[1] for line in lines(tmp_path, "starts")] == ["16", "16", "16"]
    assert sum("finds its device taken" in note for note in progress.notes) == 2
    with pytest.raises(UserError, match=r"cannot start with m: .*Free memory on device.*free the device"):
        start(16, taken=9)


def test_of_engines_in_several_processes_the_log_has_the_reason(start, tmp_path, capfd) -> None:
    """Tensor parallel: vLLM says the same sentence whatever it was."""
    with pytest.raises(UserError, match=r"cannot start with m: ValueError: 3 heads on 2 GPUs"):
        start(16, silent="ValueError: 3 heads on 2 GPUs")
    assert [line.split()[1] for line in lines(tmp_path, "starts")] == ["16", "16"], "no matter of memory: once more"
    with pytest.raises(UserError, match=r"cannot start with m: torch\.OutOfMemoryError: CUDA out of memory"):
        start(16, silent="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert [line.split()[1] for line in lines(tmp_path, "starts")][2:] == ["16", "8", "4", "2", "1"]


def test_a_model_that_cannot_be_loaded_is_not_tried_again(start, tmp_path) -> None:
    with pytest.raises(UserError, match="vLLM cannot load it"):
        start(no_such_model=1)
    assert len(lines(tmp_path, "starts")) == 1


def test_an_abandoned_stream_leaves_nothing_behind(start) -> None:
    engine = start()
    stream = engine.stream(iter(requests(60)))
    next(stream)
    stream.close()
    assert set(answers(engine, requests(20)).values()) == {f"answer to r{i}" for i in range(20)}


def test_too_long_requests_never_reach_the_engine(start, tmp_path) -> None:
    engine = start()
    huge = Request("huge", [FINE] * 200, Sampling(max_tokens=5), 0)
    found = answers(engine, [huge, *requests(3)])
    assert "exceed the context" in found["huge"] and "huge" not in lines(tmp_path, "asked")


def test_requests_are_pulled_lazily(start) -> None:
    pulled: list[str] = []

    def asked() -> Iterator[Request]:
        for request in requests(500):
            pulled.append(request.id)
            yield request

    stream = start().stream(asked())
    next(stream)
    assert len(pulled) <= 24
    stream.close()
