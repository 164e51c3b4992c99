"""Commands' options, made from what they set: a recipe's fields, and fields of dataclasses of settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args

import typer

from slimlm.recipe import FIELDS
from slimlm.settings import HubSettings, described

Options = TypeVar("Options", bound=HubSettings)
Value = str | int | float | bool | list[str] | None

PANELS = {  # of the commands that run a recipe, in the order of their help; other commands have the order only
    "What to do": (
        "model", "sparsity", "latency", "method", "pattern", "recipe", "revision", "widths", "skip", "refit", "refine",
        "allocation", "teacher", "tokens", "minutes", "lora", "learning_rate", "objective", "optimizer",
        "hidden_weight", "assignments",
    ),
    "Calibration data": ("dataset", "self_share", "text_column", "dataset_config", "dataset_split", "dataset_revision",
        "num_calibration_samples", "max_seq_length", "seed"),
    "How to run": (
        "batch_size", "device", "num_processes", "work_dir", "stream_memory", "trust_remote_code", "token", "cache_dir",
        "gradient_checkpointing", "teacher_top_k",
    ),
    "What was lost": ("measure", "eval_text", "eval_windows"),
    "Output": (
        "output_dir", "overwrite", "resume", "resume_anyway", "dry_run", "dtype", "max_shard_size", "push_to_hub",
        "private", "json_path", "quiet", "verbose",
    ),
}  # fmt: skip
ORDER = [name for names in PANELS.values() for name in names]
SHORT = {"model": "-m", "sparsity": "-s", "output_dir": "-o", "quiet": "-q", "verbose": "-v"}
METAVARS = {
    "push_to_hub": "REPO",
    "assignments": "NAME=VALUE",
    "num_calibration_samples": "<int>|auto",
    "eval_windows": "<int>|auto",
}
AS_WORDS = ("num_calibration_samples", "eval_windows")  # that may be numbers
SHOWN = {  # defaults that a field's own does not say
    "sparsity": "none; needed unless a latency, a pattern, widths or a recipe say it",
    "method": "slice",
    "allocation": "as in the method's paper",
    "num_calibration_samples": "auto: 128, or as many more as the widths that are fitted need",
    "self_share": "0.5 for slice and slimlm, where it takes less than half of the memory; else 0",
    "refine": "4; 0 where nothing is refitted",
    "dataset": "self for the bundled model, else required",
    "teacher": "the model that slimlm.json names",
    "minutes": "no limit",
    "hidden_weight": "20, where the teacher is beside and its stream is known",
    "learning_rate": "0.0002 in 100 steps, of a pruned model 0.0006, by their root; with --lora 0.002, with mfac 0.001",
    "max_seq_length": "the model's context, up to 2048",
    "eval_text": "the Python language reference",
    "eval_windows": "auto: 128, or as many fewer as take no longer than the rest, but 16",
    "output_dir": "MODEL-METHOD-PERCENT, or MODEL-rotate",
}

SHOWN_OF_RECOVERY = SHOWN | {
    "dataset": "self",
    "self_share": "0.5; 1 where there is no dataset",
    "max_seq_length": "as the model was compressed with, else its context, up to 2048",
    "output_dir": "MODEL-recover",
}


@dataclass(frozen=True, kw_only=True)
class ManyProcesses:
    """How a command is started that several processes can share."""

    num_processes: int | None = described(
        None, "processes on this machine that share the work; `torchrun -m slimlm` starts them on several", "1", least=1
    )


JSON_HELP = "also write all figures to this file; `-` is standard output, and all there is"


@dataclass(frozen=True, kw_only=True)
class Verbosity:
    """What a command shows while it runs."""

    quiet: bool = described(False, "show warnings and what comes out, and nothing of how far the work is")
    verbose: bool = described(False, "log what happens inside")


@dataclass(frozen=True, kw_only=True)
class FiguresFile:
    """Where what a command found is kept."""

    json_path: Path | None = described(None, JSON_HELP, flag="--json")


class _Told(NamedTuple):
    """What a field says of itself."""

    annotation: Any
    default: Value = None
    description: str = ""
    shown: str = ""
    least: int | None = None
    flag: str = ""


def command(
    kind: type[Options], settings: Sequence[str] = (), shown: Mapping[str, str] = SHOWN
) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Makes a function of options a command that typer reads: each described field of `kind` is one.

    settings: of a recipe; those given are a dictionary in the field `settings`. What is not given has its default.
    shown: their defaults, in words.
    """
    told, arguments = _told(kind), {field.name for field in fields(kind) if field.default is MISSING}
    told |= {name: _of_recipe(name, shown) for name in settings}
    options = [
        _argument(name, told[name]) if name in arguments else _option(name, told[name], bool(settings))
        for name in sorted(told, key=lambda name: ORDER.index(name) if name in ORDER else -1)
        if told[name].description
    ]
    listed = {name for name, one in told.items() if Sequence[str] in _kinds(one.annotation)}

    def decorated(work: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(work)
        def call(**given: Any) -> None:
            values = {name: value for name, value in given.items() if value is not None and value != []}
            for name in listed & values.keys():
                values[name] = _names(values[name])
            own = {name: value for name, value in values.items() if name not in settings}
            if settings:
                own["settings"] = {name: value for name, value in values.items() if name in settings}
            work(kind(**own))

        vars(call)["__signature__"] = Signature(sorted(options, key=lambda option: option.default is not option.empty))
        return call

    return decorated


def _told(kind: type[HubSettings]) -> dict[str, _Told]:
    return {
        field.name: _Told(field.type, None if field.default is MISSING else field.default, **field.metadata)
        for field in fields(kind)
        if field.metadata
    }


def _of_recipe(name: str, shown: Mapping[str, str]) -> _Told:
    info = FIELDS[name]
    default = None if info.is_required() or info.default_factory else info.default
    return _Told(info.annotation, default, info.description or "", shown.get(name, ""))


def _argument(name: str, told: _Told) -> Parameter:
    """Of several words where it may be a sequence."""
    argument = typer.Argument(..., help=sentence(told.description), show_default=False)
    kind = list[str] if Sequence[str] in _kinds(told.annotation) else _kind(told.annotation)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=argument, annotation=kind)


