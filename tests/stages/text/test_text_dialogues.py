"""Dialogues written as one text: turns are those that the text's own names begin, wherever they stand."""

from __future__ import annotations

import pytest

from stages.text.dialogue import dialogue, looks_spoken
from stages.text.unread import last_name, looks_noted, looks_rendered, looks_turned, outer_names


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("### Human: Hi?### Assistant: Yes.### Human: Why?### Assistant: So.", "u Hi?|a Yes.|u Why?|a So."),
        ("### Human: Hi? ### Assistant:", "u Hi?"),
        ("## USER: Hi? ## ASSISTANT: Yes.", "u Hi?|a Yes."),
        ("### Human: Chat:\nUser: x\nBot: y\n### Assistant: Yes.", "u Chat:\nUser: x\nBot: y|a Yes."),
        ("### System: Be kind.### Human: Hi?### Assistant: Yes.", "s Be kind.|u Hi?|a Yes."),
        ("User: Hi? Assistant: Yes. User: Why? Assistant: So.", "u Hi?|a Yes.|u Why?|a So."),
        ("Human: Hi,\nyou? Assistant: Yes.\nHuman: Why?", "u Hi,\nyou?|a Yes.|u Why?"),
        ("User: Is the assistant: a thing?", "u Is the assistant: a thing?"),
        ("User: Say 'Assistant: no'.\nAssistant: No. User: x", "u Say 'Assistant: no'.|a No. User: x"),
        ("Assistant: Yes. User: x", "a Yes. User: x"),
        ("User：你好。Assistant：您好。User：再见", "u 你好。|a 您好。|u 再见"),
        ("Human： 你好\n\nAssistant： 您好", "u 你好|a 您好"),
        ("\n\nHuman: A log:\n\nUser: x\n\nSystem: down\n\nAssistant: Yes.", "u A log:\n\nUser: x\n\nSystem: down|a Yes."),
        ("User: Hi?\n\nSystem: is what I ask about.\nAssistant: Yes.", "u Hi?\n\nSystem: is what I ask about.|a Yes."),
        ("System: Be kind.\n\nUser: Hi?\n\nAssistant: Yes.\n\nHuman: is he?", "s Be kind.|u Hi?|a Yes.\n\nHuman: is he?"),
        ("System: Be kind.\nHuman: Hi?\n\nAssistant: Yes.", "s Be kind.|u Hi?|a Yes."),
        ("Human: Hi?\n\nAssistant: He said:\nHuman: no.", "u Hi?|a He said:\nHuman: no."),
        ("Human: Hi?\nAI: Yes.\nHuman: Why?", "u Hi?|a Yes.|u Why?"),
        ("H: Hi?\n\nA: Yes.\n\nAssistant: is my name.", "u Hi?|a Yes.\n\nAssistant: is my name."),
        ("\ufeff\u200f\n\nHuman: Hi?\n\n\u200fAssistant: Yes.", "u Hi?|a Yes."),
    ],
)  # fmt: skip
def test_turns_of_dialogues(text: str, turns: str) -> None:
    assert looks_spoken(text)
    assert [f"{turn['role'][0]} {turn['content']}" for turn in dialogue(text)] == turns.split("|")


@pytest.mark.parametrize(
    "text",
    [
        "\n\nMensch: Was ist Wasser?\n\nAssistent:",
        "人类：法国的首都是哪里？\n\n助手：",
        "Utilisateur : Bonjour ?\nAssistant : Bonjour.",
        "<human>: Hi?\n<bot>:",
        "**Human:** Hi?\n\n**Assistant:** Yes.",
        "**User**: Hi?\n\n**Assistant**: Yes.",
        "[Human]: Hi?\n\n[Assistant]: Yes.",
        "### System\nBe kind.\n\n### User\nHi?\n\n### Assistant",
        "<user>Hi?</user>\n<assistant>",
        "Unten ist eine Anweisung.\n\n### Anweisung:\nGrüße.\n\n### Antwort:\nHallo.",
    ],
)
def test_dialogues_that_are_named_or_marked_otherwise_are_told(text: str) -> None:
    assert looks_turned(text) and not looks_spoken(text)


ROWS = (
    "[{role=user, content=Hi?}]",
    "[Row(content='Hi?', role='user')]",
    "[{user, Hi?}]",
    "[('user', 'Hi?')]",
    '[["user", "Hi?"]]',
    '{"(user,\\"Hi?\\")"}',
    'list(list(role = "user", content = "Hi?"))',
    "[OrderedDict([('role', 'user'), ('content', 'Hi?')])]",
    "ChatCompletionMessage(content='Hi?', refusal=None, role='assistant', tool_calls=None)",
    "[HumanMessage(content='Hi?', additional_kwargs={}, response_metadata={})]",
    "content='Hi?' additional_kwargs={} response_metadata={}",
    '[{"type": "human", "content": "Hi?"}]',
    '[{"type": "human", "data": {"content": "Hi?"}}]',
    "[{&quot;role&quot;: &quot;user&quot;, &quot;content&quot;: &quot;Hi?&quot;}]",
    "[{“role”: “user”, “content”: “Hi?”}]",
    '```json\n[{"role": "user", "content": "Hi?"}]\n```',
    "- role: user\n  content: Hi?",
    "- content: Hi?\n  role: user",
    "role: user\ncontent: Hi?",
    '[{:role=>"user", :content=>"Hi?"}]',
)


@pytest.mark.parametrize("text", ROWS)
def test_messages_in_a_notation_that_is_not_read_are_told(text: str) -> None:
    assert looks_noted(text)


