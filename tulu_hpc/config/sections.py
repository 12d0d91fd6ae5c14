"""Sections of the configuration that several verbs share: the run, the model, training, data, rollouts, verifiers."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from tulu_hpc.config.architecture import Architecture


class Section(BaseModel):
    """Base of all configuration sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False, serialize_by_alias=True)


def fields_by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section as a file writes them: a key that is a Python keyword has another name in the code."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name) or not name.strip("."):
        raise ValueError(f"{name!r} becomes a file name: letters, digits, '_', '-' and '.' only, and not dots alone")
    return name


FileName = Annotated[str, AfterValidator(_file_name)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class RunSection(Section):
    name: str = Field(default="run", description="Shown in logs and reports.")
    root: str = Field(default="runs", description="Replaces `{root}` in every path of this file.")
    dir: str | None = Field(
        default=None,
        description="Run directory of a training verb; resumed if it has a checkpoint. Empty: a new one under {root}.",
    )
    seed: int = 0
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads per process; empty: cores / local processes."
    )
    deterministic: bool = Field(default=True, description="Refuse non-deterministic kernels.")
    gpus: int | None = Field(
        default=None,
        ge=1,
        description="GPUs that this file is meant for: what `plan` counts with. Training does not ask.",
    )
    distributed_timeout_minutes: float = Field(default=30.0, gt=0)


