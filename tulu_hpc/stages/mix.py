"""Mixing sources into one training set."""

from __future__ import annotations

import json
from pathlib import Path

from tulu_hpc.config.schema import MixConfig
from tulu_hpc.data.mixing import Source, mix
from tulu_hpc.data.rows import write_jsonl
from tulu_hpc.stages.step_files import check_files, outputs_of
from tulu_hpc.stages.tables import print_table


def run(config: MixConfig) -> Path:
    """Write `mix.output` and, beside it, <name>.statistics.json; return the path of the mixture.

    Raises:
        ConfigError: the mixture would replace one of its sources, or lie in one.
        RecordError: a malformed row, unless `mix.on_error` is "skip".
        ValueError: no row comes out.
    """
    check_files(config)
    section = config.mix
    sources = [Source(s.name, s.path, s.count, s.fraction) for s in section.sources]
    output, statistics = outputs_of(config)
    result = mix(sources, section.kind, config.run.seed, on_error=section.on_error, weight_field=section.weight_field)
    write_jsonl(output, result.rows)
    statistics.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    headers = ["source", "rows", "skipped", "taken", "repeated", "missing", "share", "turns", "characters"]
    table: list[list[object]] = [
        [
            s.name,
            s.available,
            s.skipped,
            s.taken,
            s.repeated,
            s.missing,
            f"{s.share:.1%}",
            f"{s.turns_mean:.1f}",
            f"{s.characters_mean:.0f}",
        ]
        for s in result.statistics
    ]
    print_table(headers, table)
    for s in result.statistics:
        if s.missing:
            print(f"{s.name}: {s.missing} of the rows asked for do not exist")
    print(f"{len(result.rows)} rows: {output}")
    return output