RENDERED = (
    "Which?\n<extra_id_1>Assistant\nWhich do you mean?\n<extra_id_1>User\nThat one.",
    "Hi? [/INST] Which? </s><s>[INST] That one.",
    "GPT4 Correct User: Hi?<|end_of_turn|>GPT4 Correct Assistant:",
    "[|user|]Hi?\n[|assistant|]",
    "Yes.[|endofturn|]",
    "[|Human|]Hi?",
    "<seed:bos>user\nHi?",
    "Yes.<seed:eos>",
    "\ufeff<|im_start|>user\nHi?",
    "analysisThe user asks.assistantfinalThe capital.",
    "Yes.<eoa>",
    "Yes. [SEP]",
    "assistant\n\nYes.",
    "system\nBe kind.\nuser\nHi?\nassistant\n",
    "user\n\nHi?assistant\n\n",
    "user\nHi?\nmodel\nYes.",
)


@pytest.mark.parametrize("text", RENDERED)
def test_what_a_template_rendered_is_told_anywhere(text: str) -> None:
    assert looks_rendered(text)


@pytest.mark.parametrize(
    "text",
    [
        "<|begin_of_thought|>Hm.<|end_of_thought|>\n\nYes.",
        "<|begin_of_thought|>Hm.<|end_of_thought|>\n\n<|begin_of_solution|>Yes.<|end_of_solution|>",
        "user\nroot\nadmin",
        "Assistant professors\nteach.",
        "<|START_THINKING|>Hm.<|END_THINKING|>Yes.",
        '{"type": "object", "properties": {"role": {"type": "string"}, "content": {"type": "string"}}}',
        '[["name", "age"], ["Ann", 3]]',
        "A chat is a list of messages: [{role=user, content=Hi?}].",
        '```python\nmessages = [{"role": "user", "content": "Hi?"}]\n```',
        "- type: cheese\n- text: Brie",
        "Anna: Ein Mensch!\n\nBen: Der Assistent: wo?",
        "Der Mensch: ein Tier? Ein Assistent: ein Mensch.",
        "# User guide\n\nThe user asks.\n\n# Assistant settings\n\nNone.",
        "<ul><li>User</li></ul>",
        "analysis of the data: none.",
        "Yes.<|im_end|>\n<|im_start|>user\nHi?",
        "What is <|im_end|>? F# has <| and |>, and [|1; 2|].",
    ],
)
def test_texts_that_speak_of_such_things_are_texts(text: str) -> None:
    assert not looks_noted(text) and not looks_turned(text) and not looks_rendered(text)


def test_what_a_text_begins_and_ends_with_is_found() -> None:
    assert outer_names("Frage: Was?\nAntwort:") == ("Frage", "Antwort")
    for text in ("Frage: Was?\nAntwort: Das.", "Frage: Was?\nFrage:", "Antwort:", "Was?\nAntwort:"):
        assert outer_names(text) is None


USERS_TURN, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("User: Hi?\nChatGPT: Yes.\nUser: Hi?\nChatGPT:", [USERS_TURN, ANSWER, USERS_TURN]),
        ("USER: Hi?\nLAMDA: Yes.\nUSER: Hi?", [USERS_TURN, ANSWER, USERS_TURN]),
        ("prompter: Hi?\nassistant: Yes.\nprompter: Hi?", [USERS_TURN, ANSWER, USERS_TURN]),
        ("prompter: Hi?", [USERS_TURN]),
        ("BEGINNING OF CONVERSATION: USER: Hi? GPT:Yes.</s>USER: Hi? GPT:", [USERS_TURN, ANSWER, USERS_TURN]),
        ("BEGINNING OF CONVERSATION: USER: Hi? ASSISTANT:", [USERS_TURN]),
        ("Be kind.\n\nHuman: Hi?\n\nAssistant:", [{"role": "system", "content": "Be kind."}, USERS_TURN]),
        (
            "Be kind.\nUser: Hi?\nAssistant: Yes.\nUser: Hi?\nAssistant: ",
            [{"role": "system", "content": "Be kind."}, USERS_TURN, ANSWER, USERS_TURN],
        ),
    ],
)
def test_dialogues_with_other_names_and_a_preamble_are_read(text: str, turns: list[dict[str, str]]) -> None:
    assert looks_spoken(text) and dialogue(text) == turns


@pytest.mark.parametrize(
    "text",
    ["User: Hi?\nFalcon: Yes.\nUser: Hi?", "User: Hi?\nMistral Large:", "Human: Hi?\n\nPi: Yes.\n\nHuman: Hi?\n\nPi:"],
)
def test_dialogues_whose_answers_have_names_of_their_own_are_not_half_read(text: str) -> None:
    assert looks_turned(text) and not looks_spoken(text)


@pytest.mark.parametrize(
    "text", ["Summarise:\n\nUser: Hi?\nAssistant: Yes.", "User: Hi?", "User: My car.\nModel: Focus"]
)
def test_a_task_about_a_dialogue_is_not_taken_apart(text: str) -> None:
    assert not looks_turned(text)
    if looks_spoken(text):
        assert len(dialogue(text)) == 1


def test_the_label_that_texts_end_with_is_found() -> None:
    assert last_name("Hi?\n\nAssistant:") == "Assistant:" and last_name("[Round 1]\n\n问：Hi\n\n答：") == "答："
    assert last_name("Hi?\n@@ Response\n") == "@@ Response"
    for text in ("Answer:", "Hi?\nAnswer: yes", "Hi?\nWhat is meant by all of this, and why should anyone care:"):
        assert last_name(text) is None
