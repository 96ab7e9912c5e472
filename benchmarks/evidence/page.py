"""The tables of docs/evidence.md, from the rows there are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.evidence.arms import CELLS, MANY, METHODS, SEEN, SEQUENCE, SPLIT, UNSEEN, table_of
from benchmarks.evidence.gain import held_out_gain, tax_gain
from benchmarks.quality.results import MISSING, Results, Values, shown
from stages.compare.seeds import Mean

_ROOT = Path(__file__).resolve().parents[2]
ROWS = _ROOT / "benchmarks" / "evidence" / "rows"
PAGE = _ROOT / "docs" / "evidence.md"
MODELS = ("embedded:qwen2.5-coder-0.5b-instruct", "embedded:gemma-3-270m")
_SHOWN = (
    "ours",
    "ours without the gate",
    "logp_margin",
    "mean_direction",
    "other_languages",
    "own_language",
    "medium_influence",
    "lossdiff_irm",
    "shortest",
    "random",
)
_DAMAGES = (
    "flip 10%",
    "flip 25%",
    "twins 10%",
    "twins 25%",
    "off_topic 10%",
    "off_topic 25%",
    "language 10%",
    "language 25%",
    "conflict",
)
_TAX = {"tax: tuned": "tax/tuned", "tax: text": "tax/text"}
_ALONE = {
    "reward accuracy": "reward/real",
    "unseen languages": "reward/unseen",
    "margin": "margin/real",
    "right language": "reward/language",
} | _TAX
_IN_TURN = {
    "real, when trained": "own/real",
    "real, at the end": "reward/real",
    "language, at the end": "reward/language",
    "unseen languages": "reward/unseen",
} | _TAX


def write(results: Results) -> None:
    """Put the tables where the page has marks for them."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (
        ("auroc", _real(results, "auroc")),
        ("left", _real(results, "left")),
        ("trusted", _trusted(results)),
        ("few", _few(results)),
        ("predict", _predict(results)),
        ("deciles", _deciles(results)),
        ("training", _training(results, CELLS)),
        ("gain", _gain(results, CELLS)),
        ("training-split", _training(results, MANY, SPLIT)),
        ("gain-split", _gain(results, MANY, SPLIT)),
        ("methods", _figures(results, "methods", "method", METHODS, _ALONE)),
        ("sequence", _figures(results, "methods", "method", SEQUENCE, _IN_TURN)),
    ):
        text, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: m[1] + table + m[2], text, flags=re.S)  # noqa: B023
        if count != 1:
            raise ValueError(f"{PAGE} has {count} places for {name}")
    PAGE.write_text(text, encoding="utf-8")


def rows(results: Results, table: str, method: str) -> list[Values]:
    """Values of every seed, as `by_seed`."""
    return list(by_seed(results, table, method).values())


def by_seed(results: Results, table: str, method: str) -> dict[int, Values]:
    """Seed -> values, of the identity that most rows of the method have: rows of other settings are not mixed in."""
    frame = results.frame()
    if frame.is_empty():
        return {}
    mine = frame.filter((frame["table"] == table) & (frame["method"] == method))
    if mine.is_empty():
        return {}
    counts = (
        mine.select("identity", "seed").unique().group_by("identity").len().sort("len", "identity", descending=True)
    )
    mine = mine.filter(mine["identity"] == counts["identity"][0])
    parts = mine.sort("seed").group_by("seed", maintain_order=True)
    return {seed: dict(part.select("name", "value").iter_rows()) for (seed,), part in parts}  # type: ignore[misc]


