"""A tiny reward model beside the tiny policy, and a short PPO run of the two."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.parallel.forked import single_process
from tests.rlvr import tiny_rlvr
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.models.build import build_model
from tulu_hpc.models.convert import load_hf, save_hf
from tulu_hpc.models.initialise import random_hf_model


def write_inputs(folder: Path) -> Path:
    """As `tiny_rlvr.write_inputs`, and `folder/rm`: a reward model of one layer, half as wide as the policy."""
    tiny_rlvr.write_inputs(folder)
    rows = Architecture.from_hf(folder / "model").vocab_size
    small = Architecture(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    random_hf_model(small, folder / "small", seed=5, embedding_std=0.4, linear_std=0.2)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / "model" / name).is_file():
            shutil.copy(folder / "model" / name, folder / "small" / name)
    with single_process() as groups:
        chunks = build_model(small, groups, head="value", device="cpu")
        load_hf(chunks, folder / "small", small, groups, new_head_seed=3)
        save_hf(chunks, folder / "rm", small, groups, source=folder / "small")
    return folder


def ppo_config(inputs: Path, run: Path, **changes: Any) -> RlvrConfig:
    """Tulu 3's kind of PPO in small: one answer per prompt, KL in the reward, two epochs of two minibatches."""
    value: dict[str, Any] = {"model": {"path": str(inputs / "rm")}, "optimizer": {"lr": 0.01, "schedule": "constant"}}
    for name in [name for name in changes if name.startswith("value__")]:
        value[name.removeprefix("value__")] = changes.pop(name)
    options = {
        "rlvr__kind": "ppo",
        "rlvr__prompts_per_step": 10,
        "rlvr__samples_per_prompt": 1,
        "rlvr__epochs": 2,
        "rlvr__minibatches": 2,
        "rlvr__kl_in": "reward",
        "rlvr__kl_kind": "k1",
        "rlvr__kl_coef": 0.05,
        "rlvr__no_eos_penalty": -10.0,
        "rlvr__old_logprobs": "trainer",
    }
    return tiny_rlvr.rlvr_config(inputs, run, **(options | changes), value=value)
