"""Report stage: one self-contained HTML file in the run's folder."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from schemas.files import write_text
from stages.contract import Account, Context, Rows
from stages.report import text
from stages.report.conflicts import FEW_PAIRS, scale
from stages.report.data import Tables
from stages.report.view import View, build
from stages.text.visible import visible

FILE_NAME = "report.html"


class Report:
    """ArtifactStage: reads whatever tables and manifests there are, writes report.html into ctx.folder."""

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """Yield one Account. The file is written beside itself and renamed, so that a reader never sees half of it."""
        assert ctx.folder is not None, "an ArtifactStage is given a folder"
        ctx.progress.total(2, "step")
        view = build(ctx.config, Tables(ctx.inputs), ctx.manifests)
        ctx.progress.advance()
        target = ctx.folder / FILE_NAME
        write_text(target, render(view))
        ctx.progress.advance()
        yield Account([], stats={"bytes": float(target.stat().st_size)}, artifacts=[target])


def render(view: View) -> str:
    """The page. Every value is made visible (`stages.text.visible`) and then escaped; only our own SVG, CSS and script are not."""
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
        words=text.words,
    )
    template = environment.from_string(own.joinpath("template.html.j2").read_text(encoding="utf-8"))
    return template.render(
        view=view,
        style=Markup(own.joinpath("style.css").read_text(encoding="utf-8")),  # our own file
        script=Markup(script),  # our own file, allowed by its hash
        script_hash=digest,
        scale=scale(),
        few_pairs=FEW_PAIRS,
    )


def _harmless(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
