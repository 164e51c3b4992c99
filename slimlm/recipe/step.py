"""What every run of a recipe has. Which settings it has beside that, its method says."""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, field_validator, model_validator
from pydantic_core import PydanticCustomError

from slimlm.plain import Json

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
SIZE = r"(?i)(?=[0.]*[1-9])(\d+(?:\.\d+)?)\s*([KMGT]i?B)"
UNITS = {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}
SPARSITY = "share to remove, above 0 and below 1: of all parameters (slice), or of the pruned matrices"
WEIGHTING = "slicing: weigh directions by what the loss feels, or by the size of the stream alone"
REFIT = "slice, slimlm: aim the weights that are left, and the head, at what the dense model computes"

REFINE = (
    "slice, slimlm: passes over the data in which every block's weights are refined together, by gradient descent "
    "towards what the dense block gives; 0 for none"
)
UNSAID: Any = None  # until the method, or what it is to work on, has filled it in
SELF = "self"
AUTO = "auto"


def bytes_of(size: str) -> int:
    """What a size as in 5GB or 500MB comes to. Raises ValueError for what is none."""
    found = re.fullmatch(SIZE, size)
    if not found:
        raise ValueError(f"a size is like 5GB or 500MB, not {size!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def require_share(share: float, said: str = "sparsity is the share to remove") -> None:
    """Raises ValueError for what is no share. said: of what it is one."""
    if not 0 < share < 1:
        meant = f": did you mean {share / 100:g}?" if 2 <= share < 100 else ""
        raise ValueError(f"{said}, above 0 and below 1, not {share:g}{meant}")


OF_HUB = ("dataset_config", "dataset_split", "dataset_revision")  # settings


class Meant(NamedTuple):
    """What of a dataset is meant: the column, where it is not to be found out; of one on the hub its configuration,
    split and revision, where these are not its own defaults and the training split."""

    column: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None


class Source(BaseModel):
    """Some of the calibration data: a share of the windows, or so many."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_min_length=1)

    source: str
    share: float | None = Field(None, gt=0)
    windows: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _says_how_much(self) -> Self:
        if (self.share is None) == (self.windows is None):
            raise ValueError(f"of {self.source!r} give a share, or a number of windows")
        return self


def mixture(text: str) -> str | list[dict[str, Json]]:
    """What `a.txt:0.7,self:0.3` says, in a file's form; other texts as they are. Raises ValueError where some sources
    have no share."""
    parts = [part.strip().rpartition(":") for part in text.split(",")]
    have = [bool(source and re.fullmatch(r"\d*\.?\d+", share)) for source, _, share in parts]
    if len(parts) < 2 or not any(have):
        return text
    if not all(have):
        raise ValueError(f"of several sources each needs its share, as in a.txt:0.7,b.txt:0.3: {text}")
    return [{"source": source, "share": float(share)} for source, _, share in parts]


class HasSteps(Protocol):
    """A method that is not in the table, as recipes know it."""

    @property
    def name(self) -> str: ...

    @property
    def steps(self) -> "type[Step]": ...


class Step(BaseModel):
    """What every run has: a model, data, a place for the result. Each field is a flag of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, str_min_length=1)
    # Why a setting that the method has may not be read.
    unread_because: ClassVar[dict[str, str]] = {
        "self_share": "the dataset says already how much the model is to write",
        "num_calibration_samples": "the dataset says how many windows of each source",
    }
    # The method that such steps are of, where it is not in the table.
    own_method: ClassVar[HasSteps | None] = None

    model: str = Field(description="hub id, directory, or `llama`, the small model that ships with slimlm")
    revision: str | None = Field(None, description="hub revision of the model")
    method: str = Field(
        description="how: `slice` gives smaller widths; `slimlm` (loses least), `sparsegpt`, `obc`, `mfac`, "
        "`woodfisher`, `wanda`, `taylor`, `magnitude` and `random` set weights to zero",
    )
    skip: list[str] = Field(
        [],
        description="linears that stay as they are, by name or glob, as in `lm_head, *.down_proj`; "
        "slicing then cuts no width that one of these has, nor hidden_size, nor leaves out blocks",
    )

    dataset: str | list[Source] | None = Field(
        None,
        description="file of texts or chats (.txt, .json, .jsonl, .csv, .parquet, .arrow, packed or not), folder or "
        "pattern of files, tokens (.npy), `-` for standard input, hub id, wikitext2, c4, alpaca, fineweb-edu, or self: "
        "text the model writes itself; or several and their shares, as in notes.txt:0.7,chats.jsonl:0.3",
    )
    self_share: float = Field(
        UNSAID,
        validate_default=False,
        ge=0,
        lt=1,
        description="of all calibration windows, the share that the model writes itself, beside those of the dataset, "
        "so that what no given text shows is kept, too; needs the whole model in memory",
    )
    text_column: str | None = Field(
        None,
        description="column of the calibration data that holds the text, or chat, where it cannot be told by itself",
    )
    dataset_config: str | None = Field(None, description="configuration of the datasets that are from the hub")
    dataset_split: str | None = Field(None, description="split of datasets from the hub, and of saved ones")
    dataset_revision: str | None = Field(None, description="hub revision of the datasets that are from there")
    num_calibration_samples: int = Field(
        UNSAID, validate_default=False, ge=1, description="calibration windows, or `auto`: as many as widths need"
    )
    max_seq_length: int | None = Field(None, ge=2, description="tokens in a calibration window")
    batch_size: int = Field(8, ge=1, description="windows that go through a block together")
    seed: int = Field(0, ge=0, lt=2**63, description="picks calibration windows and samples")

    dtype: DtypeName = Field(
        "auto", description="dtype of the weights written, `auto` keeps the checkpoint's; float32, bfloat16, float16"
    )
    device: str = Field("auto", description="where to compute: auto, cpu, cuda or cuda:1")
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the checkpoint; a recipe file cannot say so"
    )

    measure: bool = Field(True, description="measure perplexity before and after, block by block")
    eval_text: str | None = Field(None, description="text file to measure on")
    eval_windows: int = Field(
        UNSAID, validate_default=False, ge=1, description="windows to measure on, or `auto`: no more than are soon done"
    )

    max_shard_size: str = Field("5GB", description="largest weight file, as in 2GB or 500MB")
    output_dir: str | None = Field(None, description="where the result goes")

    @field_validator("num_calibration_samples", "eval_windows", mode="wrap")
    @classmethod
    def _or_auto(cls, value: Json, known: ValidatorFunctionWrapHandler) -> int | None:
        return None if value in (None, AUTO) else int(known(value))

    @property
    def meant(self) -> Meant:
        """What of the datasets is meant."""
        return Meant(self.text_column, self.dataset_config, self.dataset_split, self.dataset_revision)

    @property
    def repairs(self) -> bool:
        """Whether what is left of a model aims at what the dense one computes, rather than at what it did itself."""
        return False

    @property
    def unread(self) -> set[str]:
        """The settings that decide nothing in this run."""
        if isinstance(self.dataset, list):
            counted = all(source.windows for source in self.dataset)
            return {"self_share", *(["num_calibration_samples"] if counted else [])}
        return {"self_share"} if self.dataset == SELF else set()

    @property
    def parts(self) -> list[tuple[str, int]]:
        """The sources of calibration windows, and how many are of each."""
        if not isinstance(self.dataset, list):
            return [(self.dataset, self.num_calibration_samples or 0)] if self.dataset else []
        shares = sum(source.share or 0.0 for source in self.dataset)
        left = max(0, (self.num_calibration_samples or 0) - sum(source.windows or 0 for source in self.dataset))
        return [
            (part.source, part.windows or max(1, round(left * (part.share or 0) / shares))) for part in self.dataset
        ]

    @property
    def num_windows(self) -> int:
        """Calibration windows in all."""
        return sum(count for _, count in self.parts)

    @property
    def own_windows(self) -> int:
        """Those of them that the model is to write itself."""
        return sum(count for source, count in self.parts if source == SELF)

    @property
    def settings(self) -> dict[str, Any]:
        """What the run reads, by name."""
        return self.model_dump(exclude=self.unread)

    @property
    def share(self) -> float | None:
        """The sparsity asked for; None where widths are."""
        return 0.0

    def beside(self) -> Self:
        """The step, whose windows' length is known, with what follows from it."""
        return self

    @property
    def extent(self) -> str:
        """How much is to go, as a name may say it."""
        return f"{self.share * 100:g}" if self.share else ""

    @property
    def described(self) -> str:
        """The step in a line."""
        return self.method

    @property
    def max_shard_bytes(self) -> int:
        """What `max_shard_size` says."""
        return bytes_of(self.max_shard_size)

    @field_validator("dataset", mode="before")
    @classmethod
    def _of_several(cls, value: Json) -> Json:
        if value == []:
            raise ValueError("a list of sources that is empty")
        return mixture(value) if isinstance(value, str) else value  # type: ignore[return-value]

    @field_validator("*", mode="before")
    @classmethod
    def _text_of_a_path(cls, value: Json | Path) -> Json:
        return str(value) if isinstance(value, Path) else value

    @field_validator("max_shard_size")
    @classmethod
    def _size_with_unit(cls, value: str) -> str:
        bytes_of(value)
        return value

    @field_validator("skip", mode="before")
    @classmethod
    def _names(cls, value: Json) -> Json:
        """A list, or names with commas between them."""
        names = value.split(",") if isinstance(value, str) else value
        return [str(name).strip() for name in names] if isinstance(names, list) else names

    def fill(self) -> None:
        """Take from the method what was not given. Raises ValueError for what it has not."""

    @model_validator(mode="after")
    def _reads_what_is_given(self) -> Self:
        self.fill()
        for name in sorted(self.model_fields_set & self.unread):
            raise PydanticCustomError("unread", "not read", {"key": name, "why": self.unread_because.get(name, "")})
        return self
