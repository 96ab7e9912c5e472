"""Every reason code a dropped row can carry: who gives it, what it means, what to change. docs/tables.md is made from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """A reason code's line in docs/tables.md; names in backticks are config keys, or tables that `inspect` reads.

    where: `stages: units` of the rows, several joined by `; `. failed: an error (execution.max_failed_fraction), not a rule.
    """

    where: str
    meaning: str
    change: str
    failed: bool = False


OFF_TOPIC = "off_topic"
"""Of pairs that the relevance gate holds back: the reason in rejected, and the flag in scores."""

# fmt: off
REASONS: dict[str, Reason] = {
    # rows of sources, as they are read
    "empty": Reason("prompts, sft, pairs, evaluate: row; pairs: candidate", "there is no text, or only invisible characters; pairs: nothing after the prompt", "the data, or the source's `fields`; candidates: `generate.sampling`"),
    "not_text": Reason("prompts, sft, pairs, evaluate: row", "something else than a text or a list of text messages, for example an image; or a text with leftovers of another encoding, or with a key twice in its JSON", "the data, or the source's `fields`"),
    "tool_calls": Reason("prompts, sft, pairs, evaluate: row", "the conversation calls tools, which is not supported", "the data"),
    "unknown_role": Reason("prompts, sft, pairs, evaluate: row", "a message's role is none that is known (docs/data.md)", "the data"),
    "no_user_turn": Reason("prompts, sft, pairs, evaluate: row", "the prompt does not end in a user turn; sft: or an answer comes before any", "the data"),
    "no_prompt": Reason("pairs, evaluate: row", "no prompt is given, and chosen and rejected are no conversations that begin alike", "`fields.prompt`, or the data"),
    "prompt_differs": Reason("pairs, evaluate: row", "chosen and rejected are whole conversations, and the prompt is neither what they begin with nor ends in it", "`fields.prompt`, or the data"),
    "several_answers": Reason("sft, pairs, evaluate: row", "where one assistant message is expected there are several, or another role; sft: or none", "the data"),
    "no_conversation": Reason("sft: row", "there are neither messages nor a completion", "`sft.sources[].fields`, or the data"),
    "no_answer": Reason("sft: row", "the conversation does not end in an answer", "the data"),
    "left_out": Reason("sft: row", "the data leaves every answer of the conversation out of what is learnt (weight 0, train: false, loss: false)", "the data"),
    # language
    "invalid_language": Reason("prompts, pairs, evaluate: row", "its language is no BCP 47 code and no language's name (in English or in itself)", "`fields.language`, or the data"),
    "language_not_in_run": Reason("prompts, pairs, evaluate: row", "its language stands for none, or for more than one, of the run's", "`languages.seen`, `languages.unseen`"),
    "no_language": Reason("prompts, pairs, evaluate: row", "no column says its language, the run has several, and it is not identified: `languages.identify` is off, or the text is only digits, code or the like", "`fields.language`, the source's `language`, or `languages.identify`"),
    "low_confidence": Reason("prompts, pairs, evaluate: row", "no column says its language, the run has several, and the identifier is less sure than `languages.min_confidence`", "`fields.language`, the source's `language`, `languages.min_confidence`"),
    "wrong_language": Reason("prompts, pairs, evaluate: row; pairs: candidate", "rows: the identifier is sure that neither prompt nor answer is in the language of the label; candidates: identified as another language than the prompt's", "rows: `fields.language`, or `languages.min_confidence: 0`, with which labels always win; candidates: `generate.sampling.system_prompt`, `languages.min_confidence`; both: `languages.identify`"),
    # length and duplicates
    "too_short": Reason("prompts: row", "fewer characters than `prompts.min_chars`", "`prompts.min_chars`"),
    "too_long": Reason("prompts, sft: row; pairs: prompt, row; aggregate, gradients, evaluate: pair", "prompts: more characters than `prompts.max_chars`; elsewhere: more tokens than `text.max_length`, or so many characters that it must be", "`prompts.max_chars`; `text.max_length`"),
    "duplicate": Reason("prompts, pairs, evaluate: row", "an earlier row of the language, named in detail, has the same text", "the data"),
    "near_duplicate": Reason("prompts: row", "an earlier prompt of the language, named in detail, is nearly the same", "`prompts.near_duplicate_threshold`"),
    # what may be evaluated
    "translation_of_training": Reason("prompts: row; evaluate: prompt, pair", "held out, but its translation group is trained on", "`fields.group_id`, or hold out the whole group with `fields.split`"),
    "in_training": Reason("evaluate: prompt, pair", "held out or authored, but the same prompt is trained on", "the data: take the prompt out of one of the two"),
    "not_sampled": Reason("evaluate: prompt, pair, question", "beyond the number that is evaluated", "`evaluate.prompts_per_language`, `evaluate.pairs_per_language`, `evaluate.benchmarks.limit`"),
    # tokens and engines
    "cannot_render": Reason("generate, evaluate: prompt; judge: candidate; evaluate: comparison; sft: row; pairs: prompt, row; aggregate, gradients, evaluate: pair", "the chat template does not take the conversation; detail has why", "`text.chat_template`, `text.system_role`, or the data", failed=True),
    "engine_error": Reason("generate, evaluate: prompt; judge: candidate; evaluate: comparison", "the engine gave no answer; detail has its error", "what detail names; `execution.max_tries`", failed=True),
    "prompt_too_long": Reason("generate, evaluate: prompt", "prompt and `sampling.max_tokens` exceed `text.max_length`, or in generate the model's context", "`text.max_length`, `generate.sampling.max_tokens`, `evaluate.sampling.max_tokens`"),
    "held_out_frozen": Reason("generate: prompt", "held out: rounds after the first answer the train split only", "nothing"),
    # judge
    "too_long_for_judge": Reason("judge: candidate; evaluate: comparison", "what the judge reads (rubric, prompt and answer, or both answers) exceeds its context: `text.max_length` + 2048 tokens, at most what the model was made for; or `judge.max_length`", "`text.max_length`, `generate.sampling.max_tokens`, `judge.sampling.max_tokens` (additive), `judge.max_length`, `model.judge`"),
    "low_mass": Reason("judge: candidate", "the judge's probability on its possible replies (the scores 0 to 5, or A and B) is less than `judge.min_mass`", "`judge.min_mass`, `judge.rubric`, `model.judge`, `judge.method: additive`"),
    "no_opponent": Reason("judge: candidate", "judge.method pairwise: there is no other candidate of its prompt to compare it with", "`generate.candidates`"),
    "no_english_prompt": Reason("judge: candidate", "judge.cross_lingual: its translation group has no prompt in English", "`prompts.sources` (group_id), `judge.cross_lingual`"),
    "unparseable": Reason("judge: candidate", "judge.method additive: not one vote ends in a score", "`judge.sampling.max_tokens`, `judge.votes`, `model.judge`, `judge.method: expected_score`"),
    # pairs
    "truncated": Reason("pairs: candidate", "the answer was cut at max_tokens", "`generate.sampling.max_tokens`, `pairs.drop_truncated`"),
    "unjudged": Reason("pairs: candidate", "the judge gave it no score; `dropped/judgements` has why", "what that reason says"),
    "thought": Reason("pairs: candidate, row; sft: row", "an answer begins with a thought, and `text.thoughts` is drop", "`text.thoughts`"),
    "broken_thought": Reason("pairs: candidate, row; sft: row", "an answer has marks of a thought that is not one whole thought before what it says: the chat template would cut it up", "the data; `generate.sampling.max_tokens` where thoughts are cut off"),
    "too_few_candidates": Reason("pairs: prompt, row", "fewer than two usable answers, own pairs: with a score; `dropped/pairs` has why the others left", "`generate.candidates`, or what those reasons say; own pairs: `fields.completion_score`"),
    "rated_below": Reason("pairs: row", "the data rates chosen below rejected", "the data, or `fields.chosen_score`, `fields.rejected_score`: leave them out to ignore the ratings"),
    "identical": Reason("pairs: prompt, row; evaluate: row; aggregate, gradients: pair", "the answers are the same text (characters that nobody sees left out; of generated ones case and white space too), or the same tokens", "`generate.sampling.temperature`, `generate.candidates`; own pairs: the data"),
    "tie": Reason("pairs: prompt, row", "the scores of best and worst answer (own pairs: of chosen and rejected) differ by less than `pairs.min_margin`; generated pairs: or not at all", "`pairs.min_margin`, `generate.candidates`, `judge.votes` (additive)"),
    "repetitive": Reason("pairs: candidate", "a larger share of its runs of 16 characters than `pairs.max_repetition` occurred in it before", "`pairs.max_repetition`, `generate.sampling`"),
    "refusal": Reason("pairs: candidate, row", "`pairs.drop_refusals` is on, and a phrase of refusal stands in its first two sentences (it is in detail); own pairs: one of the two answers does", "`pairs.drop_refusals`"),
    "disagreement": Reason("pairs: prompt", "judge.combine agree: not every judge of the panel prefers chosen", "`judge.combine: mean`, the judges of `judge.panel`"),
    "prompt_missing": Reason("pairs: prompt", "its candidates are there, but it is not in the prompts table", "the tables: prompts and candidates must belong together", failed=True),
    # gradients
    "non_finite_gradient": Reason("aggregate, gradients: pair", "the backward pass gave values that are not finite, or too large to store", "`model.dtype: float32`, or the model", failed=True),
    "zero_gradient": Reason("aggregate, gradients: pair", "no sketched layer gets a gradient from the pair: both answers are certain, or its numbers underflow", "`model.dtype: float32`, or sketch more layers"),
    "out_of_memory": Reason("aggregate, gradients, evaluate: pair", "the pair does not fit in memory, even alone", "`text.max_length`, or a larger device", failed=True),
    "not_aggregated": Reason("gradients: pair", "one_sided: it failed in the first pass; `dropped/contributions` has why", "what that reason says", failed=True),
    # select and after
    "no_score": Reason("select: pair", "no conflict score (no gradient: `dropped/gradients`; or no direction to compare with: flags in scores), or nothing `select.by` could rank by", "what that reason says; `select.by: margin` needs judge scores"),
    "off_topic": Reason("select: pair", "no answer to its prompt: no more likely under it than answers to other prompts of the language are; it is in no direction", "`conflict.relevance`, or the data"),
    "below_cut": Reason("select: pair", "ranked below the share that is kept", "`select.keep`; the ranking: `select.by`, `select.quota`"),
    "crowded_cell": Reason("select: pair", "ranked high enough, but its cell of the gradients has given its share", "`select.diversity.share`, `select.diversity.cells`"),
    "no_objective": Reason("train: pair", "fits no condition of `train.orthalign.objectives`", "`train.orthalign.objectives[].where`"),
    "no_baseline_answer": Reason("evaluate: comparison", "the baseline has no answer to this prompt", "`evaluate.baseline.answers`"),
    "not_asked": Reason("evaluate: row", "an answer of the baseline to a prompt that is not evaluated, or of another generator", "`evaluate.prompts`, `evaluate.prompts_per_language`; `fields`, `generator` of the source"),
    "no_verdict": Reason("evaluate: comparison", "the judge's probability on the replies A and B is less than 0.1", "`model.evaluation_judge`, `judge.rubric`"),
}
# fmt: on


def explained(code: str) -> str:
    """What a code means and what to change, as plain text; empty for a code that an older version gave."""
    reason = REASONS.get(code)
    return f"{reason.meaning}. Change: {reason.change}".replace("`", "") if reason else ""
