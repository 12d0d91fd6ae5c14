"""Rewards that can be checked: final answers and instruction constraints, run in workers that can be killed."""

from tulu_hpc.verifiers import competition_math, gsm8k, ifeval  # importing a module registers its verifiers
from tulu_hpc.verifiers.registry import RULE_SETS, Verdict, check_record, register, verifier_names, verify

__all__ = [
    "RULE_SETS",
    "Verdict",
    "check_record",
    "competition_math",
    "gsm8k",
    "ifeval",
    "register",
    "verifier_names",
    "verify",
]
