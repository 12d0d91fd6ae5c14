"""Which schema belongs to which verb."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from tulu_hpc.config import schema
from tulu_hpc.config.loader import ConfigError, load_config, read_yaml

SCHEMAS: dict[str, type[BaseModel]] = {
    "sft": schema.SftConfig,
    "dpo": schema.DpoConfig,
    "rm": schema.RewardModelConfig,
    "rlvr": schema.RlvrConfig,
    "recipe": schema.RecipeConfig,
    "eval": schema.EvalConfig,
    "data synthesize": schema.SyntheticConfig,
    "data mix": schema.MixConfig,
    "data decontaminate": schema.DecontaminateConfig,
    "data prefer": schema.PreferConfig,
    "convert initialise": schema.InitialiseConfig,
}
TRAINING_VERBS = ("sft", "dpo", "rm", "rlvr")
TrainingConfig = schema.SftConfig | schema.DpoConfig | schema.RewardModelConfig | schema.RlvrConfig


def training_verb(path: Path | str, verb: str | None = None) -> str:
    """The verb a training file is for: as given, else by its own section (`dpo:`), else by its name (`dpo.yaml`).

    Raises:
        ConfigError: neither says.
    """
    if verb is not None:
        if verb not in TRAINING_VERBS:
            raise ConfigError(f"--verb {verb!r}: expected one of {', '.join(TRAINING_VERBS)}")
        return verb
    data = read_yaml(path)
    for name in TRAINING_VERBS:
        if name in data:
            return name
    if Path(path).stem in TRAINING_VERBS:
        return Path(path).stem
    raise ConfigError(f"{path}: no `sft:`, `dpo:`, `rm:` or `rlvr:` section says what it is for; give --verb")


def load_training_config(path: Path | str, overrides: Sequence[str], verb: str | None = None) -> TrainingConfig:
    """Load an sft, dpo, rm or rlvr file by its own kind."""
    config = load_config(path, overrides, SCHEMAS[training_verb(path, verb)])
    assert isinstance(config, TrainingConfig)
    return config
