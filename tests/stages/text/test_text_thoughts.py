"""Thoughts before answers: learnt, left out or dropped as text.thoughts says, and never rewritten."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from schemas.config.model import TextConfig
from schemas.errors import UserError
from stages.text.messages import BadRow
from stages.text.render import Renderer, check_thoughts, refuse_channels
from stages.text.thoughts import Thoughts

QWEN3 = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m['role'] == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m['content'] %}"
    "{%- if m['role'] == 'assistant' %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + m['role'] + '\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
"""As Qwen3's: the last answer has a thought, an empty one if need be; earlier ones lose theirs."""
R1 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant' + m['content'].split('</think>')[-1] + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<think>\n' }}{% endif %}"
)
"""As DeepSeek-R1's: every answer loses its thought, and the prompt begins one."""
USER = [{"role": "user", "content": "What is 2+2?"}]
WHOLE = "<think>\nTwo and two.\n</think>\n\nIt is 4."


@pytest.fixture(scope="module")
def make(tiny_tokenizer: Any) -> Any:
    def make(template: str | None, **text: Any) -> Renderer:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        if template is not None:
            tokenizer.add_tokens(["<think>", "</think>"])
            tokenizer.chat_template = template
        return Renderer(tokenizer, TextConfig.model_validate(text))

    return make


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("template", [QWEN3, R1, None], ids=["qwen3", "r1", "plain"])
@pytest.mark.parametrize(
    "text", [WHOLE, "It is 4.", "\n<think>x</think>y", "a < b, a </b>", "Two.\n</think>\n\nIt is 4."]
)
def test_the_pieces_of_an_answer_are_the_answer(make: Any, template: str | None, text: str) -> None:
    found = make(template).thoughts.split(text)
    assert f"{found.opening}{found.thought or ''}{found.closing}{found.said}" == text


def test_policies_strip_keep_and_drop(make: Any) -> None:
    thoughts = make(QWEN3).thoughts
    assert thoughts.target(WHOLE, "strip") == "It is 4." and thoughts.target(WHOLE, "keep") == WHOLE
    with pytest.raises(BadRow, match="thought"):
        thoughts.target(WHOLE, "drop")
    for policy in ("strip", "keep", "drop"):
        assert thoughts.target("It is 4.", policy) == "It is 4."
        assert thoughts.target("<think>\n\n</think>\n\nIt is 4.", policy) == "It is 4."
    assert thoughts.target("Two.\n</think>\n\nIt is 4.", "keep") == "<think>\nTwo.\n</think>\n\nIt is 4."
    with pytest.raises(BadRow, match="empty"):
        thoughts.target("<think>\nTwo.\n</think>\n", "strip")


@pytest.mark.parametrize(
    "text", ["Write </think>.", "<think>\nTwo", f"{WHOLE}<think>", f"So: {WHOLE}", f"{WHOLE}\n</think>"]
)
def test_marks_that_are_no_whole_thought_are_refused_where_the_template_knows_them(make: Any, text: str) -> None:
    with pytest.raises(BadRow, match="broken_thought"):
        make(QWEN3).thoughts.target(text, "strip")


def test_marks_that_the_template_does_not_know_are_plain_text(make: Any) -> None:
    plain = make(None)
    assert plain.thoughts.target("Write </think>.", "strip") == "Write </think>."
    assert plain.neutral_answer("Write </think>.") == ("Write </think>.", 0)
    assert plain.thoughts.target(WHOLE, "strip") == "It is 4."


def test_a_template_declares_its_own_marks() -> None:
    thoughts = Thoughts("{{ '<my:thinking>' }}{{ '</my:thinking>' }} [THINK] [/THINK]")
    assert thoughts.target("<my:thinking>x</my:thinking>y", "strip") == "y"
    assert thoughts.target("[THINK]x[/THINK]y", "strip") == "y"
    assert thoughts.declared == {"<my:thinking>", "</my:thinking>", "[THINK]", "[/THINK]"}


