"""The command line: argv -> Recipe -> call -> print. Heavy imports wait until a command runs."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from slimlm.errors import Interrupted, RunFailure, SlimlmError, UserError, out_of_memory
from slimlm.recipe import Recipe, field_of, load_recipe, recipe_of_flags, shipped_recipes
from slimlm.report.streams import sturdy_streams, to_nowhere

app = typer.Typer(
    name="slimlm",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make a trained language model smaller; get back a checkpoint that stock transformers loads.\n\n"
    "Start with `slimlm compress --model llama --sparsity 0.25`: it needs no network, and ends with what was lost.",
)

WHAT, DATA, RUN, OUT = "What to do", "Calibration data", "How to run", "Output"
UNREAD = 141  # what a shell reports of a program that SIGPIPE ended, as `head` does to whatever writes on


class Stopped(BaseException):
    """A polite kill, or a terminal that was closed: ends a run like Ctrl-C. Holds the signal's number."""


def main() -> None:
    """Entry point of the console command.

    Exit code 2 for a user's mistake, 1 for a failed run, 128 and its number for a signal: 130 is Ctrl-C, 141 says that
    nobody read the output to its end. What was written to files stands then.
    """
    sturdy_streams()
    logging.basicConfig(level=logging.WARNING, format="slimlm: %(levelname)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _stop)
    try:
        with out_of_memory("use a larger machine or a smaller model"):
            code = app(standalone_mode=False)
        sys.stdout.flush()
    except Stopped as stopped:
        _fail("interrupted", 128 + stopped.args[0])
    except SlimlmError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        _leave_unread()
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # rich and typer leave on their own
            _leave_unread()
        raise
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except Exception as error:
        message = getattr(error, "format_message", None)  # what typer says of a flag or value it does not know
        if message is None:
            raise
        _fail(f"{message()} (see --help)", 2)
    sys.exit(code)


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


def _fail(message: str, code: int) -> NoReturn:
    print(f"slimlm: {message}", file=sys.stderr)
    sys.exit(code)


def _leave_unread() -> NoReturn:
    to_nowhere(sys.stdout)  # what is still in its buffer would fail once more, on the way out
    sys.exit(UNREAD)


def _version(show: bool) -> None:
    if show:
        from slimlm import __version__

        print(f"slimlm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def _flag(field: str, panel: str, *short: str, default: str | None = None) -> Any:
    """The option of a recipe's field: its name, its description, its default."""
    info = field_of(field)
    shown = default or (None if info.is_required() or info.default in (None, []) else str(info.get_default()))
    text = f"{(info.description or '')[0].upper()}{(info.description or '')[1:]}." + (
        f"  [default: {shown}]" if shown else ""
    )
    return typer.Option(f"--{field.replace('_', '-')}", *short, rich_help_panel=panel, help=text, show_default=False)


# Options that several commands share.
Weighting = Annotated[str | None, _flag("weighting", WHAT)]
Revision = Annotated[str | None, _flag("revision", WHAT)]
Dataset = Annotated[str | None, _flag("dataset", DATA, default="self for the bundled model, else required")]
TextColumn = Annotated[str | None, _flag("text_column", DATA)]
Samples = Annotated[int | None, _flag("num_calibration_samples", DATA)]
Seed = Annotated[int | None, _flag("seed", DATA)]
BatchSize = Annotated[int | None, _flag("batch_size", RUN)]
Device = Annotated[str | None, _flag("device", RUN)]
Dtype = Annotated[str | None, _flag("dtype", OUT)]
Length = Annotated[int | None, _flag("max_seq_length", DATA, default="the model's context, up to 2048")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=OUT, help="Replace what an earlier run wrote there.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", rich_help_panel=OUT, help="Go on from what an interrupted run of the same command has finished."
    ),
]


ResumeAnyway = Annotated[
    bool,
    typer.Option(
        "--resume-anyway",
        rich_help_panel=OUT,
        help="Resume with other versions or on another kind of machine, which rounds otherwise; slimlm.json says so.",
    ),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        "--work-dir",
        rich_help_panel=RUN,
        help="Existing directory where hidden states wait while it runs, best on a fast local disk.  "
        "[default: beside the output]",
        show_default=False,
    ),
]
TRUST = "Run Python code that comes with the checkpoint; a recipe file cannot say so."
Trust = Annotated[bool | None, typer.Option("--trust-remote-code", rich_help_panel=RUN, help=TRUST)]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", rich_help_panel=RUN, help="For models on the hub.  [default: of `hf auth login`]", show_default=False
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        rich_help_panel=RUN,
        help="Where models from the hub are kept.  [default: the hub's own cache]",
        show_default=False,
    ),
]
NOT_OF_THE_RECIPE = (
    "token",
    "cache_dir",
    "recipe",
    "overwrite",
    "resume",
    "resume_anyway",
    "work_dir",
    "dry_run",
    "verbose",
    "push_to_hub",
    "private",
)


