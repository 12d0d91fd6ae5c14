"""Every kind of policy loss, importance weights, dynamic sampling and overlong rewards through the real stage.

The verdicts are of a made-up verifier (a hash of the text), so that groups differ without learning anything first.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.forked import WorkerError
from tests.rlvr import tiny_rlvr
from tests.rlvr.tiny_rlvr import Stopped, in_processes, metrics, rlvr_config, same_metrics
from tulu_hpc.config.loader import ConfigError, load_config
from tulu_hpc.config.rlvr_sections import KIND_DEFAULTS, RlvrSection
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.rollout import embedded
from tulu_hpc.rollout.engine import Completion, VersionSpan
from tulu_hpc.stages import rlvr, rlvr_rollouts
from tulu_hpc.stages.rlvr_off_policy import StaleError, require_fresh, staleness_metrics, steps_behind
from tulu_hpc.stages.rlvr_rollouts import shaped_rewards
from tulu_hpc.stages.rlvr_sampling import Wanted, next_wanted
from tulu_hpc.verifiers import Verdict

SHORT: dict[str, Any] = {"train__steps": 1, "train__save_every": None, "rlvr__minibatches": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent do not survive a fork
    return tiny_rlvr.write_inputs(tmp_path_factory.mktemp("inputs"))


def with_verdicts(score: Callable[[str], float], stage: Callable[[RlvrConfig], Any] = rlvr.run) -> Any:
    """The stage with verdicts by `score(text)`, and every answer taken for finished; to be run in a forked process."""

    def run(config: RlvrConfig) -> Any:
        rlvr_rollouts.verify_in_replica = lambda groups, pool, tasks: [Verdict(score(text)) for _, text in tasks]
        rlvr_rollouts.ended_itself = lambda completion: True
        return stage(config)

    return run


def by_hash(text: str) -> float:
    return float(zlib.crc32(text.encode()) % 2)


def several(*configs: RlvrConfig) -> Callable[[RlvrConfig], None]:
    """Several runs one after another in one process (one fork and one start for all)."""

    def run(_config: RlvrConfig) -> None:
        for config in configs:
            rlvr.run(config)

    return run


KINDS: dict[str, dict[str, Any]] = {kind: {"rlvr__kind": kind} for kind in KIND_DEFAULTS}
KINDS |= {
    "gspo-weighted": {"rlvr__kind": "gspo", "rlvr__importance": "sequence"},
    "grpo-sequence": {"rlvr__importance": "geometric", "rlvr__importance_mode": "mask"},
    "own-logprobs": {"rlvr__old_logprobs": "trainer"},
    "ppo-like": {"rlvr__dual_clip": 3.0, "rlvr__normalisation": "sequence_mean", "rlvr__importance": "token"},
}
# Kinds that need sums over an answer, or count answers, on two ranks too; the losses of all of them: tests/objectives.
LAYOUTS: dict[str, tuple[tuple[str, ...], int, dict[str, Any]]] = {
    "one": (tuple(KINDS), 1, {}),
    "cp2": (("gspo", "gspo-weighted", "grpo-sequence", "rloo"), 2, {"parallel__context": 2}),
    "dp2": (("gspo-weighted", "dr_grpo"), 2, {}),
}


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """The only step of every kind."""
    found = {}
    for layout, (names, world, options) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(layout)
        configs = [rlvr_config(inputs, folder / name, **SHORT, **options, **KINDS[name]) for name in names]
        in_processes(with_verdicts(by_hash, several(*configs)), configs[0], world)
        for name in names:
            (found[name, layout],) = metrics(folder / name)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_a_step_of_every_kind(runs: dict[tuple[str, str], dict[str, Any]], name: str) -> None:
    row = runs[name, "one"]
    assert row["train/updates"] == 2 and math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0
    kind = KINDS[name].get("rlvr__kind", "grpo")
    assert ("train/kl" in row) == (KIND_DEFAULTS[kind].get("kl_coef") != 0)
    assert ("rollout/extra_rounds" in row) == (kind == "dapo")
    assert row["rollout/staleness"] == row["rollout/staleness_max"] == 0
    assert row["rollout/logprob_error_max"] < 1e-4
    assert row["rollout/logprob_error_max"] == row["rollout/logprob_error_max/position_0-15"]
    assert row["rollout/logprob_error_mean"] == pytest.approx(row["rollout/logprob_error_mean/length_0-15"])
    if "rlvr__importance" in KINDS[name]:
        assert row["rollout/importance_mean"] == pytest.approx(1, abs=1e-4)  # on-policy
        assert row["rollout/importance_max"] == pytest.approx(1, abs=1e-4) and row["rollout/importance_limited"] == 0
    for layout, (names, *_) in LAYOUTS.items():
        if name not in names:
            continue
        other = runs[name, layout]
        assert {key for key in other if not key.startswith("timing/")} == {
            key for key in row if not key.startswith("timing/")
        }
        for key in ("train/loss", "train/grad_norm", "train/ratio", "train/clip_fraction", "train/kl"):
            assert other.get(key, 0.0) == pytest.approx(row.get(key, 0.0), rel=1e-4, abs=1e-5), (layout, key)
        for key in ("rollout/reward", "rollout/new_tokens", "train/tokens"):
            assert other[key] == row[key], (layout, key)


def test_own_logprobs_are_the_engines(runs: dict[tuple[str, str], dict[str, Any]]) -> None:
    """On-policy; and the comparison with the engine is of every token of the step, before the first update."""
    engine, own = runs["grpo", "one"], runs["own-logprobs", "one"]
    assert own["train/loss"] == pytest.approx(engine["train/loss"], abs=1e-5)
    assert own["rollout/logprob_error_max"] < 1e-4 and "rollout/importance_mean" not in own


def _stale(config: RlvrConfig) -> None:
    """The engine of the second replica never took new weights."""
    generate = embedded.EmbeddedEngine.generate_batch

    def stale(self: Any, requests: Any) -> Any:
        if self.groups.dp_rank == 1:
            self.version = 0
        return generate(self, requests)

    embedded.EmbeddedEngine.generate_batch = stale  # type: ignore[method-assign]  # of this forked process only
    rlvr.run(config)


def test_stale_samples_stop_every_rank(inputs: Path, tmp_path: Path) -> None:
    config = rlvr_config(inputs, tmp_path / "run", train__steps=2, train__save_every=None)
    words = r"StaleError: sample \w+#0 was drawn by weights 0, 1 rollout steps before those that are trained \(1\)"
    with pytest.raises(WorkerError, match=words) as error:
        in_processes(with_verdicts(by_hash, _stale), config, 2)
    assert str(error.value).count("StaleError: sample") == 2


def test_kinds_differ(runs: dict[tuple[str, str], dict[str, Any]]) -> None:
    losses = [runs[kind, "one"]["train/loss"] for kind in KIND_DEFAULTS]
    assert len({round(loss, 7) for loss in losses}) == len(losses)


def _drifted(config: RlvrConfig) -> None:
    """The engine's policy is another one than the trainer's: every token was less likely there."""
    generate = embedded.EmbeddedEngine.generate_batch

    def other(self: Any, requests: Any) -> Any:
        found = generate(self, requests)
        for completion in found:
            completion.logprobs[:] = [value - 0.1 for value in completion.logprobs]
        return found

    embedded.EmbeddedEngine.generate_batch = other  # type: ignore[method-assign]  # of this forked process only
    rlvr.run(config)


@pytest.mark.parametrize(
    ("changes", "mean", "limited"),
    [
        ({"importance": "token"}, math.exp(0.1), 0.0),
        ({"importance": "token", "importance_cap": 1.05}, 1.05, 1.0),
        ({"importance": "geometric", "importance_mode": "mask", "importance_cap": 1.05}, 0.0, 1.0),
    ],
)
def test_weights_of_another_policy(
    inputs: Path, tmp_path: Path, changes: dict[str, Any], mean: float, limited: float
) -> None:
    options = {f"rlvr__{key}": value for key, value in changes.items()}
    limits = {"rollout__mismatch_max": 1.0, "rollout__mismatch_mult_prob_error": 2.0}
    config = rlvr_config(
        inputs, tmp_path / "run", train__steps=1, train__save_every=None, rlvr__kl_coef=0.0, **options, **limits
    )
    in_processes(with_verdicts(by_hash, _drifted), config)
    (row,) = metrics(tmp_path / "run")
    assert row["rollout/importance_mean"] == pytest.approx(mean, rel=1e-4)
    assert row["rollout/importance_limited"] == limited
    assert row["rollout/logprob_error_max"] == pytest.approx(0.1, rel=1e-3)
    assert (row["train/grad_norm"] == 0) == (mean == 0)
    assert row["train/ratio"] == pytest.approx(1, abs=1e-5)  # to the trainer's own log-probs, not to the engine's


def test_a_mismatch_stops_before_training(inputs: Path, tmp_path: Path) -> None:
    """With importance weights the trainer's log-probs are at hand at every step and in every dtype."""
    config = rlvr_config(inputs, tmp_path / "run", **SHORT, rlvr__importance="token")
    words = (
        r"MismatchError: step 1: .*by up to 0\.1 \(limit 0\.001\).*; worst in sample \w+#\d at position \d of \d: "
        r"token \d+, trainer -\S+, engine -\S+, worst positions 0-15 \(mean 0\.1, max 0\.1\), worst lengths 0-15 .*"
        "nothing was trained"
    )
    with pytest.raises(WorkerError, match=words):
        in_processes(with_verdicts(by_hash, _drifted), config)