class ModelSection(Section):
    path: str = Field(description="Hugging Face directory: config.json, safetensors, tokenizer.")
    architecture: Architecture | None = Field(
        default=None,
        description="Expected shape; checked against config.json, used by `plan` where no file is at hand.",
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    layer_spec: Literal["local", "transformer_engine"] = Field(
        default="local",
        description="Linear layers and norms: megatron-core's and ours, or Transformer Engine's (CUDA only). Attention "
        "and head stay ours.",
    )
    fp8: Literal["none", "e4m3", "hybrid"] = Field(
        default="none", description="fp8 GEMMs of the linear layers; hybrid: e4m3 forward, e5m2 for gradients."
    )
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = Field(
        default="tensorwise", description="Scaling: per tensor (current values), per block (Hopper), mxfp8 (Blackwell)."
    )
    fp32_head: bool = Field(
        default=False, description="Keep and train the LM head in fp32 in a bfloat16 model; the export is bfloat16."
    )
    vocab_multiple: int = Field(
        default=1, ge=1, description="Vocabulary rows are padded to a multiple of this times parallel.tensor."
    )
    logprob_buffer_mib: int = Field(default=256, ge=1, description="Largest buffer of logits that may exist at once.")
    attention_strategy: Literal["repeat", "merge"] | None = Field(
        default=None, description="Prefix attention: K/V repeated per response, or two calls merged; empty: by cost."
    )

    @field_validator("fp8_recipe", mode="before")
    @classmethod
    def _no_delayed_scaling(cls, value: object) -> object:
        if value == "delayed":
            raise ValueError(
                "delayed scaling is not supported: its scales come from a history of earlier steps that no checkpoint "
                "here holds and that passes that only read log-probs would change; take tensorwise"
            )
        return value

    @model_validator(mode="after")
    def _fp8(self) -> Self:
        if self.fp8 != "none" and self.layer_spec != "transformer_engine":
            raise ValueError(f"fp8: {self.fp8} needs layer_spec: transformer_engine")
        if self.fp8 != "none" and self.dtype != "bfloat16":
            raise ValueError(f"fp8: {self.fp8} needs dtype: bfloat16, got {self.dtype}")
        return self

    @property
    def precision(self) -> str:
        """What the weights are computed in: models that differ in it have different log-probs."""
        return f"{self.dtype}, fp32 head" if self.fp32_head and self.dtype != "float32" else self.dtype


class ParallelSection(Section):
    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    virtual_pipeline: int | None = Field(default=None, ge=2, description="Model chunks per pipeline stage.")
    context: int = Field(default=1, ge=1)
    sequence: bool | None = Field(default=None, description="Sequence parallelism; empty: on when tensor > 1.")
    context_split: Literal["greedy", "contiguous", "zigzag"] = "greedy"
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    tp_comm_overlap: bool = Field(
        default=False,
        description="Overlap tensor-parallel communication with GEMMs; needs model.layer_spec transformer_engine and "
        "sequence parallelism. Every pack is padded to train.pack_rows, rounded down to what the ranks divide.",
    )
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    first_stage_layers: int | None = Field(
        default=None, ge=1, description="Layers of the first pipeline stage; empty: dealt evenly with the others."
    )
    last_stage_layers: int | None = Field(default=None, ge=1, description="Layers of the last pipeline stage.")
    gradient_bucket_size: int | None = Field(
        default=None,
        ge=1,
        description="Parameters per bucket of overlap_grad_reduce; empty: 40M, or 1M per data-parallel rank if more.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs distributed_optimizer and overlap_grad_reduce")
        if self.tp_comm_overlap and not (self.tensor > 1 and self.sequence_parallel):
            raise ValueError("tp_comm_overlap needs tensor > 1 with sequence parallelism")
        if self.tp_comm_overlap and self.context > 1 and self.context_split == "zigzag":
            raise ValueError("tp_comm_overlap needs context_split greedy or contiguous: its packs have a fixed size")
        if self.gradient_bucket_size is not None and not self.overlap_grad_reduce:
            raise ValueError("gradient_bucket_size needs overlap_grad_reduce: without it there is one bucket")
        if self.first_stage_layers is not None or self.last_stage_layers is not None:
            if self.pipeline < 2:
                raise ValueError("first_stage_layers and last_stage_layers need pipeline >= 2")
            if self.account_for_embedding_in_pipeline_split or self.account_for_loss_in_pipeline_split:
                raise ValueError(
                    "give either account_for_*_in_pipeline_split or first_stage_layers and last_stage_layers, not both"
                )
        return self

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def model_parallel(self) -> int:
        """Processes of one data-parallel replica."""
        return self.tensor * self.pipeline * self.context


class SpikeSection(Section):
    """What to do when the gradient norm exceeds `factor` times the median of the last `window` norms."""

    policy: Literal["none", "skip", "raise"] = Field(
        default="none", description="`skip`: the step changes nothing, its data is not repeated; `raise`: stop."
    )
    factor: float = Field(default=10.0, gt=1)
    window: int = Field(default=128, ge=1, description="Norms of steps that were trained on.")
    min_history: int = Field(default=16, ge=1, description="Norms to see before the rule applies.")
    max_in_a_row: int = Field(default=5, ge=1, description="Stop instead of skipping more steps than this in a row.")

    @model_validator(mode="after")
    def _history_fits(self) -> Self:
        if self.min_history > self.window:
            raise ValueError(f"min_history {self.min_history} is more than window {self.window}")
        return self


class OptimizerSection(Section):
    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="Of adamw. Each at least 0 and below 1.")
    eps: float = Field(default=1e-8, gt=0, description="Of adamw.")
    momentum: Decay | None = Field(default=None, description="Of sgd, at least 0 and below 1; empty: 0.9.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="Decoupled from the gradient in adamw, added to it in sgd."
    )
    clip_grad: float = Field(default=1.0, ge=0, description="Global gradient norm; 0 switches clipping off.")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(default=0.0, ge=0, le=1, description="Share of all steps.")
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="lr at the last step / lr.")
    gradient_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of the gradient buffers; bfloat16 needs model.dtype bfloat16."
    )
    spike: SpikeSection = SpikeSection()

    @model_validator(mode="after")
    def _momentum_of_sgd(self) -> Self:
        if self.momentum is not None and self.kind != "sgd":
            raise ValueError(f"momentum belongs to sgd; {self.kind} has betas")
        return self


