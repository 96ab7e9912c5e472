"""A crash or a power cut between any two file operations loses, doubles and mixes nothing."""

from __future__ import annotations

import pytest

from tests.faults.crashing import ENDINGS, break_everywhere


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_ended_at_any_file_operation_is_finished_by_the_same_command(tmp_path, ending):
    tried = break_everywhere(tmp_path, (ending,), every=12)  # every one: `make faults`
    assert tried.count > 20
    assert not tried.wrong


def test_the_model_of_a_power_cut_notices_what_is_not_fsynced(tmp_path, monkeypatch):
    monkeypatch.setattr("schemas.files.fsync", lambda path: None)
    tried = break_everywhere(tmp_path, ("empty",), every=25)
    assert tried.wrong, "without fsync, files must be found empty"
