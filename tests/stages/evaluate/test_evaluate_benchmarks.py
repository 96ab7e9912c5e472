"""Benchmarks of lm-evaluation-harness on a tiny model: figures, resume, what is refused before work, languages of tasks."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.errors import UserError
from stages.checks.benchmarks import look
from stages.evaluate.benchmarks.child import Metric
from stages.evaluate.benchmarks.figures import rows
from stages.evaluate.benchmarks.language import language_of
from stages.evaluate.benchmarks.measuring import described
from stages.evaluate.benchmarks.wanted import Task, Wanted

needs_harness = pytest.mark.usefixtures("harness")
CHOICES = ["four", "five", "a dog"]


class Here:
    """A child process that is none: its work is done, here, when it is started, so that the harness is imported once for all tests."""

    def __init__(self, entry: Callable[..., None], arguments: Sequence[Any], *_: Any, **__: Any) -> None:
        self.said: list[Any] = []
        path, folder = list(sys.path), Path.cwd()
        entry(self, *arguments)
        sys.path[:] = path
        os.chdir(folder)
        logging.disable(logging.NOTSET)

    def send(self, message: Any) -> None:
        self.said.append(message)

    def receive(self) -> Any:
        return self.said.pop(0)

    def messages(self) -> Iterator[Any]:
        while self.said:
            yield self.said.pop(0)

    def kill(self) -> None:
        self.said.clear()


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness, if it is installed, in this process, with the tasks of the folder alone: its own take ten seconds to read."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is not installed (extra [eval])")
    from stages.evaluate.benchmarks import catalogue, measuring

    def own(**given: Any) -> Any:
        return tasks.TaskManager(**given | {"include_defaults": False})

    monkeypatch.setattr(catalogue, "TaskManager", own)
    monkeypatch.setattr(measuring, "start_child", Here)
    monkeypatch.setattr(measuring, "wait_for", lambda *_: None)


CHOICE = """
task: sums_{language}
dataset_path: json
dataset_kwargs:
  data_files: {{test: sums.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
num_fewshot: 0
metric_list: [{{metric: acc}}]
"""
WRITTEN = """
task: words_en
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {max_gen_toks: 3, until: ["\\n"]}
metric_list: [{metric: exact_match}]
"""


def questions() -> list[dict[str, Any]]:
    return [{"question": f"What is {n} and one?", "choices": CHOICES, "answer": n % 3} for n in range(10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "tasks"
    found.mkdir()
    (found / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions()), encoding="utf-8")
    (found / "sums_de.yaml").write_text(CHOICE.format(language="de"), encoding="utf-8")
    (found / "words_en.yaml").write_text(WRITTEN, encoding="utf-8")
    return found


def right(model: Path) -> list[float]:
    """Whether the likeliest choice is the right one, question by question, from plain logits."""
    tokenizer, loaded = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    )
    found = []
    for row in questions():
        sums = []
        for choice in CHOICES:
            ids = tokenizer(f"{row['question']} {choice}")["input_ids"]
            start = len(tokenizer(row["question"])["input_ids"])
            with torch.no_grad():
                logps = loaded(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logps[t - 1, ids[t]]) for t in range(start, len(ids))))
        found.append(float(max(range(3), key=sums.__getitem__) == row["answer"]))
    return found


@needs_harness
def test_tasks_of_a_folder_are_measured_before_and_after_and_not_again(
    bench: Any, run_evaluate: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "tasks": ["sums_de", "words_en"],
        "benchmarks": {"folder": str(folder), "limit": 9},
        "win_rate": False,
        "prompts_per_language": 0,
        "sampling": {"temperature": 0.0, "max_tokens": 512},
    }
    ctx = bench.context(evaluate=settings)
    result = run_evaluate(ctx)
    expected = {m: right(bench.models[role].path)[:9] for m, role in (("before", "initial"), ("after", "trained"))}
    for model, values in expected.items():
        row = result.value(model, "benchmark", "de", "sums_de/acc")
        assert (row["n"], row["value"]) == (9, pytest.approx(sum(values) / 9))
        share = sum(values) / 9
        error = result.value(model, "benchmark", "de", "sums_de/acc_stderr")
        assert error["value"] == pytest.approx((share * (1 - share) / 8) ** 0.5, abs=1e-6)
        assert row["low"] <= row["value"] <= row["high"]
    change = result.value("after vs before", "benchmark", "de", "sums_de/acc_change")
    assert change["value"] == pytest.approx((sum(expected["after"]) - sum(expected["before"])) / 9)
    assert result.value("before", "benchmark", "en", "words_en/exact_match")["n"] == 9
    mean = result.value("before", "benchmark", "all", "benchmarks")
    both = [
        result.value("before", "benchmark", *key)["value"]
        for key in (("de", "sums_de/acc"), ("en", "words_en/exact_match"))
    ]
    assert mean["value"] == pytest.approx(sum(both) / 2)
    asked = {(t.language, t.rows_in, t.kept) for t in result.account.tallies if t.unit == "question"}
    assert asked == {("de", 10, 9), ("en", 10, 9)}
    assert [d.row_id for d in result.account.drops if d.unit == "question"] == ["sums_de:9", "words_en:9"]
    assert ctx.progress.done == ctx.progress.amount

    def never(*_: Any) -> None:
        raise AssertionError("a finished task was run again")

    monkeypatch.setattr("stages.evaluate.benchmarks.child.measure", never)
    again = run_evaluate(bench.context(evaluate=settings))
    assert again.evaluation == result.evaluation


@needs_harness
def test_what_cannot_be_run_is_refused_by_name_with_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = (folder / "sums_de.yaml").read_text(encoding="utf-8")

    def said(name: str, text: str, **settings: Any) -> str:
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        fields = {"fewshot": None, "limit": None, "chat_template": False, "trust_code": False} | settings
        with pytest.raises(UserError) as refused:
            described(Wanted((name,), folder, **fields))
        (folder / f"{name}.yaml").unlink()
        return str(refused.value)

    own = task.replace("sums_de", "mine")
    assert "has no task 'other'" in said("other", own.replace("mine", "another"))
    assert "cannot be read" in said("broken", "task: [")
    (folder / "a.yaml").write_text("include: gone.yaml\ntask: first\n", encoding="utf-8")
    assert "(a.yaml includes gone.yaml, and there is no such file" in said("other", own.replace("mine", "another"))
    (folder / "half.yml").write_text("task: [", encoding="utf-8")
    assert "(mine.yaml includes half.yml: half.yml cannot be read" in said("mine", "include: half.yml\ntask: mine\n")
    (folder / "half.yml").write_text("include: mine.yaml\n", encoding="utf-8")
    assert "(mine.yaml includes half.yml: half.yml includes mine.yaml, which includes it)" in said(
        "mine", "include: [half.yml]\ntask: mine\n"
    )
    (folder / "a.yaml").unlink()
    assert "runs programs that the model writes" in said("mine", own + "unsafe_code: true\n")
    assert "trust_code: true" in said("mine", own.replace("answer", "!function code.target"))
    assert "trust_code: true" in said("mine", "task: mine\nclass: !function code.Task\n")
    (folder / "base.yml").write_text("doc_to_target: !function code.target\n", encoding="utf-8")
    assert "trust_code: true" in said("mine", "include: base.yml\n" + own.replace("doc_to_target: answer\n", ""))
    missing = said(
        "mine", own.replace("dataset_path: json", "dataset_path: nobody/nothing").replace("dataset_kwargs", "x")
    )
    assert "cannot be" in missing and "mine" in missing
    assert "none of the tasks" in said("mine", own, languages={"yours": "de"})


@needs_harness
@pytest.mark.parametrize("fewshot", [None, 0, 2])
def test_a_task_that_keeps_no_solved_examples_is_named(folder: Path, bench: Any, fewshot: int | None) -> None:
    evaluate = {"tasks": ["sums_de", "words_en"], "benchmarks": {"folder": str(folder), "fewshot": fewshot}}
    notes = look(bench.context(evaluate=evaluate).config)
    said = ["evaluate.benchmarks.fewshot has no effect on sums_de: their files say num_fewshot: 0"]
    assert notes[1:] == (said if fewshot else [])


def test_a_task_folder_that_is_not_trusted_runs_no_code_whatever_its_files_are_called_or_say(
    folder: Path, tmp_path: Path
) -> None:
    """A module beside the task that the harness imports, and a template that reaches for the system: in a process of its own."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra [eval])")
    ran = tmp_path / "ran"
    (folder / "sacrebleu.py").write_text(f"open({str(ran)!r}, 'w')\n", encoding="utf-8")
    task = (folder / "sums_de.yaml").read_text(encoding="utf-8")
    reach = "{{cycler.__init__.__globals__.os.system('touch " + str(ran) + "')}}{{question}}"
    (folder / "sums_de.yaml").write_text(task.replace("{{question}}", reach), encoding="utf-8")
    with pytest.raises(UserError, match="Task sums_de cannot be loaded"):
        described(Wanted(("sums_de",), folder, False, None, None, False))
    assert not ran.exists()


def test_a_refusal_comes_out_of_the_harness_process_as_it_is(folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra [eval])")
    task = (folder / "sums_de.yaml").read_text(encoding="utf-8")
    (folder / "sums_de.yaml").write_text(task.replace("answer", "!function code.target"), encoding="utf-8")
    with pytest.raises(UserError, match="Task sums_de runs Python of its folder"):  # a process of its own: four seconds
        described(Wanted(("sums_de",), folder, False, None, None, False))


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["belebele_deu_Latn"], "de"),
        (["belebele_zho_Hans"], "zh-Hans"),
        (["belebele_zho_Hant"], "zh-Hant"),
        (["mgsm_direct_es"], "es"),
        (["global_mmlu_full_sw_business"], "sw"),
        (["afrimmlu_direct_swa"], "sw"),
        (["m_mmlu_fr"], "fr"),
        (["arc_challenge"], "und"),
        (["hellaswag"], "und"),
        (["flores_de-es"], "und"),
        (["German", "exams_x"], "de"),
        (["xstory_cloze_pt-BR"], "pt-BR"),
    ],
)
def test_the_language_of_a_task_is_read_from_what_it_says(texts: list[str], language: str) -> None:
    assert language_of(texts, ["de", "es", "zh-Hans", "sw"]) == language