DYNAMIC: dict[str, Any] = {
    "rlvr__kind": "dapo",
    "rlvr__samples_per_prompt": 3,
    "rlvr__prompts_per_step": 5,
    "rlvr__overlong_buffer": 4,
    "train__steps": 4,
    "train__async_save": False,
}


@pytest.fixture(scope="module")
def dynamic(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of dapo."""
    run = tmp_path_factory.mktemp("dynamic") / "run"
    in_processes(with_verdicts(by_hash), rlvr_config(inputs, run, **DYNAMIC))
    return run


def test_dynamic_sampling_fills_every_step(dynamic: Path) -> None:
    rows = metrics(dynamic)
    assert all(row["train/updates"] == 1 and row["rollout/prompts_missing"] == 0 for row in rows)
    assert max(row["rollout/extra_rounds"] for row in rows) >= 1
    for row in rows:
        asked = row["rollout/prompts_asked"]
        # Of all prompts asked, those that decide are as many as the step wants.
        assert row["rollout/live_groups"] >= 5 / asked and asked >= 5
        assert row["rollout/reward"] < 10 * row["rollout/accuracy"]  # the penalty for length
    assert sum(row["rollout/prompts_asked"] for row in rows) > 20


@pytest.mark.parametrize("parallel", [{}, {"parallel__context": 2}])
def test_dynamic_sampling_does_not_depend_on_the_layout(
    inputs: Path, dynamic: Path, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    in_processes(with_verdicts(by_hash), rlvr_config(inputs, tmp_path / "run", **DYNAMIC, **parallel), 2)
    for found, wanted in zip(metrics(tmp_path / "run"), metrics(dynamic), strict=True):
        for name in ("rollout/reward", "rollout/prompts_asked", "rollout/extra_rounds", "train/tokens"):
            assert found[name] == pytest.approx(wanted[name]), name
        assert found["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-4, abs=1e-5)


def test_dynamic_sampling_resumes_at_its_prompts(inputs: Path, dynamic: Path, tmp_path: Path) -> None:
    config = rlvr_config(inputs, tmp_path / "run", **DYNAMIC)

    def dies(config: RlvrConfig) -> None:
        step_of = rlvr.rollout_step

        def step(learner: Any, number: int, **options: Any) -> Any:
            if number == 4:
                raise Stopped
            return step_of(learner, number, **options)

        rlvr.rollout_step = step
        rlvr.run(config)

    with pytest.raises(WorkerError, match="Stopped"):
        in_processes(with_verdicts(by_hash, dies), config)
    in_processes(with_verdicts(by_hash), config)
    assert same_metrics(tmp_path / "run") == same_metrics(dynamic)


def test_prompts_that_are_all_too_easy(inputs: Path, tmp_path: Path) -> None:
    options = {**SHORT, "rlvr__kind": "dapo", "rlvr__max_extra_rounds": 2}
    words = r"SamplingError: rlvr step 1: 6 of 6 prompts are missing .*max_extra_rounds = 2: 18 prompts were asked"
    with pytest.raises(WorkerError, match=words):
        in_processes(with_verdicts(lambda text: 1.0), rlvr_config(inputs, tmp_path / "run", **options))
    config = rlvr_config(inputs, tmp_path / "train", **options, rlvr__incomplete_step="train")
    in_processes(with_verdicts(lambda text: 1.0), config)
    (row,) = metrics(tmp_path / "train")
    assert row["rollout/prompts_missing"] == 6 and row["rollout/extra_rounds"] == 2 and row["train/updates"] == 0
    assert row["rollout/accuracy"] == 1 and row["rollout/live_groups"] == 0


def test_next_prompts() -> None:
    first = Wanted([0, 1, 2, 3], 40)
    second = next_wanted(first, {0: True, 3: False, 1: False, 2: True})
    assert second == Wanted([1, 3], 44)
    assert next_wanted(second, {1: True, 3: False}) == Wanted([3], 46)
    assert next_wanted(second, {1: True, 3: True}) == Wanted([], 46)


def completion(length: int, version: int = 0, *spans: VersionSpan) -> Completion:
    return Completion([1] * length, [-1.0] * length, "stop", 1, version, version_spans=spans)


def test_overlong_rewards(tmp_path: Path) -> None:
    """Eight tokens at most, of which the last four are the buffer."""
    answers = [completion(length) for length in (1, 4, 5, 6, 8)]
    config = rlvr_config(tmp_path, tmp_path / "r", rlvr__overlong_buffer=4)
    assert shaped_rewards([10, 10, 10, 0, 0], answers, config) == [10, 10, 7.5, -5, -10]
    config = rlvr_config(tmp_path, tmp_path / "r", rlvr__overlong_buffer=4, rlvr__overlong_penalty=2.0)
    assert shaped_rewards([10, 10, 10, 0, 0], answers, config) == [10, 10, 9.5, -1, -2]
    config = rlvr_config(tmp_path, tmp_path / "r")
    assert shaped_rewards([1, 2, 3, 4, 5], answers, config) == [1, 2, 3, 4, 5]


def test_staleness() -> None:
    versions = [0, 4, 6, 9]
    assert [steps_behind(completion(2, version), versions) for version in (9, 8, 6, 4, 1, 0)] == [0, 1, 1, 2, 3, 3]
    torn = completion(4, 9, VersionSpan(6, 0, 3), VersionSpan(9, 3, 4))
    assert steps_behind(torn, versions) == 1, "the oldest weights that drew a token count"
    ages = require_fresh([("a#0", completion(2, 9)), ("a#1", torn)], versions, most=1)
    assert staleness_metrics([ages, ages]) == {"rollout/staleness": 0.5, "rollout/staleness_max": 1.0}
    assert staleness_metrics([]) == {}
    with pytest.raises(StaleError, match=r"sample b#2 was drawn by weights 4, 2 rollout steps before .*\(9\)"):
        require_fresh([("a#0", completion(2, 9)), ("b#2", completion(2, 4))], versions, most=1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "dr_grpo", "advantage": "standard"}, "dr_grpo.*advantage standard"),
        ({"kind": "dr_grpo", "normalisation": "token_mean"}, "dr_grpo.*normalisation token_mean"),
        ({"kind": "rloo", "advantage": "centered"}, "rloo.*advantage centered"),
        ({"kind": "dapo", "normalisation": "sequence_mean"}, "dapo.*normalisation sequence_mean"),
        ({"kind": "dapo", "clip_high": 0.1}, "clip_high 0.1 is below clip_low 0.2"),
        ({"kind": "cispo", "dual_clip": 3.0}, "cispo.*dual_clip"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"importance_cap": 3.0}, "importance_cap.*need importance"),
        ({"importance_mode": "mask"}, "importance_mode needs importance"),
        ({"importance": "token", "importance_low": 0.1}, "importance_low is of importance_mode: mask"),
        ({"importance": "token", "importance_mode": "mask", "importance_cap": 0.1}, "0.5 is above importance_cap 0.1"),
        ({"overlong_penalty": 1.0}, "overlong_penalty needs overlong_buffer"),
        ({"kind": "ppo2"}, "kind"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RlvrSection(prompts_per_step=1, samples_per_prompt=2, **values)


def test_buffer_longer_than_answers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"overlong_buffer 9 is longer than rollout\.max_new_tokens 8"):
        rlvr_config(tmp_path, tmp_path / "r", rlvr__overlong_buffer=9)


def test_defaults_of_a_kind_are_resolved(tmp_path: Path) -> None:
    """What is not given is the kind's own and stands in the resolved configuration; the published file says no kind's
    numbers that an override of the kind would contradict."""
    config = load_config("configs/quickstart/rlvr.yaml", ["rlvr.kind=dr_grpo"], RlvrConfig)
    assert (config.rlvr.advantage, config.rlvr.normalisation, config.rlvr.kl_coef) == ("centered", "constant", 0.0)
    again = RlvrSection.model_validate(config.rlvr.model_dump())
    assert again == config.rlvr
    with pytest.raises(ConfigError, match="dr_grpo"):
        load_config("configs/tulu3.1/8b/grpo.yaml", ["rlvr.kind=dr_grpo"], RlvrConfig)
