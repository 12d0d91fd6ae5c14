"""Rewards that can be checked: answers, instructions, programs and judges, run in workers that can be killed."""

from tulu_hpc.verifiers import (  # noqa: F401  (importing a module registers its verifiers)
    competition_math,
    gsm8k,
    ifeval,
    json_schema,
    judge,
    programs,
    strings,
)
from tulu_hpc.verifiers.registry import RULE_SETS, Verdict, check_record, register, verifier_names, verify

__all__ = ["RULE_SETS", "Verdict", "check_record", "register", "verifier_names", "verify"]
