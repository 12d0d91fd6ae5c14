"""sft, dpo, rm, rlvr, recipe and eval. All but recipe run under torchrun unchanged; alone they are one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from tulu_hpc.cli.common import ConfigPath, Overrides, PrintConfig, load_and_run
from tulu_hpc.config.schema import DpoConfig, EvalConfig, RecipeConfig, RewardModelConfig, RlvrConfig, SftConfig


def sft(config: ConfigPath, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Supervised fine-tuning."""

    def stage() -> Callable[[SftConfig], Any]:
        from tulu_hpc.stages import sft

        return sft.run

    load_and_run(config, overrides, SftConfig, print_config, stage)


def dpo(
    config: ConfigPath,
    overrides: Overrides = None,
    only_reference: Annotated[
        bool,
        typer.Option("--only-reference", help="Fill dpo.reference_cache in advance, anywhere, and stop."),
    ] = False,
    print_config: PrintConfig = False,
) -> None:
    """Direct preference optimisation (dpo, dpo_norm, ipo, simpo, ...)."""

    def stage() -> Callable[[DpoConfig], Any]:
        from tulu_hpc.stages import dpo

        return dpo.compute_reference if only_reference else dpo.run

    load_and_run(config, overrides, DpoConfig, print_config, stage)


def reward_model(config: ConfigPath, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Reward model: a scalar head trained on preference pairs (Bradley-Terry)."""

    def stage() -> Callable[[RewardModelConfig], Any]:
        from tulu_hpc.stages import reward_model

        return reward_model.run

    load_and_run(config, overrides, RewardModelConfig, print_config, stage)


def rlvr(config: ConfigPath, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Reinforcement learning with verifiable rewards (GRPO)."""

    def stage() -> Callable[[RlvrConfig], Any]:
        from tulu_hpc.stages import rlvr

        return rlvr.run

    load_and_run(config, overrides, RlvrConfig, print_config, stage)


def recipe(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command of every step, run nothing.")] = False,
    print_config: PrintConfig = False,
) -> None:
    """All stages of a recipe one after the other, each a torchrun child; continues where it was."""

    def stage() -> Callable[[RecipeConfig], Any]:
        from tulu_hpc.stages import recipe

        return partial(recipe.run, dry_run=dry_run)

    load_and_run(config, overrides, RecipeConfig, print_config, stage)


def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Run the unseen suite instead of the development one.")
    ] = False,
    both: Annotated[bool, typer.Option("--both", help="Run the development suite, then the unseen one.")] = False,
    print_config: PrintConfig = False,
) -> None:
    """Scores of a model on the development suite, or with --unseen on the unseen one."""
    if unseen and both:
        raise typer.BadParameter("--unseen and --both exclude each other")

    def stage() -> Callable[[EvalConfig], Any]:
        from tulu_hpc.stages import evaluate

        return evaluate.run_both if both else lambda loaded: evaluate.run(loaded, unseen=unseen)

    load_and_run(config, overrides, EvalConfig, print_config, stage)
