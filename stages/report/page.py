"""The report: one self-contained HTML file in the run's folder."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from schemas.config import RunConfig
from schemas.files import write_text
from schemas.ids import content_id
from schemas.manifests import StageManifest
from stages.compare.figures import Comparison
from stages.report import text
from stages.report.conflicts import FEW_PAIRS, scale
from stages.report.data import Tables
from stages.report.view import View, build_view
from stages.text.visible import visible

VERSION = 5
"""Bumped when the same tables give another page."""
_LEAVES_WITH = {
    "pair": "the pair itself",
    "answers": "the pair and all that share an answer with it",
    "group": "the pair, all that share an answer with it, and its translations",
}
_MADE_FROM = '<meta name="made-from" content="{}">'
_HEAD = 4096
_NOTHING: Mapping[str, str] = MappingProxyType({})
_NO_ROUND: Mapping[int, Comparison | str] = MappingProxyType({})


def write_page(
    target: Path,
    config: RunConfig,
    tables: Tables,
    manifests: Sequence[StageManifest],
    left_out: Mapping[str, str] = _NOTHING,
    compared: Mapping[int, Comparison | str] = _NO_ROUND,
    arms: Sequence[str] = (),
) -> None:
    """Write the page from whatever tables and manifests there are; a reader never sees half of it.

    left_out: stage -> why, of results that are there and not given here, since they are not current.
    compared: round -> the run's selection beside others, or why there is none; arms: which ones were asked for.
    """
    page = render(
        build_view(config, tables, manifests, left_out, compared), made_from(config, manifests, left_out, arms)
    )
    write_text(target, page)


def made_from(
    config: RunConfig,
    manifests: Sequence[StageManifest],
    left_out: Mapping[str, str] = _NOTHING,
    arms: Sequence[str] = (),
) -> str:
    """Hash of all that a page shows: it is in the page, so that an old one is known."""
    stages = [(m.stage, m.round, m.fingerprint, m.content) for m in manifests]
    return content_id(VERSION, config.model_dump(mode="json"), stages, dict(left_out), list(arms))


def is_current(
    target: Path,
    config: RunConfig,
    manifests: Sequence[StageManifest],
    left_out: Mapping[str, str] = _NOTHING,
    arms: Sequence[str] = (),
) -> bool:
    """Whether the page is there and shows what there is now."""
    try:
        with target.open(encoding="utf-8") as page:
            return _MADE_FROM.format(made_from(config, manifests, left_out, arms)) in page.read(_HEAD)
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def render(view: View, made_from: str = "") -> str:
    """The page. made_from: see there. Every value is made visible (`stages.text.visible`) and then escaped; only our own SVG, CSS and script are not."""
    own = files("stages.report")
    script = own.joinpath("browse.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_harmless, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=text.number,
        signed=lambda value: text.number(value, signed=True),
        fixed=text.fixed,
        short=text.short,
        percent=text.percent,
        count=text.count,
        words=text.spaced,
    )
    template = environment.from_string(own.joinpath("template.html.j2").read_text(encoding="utf-8"))
    return template.render(
        view=view,
        made_from=Markup(_MADE_FROM.format(made_from)),
        style=Markup(own.joinpath("style.css").read_text(encoding="utf-8")),  # our own file
        script=Markup(script),  # our own file, allowed by its hash
        script_hash=digest,
        scale=scale(),
        few_pairs=FEW_PAIRS,
        leaves_with=_LEAVES_WITH,
    )


def _harmless(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
