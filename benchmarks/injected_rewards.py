"""Judges without a rubric under attack: rewards of conversations by a classifier, or by what DPO taught a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from schemas.config.model import Sampling
from stages.engines.base import Engine, Request

BETA = 0.1
METHODS = ("reward_model", "implicit_reward")


class Rewards:
    """One of `METHODS`. engines: the classifier, of several heads the first; or the DPO-trained model and its reference.

    raw: template tokens inside the texts are live; fenced, and plain: they are neutralised, which is all that the pipeline does here.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines, self._renderer = engines, engines[0].renderer

    def measure(self, defence: str, tasks: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The reward of every answer to its task, on the judge's own scale."""
        columns = []
        for engine in self._engines:
            requests = [
                self._request(number, defence, task, answer)
                for number, (task, answer) in enumerate(zip(tasks, answers, strict=True))
            ]
            found = {completion.id: completion for completion in engine.stream(iter(requests))}
            if failed := next((c.error for c in found.values() if c.finish_reason == "error"), None):
                raise RuntimeError(failed)
            columns.append([found[str(number)].values[0] for number in range(len(answers))])
        if len(columns) == 1:
            return columns[0]
        return [BETA * (own - reference) for own, reference in zip(*columns, strict=True)]

    def _request(self, number: int, defence: str, task: str, answer: str) -> Request:
        asked = [{"role": "user", "content": task}]
        said = [{"role": "assistant", "content": answer}]
        more: dict[str, Any] = {"whole": True}
        if len(self._engines) == 2:
            if defence == "raw":
                prompt = self._live(asked, add_generation_prompt=True)
                more = {"target_ids": tuple(self._live([*asked, *said])[len(prompt) :])}
            else:
                ids = self._renderer.pair_ids(asked, said, said)
                prompt, more = list(ids.prompt), {"target_ids": tuple(ids.chosen)}
        else:
            prompt = self._live([*asked, *said]) if defence == "raw" else self._renderer.whole_ids([*asked, *said])
        return Request(str(number), prompt, Sampling(), seed=0, **more)

    def _live(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        """By the chat template, as if every text in it could be trusted."""
        kwargs = self._renderer.template_kwargs
        return list(
            self._renderer.tokenizer.apply_chat_template(messages, return_dict=True, **options, **kwargs)["input_ids"]
        )
