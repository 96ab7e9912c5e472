"""Relevance: the log-probability that a prompt adds to an answer, and where it is cut."""

from __future__ import annotations

import random

import polars as pl
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.config.curation import RelevanceConfig
from schemas.errors import UserError
from schemas.tables import TABLES
from stages.gradients.cuts import COLUMNS, cuts, notes, relevant
from stages.gradients.relevance import folded_prompts, other_prompts, says_nothing
from stages.gradients.stage import Gradients
from stages.text.render import load_renderer
from tests.conftest import CHATML
from tests.stages.gradients.one_sided_bench import both_passes, config, table
from tests.stages.stage_context import context, shards

TWO_SIDED = {"method": "two_sided", "dim": 256, "seed": 5, "error_pairs": 0}


def gradients_of(tmp_path, models, pairs, size=4, **gradients):
    ctx = context(tmp_path, config(sketch=TWO_SIDED, **gradients), models, pairs=pairs)
    parts = sorted(Gradients().run(ctx, shards(pairs, size)), key=lambda part: part.index)
    return pa.concat_tables([part.tables["gradients"] for part in parts])


def test_relevance_is_what_the_models_own_logits_say(tmp_path, models):
    pairs = table(9, 3)
    rows = {row["pair_id"]: row for row in pairs.to_pylist()}
    got = gradients_of(tmp_path, models, pairs)
    model = AutoModelForCausalLM.from_pretrained(models["policy"].path, dtype=torch.float32)
    renderer = load_renderer(models["policy"], config().text)
    others = other_prompts(pl.DataFrame(pairs).lazy(), 256, 0)

    def mean(prompt, row, side) -> float:
        ids = renderer.pair_ids(prompt, row["chosen"], row["rejected"])
        answer = getattr(ids, side)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids.prompt + answer])).logits[0].double().log_softmax(-1)
        at = range(len(ids.prompt) - 1, len(ids.prompt) + len(answer) - 1)
        return sum(float(logits[t, token]) for t, token in zip(at, answer, strict=True)) / len(answer)

    for found in got.to_pylist():
        row = rows[found["pair_id"]]
        for side in ("chosen", "rejected"):
            plain = mean([{"role": "user", "content": "..."}], row, side)
            assert found[f"relevance_{side}"] == pytest.approx(mean(row["prompt"], row, side) - plain, abs=1e-4)
            if (other := others.get(row["pair_id"])) is None:
                assert found[f"null_{side}"] is None
            else:
                assert found[f"null_{side}"] == pytest.approx(mean(other, row, side) - plain, abs=1e-4)
    assert got["null_chosen"].null_count < len(got)


def test_it_depends_on_no_shard_and_off_it_is_not_there(tmp_path, models):
    pairs = table(12, 4)
    one, other = (gradients_of(tmp_path, models, pairs, size).select(COLUMNS) for size in (3, 12))
    for name in COLUMNS:
        assert one[name].to_pylist() == pytest.approx(other[name].to_pylist(), abs=1e-5, nan_ok=True)
    off = gradients_of(tmp_path, models, pairs, relevance=False)
    assert all(off[name].null_count == len(off) for name in COLUMNS)


def test_other_prompts_are_of_another_group_whatever_the_order_of_rows():
    rows = table(60, 1).to_pylist()
    for n, row in enumerate(rows):
        row["group_id"] = f"g{n % 7}"
    pairs = pl.DataFrame(pa.Table.from_pylist(rows, schema=TABLES["pairs"].schema))
    found = other_prompts(pairs.lazy(), 8, 0)
    assert found == other_prompts(pairs.reverse().lazy(), 8, 0) != other_prompts(pairs.lazy(), 8, 1)
    by_text = {row["prompt"][0]["content"]: row for row in rows}
    for pair_id, prompt in found.items():
        (row,), other = [row for row in rows if row["pair_id"] == pair_id], by_text[prompt[0]["content"]]
        assert row["language"] == other["language"] and row["group_id"] != other["group_id"] and row["split"] == "train"
    counts = pairs.filter(pl.col("pair_id").is_in(list(found)))["language"].value_counts()
    assert counts["count"].to_list() == [8, 8, 8]
    same = pairs.with_columns(group_id=pl.lit("g"))
    assert other_prompts(same.lazy(), 8, 0) == {}