def _option(name: str, told: _Told, has_panels: bool) -> Parameter:
    """Not given, it is None."""
    flag = name.replace("_", "-")
    declared = told.flag or (f"--{flag}/--no-{flag}" if told.default is True else f"--{flag}")
    shown = told.shown or _shown(flag, told.default)
    option = typer.Option(
        None,
        declared,
        *([SHORT[name]] if name in SHORT else []),
        help=sentence(told.description) + (f"  [default: {shown}]" if shown else ""),
        show_default=False,
        min=told.least,
        metavar=METAVARS.get(name),
        rich_help_panel=next((panel for panel, names in PANELS.items() if has_panels and name in names), None),
    )
    kind = str if name in AS_WORDS else _kind(told.annotation)  # whoever reads it says what it may be
    return Parameter(name, Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def sentence(description: str) -> str:
    """For help: a description as it stands in settings, as a sentence."""
    return f"{description[:1].upper()}{description[1:]}."


def _shown(flag: str, default: Value) -> str:
    if default is True:
        return flag
    return "" if default is None or default is False or default in ([], ()) else str(default)


def _kinds(annotation: type | UnionType | str | None) -> tuple[Any, ...]:
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def _kind(annotation: type | UnionType | str | None) -> type:
    """What typer makes of the words given: a flag may be repeated for a sequence that is always there."""
    if annotation == Sequence[str]:
        return list[str]
    if {int, str} <= {*_kinds(annotation)}:
        return str
    return next((kind for kind in (bool, int, float, Path) if kind in _kinds(annotation)), str)


def _names(given: str | list[str]) -> tuple[str, ...]:
    """Of one word names with commas between them."""
    return tuple(name.strip() for name in given.split(",") if name.strip()) if isinstance(given, str) else tuple(given)