@app.command("compress")
def compress_command(
    model: Annotated[str | None, _flag("model", WHAT, "-m")] = None,
    sparsity: Annotated[
        float | None,
        _flag("sparsity", WHAT, "-s", default="none; needed unless a pattern, widths or a recipe say it"),
    ] = None,
    method: Annotated[str | None, _flag("method", WHAT, default="slice")] = None,
    pattern: Annotated[str | None, _flag("pattern", WHAT)] = None,
    recipe: Annotated[
        str | None,
        typer.Option(rich_help_panel=WHAT, help="YAML file, or name of a shipped recipe; other flags override it."),
    ] = None,
    revision: Revision = None,
    widths: Annotated[str | None, _flag("widths", WHAT)] = None,
    skip: Annotated[str | None, _flag("skip", WHAT)] = None,
    round_to: Annotated[int | None, _flag("round_to", WHAT)] = None,
    basis: Annotated[str | None, _flag("basis", WHAT)] = None,
    budget: Annotated[str | None, _flag("budget", WHAT)] = None,
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit",
            rich_help_panel=WHAT,
            help="Slice, slimlm: aim what is left at what the dense model computes, or not.  [default: refit]",
            show_default=False,
        ),
    ] = None,
    weighting: Weighting = None,
    allocation: Annotated[str | None, _flag("allocation", WHAT, default="as in the method's paper")] = None,
    shots: Annotated[int | None, _flag("shots", WHAT)] = None,
    schedule: Annotated[str | None, _flag("schedule", WHAT)] = None,
    fisher_samples: Annotated[int | None, _flag("fisher_samples", WHAT)] = None,
    fisher_unit: Annotated[str | None, _flag("fisher_unit", WHAT)] = None,
    fisher_labels: Annotated[str | None, _flag("fisher_labels", WHAT)] = None,
    fisher_damping: Annotated[float | None, _flag("fisher_damping", WHAT)] = None,
    dataset: Dataset = None,
    text_column: TextColumn = None,
    num_calibration_samples: Samples = None,
    max_seq_length: Length = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    device: Device = None,
    trust_remote_code: Trust = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            rich_help_panel=RUN,
            help="Measure perplexity before and after.",
            show_default=False,
        ),
    ] = None,
    eval_text: Annotated[str | None, _flag("eval_text", RUN, default="the Python language reference")] = None,
    eval_windows: Annotated[int | None, _flag("eval_windows", RUN)] = None,
    output_dir: Annotated[str | None, _flag("output_dir", OUT, "-o", default="MODEL-METHOD-PERCENT")] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    resume_anyway: ResumeAnyway = False,
    work_dir: WorkDir = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", rich_help_panel=OUT, help="Say what would happen and what it would take, from a probe."
        ),
    ] = False,
    dtype: Dtype = None,
    max_shard_size: Annotated[str | None, _flag("max_shard_size", OUT)] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            rich_help_panel=OUT,
            metavar="REPO",
            help="Upload the result there when it is whole; that it can be is checked first.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", rich_help_panel=OUT, help="Make that repository a private one.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", rich_help_panel=OUT, help="Log what happens inside.")
    ] = False,
) -> None:
    """Make a model smaller.

    **slice** rotates the residual stream onto its principal directions and deletes the weakest, deletes neurons of the
    MLPs, key/value groups or blocks where that costs less, and refits what is left: fewer parameters, fewer bytes, less
    computation. **slimlm**, **sparsegpt**, **obc**, **mfac**, **woodfisher**, **wanda** and **magnitude** set single
    weights to zero, which neither shrinks nor speeds up a stock checkpoint; slimlm loses least. The result is
    a directory with weights, config, tokenizer, a model card and `slimlm.json`, which says what was done and what was
    lost.

    Examples:

        slimlm compress --model llama --sparsity 0.25

        slimlm compress -m meta-llama/Llama-3.2-3B -s 0.2 --dataset wikitext2 -o smaller

        slimlm compress -m llama --method slimlm --pattern 2:4

        slimlm compress --recipe llama-slice-25
    """
    flags = {key: value for key, value in locals().items() if key not in NOT_OF_THE_RECIPE and value is not None}
    chosen = _chosen_recipe(recipe, flags)
    if private and not push_to_hub:
        raise UserError("--private is for --push-to-hub REPO")
    push = {"push_to_hub": push_to_hub, "private": private}
    if dry_run:
        _dry_run(chosen, overwrite, resume or resume_anyway, work_dir, verbose, (token, cache_dir), push)
    else:
        _run_compress(chosen, overwrite, resume, resume_anyway, work_dir, verbose, (token, cache_dir), push)


