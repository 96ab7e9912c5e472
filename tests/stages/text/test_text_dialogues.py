"""Dialogues written as one text: turns are those that the text's own names begin, wherever they stand."""

from __future__ import annotations

import pytest

from stages.text.forms import dialogue, looks_spoken


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
    ],
)  # fmt: skip
def test_turns_of_dialogues(text: str, turns: str) -> None:
    assert looks_spoken(text)
    assert [f"{turn['role'][0]} {turn['content']}" for turn in dialogue(text)] == turns.split("|")
