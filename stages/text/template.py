"""Chat templates: the tokenizer's own, the user's, or a default; always without today's date in it."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

from schemas.config.model import TextConfig
from schemas.errors import UserError

PINNED_DATE = date(2024, 7, 26)
"""What templates that ask for today's date get (Llama 3's own fallback): equal ids on every day of a run."""

_CHATML = """\
{{- BOS -}}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}{{ END + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_STRFTIME = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def install_template(tokenizer: Any, text: TextConfig) -> list[str]:
    """Give the tokenizer the template that the run uses; returns notes for people.

    Raises UserError when the template file cannot be read, when the tokenizer has neither a template nor an
    end-of-sequence token, or when the template's date cannot be pinned.
    """
    notes: list[str] = []
    if text.chat_template is not None:
        try:
            tokenizer.chat_template = Path(text.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"The chat template {text.chat_template} cannot be read: {error}",
                where="text.chat_template",
                fix="Give the path of a Jinja file, or leave the field out to use the tokenizer's own template.",
            ) from error
    elif not tokenizer.chat_template:
        tokenizer.chat_template = _default_template(tokenizer)
        notes.append(
            "the tokenizer has no chat template: using a default ChatML one (set text.chat_template to choose)"
        )
    elif isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default") or next(iter(tokenizer.chat_template.values()))
    pinned = _STRFTIME.sub(lambda m: repr(PINNED_DATE.strftime(m.group(2))), tokenizer.chat_template)
    if pinned != tokenizer.chat_template:
        notes.append(f"the chat template inserts today's date: pinned to {PINNED_DATE.isoformat()}")
    if "strftime_now(" in pinned:
        raise UserError(
            "The chat template inserts today's date in a way that cannot be pinned",
            where="text.chat_template",
            fix="Give a template with a fixed date, so that token ids are the same on every day.",
        )
    tokenizer.chat_template = pinned
    return notes


def _default_template(tokenizer: Any) -> str:
    if "<|im_end|>" in tokenizer.get_added_vocab():
        end = "'<|im_end|>'"
    elif tokenizer.eos_token:
        end = "eos_token"
    else:
        raise UserError(
            "The tokenizer has neither a chat template nor an end-of-sequence token",
            where="model.policy",
            fix="Give a template in text.chat_template and a model whose tokenizer has an eos_token.",
        )
    starts_with_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return _CHATML.replace("BOS", "bos_token" if starts_with_bos else "''").replace("END", end)
