"""The model card: what was trained, on what, how, and which choices are this project's own."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.config import RunConfig
from schemas.config.loss import LossConfig
from schemas.config.training import TrainConfig
from stages.contract import ModelRef
from stages.text.markdown import escape
from stages.train.batches import BatchPlan
from stages.train.card_page import Page, card_page, common_settings, dtype_name, last_part, shown
from stages.train.seen import Seen


@dataclass(frozen=True)
class Training:
    """What the card tells of a training: from which model, against which, on what, how long."""

    base: ModelRef
    reference: ModelRef
    round: int
    seen: Seen
    plan: BatchPlan
    steps: int


def model_card(config: RunConfig, training: Training) -> str:
    """Markdown, see `card_page`; names are escaped."""
    train, loss, select = config.train, config.loss, config.select
    warm_up = f"{training.plan.warmup_steps} warm-up steps"
    reference = shown(training.reference)
    if train.way == "sequence":
        warm_up = f"anew in every objective, {train.warmup_ratio:.0%} of its steps warm up"
        if train.orthalign.reference == "objective":
            reference = f"{reference} for the first objective, then the model as each objective starts"
    if train.allo.on and train.allo.forget and train.allo.learn:
        each = " in each objective" if train.way == "sequence" else ""
        reference = f"the model as forgetting left it{each}"
    settings = {
        **common_settings(train, _optimizer(train), warm_up),
        "optimizer steps": str(training.steps),
        **_objectives(train),
        **_allo(train),
        **_language_surgery(train),
        "loss": loss.label,
        "beta": f"{loss.beta:g}",
        "alpha (length penalty)": f"{loss.alpha:g}",
        **({"nll (weight of chosen's likelihood)": f"{loss.nll:g}"} if loss.nll else {}),
        "numbers": dtype_name(config),
        "seed": f"{config.training_seed}, round {training.round}",
    }
    judges = ", ".join(escape(name) if name else "itself" for name in config.judge_models)
    judged = "judged itself" if config.judges_itself else f"that were judged by {judges}"
    about = [
        f"{shown(training.base)}, aligned on preference pairs"
        + (" that were imported" if config.imported else f" the model generated and {judged}")
        + f". Selection: by {escape(select.by)}, share {select.keep:g} kept"
        + (" in each language." if select.quota == "language" else " overall."),
        "",
        "The loss has no reference model." if loss.reference_free else f"Reference model of the loss: {reference}.",
    ]
    method = [
        _loss_text(loss),
        "",
        *_selection_text(select.by),
        "Weights are stored in the numbers named above; adapters are merged.",
    ]
    title = f"{config.name}, round {training.round}"
    sources = [*config.sft.sources, *(config.pairs.sources if config.imported else config.prompts.sources)]
    return card_page(config, train, training.base, sources, Page(title, "dpo", about, training.seen, settings, method))


def _loss_text(loss: LossConfig) -> str:
    match loss.type:
        case "sigmoid":
            text = (
                "Loss: `-log sigmoid(beta * Delta + alpha * (tokens of chosen - tokens of rejected))`, Delta the implicit"
                " reward margin of DPO (arXiv 2305.18290); alpha = 0 is DPO. Trained with TRL's DPOTrainer."
            )
        case "simpo":
            text = (
                f"Loss: SimPO (arXiv 2405.14734), `-log sigmoid(beta * h - {loss.target:g})`, h the mean log-probability of a"
                " token of chosen less that of rejected. Trained with TRL's DPOTrainer."
            )
        case other:
            text = f"Loss: `{other}` of TRL's DPOTrainer, which names its paper."
    if loss.nll:
        text += f" To it {loss.nll:g} times chosen's negative log-likelihood per token is added (arXiv 2404.19733)."
    return text


def _optimizer(train: TrainConfig) -> str:
    if not train.merges:
        return train.optimizer
    from stages.train.optimizers.build import merge_settings

    merge = merge_settings(train)
    if not merge.active:
        return train.optimizer
    parts = [f"alpha {merge.alpha:g} ({merge.alpha_schedule})"]
    if train.merge_facts is not None and train.merge_facts.drops:
        parts += [f"preset {merge.preset}", f"reserve {merge.reserve:g}"]
    if train.merge.rescale:
        parts.append("rescaled to the L1 norm before")
    return ", ".join([train.optimizer, *parts, *([f"every {merge.every} steps"] if merge.every > 1 else [])])


def _objectives(train: TrainConfig) -> dict[str, str]:
    sequence = train.orthalign
    if not sequence.objectives:
        return {}
    found = (
        f"{sequence.energy:.0%} of a change's energy" if sequence.rank == "energy" else "ranks searched on dev pairs"
    )
    return {
        "objectives, in order": ", ".join(objective.name for objective in sequence.objectives),
        "kept apart (OrthAlign, arXiv 2509.24610)": f"{sequence.side} subspaces, {found}, at most {sequence.q_max} directions",
        **(
            {"trust region": f"spectral norm of a matrix's change in an objective at most {sequence.trust_radius:g}"}
            if sequence.trust_radius
            else {}
        ),
    }


def _language_surgery(train: TrainConfig) -> dict[str, str]:
    if train.language_surgery == "none":
        return {}
    return {"languages' gradients": f"resolved at every step, adapter by adapter, by {train.language_surgery}"}


def _allo(train: TrainConfig) -> dict[str, str]:
    allo = train.allo
    if not allo.on:
        return {}
    source = "changed most in a warm-up" if allo.mask == "warmup" else "with the largest summed gradients"
    phases = {}
    if allo.needs_rewards:
        by = (
            f"{allo.token_reward} by {last_part(allo.reward_model)}"
            if allo.reward_model
            else "implicit, after the warm-up"
        )
        phases["rewards of tokens"] = f"{by}, beta {allo.beta:g}"
    if allo.forget:
        rate = train.learning_rate if allo.forget_learning_rate is None else allo.forget_learning_rate
        length = f"{allo.forget_max_steps} steps" if allo.forget_max_steps > 0 else f"{allo.forget_epochs:g} epochs"
        phases["forgetting"] = (
            f"token-level NPO on {allo.forget_ratio:g} of the {allo.unit}s, beta {allo.beta:g}, learning rate {rate:g}, {length}"
        )
    if allo.learn:
        phases["learning"] = (
            f"{allo.key_fraction:g} of the rejected tokens, on {allo.learn_ratio:g} of the {allo.unit}s"
        )
    return {"trained (ALLO, arXiv 2406.12606)": f"the {allo.unit}s {source} over {allo.warmup_steps} steps", **phases}


def _selection_text(by: str) -> list[str]:
    if by != "conflict":
        return []
    return [
        "Selection follows ConGrad (arXiv 2503.23777): pairs whose DPO gradient agrees with the direction merged over"
        " languages by PCGrad (arXiv 2001.06782). ConGrad's code was not released: the share kept, the compression of"
        " the gradients, how a language's direction is averaged, the similarity measure and the judge's prompt are"
        " choices of this project, not of the paper.",
        "",
    ]
