"""`slimlm compress` and `slimlm rotate`: what runs a recipe."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from slimlm.cli.assign import with_assigned
from slimlm.cli.launch import in_processes
from slimlm.cli.options import ORDER, SHOWN_OF_RECOVERY, FiguresFile, ManyProcesses, Value, Verbosity, command
from slimlm.cli.running import ready_to_tell, require_there, running, tell
from slimlm.errors import UserError
from slimlm.imports import importing
from slimlm.prober import Prober
from slimlm.recipe import FLAGS, OF_RECOVERY, Recipe, Step, load_recipe, recipe_of_flags
from slimlm.settings import PushSettings, RunSettings, described
from slimlm.started import own_rank

if TYPE_CHECKING:
    from slimlm.compression import CompressResult

RESUME = "; run the same command with --resume to go on"
COMPRESS_FLAGS = [name for name in ORDER if name in FLAGS]
ROTATE_FLAGS = [
    name
    for name in COMPRESS_FLAGS
    if name in Step.model_fields.keys() - {"method", "skip", "measure", "eval_text", "eval_windows", "max_shard_size"}
]

RECOVER_FLAGS = [
    name
    for name in ORDER
    if name in OF_RECOVERY | Step.model_fields.keys() - {"model", "revision", "method", "num_calibration_samples"}
]


@dataclass(frozen=True, kw_only=True)
class RotateOptions(RunSettings, ManyProcesses, FiguresFile, Verbosity):
    """How a recipe is run. settings: of flags, by name."""

    settings: dict[str, Value] = field(default_factory=dict)
    assignments: Sequence[str] = described(
        (), "any other setting, by its name in a recipe; may be given several times", flag="--set"
    )


@dataclass(frozen=True, kw_only=True)
class CompressOptions(RotateOptions, PushSettings):
    """How a recipe is run, which one, and where else its result goes."""

    recipe: str | None = described(None, "YAML file, or name of a shipped recipe; other flags override it")
    dry_run: bool = described(False, "say what would happen and what it would take, from a probe")


@dataclass(frozen=True, kw_only=True)
class RecoverOptions(RotateOptions, PushSettings):
    """How a recipe is run that recovers a model."""

    model: str = field(metadata={"description": "directory of the compressed model"})


@command(CompressOptions, COMPRESS_FLAGS)
def compress_command(options: CompressOptions) -> None:
    """Make a model smaller.

    **slice** rotates the residual stream onto its principal directions and deletes the weakest, deletes neurons of the
    MLPs, key/value groups or blocks where that costs less, and refits what is left: fewer parameters, fewer bytes, less
    computation. **slimlm**, **sparsegpt**, **obc**, **mfac**, **woodfisher**, **wanda**, **taylor**, **magnitude** and
    **random** set single weights to zero, which neither shrinks nor speeds up a stock checkpoint; slimlm loses least
    (`slimlm methods` says what each does). The result is a directory with weights, config, tokenizer, a model card and
    `slimlm.json`, which says what was done and what was lost.

    Examples:

        slimlm compress --model llama --sparsity 0.25

        slimlm compress -m meta-llama/Llama-3.2-3B -s 0.2 --dataset wikitext2 -o smaller

        slimlm compress -m llama --latency 0.8

        slimlm compress -m llama --method slimlm --pattern 2:4

        slimlm compress -m llama -s 0.2 --set round_to=16 --set budget=hidden

        slimlm compress --recipe llama-slice-25
    """
    recipe = chosen_recipe(options.recipe, with_assigned(options.settings, options.assignments))
    if options.private and not options.push_to_hub:
        raise UserError("--private is for --push-to-hub REPO")
    if options.dry_run:
        _dry_run(recipe, options)
    else:
        _run(recipe, options, PushSettings)


@command(RotateOptions, ROTATE_FLAGS)
def rotate_command(options: RotateOptions) -> None:
    """Sort a model's residual stream by importance, once for every width.

    The result computes what the model computed, and stock transformers loads it. Its directions are in order, so that
    slicing it later just cuts: `slimlm compress --model ROTATED --sparsity 0.2 --no-refit` needs no data and takes
    seconds; with the refit it needs data, but not the calibration that finds the basis.

    Examples:

        slimlm rotate --model llama --output-dir rotated

        slimlm compress --model rotated --sparsity 0.25 --no-refit
    """
    settings = with_assigned({**options.settings, "method": "rotate"}, options.assignments)
    if "model" not in settings:
        raise UserError("--model is missing: try `slimlm rotate --model llama`")
    _run(recipe_of_flags(settings), options)


@command(RecoverOptions, RECOVER_FLAGS, SHOWN_OF_RECOVERY)
def recover_command(options: RecoverOptions) -> None:
    """Train back what compression lost, towards the dense model.

    All weights of a sliced or pruned model are trained on what the dense model predicts; zeros stay zero, widths stay,
    and the result is a stock checkpoint like the one that went in. Both models are in memory. By default half of the
    text is the one given, and half is written by the dense model, so that the model stays itself beyond that text; what
    is held out of both says which weights stay, and that the old ones do where nothing is better.

    Examples:

        slimlm recover llama-slice-25 --tokens 500000

        slimlm recover smaller --teacher meta-llama/Llama-3.2-3B --dataset wikitext2 -o recovered

        slimlm recover smaller --dataset notes.txt --minutes 60
    """
    settings = with_assigned({**options.settings, "model": options.model, "method": "recover"}, options.assignments)
    _run(recipe_of_flags(settings), options, PushSettings)


def chosen_recipe(name: str | None, settings: Mapping[str, Value]) -> Recipe:
    """The recipe of a name with settings that override it, or that of the settings alone. Raises UserError."""
    if name is not None:
        return load_recipe(name, settings)
    if settings.get("method") in ("rotate", "recover"):
        method = settings["method"]
        raise UserError(f"{method} has a command of its own: try `slimlm {method} --help`")
    for needed in ("model", "sparsity"):
        if needed not in settings and not (needed == "sparsity" and {"latency", "pattern", "widths"} & settings.keys()):
            raise UserError(
                f"--{needed} is missing (or give --recipe): try `slimlm compress --model llama --sparsity 0.25`"
            )
    return recipe_of_flags(settings)


def _run(recipe: Recipe, options: RotateOptions, kind: type[RunSettings] = RunSettings) -> None:
    """kind: the settings among the options that say how the recipe is run."""
    require_there(recipe.steps[0].model, getattr(recipe.steps[0], "teacher", None))
    ready_to_tell(options.json_path)
    if in_processes(options.num_processes, recipe.steps[0].device, RESUME):
        return
    with running(f"interrupted{RESUME}", options) as progress:
        with importing():
            from slimlm.stages import compress

        how = {field.name: getattr(options, field.name) for field in fields(kind)}
        result = compress(recipe=recipe, **{**how, "progress": progress})
    if own_rank() == 0:
        tell(result.describe(), options.json_path, lambda: _print_result(result, recipe.expected))


def _dry_run(recipe: Recipe, options: CompressOptions) -> None:
    require_there(recipe.steps[0].model)
    ready_to_tell(options.json_path)
    with closing(Prober()) as prober, running(shown=options) as progress:
        with importing():
            from slimlm.check import check
            from slimlm.device import check_process
            from slimlm.forecast import forecast, require_room
            from slimlm.report.expected import forecast_figures
            from slimlm.report.summary import forecast_summary
            from slimlm.resolve import output_of
            from slimlm.stages import before_work, check_later, how_of, later_steps

        check_process()
        before_work(options)
        how = how_of(replace(options, progress=progress))
        job = check(recipe.steps[0].model_copy(update={"output_dir": str(output_of(recipe.steps))}), how)
        check_later(job, recipe, progress, how.access)
        later = later_steps(job, recipe)
        found = forecast(job, later, how, prober, options.num_processes or 1)
    told = job, found, later, how.work_dir
    tell(forecast_figures(*told), options.json_path, lambda: print(forecast_summary(*told)))
    require_room(job, found, how.work_dir)


def _print_result(result: "CompressResult", expected: dict[str, float]) -> None:
    from slimlm.report.next_steps import next_steps
    from slimlm.report.summary import compress_shown, expectation_lines
    from slimlm.report.terminal import lines_of, show

    manifest, place = result.manifest, result.output_dir
    ends = f"written to {place}; what next:", *next_steps(manifest, place)
    show([*compress_shown(manifest), *lines_of(*expectation_lines(manifest, expected), *ends)])
