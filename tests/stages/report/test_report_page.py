"""The page as a whole: complete, well formed, harmless, self-contained, whatever is missing or hostile."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from hostile import NASTY, STEERING
from report_bench import SEEN, Builder

from schemas.config.sft import SftConfig
from schemas.manifests import StageManifest, Tally
from stages.compare.figures import Comparison, Example, Selected
from stages.report.data import Tables
from stages.report.page import is_current, write_page

SECTIONS = ["facts", "flow", "conflict", "weights", "scores", "sides", "training", "results", "pairs", "timings"]
EMPTY_WITHOUT: dict[str, set[str]] = {
    "pairs": {"sides"},
    "scores": {"scores"},
    "gram": {"conflict", "weights"},
    "curated": {"scores", "pairs"},
    "rejected": {"scores", "pairs"},
    "metrics": {"training"},
    "evaluation": {"results"},
    "directions": {"weights"},
    "gradients": set(),
}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" onmouseover=\"alert(3)' autofocus x='"
    "]]></style><!-- \u202etxt.exe\u202c \u2066a\u2069 \u200b\ufeff\x07\x1b[31m\u2028{{ 7*7 }}{% raw %} javascript:alert(4)"
)

STORABLE = {name: text.encode("utf-8", "replace").decode() for name, text in NASTY.items() if 0 < len(text) < 2**16}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not balance or ids that repeat."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of <{tag}> repeats: {names}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def write(builder, folder: Path) -> str:
    """The page as it was written."""
    write_page(folder / "report.html", builder.run.config, Tables(builder.run.inputs), builder.run.manifests)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run of ten languages, rendered once."""
    folder = tmp_path_factory.mktemp("whole")
    return write(Builder(folder, SEEN, 30, 1, banner="Only a demo."), folder)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page without hostile text: what elements and attributes there are."""
    folder = tmp_path_factory.mktemp("clean")
    return Page(write(Builder(folder, ["en"], 12, 1), folder))


def test_every_section_is_there_in_order_with_a_chart_or_table(whole):
    html, page = whole, Page(whole)
    sections = [attributes["id"] for attributes in page.all("section")]
    assert sections == SECTIONS
    parts = re.split(r'<section id="(\w+)"', html)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        assert any(mark in body for mark in ("<table", "<svg", "<dl", 'class="pair"')), name
        assert 'class="note"' in body or "<figcaption" in body or name == "timings", f"{name} is not explained"
    assert "Only a demo." in page.words
    assert "never released" in page.words
    assert "not finished" not in page.words


def test_charts_have_text_alternatives_and_tables_captions(whole):
    html, page = whole, Page(whole)
    assert page.all("svg")
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.all("svg"))
    assert html.count("<table") == html.count("<caption>") > 8
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(headings)), headings


def test_the_sft_stage_has_its_loss_curve(build_run, tmp_path):
    run = build_run()
    assert "Supervised fine-tuning" not in write(run, tmp_path)
    rows = [{"step": step, "name": "loss", "value": 3.0 / step} for step in range(1, 9)]
    run.write("sft_metrics", rows)
    sft = SftConfig.model_validate({"sources": [{"path": "<b>talks</b>.jsonl"}]})
    run.run.config = run.run.config.model_copy(update={"sft": sft})
    html = write(run, tmp_path)
    assert "Loss over 8 logged steps, from 3.00 to 0.375" in html and html.count("Supervised fine-tuning") == 2
    assert "<b>talks" not in html


def test_nothing_is_loaded_and_only_the_one_script_may_run(whole):
    html, page = whole, Page(whole)
    assert not page.all("link") and not page.all("img") and not page.all("iframe")
    assert all(not ({"src", "srcset", "xlink:href", "action", "data"} & set(a)) for _, a in page.elements)
    assert all((a.get("href") or "#").startswith("#") for _, a in page.elements)
    style = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    assert "url(" not in style and "@import" not in style and "http" not in style
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; ")
    assert f"script-src 'sha256-{digest}';" in policy


@pytest.mark.parametrize(
    "missing",
    ["pairs", "scores", "gram", "curated", "rejected", "metrics", "evaluation", "directions", "gradients"],
)
def test_any_table_may_be_missing(build_run, tmp_path, missing):
    builder = build_run(languages=["en", "ar"], per_language=12)
    del builder.run.inputs[f"{missing}:0"]
    page = Page(write(builder, tmp_path))
    assert set(SECTIONS) - {a["id"] for a in page.all("section")} <= EMPTY_WITHOUT[missing]


def test_any_table_may_be_without_rows(build_run, tmp_path):
    builder = build_run(languages=["en", "ar"], per_language=12)
    for files in builder.run.inputs.values():
        pl.read_parquet(files[0]).clear().write_parquet(files[0])
    html = write(builder, tmp_path)
    assert [a["id"] for a in Page(html).all("section")] == ["facts", "flow", "timings"]


def test_a_section_with_nothing_in_it_is_hidden_and_not_in_the_contents(build_run, tmp_path):
    builder = build_run(languages=["en"], per_language=6)
    for sections in (SECTIONS, ["facts", "flow", "timings"]):
        page = Page(write(builder, tmp_path))
        assert [a["id"] for a in page.all("section")] == sections
        links = [a["href"] for a in page.all("a") if a.get("class") != "skip"]
        assert links == [f"#{name}" for name in sections]
        builder.run.inputs.clear()


def test_every_part_says_what_it_was_made_from_and_what_is_left_out(build_run, tmp_path):
    run = build_run(languages=["en", "de"], per_language=6, select={"keep": 0.7, "by": "margin"}).run
    why = {"train": "waits for select, since select was made with other settings: select.keep: 0.5 -> 0.7"}
    write_page(tmp_path / "r.html", run.config, Tables(run.inputs), run.manifests, why)
    words = Page((tmp_path / "r.html").read_text(encoding="utf-8")).words
    assert "Made by select with select.keep 0.7, select.by margin ." in words
    assert "Not shown, since it is not current: train : waits for select" in words
    assert not is_current(tmp_path / "r.html", run.config, run.manifests)
    assert is_current(tmp_path / "r.html", run.config, run.manifests, why)


def test_what_is_said_of_weights_holds_for_the_surgery_they_are_of(build_run, tmp_path):
    def words(**conflict):
        return Page(write(build_run(["en", "de"], 6, conflict=conflict), tmp_path)).words

    assert "No weight is below 1" in words()
    assert "No weight is below 1" not in words(language_weights={"de": 0.5})
    assert "PCGrad adds parts" in words(language_weights={"de": 0.5})
    mean = words(surgery="mean")
    assert "A larger weight does not mean a better language." in mean and "PCGrad adds" not in mean


@pytest.mark.parametrize(
    ("conflict", "said"),
    [
        ({}, "from all languages, without the pair and all that share an answer with it."),
        ({"score": "others", "leave_out": "pair"}, "from the other languages, without the pair itself."),
        ({"leave_out": "group"}, "with it, and its translations."),
        ({"target": "dev"}, "from the trusted pairs."),
    ],
)
def test_what_a_score_is_compared_with_is_said_as_the_config_has_it(build_run, tmp_path, conflict, said):
    words = Page(write(build_run(["en", "de"], 6, conflict=conflict), tmp_path)).words
    assert said in words.split("the direction merged ")[1].split("Rank correlation")[0]


@pytest.mark.parametrize(
    ("config", "said", "unsaid"),
    [
        ({}, "before the first step all pairs are ties", "per token"),
        ({"model": {"policy": "m", "reference": "sft"}}, "against the reference", "all pairs are ties"),
        (
            {"loss": {"type": "simpo"}, "gradients": {"sketch": {"both_sides": True}}},
            "whose chosen answer is more likely per token",
            "against the reference",
        ),
    ],
)
def test_reward_accuracy_is_what_the_loss_makes_it(build_run, tmp_path, config, said, unsaid):
    training = (
        Page(write(build_run(["en"], 6, **config), tmp_path))
        .words.split("Reward accuracy is")[1]
        .split("The margin")[0]
    )
    assert said in training and unsaid not in training


def test_no_judge_is_named_where_nobody_judged(build_run, tmp_path):
    def names(**config):
        return [
            d for d in re.findall(r"<dt>(.*?)</dt>", write(build_run(["en"], 6, **config), tmp_path)) if "udge" in d
        ]

    assert names() == ["Judge", "Evaluation judge"]
    imported = {"prompts": {}, "pairs": {"sources": [{"path": "mine.jsonl"}]}}
    assert names(**imported) == ["Evaluation judge"]
    builder = build_run(["en"], 6, **imported)
    path = builder.run.inputs["evaluation:0"][0]
    frame = pl.read_parquet(path)
    builder.run.manifests[-1].models["second_judge"] = "another"
    frame.with_columns(pl.col("metric").str.replace("^win_rate", "baseline_win_rate")).write_parquet(path)
    assert re.findall(r"<dt>(.*?udge)</dt>", write(builder, tmp_path)) == [
        "Evaluation judge",
        "Second evaluation judge",
    ]
    frame.filter(~pl.col("metric").str.starts_with("win_rate")).write_parquet(path)
    assert "udge</dt>" not in write(builder, tmp_path)


def test_an_unfinished_run_says_what_is_missing(build_run, tmp_path):
    builder = build_run(languages=["en"], per_language=6)
    builder.run.inputs.clear()
    builder.run.manifests[:] = [m for m in builder.run.manifests if m.stage == "prompts"]
    page = Page(write(builder, tmp_path))
    assert "No result yet from: generate, judge, pairs, gradients, conflict, select, train, evaluate" in page.words
    assert not page.scripts


def test_nulls_in_scores_and_cosines_are_shown_as_missing(build_run, tmp_path):
    builder = build_run(languages=["en", "sw"], per_language=12)
    for key, columns in {
        "scores:0": ["score", "cosine_own"],
        "gram:0": ["cosine", "null_negative_rate"],
        "curated:0": ["conflict_score", "chosen_score", "rejected_score"],
        "pairs:0": ["chosen_score", "rejected_score"],
        "evaluation:0": ["value", "low", "high"],
    }.items():
        path = builder.run.inputs[key][0]
        frame = pl.read_parquet(path)
        frame.with_columns(pl.lit(None, pl.Float64).alias(c) for c in columns).write_parquet(path)
    page = Page(write(builder, tmp_path))
    assert "None" not in page.words.replace("null", "").split("Whole configuration")[1].split("Kept and dropped")[1]
    assert "nan" not in re.findall(r"\bnan\b", page.words)


def _poison(builder, HOSTILE: str = HOSTILE) -> None:
    """Put hostile text wherever a model, a data set or a file name could."""
    for key, files in builder.run.inputs.items():
        frame = pl.read_parquet(files[0])
        texts = [c for c in ("reason", "scope", "metric", "name", "split") if c in frame.columns]
        if key.startswith("pairs"):
            texts.remove("split")
        frame = frame.with_columns(pl.lit(HOSTILE).alias(c) for c in texts)
        if "chosen" in frame.columns:
            message = pl.lit([{"role": HOSTILE, "content": HOSTILE * 40}])
            frame = frame.with_columns(prompt=message, chosen=message, rejected=message)
        if "language" in frame.columns:
            frame = frame.with_columns(language=pl.lit(HOSTILE))
        if "pair_id" in frame.columns:
            frame = frame.with_columns(pair_id=pl.lit(HOSTILE) + pl.col("pair_id"))
        frame.write_parquet(files[0])
    tally = Tally(unit=HOSTILE, language=HOSTILE, rows_in=3, kept=1, dropped={HOSTILE: 2})
    builder.run.manifests[:] = [
        StageManifest(
            stage=HOSTILE,
            round=0,
            fingerprint="",
            content="",
            files=[],
            tallies=[tally],
            stats={HOSTILE: 1.0},
            models={"evaluation_judge": HOSTILE},
        )
    ]


def test_hostile_text_is_text(clean, build_run, tmp_path):
    builder = build_run(languages=["en"], per_language=12, banner=HOSTILE, model={"policy": HOSTILE, "judge": HOSTILE})
    _poison(builder)
    html = write(builder, tmp_path)
    page = Page(html)
    assert len(page.scripts) == html.count("<script") == html.count("</script") == 1
    assert page.scripts == clean.scripts
    assert not page.all("img")
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean.elements}
    known = {name for _, attributes in clean.elements for name in attributes}
    assert {name for _, attributes in page.elements for name in attributes} <= known
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not re.search("[\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ufeff\x00-\x08\x0b-\x1f\x7f]", html)
    assert "[U+202E]txt.exe" in page.words and "[U+001B]" in page.words and "[U+200B]" in page.words
    assert "{{ 7*7 }}" in page.words
    assert html.count("alert(1)") > 20


@pytest.mark.parametrize("half", [0, 1])
def test_any_nasty_string_is_text(clean, build_run, tmp_path, half):
    """Half of the strings in one page, each in every place that holds text: one that got out would stand out among them."""
    texts = list(STORABLE.values())[half::2]
    builder = build_run(languages=["en"], per_language=2, model={"policy": texts[0], "judge": texts[-1]})
    name = " ".join(texts)
    builder.run.config = builder.run.config.model_copy(update={"name": name, "banner": name})
    _poison(builder, name)
    html = write(builder, tmp_path)
    page = Page(html)
    assert page.scripts == clean.scripts and not page.all("img")
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean.elements}
    assert {n for _, a in page.elements for n in a} <= {n for _, a in clean.elements for n in a}
    assert all((a.get("href") or "#").startswith("#") for _, a in page.elements)
    assert not STEERING & set(html)


def test_a_change_is_called_clear_only_when_its_interval_leaves_out_no_change(build_run, tmp_path):
    builder = build_run(languages=["en", "de", "fr", "es"], per_language=2)
    intervals = {"en": (0.05, 0.15), "de": (-0.05, 0.15), "fr": (-0.15, -0.05), "es": (0.0, 0.2)}
    rows = []
    for language, (low, high) in intervals.items():
        row = {"split": "test", "language": language, "n": 10}
        for model in ("before", "after"):
            rows.append(row | {"model": model, "metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6})
        change = {"model": "after vs before", "metric": "accuracy_change", "value": (low + high) / 2}
        rows.append(row | change | {"low": low, "high": high})
    builder.write("evaluation:0", rows)
    html = write(builder, tmp_path)
    results = html[html.index('<section id="results"') :]
    cells = re.findall(r'<th scope="row"><bdi>(\w\w)</bdi></th>(.*?)</tr>', results, re.S)
    words = {language: " clear" in re.sub(r"<[^>]+>", "", row) for language, row in cells if language in intervals}
    assert words == {"en": True, "de": False, "fr": True, "es": False}


def test_right_to_left_and_unknown_text_finds_its_own_direction(build_run, tmp_path):
    page = Page(write(build_run(languages=["ar", "hi", "ja", "zh"], per_language=12), tmp_path))
    texts = [a for tag, a in page.elements if tag == "p" and a.get("class") == "text"]
    assert texts and all(a.get("dir") == "auto" for a in texts)
    assert {a["lang"] for a in texts} == {"ar", "hi", "ja", "zh"}


def test_very_long_answers_are_clipped_and_say_so(build_run, tmp_path):
    builder = build_run(languages=["en"], per_language=12)
    for table in ("curated:0", "rejected:0"):
        path = builder.run.inputs[table][0]
        long = pl.lit([{"role": "assistant", "content": "long " * 40_000}])
        pl.read_parquet(path).with_columns(chosen=long).write_parquet(path)
    html = write(builder, tmp_path)
    assert "194,000 more characters are in the table." in Page(html).words
    assert len(html) < 700_000


def test_the_browser_shows_at_most_the_wanted_pairs_of_every_language(build_run, tmp_path):
    page = Page(write(build_run(per_language=40, report={"browse_pairs": 60}), tmp_path))
    cards = [a for tag, a in page.elements if tag == "article"]
    assert len(cards) == 60
    shown = [a["data-language"] for a in cards]
    assert {shown.count(language) for language in set(shown)} == {6}
    none = Page(write(build_run(per_language=12, report={"browse_pairs": 0}), tmp_path))
    assert not none.all("article")


def test_rounds_are_told_apart(build_run, tmp_path):
    page = Page(write(build_run(languages=["en", "de"], per_language=12, rounds=2), tmp_path))
    assert page.words.count("Round 1") > page.words.count("Round 2") == 0
    assert len(page.all("section")) == len(SECTIONS)


def test_the_page_stays_small(build_run, tmp_path):
    html = write(build_run(per_language=400), tmp_path)
    assert len(html.encode()) < 1_000_000


def test_a_failed_report_leaves_the_old_one(build_run, tmp_path):
    builder = build_run(languages=["en"], per_language=6)
    old = write(builder, tmp_path)
    builder.run.inputs["gram:0"][0].write_bytes(b"PAR1 not a table")
    with pytest.raises(pl.exceptions.PolarsError):
        write(builder, tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old
    assert not list(tmp_path.glob(".report*"))


def test_equal_inputs_give_an_equal_page(build_run, tmp_path):
    builder = build_run(languages=["en", "ar"], per_language=12)
    assert write(builder, tmp_path) == write(builder, tmp_path)


def test_it_needs_no_torch():
    code = "import sys, stages.report.page as s; assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_page_says_what_it_was_made_from_and_is_old_when_that_is_another(build_run, tmp_path):
    run = build_run(languages=["en", "de"]).run
    page = tmp_path / "report.html"
    assert not is_current(page, run.config, run.manifests)
    write_page(page, run.config, Tables(run.inputs), run.manifests)
    assert is_current(page, run.config, run.manifests)
    other = run.manifests[0].model_copy(update={"content": "other"})
    assert not is_current(page, run.config, [other, *run.manifests[1:]])
    fewer = run.config.model_copy(update={"report": run.config.report.model_copy(update={"browse_pairs": 1})})
    assert not is_current(page, fewer, run.manifests)
    assert not is_current(page, run.config, run.manifests[1:])
    page.write_text("a page of an earlier version")
    assert not is_current(page, run.config, run.manifests)


def test_selections_side_by_side_are_shown_harmlessly_and_a_refusal_says_why(tmp_path: Path, build_run) -> None:
    run = build_run(["en"], 4, 1).run
    arm = Selected(HOSTILE, ("select.keep=0.3",), 2, {"en": 2}, {HOSTILE: 1}, {"tokens": 5.0}, {"other": 0.5}, 1, [])
    pair = Example("p", "en", HOSTILE, HOSTILE, HOSTILE)
    other = Selected("other", (), 2, {"en": 2}, {HOSTILE: 0}, {}, {HOSTILE: 0.5}, 1, [pair])
    found = Comparison(4, 9, {}, {"en": 4}, {HOSTILE: 1}, {"tokens": 7.0}, [arm, other])
    write_page(tmp_path / "r.html", run.config, Tables(run.inputs), run.manifests, compared={0: found, 1: HOSTILE})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "Other selections" in page.words and "of the 4 pairs that all of them can rank, of 9" in page.words
    assert "50%" in page.words and len(page.scripts) == 1 and "<img" not in text and "\u202e" not in text
