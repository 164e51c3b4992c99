"""The step that trains what is left of a model."""

import math
from typing import ClassVar, Literal, Self

from pydantic import Field

from slimlm.recipe.step import SELF, UNSAID, Step

TOKENS = 2_000_000
HIDDEN_WEIGHT = 20.0
RATE, MASK_RATE, OF_STEPS = 2e-4, 6e-4, 100  # in so many steps; in others by the root of how many there are
MOST_STEPS = 16 * OF_STEPS  # that raise it
LORA_RATE, MFAC_RATE = 2e-3, 1e-3  # a change of low rank takes about ten times as much


class RecoverStep(Step):
    """The weights of a compressed model trained towards the dense one; its zeros and widths stay."""

    unread_because: ClassVar[dict[str, str]] = {
        **Step.unread_because,
        **dict.fromkeys(("mfac_gradients", "mfac_damping", "mfac_block"), "the optimizer is AdamW: add optimizer=mfac"),
    }

    method: Literal["recover"] = "recover"
    teacher: str | None = Field(
        None,
        description="recover: the dense model to train towards, a directory or hub id; by default the one that "
        "slimlm.json beside the model names, or the one that the recipe began with",
    )
    objective: Literal["kl", "cross-entropy"] = Field(
        "kl", description="recover: towards what the teacher predicts, or towards the tokens of the text"
    )
    tokens: int = Field(TOKENS, ge=1, description="recover: tokens to train on, the same text again where it ends")
    minutes: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="recover: train no longer than this, measured on the first steps"
    )
    lora: int = Field(
        0,
        ge=0,
        description="recover: train a change of this rank of every linear, merged in the end, instead of all weights",
    )
    optimizer: Literal["adamw", "mfac"] = Field(
        "adamw",
        description="recover: AdamW, or M-FAC, which steps by the inverse Fisher matrix of the last gradients and has "
        "them all in memory",
    )
    mfac_gradients: int = Field(32, ge=1, description="M-FAC as optimizer: gradients in its window")
    mfac_damping: float = Field(
        1e-4, gt=0, allow_inf_nan=False, description="M-FAC as optimizer: lambda, what is added to its Fisher matrix"
    )
    mfac_block: int = Field(
        0, ge=0, description="M-FAC as optimizer: neighbouring weights whose correlations count; 0 for all"
    )
    hidden_weight: float = Field(
        UNSAID,
        validate_default=False,
        ge=0,
        allow_inf_nan=False,
        description="recover: what the streams behind the blocks count for beside predictions",
    )
    teacher_top_k: int = Field(
        0,
        ge=0,
        description="recover: keep so many of the likeliest tokens of every prediction of the teacher, and train "
        "without it in memory; 0: all of them, the teacher beside",
    )
    gradient_checkpointing: bool = Field(
        False, description="recover: compute blocks once more for gradients, in less memory"
    )
    learning_rate: float = Field(
        UNSAID,
        validate_default=False,
        gt=0,
        allow_inf_nan=False,
        description="recover: of the optimizer, at its highest",
    )
    num_calibration_samples: int = Field(
        UNSAID, validate_default=False, ge=1, description="recover: windows of text; as many as the tokens fill"
    )

    @property
    def unread(self) -> set[str]:
        """What every step says, and M-FAC's settings where it is not the optimizer."""
        if self.optimizer == "mfac":
            return super().unread
        return super().unread | {name for name in self.unread_because if name.startswith("mfac_")}

    @property
    def repairs(self) -> bool:
        return True

    @property
    def described(self) -> str:
        return f"{self.method}, {self.tokens:,} tokens"

    def fill(self) -> None:
        """The teacher's own text, where none is given, and a rate that no model decides. Raises ValueError."""
        if self.hidden_weight and self.teacher_top_k:
            raise ValueError("hidden_weight needs the teacher beside: leave out teacher_top_k")
        vars(self)["dataset"] = self.dataset or SELF
        if not self.learning_rate and (self.lora or self.optimizer == "mfac"):
            vars(self)["learning_rate"] = LORA_RATE if self.optimizer == "adamw" else MFAC_RATE

    def rate(self, steps: int, zeros: float | None) -> float:
        """The learning rate for so many steps. zeros: the share of them in pruned matrices, if any are."""
        rate = (MASK_RATE if zeros else RATE) * math.sqrt(min(steps, MOST_STEPS) / OF_STEPS)
        return self.learning_rate or float(f"{rate:.2g}")

    def with_streams(self, known: bool) -> Self:
        """The step with what streams count for, where it does not say. known: what they are of the teacher's."""
        if self.hidden_weight is not None:
            return self
        counts = known and self.objective == "kl" and not self.teacher_top_k
        return self.model_copy(update={"hidden_weight": HIDDEN_WEIGHT if counts else 0.0})

    def beside(self) -> Self:
        """The step, whose windows' length is known, with as many of them as it trains on, where it does not say."""
        count, share = self.num_calibration_samples, self.self_share if isinstance(self.dataset, str) else 0
        if count is None:
            assert self.max_seq_length is not None
            left = 1.0 if self.dataset == SELF else 1 - (share or 0)
            count = max(1, round(self.tokens / self.max_seq_length * left))
        return self.model_copy(update={"num_calibration_samples": count})