def asked(*texts: str, language: str = "de") -> pl.DataFrame:
    return pl.DataFrame(
        {
            "pair_id": [f"p{n:02d}" for n in range(len(texts))],
            "prompt_id": [f"q{n:02d}" for n in range(len(texts))],
            "group_id": [f"g{n:02d}" for n in range(len(texts))],
            "language": language,
            "split": "train",
            "prompt": [[{"role": "system", "content": "Answer."}, {"role": "user", "content": text}] for text in texts],
        }
    )


TEMPLATES = {
    "de": (lambda n: f"Wie viel ist {n} × {7 * n}?", lambda n: f"Was ist die Hauptstadt dieses Landes: {LANDS[n]}?"),
    "zh": (lambda n: f"{n} × {7 * n} 等于多少?", lambda n: f"这个国家的首都是哪里:{LANDS[n]}?"),
}
LANDS = ("Polen", "Japan", "Ägypten", "Portugal", "Norwegen", "Kenia")


@pytest.mark.parametrize("language", TEMPLATES)
def test_prompts_from_one_template_are_no_other_prompts(language):
    """What answers one of them is likely under its sisters too, and the cut would hold back what is an answer."""
    first, second = TEMPLATES[language]
    texts = [template(n) for template in (first, second) for n in range(6)]
    pairs = asked(*texts, language=language)
    for seed in range(20):
        found = other_prompts(pairs.lazy(), 256, seed)
        assert len(found) == 12
        for pair_id, prompt in found.items():
            assert (texts.index(prompt[-1]["content"]) < 6) != (int(pair_id[1:]) < 6)


def test_where_all_prompts_are_alike_another_one_is_taken_all_the_same():
    texts = [f"Wie viel ist {n} × {7 * n}?" for n in range(6)]
    for pair_id, prompt in other_prompts(asked(*texts).lazy(), 256, 0).items():
        assert prompt[-1]["content"] in texts and prompt[-1]["content"] != texts[int(pair_id[1:])]


def test_prompts_on_different_things_are_taken_in_the_order_of_the_shuffle():
    """Nothing is alike, so the next one is taken whatever is in it."""
    texts = [
        "Schreibe ein Gedicht über Schnee.",
        "Wer hat das Telefon erfunden?",
        "Nenne drei gesunde Rezepte",
        "Übersetze: good morning",
    ]
    found = other_prompts(asked(*texts).lazy(), 256, 3)
    following = {texts[int(pair_id[1:])]: prompt[-1]["content"] for pair_id, prompt in found.items()}
    seen, text = [], texts[0]
    for _ in texts:
        seen.append(text)
        text = following[text]
    assert sorted(seen) == sorted(texts) and text == texts[0]  # one ring through all of them


def sample(**languages: tuple[list[float], list[float]]) -> pl.DataFrame:
    frames = [
        pl.DataFrame({"language": [code] * len(own), "relevance_chosen": own, "null_chosen": null}).with_columns(
            relevance_rejected=pl.col("relevance_chosen"), null_rejected=pl.col("null_chosen")
        )
        for code, (own, null) in languages.items()
    ]
    return pl.concat(frames)


def test_the_cut_is_the_quantile_of_the_language_or_of_all_where_it_has_too_few():
    hundred = [n / 100 for n in range(100)]
    frame = sample(en=([2.0] * 100, hundred), de=([3.0] * 3, [0.0, 5.0, 0.0]))
    en, de, fr = cuts(frame, ["en", "de", "fr"], RelevanceConfig(quantile=0.9, off_topic_cost=1000))
    assert (en.value, en.n, en.pooled) == (0.9, 100, False)
    assert de.pooled and de.n == 103 and fr.value == de.value == pytest.approx(0.91, abs=0.02)
    passes = relevant(
        pl.DataFrame({"language": ["en", "en", "de", "xx"], "relevance_chosen": [0.9, None, 0.95, -9.0]}), [en, de]
    )
    assert passes.to_list() == [False, True, True, True]


def test_where_nothing_can_be_told_there_is_no_gate():
    blind = [n / 100 for n in range(100)]
    for frame, why in ((sample(en=(blind, blind)), "no likelier"), (sample(en=(blind[:9], blind[:9])), "too few")):
        (cut,) = cuts(frame, ["en"], RelevanceConfig())
        assert cut.value is None and why in cut.why
        assert relevant(frame, [cut]).all()


