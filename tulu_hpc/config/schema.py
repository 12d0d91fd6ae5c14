"""Typed configuration of every verb. Unknown keys are refused; the loader adds the nearest right name."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.dpo_section import DpoSection
from tulu_hpc.config.layer_spec import check_layer_spec
from tulu_hpc.config.rlvr_sections import AsyncSection, RlvrSection, ValueSection
from tulu_hpc.config.sections import (
    DataSection,
    FileName,
    LoopSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RlvrTrainSection,
    RolloutSection,
    RunSection,
    Section,
    TelemetrySection,
    TrainSection,
    VerifierSection,
)


class SftSection(Section):
    normalisation: Literal["sum", "token_mean"] = Field(
        default="sum",
        description="Sum of token losses over sum_divisor (Tulu 3), or over all trained tokens of the batch.",
    )
    sum_divisor: float | None = Field(default=None, gt=0, description="Empty: train.global_batch_size.")
    neftune_alpha: float = Field(
        default=0.0, ge=0, description="Noise on the embeddings (arXiv:2310.05914), in units of the paper; 0: none."
    )


class StageConfig(Section):
    """What every training verb needs."""

    run: RunSection = RunSection()
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    data: DataSection
    optimizer: OptimizerSection
    telemetry: TelemetrySection = TelemetrySection()
    train: LoopSection

    @model_validator(mode="after")
    def _layers(self) -> Self:
        check_layer_spec(self.model, self.parallel, decodes=isinstance(self, RlvrConfig))
        return self

    @model_validator(mode="after")
    def _best_of_evaluations(self) -> Self:
        evaluates = isinstance(self, RewardModelConfig) and bool(self.rm.eval_path)
        if (self.train.best_metric or "").startswith("eval/") and not evaluates:
            raise ValueError(f"train.best_metric is {self.train.best_metric}, but nothing is evaluated (rm.eval_path)")
        return self


class SftConfig(StageConfig):
    train: TrainSection
    sft: SftSection = SftSection()

    @model_validator(mode="after")
    def _divisor(self) -> Self:
        if self.sft.normalisation == "sum" and self.sft.sum_divisor is None and self.train.global_batch_size is None:
            raise ValueError("sft.normalisation is sum and the batch is counted in tokens: give sft.sum_divisor")
        return self


class DpoConfig(StageConfig):
    train: TrainSection
    dpo: DpoSection = DpoSection()


class RewardModelSection(Section):
    eval_path: list[str] = Field(
        default_factory=list, description="Held-out pairs, as data.path; scored, never trained on."
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="Steps between evaluations; empty: only after the last."
    )

    @field_validator("eval_path", mode="before")
    @classmethod
    def _one_path(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if self.eval_every is not None and not self.eval_path:
            raise ValueError("eval_every is given, but no eval_path")
        return self


class RewardModelConfig(StageConfig):
    """A scalar head on the model at `model.path`: a new one on a language model, or the one of a reward model."""

    train: TrainSection
    rm: RewardModelSection = RewardModelSection()

    @model_validator(mode="after")
    def _no_vocabulary(self) -> Self:
        if self.model.fp32_head:
            raise ValueError("model.fp32_head is of the vocabulary's head; a scalar head computes in fp32 anyway")
        return self


class RlvrConfig(StageConfig):
    train: RlvrTrainSection
    rlvr: RlvrSection
    asynchrony: AsyncSection = Field(default=AsyncSection(), alias="async")
    value: ValueSection | None = Field(default=None, description="Value model of rlvr.kind: ppo.")
    rollout: RolloutSection = RolloutSection()
    verifier: VerifierSection = VerifierSection()

    @model_validator(mode="after")
    def _engine_beside_the_trainer(self) -> Self:
        if self.asynchrony.max_staleness and self.rollout.engine == "embedded":
            raise ValueError(
                f"async.max_staleness {self.asynchrony.max_staleness} needs rollout.engine: vllm; the embedded engine "
                "samples with the model that is trained, in the same process, so it cannot be ahead"
            )
        return self

    @model_validator(mode="after")
    def _overlong_buffer(self) -> Self:
        if self.rlvr.overlong_buffer > self.rollout.max_new_tokens:
            raise ValueError(
                f"rlvr.overlong_buffer {self.rlvr.overlong_buffer} is longer than "
                f"rollout.max_new_tokens {self.rollout.max_new_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _value_model_of_ppo(self) -> Self:
        if self.rlvr.kind == "ppo" and self.value is None:
            raise ValueError("rlvr.kind is ppo: give value.model.path (a reward model) and value.optimizer")
        if self.rlvr.kind != "ppo" and self.value is not None:
            raise ValueError(f"a value model belongs to rlvr.kind: ppo, not to {self.rlvr.kind}")
        return self


class PreferSection(Section):
    prompts: int | None = Field(default=None, ge=1, description="Take this many prompts; empty: all.")
    samples_per_prompt: int = Field(default=8, ge=2)
    output: str = Field(description="JSONL of preference records.")


class PreferConfig(Section):
    run: RunSection = RunSection()
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    data: DataSection
    prefer: PreferSection
    rollout: RolloutSection = RolloutSection()
    verifier: VerifierSection = VerifierSection()

    @model_validator(mode="after")
    def _layers(self) -> Self:
        check_layer_spec(self.model, self.parallel, decodes=True)
        return self


class EvalTaskSection(Section):
    name: str = Field(description="Key of the score in reports.")
    task: str = Field(description="Task of the suite's registry, e.g. gsm8k, ifeval.")
    path: str = Field(description="JSONL, Parquet or Hugging Face dataset id, in the task's public schema.")
    limit: int | None = Field(default=None, ge=1)
    few_shot: int = Field(default=0, ge=0)
    few_shot_path: str | None = None
    prompting: Literal["chat", "multiturn", "completion"] = "chat"


class EvalSection(Section):
    dev: list[EvalTaskSection] = Field(default_factory=list)
    unseen: list[EvalTaskSection] = Field(default_factory=list)
    draws: int = Field(
        default=2, ge=0, description="Sampled answers per prompt at rollout.temperature; 0: greedy only."
    )
    greedy: bool = True
    bootstrap_samples: int = Field(default=1000, ge=100)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    keep_completions: int = Field(default=8, ge=0, description="Completions per task kept in the result file.")
    chat_template: str = "tulu"
    output: str = Field(description="Directory of the result files.")


class EvalConfig(Section):
    run: RunSection = RunSection()
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    eval: EvalSection
    rollout: RolloutSection = RolloutSection()
    verifier: VerifierSection = VerifierSection()

    @model_validator(mode="after")
    def _layers(self) -> Self:
        check_layer_spec(self.model, self.parallel, decodes=True)
        return self


class MixSource(Section):
    name: str
    path: str
    count: int | None = Field(default=None, ge=1, description="Rows to take.")
    fraction: float | None = Field(default=None, gt=0, description="Share of the source's rows; above 1 repeats rows.")


class MixSection(Section):
    sources: list[MixSource] = Field(min_length=1)
    output: str
    kind: Literal["sft", "preference", "labelled", "rlvr"] = "sft"
    on_error: Literal["raise", "skip"] = "raise"
    weight_field: str | None = Field(
        default=None,
        min_length=1,
        description="Of preference and labelled rows: the field with their weight, which the mixture keeps under this "
        "name (`dpo.weight_field`). Every row must have it.",
    )

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if self.weight_field is not None and self.kind not in ("preference", "labelled"):
            raise ValueError(f"weight_field: rows of kind {self.kind} have no weight")
        taken = ("prompt", "chosen", "rejected", "completion", "label", "tools", "source", "id")
        if self.weight_field in taken:
            raise ValueError(f"weight_field is {self.weight_field!r}, which holds something else in every row")
        return self


class MixConfig(Section):
    run: RunSection = RunSection()
    mix: MixSection


class EvalPrompts(Section):
    name: str
    path: str
    fields: list[str] = Field(
        min_length=1, description="Fields whose scores are averaged (question; passage, question; ...)."
    )
    unseen: bool = False


class CleanSource(Section):
    name: FileName = Field(description="Of the cleaned file: {output}/NAME.jsonl.")
    path: str


class DecontaminateSection(Section):
    train: list[CleanSource] = Field(min_length=1, description="Sources to clean.")
    evals: list[EvalPrompts] = Field(min_length=1)
    ngram: int = Field(default=8, ge=1)
    match_threshold: float = Field(default=0.5, gt=0, le=1, description="Share of a test instance's tokens.")
    contamination_threshold: float = Field(default=0.02, ge=0, le=1, description="Share of an eval's instances.")
    action: Literal["report", "drop_rows", "paper"] = Field(
        default="paper",
        description="`paper`: drop a contaminated set if the eval is unseen, else its matching rows; "
        "`drop_rows`: rows only.",
    )
    output: str = Field(description="Directory of cleaned sources and report.json.")
    planted: str | None = Field(
        default=None, description="leaks.json of `data synthesize`: the report then gives recall and false drops."
    )


class DecontaminateConfig(Section):
    run: RunSection = RunSection()
    decontaminate: DecontaminateSection


class SyntheticSection(Section):
    """Sizes of the quickstart's generated data."""

    output: str
    sft_math: int = Field(ge=1)
    sft_instructions: int = Field(ge=1)
    preference_prompts: int = Field(ge=1)
    rlvr_prompts: int = Field(ge=1)
    eval_rows: int = Field(default=256, ge=8)
    leaks: int = Field(default=24, ge=0, description="Evaluation prompts planted in the training sources.")
    show_working: float = Field(default=0.4, ge=0, le=1, description="Share of demonstrations that show their working.")
    follow_constraint: float = Field(default=0.5, ge=0, le=1)


