"""Conversion of models with another head: reward models (a scalar head), and language models with an fp32 head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification

from tests.models.test_convert import tensors
from tests.parallel.forked import WorkerError, run_forked
from tests.training import tiny, tiny_run
from tulu_hpc.cli.main import main
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.sections import ModelSection, ParallelSection
from tulu_hpc.models.comparison import compare
from tulu_hpc.models.conversion import export_hf, import_hf
from tulu_hpc.models.convert import save_hf
from tulu_hpc.models.model_files import open_model
from tulu_hpc.parallel.layout import initialize, layout_of
from tulu_hpc.training import saver
from tulu_hpc.training.trainer import build_trainer, load_model

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}),
}
KINDS = {"untied": tiny.ARCHITECTURE, "tied": tiny.TIED}


def save_reward_model(model: Path, folder: Path, options: dict[str, Any]) -> None:
    """A reward model with a new head: its checkpoint, and what a run exports."""
    parallel = ParallelSection(**options)
    groups = initialize(layout_of(parallel), seed=1)
    architecture = Architecture.from_hf(model)
    trainer = build_trainer(
        model=ModelSection(path=str(model)),
        parallel=parallel,
        optimizer=tiny.OPTIMIZER,
        recompute="none",
        total_steps=10,
        groups=groups,
        architecture=architecture,
        head="value",
        new_head_seed=3,
    )
    saver.save(trainer, folder / "checkpoints", {})
    save_hf(trainer.models, folder / "hf", architecture, groups, source=model)


def loaded_weights(path: Path, options: dict[str, Any], head: Any) -> list[Tensor]:
    parallel = ParallelSection(**options)
    groups = initialize(layout_of(parallel), seed=1)
    chunks = load_model(ModelSection(path=str(path)), groups, Architecture.from_hf(path), head=head)
    return [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]


@pytest.mark.parametrize(("kind", "name"), [("untied", "tp2 pp2"), ("tied", "one process")])
def test_reward_models(kind: str, name: str, tmp_path: Path) -> None:
    """Checkpoint to Hugging Face and back: as the run exports it, the same bits on every rank of a model that reads it,
    and the same scores in transformers."""
    world, options = LAYOUTS[name]
    model = tiny.write_model(tmp_path / "lm", KINDS[kind])
    run_forked(world, save_reward_model, model, tmp_path, options)
    exported = tmp_path / "hf"
    step = next((tmp_path / "checkpoints").glob("step_*"))
    export_hf(step, tmp_path / "ours", base=model, max_shard_bytes=20_000, workers=2)
    theirs, ours = tensors(exported), tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys() and "score.weight" in ours and "lm_head.weight" not in ours
    assert all(torch.equal(theirs[each], ours[each]) for each in theirs)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config == json.loads((exported / "config.json").read_text())
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        scores = [
            LlamaForSequenceClassification.from_pretrained(path)(tokens).logits
            for path in (exported, tmp_path / "ours")
        ]
    assert scores[0].shape == (1, 1) and torch.equal(*scores)

    import_hf(exported, tmp_path / "imported", max_shard_bytes=20_000, workers=2)
    assert compare(open_model(step, model), open_model(tmp_path / "imported")) == []
    wanted = run_forked(world, loaded_weights, exported, options, "value")
    found = run_forked(world, loaded_weights, tmp_path / "imported", options, "value")
    assert all(torch.equal(a, b) for left, right in zip(wanted, found, strict=True) for a, b in zip(left, right))


def test_the_wrong_kind_of_import_is_refused(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "lm")
    import_hf(model, tmp_path / "imported_lm")
    run_forked(1, save_reward_model, model, tmp_path, {})
    import_hf(tmp_path / "hf", tmp_path / "imported_rm")
    with pytest.raises(WorkerError, match=r"imported_lm: has no score\.weight: it is a language model"):
        run_forked(1, loaded_weights, tmp_path / "imported_lm", {}, "value")
    with pytest.raises(WorkerError, match=r"imported_rm: has score\.weight: it is a reward model"):
        run_forked(1, loaded_weights, tmp_path / "imported_rm", {}, "logprobs")
    head = compare(open_model(tmp_path / "imported_lm"), open_model(tmp_path / "imported_rm"))
    assert {each.name for each in head} == {"lm_head.weight", "score.weight"}


def test_export_of_a_run_with_an_fp32_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default in the run's dtype, as its own export; the checkpoint itself holds two dtypes."""
    inputs = tiny_run.write_inputs(tmp_path)
    values = tiny_run.config(
        inputs, tmp_path / "run", "sft", model__dtype="bfloat16", model__fp32_head=True, train__steps=1
    )
    code, output = tiny_run.run_to_end("sft", tiny_run.write_config(values, tmp_path / "sft.yaml"))
    assert code == 0, output
    step = tmp_path / "run" / "checkpoints" / "step_1"
    stored = open_model(step, inputs / "model").tensors
    assert stored["lm_head.weight"].dtype == torch.float32 and stored["model.norm.weight"].dtype == torch.bfloat16
    with pytest.raises(SystemExit) as end:
        main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert end.value.code == 0, capsys.readouterr().err
    assert compare(open_model(tmp_path / "out"), open_model(tmp_path / "run" / "hf")) == []