def by_trying(own: list[float], null: list[float], config: RelevanceConfig) -> float | None:
    """The cut by its definition: no cut, and every value of the null from the lowest on."""
    n = len(null)
    p = [(1 + sum(other >= value for other in null)) / (n + 1) for value in own]
    share = min(1, (1 + sum(one > 0.5 for one in p)) / (n / 2), (1 + sum(one > 0.05 for one in p)) / (0.95 * n))
    best, most = None, 0.0
    for cut in sorted(value for value in null if value <= pl.Series(null).quantile(config.quantile, "higher")):
        off, dropped = share * sum(value <= cut for value in null), sum(value <= cut for value in own)
        if dropped <= n / 2 and (gain := config.off_topic_cost * off - (dropped - off)) > most + 1e-9:
            best, most = cut, gain
    return best if share <= 0.5 else None


@pytest.mark.parametrize("seed", range(40))
def test_the_cut_is_where_dropping_gains_most(seed):
    r = random.Random(seed)
    n, grain = r.choice([20, 41, 200]), r.choice([1, 100])
    null = [round(r.gauss(0, 1) * grain) / grain for _ in range(n)]
    own = [round(r.gauss(0 if r.random() < 0.15 * (seed % 4) else 3, 1) * grain) / grain for _ in range(n)]
    config = RelevanceConfig(quantile=0.9, off_topic_cost=r.choice([0.25, 1.0, 3.0, 100]))
    (cut,) = cuts(sample(en=(own, null)), ["en"], config)
    assert cut.value == by_trying(own, null, config) and (cut.value is None or not cut.why)


def test_off_topic_answers_below_all_under_other_prompts_are_not_taken_for_twice_as_many():
    """A third of them: twice that would be more than half, and the model be called blind."""
    null = [n / 100 for n in range(100)]
    frame = sample(en=([-1.0] * 33 + [2.0] * 67, null))
    (cut,) = cuts(frame, ["en"], RelevanceConfig())
    assert cut.value is not None and relevant(frame, [cut]).to_list() == [False] * 33 + [True] * 67


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.25, 0.4])
def test_good_answers_pay_for_off_topic_ones_and_not_for_none(share):
    """Good answers overlap with the null, as a weak model's do: its 95% quantile would cost a fifth of them."""
    r = random.Random(0)
    n = 4000
    off = [r.random() < share for _ in range(n)]
    null = [r.gauss(0, 1) for _ in range(n)]
    own = [r.gauss(0 if one else 2.5, 1) for one in off]
    (cut,) = cuts(sample(en=(own, null)), ["en"], RelevanceConfig())

    def cost(value: float) -> float:
        pairs = list(zip(own, off, strict=True))
        return sum(3 * (r > value) if bad else r <= value for r, bad in pairs) / n

    assert cut.value is not None and notes([cut]) == []
    best = min(cost(value) for value in sorted(null)[::20])  # knowing which are off-topic
    assert cost(cut.value) <= 1.1 * best + 0.005
    assert cost(cut.value) < 0.6 * cost(pl.Series(null).quantile(0.95)) or share > 0.1


def test_one_sided_sums_leave_out_what_the_gate_holds_back(tmp_path, models, monkeypatch):
    """As if the pairs had never been there; and they have their rows in every table."""
    from stages.gradients import aggregate

    pairs = table(30, 6)
    off = {"p1", "p2", "p13", "p28"}

    def held(frame, found):
        return pl.Series([True] * frame.height)

    def marked(items):
        frame = _frame(items)
        return frame.with_columns(id=pl.Series([item.pair_id for item in items], dtype=pl.String))

    _frame = aggregate._relevance_frame
    monkeypatch.setattr(aggregate, "_relevance_frame", marked)
    monkeypatch.setattr(aggregate, "relevant", lambda frame, found: ~frame["id"].is_in(sorted(off)))
    got, account, _, _ = both_passes(tmp_path, models, pairs, config(relevance_null=10))
    monkeypatch.setattr(aggregate, "relevant", held)
    rest = pa.Table.from_pylist([r for r in pairs.to_pylist() if r["pair_id"] not in off], schema=pairs.schema)
    alone, _, _, _ = both_passes(tmp_path, models, rest, config(relevance_null=10))
    scores = {row["pair_id"]: row for row in got["scores"].to_pylist()}
    for row in alone["scores"].to_pylist():
        assert scores.pop(row["pair_id"])["score"] == pytest.approx(row["score"], abs=1e-4)
    assert set(scores) == off and all(row["flags"] == ["off_topic"] for row in scores.values())
    assert account.stats["off_topic_pairs"] == len(off)