def test_a_kept_thought_is_learnt_as_the_templates_thought(make: Any) -> None:
    for kwargs in ({"enable_thinking": False}, {}):
        renderer = make(QWEN3, thoughts="keep", chat_template_kwargs=kwargs)
        pair = renderer.pair_ids(USER, answer(WHOLE), answer("It is 5."))
        whole = renderer.tokenizer.decode([*pair.prompt, *pair.chosen])
        assert whole == f"<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n{WHOLE}<|im_end|>"
        empty = renderer.tokenizer.decode([*pair.prompt, *pair.rejected])
        assert empty.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nIt is 5.<|im_end|>")


def test_a_stripped_answer_is_rendered_whole(make: Any) -> None:
    for template in (QWEN3, R1):
        renderer = make(template)
        pair = renderer.pair_ids(USER, answer(renderer.thoughts.target(WHOLE, "strip")), answer("It is 5."))
        assert renderer.tokenizer.decode(pair.chosen).endswith("It is 4.<|im_end|>")


def test_keeping_is_refused_where_the_template_leaves_thoughts_out(make: Any) -> None:
    assert make(QWEN3).keeps_thoughts and make(None).keeps_thoughts and not make(R1).keeps_thoughts
    check_thoughts(make(R1), "strip")
    with pytest.raises(UserError, match=r"text.thoughts.*strip"):
        check_thoughts(make(R1), "keep")


def test_marks_in_prompts_are_neutralised_and_earlier_thoughts_left_out(make: Any) -> None:
    prompt = [
        {"role": "user", "content": "Hi <think>"},
        *answer(WHOLE),
        {"role": "user", "content": "How do I close a <think> tag? </think>"},
    ]
    prepared = make(QWEN3).prepare(prompt)
    assert [message["content"] for message in prepared] == [
        "Hi < think>",
        "It is 4.",
        "How do I close a < think> tag? < /think>",
    ]


def test_a_generated_thought_is_decoded_with_its_marks(make: Any) -> None:
    renderer = make(QWEN3)
    ids = renderer.tokenizer(f"{WHOLE}<|im_end|>", add_special_tokens=False)["input_ids"]
    assert renderer.decode(ids) == WHOLE
    assert renderer.neutral_answer(WHOLE) == (WHOLE, 0)
    assert renderer.neutral_answer(f"{WHOLE} <|im_end|>") == (f"{WHOLE} < |im_end|>", 1)


def test_a_prompt_that_begins_the_thought_is_noticed(make: Any) -> None:
    r1, qwen = make(R1), make(QWEN3)
    assert r1.opened_thought(r1.prompt_ids(USER)) == "<think>"
    assert qwen.opened_thought(qwen.prompt_ids(USER)) == ""


def test_what_a_judge_is_shown_has_no_thought_whole_or_cut_off(make: Any) -> None:
    said = make(QWEN3).thoughts.said
    assert said(WHOLE) == "It is 4." and said("<think>\nTwo and") == "" and said("It is 4.") == "It is 4."


