"""The steps that set single weights to zero: the table of methods, and what of a row a step sets otherwise."""

import re
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from slimlm.plain import Json
from slimlm.recipe.step import REFINE, REFIT, SPARSITY, UNSAID, Step, require_share

CurvatureName = Literal["none", "diagonal", "gram", "gram+fisher", "fisher", "block-fisher"]
MASKS = ("magnitude", "wanda", "obs", "columns", "greedy", "taylor", "random")
UPDATES = ("none", "left-to-right", "summed", "joint")
Allocation = Literal["uniform", "global", "owl", "alphapruning", "pq", "solved"]
PATTERN = r"[1-9]\d*:([1-9]\d*)"
TILE = r"([1-9]\d*)x([1-9]\d*)"


class Row(NamedTuple):
    """What a pruning method is, where a recipe does not say otherwise.

    refits: whether kept weights aim at what the dense model computes, and the head is refitted.
    """

    curvature: CurvatureName
    mask: str
    update: str
    swaps: int = 0
    allocation: Allocation = "uniform"
    refits: bool = False


ROWS = {
    "slimlm": Row("gram", "columns", "joint", swaps=6, refits=True),
    "sparsegpt": Row("gram", "columns", "left-to-right"),
    "obc": Row("gram", "greedy", "joint"),
    "mfac": Row("fisher", "obs", "summed", allocation="global"),
    "woodfisher": Row("block-fisher", "obs", "summed", allocation="global"),
    "wanda": Row("diagonal", "wanda", "none"),
    "taylor": Row("fisher", "taylor", "none"),
    "random": Row("none", "random", "none"),
    "magnitude": Row("none", "magnitude", "none"),
}
GRAMS = ("gram", "gram+fisher")
FISHERS = ("fisher", "block-fisher")


