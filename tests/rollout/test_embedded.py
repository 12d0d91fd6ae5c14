"""The embedded engine against transformers, and against itself in other batches and layouts.

Not proven here: that a sample survives a change of batch if a uniform number lies within rounding of a boundary (about
one token in a million), and anything on a GPU.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import reference
from tests.parallel.forked import run_forked, single_process
from tulu_hpc.data.tokenizer import train_tokenizer
from tulu_hpc.models.convert import save_hf
from tulu_hpc.parallel.layout import Layout, initialize
from tulu_hpc.rollout.embedded import EmbeddedEngine
from tulu_hpc.rollout.engine import Completion, EngineError, Request, Sampling
from tulu_hpc.rollout.texts import completion_text, ended_itself, stop_token_ids

SHAPE = reference.architecture(num_attention_heads=4, hidden_size=32, intermediate_size=64, max_position_embeddings=512)
STOPS = tuple(range(8))  # of 131 tokens, so that sequences end at different times


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_model(SHAPE, tmp_path_factory.mktemp("model") / "m")


def prompts(count: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [reference.tokens(3 + 5 * index, generator).tolist() for index in range(count)]


def requests(samples: int = 4, **changes: Any) -> list[Request]:
    sampling = Sampling(**{"max_new_tokens": 24, "temperature": 0.8, "stop_token_ids": STOPS, **changes})
    return [
        Request(prompt, sampling, seed=100 * index + sample, id=f"{index}/{sample}")
        for index, prompt in enumerate(prompts())
        for sample in range(samples)
    ]


def engine_of(groups: Any, path: Path, max_sequences: int = 64, tokenizer: Any = None) -> EmbeddedEngine:
    return EmbeddedEngine(reference.ours(SHAPE, path, groups), groups, SHAPE, tokenizer, max_sequences)


def hf_logprobs(path: Path, request: Request, completion: Completion, temperature: float) -> torch.Tensor:
    ids = torch.tensor([[*request.token_ids, *completion.token_ids]])
    with torch.no_grad():
        logits = reference.hf_model(path)(ids).logits[0, len(request.token_ids) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def test_greedy_tokens_are_those_of_transformers_on_the_export(model: Path, tmp_path: Path) -> None:
    """What we export generates the same tokens in transformers, ends included, and has the same log-probs."""
    asked = requests(samples=1, temperature=0.0)
    with single_process() as groups:
        engine = engine_of(groups, model)
        found = engine.generate_batch(asked)
        save_hf(engine.chunks, tmp_path / "hf", SHAPE, groups, source=model, dtype=torch.float32)
    theirs = reference.hf_model(tmp_path / "hf")
    assert {each.finish_reason for each in found} == {"stop", "length"}
    for request, completion in zip(asked, found, strict=True):
        prompt = torch.tensor([request.token_ids])
        output = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False,
            eos_token_id=list(STOPS), pad_token_id=0,
        )  # fmt: skip
        assert output[0, prompt.shape[1] :].tolist() == completion.token_ids
        difference = torch.tensor(completion.logprobs) - hf_logprobs(model, request, completion, 1.0)
        assert difference.abs().max() <= 1e-5


def test_logprobs_of_samples_are_at_the_sampling_temperature(model: Path) -> None:
    asked = requests(samples=2, temperature=0.6, top_p=0.9)
    with single_process() as groups:
        found = engine_of(groups, model).generate_batch(asked)
    for request, completion in zip(asked, found, strict=True):
        difference = torch.tensor(completion.logprobs) - hf_logprobs(model, request, completion, 0.6)
        assert difference.abs().max() <= 1e-5


def test_a_seed_gives_the_same_sample_in_any_batch(model: Path) -> None:
    asked = requests()
    with single_process() as groups:
        wanted = engine_of(groups, model).generate_batch(asked)
        assert len({tuple(each.token_ids) for each in wanted}) == len(asked)  # seeds differ, so samples do
        assert [each.id for each in wanted] == [each.id for each in asked]
        backwards = engine_of(groups, model).generate_batch(asked[::-1])[::-1]
        waves = engine_of(groups, model, max_sequences=5).generate_batch(asked)
        engine = engine_of(groups, model)
        alone = [engine.generate_batch([request])[0] for request in asked]
    for other in (backwards, waves, alone):
        assert [each.token_ids for each in other] == [each.token_ids for each in wanted]
        for one, two in zip(other, wanted, strict=True):
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)
            assert one.finish_reason == two.finish_reason


def test_ends(model: Path) -> None:
    mixed = [
        Request(prompts()[2], Sampling(max_new_tokens=limit, stop_token_ids=stops), seed=5, id=str(limit))
        for limit, stops in [(24, STOPS), (3, STOPS), (24, ()), (1, ())]
    ]
    with single_process() as groups:
        full, short, endless, one = engine_of(groups, model).generate_batch(mixed)
    assert endless.finish_reason == "length" and len(endless.token_ids) == 24 and endless.stop_reason is None
    cut = next((i for i, token in enumerate(endless.token_ids) if token in STOPS), 23)
    assert full.token_ids == endless.token_ids[: cut + 1]  # the same sample, ended by its stop token, which is kept
    assert (full.finish_reason == "stop") == (full.token_ids[-1] in STOPS) == ended_itself(full)
    assert short.token_ids == full.token_ids[:3] and one.token_ids == full.token_ids[:1]


class Letters:
    """A tokenizer whose token i is a letter, two tokens making up `!`."""

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids)


def test_stop_strings(model: Path) -> None:
    plain = requests(samples=2, stop_token_ids=())
    with single_process() as groups:
        free = engine_of(groups, model).generate_batch(plain)
        texts = [Letters().decode(each.token_ids) for each in free]
        stop = (texts[0][4:6], texts[3][7:9])
        asked = requests(samples=2, stop_token_ids=(), stop_strings=stop)
        found = engine_of(groups, model, tokenizer=Letters()).generate_batch(asked)
        with pytest.raises(ValueError, match="tokenizer"):
            engine_of(groups, model).generate_batch(asked)
    stopped = 0
    for text, completion in zip(texts, found, strict=True):
        ends = [text.find(string) + len(string) for string in stop if string in text]
        if not ends:
            assert completion.finish_reason == "length" and len(completion.token_ids) == 24
            continue
        stopped += 1
        assert len(completion.token_ids) == min(ends)
        assert completion.finish_reason == "stop" and completion.stop_reason in stop and not ended_itself(completion)
        assert completion_text(Letters(), completion) == text[: min(text.find(s) for s in stop if s in text)]
    assert stopped >= 2


def test_weights_that_change_are_seen_and_versions_are_kept(model: Path) -> None:
    asked = requests(samples=1)
    with single_process() as groups:
        engine = engine_of(groups, model)
        before = asyncio.run(engine.generate(asked))
        for parameter in engine.chunks[0].parameters():
            torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(1))
        asyncio.run(engine.update_weights(None, 3))
        after = asyncio.run(engine.generate(asked))
        with pytest.raises(EngineError, match="shares"):
            asyncio.run(engine.update_weights(iter([]), 4))
        assert asyncio.run(engine.health())["policy_version"] == 3
    assert {each.policy_version for each in before} == {0} and {each.policy_version for each in after} == {3}
    assert [each.token_ids for each in before] != [each.token_ids for each in after]


@pytest.mark.parametrize("token_ids", [[], [131], [-1]])
def test_bad_prompts(model: Path, token_ids: list[int]) -> None:
    with single_process() as groups, pytest.raises(ValueError, match="request 'x'"):
        engine_of(groups, model).generate_batch([Request(token_ids, Sampling(max_new_tokens=2), id="x")])


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"max_new_tokens": 1, "temperature": -1}, {"max_new_tokens": 1, "top_p": 0}]
)
def test_bad_sampling(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sampling needs"):
        Sampling(**wrong)


def generate_in(layout: Layout, path: Path) -> list[tuple[list[int], list[float]]]:
    groups = initialize(layout, seed=1)
    found = engine_of(groups, path, max_sequences=9).generate_batch(requests(samples=3))
    return [(each.token_ids, each.logprobs) for each in found]


LAYOUTS = {
    "tp2": Layout(tensor=2),
    "tp2 sp": Layout(tensor=2, sequence=True),
    "pp2": Layout(pipeline=2),
    "pp2 vpp2": Layout(pipeline=2, virtual_pipeline=2),
    "cp2": Layout(context=2),
    "dp2": Layout(),
    "tp2 sp pp2": Layout(tensor=2, pipeline=2, sequence=True),
    "cp2 tp2": Layout(context=2, tensor=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_the_same_samples(model: Path, name: str) -> None:
    layout = LAYOUTS[name]
    with single_process() as groups:
        wanted = engine_of(groups, model).generate_batch(requests(samples=3))
    ranks = run_forked(max(2, layout.model_parallel), generate_in, layout, model)
    for rank in ranks:  # every rank of a replica has all completions
        assert [tokens for tokens, _ in rank] == [each.token_ids for each in wanted]
        for (_, logprobs), each in zip(rank, wanted, strict=True):
            assert logprobs == pytest.approx(each.logprobs, abs=1e-5)
        assert rank == ranks[0] or layout.model_parallel == 1


def test_stop_token_ids(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a b c d"] * 3, vocab_size=300)
    assert stop_token_ids(tokenizer, tmp_path) == (tokenizer.eos_token_id,)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{tokenizer.eos_token_id}, 77]}}')
    assert stop_token_ids(tokenizer, tmp_path) == (tokenizer.eos_token_id, 77)
    tokenizer.eos_token = None
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="end-of-text"):
        stop_token_ids(tokenizer, tmp_path)
    assert os.listdir(tmp_path) == []