class SyntheticConfig(Section):
    run: RunSection = RunSection()
    synthetic: SyntheticSection


class TokenizerSection(Section):
    texts: list[str] = Field(min_length=1, description="Record files to learn from.")
    vocab_size: int = Field(default=768, ge=256)
    kind: Literal["sft", "preference", "labelled", "rlvr"] = "sft"


class InitialiseSection(Section):
    output: str
    embedding_std: float = Field(default=0.02, gt=0)
    linear_std: float = Field(default=0.02, gt=0)
    scale_residual_outputs: bool = Field(default=True, description="Divide o_proj and down_proj by sqrt(2 layers).")


class InitialiseConfig(Section):
    """A tokenizer and a random Llama in Hugging Face format; `vocab_size` comes from the tokenizer."""

    run: RunSection = RunSection()
    tokenizer: TokenizerSection
    architecture: Architecture
    initialise: InitialiseSection


class RecipeStep(Section):
    name: FileName = Field(description="Of the step's log and marker too.")
    verb: str = Field(description="Verb of the command line, e.g. `sft` or `data mix`.")
    config: str
    processes: int = Field(default=1, ge=1)
    overrides: dict[str, object] = Field(default_factory=dict)


class ReportSection(Section):
    title: str
    evals: dict[str, str] = Field(default_factory=dict, description="Stage name -> directory of its evaluation.")
    before: str | None = Field(
        default=None, description="Evaluation of the model before the first stage; only its answers are shown."
    )
    runs: dict[str, str] = Field(default_factory=dict, description="Stage name -> run directory, for curves.")
    decontamination: str | None = None
    preference: str | None = None
    notes: list[str] = Field(default_factory=list)
    output: str = "{root}/report.html"


class RecipeConfig(Section):
    run: RunSection = RunSection()
    steps: list[RecipeStep] = Field(min_length=1)
    overrides: dict[str, dict[str, object]] = Field(
        default_factory=dict,
        description="Step name -> keys of its configuration, e.g. `overrides.sft.train.steps=100`.",
    )
    report: ReportSection
