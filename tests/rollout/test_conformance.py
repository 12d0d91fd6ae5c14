"""The embedded engine under the test body of all engines."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.engines import vllm_server as real
from tests.parallel.forked import single_process
from tests.rollout.conformance import check_engine
from tulu_hpc.data.tokenizer import load_tokenizer
from tulu_hpc.models.build import build_model
from tulu_hpc.models.convert import load_hf
from tulu_hpc.rollout.embedded import EmbeddedEngine


def test_the_embedded_engine(tmp_path: Path) -> None:
    shape = real.write_model(tmp_path, tied=True)
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    with single_process() as groups:
        chunks = build_model(shape, groups)
        load_hf(chunks, tmp_path / "model", shape, groups)
        engine = EmbeddedEngine(chunks, groups, shape, tokenizer, max_sequences=5)  # fewer slots than requests
        asyncio.run(engine.update_weights(None, 4))
        check_engine(engine, real.hf_model(tmp_path), tokenizer, 4, shape.max_position_embeddings)
