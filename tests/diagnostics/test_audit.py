"""The audit: it holds where the system is right, and finds faults planted in weights and modules from outside.

Not proven here: that it would find every fault; each of these is one that has happened to somebody.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.parallel.forked import run_forked
from tests.rlvr import tiny_ppo, tiny_rlvr
from tests.training import tiny_run
from tulu_hpc.cli.main import app
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.verbs import load_training_config
from tulu_hpc.diagnostics.certificate import Certificate, Check, Difference
from tulu_hpc.models.build import unwrap
from tulu_hpc.stages import audit, audit_model, audit_values, reward_model, rlvr, rlvr_loss, rlvr_values, sft
from tulu_hpc.training import trainer as trainer_module

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    inputs = tiny_rlvr.write_inputs(folder)
    rlvr_file = tiny_rlvr.rlvr_config(inputs, folder / "run").model_dump(mode="json", exclude_unset=True)
    tiny_run.write_config(rlvr_file, folder / "rlvr.yaml")
    ppo_inputs = tiny_ppo.write_inputs(folder / "ppo")
    ppo = tiny_ppo.ppo_config(ppo_inputs, folder / "run").model_dump(mode="json", exclude_unset=True)
    tiny_run.write_config(ppo, folder / "ppo.yaml")
    for verb in ("sft", "dpo", "rm"):
        tiny_run.write_config(tiny_run.config(inputs, folder / "run", verb), folder / f"{verb}.yaml")
    return folder


def audited(files: Path, verb: str, overrides: list[str], plant: Plant | None = None, **options: Any) -> Certificate:
    config = load_training_config(files / f"{verb}.yaml", overrides)
    with pytest.MonkeyPatch.context() as patch:
        if plant is not None:
            plant(patch)
        return audit.run(config, output=files / "certificate", rows=6, **options)


def after_loading(patch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Change each model chunk once its weights are loaded."""
    load = trainer_module.load_pretrained

    def load_and_change(chunks: Any, *arguments: Any, **options: Any) -> None:
        load(chunks, *arguments, **options)
        for chunk in chunks:
            change(unwrap(chunk))

    patch.setattr(trainer_module, "load_pretrained", load_and_change)


def swap_query_groups(patch: pytest.MonkeyPatch) -> None:
    """The two key/value groups of layer 1, with their queries, change places."""

    def change(model: Any) -> None:
        for layer in model.decoder.layers:
            if layer.layer_number == 2:
                weight = layer.self_attention.linear_qkv.weight
                with torch.no_grad():
                    weight.copy_(torch.cat(weight.chunk(2)[::-1]))

    after_loading(patch, change)


def wrong_rope(patch: pytest.MonkeyPatch) -> None:
    def change(model: Any) -> None:
        model._inverse_frequency = model._inverse_frequency * 1.05

    after_loading(patch, change)


def change_packs(patch: pytest.MonkeyPatch, change: Callable[[Any], None], where: ModuleType = audit) -> None:
    step = audit_model.one_batch

    def changed(*arguments: Any) -> Any:
        data = step(*arguments)
        for pack in data.packs:
            change(pack)
        return data

    patch.setattr(where, "one_batch", changed)


