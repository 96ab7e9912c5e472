"""A key that the other settings give no use is refused, by name; one that holds its default is not."""

from __future__ import annotations

import pytest

from schemas.config import RunConfig


def config(gradients: dict, conflict: dict) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "languages": {"seen": ["en"]},
            "model": {"policy": "m"},
            "prompts": {"sources": [{"path": "x"}]},
            "gradients": gradients,
            "conflict": conflict,
        }
    )


ONE_SIDED = {"sketch": {"method": "one_sided"}}


@pytest.mark.parametrize(
    ("gradients", "conflict", "named"),
    [
        ({}, {"metric_power": 1.0}, r"conflict\.metric_power .* conflict\.metric: layer .*metric: coordinate"),
        (ONE_SIDED, {"metric_power": 1.0}, r"conflict\.metric_power"),
        ({}, {"ema_gamma": 0.5}, r"conflict\.ema_gamma .* conflict\.direction: mean .*direction: ema"),
        ({}, {"ema_batch": 8}, r"conflict\.ema_batch"),
        ({}, {"orders": 8, "surgery": "mean"}, r"conflict\.orders .* conflict\.surgery: mean .*surgery: pcgrad"),
        ({"sketch": {"rank": 8}}, {}, r"gradients\.sketch\.rank .*method: two_sided .*method: one_sided"),
        ({"sketch": {"dim": 512, "method": "exact"}}, {}, r"gradients\.sketch\.dim .*method: exact"),
        ({"sketch": {"dim": 512, "method": "one_sided"}}, {}, r"gradients\.sketch\.dim .*method: one_sided"),
        ({"sketch": {"precondition_pairs": 8}}, {}, r"gradients\.sketch\.precondition_pairs .*precondition: none"),
        ({"aggregate_size": 64}, {}, r"gradients\.aggregate_size .*gradients\.sketch\.method: two_sided"),
    ],
)
def test_a_key_without_a_use_is_refused_by_name(gradients, conflict, named):
    with pytest.raises(ValueError, match=f"{named}.*: leave it out"):
        config(gradients, conflict)


def test_one_entry_is_counted_in_the_singular():
    given = {
        "name": "t",
        "languages": {"seen": ["en"]},
        "model": {"policy": "m", "judge": "j"},
        "pairs": {"sources": [{"path": "x"}]},
    }
    with pytest.raises(ValueError, match=r"model\.judge has no use with pairs\.sources: 1 entry \("):
        RunConfig.model_validate(given)


@pytest.mark.parametrize(
    ("gradients", "conflict"),
    [
        ({}, {"metric": "coordinate", "metric_power": 1.0, "direction": "ema", "ema_gamma": 0.5, "ema_batch": 8}),
        ({"sketch": {"dim": 512}}, {"orders": 8}),
        ({"sketch": {"method": "one_sided", "rank": 8}, "aggregate_size": 64}, {"surgery": "mean"}),
        ({"sketch": {"method": "exact", "precondition": "adam_factored", "precondition_pairs": 8}}, {"metric": "raw"}),
    ],
)
def test_what_is_used_is_taken_and_the_resolved_config_of_a_run_is_taken_again(gradients, conflict):
    taken = config(gradients, conflict)
    assert RunConfig.model_validate(taken.model_dump(mode="json")) == taken
