"""Messages to token ids: the one place that renders and tokenises, for every stage (docs/methods.md section 0).

Engines get these ids, gradients and training use the same: a pair is tokenised as TRL 1.16's DPOTrainer tokenises the
stored conversational row (prompt / completion split at their common token prefix), less what the template puts
after the end-of-turn token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from schemas.config.model import TextConfig
from schemas.errors import UserError, first_line, foreign
from schemas.ids import content_id
from stages.contract import ModelRef
from stages.text.messages import Messages
from stages.text.neutralise import Neutraliser, control_marks
from stages.text.template import install_template
from stages.text.thoughts import Policy, Thoughts


class RenderError(UserError):
    """This conversation cannot be rendered: a fault of the row, not of the run."""


@dataclass(frozen=True)
class PairIds:
    """Token ids of a preference pair; a completion ends in its end-of-turn token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def hash(self) -> str:
        """Content hash of the three: gradients store it, training verifies it."""
        return content_id(self.prompt, self.chosen, self.rejected)


@dataclass(frozen=True)
class ConversationIds:
    """Token ids of a conversation through its last end-of-turn token. learnt: which belong to an answer that is learnt.

    context_only: answers that are not learnt, because the template renders them differently once the conversation goes on.
    """

    ids: list[int]
    learnt: list[bool]
    context_only: int


def load_renderer(model: ModelRef, text: TextConfig, trust_remote_code: bool = False) -> Renderer:
    """The renderer of a model's tokenizer and the run's text settings.

    Raises UserError if the tokenizer cannot be loaded, or its template is unusable (see `Renderer`).
    """
    return Renderer(load_tokenizer(model, trust_remote_code), text)


def load_tokenizer(model: ModelRef, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model's folder. Raises UserError."""
    from transformers import AutoTokenizer

    if model.path is None:
        raise UserError(
            f"There is no tokenizer for {model.name} on this machine",
            where="model",
            fix="Give a hub id or a folder with the tokenizer of the served model: prompts are sent as token ids.",
        )
    with foreign(
        lambda error: UserError(
            f"The tokenizer of {model.name} cannot be loaded: {first_line(error)}",
            where=str(model.path),
            fix="The folder needs tokenizer.json and tokenizer_config.json, as save_pretrained writes them.",
        )
    ):
        return AutoTokenizer.from_pretrained(
            str(model.path), trust_remote_code=trust_remote_code, local_files_only=True
        )


_CALL = re.compile(r"toolcall|functioncall|pythontag|startaction|actionstart|^(?:call|plugin)$", re.IGNORECASE)
"""The letters of a mark that begins a call of a tool: <tool_call>, <｜tool▁calls▁begin｜>, <|python_tag|>, <|START_ACTION|>, <|call|>."""
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)


