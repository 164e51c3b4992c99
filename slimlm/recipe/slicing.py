"""The steps that change widths, or only turn the stream."""

import re
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from slimlm.recipe.step import REFINE, REFIT, SPARSITY, UNSAID, WEIGHTING, Step, require_share


class SliceStep(Step):
    """Smaller widths: fewer directions of the residual stream, neurons, key/value groups, blocks."""

    method: Literal["slice"] = "slice"
    sparsity: float = Field(0.0, description=SPARSITY)
    latency: float | None = Field(
        None,
        description="slicing: instead of a sparsity, the share of its time for a token, above 0 and below 1, that the "
        "model is to take at most when it decodes on this machine, as predicted from products that are timed before",
    )
    widths: str | None = Field(
        None,
        description="slicing: widths by hand, as in hidden=224,mlp=496 (also groups, blocks), or several to "
        "choose from by the loss, with / between them",
    )
    round_to: int | None = Field(
        None,
        ge=1,
        description="slicing: new widths are multiples of this; by default of 32, which quantised formats and kernels "
        "take, and of 64 or 256 where that costs hardly more, or of 16, 8, 4, 2, 1 to get there",
    )
    basis: Literal["shared", "per-block"] = Field(
        "shared",
        description="slicing: one basis for the whole model, or SliceGPT as published, which no stock class can load",
    )
    budget: Literal["all", "hidden"] = Field(
        "all", description="slicing: spend the sparsity over all widths, or on hidden_size alone"
    )
    refit: bool = Field(True, description=REFIT)
    refine: int = Field(UNSAID, validate_default=False, ge=0, description=REFINE)
    weighting: Literal["loss", "none"] = Field("loss", description=WEIGHTING)

    unread_because: ClassVar[dict[str, str]] = {
        **Step.unread_because,
        "refine": "what is not refitted is not refined either",
    }

    @property
    def repairs(self) -> bool:
        """Only what is refitted in one basis."""
        return self.refit and self.basis == "shared"

    @property
    def unread(self) -> set[str]:
        """The settings that decide nothing in this run."""
        return {*super().unread, *(() if self.repairs else ("refine",))}

    @property
    def share(self) -> float | None:
        return None if self.widths or self.latency else self.sparsity

    @property
    def extent(self) -> str:
        if self.latency:
            return f"latency-{self.latency * 100:g}"
        by_hand = (self.widths or "").replace("=", "").replace(",", "-").replace("/", "-or-")
        return by_hand or super().extent

    @property
    def described(self) -> str:
        asked = f"latency {self.latency:g}" if self.latency else f"sparsity {self.sparsity:g}"
        return f"{self.method}, " + (f"widths {self.widths}" if self.widths else asked)

    @property
    def measures_widths(self) -> bool:
        """Whether they are chosen by what cutting each alone costs."""
        return len(self.width_choices) > 1 or (self.refit and self.budget == "all" and not self.widths)

    @property
    def width_choices(self) -> list[dict[str, int]]:
        """The widths set by hand; several where one of them is to be chosen."""
        choices = ([pair.partition("=") for pair in choice.split(",")] for choice in (self.widths or "").split("/"))
        return [{name.strip(): int(width) for name, _, width in pairs} for pairs in choices] if self.widths else []

    @field_validator("widths")
    @classmethod
    def _widths_of_known_axes(cls, value: str | None) -> str | None:
        for pair in re.split("[,/]", value) if value is not None else ():
            if not re.fullmatch(r"\s*(hidden|mlp|groups|blocks|tied)=[1-9]\d*\s*", pair):
                raise ValueError(f"widths are like hidden=224,mlp=496,groups=2,blocks=6, not {pair!r}")
        return value

    @model_validator(mode="after")
    def _says_how_much(self) -> Self:
        asked = [name for name in ("latency", "widths") if getattr(self, name) is not None]
        asked += ["sparsity"] if "sparsity" in self.model_fields_set else []
        if len(asked) > 1:
            raise ValueError(f"{asked[0]} says how much goes: leave out {asked[1]}, or {asked[0]}")
        if not asked:
            raise ValueError("'sparsity' is not given")
        if asked == ["sparsity"]:
            require_share(self.sparsity)
        if self.latency is not None:
            require_share(self.latency, "latency is the share of the time that is left")
            if self.basis == "per-block":
                raise ValueError("latency is for one basis: leave out basis, or give a sparsity")
        return self


class RotateStep(Step):
    """The residual stream in order of importance, nothing deleted."""

    unread_because: ClassVar[dict[str, str]] = {
        **Step.unread_because,
        "skip": "a rotation of the stream changes every module",
    }

    method: Literal["rotate"] = "rotate"
    weighting: Literal["loss", "none"] = Field("loss", description=WEIGHTING)

    @property
    def unread(self) -> set[str]:
        return {*super().unread, "skip"}
