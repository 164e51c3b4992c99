"""The step that trains what is left of a model."""

from typing import Literal, Self

from pydantic import Field

from slimlm.recipe.step import SELF, UNSAID, Step

TOKENS = 2_000_000
RATE, LORA_RATE = 2e-4, 2e-3  # a change of low rank takes about ten times as much


class RecoverStep(Step):
    """The weights of a compressed model trained towards the dense one; its zeros and widths stay."""

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
    learning_rate: float = Field(
        UNSAID,
        validate_default=False,
        gt=0,
        allow_inf_nan=False,
        description="recover: of AdamW, at its highest",
    )
    num_calibration_samples: int = Field(
        UNSAID, validate_default=False, ge=1, description="recover: windows of text; as many as the tokens fill"
    )

    @property
    def repairs(self) -> bool:
        return True

    @property
    def described(self) -> str:
        return f"{self.method}, {self.tokens:,} tokens"

    def fill(self) -> None:
        """Text that the teacher writes, where none is given, and a rate."""
        vars(self)["dataset"] = self.dataset or SELF
        vars(self)["learning_rate"] = self.learning_rate or (LORA_RATE if self.lora else RATE)

    def beside(self) -> Self:
        """The step, whose windows' length is known, with as many of them as it trains on, where it does not say."""
        count, share = self.num_calibration_samples, self.self_share if isinstance(self.dataset, str) else 0
        if count is None:
            assert self.max_seq_length is not None
            left = 1.0 if self.dataset == SELF else 1 - (share or 0)
            count = max(1, round(self.tokens / self.max_seq_length * left))
        return self.model_copy(update={"num_calibration_samples": count})