def _real(results: Results, figure: str) -> str:
    lines = [
        f"| damage | seeds | {' | '.join(name.replace('_', ' ') for name in _SHOWN)} |",
        "| --- | ---: |" + " ---: |" * len(_SHOWN),
    ]
    for model in MODELS:
        name = model.rpartition(":")[2]
        for damage in _DAMAGES:
            found = rows(results, "real", f"{name}, {damage}")
            if not found:
                lines.append(f"| {name}, {damage.replace('_', '-')} | 0 | {' | '.join([MISSING] * len(_SHOWN))} |")
                continue
            cells = [_mean(found, f"{figure}/{one}", figure == "left") for one in _SHOWN]
            lines.append(f"| {name}, {damage.replace('_', '-')} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean(found: Sequence[Values], name: str, percent: bool) -> str:
    values = [row[name] for row in found if name in row]
    if not values:
        return MISSING
    mean = sum(values) / len(values)
    return f"{mean:.1%}" if percent else f"{mean:.2f}"


def _trusted(results: Results) -> str:
    from benchmarks.evidence.trusted import COUNTS, SHARES, TABLE

    return _found(results, TABLE, SHARES, {"none" if count == 0 else f"{count}": str(count) for count in COUNTS})


def _few(results: Results) -> str:
    from benchmarks.evidence.few import ALONE, COUNTS, SHARES, TABLE

    names = {f"{count} a language": str(count) for count in COUNTS}
    return _found(results, TABLE, SHARES, names | {f"{max(COUNTS)}, one language": ALONE})


def _found(results: Results, table: str, shares: Sequence[float], names: Mapping[str, str]) -> str:
    """AUROC and what is left, a line a model and share of flips. names: title -> what ends the names of its values."""
    lines = [f"| pool | seeds | {' | '.join(names)} |", "| --- | ---: |" + " ---: |" * len(names)]
    for model in MODELS:
        for share in shares:
            method = f"{model.rpartition(':')[2]}, flip {share:.0%}"
            found = rows(results, table, method)
            cells = [
                f"{_mean(found, f'auroc/{n}', False)}, {_mean(found, f'left/{n}', True)}" if found else MISSING
                for n in names.values()
            ]
            lines.append(f"| {method} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _predict(results: Results) -> str:
    from benchmarks.evidence.predict import FILTERS, RANDOM, correlation

    found = by_seed(results, "predict", RANDOM)
    lines = [
        "| filter | steps | rank correlation | 95% interval | inside a language |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    for name in (*FILTERS, "norm"):
        if len(found) < 5:
            lines.append(f"| {name.replace('_', ' ')} | {len(found)} | {MISSING} | | |")
        else:
            value, low, high, inside = correlation(found, name)
            cells = [
                name.replace("_", " "),
                str(len(found)),
                f"{value:+.2f}",
                f"{low:+.2f} to {high:+.2f}",
                f"{inside:+.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _deciles(results: Results) -> str:
    from benchmarks.evidence.predict import DECILE, DECILES

    found = by_seed(results, "predict", DECILE)
    lines = [
        "| tenth of the score | steps | score | flipped | loss of the other languages |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for decile in range(DECILES):
        steps = [values for step, values in found.items() if step % DECILES == decile]
        score, flipped = _mean(steps, "mean/conflict", False), _mean(steps, "damaged", True)
        each = ", ".join(f"{values['change']:+.3f}" for values in steps)
        lines.append(f"| {decile + 1} | {len(steps)} | {score} | {flipped} | {each or MISSING} |")
    return "\n".join(lines) + "\n"


def _training(results: Results, cells: Sequence[tuple[str, str]], split: int = 0) -> str:
    columns = {
        "damaged pairs": "damaged",
        "reward accuracy": "reward_accuracy/seen",
        "unseen languages": "reward_accuracy/unseen",
        "margin": "margin/seen",
        "accuracy": "accuracy/seen",
        "log p(chosen)": "chosen/seen",
        "tax": "tax",
    }
    return _figures(results, table_of(split), "pool, arm", [f"{pool}, {arm}" for pool, arm in cells], columns)


def _figures(results: Results, table: str, what: str, methods: Sequence[str], columns: Mapping[str, str]) -> str:
    """A line a method: how many seeds it has, and its figures. columns: title -> name of the value."""
    lines = [f"| {what} | seeds | {' | '.join(columns)} |", "| --- | ---: |" + " ---: |" * len(columns)]
    for method in methods:
        found = rows(results, table, method)
        figures = [shown(found, lambda values, name=name: values.get(name, float("nan"))) for name in columns.values()]  # type: ignore[misc]
        lines.append(f"| {method} | {len(found)} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def _gain(results: Results, cells: Sequence[tuple[str, str]], split: int = 0) -> str:
    lines = [
        "| pool | curated less | seeds | reward accuracy | unseen languages | margin | tax |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for pool, arm in cells:
        if arm == "curated":
            continue
        curated, other = (by_seed(results, table_of(split), f"{pool}, {one}") for one in ("curated", arm))
        both = [(curated[seed], other[seed]) for seed in curated if seed in other]
        if not both:
            lines.append(f"| {pool} | {arm} | 0 | {' | '.join([MISSING] * 4)} |")
            continue
        means = (
            held_out_gain(both, "reward_accuracy", "seen", len(SEEN)),
            held_out_gain(both, "reward_accuracy", "unseen", len(UNSEEN)),
            held_out_gain(both, "margin", "seen", len(SEEN)),
            tax_gain(both),
        )
        lines.append(f"| {pool} | {arm} | {len(both)} | {' | '.join(map(_interval, means))} |")
    return "\n".join(lines) + "\n"


def _interval(found: Mean) -> str:
    return f"{found.mean:+.3f}" + (f" ({found.low:+.3f} to {found.high:+.3f})" if found.low is not None else "")