class Renderer:
    """Renders conversations with the run's chat template and tokenises them.

    tokenizer: with the template that is used (dates pinned): hand it to TRL. notes: for people; notes_on_learning: on what is learnt of answers.
    end_of_turn: id that ends an answer. stop_ids: ids at which an engine must stop.
    Raises UserError when the tokenizer is not a fast one, or its template has no end-of-turn token.
    """

    def __init__(self, tokenizer: Any, text: TextConfig) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer, without character offsets",
                where="model.policy",
                fix="Use a model folder that has a tokenizer.json.",
            )
        self.tokenizer = tokenizer
        self.template_kwargs: dict[str, Any] = dict(text.chat_template_kwargs)
        self.notes: list[str] = install_template(tokenizer, text)
        marks, self._control_ids = control_marks(tokenizer, tokenizer.chat_template)
        self.thoughts = Thoughts(tokenizer.chat_template)
        declared = self.thoughts.declared
        others = [mark for mark in marks if mark not in declared]
        self.neutralise = Neutraliser(tokenizer, [*sorted(declared, key=len, reverse=True), *others], self._control_ids)
        self._hidden_ids = self._control_ids - {tokenizer.convert_tokens_to_ids(mark) for mark in declared & set(marks)}
        self._but_thoughts = Neutraliser(tokenizer, others, self._hidden_ids)
        self._system_role, self._max_length = text.system_role, text.max_length
        self.has_system_role = self._takes_system()
        if not self.has_system_role:
            action = "folded into the first user turn" if text.system_role == "fold" else "refused"
            self.notes.append(f"the chat template has no system role: system messages are {action}")
        self.notes_on_learning: list[str] = list(self._look(keeps_thoughts=text.thoughts == "keep"))
        self.end_of_turn = self._find_end_of_turn()
        self.stop_ids: tuple[int, ...] = tuple(
            sorted({self.end_of_turn, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
        )

    @cached_property
    def keeps_thoughts(self) -> bool:
        """Whether the template renders the thought of a last answer (DeepSeek-R1's leaves it out)."""
        thought = "thought probe 7319"
        answer = f"<think>\n{thought}\n</think>\n\nanswer"
        ids = self._apply([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])
        return thought in self.tokenizer.decode(ids)

    @cached_property
    def longest_text(self) -> int:
        """Characters of which a text has too many tokens for text.max_length, whatever they are."""
        return self._max_length * max(len(token) for token in self.tokenizer.get_vocab())

    def neutral_answer(self, text: str) -> tuple[str, int]:
        """`neutralise` for what a model said: the marks of a thought before the answer stay marks.

        So do those that stand elsewhere: `Thoughts.target` refuses them, nothing rewrites them.
        """
        found = self.thoughts.split(text)
        if not found.intact:
            return self._but_thoughts(text)
        if found.thought is None:
            return self.neutralise(text)
        (thought, in_thought), (said, in_said) = self.neutralise(found.thought), self.neutralise(found.said)
        return f"{found.opening}{thought}{found.closing}{said}", in_thought + in_said

    def calls_tools(self, text: str) -> bool:
        """Whether an answer calls a tool in marks of this model (<tool_call>): neutralised, it would be learnt as something else. A mark in code
        or in quotation marks is spoken of."""
        calls = [mark for mark in self.neutralise.marks_in(text) if _CALL.search(re.sub(r"[\W_]", "", mark))]
        said = _CODE.sub("", text) if calls else ""
        return any(re.search(rf"(?<![\"'“‘«]){re.escape(mark)}|{re.escape(mark)}(?![\"'”’»])", said) for mark in calls)

    def prepare(
        self, messages: Iterable[Mapping[str, str]], system_prompt: str | None = None, answers: bool = False
    ) -> Messages:
        """The conversation as it is rendered and stored: system prompt added, folded if need be, neutralised.

        Thoughts of the assistant's turns are left out, as thinking templates do with those of earlier turns; answers: the
        assistant's turns are what is learnt, their thoughts stay.

        Idempotent. A system prompt is not put before a conversation that brings its own system message.
        Raises RenderError on roles other than system, user and assistant, or a system message that is refused.
        """
        prepared: Messages = []
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise RenderError(
                    f"A message has role {role!r} and content of type {type(content).__name__}",
                    fix="Messages are text with role system, user or assistant; tool calls are not supported.",
                )
            if role == "assistant" and (found := self.thoughts.split(content)).thought is not None:
                content = self.neutral_answer(content)[0] if answers else self.neutralise(found.said.strip())[0]
            else:
                content = self.neutralise(content)[0]
            prepared.append({"role": role, "content": content})
        if system_prompt and not (prepared and prepared[0]["role"] == "system"):
            prepared.insert(0, {"role": "system", "content": self.neutralise(system_prompt)[0]})
        if prepared and prepared[0]["role"] == "system" and not self.has_system_role:
            if self._system_role == "refuse":
                raise RenderError(
                    "The chat template has no system role and the conversation has a system message",
                    where="text.system_role",
                    fix="Set text.system_role: fold, or leave out the system message or system_prompt.",
                )
            system = prepared.pop(0)["content"]
            if prepared and prepared[0]["role"] == "user":
                prepared[0]["content"] = f"{system}\n\n{prepared[0]['content']}"
            else:
                prepared.insert(0, {"role": "user", "content": system})
        return prepared

    def prompt_ids(self, messages: Iterable[Mapping[str, str]], system_prompt: str | None = None) -> list[int]:
        """Ids of a conversation ending in a user turn, with the generation prompt."""
        prepared = self.prepare(messages, system_prompt)
        if not prepared or prepared[-1]["role"] != "user":
            raise RenderError("A prompt must end in a user turn", fix="Remove the last assistant message.")
        return self._apply(prepared, add_generation_prompt=True)

    def whole_ids(self, messages: Iterable[Mapping[str, str]]) -> list[int]:
        """Ids of a whole conversation, with whatever the template puts after its last turn: a reward model is read there."""
        return self._apply(self.prepare(messages, answers=True))

    def pair_ids(
        self,
        prompt: Sequence[Mapping[str, str]],
        chosen: Sequence[Mapping[str, str]],
        rejected: Sequence[Mapping[str, str]],
    ) -> PairIds:
        """Ids of a pair of conversations that share `prompt`, as TRL's DPOTrainer splits them."""
        prompt_ids = self.prompt_ids(prompt)
        start = self.prepare(prompt)
        chosen_ids = self._apply(start + self.prepare(chosen, answers=True))
        rejected_ids = self._apply(start + self.prepare(rejected, answers=True))
        split = min(_common_prefix(prompt_ids, chosen_ids), _common_prefix(prompt_ids, rejected_ids))
        return PairIds(
            prompt=prompt_ids[:split],
            chosen=self._through_end_of_turn(chosen_ids[split:]),
            rejected=self._through_end_of_turn(rejected_ids[split:]),
        )

    def conversation_ids(
        self, messages: Iterable[Mapping[str, str]], left_out: Collection[int] = ()
    ) -> ConversationIds:
        """Ids of a conversation that ends in an answer. Each answer, end of turn included, is split from what comes before it
        as `pair_ids` does; one that later turns change (templates that leave out earlier thoughts) is only context. left_out:
        answers, counted from 0, that are not learnt."""
        prepared = self.prepare(messages, answers=True)
        if not prepared or prepared[-1]["role"] != "assistant":
            raise RenderError("A conversation must end in an answer", fix="Remove the last user message.")
        ids = self._through_end_of_turn(self._apply(prepared))
        learnt, context_only = [False] * len(ids), 0
        answers = [n for n, message in enumerate(prepared) if message["role"] == "assistant"]
        for at in (at for place, at in enumerate(answers) if place not in left_out):
            answered = self._through_end_of_turn(self._apply(prepared[: at + 1]))
            start = _common_prefix(self._apply(prepared[:at], add_generation_prompt=True), answered)
            if start >= len(answered):
                raise RenderError("The rendered answer has no end-of-turn token", where="text.chat_template")
            if ids[: len(answered)] == answered:
                learnt[start : len(answered)] = [True] * (len(answered) - start)
            else:
                context_only += 1
        return ConversationIds(ids, learnt, context_only)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, control tokens left out, the marks of thoughts excepted."""
        kept = [token_id for token_id in token_ids if token_id not in self._hidden_ids]
        return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def opened_thought(self, prompt_ids: Sequence[int]) -> str:
        """The mark of a thought that the prompt ends in, so that its answer begins inside one; "" if it does not."""
        return self.thoughts.opened_by(self.tokenizer.decode(list(prompt_ids[-16:])))

    def _apply(self, messages: Messages, add_generation_prompt: bool = False) -> list[int]:
        with foreign(  # of any kind: a template is a program (ZeroDivisionError, OverflowError of a large range)
            lambda error: RenderError(
                f"The chat template refuses the conversation: {first_line(error)}",
                fix="Many templates want user and assistant turns to alternate; text.chat_template sets another one.",
            )
        ):
            encoded = self.tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                add_generation_prompt=add_generation_prompt,
                **self.template_kwargs,
            )
        return list(encoded["input_ids"])

    def _through_end_of_turn(self, ids: list[int]) -> list[int]:
        """Cut what follows the last end-of-turn token (a template's trailing newline)."""
        for position in range(len(ids) - 1, -1, -1):
            if ids[position] == self.end_of_turn:
                return ids[: position + 1]
        raise RenderError("The rendered answer has no end-of-turn token", where="text.chat_template")

    def _takes_system(self) -> bool:
        probe = "system probe 7319"
        messages = [{"role": "system", "content": probe}, {"role": "user", "content": "a"}]
        try:
            ids = self._apply(messages, add_generation_prompt=True)
        except RenderError:
            return False
        return probe in self.tokenizer.decode(ids) and self._splits_system(messages)

    def _splits_system(self, messages: Messages) -> bool:
        """A template that only knows `messages[0]` as user would print a system message as if it were the user's."""
        swapped = [{"role": "user", "content": messages[0]["content"]}, messages[1]]
        try:
            return self._apply(swapped) != self._apply(messages)
        except RenderError:
            return True

    def _look(self, keeps_thoughts: bool) -> Iterator[str]:
        """What to say of a template that leaves out what was said, or puts something between a prompt and its answer. Raises UserError where it leaves
        out the question or the answer itself."""
        earlier, answer, question = "earlier probe 4211", "answer probe 5317", "question probe 6421"
        asked = [{"role": "user", "content": question}]
        try:
            prompt = self._apply(asked, add_generation_prompt=True)
            whole = self._apply([*asked, {"role": "assistant", "content": answer}])
        except RenderError:
            return  # said of the conversations that it refuses
        if not (_search(question, self._text(prompt)) and _search(answer, self._text(whole))):
            raise UserError(
                "The chat template leaves out what a message says, or part of it",
                where="text.chat_template",
                fix="Templates of models that see images may want content in parts: text.chat_template sets another one.",
            )
        common = _common_prefix(prompt, whole)
        unlearnt = self._text(prompt[common:])
        if unlearnt.strip() and not (keeps_thoughts and self.thoughts.opened_by(unlearnt)):
            yield (
                f"the chat template asks for an answer with {unlearnt!r}, which no answer in the data begins with: "
                "answers are learnt without it, and generated after it"
            )
        told = self._text(whole[common:])
        found = _search(answer, told)
        if found is not None and (before := told[: found.start()]).strip():
            yield f"the chat template puts {before!r} before an answer and not into the prompt for one: it is learnt as part of the answer"
        try:
            turns = self._apply(
                [{"role": "user", "content": earlier}, {"role": "assistant", "content": answer}, *asked],
                add_generation_prompt=True,
            )
        except RenderError:
            return
        if not (_search(earlier, self._text(turns)) and _search(answer, self._text(turns))):
            yield "the chat template leaves out earlier turns: answers to later questions are learnt without them"

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))

    def _find_end_of_turn(self) -> int:
        """The first control token after an assistant message's content."""
        user = {"role": "user", "content": "a"}
        short = self._apply([user, {"role": "assistant", "content": "b"}])
        prompt = self._apply([user], add_generation_prompt=True)
        tail = short[_common_prefix(prompt, short) :]
        content = self.tokenizer("b", add_special_tokens=False)["input_ids"][-1:]
        after = tail[len(tail) - tail[::-1].index(content[0]) :] if content and content[0] in tail else tail
        for token_id in after:
            if token_id in self._control_ids:
                return token_id
        raise UserError(
            "The chat template puts no end-of-turn token after an answer, so nothing would teach the model to stop",
            where="text.chat_template",
            fix="Use a template that ends assistant messages with the tokenizer's end-of-turn or eos token.",
        )


def check_thoughts(renderer: Renderer, policy: Policy) -> None:
    """Raise UserError where thoughts are to be kept and the chat template leaves them out of what is learnt."""
    if policy == "keep" and not renderer.keeps_thoughts:
        raise UserError(
            "text.thoughts is keep, and the chat template leaves the thought out of an answer",
            where="text.thoughts",
            fix="Set text.thoughts: strip, or give a template that keeps thoughts (text.chat_template).",
        )


def refuse_channels(renderer: Renderer) -> None:
    """Raise UserError for a template of channels (harmony, gpt-oss): their marks are several tokens, and an answer that is decoded
    without control tokens would run thought and answer together ("analysis...assistantfinal...")."""
    if "<|channel|>" in renderer.tokenizer.chat_template and "<|channel|>" in renderer.tokenizer.get_vocab():
        raise UserError(
            "The chat template writes answers in channels (<|channel|>, as gpt-oss): what the model generates cannot be told "
            "from its thoughts by this version",
            where="model.policy",
            fix="Give pairs of your own (pairs.sources): gradients and training of such a model work; or set text.chat_template.",
        )


def _search(probe: str, text: str) -> re.Match[str] | None:
    """A probe in a text, whatever case and white space its template gives it."""
    return re.search(r"\s*".join(map(re.escape, "".join(probe.split()))), text, re.IGNORECASE)


def _common_prefix(ids: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    for token, other_token in zip(ids, other, strict=False):
        if token != other_token:
            break
        length += 1
    return length
