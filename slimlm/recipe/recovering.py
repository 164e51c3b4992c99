"""The step that trains what is left of a model."""

import math
from typing import ClassVar, Literal, Self

from pydantic import Field

from slimlm.recipe.step import SELF, UNSAID, Step

TOKENS = 2_000_000
OFTEN = 4  # passes over a text that teach about as much as new text would (arXiv 2305.16264)
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
    tokens: int = Field(
        TOKENS, ge=1, description="recover: tokens to train on, of which the teacher writes what the given text has not"
    )
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
        description="recover: what the streams behind the blocks count for beside predictions, at first",
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

    @property
    def filled(self) -> int:
        """How many windows, whose length is known, the tokens fill."""
        assert self.max_seq_length is not None
        return math.ceil(self.tokens / self.max_seq_length)

    def times(self, given: int) -> int:
        """How often so many given windows are seen while what the teacher writes, beside as much, is once."""
        return 1 if self.minutes else max(1, min(OFTEN, (self.filled - self.own_windows) // max(1, given)))

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
        left = 1 - (self.self_share or 0) * (isinstance(self.dataset, str) and self.dataset != SELF)
        count = self.num_calibration_samples or max(1, round(self.filled * left))
        return self.model_copy(update={"num_calibration_samples": count})