def test_one_sided_sums_of_nothing_say_why(tmp_path, models, monkeypatch):
    from stages.gradients import aggregate

    monkeypatch.setattr(aggregate, "relevant", lambda frame, found: pl.Series([False] * frame.height))
    with pytest.raises(UserError, match="Every pair is off-topic"):
        both_passes(tmp_path, models, table(8, 2), config(relevance_null=10))


def test_a_small_language_that_the_model_does_not_know_has_no_gate():
    """The cut of all is that of the languages it knows well: the other's answers would all miss it."""
    quantile = RelevanceConfig(off_topic_cost=1000)
    strong = [2.0 + n / 100 for n in range(100)], [n / 100 for n in range(100)]
    frame = sample(en=strong, sw=([0.4] * 10, [0.1] * 10), de=([2.0] * 10, [0.1] * 10))
    en, sw, de = cuts(frame, ["en", "sw", "de"], quantile)
    assert de.value == pytest.approx(en.value, abs=0.1) and de.pooled
    assert (
        sw.value is None
        and sw.why == "100% of the chosen answers are no likelier under their own prompt than others are"
    )
    blind = sample(en=([0.0] * 100, [n / 100 for n in range(100)]), de=([9.0] * 10, [0.1] * 10))
    assert "97% of the chosen answers of all languages" in cuts(blind, ["de"], quantile)[0].why


def test_the_same_question_is_no_other_prompt():
    """Under another system message or in other letters: what answers it is an answer."""
    pairs = asked("Wie viel ist 3 × 7?", "wie viel ist  3 × 7?", "Wie viel ist 4 × 9?")
    found = {pair_id: prompt[-1]["content"] for pair_id, prompt in other_prompts(pairs.lazy(), 256, 0).items()}
    assert found["p00"] == found["p01"] == "Wie viel ist 4 × 9?" and len(found) == 3
    assert other_prompts(pairs.head(2).lazy(), 256, 0) == {}


def test_a_system_message_that_the_template_folds_stays_in_what_says_nothing():
    """It is what all prompts of a language begin with."""
    folded = "Answer in one word.\n\n"
    texts = ["Was ist Eis?", "Nenne drei Flüsse in Asien", "Wer schrieb den Faust?\n\nUnd wann?"]
    plain = asked(*texts).with_columns(prompt=pl.col("prompt").list.slice(1))
    begun = asked(*(f"{folded}{text}" for text in texts)).with_columns(prompt=pl.col("prompt").list.slice(1))
    other = asked("One?", "Another?", language="en")
    found = folded_prompts(pl.concat([begun, other]).lazy())
    assert found == {"de": folded} and folded_prompts(plain.lazy()) == folded_prompts(begun.head(1).lazy()) == {}
    assert says_nothing(begun["prompt"][0].to_list(), folded) == [{"role": "user", "content": f"{folded}..."}]
    assert says_nothing(plain["prompt"][0].to_list()) == [{"role": "user", "content": "..."}]
    long = {"de": folded * 20}
    alike = asked(*(f"{long['de']}{text}" for text in texts)).with_columns(prompt=pl.col("prompt").list.slice(1))
    said = {key: prompt[-1]["content"][-9:] for key, prompt in other_prompts(alike.lazy(), 9, 0, long).items()}
    assert said == {key: prompt[-1]["content"][-9:] for key, prompt in other_prompts(plain.lazy(), 9, 0).items()}


def test_relevance_is_measured_against_what_the_template_folds(tmp_path, models):
    """Every prompt begins with the same paragraph: with a template that has a system role it is the user's, with one that has none a system message."""
    pairs = table(12, 4)
    rows = pairs.to_pylist()
    for row in rows:
        row["prompt"][0]["content"] = f"be brief\n\n{row['prompt'][0]['content']}"
    begun = pa.Table.from_pylist(rows, schema=pairs.schema)
    template = tmp_path / "template.jinja"
    template.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML)
    settings = config(sketch=TWO_SIDED)
    folding = settings.model_copy(update={"text": settings.text.model_copy(update={"chat_template": str(template)})})
    got = []
    for one in (settings, folding):
        ctx = context(tmp_path, one, models, pairs=begun)
        parts = sorted(Gradients().run(ctx, shards(begun, 12)), key=lambda part: part.index)
        got.append(pa.concat_tables([part.tables["gradients"] for part in parts]))
    assert got[0]["logp_chosen"].to_pylist() == pytest.approx(got[1]["logp_chosen"].to_pylist(), abs=1e-4)
    assert got[0]["relevance_chosen"].to_pylist() != pytest.approx(got[1]["relevance_chosen"].to_pylist(), abs=1e-4)
