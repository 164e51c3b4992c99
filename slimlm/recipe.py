"""A recipe says everything about a run. YAML files and command-line flags both become one."""

import math
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from slimlm.errors import UserError, nearest

RECIPE_DIRECTORIES = (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes")
CurvatureName = Literal["none", "diagonal", "gram", "gram+fisher", "fisher", "block-fisher"]
MaskName = Literal["magnitude", "wanda", "obs", "columns", "greedy"]
UpdateName = Literal["none", "left-to-right", "summed", "joint"]
Allocation = Literal["uniform", "global", "owl", "alphapruning", "pq", "solved"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


PATTERN = r"[1-9]\d*:([1-9]\d*)"
SIZE = r"(?i)(?=[0.]*[1-9])(\d+(?:\.\d+)?)\s*([KMGT]i?B)"
UNITS = {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}
TILE = r"([1-9]\d*)x([1-9]\d*)"
# What a second run takes over from the first, where it does not say otherwise.
SHARED = (
    *("model", "dataset", "text_column", "num_calibration_samples", "max_seq_length", "batch_size", "seed", "dtype"),
    *("skip", "max_shard_size", "device", "trust_remote_code", "measure", "eval_text", "eval_windows", "output_dir"),
)
RAN_REMOTE_CODE = "ran_remote_code"  # in place of a permission, in recipes that slimlm writes
OF_THE_WHOLE = ("model", "revision", "trust_remote_code", "output_dir", "then", "expected", "shots", "schedule")


class Recipe(BaseModel):
    """What to compress, how, and with which data. Field names are the command line's flags."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, str_min_length=1)

    model: str = Field(description="hub id, directory, or `llama`, the small model that ships with slimlm")
    revision: str | None = Field(None, description="hub revision of the model")
    method: str = Field(
        "slice",
        description="how: `slice` gives smaller widths; `slimlm` (loses least), `sparsegpt`, `obc`, `mfac`, "
        "`woodfisher`, `wanda` and `magnitude` set weights to zero",
    )
    sparsity: float = Field(
        0.0, description="share to remove, above 0 and below 1: of all parameters (slice), or of the pruned matrices"
    )
    pattern: str | None = Field(
        None,
        description="pruning: keep N weights of every M neighbours, as in 2:4; or, with a sparsity, tiles of outputs x "
        "inputs that go or stay as a whole, as in 16x16",
    )
    round_to: int | None = Field(
        None,
        ge=1,
        description="slicing: new widths are multiples of this; by default of 32, which quantised formats and kernels "
        "take, and of 64 or 256 where that costs hardly more, or of 16, 8, 4, 2, 1 to get there",
    )
    skip: list[str] = Field(
        [],
        description="linears that stay as they are, by name or glob, as in `lm_head, *.down_proj`; "
        "slicing then cuts no width that one of these has, nor hidden_size, nor leaves out blocks",
    )
    widths: str | None = Field(
        None,
        description="slicing: widths by hand, as in hidden=224,mlp=496 (also groups, blocks), or several to "
        "choose from by the loss, with / between them",
    )
    basis: Literal["shared", "per-block"] = Field(
        "shared",
        description="slicing: one basis for the whole model, or SliceGPT as published, which no stock class can load",
    )
    budget: Literal["all", "hidden"] = Field(
        "all", description="slicing: spend the sparsity over all widths, or on hidden_size alone"
    )
    refit: bool = Field(
        True,
        description="slice, slimlm: aim the weights that are left, and the head, at what the dense model computes",
    )
    weighting: Literal["loss", "none"] = Field(
        "loss", description="slicing: weigh directions by what the loss feels, or by the size of the stream alone"
    )

    curvature: CurvatureName | None = Field(
        None, description="pruning: what is known of the loss, where not as in the method's paper"
    )
    reorder: bool = Field(
        True,
        description="pruning tiles: order the MLP's neurons by weight first, so that what is kept gathers (not with "
        "gradients, nor in mixtures of experts)",
    )
    mask: MaskName | None = Field(None, description="pruning: how weights are chosen, where not as in the paper")
    update: UpdateName | None = Field(
        None, description="pruning: what the weights that stay do about it, where not as in the paper"
    )
    swaps: int | None = Field(
        None, ge=0, description="pruning: times that a mask with a joint update is refined by swaps"
    )
    allocation: Allocation | None = Field(
        None,
        description="pruning: how much each matrix takes: uniform, global, owl, alphapruning, pq or solved; by default "
        "as in the method's paper",
    )
    shots: int = Field(
        1, ge=1, description="pruning: times that curvature is estimated anew, on the way to the sparsity"
    )
    schedule: Literal["cubic", "linear"] = Field(
        "cubic", description="pruning in several shots: how the sparsity grows; cubic prunes most of it at first"
    )
    then: dict[str, Any] | None = Field(
        None, description="settings of a second run on the result, as in {method: slimlm, pattern: 2:4}"
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

    dataset: str | None = Field(
        None,
        description="text file (.txt, .jsonl, .parquet), tokens (.npy), hub id, wikitext2, c4, alpaca, fineweb-edu, "
        "or self: text the model writes itself",
    )
    text_column: str = Field("text", description="column of the calibration data that holds the text")
    num_calibration_samples: int = Field(128, ge=1, description="calibration windows")
    max_seq_length: int | None = Field(None, ge=2, description="tokens in a calibration window")
    batch_size: int = Field(8, ge=1, description="windows that go through a block together")
    seed: int = Field(0, ge=0, lt=2**63, description="picks calibration windows and samples")

    dtype: DtypeName = Field(
        "auto", description="dtype of the weights written, `auto` keeps the checkpoint's; float32, bfloat16, float16"
    )
    device: str = Field("auto", description="where to compute: auto, cpu, cuda or cuda:1")
    trust_remote_code: bool = Field(False, description="run modelling code that comes with the checkpoint")

    measure: bool = Field(True, description="measure perplexity before and after, block by block")
    eval_text: str | None = Field(None, description="text file to measure on")
    eval_windows: int = Field(128, ge=1, description="windows to measure on")

    max_shard_size: str = Field("5GB", description="largest weight file, as in 2GB or 500MB")
    output_dir: str | None = Field(None, description="where the result goes")
    expected: dict[str, float] = Field({}, description="figures this recipe gave when it was written")

    @property
    def stages(self) -> list["Recipe"]:
        """The runs that a recipe comes to, each on what the one before gave; itself for most.

        Over k shots the sparsity s grows as s (1 - (1 - i / k)^3) (Zhu & Gupta, arXiv 1710.01878, eq. 1) or linearly.
        """
        whole = self.model_dump(exclude_unset=True, exclude={"shots", "schedule", "then", "expected"})
        power = 3 if self.schedule == "cubic" else 1
        grown = [1 - (1 - shot / self.shots) ** power for shot in range(1, self.shots + 1)]
        runs = [whole] if self.shots == 1 else [{**whole, "sparsity": self.sparsity * share} for share in grown]
        if self.then is not None:
            runs.append({name: whole[name] for name in SHARED if name in whole} | self.then)
            pattern = str(self.then.get("pattern"))
            sizes = re.fullmatch(PATTERN, pattern) or re.fullmatch(TILE, pattern)
            if sizes and self.method == "slice" and not self.widths and self.round_to is None:
                group = math.lcm(*map(int, sizes.groups()))
                # Of what divides 8 the widths taken by default are multiples anyway.
                if 8 % group:
                    runs[0]["round_to"] = 32 if 32 % group == 0 else group
        return [make_recipe(run, "recipe") for run in runs]

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

    @property
    def width_choices(self) -> list[dict[str, int]]:
        """The widths set by hand; several where one of them is to be chosen."""
        choices = ([pair.partition("=") for pair in choice.split(",")] for choice in (self.widths or "").split("/"))
        return [{name.strip(): int(width) for name, _, width in pairs} for pairs in choices] if self.widths else []

    @property
    def max_shard_bytes(self) -> int:
        number, unit = re.fullmatch(SIZE, self.max_shard_size).groups()  # type: ignore[union-attr]  # validated
        return int(float(number) * UNITS[unit.upper()])

    @field_validator("max_shard_size")
    @classmethod
    def _size_with_unit(cls, value: str) -> str:
        if not re.fullmatch(SIZE, value):
            raise ValueError(f"a size is like 5GB or 500MB, not {value!r}")
        return value

    @field_validator("skip", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """A list, or names with commas between them."""
        names = value.split(",") if isinstance(value, str) else value
        return [str(name).strip() for name in names] if isinstance(names, list) else names

    @field_validator("widths")
    @classmethod
    def _widths_of_known_axes(cls, value: str | None) -> str | None:
        for pair in re.split("[,/]", value) if value is not None else ():
            if not re.fullmatch(r"\s*(hidden|mlp|groups|blocks|tied)=[1-9]\d*\s*", pair):
                raise ValueError(f"widths are like hidden=224,mlp=496,groups=2,blocks=6, not {pair!r}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_pattern(cls, values: Any) -> Any:
        """A pattern says how sparse; a sparsity given beside it must be the same."""
        pattern = values.get("pattern") if isinstance(values, dict) else None
        if pattern is None or (isinstance(pattern, str) and re.fullmatch(TILE, pattern)):
            return values
        if not isinstance(pattern, str) or not re.fullmatch(PATTERN, pattern):
            raise ValueError(f"pattern {pattern!r} is neither N:M, as in 2:4, nor tiles of RxC, as in 16x16")
        keep, group = map(int, pattern.split(":"))
        if keep >= group:
            raise ValueError(f"pattern {pattern} keeps all: N must be smaller than M")
        sparsity = values.setdefault("sparsity", 1 - keep / group)
        if isinstance(sparsity, (int, float)) and abs(sparsity - (1 - keep / group)) > 1e-9:
            raise ValueError(f"pattern {pattern} is a sparsity of {1 - keep / group:g}, not {sparsity:g}")
        return values

    @model_validator(mode="after")
    def _of_stages(self) -> "Recipe":
        if self.shots > 1 and self.pattern:
            raise ValueError("a pattern is pruned in one shot: leave out shots")
        if unknown := [name for name in self.then or {} if name in OF_THE_WHOLE or name not in type(self).model_fields]:
            raise ValueError(f"then: {unknown[0]!r} is no setting of a second run")
        return self

    @model_validator(mode="after")
    def _in_range(self) -> "Recipe":
        """Widths given by hand, and a mere rotation, need no sparsity."""
        if self.widths and "sparsity" in self.model_fields_set:
            raise ValueError("widths say how sparse: leave out sparsity, or widths")
        if "sparsity" not in self.model_fields_set:
            if not self.widths and self.method != "rotate":
                raise ValueError("'sparsity' is not given")
        elif not 0 < self.sparsity < 1:
            meant = f": did you mean {self.sparsity / 100:g}?" if 2 <= self.sparsity < 100 else ""
            raise ValueError(f"sparsity is the share to remove, above 0 and below 1, not {self.sparsity:g}{meant}")
        return self


def make_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate values into a Recipe. Raises UserError naming the key, the nearest known one, and the reason.

    source: where the values stand; none for flags, which name themselves.
    """
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}" if source else _explain(error, "--")) from error


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, or one shipped with slimlm by its name; `overrides` win.

    Raises UserError when there is no such recipe or it is not valid.
    """
    path = find_recipe(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"recipe {path} is not a mapping of keys to values")
    source = f"recipe {path}"
    _refuse_trust(values, overrides or {}, source)
    recipe, written = make_recipe({**values, **(overrides or {})}, source), make_recipe(values, source)
    told = {name: getattr(written, name) for name in ("output_dir", "trust_remote_code")}
    same = recipe.model_copy(update=told) == written
    return recipe if same else recipe.model_copy(update={"expected": {}})  # another run's figures


def _refuse_trust(values: dict[str, Any], flags: dict[str, Any], source: str) -> None:
    """Whether code that comes with a model may run is for who runs it to say: recipes are handed on.

    Takes the note out that a recipe was run that way. Raises UserError for one that wants it without the flag.
    """
    if values.pop("trust_remote_code", False):
        raise UserError(
            f"{source}: trust_remote_code cannot be set in a file: take it out, and give --trust-remote-code"
        )
    if values.pop(RAN_REMOTE_CODE, False) and not flags.get("trust_remote_code"):
        raise UserError(
            f"{source} was run with code that comes with its model: read that, then add --trust-remote-code to run it"
        )


def find_recipe(name: str) -> Path:
    """Path of a recipe given as a path or as the name of one that ships with slimlm."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_recipes()
    key = name.removesuffix(".yaml")
    if key not in shipped:
        raise UserError(f"there is no recipe {name!r}{nearest(key, shipped)} (shipped: {', '.join(sorted(shipped))})")
    return shipped[key]


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with slimlm, by name."""
    return {path.stem: path for directory in RECIPE_DIRECTORIES for path in sorted(directory.glob("*.yaml"))}


def _explain(error: ValidationError, dashes: str = "") -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    key = dashes + key.replace("_", "-") if dashes and key else key
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, Recipe.model_fields)}"
    if first["type"] == "missing":
        return f"{key!r} is not given"
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
