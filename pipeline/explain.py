"""`explain`: everything a run knows about one pair, and where its conflict sits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table
from rich.text import Text

from pipeline.console import Terminal, printable
from pipeline.damage import reading
from pipeline.inspect import tables_of
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Context, Silent

_CUT = 1200
_LAYERS = 6
_LINE = 60


_VECTORS = ("sketch", "sketch_chosen", "sketch_rejected", "products", "squares")


def find_pair(files: dict[str, list[Path]], prefix: str, where: str) -> dict[str, Any]:
    """The row of the pairs table whose id begins with `prefix`. Raises UserError unless there is exactly one."""
    if "pairs" not in files:
        raise UserError(
            "This run has no pairs with its settings yet",
            where=where,
            fix="Run it first: congrad run CONFIG.",
        )
    rows = pl.scan_parquet(files["pairs"], glob=False).filter(pl.col("pair_id").str.starts_with(prefix))
    ids = rows.select("pair_id").head(6).collect()["pair_id"].to_list()
    if len(ids) != 1 or not prefix:
        what = f"No pair's id begins with {prefix!r}" if not ids else f"More than one pair's id begins with {prefix!r}"
        listed = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        raise UserError(
            what,
            where=where,
            fix=f"Give more of the id: {listed}." if ids else "List pairs: congrad inspect RUN pairs.",
        )
    return rows.collect().row(0, named=True)


def explanation(config: RunConfig, files: dict[str, list[Path]], pair: dict[str, Any], k: int, round_: int) -> dict:
    """What is known, as JSON values. `why_not` says why `conflict` is null where it is."""
    pair_id = pair["pair_id"]
    found: dict[str, Any] = {
        **{name: pair[name] for name in ("pair_id", "round", "language", "split", "group_id", "prompt_id", "source")},
        "selection": _selection(config, files, pair_id),
        "scores": _row(files, "scores", pair_id),
        "gradient": _row(files, "gradients", pair_id, without=_VECTORS),
        "conflict": None,
        "why_not": None,
        **{name: pair[name] for name in ("chosen_score", "rejected_score", "prompt", "chosen", "rejected")},
    }
    if pair["split"] != "train" and pair["split"] in config.conflict.splits:
        found["why_not"] = f"it is trusted ({pair['split']}): it makes the directions, and is not scored itself"
    elif pair["split"] != "train":
        found["why_not"] = f"it is held out ({pair['split']}): only training pairs get gradients and scores"
    elif found["gradient"] is None and (drop := _row(files, "dropped/gradients", pair_id, key="row_id")):
        found["why_not"] = f"it has no gradient: {drop['reason']} ({drop['detail']})"
    elif found["scores"] is None or "directions" not in files:
        found["why_not"] = "the stage conflict has not finished with the run's settings"
    elif not (find_spec("torch") and find_spec("transformers")):
        found["why_not"] = "torch is not installed here: layer groups and neighbours need it"
    elif "sums" in files:
        found["why_not"] = (
            "gradients.sketch.method: one_sided stores no gradients: layer groups and neighbours need them"
        )
    elif "off_topic" in found["scores"]["flags"]:
        found["why_not"] = (
            "it is off-topic: its answer is no likelier under its prompt than answers to other prompts are (conflict.relevance)"
        )
    elif not found["scores"]["norm"]:
        found["why_not"] = "its gradient is zero"
    else:
        from stages.conflict.explain import explain_pair

        inputs = {name: files[name] for name in ("gradients", "pairs", "directions")}
        found["conflict"] = asdict(explain_pair(Context(config, round_, inputs, {}, Silent()), pair_id, k))
        _add_answers(files, [*found["conflict"]["nearest"], *found["conflict"]["opposed"]])
    return found


def print_explanation(folder: Path, config: RunConfig, prefix: str, k: int, as_json: bool, round_: int) -> None:
    """Print it for people, or as JSON."""
    with reading(folder):
        files = tables_of(folder, round_)
        found = explanation(config, files, find_pair(files, prefix, str(folder)), k, round_)
    console = Terminal()
    if as_json:
        console.write_json(found)
        return

    def say(*parts: str, style: str = "") -> None:
        console.print(Text(printable(" ".join(parts)), style=style), soft_wrap=True)

    say(f"Pair {found['pair_id']}", style="bold")
    say(f"{found['language']}, {found['split']}, from {found['source']}, translation group {found['group_id']}")
    say(_verdict(found))
    if scores := found["scores"]:
        values = {name: scores[name] for name in ("score_all", "score_others", "score_mean", "cosine_own")}
        values |= {"judge margin": _margin(found)}
        values |= {name: scores[name] for name in ("logp_margin", "relevance_chosen", "relevance_rejected")}
        say("  ".join(f"{name} {_number(value)}" for name, value in values.items()))
        if scores["flags"]:
            say(f"flags: {', '.join(scores['flags'])}")
        worst = sorted(scores["cosines"], key=lambda entry: entry["cosine"])
        say("cosine per language:", "  ".join(f"{entry['language']} {entry['cosine']:+.3f}" for entry in worst))
        say(f"conflicts with: {', '.join(scores['conflicting_languages']) or 'no language'}")
    if found["why_not"]:
        say(f"No more about its gradient: {found['why_not']}.")
    if conflict := found["conflict"]:
        _print_conflict(console, conflict)
    for name in ("prompt", "chosen", "rejected"):
        console.print()
        say(name, style="bold")
        for message in found[name]:
            text = message["content"]
            more = f" … {len(text) - _CUT:,} more characters, see --json" if len(text) > _CUT else ""
            say(f"[{message['role']}] {text[:_CUT]}{more}")


def _print_conflict(console: Terminal, conflict: dict[str, Any]) -> None:
    groups = sorted(conflict["layer_groups"], key=lambda group: group["contribution"])
    shown = groups[:_LAYERS] + [group for group in groups[-2:] if group not in groups[:_LAYERS]]
    table = Table("layer group", "to the score", "cosine", "share of norm²", "lowest languages", box=None)
    for group in shown:
        cosines = {code: value for code, value in group["cosines"].items() if value is not None}
        lowest = sorted(cosines, key=lambda code: cosines[code])[:3]
        texts = [group["name"], f"{group['contribution']:+.4f}", _number(group["cosine"]), f"{group['share']:.1%}"]
        texts.append("  ".join(f"{code}\u00a0{cosines[code]:+.2f}" for code in lowest))
        table.add_row(*(Text(printable(text)) for text in texts))
    console.print()
    console.print(
        f"Where the score comes from: the {len(shown)} of {len(groups)} layer groups at both ends (they add up to it)"
    )
    console.print(table)
    for title, name in (("Nearest pairs", "nearest"), ("Most opposed pairs", "opposed")):
        entries = (
            f"{n['pair_id']} ({n['language']}) {n['cosine']:+.3f}  {_short(n['chosen'])} | not: {_short(n['rejected'])}"
            for n in conflict[name]
        )
        console.print(f"{title} (cosine of sketched gradients, over all pairs):")
        console.print(Text(printable("\n".join(f"  {entry}" for entry in entries))), soft_wrap=True)
    if others := conflict["leaves_with"]:
        few = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        console.print(Text(printable(f"Leaves every direction with {len(others)} other pairs: {few}")), soft_wrap=True)


def _verdict(found: dict[str, Any]) -> str:
    selection = found["selection"]
    if selection is None:
        return "Neither kept nor rejected: " + (
            "only training pairs are."
            if found["split"] != "train"
            else "the stage select has not finished with the run's settings."
        )
    value = f"{selection['ranked_by']} {_number(selection['value'])}"
    if selection["kept"]:
        return f"Kept: {value}."
    detail = f", {selection['detail']}" if selection["detail"] else ""
    return f"Not kept ({selection['reason']}): {value}{detail}."


def _selection(config: RunConfig, files: dict[str, list[Path]], pair_id: str) -> dict[str, Any] | None:
    kept, rejected = _row(files, "curated", pair_id), _row(files, "rejected", pair_id)
    row = kept or rejected
    if row is None:
        return None
    drop = _row(files, "dropped/curated", pair_id, key="row_id") or {}
    return {
        "kept": kept is not None,
        "ranked_by": config.select.by,
        "value": row["conflict_score"],
        "reason": row.get("reason"),
        "detail": drop.get("detail"),
    }


def _row(
    files: dict[str, list[Path]], table: str, pair_id: str, key: str = "pair_id", without: Sequence[str] = ()
) -> dict[str, Any] | None:
    if not files.get(table):
        return None
    frame = pl.scan_parquet(files[table], glob=False).filter(pl.col(key) == pair_id)
    rows = frame.drop(*without, strict=False).head(1).collect()
    return rows.row(0, named=True) if rows.height else None


def _add_answers(files: dict[str, list[Path]], neighbours: list[dict[str, Any]]) -> None:
    """Both answers' texts beside every neighbour."""
    texts = (pl.col(side).list.last().struct.field("content").alias(side) for side in ("chosen", "rejected"))
    pairs = pl.scan_parquet(files["pairs"], glob=False).filter(
        pl.col("pair_id").is_in([n["pair_id"] for n in neighbours])
    )
    answers = {row.pop("pair_id"): row for row in pairs.select("pair_id", *texts).collect().to_dicts()}
    for neighbour in neighbours:
        neighbour |= answers[neighbour["pair_id"]]


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _LINE else words[:_LINE] + " …"


def _margin(found: dict[str, Any]) -> float | None:
    chosen, rejected = found["chosen_score"], found["rejected_score"]
    return None if chosen is None or rejected is None else chosen - rejected


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:+.4f}"
