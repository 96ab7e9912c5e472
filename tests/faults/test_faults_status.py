"""`status` stays quick on long runs."""

from __future__ import annotations

from tests.faults.many_parts import finished_run, seconds_of_status


def test_status_of_a_finished_run_of_ten_thousand_parts_takes_less_than_two_seconds(tmp_path):
    finished_run(tmp_path / "many", 10_000)
    _, processor = min(seconds_of_status(tmp_path / "many") for _ in range(2))
    assert processor < 2.0, "seconds of processor time: what other work the machine has does not count"
