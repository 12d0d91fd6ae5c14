"""`python -m tests.engines.faulty_rlvr CONFIG FOLDER`: rlvr, noting the samples of every step in FOLDER.

A process of its own, to be killed. A step that is repeated after a kill writes its file anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tulu_hpc.config.loader import load_config
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.stages import rlvr, rlvr_rollouts, rlvr_step


def main() -> None:
    config, folder = load_config(sys.argv[1], [], RlvrConfig), Path(sys.argv[2])
    sample_groups = rlvr_step.sample_groups

    def noted(learner: Any, step: int, *rest: Any) -> Any:
        found = sample_groups(learner, step, *rest)
        ids = [
            f"{group.prompt.record.id}, step {step}, prompt {group.number}, sample {sample}"
            for group in found.groups
            for sample, _ in enumerate(group.completions)
        ]
        (folder / f"{step:04d}.json").write_text(json.dumps(ids))
        return found

    rlvr_step.sample_groups = noted
    # Every group gets advantages, so that weights change and are sent at every step.
    rlvr_rollouts.group_advantages = lambda rewards, kind: [float(n % 2) - 0.5 for n in range(len(rewards))]
    rlvr.run(config)


if __name__ == "__main__":
    main()