class LoopSection(Section):
    """What the training loops of all stages have in common."""

    pack_rows: int = Field(default=4096, ge=1, description="Most rows of a pack; a pack is one micro-batch.")
    prefix_sharing: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    nan_watch: Literal["on_failure", "always"] = Field(
        default="on_failure",
        description="Every step is checked for NaN and infinity. The module that made them is found by repeating a bad "
        "step under watch, or, with `always`, by watching every step.",
    )
    log_every: int = Field(default=1, ge=1)
    save_every: int | None = Field(default=None, ge=1, description="Steps between checkpoints; empty: only the last.")
    async_save: bool = Field(
        default=True, description="Training goes on while a checkpoint is written, from a copy in host memory."
    )
    on_save_error: Literal["raise", "continue"] = Field(
        default="raise",
        description="A checkpoint that cannot be written (disk full): stop, or warn and go on with the one before. "
        "The last one of a run and that of a stop on request always stop it.",
    )
    keep_last: int = Field(default=2, ge=1, description="Newest checkpoints that are kept.")
    keep_best: int = Field(
        default=0, ge=0, description="Checkpoints with the best `best_metric` that are kept beside the newest."
    )
    best_metric: str | None = Field(
        default=None,
        description="As in metrics.jsonl (train/loss, rollout/reward); its mean since the checkpoint before counts.",
    )
    best_mode: Literal["min", "max"] = "min"
    export_hf: bool = Field(default=True, description="Write {run.dir}/hf at the end.")

    @model_validator(mode="after")
    def _best(self) -> Self:
        if self.keep_best and self.best_metric is None:
            raise ValueError("keep_best needs best_metric")
        if self.best_metric is not None and self.best_metric.startswith(("timing/", "perf/")):
            raise ValueError(f"best_metric: {self.best_metric} says how fast, not how good")
        return self


class TrainSection(LoopSection):
    steps: int | None = Field(
        default=None, ge=1, description="Stop after this many steps (the schedule ends there too)."
    )
    epochs: float | None = Field(default=None, gt=0)
    global_batch_size: int | None = Field(
        default=None, ge=1, description="Sequences (SFT) or pairs (DPO, RM) per optimizer step, all ranks together."
    )
    global_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Instead: most tokens per optimizer step, all ranks together; a prompt that several answers share "
        "counts once.",
    )
    sample_log: bool = Field(
        default=True, description="Write the ids of the samples of each step to {run.dir}/samples (`data samples`)."
    )
    preview_rows: int = Field(
        default=12, ge=0, description="Samples shown with their label masks in {run.dir}/masks.html; 0: no such file."
    )

    @model_validator(mode="after")
    def _length(self) -> Self:
        if self.steps is None and self.epochs is None:
            raise ValueError("give train.steps or train.epochs")
        if (self.global_batch_size is None) == (self.global_batch_tokens is None):
            raise ValueError("give train.global_batch_size or train.global_batch_tokens, one of them")
        return self


class RlvrTrainSection(LoopSection):
    """As `train`, without the batch size: `rlvr` has its own in prompts and samples."""

    steps: int = Field(ge=1, description="Rollout steps.")


class DataSection(Section):
    path: list[str] = Field(min_length=1, description="JSONL or Parquet files, or Hugging Face dataset ids.")
    max_length: int = Field(default=4096, ge=2, description="Tokens of a sequence; what is longer is cut at the end.")
    chat_template: str = Field(default="tulu", description="`tulu`, `tokenizer` (its own), or a Jinja file.")
    on_error: Literal["raise", "skip"] = "raise"
    shuffle: bool = True

    @field_validator("path", mode="before")
    @classmethod
    def _one_path(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class TelemetrySection(Section):
    tensorboard: bool = True
    wandb: bool = False
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="Of one process, for MFU; empty: from the data sheet of the GPU, measured by a GEMM elsewhere.",
    )
    straggler_every: int = Field(default=20, ge=1, description="Steps between reports on the ranks' own times.")
    straggler_ratio: float = Field(
        default=1.25, gt=1, description="Warn when the slowest rank takes this many times the median."
    )
    profile_steps: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list, description="Steps (from 1) traced by torch's profiler: {run.dir}/profile/, per rank."
    )
    memory_snapshot_steps: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list, description="Steps (from 1) whose allocations are recorded; CUDA only."
    )