class PruneStep(Step):
    """Single weights set to zero. What the step does not say, its method's row has filled in.

    rows: by method; a method that is not in the table has a class of steps of its own, and its row is there.
    """

    rows: ClassVar[dict[str, Row]] = ROWS

    unread_because: ClassVar[dict[str, str]] = {
        **Step.unread_because,
        "refine": "only what aims at the dense model is refined towards it",
        "refit": "only slimlm with its joint update aims at the dense model",
        "swaps": "only the mask of update joint is refined",
        "allocation": "a pattern prunes every matrix alike",
        "reorder": "neurons are ordered for tiles, where no gradients know them by their places",
        "fisher_samples": "gradients are for curvatures with a Fisher matrix, and for allocation global with data",
        "fisher_unit": "gradients are for curvatures with a Fisher matrix, and for allocation global with data",
        "fisher_labels": "gradients are for curvatures with a Fisher matrix, and for allocation global with data",
        "fisher_damping": "only an inverse of the Fisher matrix is damped by it",
    }

    sparsity: float = Field(description=SPARSITY)
    pattern: str | None = Field(
        None,
        description="pruning: keep N weights of every M neighbours, as in 2:4; or, with a sparsity, tiles of outputs x "
        "inputs that go or stay as a whole, as in 16x16",
    )
    allocation: Allocation = Field(
        UNSAID,
        validate_default=False,
        description="pruning: how much each matrix takes: uniform, global, owl, alphapruning, pq or solved",
    )
    curvature: CurvatureName = Field(UNSAID, validate_default=False, description="pruning: what is known of the loss")
    mask: str = Field(UNSAID, validate_default=False, description="pruning: how weights are chosen")
    update: str = Field(UNSAID, validate_default=False, description="pruning: what the weights that stay do about it")
    swaps: int = Field(
        UNSAID,
        validate_default=False,
        ge=0,
        description="pruning: times, at most, that a mask with a joint update is refined by swaps",
    )
    refit: bool = Field(True, description=REFIT)
    refine: int = Field(UNSAID, validate_default=False, ge=0, description=REFINE)
    reorder: bool = Field(
        True,
        description="pruning tiles: order the MLP's neurons by weight first, so that what is kept gathers (not with "
        "gradients, nor in mixtures of experts)",
    )
    fisher_samples: int = Field(
        256, ge=1, description="pruning: tokens, or sequences, whose gradients are the Fisher information"
    )
    fisher_unit: Literal["token", "sequence"] = Field(
        "token", description="pruning: a gradient for every token, or one for every whole window"
    )
    fisher_labels: Literal["model", "text"] = Field(
        "model", description="pruning: gradients for tokens the model would predict, or for those of the text"
    )
    fisher_damping: float = Field(0.1, gt=0, description="pruning: of the Fisher information, in mean diagonals")

    @property
    def repairs(self) -> bool:
        """Only with the joint update."""
        return self.refit and self._can_refit

    @property
    def needs_gradients(self) -> bool:
        return "fisher" in self.curvature or (self.allocation == "global" and self.curvature != "none")

    @property
    def _can_refit(self) -> bool:
        return self.rows[self.method].refits and self.update == "joint"

    @property
    def unread(self) -> set[str]:
        needless = {
            "allocation": self.pattern is not None,
            "swaps": self.update != "joint",
            "refit": not self._can_refit,
            "refine": not self.repairs,
            "reorder": self.tile is None or "fisher" in self.curvature,
            "fisher_damping": self.curvature not in FISHERS or self.mask == "taylor",
            **dict.fromkeys(("fisher_samples", "fisher_unit", "fisher_labels"), not self.needs_gradients),
        }
        return super().unread | {name for name, is_needless in needless.items() if is_needless}

    @property
    def share(self) -> float | None:
        return self.sparsity

    @property
    def described(self) -> str:
        pattern = f" in tiles of {self.pattern}" if self.tile else f" ({self.pattern})" if self.pattern else ""
        return f"{self.method}, sparsity {self.sparsity:g}{pattern}"

    @property
    def pattern_sizes(self) -> tuple[int, int]:
        """(N kept, of M) of the pattern; (0, 0) for tiles, or none."""
        if self.tile or not self.pattern:
            return 0, 0
        keep, _, group = self.pattern.partition(":")
        return int(keep), int(group)

    @property
    def tile(self) -> tuple[int, int] | None:
        """Outputs and inputs of the pattern's tiles."""
        sizes = re.fullmatch(TILE, self.pattern or "")
        return (int(sizes[1]), int(sizes[2])) if sizes else None

    @field_validator("method")
    @classmethod
    def _is_a_row(cls, value: str) -> str:
        if value not in cls.rows:
            raise ValueError(f"{value!r} sets no weights to zero, as {', '.join(cls.rows)} do")
        return value

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_pattern(cls, values: Json) -> Json:
        """A pattern says how sparse; a sparsity given beside it must be the same."""
        if not isinstance(values, Mapping):
            return values
        pattern = values.get("pattern")
        if pattern is None or (isinstance(pattern, str) and re.fullmatch(TILE, pattern)):
            return values
        if not isinstance(pattern, str) or not re.fullmatch(PATTERN, pattern):
            raise ValueError(f"pattern {pattern!r} is neither N:M, as in 2:4, nor tiles of RxC, as in 16x16")
        keep, group = map(int, pattern.split(":"))
        if keep >= group:
            raise ValueError(f"pattern {pattern} keeps all: N must be smaller than M")
        sparsity = values.get("sparsity", 1 - keep / group)
        if isinstance(sparsity, (int, float)) and abs(sparsity - (1 - keep / group)) > 1e-9:
            raise ValueError(f"pattern {pattern} is a sparsity of {1 - keep / group:g}, not {sparsity:g}")
        return {**values, "sparsity": sparsity}

    def fill(self) -> None:
        """Take from the method's row what was not given. Raises ValueError for a mask or an update there is not."""
        row = self.rows[self.method]
        own = {**row._asdict(), "allocation": "uniform" if self.pattern else row.allocation}
        own["swaps"] = row.swaps if (self.update or row.update) == "joint" else 0
        for name in ("allocation", "curvature", "mask", "update", "swaps"):
            if getattr(self, name) is None:
                vars(self)[name] = own[name]  # what was not given is not among the fields that were
        for kind, value, known in (("mask", self.mask, MASKS), ("update", self.update, UPDATES)):
            if value not in (*known, own[kind]):
                raise ValueError(f"{kind} {value!r} is none of {', '.join(known)}")

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        require_share(self.sparsity)
        if self.curvature == "gram+fisher" and self.fisher_unit == "sequence":
            raise ValueError("curvature gram+fisher puts gradients of tokens beside the Gram, not of sequences")
        if self.mask == "greedy" and self.tile:
            raise ValueError(f"mask greedy takes weights one by one, not tiles of {self.pattern}")
        return self
