"""What the backends of preference_loss get; the table of kinds.  Shapes: K scored tokens, Q sequences, P pairs."""

from typing import NamedTuple

from torch import Tensor


class Kind(NamedTuple):
    """code: its number inside the kernels.  mean: scores are per-token means.  reference: scores are log-ratios."""

    code: int
    mean: bool
    reference: bool
    smoothing: bool  # takes label_smoothing


# Codes: 0 sigmoid, 1 squared distance, 2 hinge, 3 log odds, 4 unpaired sigmoid.
SIGMOID, SQUARE, HINGE, ODDS, UNPAIRED = range(5)
KINDS = {
    "dpo": Kind(SIGMOID, mean=False, reference=True, smoothing=True),
    "dpo_norm": Kind(SIGMOID, mean=True, reference=True, smoothing=True),
    "cdpo": Kind(SIGMOID, mean=False, reference=True, smoothing=True),
    "robust": Kind(SIGMOID, mean=False, reference=True, smoothing=True),
    "simpo": Kind(SIGMOID, mean=True, reference=False, smoothing=True),
    "ipo": Kind(SQUARE, mean=True, reference=True, smoothing=False),
    "hinge": Kind(HINGE, mean=False, reference=True, smoothing=False),
    "orpo": Kind(ODDS, mean=True, reference=False, smoothing=False),
    "kto": Kind(UNPAIRED, mean=False, reference=True, smoothing=False),
}
# Order of the vector that the kernels fill; entry 0 is the loss.
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
    "counts/chosen",
    "counts/rejected",
    "loss/sft",
    "weights",
)
# Mean log-probs above -ODDS_LIMIT are taken as that: the odds of a certain sequence are infinite.
ODDS_LIMIT = 1e-6


class Options(NamedTuple):
    """The numbers of one call."""

    kind: str
    beta: float
    label_smoothing: float
    gamma: float
    sft_weight: float
    desirable_weight: float
    undesirable_weight: float
    kl: float  # used where the problem has no tensor `kl`
    wpo: bool

    @property
    def table(self) -> Kind:
        return KINDS[self.kind]

    @property
    def needs_lengths(self) -> bool:
        return self.table.mean or self.wpo or self.sft_weight != 0

    @property
    def softplus_weights(self) -> tuple[float, float]:
        """(a, b) of the sigmoid losses a softplus(-z) + b softplus(z)."""
        s = self.label_smoothing
        if self.kind == "robust":
            return (1 - s) / (1 - 2 * s), -s / (1 - 2 * s)
        return 1 - s, s

    @property
    def margin_shift(self) -> float:
        """Taken off the margin before the sigmoid."""
        return self.gamma if self.kind == "simpo" else 0.0


class Problem(NamedTuple):
    """The tensors of one call, contiguous. policy_sums_Q given: the sums are those, and the gradient is theirs."""

    logprobs_K: Tensor
    sequence_id_K: Tensor
    pairs_P2: Tensor
    reference_sums_Q: Tensor | None
    policy_sums_Q: Tensor | None
    lengths_Q: Tensor | None
    weights_P: Tensor | None
    alignment_sums_Q: Tensor | None
    kl: Tensor | None
    options: Options

    @property
    def sequences(self) -> int:
        for table in (self.reference_sums_Q, self.policy_sums_Q, self.lengths_Q):
            if table is not None:
                return table.shape[0]
        raise ValueError("no argument says how many sequences there are")

    @property
    def input(self) -> Tensor:
        """What the loss is differentiated by."""
        return self.logprobs_K if self.policy_sums_Q is None else self.policy_sums_Q
