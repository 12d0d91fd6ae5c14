"""The quickstart's raw data: training sources with planted leaks, and evaluation sets."""

from __future__ import annotations

import json
from pathlib import Path

from tulu_hpc.config.schema import SyntheticConfig
from tulu_hpc.curation.synthetic.dataset import Sizes, generate
from tulu_hpc.data.rows import write_jsonl
from tulu_hpc.stages.step_files import check_files
from tulu_hpc.stages.tables import print_table


def run(config: SyntheticConfig) -> Path:
    """Write `output`/raw/<source>.jsonl, `output`/raw/leaks.json and `output`/eval/<set>.jsonl; return `output`.

    Raises:
        ConfigError: `output` cannot be written.
        ValueError: there are not as many distinct evaluation prompts as asked for.
    """
    check_files(config)
    section = config.synthetic
    output = Path(section.output)
    sizes = Sizes(
        sft_math=section.sft_math,
        sft_instructions=section.sft_instructions,
        preference_prompts=section.preference_prompts,
        rlvr=section.rlvr_prompts,
        eval_rows=section.eval_rows,
        leaks=section.leaks,
        show_working=section.show_working,
        follow_constraint=section.follow_constraint,
    )
    data = generate(sizes, config.run.seed)
    table = []
    for name, rows in data.sources.items():
        path = output / "raw" / f"{name}.jsonl"
        write_jsonl(path, rows)
        prompts = {row["messages"][0]["content"] for row in rows}
        table.append([name, len(rows), len(prompts), sum(leak["source"] == name for leak in data.leaks), str(path)])
    for name, rows in data.evals.items():
        path = output / "eval" / f"{name}.jsonl"
        write_jsonl(path, rows)
        table.append([name, len(rows), len({row.get("question") or row["prompt"] for row in rows}), 0, str(path)])
    leaks = output / "raw" / "leaks.json"
    leaks.write_text(json.dumps({"seed": config.run.seed, "rows": data.leaks}, indent=1) + "\n", encoding="utf-8")
    print_table(["file", "rows", "distinct prompts", "planted leaks", "path"], table)
    return output