class VllmSection(Section):
    servers: list[str] = Field(
        default_factory=list,
        description="URLs of running servers (`tulu-hpc rollout serve`); empty: the run starts and ends its own.",
    )
    local_servers: int = Field(default=1, ge=1, description="That the run starts on the machine of its first process.")
    python: str = Field(default=".venv-vllm/bin/python", description="Interpreter of vLLM's environment.")
    host: str = Field(default="127.0.0.1", description="Private address that servers listen on.")
    port: int = Field(default=0, ge=0, le=65535, description="Of `rollout serve`; 0: a free one.")
    tensor_parallel: int = Field(default=1, ge=1)
    kv_cache_mib: int | None = Field(default=None, ge=1, description="Of each worker; empty: vLLM's rule.")
    extra_args: list[str] = Field(default_factory=list, description="Further arguments of vLLM's server.")
    start_seconds: float = Field(default=600.0, gt=0)
    deadline_seconds: float = Field(default=600.0, gt=0, description="Of one attempt at one request.")
    attempts: int = Field(default=3, ge=1, description="Per request, not counting servers that died.")
    probe_seconds: float = Field(
        default=5.0, gt=0, description="Between questions to the engine; twice no answer in this time is a death."
    )
    sync: Literal["gloo", "checkpoint", "nccl"] = Field(
        default="gloo",
        description="How new weights travel. `checkpoint`: through a directory that the servers can read; `nccl`: from "
        "GPU to GPU, not run on NCCL so far.",
    )
    nccl_library: str | None = Field(
        default=None, description="Path of libnccl; empty: $VLLM_NCCL_SO_PATH, or the libnccl.so.2 of torch."
    )
    bucket_mib: int = Field(default=256, ge=1, description="Weights held for sending: half is sent, half gathered.")
    sync_timeout_seconds: float = Field(default=60.0, gt=0, description="Of one bucket, or of one reload.")


class RolloutSection(Section):
    engine: Literal["embedded", "vllm"] = Field(
        default="embedded", description="On the training model, or vLLM servers."
    )
    vllm: VllmSection = VllmSection()
    mismatch_max: float | None = Field(
        default=None,
        gt=0,
        description="Stop when log-probs of engine and trainer differ by more; empty: 1e-3 in float32, else no limit.",
    )
    mismatch_mult_prob_error: float = Field(
        default=1.05, gt=1, description="Stop when the mean of exp(|difference|) of a step is beyond this."
    )
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=2048, ge=1)
    max_sequences: int = Field(default=256, ge=1, description="Sequences decoded together on one model replica.")
    stop: list[str] = Field(default_factory=list, description="Strings that end a completion, beside end-of-text.")


class JudgeSection(Section):
    url: str = Field(description="Base of an OpenAI-compatible API, e.g. http://localhost:8000/v1.")
    model: str = Field(min_length=1, description="Name that the endpoint knows.")
    key_variable: str = Field(default="", description="Environment variable with the API key; empty: none is sent.")
    tries: int = Field(default=3, ge=1, description="Requests per verdict before it is an error.")
    max_tokens: int = Field(default=512, ge=1, description="Length of the judge's reply.")
    timeout_seconds: float = Field(
        default=30.0, gt=0, description="Of one request; keep verifier.timeout_seconds above tries times this."
    )

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"{url!r} must start with http:// or https://")
        return url


class VerifierSection(Section):
    workers: int = Field(default=1, ge=1)
    timeout_seconds: float = Field(
        default=5.0, gt=0, description="Wall clock of one verdict; the worker is killed beyond it."
    )
    rules: Literal["fixed", "tulu3-compat"] = Field(
        default="fixed", description="`tulu3-compat` scores as the code behind the paper did, its mistakes included."
    )
    modules: list[str] = Field(default_factory=list, description="Python modules that register further verifiers.")
    grants: list[Literal["files", "network", "processes"]] = Field(
        default_factory=list,
        description="What verifiers may do beyond reading files and computing: programs (`code`) need `processes`, "
        "judges `network`, writing files `files`.",
    )
    judge: JudgeSection | None = Field(default=None, description="Endpoint of the `judge` verifier.")
    cache: bool = Field(default=False, description="Keep verdicts by content: equal answers are verified once.")
    cache_dir: str | None = Field(default=None, description="Keep them there for later runs too; implies `cache`.")
    max_lost_share: float = Field(
        default=0.5, gt=0, le=1, description="Stop when more of a step's (or suite's) verdicts than this are lost."
    )

    @model_validator(mode="after")
    def _judge_is_reachable(self) -> Self:
        if self.judge is not None and "network" not in self.grants:
            raise ValueError("verifier.judge needs verifier.grants: [network]")
        return self