@app.command("rotate")
def rotate_command(
    model: Annotated[str, _flag("model", WHAT, "-m")],
    weighting: Weighting = None,
    revision: Revision = None,
    dataset: Dataset = None,
    text_column: TextColumn = None,
    num_calibration_samples: Samples = None,
    max_seq_length: Length = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    device: Device = None,
    output_dir: Annotated[str | None, _flag("output_dir", OUT, "-o", default="MODEL-rotate")] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    resume_anyway: ResumeAnyway = False,
    work_dir: WorkDir = None,
    trust_remote_code: Trust = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    dtype: Dtype = None,
) -> None:
    """Sort a model's residual stream by importance, once for every width.

    The result computes what the model computed, and stock transformers loads it. Its directions are in order, so that
    slicing it later just cuts: `slimlm compress --model ROTATED --sparsity 0.2 --no-refit` needs no data and takes
    seconds; with the refit it needs data, but not the calibration that finds the basis.

    Examples:

        slimlm rotate --model llama --output-dir rotated

        slimlm compress --model rotated --sparsity 0.25 --no-refit
    """
    flags = {key: value for key, value in locals().items() if key not in NOT_OF_THE_RECIPE and value is not None}
    chosen = recipe_of_flags({**flags, "method": "rotate"})
    _run_compress(chosen, overwrite, resume, resume_anyway, work_dir, access=(token, cache_dir))


def _chosen_recipe(name: str | None, flags: dict[str, Any]) -> Recipe:
    if name is not None:
        return load_recipe(name, flags)
    if flags.get("method") == "rotate":
        raise UserError("rotating has a command of its own: try `slimlm rotate --model llama`")
    for field in ("model", "sparsity"):
        if field not in flags and not (field == "sparsity" and {"pattern", "widths"} & flags.keys()):
            raise UserError(
                f"--{field} is missing (or give --recipe): try `slimlm compress --model llama --sparsity 0.25`"
            )
    return recipe_of_flags(flags)


def _run_compress(
    recipe: Recipe,
    overwrite: bool,
    resume: bool,
    resume_anyway: bool = False,
    work_dir: Path | None = None,
    verbose: bool = False,
    access: tuple[str | None, Path | None] = (None, None),
    push: dict[str, Any] | None = None,
) -> None:
    """access: to the hub; a token and a directory. push: what `compress` takes of where the result is uploaded to."""
    with _progress("interrupted; run the same command with --resume to go on") as progress:
        _set_verbosity(verbose)
        from slimlm.compression import compress

        token, cache_dir = access
        how: dict[str, Any] = {"resume_anyway": resume_anyway, "work_dir": work_dir, **(push or {})}
        result = compress(recipe, overwrite, resume, progress, token=token, cache_dir=cache_dir, **how)
    _print_result(result, recipe.expected)


def _dry_run(
    recipe: Recipe,
    overwrite: bool,
    resume: bool,
    work_dir: Path | None,
    verbose: bool,
    access: tuple[str | None, Path | None],
    push: dict[str, Any],
) -> None:
    work_dir = None if work_dir is None else work_dir.expanduser().resolve()
    with _progress() as progress:
        _set_verbosity(verbose)
        from slimlm.checkpoint.hub import Access
        from slimlm.checkpoint.push import Push
        from slimlm.device import check_process
        from slimlm.forecast import forecast, require_room
        from slimlm.prepare import check_later, output_of, prepare
        from slimlm.report.summary import forecast_summary

        check_process()
        if push["push_to_hub"]:
            Push(push["push_to_hub"], push["private"], access[0]).check()
        first = recipe.steps[0].model_copy(update={"output_dir": str(output_of(recipe.steps))})
        job = prepare(first, overwrite, resume, progress, work_dir=work_dir, access=Access(*access))
        check_later(job, recipe)
        found = forecast(job, progress, recipe, work_dir)
    print(forecast_summary(job, found, recipe.steps[1:], work_dir))
    require_room(job, found, work_dir)


