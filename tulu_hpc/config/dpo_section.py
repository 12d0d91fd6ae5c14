"""Section `dpo`: which preference loss, on what, against which reference."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tulu_hpc.config.sections import Section


class DpoSection(Section):
    kind: Literal["dpo", "dpo_norm", "cdpo", "robust", "simpo", "ipo", "hinge", "orpo", "kto"] = Field(
        default="dpo_norm",
        description="Formulas and papers: kernels/preference_loss/reference.py. simpo and orpo need no reference; "
        "kto takes a pair as one desirable and one undesirable sequence, and single ones (`records`).",
    )
    records: Literal["pairs", "labels"] = Field(
        default="pairs",
        description="Rows of data.path: `chosen` and `rejected` answers to one prompt, or, for kto, `prompt`, "
        "`completion` and `label` (true: desirable).",
    )
    beta: float = Field(default=5.0, gt=0)
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of wrong preferences; not for ipo, hinge, orpo and kto."
    )
    gamma: float = Field(default=0.0, ge=0, description="Target margin of simpo, in units of the reward.")
    sft_weight: float | None = Field(
        default=None, ge=0, description="Of the chosen answer's mean negative log-prob; empty: 1 for orpo, else 0."
    )
    weight_field: str | None = Field(
        default=None,
        min_length=1,
        description="Field of every record with the weight (>= 0) of its whole loss; the mean stays one over the "
        "number of pairs. Empty: all weigh 1.",
    )
    weighting: Literal["none", "wpo"] = Field(
        default="none", description="`wpo`: pairs are weighted by their probability under the policy."
    )
    wpo_alignment: bool = Field(
        default=False,
        description="Of wpo: divide each token's probability by sum over the vocabulary of p^2, what a token that the "
        "policy samples has on average (the paper's sampled alignment). Costs a second pass of the head, without "
        "gradient.",
    )
    kl_baseline: float = Field(default=0.0, ge=0, description="Of kto: log-ratio that counts as neutral.")
    kl_estimate: bool = Field(
        default=False,
        description="Of kto with records: labels: the baseline is the mean log-ratio of each step's prompts with "
        "answers of other rows, as in the paper, instead of kl_baseline. Costs a forward pass over as many answers.",
    )
    desirable_weight: float = Field(default=1.0, ge=0, description="Of kto.")
    undesirable_weight: float = Field(default=1.0, ge=0, description="Of kto.")
    reference: Literal["cached", "resident"] = Field(
        default="cached",
        description="Log-probs of model.path on all pairs before the first step, kept on disk; or a second model in "
        "memory that reads each step's packs.",
    )
    reference_cache: str | None = Field(
        default=None, description="Directory of reference log-probs (may be made elsewhere); empty: in run.dir."
    )

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        if self.label_smoothing and self.kind in ("ipo", "hinge", "orpo", "kto"):
            raise ValueError(f"{self.kind} has no label_smoothing")
        if self.kind == "cdpo" and not self.label_smoothing:
            raise ValueError("cdpo needs label_smoothing > 0; without it, it is dpo")
        if self.reference == "resident" and not self.needs_reference:
            raise ValueError(f"{self.kind} needs no reference")
        if self.reference == "resident" and self.reference_cache is not None:
            raise ValueError("a resident reference has no reference_cache")
        if self.wpo_alignment and self.weighting != "wpo":
            raise ValueError(f"wpo_alignment belongs to weighting: wpo, not to {self.weighting}")
        if self.gamma and self.kind != "simpo":
            raise ValueError(f"gamma is the margin of simpo, {self.kind} has none")
        if self.records == "labels" and self.kind != "kto":
            raise ValueError(f"records: labels are answers without a partner, {self.kind} needs pairs; kto does not")
        if self.kind == "kto":
            if self.kl_estimate and (self.records != "labels" or self.kl_baseline):
                raise ValueError("kl_estimate needs records: labels, and takes the place of kl_baseline")
            if self.weighting != "none":
                raise ValueError("wpo weights pairs, the sequences of kto are unpaired")
        elif self.kl_baseline or self.kl_estimate or (self.desirable_weight, self.undesirable_weight) != (1, 1):
            raise ValueError(f"kl_*, desirable_weight and undesirable_weight belong to kto, not to {self.kind}")
        return self

    @property
    def needs_reference(self) -> bool:
        return self.kind not in ("simpo", "orpo")