@pytest.mark.parametrize(
    ("answer", "thought", "said"),
    [
        ("hm</think>\n\nYes.", "hm", "Yes."),
        ("hm\n</think>Yes.", "hm\n", "Yes."),
        ("A thought ends in </think> there.", None, "A thought ends in </think> there."),
        ("<|START_THINKING|>hm<|END_THINKING|>Yes.", "hm", "Yes."),
        ("Let me see.</think>The answer.", "Let me see.", "The answer."),
        ("看看。</think>答案", "看看。", "答案"),
        *((text, None, text) for text in (
            'It writes "I see.</think>Yes".', "As in `so.</think>No`.", "```\nhm.</think>Yes\n```", "See.</think> ends it.",
            "Write x</think>y.", "End.</think>", "It is “so.</think>No”.",
        )),
        ("<Think>hm</Think>Yes.", "hm", "Yes."),
        ("<THINK>hm</think >Yes.", "hm", "Yes."),
        ('<think duration="3">hm</think>\nYes.', "hm", "Yes."),
        ("\n<thoughts>\nhm</thoughts>Yes.", "\nhm", "Yes."),
        ('<details type="reasoning" done="true">\nhm</details>\nYes.', "\nhm", "Yes."),
        *((text, None, text) for text in (
            "<details>hm</details>Yes.", "<details class='x'>hm</details>Yes.", "<thinker>hm</thinker>Yes.", "So <Think>hm</Think>",
        )),
    ],
)  # fmt: skip
def test_thoughts_whose_opening_was_in_the_prompt_and_of_other_models(
    answer: str, thought: str | None, said: str
) -> None:
    found = Thoughts("").split(answer)
    assert (found.thought, found.said.strip()) == (thought, said)


@pytest.mark.parametrize(
    "answer",
    [
        "<Think>hm",
        '<think duration="3">hm',
        '<details type="reasoning"><details>a</details>b</details>Yes.',
        '<details type="reasoning">a</details>Yes.<details>b</details>',
    ],
)
def test_a_thought_in_other_marks_that_is_not_whole_is_broken(answer: str) -> None:
    with pytest.raises(BadRow, match="broken_thought"):
        Thoughts("").target(answer, "strip")
    assert "hm" not in Thoughts("").said(answer)


def test_answers_in_channels_are_refused_rather_than_glued_together(make: Any, tiny_tokenizer: Any) -> None:
    refuse_channels(make(None))
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<|channel|>", "<|message|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}<|channel|>final<|message|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    with pytest.raises(UserError, match="in channels"):
        refuse_channels(Renderer(tokenizer, TextConfig()))


def test_code_after_a_thought_keeps_the_indentation_of_its_first_line() -> None:
    answer = "<think>\nHm.\n</think>\n\n    y = 1\n    return y\n"
    assert Thoughts("").target(answer, "strip") == "    y = 1\n    return y"


@pytest.mark.parametrize(
    ("said", "learnt"),
    [
        ("<answer>R</answer>", "R"),
        ("<Output>\nC\n</Output>", "C"),
        ("<final_answer>\n    y = 1\n    return y\n</final_answer >\n", "    y = 1\n    return y"),
        ("<RESPONSE>a <b>c</b></response>", "a <b>c</b>"),
        *((text, text) for text in (
            "<answer>R</answer> and more", "So: <answer>R</answer>", "<answer>1</answer>\n<answer>2</answer>", "<answer>R", "<p>R</p>",
            "<answers>R</answers>", "<answer><answer>R</answer></answer>", "<answer>R</output>",
        )),
    ],
)  # fmt: skip
def test_an_element_around_all_that_is_said_after_a_thought_goes_with_it(said: str, learnt: str) -> None:
    thoughts = Thoughts("")
    whole = f"<Thought>hm</Thought>\n{said}"
    assert thoughts.target(whole, "strip") == learnt
    assert thoughts.target(whole, "keep") == whole
    for policy in ("strip", "keep", "drop"):
        assert thoughts.target(said, policy) == said  # no thought, no change


def test_an_element_goes_from_both_answers_of_a_pair_or_from_neither() -> None:
    thoughts, thinks, short = Thoughts(""), "<think>2+2</think><answer>4</answer>", "<answer>5</answer>"
    assert thoughts.targets(thinks, short, "strip") == ("4", "5") == thoughts.targets(short, thinks, "strip")[::-1]
    assert thoughts.targets(short, short, "strip") == (short, short)
    assert thoughts.targets(thinks, short, "keep") == (thinks, short)


def test_an_empty_element_after_a_thought_says_nothing() -> None:
    with pytest.raises(BadRow, match="empty"):
        Thoughts("").target("<think>hm</think><answer>\n</answer>", "strip")