def test_a_change_has_the_interval_of_its_differences_and_other_metrics_that_of_their_standard_errors() -> None:
    docs = list(range(12))
    before = [0.0] * 6 + [1.0] * 6
    after = [1.0] * 3 + [0.0] * 3 + [1.0] * 6
    task = Task("t_de", "t_de", "de", 12, 12)
    found = {
        row["metric"]: row
        for row in rows(
            [task, Task("u", "u", "und", 12, 12)],
            {
                "u": [Metric("acc", 0.5, 0.15, True, docs, before)],
                "t_de": [Metric("acc", 0.5, 0.15, True, docs, before), Metric("bleu", 20.0, 3.0, True, [], [])],
            },
            {
                "u": [Metric("acc", 0.5, 0.15, True, docs, before)],
                "t_de": [Metric("acc", 0.75, 0.13, True, docs, after), Metric("bleu", 26.0, 4.0, True, [], [])],
            },
            0,
        )
        if row["model"] == "after vs before" and (row["metric"] != "benchmarks_change" or row["language"] == "all")
    }
    gaps = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    assert found["t_de/acc_change_stderr"]["value"] == pytest.approx(float(gaps.std() / 12**0.5))
    assert found["t_de/acc_change"]["low"] == 0.0 < found["t_de/acc_change"]["high"]
    assert found["u/acc_change"]["low"] < 0 < found["u/acc_change"]["high"], (
        "twelve questions unchanged are not all there are"
    )
    assert found["u/acc_change"]["high"] == pytest.approx(1.959964**2 / (12 + 1.959964**2), abs=1e-6), (
        "Wilson's, of 0 in 12"
    )
    bleu = found["t_de/bleu_change"]
    error = found["t_de/bleu_change_stderr"]["value"]
    assert (bleu["value"], error) == (6.0, 5.0), "3 and 4 are the legs of 5"
    assert (bleu["low"], bleu["high"]) == pytest.approx((6 - 1.959964 * 5, 6 + 1.959964 * 5), abs=1e-4)
    assert found["benchmarks_change"]["value"] == 0.125, "bleu is no share, and not the first metric"
