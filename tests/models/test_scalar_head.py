"""Reward and value models: the scalar head equals transformers' LlamaForSequenceClassification, at any layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification

from tests.models.reference import architecture, mixed_items, ours, write_model
from tests.parallel.forked import run_forked, single_process
from tulu_hpc.config.sections import ModelSection
from tulu_hpc.data.packed_batch import Item, pack
from tulu_hpc.data.readout import with_readout
from tulu_hpc.models.build import build_model
from tulu_hpc.models.convert import load_hf, save_hf
from tulu_hpc.models.scalar_head import new_head_weight
from tulu_hpc.parallel.layout import Layout, initialize
from tulu_hpc.training.runner import Runner, row_multiple
from tulu_hpc.training.trainer import load_model

LAYOUTS = {
    2: {
        "tp2": Layout(tensor=2),
        "tp2 sp": Layout(tensor=2, sequence=True),
        "pp2": Layout(pipeline=2),
        "pp2 vpp2": Layout(pipeline=2, virtual_pipeline=2),
        "cp2": Layout(context=2),
    },
    4: {
        "tp2 sp pp2": Layout(tensor=2, pipeline=2, sequence=True),
        "cp2 tp2 sp": Layout(context=2, tensor=2, sequence=True),
    },
}
CASES = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts]


def write_reward_model(folder: Path, **shape: Any) -> Path:
    """A language model, given a new head (seed 3) and exported as a reward model."""
    arch = architecture(**shape)
    source = write_model(arch, folder / "lm")
    with single_process() as groups:
        chunks = build_model(arch, groups, head="value", device="cpu")
        load_hf(chunks, source, arch, groups, new_head_seed=3)
        save_hf(chunks, folder / "rm", arch, groups, source=source)
    return folder / "rm"


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("rm"))


def hf_reward_model(path: Path) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()


def whole(item: Item) -> list[Tensor]:
    return [torch.cat((item.prompt, response.tokens)) for response in item.responses]


def scores_and_values(path: Path, layouts: dict[str, Layout]) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Per layout: scores at the read-outs, and the values before every target of ordinary packs."""
    arch = architecture()
    found = {}
    for name, layout in layouts.items():
        groups = initialize(layout, seed=1)
        chunks = build_model(arch, groups, head="value", device="cpu")
        load_hf(chunks, path, arch, groups)
        runner = Runner.create(chunks, groups, arch)
        multiple = row_multiple(layout)
        readouts = pack([with_readout(item) for item in mixed_items(kinds="psgp")], multiple=multiple)
        packs = [pack(mixed_items(seed=seed), multiple=multiple) for seed in (0, 1)]
        found[name] = (runner.values([readouts])[0], runner.values(packs))
    return found


@pytest.fixture(scope="module")
def results(reward_model: Path) -> dict[tuple[int, str], Any]:
    found = {(1, "one"): run_forked(1, scores_and_values, reward_model, {"one": Layout()})[0]["one"]}
    for world, layouts in LAYOUTS.items():
        per_rank = run_forked(world, scores_and_values, reward_model, layouts)
        for name in layouts:
            for rank in per_rank[1:]:
                assert torch.equal(rank[name][0], per_rank[0][name][0]), "every rank has the same numbers"
            found[world, name] = per_rank[0][name]
    return found


@pytest.mark.parametrize(("world", "name"), [(1, "one"), *CASES])
def test_scores_and_values_are_those_of_transformers(
    results: dict[tuple[int, str], Any], reward_model: Path, world: int, name: str
) -> None:
    scores, values = results[world, name]
    theirs = hf_reward_model(reward_model)
    with torch.no_grad():
        wanted = torch.cat([theirs(s[None]).logits[0] for item in mixed_items(kinds="psgp") for s in whole(item)])
        torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)
        for seed, found in zip((0, 1), values, strict=True):
            expected = []
            for item in mixed_items(seed=seed):
                for sequence, response in zip(whole(item), item.responses, strict=True):
                    per_row = theirs.score(theirs.model(sequence[None]).last_hidden_state)[0, :, 0]
                    for t in range(len(response)):
                        place = len(item.prompt) + t
                        if place > 0 and (response.mask is None or response.mask[t]):
                            expected.append(per_row[place - 1])
            torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    assert float(scores.std()) > 0.1, "scores that are all the same would prove little"


