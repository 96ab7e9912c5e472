"""Config of training and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from schemas.conditions import columns_named, parse_condition
from schemas.config.allo import AlloConfig
from schemas.config.base import FilePath, Section, execution, other_than, semantic
from schemas.config.trainer import TrainerConfig
from schemas.errors import UserError
from schemas.merging import MERGES, MergeFacts, OptimizerName, over_phases

_MERGING = {"train.optimizer": tuple(MERGES)}
_DROPPING = {"train.optimizer": tuple(name for name, facts in MERGES.items() if facts.drops)}
_FROM_A_BASE = {"train.optimizer": tuple(name for name, facts in MERGES.items() if not facts.anchored)}
_SEQUENCE = {"train.orthalign.objectives": other_than([])}
_PHASES = {"train.allo.mask": other_than("none")}
_CUTS = ("fsdp2", "hsdp")
_TOGETHER = ({"train.processes": other_than(1)}, {"train.nodes": other_than(1)})


class MergeConfig(Section):
    """Online merging (arXiv 2405.17931): the update of every step is merged with the task vector SFT - base."""

    base: FilePath | None = execution(
        None,
        "ondare, onties: the pretrained model the SFT model was made from: hub id, folder, embedded:NAME; with sft.sources: "
        "default model.policy",
        used_when=_FROM_A_BASE,
    )
    sft: FilePath | None = execution(None, "the SFT model; default: the policy of round 0", used_when=_MERGING)
    preset: Literal["paper", "released"] = semantic(
        "paper",
        "what the paper says, or what its released code computes (docs/methods.md section 5)",
        used_when=_DROPPING,
    )
    alpha: float | None = semantic(
        None,
        "weight of the task vector; default 1e-7 (the released script's); anchor has no default",
        used_when=_MERGING,
        ge=0,
        lt=1,
    )
    reserve: float | None = semantic(
        None, "share of entries kept; default 0.01 (the released script's)", used_when=_DROPPING, gt=0, le=1
    )
    every: int = semantic(1, "merge after so many optimizer steps", used_when=_MERGING, ge=1)
    alpha_schedule: Literal["lr", "constant"] = semantic(
        "lr", "lr: alpha shrinks with the learning rate; constant: paper and released code", used_when=_MERGING
    )
    rescale: bool = semantic(
        False,
        "released: scale what was kept back to the L1 norm before",
        used_when={".preset": "released"} | _DROPPING,
    )
    keep: Literal["device", "cpu", "disk"] = execution(
        "device",
        "where the task vector lies: the training device, main memory, or a memory-mapped file",
        used_when=_MERGING,
    )
    log_every: int = semantic(
        10,
        "optimizer steps between logged numbers of the merge and the projection; 0: never",
        used_when=(_MERGING, _SEQUENCE, _PHASES),
        ge=0,
    )


class Objective(Section):
    """One objective of a sequence: the curated pairs it trains on. The name of a criterion alone stands for its pairs."""

    name: str = semantic(description="what figures call it", min_length=1)
    where: str = semantic(description="SQL condition over the columns of pairs, as in inspect --where", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _criterion(cls, value: Any) -> Any:
        return {"name": value, "where": f"criterion = '{value}'"} if isinstance(value, str) else value

    @property
    def criterion(self) -> str | None:
        """The criterion it was written as."""
        return self.name if self.where == f"criterion = '{self.name}'" else None

    @field_validator("where")
    @classmethod
    def _readable(cls, value: str) -> str:
        """Read before any work."""
        from schemas.tables import TABLES  # loads pyarrow, which `--help` and `status` do without

        try:
            unknown = sorted(columns_named(parse_condition(value)) - set(TABLES["pairs"].schema.names))
        except UserError as error:
            raise ValueError(str(error)) from error
        if unknown:
            raise ValueError(
                f"pairs have no column {unknown[0]!r}; they have {', '.join(TABLES['pairs'].schema.names)}"
            )
        return value


class OrthAlignConfig(Section):
    """Objectives one after another, each kept out of the subspaces the earlier ones used (arXiv 2509.24610)."""

    objectives: list[Objective] = semantic(
        [],
        "in the order they are trained, each {name, where} or the name of a criterion; empty: one objective, all pairs",
    )
    side: Literal["left", "right", "both"] = semantic("left", "directions kept free: of outputs, inputs, or both")
    energy: float = semantic(
        0.95,
        "share of a change's squared norm whose directions are protected",
        used_when={".rank": "energy"},
        gt=0,
        le=1,
    )
    q_max: int = semantic(64, "most directions an objective protects in a matrix", ge=1)
    rank: Literal["energy", "search"] = semantic(
        "energy", "search: the fewest directions without which the objective's accuracy on dev pairs falls by tolerance"
    )
    tolerance: float = semantic(0.02, "search: accuracy that may be lost", used_when={".rank": "search"}, ge=0, lt=1)
    dev_pairs: int = semantic(
        200, "most dev pairs of a language that an objective is measured on, and its rank searched with", ge=1
    )
    trust_radius: float = semantic(
        0.0,
        "largest spectral norm of a matrix's change in one objective; 0: none",
        used_when={"train.method": "full"},
        ge=0,
    )
    reference: Literal["objective", "round"] = semantic(
        "objective",
        "DPO's reference: the model as the objective starts, or that of the round (train.reference)",
        used_when={"loss.type": other_than("simpo")},
    )


class TrainConfig(TrainerConfig):
    """Train stage (TRL DPOTrainer)."""

    section: ClassVar[str] = "train"
    rows: ClassVar[str] = "pairs"

    seed: int | None = semantic(
        None, "seed of training alone (order of the pairs, adapters, masks); none: the run's", ge=0, lt=1 << 63
    )
    optimizer: OptimizerName = semantic("adamw", "AdamW, or AdamW merged online with the task vector (method: full)")
    merge: MergeConfig = semantic(MergeConfig(), "settings of the online merge")
    orthalign: OrthAlignConfig = semantic(
        OrthAlignConfig(), "objectives in sequence; steps and epochs are of each", used_when=_SEQUENCE
    )
    allo: AlloConfig = semantic(
        AlloConfig(), "few weights, forgetting before learning, key tokens (method: full)", used_when=_PHASES
    )
    language_surgery: Literal["none", "pcgrad", "mgda", "cagrad", "imtl_g", "upgrad", "dualproj"] = semantic(
        "none",
        "resolve conflicts between the languages' gradients at every step, adapter by adapter (method: lora); costs as many"
        " copies of the adapter's gradient as a step has languages",
        used_when={".method": "lora"},
    )
    processes: int = execution(
        1, "processes that train together on a machine, one per GPU (docs/gpus.md); 0: one per visible GPU", ge=0
    )
    nodes: int = execution(
        1,
        "machines that train together, each with train.processes (docs/scale.md): nodes of the Ray cluster, or those that torchrun or"
        " srun started this command on; 0: all there are",
        ge=0,
    )
    sharding: Literal["auto", "fsdp2", "hsdp", "ddp"] = execution(
        "auto",
        "several processes: fsdp2 cuts weights, gradients and optimizer state over all of them; hsdp: over those of a machine, and"
        " machines hold the same; ddp: all of it in each; auto: for method full hsdp where several machines have several processes"
        " each, else fsdp2; ddp for lora, objectives in sequence and phases",
        used_when=_TOGETHER,
    )
    reference: Literal["start", "initial"] = semantic(
        "start",
        "rounds after the first: reference is the round's start or the initial policy",
        used_when={"rounds": other_than(1), "loss.type": other_than("simpo")},
    )

    @property
    def way(self) -> Literal["plain", "phases", "sequence"]:
        """How the pairs become a model: in one training, through the phases of `allo`, or objective after objective."""
        if self.orthalign.objectives:
            return "sequence"
        return "phases" if self.allo.on else "plain"

    @property
    def forgetting(self) -> TrainConfig:
        """What the phase of `allo` before learning is told."""
        allo = self.allo
        rate = self.learning_rate if allo.forget_learning_rate is None else allo.forget_learning_rate
        steps = {"epochs": allo.forget_epochs, "max_steps": allo.forget_max_steps}
        return self.model_copy(update={"learning_rate": rate, **steps})

    @property
    def parts(self) -> Mapping[str, TrainerConfig]:
        """Of `allo` the phases whose weights stay."""
        if not self.allo.on:
            return super().parts
        forgetting = {"forgetting": self.forgetting} if self.allo.forget else {}
        return forgetting | ({"learning": self} if self.allo.learn else {})

    @property
    def window(self) -> int:
        """Steps between two merges."""
        return self.merge.every

    @property
    def together(self) -> bool:
        """Whether several processes may train together."""
        return (self.processes, self.nodes) != (1, 1)

    def copies(self, machines: int, processes: int) -> int:
        """Adapters are too small to be cut; between the objectives of a sequence, and between phases, the weights are needed whole."""
        if self.method == "lora" or self.sharding == "ddp" or self.way != "plain":
            return 0
        by_machine = self.sharding == "hsdp" or (self.sharding == "auto" and machines > 1 and processes > 1)
        return machines if by_machine else 1

    @property
    def merges(self) -> bool:
        """Whether the optimizer's steps are merged with a task vector."""
        return self.merge_facts is not None

    @property
    def merge_facts(self) -> MergeFacts | None:
        """What is known of the merge rule; None: nothing is merged."""
        return MERGES.get(self.optimizer)

    @model_validator(mode="after")
    def _processes(self) -> TrainConfig:
        if self.method == "lora" and self.sharding in _CUTS:
            raise ValueError(
                f"train.sharding: {self.sharding} cuts what is trained over the processes, and of a LoRA model that is next to nothing:"
                " use ddp or auto"
            )
        if self.way != "plain" and self.sharding in _CUTS:
            raise ValueError(
                f"train.sharding: {self.sharding} and {'train.orthalign.objectives' if self.way == 'sequence' else 'train.allo'} do"
                " not go together: between objectives and phases the weights are needed whole; use ddp or auto"
            )
        return self

    @model_validator(mode="after")
    def _language_surgery(self) -> TrainConfig:
        if self.language_surgery == "none":
            return self
        if self.together:
            raise ValueError(
                "train.language_surgery is done by one process in this version: set train.processes: 1 and train.nodes: 1"
            )
        if self.way != "plain":
            key = "train.orthalign.objectives" if self.way == "sequence" else "train.allo"
            raise ValueError(f"train.language_surgery and {key} do not go together in this version: leave one out")
        return self

    @model_validator(mode="after")
    def _objectives(self) -> TrainConfig:
        sequence = self.orthalign
        names = [objective.name for objective in sequence.objectives]
        if not names:
            return self
        if len(names) == 1:
            raise ValueError("train.orthalign.objectives has one entry: a sequence needs two")
        if len({name.casefold() for name in names}) < len(names):
            raise ValueError("train.orthalign.objectives: two have the same name")
        if self.reference == "initial" and sequence.reference == "objective":
            raise ValueError(
                "train.reference: initial and train.orthalign.reference: objective contradict each other: set"
                " train.orthalign.reference: round, or leave train.reference out"
            )
        if self.merge_facts is not None and self.merge_facts.anchored:
            raise ValueError(
                f"train.optimizer: {self.optimizer} pulls to where an objective starts, which moves with every objective: use"
                f" {over_phases()} or adamw with train.orthalign"
            )
        return self

    @model_validator(mode="after")
    def _allo(self) -> TrainConfig:
        allo = self.allo
        if not allo.on:
            return self
        if self.method == "lora":
            raise ValueError(
                "train.allo selects entries of the weights, and an entry or a row of a LoRA factor is none of them: use"
                " train.method: full"
            )
        for key in () if allo.learn else ("epochs", "max_steps"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"train.{key} is of learning, which train.allo.learn: false leaves out: leave it out too, or set"
                    f" train.allo.forget_{key}"
                )
        if self.merge_facts is not None and self.merge_facts.anchored:
            raise ValueError(
                f"train.optimizer: {self.optimizer} pulls to where training starts, which moves with every phase of"
                f" train.allo: use {over_phases()} or adamw"
            )
        if self.reference == "initial":
            raise ValueError(
                "train.reference: initial and train.allo contradict each other: its references are the models its phases"
                " start from"
            )
        if self.orthalign.objectives and self.orthalign.reference == "round":
            raise ValueError(
                "train.orthalign.reference: round and train.allo contradict each other: the reference of learning is the"
                " model after forgetting"
            )
        if self.orthalign.objectives and self.orthalign.side == "both" and allo.unit == "weight":
            raise ValueError(
                "train.orthalign.side: both and train.allo.unit: weight do not go together: what mask and both subspaces"
                " leave is no product of the two; use side: left or right, or unit: row"
            )
        return self

    @model_validator(mode="after")
    def _merge(self) -> TrainConfig:
        facts = self.merge_facts
        if facts is None:
            return self
        if self.method == "lora":
            raise ValueError(
                f"train.optimizer: {self.optimizer} merges weights entry by entry, and an entry of a LoRA factor is not a"
                " weight: use train.method: full, or train.optimizer: adamw"
            )
        if facts.alpha is None and self.merge.alpha is None:
            raise ValueError(
                f"train.merge.alpha has no default for train.optimizer: {self.optimizer} (try 0.001 to 0.1)"
            )
        return self