def _print_result(result: Any, expected: dict[str, float]) -> None:
    from slimlm.report.summary import compress_summary, expectation_lines
    from slimlm.report.table import comparison_table
    from slimlm.report.terminal import console

    manifest = result.manifest
    sides = [
        {
            "name": side,
            "parameters": manifest["parameters"][side],
            "bytes": manifest["bytes"][side],
            **(manifest["measured"] or {}).get(side, {}),
        }
        for side in ("compressed", "dense")
    ]
    console().print(comparison_table(sides))
    print(compress_summary(manifest))
    for line in expectation_lines(manifest, expected):
        print(line)
    print(f"written to {result.output_dir}")
    trust = ", trust_remote_code=True" if result.manifest["needs_remote_code"] else ""
    print(f'load it with AutoModelForCausalLM.from_pretrained("{result.output_dir}"{trust})')


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="Directory, hub id, or `llama`.", show_default=False)],
    against: Annotated[
        str | None, typer.Option(help="Dense model to compare with, on identical windows and questions.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the model.")] = None,
    against_revision: Annotated[str | None, typer.Option(help="Hub revision of the model to compare with.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="lm-eval tasks by name or YAML path, comma-separated; `none` for perplexity only.  "
            "[default: python_reference_continuation, which needs no network]"
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text file for perplexity.  [default: the Python language reference]")
    ] = None,
    num_windows: Annotated[
        int, typer.Option(help="Perplexity windows, evenly spaced over the text; 0 takes all.", min=0)
    ] = 128,
    window: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens in a window.  [default: as compressed with, else the model's context up to 2048]"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows or questions at a time.")] = 8,
    limit: Annotated[float | None, typer.Option(help="Questions per task: a number, or a share below 1.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples shown before each question.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="`auto` spreads the model over several GPUs.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write everything measured to this file.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
    token: Annotated[str | None, typer.Option(help="For models on the hub.  [default: of `hf auth login`]")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where models from the hub are kept.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Measure a model: perplexity on fixed windows, and lm-eval tasks.

    Examples:

        slimlm eval llama-slice-25 --against llama

        slimlm eval DIR --against meta-llama/Llama-3.2-3B --tasks arc_easy,hellaswag --text test.txt --json result.json
    """
    from slimlm.evaluation.tasks import DEFAULT_TASKS
    from slimlm.report.results import check_results

    if json_path is not None:
        check_results(json_path)
    names = DEFAULT_TASKS if tasks is None else tuple(name.strip() for name in tasks.split(",") if name.strip())
    with _progress() as progress:
        _set_verbosity(verbose)
        from slimlm.evaluation.evaluate import evaluate

        evaluation = evaluate(
            model,
            against,
            tasks=() if names == ("none",) else names,
            text=text,
            num_windows=num_windows or None,
            window=window,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            device_map=device_map,
            limit=limit,
            num_fewshot=num_fewshot,
            trust_remote_code=trust_remote_code,
            revision=revision,
            against_revision=against_revision,
            progress=progress,
            token=token,
            cache_dir=cache_dir,
        )
    _print_evaluation(evaluation.data, json_path)


def _print_evaluation(data: dict[str, Any], json_path: Path | None) -> None:
    from slimlm.report.summary import evaluation_summary
    from slimlm.report.table import comparison_table
    from slimlm.report.terminal import console

    with _kept(data, json_path):
        console().print(comparison_table(data["models"]))
        print(evaluation_summary(data))


@contextmanager
def _kept(data: Any, json_path: Path | None) -> Iterator[None]:
    """Figures are in their file before any are shown, and are shown even where that file cannot be had."""
    from slimlm.report.results import write_results

    try:
        if json_path is not None:
            write_results(json_path, data)
    except RunFailure:
        yield
        raise
    yield
    if json_path is not None:
        print(f"written to {json_path}")


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="Hub id, directory, or `llama`.")],
    dataset: Annotated[
        str | None, typer.Option(help="Text to run through the model, for outliers and predicted losses.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 16,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Picks the windows.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
    token: Annotated[str | None, typer.Option(help="For models on the hub.  [default: of `hf auth login`]")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where models from the hub are kept.")] = None,
) -> None:
    """Show what each matrix of a model looks like to a pruner.

    **pq** and **prunable**: PQ Index of the weights that are not zero, and the share of all that it says can go (of a
    pruned model also the index **with zeros**). **alpha**: how heavy the spectrum's tail
    is; well-trained matrices are below 4. **rank**: stable rank. With `--dataset`, **outliers**: share of |w| ||x||
    above 5 times their mean; **25%, 50%, 75%**: predicted share of the output lost at that sparsity.

    Examples:

        slimlm inspect llama

        slimlm inspect meta-llama/Llama-3.2-1B --dataset wikitext2 --json figures.json
    """
    from slimlm.report.results import check_results
    from slimlm.report.table import inspection_table
    from slimlm.report.terminal import console

    if json_path is not None:
        check_results(json_path)
    with _progress() as progress:
        _set_verbosity(False)
        from slimlm.inspection import SPARSITIES, inspect_model

        found = inspect_model(
            model, dataset, windows, window, seed, device, revision, trust_remote_code, progress, token, cache_dir
        )
    rows = [figures.describe() for figures in found]
    with _kept(rows, json_path):
        console().print(inspection_table(rows, SPARSITIES))


Source = Annotated[Path, typer.Argument(help="Directory to read.")]
Target = Annotated[Path, typer.Argument(help="Directory to make.")]


@app.command("pack")
def pack_command(source: Source, output: Target) -> None:
    """Put a pruned checkpoint away without its zeros: a bit per weight, and the weights that are left.

    At 50% zeros in bf16 a matrix takes 0.56 of its room. `slimlm unpack` gives the same checkpoint back, bit by bit.
    """
    from slimlm.checkpoint.pack import pack

    _repack(pack, "packing", source, output)


@app.command("unpack")
def unpack_command(source: Source, output: Target) -> None:
    """Get the checkpoint back that `slimlm pack` put away."""
    from slimlm.checkpoint.pack import unpack

    _repack(unpack, "unpacking", source, output)


def _repack(how: Any, stage: str, source: Path, output: Path) -> None:
    from slimlm.checkpoint.reader import Checkpoint

    with _progress() as progress:
        progress.stage(stage, len(Checkpoint(source).tensors))
        before, after = how(source.resolve(), output.resolve(), progress.step)
    print(f"{before:,} bytes of weights -> {after:,} ({after / max(1, before):.2f} of them), written to {output}")


@app.command("models")
def models_command(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table in docs/models.md.")] = False,
) -> None:
    """List the architectures slimlm knows, by `model_type`, and what slicing can do with each.

    Every pruning method works on every one of them. What counts is `model_type` in config.json, not a model's name.
    """
    from slimlm.report.models import COLUMNS, model_rows, models_table

    if markdown:
        print(models_table(), end="")
        return
    from rich.table import Table

    from slimlm.report.terminal import console

    table = Table(*COLUMNS, show_lines=True)
    for row in model_rows():
        table.add_row(*(cell.replace("`", "") for cell in row))
    console().print(table)
    print("bundled: `--model llama` is a 6.5M-parameter Llama that ships with slimlm")


@app.command("recipes")
def recipes_command() -> None:
    """List the recipes that ship with slimlm; each reproduces a result."""

    for name, path in sorted(shipped_recipes().items()):
        print(f"{name}  {path}")


def _set_verbosity(verbose: bool) -> None:
    if verbose:
        logging.getLogger("slimlm").setLevel(logging.INFO)
    else:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the last failure is ours to tell
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


@contextmanager
def _progress(when_interrupted: str = "interrupted") -> Iterator[Any]:
    """Bars while it runs; Ctrl-C and signals as an error of our own, whose exit code the shell understands."""
    from slimlm.report.progress import progress_bars

    with progress_bars() as progress:
        try:
            progress.stage("starting", 1)  # importing PyTorch takes seconds
            yield progress
        except KeyboardInterrupt as error:
            raise Interrupted(when_interrupted) from error
        except Stopped as error:
            raise Interrupted(when_interrupted, 128 + error.args[0]) from error