def test_value_after_the_last_token_is_the_score(reward_model: Path) -> None:
    """What PPO's value model starts from: of a rollout cut one token short, the value before that token is the score of
    what is there."""
    (item,) = mixed_items(seed=4, kinds="g")
    with single_process() as groups:
        chunks = load_model(ModelSection(path=str(reward_model)), groups, architecture(), head="value")
        runner = Runner.create(chunks, groups, architecture())
        values = runner.values([pack([item])])[0]
        shorter = [Item("group", [r], prompt=item.prompt) for r in item.responses if len(r) > 1]
        for each in shorter:
            response = each.responses[0]
            each.responses[0] = type(response)(response.tokens[:-1])
        scores = runner.values([pack([with_readout(each) for each in shorter])])[0]
    last = torch.tensor([len(r) for r in item.responses]).cumsum(0) - 1
    wanted = values[[int(end) for end, r in zip(last, item.responses, strict=True) if len(r) > 1]]
    assert len(wanted) > 0
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)


def test_tied_language_model(tmp_path: Path) -> None:
    path = write_reward_model(tmp_path, tie_word_embeddings=True)
    theirs = hf_reward_model(path)
    arch = architecture(tie_word_embeddings=True)
    items = mixed_items(kinds="pp")
    with single_process() as groups:
        chunks = build_model(arch, groups, head="value", device="cpu")
        load_hf(chunks, path, arch, groups)
        (scores,) = Runner.create(chunks, groups, arch).values([pack([with_readout(i) for i in items])])
    with torch.no_grad():
        wanted = torch.cat([theirs(s[None]).logits[0] for item in items for s in whole(item)])
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)


def test_new_head_has_the_recipes_deviation(tmp_path: Path) -> None:
    weight = new_head_weight(4096, seed=0)
    assert float(weight.std()) == pytest.approx(1 / math.sqrt(4097), rel=0.05)
    assert abs(float(weight.mean())) < 4 * float(weight.std()) / 64
    assert torch.equal(weight, new_head_weight(4096, seed=0))
    assert not torch.equal(weight, new_head_weight(4096, seed=1))


def test_export_is_a_sequence_classification(reward_model: Path) -> None:
    config = json.loads((reward_model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    theirs = hf_reward_model(reward_model)
    assert theirs.config.num_labels == 1 and tuple(theirs.score.weight.shape) == (1, 64)
    assert torch.equal(theirs.score.weight, new_head_weight(64, seed=3))


def test_padding_equal_to_end_of_text_is_left_out(tmp_path: Path) -> None:
    arch = architecture()
    source = write_model(arch, tmp_path / "lm")
    config = json.loads((source / "config.json").read_text())
    for pad, kept in ((2, False), (5, True)):
        (source / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 3], "pad_token_id": pad}))
        with single_process() as groups:
            chunks = build_model(arch, groups, head="value", device="cpu")
            load_hf(chunks, source, arch, groups, new_head_seed=0)
            save_hf(chunks, tmp_path / "rm", arch, groups, source=source)
        assert ("pad_token_id" in json.loads((tmp_path / "rm" / "config.json").read_text())) is kept


def test_the_wrong_kind_of_model_is_refused(reward_model: Path) -> None:
    arch = architecture()
    with single_process() as groups:
        chunks = build_model(arch, groups, head="value", device="cpu")
        with pytest.raises(ValueError, match=r"lm: has no score.weight: it is a language model"):
            load_hf(chunks, reward_model.parent / "lm", arch, groups)
        with pytest.raises(ValueError, match=r"rm: has score.weight: it is a reward model"):
            ours(arch, reward_model, groups)
