"""What people write after --arm."""

from __future__ import annotations

import pytest

from pipeline.arms import OWN, arm_of, arms_of
from schemas.errors import UserError


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("margin", "margin", ("select.by=margin",)),
        ("select.by=margin", "margin", ("select.by=margin",)),
        ("all", "all", ("select.keep=1.0",)),
        ("select.keep=0.3 conflict.surgery=mean", "keep=0.3 conflict.surgery=mean", None),
        ("random select.keep=0.3", "random keep=0.3", ("select.by=random", "select.keep=0.3")),
        ("margin keep=0.3", "margin keep=0.3", ("select.by=margin", "select.keep=0.3")),  # as the table shows it
        ("random margin", "", "ranks by one filter, not by random and margin"),
        ("all shortest", "", "ranks by one filter"),
        ("'select.by=shortest' by=longest", "", "ranks by one filter"),
        ("margin select.by=margin", "", "ranks by one filter"),
        ("my own: select.keep=0.3", "my own", ("select.keep=0.3",)),
        ("a: b: margin", "a", "There is no filter 'b:'"),
        ("languages.seen='[en, de]'", "languages.seen=[en, de]", ("languages.seen=[en, de]",)),
        (
            "'conflict.language_weights={de: 2}'",
            "conflict.language_weights={de: 2}",
            ("conflict.language_weights={de: 2}",),
        ),
        ("conflict.language_weights={de: 2}", "", "A value with spaces needs quotes of its own"),
        ("margn", "", "There is no filter 'margn'"),
        ("  ", "", "This arm says nothing"),
        ("x: ", "", "This arm says nothing"),
        ("select.keep='0.3", "", "No closing quotation"),
    ],
)
def test_an_arm_is_a_filter_or_settings_with_or_without_a_name(text: str, name: str, settings) -> None:
    if isinstance(settings, str):
        with pytest.raises(UserError, match=settings):
            arm_of(text)
        return
    arm = arm_of(text)
    assert arm.name == name and arm.settings == (settings or tuple(text.split()))


def test_the_runs_own_arm_comes_first_and_no_two_share_a_name() -> None:
    assert [arm.name for arm in arms_of(["random", "all"])] == [OWN, "random", "all"]
    with pytest.raises(UserError, match="Two arms are called 'random'"):
        arms_of(["random", "select.by=random"])
    with pytest.raises(UserError, match="Two arms are called"):
        arms_of([f"{OWN}: random"])
