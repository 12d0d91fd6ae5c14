"""What megatron-core gets wrong for us outside of checkpoints (those: test_checkpoint.py), each with and without its
repair: without it training fails or differs from one process, with it it does not.

Each case runs in forked processes, where the repair is taken away.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.forked import WorkerError, run_forked
from tests.training import invariance, tiny
from tests.training.invariance import Draw
from tulu_hpc.models import build
from tulu_hpc.models.llama import Llama
from tulu_hpc.models.norm import RMSNorm
from tulu_hpc.training import runner

Result = dict[str, Any]
GATHERED_LATE = {"overlap_grad_reduce": True, "overlap_param_gather": True, "gradient_bucket_size": 2000}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {tied: tiny.write_model(folder / str(tied), shape) for tied, shape in invariance.SHAPES.items()}


@pytest.fixture(scope="module")
def wanted(models: dict[bool, Path]) -> dict[bool, Result]:
    draws = [Draw(1, tied=tied) for tied in (False, True)]
    return dict(zip((False, True), run_forked(1, invariance.train_all, draws, models)[0], strict=True))


def case(world: int, *, tied: bool = False, **options: Any) -> Draw:
    return Draw(world, tuple(options.items()), tied=tied, pack_rows=48, packing_seed=1)


def run(draw: Draw, models: dict[bool, Path], unrepair: Callable[[], None], *, before: bool) -> list[Result]:
    """Training without the repair; `before`: preceded by training with it, in the same processes."""

    def work() -> list[Result]:
        results = [invariance.train(draw, models)] if before else []
        unrepair()
        return [*results, invariance.train(draw, models)]

    return run_forked(draw.world, work, timeout=60)[0]


def no_hooks_of_the_head() -> None:
    Llama._head = lambda self: self.output_layer.weight  # type: ignore[method-assign]


def no_marked_weights() -> None:
    build._mark_split_weights = lambda *_: None


def unmarked_norms() -> None:
    original = RMSNorm.__init__

    def init(self: RMSNorm, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]

    RMSNorm.__init__ = init  # type: ignore[method-assign]


def shared_head_counted_twice() -> None:
    original = Llama.setup_embeddings_and_output_layer

    def setup(self: Llama) -> None:
        original(self)
        if self.post_process and not self.pre_process:
            self.shared_embedding_or_output_weight().shared = False

    Llama.setup_embeddings_and_output_layer = setup  # type: ignore[method-assign]


def batched_exchange() -> None:
    original = runner.Runner.__post_init__

    def post_init(self: runner.Runner) -> None:
        original(self)
        self._config.batch_p2p_comm, self._config.overlap_p2p_comm = True, False

    runner.Runner.__post_init__ = post_init  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("draw", "unrepair", "message"),
    [
        (case(2, **GATHERED_LATE), no_hooks_of_the_head, "param_gather_handle is None"),
        (case(2, tied=True, pipeline=2, **GATHERED_LATE), no_hooks_of_the_head, "param_gather_handle is None"),
        (case(2, pipeline=2, virtual_pipeline=3), batched_exchange, r"rows for \d+ tokens|died without a word"),
    ],
    ids=["gathered head", "gathered tied head", "interleaved exchange"],
)
def test_without_the_repair_training_stops(
    models: dict[bool, Path], draw: Draw, unrepair: Callable[[], None], message: str
) -> None:
    """With the repair, test_invariance.py runs such layouts."""
    with pytest.raises(WorkerError, match=message):
        run(draw, models, unrepair, before=False)


@pytest.mark.parametrize(
    ("draw", "unrepair", "what"),
    [
        (case(2, tensor=2), no_marked_weights, "norms"),
        (case(2, tensor=2), unmarked_norms, "gradients"),
        (case(2, tied=True, pipeline=2), shared_head_counted_twice, "norms"),
    ],
    ids=["split weights", "norms under sequence parallelism", "tied head"],
)
def test_without_the_repair_training_differs(
    models: dict[bool, Path], wanted: dict[bool, Result], draw: Draw, unrepair: Callable[[], None], what: str
) -> None:
    good, broken = (
        invariance.differences(each, wanted[draw.tied]) for each in run(draw, models, unrepair, before=True)
    )
    assert max(good.values()) <= 1e-4, good
    assert broken[what] > 1e-3, broken
