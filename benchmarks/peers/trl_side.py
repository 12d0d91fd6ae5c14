"""TRL's own trainers as contestants: what its SFT and DPO workers share."""

from __future__ import annotations

import time
from typing import Any

import torch
from common import Spec, read_rows
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback
from turns import Turn, current_rss


def training_arguments(spec: Spec) -> dict[str, Any]:
    """Keyword arguments common to SFTConfig and DPOConfig: TRL without anything that only costs time.

    No evaluation, logging or saving, fp32, rows in the given order; no gradient checkpointing (TRL's default is on)
    unless the setting asks for it.
    """
    batch = int(spec.options["batch"])
    if spec.global_batch % batch:
        raise ValueError(f"a global batch of {spec.global_batch} is not a multiple of TRL's batch of {batch}")
    return {
        "output_dir": spec.output_dir,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": spec.global_batch // batch,
        "max_steps": spec.steps,
        "learning_rate": spec.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": bool(spec.options.get("checkpointing", False)),
        "torch_compile": bool(spec.options.get("compile", False)),
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "max_length": None,
    }


def load(spec: Spec) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in fp32 with torch's fused attention, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(spec.model_dir, dtype=torch.float32, attn_implementation="sdpa")
    return model, AutoTokenizer.from_pretrained(spec.model_dir)


class Recorder:
    """Mixed in before a TRL trainer: sums loss, padded rows and scored tokens of a step. It changes nothing in it."""

    loss_sum = 0.0
    rows = 0
    tokens = 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.rows += inputs["input_ids"].numel()
        scored = inputs["completion_mask"] if "completion_mask" in inputs else inputs["labels"] != -100
        self.tokens += int(scored[:, 1:].sum())
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.loss_sum += float(loss)
        return loss

    def take(self) -> dict[str, Any]:
        """The sums of the step that just ended; starts the next one."""
        found = {"loss": self.loss_sum, "rows": self.rows, "tokens": self.tokens}
        self.loss_sum, self.rows, self.tokens = 0.0, 0, 0
        return found


class TakeTurns(TrainerCallback):
    """Blocks before the first step and after every step, so a step's time includes fetching its batch."""

    def __init__(self, turn: Turn, recorder: Any, setup: dict[str, Any]) -> None:
        self.turn, self.recorder, self.setup = turn, recorder, setup

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.turn.report(rss=current_rss(), **self.setup)
        self.turn.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turn.report(**self.recorder.take())
        if state.global_step < state.max_steps:
            self.turn.wait()


def train(trainer: Trainer, turn: Turn, **setup: Any) -> None:
    """Run `trainer.train()` in turns; `setup` goes into the first report."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TakeTurns(turn, trainer, setup))
    trainer.train()


def sft_worker(spec: Spec, turn: Turn) -> None:
    """TRL's SFTTrainer on token ids; the prompts' labels are -100."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Sft(Recorder, SFTTrainer):
        pass

    rows = read_rows(spec)
    model, tokenizer = load(spec)
    dataset = Dataset.from_dict(
        {
            "input_ids": [row["prompt"] + row["response"] for row in rows],
            "labels": [[-100] * len(row["prompt"]) + row["response"] for row in rows],
        }
    )
    values = training_arguments(spec)
    if spec.options.get("packing"):
        values |= {"packing": True, "max_length": spec.pack_rows}
    values["padding_free"] = bool(spec.options.get("padding_free", False))
    train(Sft(model=model, args=SFTConfig(**values), train_dataset=dataset, processing_class=tokenizer), turn)


def dpo_worker(spec: Spec, turn: Turn) -> None:
    """TRL's DPOTrainer. It always tokenises text, so it gets words that map back to the same token ids."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Dpo(Recorder, DPOTrainer):
        reference_seconds = 0.0

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            found = super()._precompute_ref_logps(*args, **kwargs)
            self.reference_seconds = time.perf_counter() - started
            return found

    rows = read_rows(spec)
    model, tokenizer = load(spec)
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))

    def text(ids: list[int]) -> str:
        return " ".join(words[i] for i in ids)

    dataset = Dataset.from_dict(
        {
            "prompt": [text(row["prompt"]) + " " for row in rows],
            "chosen": [text(row["chosen"]) for row in rows],
            "rejected": [text(row["rejected"]) for row in rows],
        }
    )
    precompute = bool(spec.options.get("precompute", True))
    values = training_arguments(spec) | {"beta": spec.beta, "precompute_ref_log_probs": precompute}
    trainer = Dpo(model=model, args=DPOConfig(**values), train_dataset=dataset, processing_class=tokenizer)
    for row, tokenised in zip(rows, trainer.train_dataset, strict=True):
        if any(row[name] != tokenised[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")):
            raise RuntimeError("TRL does not train on the token ids of the data file")
    train(trainer, turn, reference_seconds=trainer.reference_seconds)
