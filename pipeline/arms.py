"""What is compared, as people write it: `margin`, `all`, or settings such as `select.keep=0.3 conflict.surgery=mean`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from schemas.config.curation import SelectConfig
from schemas.errors import UserError

OWN = "this run"
ALL = "all"
"""Every pair that has a score: `select.keep=1`."""
_FILTERS = get_args(SelectConfig.model_fields["by"].annotation)


@dataclass(frozen=True)
class ArmSpec:
    """An arm before any table is looked at. settings: `key=value` each, as for --set."""

    name: str
    settings: tuple[str, ...]


def arm_of(text: str) -> ArmSpec:
    """What one `--arm` says. A filter's name alone ranks by it; `NAME: …` gives the arm a name of its own.

    Raises UserError for what is neither a filter, `all`, nor `key=value`.
    """
    label, colon, rest = text.partition(": ")
    if "=" in label:  # of a setting's value: conflict.language_weights={de: 2}
        label, colon, rest = "", "", text
    try:
        words = shlex.split(rest if colon else text)
    except ValueError as error:
        raise UserError(f"This arm cannot be read: {error}", where=f"--arm {text!r}") from None
    if not words or (colon and not label.strip()):
        raise UserError("This arm says nothing", where=f"--arm {text!r}", fix=_HOW)
    if len(filters := [word for word in words if word == ALL or word in _FILTERS or word.startswith(_BY)]) > 1:
        raise UserError(
            f"An arm ranks by one filter, not by {' and '.join(filters)}", where=f"--arm {text!r}", fix=_HOW
        )
    settings = tuple(_setting(word, text) for word in words)
    return ArmSpec(label.strip() if colon else " ".join(map(_shown, words)), settings)


_BY = ("by=", "select.by=")
_HOW = f"Give a filter ({', '.join(_FILTERS)}), {ALL}, or settings: --arm 'select.keep=0.3 conflict.surgery=mean'."


def _setting(word: str, text: str) -> str:
    if word == ALL:
        return "select.keep=1.0"
    if word in _FILTERS:
        return f"select.by={word}"
    if "=" not in word:
        cut = "A value with spaces needs quotes of its own, or a setting for each of its keys: conflict.language_weights.de=2."
        raise UserError(f"There is no filter {word!r}", where=f"--arm {text!r}", fix=cut if "={" in text else _HOW)
    return f"select.{word}" if word.partition("=")[0] in SelectConfig.model_fields else word  # as `_shown` shows it


def _shown(word: str) -> str:
    return word.removeprefix("select.by=").removeprefix("select.")


def arms_of(texts: Sequence[str]) -> list[ArmSpec]:
    """All arms, the run's own first. Raises UserError where two have one name."""
    arms = [ArmSpec(OWN, ()), *(arm_of(text) for text in texts)]
    names = [arm.name for arm in arms]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"Two arms are called {twice!r}", fix="Give one a name of its own: --arm 'NAME: key=value'.")
    return arms