def labels_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Every row is asked for its own token instead of the next one."""

    def change(pack: Any) -> None:
        pack.target_K = pack.tokens_T[pack.hidden_row_K]

    change_packs(patch, change)


def rows_off_by_one(patch: pytest.MonkeyPatch, where: ModuleType = audit) -> None:
    """Every token is scored (of a value model: valued) at its own row instead of the one before."""

    def change(pack: Any) -> None:
        pack.hidden_row_K = (pack.hidden_row_K + 1).clamp(max=pack.num_rows - 1)

    change_packs(patch, change, where)


def readout_one_early(patch: pytest.MonkeyPatch) -> None:
    """The scalar head is read before the last token of an answer instead of after it."""

    def change(pack: Any) -> None:
        pack.hidden_row_K = pack.hidden_row_K - 1

    change_packs(patch, change)


def wrong_head(patch: pytest.MonkeyPatch) -> None:
    def change(model: Any) -> None:
        if getattr(model, "score", None) is not None:  # not a policy
            with torch.no_grad():
                model.score.weight.mul_(1.001)

    after_loading(patch, change)


def rejected_for_chosen(patch: pytest.MonkeyPatch) -> None:
    scores = reward_model.pair_scores
    patch.setattr(reward_model, "pair_scores", lambda *given, **named: scores(*given, **named).flip(1))


def norm_gradients_stay_local(patch: pytest.MonkeyPatch) -> None:
    """Under sequence parallelism each rank keeps the gradient of its own rows."""
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")  # a function has this name too
    patch.setattr(module, "_allreduce_non_tensor_model_parallel_grads", lambda *_, **__: None)


def wrong_divisor(patch: pytest.MonkeyPatch) -> None:
    terms = sft.sft_terms
    patch.setattr(sft, "sft_terms", lambda logprobs_K, *, divisor: terms(logprobs_K, divisor=2 * divisor))


def wrong_count(patch: pytest.MonkeyPatch) -> None:
    terms = rlvr_loss.policy_terms
    patch.setattr(
        rlvr_loss,
        "policy_terms",
        lambda *given, global_count, **named: terms(*given, global_count=2 * global_count, **named),
    )


def wrong_temperature(patch: pytest.MonkeyPatch) -> None:
    """The trainer's log-probs are those of temperature 1, whatever the rollouts' is."""
    patch.setattr(rlvr, "sample_as_rollouts", lambda config, models: None)


def advantages_of_others(patch: pytest.MonkeyPatch) -> None:
    """Every answer gets the advantage of the one before it in its pack."""

    def change(pack: Any) -> None:
        pack.per_sequence["advantage"] = pack.per_sequence["advantage"].roll(1)

    change_packs(patch, change)


def values_without_limit(patch: pytest.MonkeyPatch) -> None:
    """The value loss forgets its clip range."""
    terms = rlvr_values.value_terms
    patch.setattr(rlvr_values, "value_terms", lambda *given, clip, **named: terms(*given, clip=None, **named))


# number of processes -> fault -> (how it is planted, verb, overrides, first check that fails, where)
FAULTS: dict[int, dict[str, tuple[Plant, str, list[str], str, str]]] = {
    1: {
        "q/k groups": (swap_query_groups, "sft", [], "weights", "model.layers.1.self_attn.q_proj.weight"),
        "rope": (wrong_rope, "sft", [], "hidden", "model.layers.0"),
        "labels": (labels_off_by_one, "dpo", [], "logprobs", "sample 0"),
        "rows": (rows_off_by_one, "dpo", ["train.prefix_sharing=false"], "hidden", "model.embed_tokens"),
        "divisor": (wrong_divisor, "sft", ["sft.normalisation=token_mean"], "loss", "the batch"),
        "rm read-out": (readout_one_early, "rm", ["train.prefix_sharing=false"], "hidden", "model.embed_tokens"),
        "rm head": (wrong_head, "rm", [], "weights", "score.weight"),
        "rm pairs": (rejected_for_chosen, "rm", [], "loss", "the batch"),
        "rm q/k groups": (swap_query_groups, "rm", [], "weights", "model.layers.1.self_attn.q_proj.weight"),
        "rlvr labels": (labels_off_by_one, "rlvr", ["train.prefix_sharing=false"], "logprobs", "sample 0"),
        "rlvr divisor": (wrong_count, "rlvr", [], "loss", "the batch"),
        "rlvr temperature": (wrong_temperature, "rlvr", [], "logprobs", "sample 0"),
        "rlvr advantages": (advantages_of_others, "rlvr", [], "loss", "the batch"),
        "value rows": (
            partial(rows_off_by_one, where=audit_values),
            "ppo",
            ["train.prefix_sharing=false"],
            "value model hidden",
            "model.embed_tokens",
        ),
        "value clip": (values_without_limit, "ppo", [], "value model loss", "the batch"),
        "value head": (wrong_head, "ppo", [], "value model weights", "score.weight"),
        "rlvr q/k groups": (swap_query_groups, "rlvr", [], "weights", "model.layers.1.self_attn.q_proj.weight"),
    },
    2: {
        "rm all-reduce": (
            norm_gradients_stay_local,
            "rm",
            ["parallel.tensor=2"],
            "gradients",
            "model.layers.0.input_layernorm.weight",
        ),
        "all-reduce": (
            norm_gradients_stay_local,
            "dpo",
            ["parallel.tensor=2"],
            "gradients",
            "model.layers.0.input_layernorm.weight",
        ),
    },
}


def all_faults(files: Path, world: int) -> dict[str, Certificate]:
    return {
        name: audited(files, verb, overrides, plant) for name, (plant, verb, overrides, *_) in FAULTS[world].items()
    }


@pytest.fixture(scope="module")
def certificates(files: Path) -> dict[str, Certificate]:
    return {name: each for world in FAULTS for name, each in run_forked(world, all_faults, files, world)[0].items()}


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, faults in FAULTS.items() for name in faults])
def test_planted_faults_are_found_and_named(certificates: dict[str, Certificate], world: int, name: str) -> None:
    *_, check, place = FAULTS[world][name]
    certificate = certificates[name]
    assert not certificate.holds
    failed = next(each for each in certificate.checks if not each.holds)
    assert failed.name == check and failed.first_failure is not None
    assert failed.first_failure.place.startswith(place), certificate.verdict()
    assert place in certificate.verdict()


def test_what_the_patterns_say(certificates: dict[str, Certificate]) -> None:
    for name in ("divisor", "rlvr divisor"):
        assert "every gradient is 0.5 times the true one" in certificates[name].verdict()
    by_name = {check.name: check for check in certificates["all-reduce"].checks}
    failing = {each.place for each in by_name["gradients"].differences if not each.within(2e-4)}
    assert failing and all("norm" in place for place in failing), "only the norms lack the all-reduce"
    assert all(check.holds for name, check in by_name.items() if name != "gradients")
    assert next(check.name for check in certificates["rope"].checks if check.holds) == "weights"


def sound(files: Path, cases: list[tuple[str, list[str], dict[str, Any]]]) -> list[Certificate]:
    return [audited(files, verb, overrides, **options) for verb, overrides, options in cases]


def test_it_holds_at_several_layouts(files: Path) -> None:
    cases: dict[int, list[tuple[str, list[str], dict[str, Any]]]] = {
        1: [
            ("sft", ["sft.normalisation=token_mean"], {}),
            ("dpo", ["dpo.kind=simpo", "dpo.beta=2"], {"layers": 1}),
            ("dpo", [], {"dtype": "bfloat16"}),
            ("dpo", ["dpo.kind=dpo", "dpo.weighting=wpo", "dpo.wpo_alignment=true"], {}),
            ("rm", [], {}),
            ("rm", [], {"layers": 1, "dtype": "bfloat16"}),
            ("rlvr", ["train.pack_rows=64", "train.recompute=full"], {}),
            ("rlvr", ["rlvr.kind=dapo", "rlvr.dual_clip=3", "rlvr.importance=token"], {}),
            ("rlvr", ["rlvr.kind=gspo", "rlvr.importance=sequence", "rlvr.importance_mode=mask"], {"layers": 1}),
            ("rlvr", ["rlvr.kind=cispo", "rlvr.kl_coef=0.1", "rlvr.kl_kind=k2"], {}),
            ("rlvr", ["rlvr.kind=dr_grpo", "rlvr.importance=geometric"], {"dtype": "bfloat16"}),
            ("ppo", ["train.pack_rows=64", "value.recompute=full"], {}),
            ("ppo", ["value.clip=null", "value.new_head=true", f"value.model.path={files}/ppo/small"], {"layers": 1}),
            ("ppo", [], {"dtype": "bfloat16"}),
            ("sft", ["sft.neftune_alpha=5", "model.dtype=bfloat16", "optimizer.gradient_dtype=bfloat16"], {}),
        ],
        2: [
            ("sft", ["parallel.tensor=2", "train.recompute=full"], {}),
            ("dpo", ["parallel.context=2"], {}),
            ("sft", ["parallel.pipeline=2"], {}),
            ("rm", ["parallel.context=2"], {}),
            ("rm", ["parallel.tensor=2"], {}),
            ("rm", ["parallel.pipeline=2"], {}),
            ("dpo", [], {}),
            ("rlvr", ["parallel.context=2", "rlvr.kind=gspo"], {}),
            ("rlvr", ["parallel.tensor=2", "rlvr.kind=rloo"], {}),
            ("rlvr", ["parallel.pipeline=2"], {}),
            ("rlvr", ["rlvr.old_logprobs=trainer", "rlvr.normalisation=sequence_mean"], {}),
            ("ppo", ["parallel.tensor=2", "value.parallel.pipeline=2"], {}),
            ("ppo", ["parallel.pipeline=2", "value.parallel.context=2"], {}),
            ("ppo", ["value.parallel.tensor=2"], {}),
            ("ppo", [], {}),
        ],
    }
    packs: dict[tuple[Any, ...], int] = {}
    for world, each in cases.items():
        for (verb, overrides, options), certificate in zip(each, run_forked(world, sound, files, each)[0], strict=True):
            assert certificate.holds, (verb, overrides, certificate.verdict())
            layers = options.get("layers", 2)
            counts = {check.name: len(check.differences) for check in certificate.checks}
            assert counts["hidden"] == layers + 2 and counts["weights"] == counts["gradients"] == 3 + 9 * layers
            responses = {"sft": 6, "ppo": 6, "rlvr": 24}.get(verb, 12)
            assert counts["scores" if verb == "rm" else "logprobs"] == responses
            assert counts.get("value model values") == (responses if verb == "ppo" else None)
            assert counts.get("value model gradients") == (3 + 9 * layers if verb == "ppo" else None)
            packs[verb, world, *overrides] = certificate.subject["packs"]
    alone, staged = packs["sft", 1, "sft.normalisation=token_mean"], packs["sft", 2, "parallel.pipeline=2"]
    assert alone == staged > 0, "both stages have the same packs"


def verb_twice(files: Path, target: Path) -> list[tuple[int, str]]:
    """Exit code and output of the verb as it is, and with a fault."""

    def verb(*more: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["audit", str(files / "sft.yaml"), "--output", str(target), *more])
        return done.exit_code, done.output

    sound = verb("--rows", "3")
    shutil.copytree(target, target.with_name("sound"))
    with pytest.MonkeyPatch.context() as patch:
        wrong_divisor(patch)
        return [sound, verb("--rows", "3")]


def test_the_verb(files: Path, tmp_path: Path) -> None:
    target = tmp_path / "proof"
    ((sound, output), (faulty, _)) = run_forked(1, verb_twice, files, target)[0]
    assert (sound, faulty) == (0, 1), output
    assert "this configuration computes what Hugging Face computes" in output
    written = json.loads((tmp_path / "sound" / "audit.json").read_text())
    assert written["holds"] and written["subject"]["samples"] and len(written["subject"]["model_hash"]) == 32
    assert written["versions"]["torch"] == torch.__version__ and "lr: 0.003" in written["config"]
    assert "holds" in (tmp_path / "sound" / "audit.html").read_text()
    assert not json.loads((target / "audit.json").read_text())["holds"]


def test_what_cannot_be_compared_is_refused(files: Path) -> None:
    with pytest.raises(ConfigError, match=r"rlvr.kind is gspo: its clip range .* audit with --dtype float32"):
        audited(files, "rlvr", ["rlvr.kind=gspo"], dtype="bfloat16")


def test_nothing_compared_does_not_hold() -> None:
    assert not Certificate({}, {}, []).holds
    assert not Certificate({}, {}, [Check("weights", "d", 1.0, [])]).holds
    nan = Check("loss", "d", 1.0, [Difference("a", 0.0), Difference("b", float("nan"))])
    assert not nan.holds and nan.worst.place == "b" and nan.first_failure == nan.differences[1]
