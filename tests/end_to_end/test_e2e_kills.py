"""The whole pipeline killed a dozen times, all over its stages: the same results, nothing made twice."""

from __future__ import annotations

import pytest

from tests.faults.killing import TARGETS, Harness, refer


@pytest.mark.timeout(1800)
def test_a_dozen_kills_over_all_stages_lose_and_double_nothing(whole_run, tmp_path):
    path, root, _ = whole_run
    reference = refer(root)
    report = Harness(path, reference, seed=2).disturb(tmp_path, [*TARGETS, "generate"])
    assert not report.differences
    assert len(report.kills) >= 10, "a stage may end before its instant comes"
    assert report.finished_twice == 0
    repeated = report.begun - reference.parts
    assert 0 <= repeated <= 2 * len(report.kills), "at most the part in progress is begun again, by driver and worker"