class ReportConfig(Section):
    """The report."""

    browse_pairs: int = execution(200, "pairs in the browser of kept and dropped pairs", ge=0)


class ExecutionConfig(Section):
    """How the run is carried out; only `deterministic` changes results."""

    on: Literal["local", "ray"] = execution(
        "local",
        "where stages compute: this machine, or a Ray cluster that runs already and whose nodes all see the run directory (docs/scale.md)",
    )
    ray_address: str = execution(
        "auto",
        "the cluster's address, host:port; auto: RAY_ADDRESS, or the one this machine is a node of",
        used_when={".on": "ray"},
    )
    workers: int = execution(
        0,
        "worker processes; 0: one per GPU, or one on the CPU; on Ray as many as the cluster holds, counted again while it runs",
        ge=0,
    )
    device: Literal["auto", "cpu", "cuda"] = execution("auto", "auto: CUDA if present")
    threads: int = execution(0, "CPU threads per worker; 0: all cores of a machine shared between its workers", ge=0)
    max_tries: int = execution(3, "a request that fails, or brings the engine down, this often fails its row", ge=1)
    max_failed_fraction: float = execution(
        0.1, "a stage of which a larger share of rows fails (errors, not rules) ends the run", ge=0, le=1
    )
    watchdog_minutes: float = execution(
        60.0, "a worker without any progress for so long is ended and replaced; 0: never", ge=0
    )
    peer_minutes: float = execution(
        60.0,
        "processes that train together: a silent one ends the training after so long; it continues from a checkpoint",
        used_when=_TOGETHER,
        gt=0,
    )
    grace_seconds: float = execution(
        25.0, "after Ctrl-C or SIGTERM: how long running shards may take to finish before they are abandoned", ge=0
    )
    keep_results: int = execution(
        2,
        "how many finished results with other settings each stage keeps aside (_kept/): going back to those settings redoes nothing",
        ge=0,
    )
    deterministic: bool = semantic(False, "reference mode: transformers engine, CPU, float32, bit for bit")

    @model_validator(mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return value or {}
