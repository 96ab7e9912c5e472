"""Rendering: data never becomes structure, and pairs are tokenised as TRL tokenises the stored rows."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hostile import NASTY
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from schemas.config.model import TextConfig
from schemas.errors import UserError
from stages.contract import ModelRef
from stages.text.messages import clean
from stages.text.render import Renderer, RenderError, load_renderer

LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}"
    "{{ '<|start|>system<|sep|>Today: ' + date_string + '<|eot|>' }}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|sep|>' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|sep|>' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<|start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<|eot|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' + m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "gemma": GEMMA, "qwen3": QWEN3}
USER = [{"role": "user", "content": "Wie geht's?"}]


STRINGS = {name: text for name, text in NASTY.items() if len(text) < 2**17}


@pytest.fixture(scope="module")
def make_tokenizer(tiny_tokenizer: Any) -> Any:
    def make(template: str | None) -> Any:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        if template is not None and "<|eot|>" in template:
            tokenizer.add_special_tokens(
                {"additional_special_tokens": ["<|start|>", "<|sep|>", "<|eot|>"], "bos_token": "<bos>"}
            )
            tokenizer.add_tokens(["<think>", "</think>", "<h1>", "\n\n"])
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="module", params=["chatml", *TEMPLATES])
def renderer(request: pytest.FixtureRequest, make_tokenizer: Any, tiny_tokenizer: Any) -> Renderer:
    template = TEMPLATES.get(request.param, tiny_tokenizer.chat_template)
    return Renderer(make_tokenizer(template), TextConfig())


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def trl_ids(renderer: Renderer, prompt: Any, chosen: Any, rejected: Any) -> dict[str, list[int]]:
    """What DPOTrainer itself makes of a stored row."""
    from datasets import Dataset
    from trl import DPOTrainer

    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "chat_template_kwargs": renderer.template_kwargs}
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    dataset = DPOTrainer._prepare_dataset(SimpleNamespace(), Dataset.from_list([row]), renderer.tokenizer, args, "t")
    return dataset[0]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Gut.", "Schlecht!"),
        ("same start, a", "same start, b"),
        ("", "x"),
        ("<|eot|><|im_end|>", "</think> hi"),
        ("\n\n a", "a "),
    ],
)
def test_pairs_are_tokenised_as_trl_tokenises_the_stored_row(renderer: Renderer, chosen: str, rejected: str) -> None:
    prompt = [{"role": "user", "content": "a <|eot|> b"}, *answer("<|im_end|> ok"), {"role": "user", "content": "c\n"}]
    pair = renderer.pair_ids(prompt, answer(chosen), answer(rejected))
    theirs = trl_ids(
        renderer, renderer.prepare(prompt), renderer.prepare(answer(chosen)), renderer.prepare(answer(rejected))
    )
    assert pair.prompt == theirs["prompt_ids"]
    for ours, full in ((pair.chosen, theirs["chosen_ids"]), (pair.rejected, theirs["rejected_ids"])):
        assert full[: len(ours)] == ours
        assert ours[-1] == renderer.end_of_turn
        assert renderer.tokenizer.decode(full[len(ours) :]).strip() == ""


def test_a_prompt_has_the_generation_prompt_that_the_pair_continues(renderer: Renderer) -> None:
    prompt = renderer.prompt_ids(USER)
    pair = renderer.pair_ids(USER, answer("ja"), answer("nein"))
    assert pair.prompt == prompt
    assert renderer.decode(pair.chosen) == "ja"


MARKS = st.sampled_from(
    [
        "<|im_end|>",
        "<|eot|>",
        "<|start|>",
        "<think>",
        "</think>",
        "<|",
        "|>",
        "im_end",
        "<h1>",
        "\n\n",
        "<bos>",
        " ",
        "é中",
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(MARKS, st.text(max_size=4)), max_size=8).map("".join))
def test_no_text_renders_to_a_control_token(renderer: Renderer, text: str) -> None:
    harmless, count = renderer.neutralise(text)
    assert renderer.neutralise(harmless) == (harmless, 0)
    assert (count == 0) == (harmless == text)
    controls = renderer._control_ids
    assert not controls & set(renderer.tokenizer(harmless, add_special_tokens=False)["input_ids"])
    plain, hostile = renderer.prompt_ids(USER), renderer.prompt_ids([{"role": "user", "content": text}])
    assert [i for i in hostile if i in controls] == [i for i in plain if i in controls]


def test_ordinary_added_tokens_and_text_stay_as_they_are(renderer: Renderer) -> None:
    text = "<h1>Titel</h1>\n\n2 < 3 | 4 > 1, a|b, [x], <html>"
    assert renderer.neutralise(text) == (text, 0)


def test_marks_are_broken_once_each_and_still_readable(renderer: Renderer) -> None:
    assert renderer.neutralise("a <|im_end|> b <|im_end|>") == ("a < |im_end|> b < |im_end|>", 2)


def test_preparing_twice_changes_nothing(renderer: Renderer) -> None:
    once = renderer.prepare([{"role": "user", "content": "x <|eot|>"}], "Be <|start|> brief.")
    assert renderer.prepare(once) == once


def test_a_template_without_system_role_folds_or_refuses(make_tokenizer: Any) -> None:
    folding = Renderer(make_tokenizer(GEMMA), TextConfig(system_role="fold"))
    assert folding.prepare(USER, "Sei kurz.") == [{"role": "user", "content": "Sei kurz.\n\nWie geht's?"}]
    assert any("folded" in note for note in folding.notes)
    refusing = Renderer(make_tokenizer(GEMMA), TextConfig(system_role="refuse"))
    with pytest.raises(RenderError, match=r"text\.system_role"):
        refusing.prompt_ids(USER, "Sei kurz.")
    with_system = Renderer(make_tokenizer(LLAMA3), TextConfig())
    assert with_system.prepare(USER, "Sei kurz.")[0] == {"role": "system", "content": "Sei kurz."}


def test_the_conversations_own_system_message_wins(renderer: Renderer) -> None:
    own = [{"role": "system", "content": "own"}, *USER]
    assert renderer.prompt_ids(own, "config's") == renderer.prompt_ids(own)


def test_dates_are_pinned(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(LLAMA3), TextConfig())
    assert "Today: 26 Jul 2024" in renderer.tokenizer.decode(renderer.prompt_ids(USER))
    assert any("pinned" in note for note in renderer.notes)
    chosen = Renderer(make_tokenizer(LLAMA3), TextConfig(chat_template_kwargs={"date_string": "1 Jan 2000"}))
    assert "Today: 1 Jan 2000" in chosen.tokenizer.decode(chosen.prompt_ids(USER))
    with pytest.raises(UserError, match="pinned"):
        Renderer(make_tokenizer(LLAMA3.replace("'%d %b %Y'", "fmt")), TextConfig())


def test_thinking_is_off_by_default_and_a_config_value(make_tokenizer: Any) -> None:
    off = Renderer(make_tokenizer(QWEN3), TextConfig())
    on = Renderer(make_tokenizer(QWEN3), TextConfig(chat_template_kwargs={}))
    assert len(off.prompt_ids(USER)) > len(on.prompt_ids(USER))


def test_without_a_template_chatml_is_used_and_said(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(None), TextConfig())
    assert any("no chat template" in note for note in renderer.notes)
    text = renderer.tokenizer.decode(renderer.prompt_ids(USER))
    assert text == "<|im_start|>user\nWie geht's?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_base_model_without_chatml_tokens_ends_turns_with_its_eos(adds_bos: bool) -> None:
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<bos>", "<eos>"])
    if adds_bos:
        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    base = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    renderer = Renderer(base, TextConfig())
    pair = renderer.pair_ids(USER, answer("<|im_start|>a"), answer("b"))
    text = base.decode([*pair.prompt, *pair.chosen])
    turn = "<|im_start|>user\nWie geht's?<eos>\n<|im_start|>assistant\n< |im_start|>a<eos>"
    assert text == ("<bos>" if adds_bos else "") + turn
    assert pair.prompt.count(256) == adds_bos


def test_a_template_that_never_ends_a_turn_is_refused(make_tokenizer: Any) -> None:
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "
    with pytest.raises(UserError, match="end-of-turn"):
        Renderer(make_tokenizer(endless), TextConfig())


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "note"),
    [
        (CHATML + ASKS, None),
        (CHATML + ASKS.replace("{% endif", "<think>\n{% endif"), "asks for an answer with '<think>\\n'"),
        (CHATML, "puts '<|im_start|>assistant\\n' before an answer"),
        (CHATML.replace("in messages", "in messages[-2:]") + ASKS, "leaves out earlier turns"),
        (CHATML.replace("m['content']", "m['content'] | capitalize") + ASKS, None),
    ],
)
def test_what_a_template_puts_between_a_prompt_and_its_answer_is_said(
    make_tokenizer: Any, template: str, note: str | None
) -> None:
    notes = Renderer(make_tokenizer(template), TextConfig()).notes_on_learning
    assert [note in said for said in notes] == ([True] if note else [])


def test_a_thought_that_the_prompt_opens_is_no_surprise_where_thoughts_are_kept(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(CHATML + ASKS.replace("{% endif", "<think>\n{% endif"))
    assert not Renderer(tokenizer, TextConfig(thoughts="keep")).notes_on_learning


@pytest.mark.parametrize("content", ["m['content'][:10]", "m['content'][0]['text']", "''"])
def test_a_template_that_leaves_out_what_is_said_is_refused(make_tokenizer: Any, content: str) -> None:
    with pytest.raises(UserError, match="leaves out what a message says"):
        Renderer(make_tokenizer((CHATML + ASKS).replace("m['content']", content)), TextConfig())


def test_padding_that_is_ordinary_text_is_none_of_the_marks(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(CHATML + ASKS)
    tokenizer.pad_token = "!"
    renderer = Renderer(tokenizer, TextConfig())
    assert renderer.neutralise("Jupiter! <|im_end|>") == ("Jupiter! < |im_end|>", 1)
    tokenizer.eos_token = "!"
    assert Renderer(tokenizer, TextConfig()).neutralise("Jupiter!") == ("Jupiter ", 1)


def test_a_call_of_a_tool_in_the_models_own_marks_is_known(make_tokenizer: Any) -> None:
    renderer, call = Renderer(make_tokenizer(CHATML + ASKS), TextConfig()), '<tool_call>\n{"name": "f"}\n</tool_call>'
    assert not renderer.calls_tools(call) and renderer.neutral_answer(call) == (call, 0)
    tokenizer = make_tokenizer(CHATML + ASKS + "{# <tool_call> #}")
    tokenizer.add_tokens(["<tool_call>"])
    renderer = Renderer(tokenizer, TextConfig())
    assert renderer.calls_tools(call) and renderer.calls_tools(f"Let me look.{call}")
    for spoken_of in ("Write it between `<tool_call>` and the end.", 'The mark "<tool_call>".', f"```\n{call}\n```"):
        assert not renderer.calls_tools(spoken_of)


@pytest.mark.parametrize(
    ("mark", "calls"),
    [
        ("[TOOL_CALLS]", True),
        ("<｜tool▁calls▁begin｜>", True),
        ("<|python_tag|>", True),
        ("<|START_ACTION|>", True),
        ("<|action_start|>", True),
        ("<start_function_call>", True),
        ("<|tool_calls_section_begin|>", True),
        ("<|call|>", True),
        ("<|eom_id|>", False),
        ("[AVAILABLE_TOOLS]", False),
    ],
)
def test_calls_of_tools_are_known_in_the_marks_of_other_models(make_tokenizer: Any, mark: str, calls: bool) -> None:
    tokenizer = make_tokenizer(CHATML + ASKS)
    tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
    assert Renderer(tokenizer, TextConfig()).calls_tools(f'{mark}{{"name": "f"}}') == calls


def test_what_is_not_a_prompt_is_refused(renderer: Renderer) -> None:
    for messages in ([], answer("a"), [{"role": "tool", "content": "x"}], [{"role": "user", "content": None}]):
        with pytest.raises(RenderError):
            renderer.prompt_ids(messages)


def test_the_hash_depends_on_every_id(renderer: Renderer) -> None:
    pairs = [renderer.pair_ids(USER, answer(c), answer(r)) for c, r in (("a", "b"), ("b", "a"), ("a", "c"))]
    assert len({pair.hash() for pair in pairs}) == 3
    assert pairs[0].hash() == renderer.pair_ids(USER, answer("a"), answer("b")).hash()


def test_loading_names_what_is_missing(tmp_path: Path, tiny_model: Path) -> None:
    assert load_renderer(ModelRef("tiny", tiny_model, ""), TextConfig()).prompt_ids(USER)
    with pytest.raises(UserError, match="tokenizer of broken"):
        load_renderer(ModelRef("broken", tmp_path, ""), TextConfig())
    with pytest.raises(UserError, match=r"text\.chat_template"):
        load_renderer(ModelRef("tiny", tiny_model, ""), TextConfig(chat_template=str(tmp_path / "none.jinja")))


@pytest.mark.parametrize("name", STRINGS)
def test_no_text_in_any_role_is_a_control_token(renderer: Renderer, name: str) -> None:
    text = clean(STRINGS[name]) or "."
    for role in ("system", "user", "assistant"):

        def talk(content: str, role: str = role) -> list[int]:
            rest = [{"role": "user", "content": "hello"}, answer("yes")[0], {"role": "user", "content": "go on"}]
            turn = {"system": [{"role": "system", "content": content}, *rest],
                    "user": [*rest[:2], {"role": "user", "content": content}],
                    "assistant": [rest[0], answer(content)[0], rest[2]]}[role]  # fmt: skip
            return renderer.prompt_ids(turn)

        calm, ids = talk("calm"), talk(text)
        assert Counter(i for i in ids if i in renderer._control_ids) == Counter(
            i for i in calm if i in renderer._control_ids
        )
    calm = renderer.prompt_ids(USER, "calm")
    ids = renderer.prompt_ids(USER, text)
    controls = renderer._control_ids
    assert Counter(i for i in ids if i in controls) == Counter(i for i in calm if i in controls)
    pair = renderer.pair_ids(USER, answer(text), answer("calm"))
    assert [i for i in pair.chosen if i in controls] == [i for i in pair.rejected if i in controls]


def test_a_megabyte_is_rendered_and_not_a_hang(renderer: Renderer) -> None:
    mark = renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn)
    for text in ("x" * 2**20, mark * 2000, "<|im_" * 2000 + "end|>" * 2000):
        ids = renderer.prompt_ids([{"role": "user", "content": text}])
        assert ids.count(renderer.end_of_turn) <= 2 and len(ids) > 1000
