"""The whole pipeline killed in every stage that takes long: the same results, nothing made twice. In all of them: `make faults`."""

from __future__ import annotations

import pytest

from tests.faults.killing import TARGETS, Harness, refer

LONG = ("generate", "judge", "gradients", "train", "evaluate")


@pytest.mark.timeout(1800)
def test_kills_in_every_long_stage_lose_and_double_nothing(whole_run, tmp_path):
    path, root, _ = whole_run
    reference = refer(root)
    assert set(LONG) < set(TARGETS)
    report = Harness(path, reference, seed=2).disturb(tmp_path, list(LONG))
    assert not report.differences
    assert len(report.kills) >= len(LONG) - 1, "a stage may end before its instant comes"
    assert report.finished_twice == 0
    repeated = report.begun - reference.parts
    assert 0 <= repeated <= 2 * len(report.kills), "at most the part in progress is begun again, by driver and worker"
