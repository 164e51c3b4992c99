"""The command line: argv -> Recipe -> call -> print. Heavy imports wait until a command runs."""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from slimlm.errors import Interrupted, SlimlmError

app = typer.Typer(
    name="slimlm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make a trained language model smaller; get back a checkpoint that stock transformers loads.\n\n"
    "Start with `slimlm compress --model llama --sparsity 0.25`: it needs no network, and ends with what was lost.",
)

WHAT, DATA, RUN, OUT = "What to do", "Calibration data", "How to run", "Output"


def main() -> None:
    """Entry point of the console command: exit code 2 for a user's mistake, 1 for a failed run, 130 for Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up like Ctrl-C
    try:
        app()
    except SlimlmError as error:
        print(f"slimlm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _version(show: bool) -> None:
    if show:
        from slimlm import __version__

        print(f"slimlm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("compress")
def compress_command(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            rich_help_panel=WHAT,
            help="Hub id, directory, or `llama`, the small model that ships with slimlm.",
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            "-s",
            rich_help_panel=WHAT,
            help="Share of the model's parameters to remove, above 0 and below 1.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(rich_help_panel=WHAT, help="How: `slice` gives a smaller hidden_size.  [default: slice]"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(rich_help_panel=WHAT, help="YAML file, or name of a shipped recipe; other flags override it."),
    ] = None,
    revision: Annotated[str | None, typer.Option(rich_help_panel=WHAT, help="Hub revision of the model.")] = None,
    round_to: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=WHAT,
            help="New widths are multiples of this.  [default: largest power of two that reaches the sparsity]",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            help="Text file (.txt, .jsonl, .parquet), tokens (.npy), hub id, `wikitext2`, `c4`, `alpaca`, "
            "`fineweb-edu`, or `self`: text the model writes itself.  "
            "[default: self for the bundled model, else required]",
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(rich_help_panel=DATA, help="Column that holds the text.  [default: text]")
    ] = None,
    num_calibration_samples: Annotated[
        int | None, typer.Option(rich_help_panel=DATA, help="Calibration windows.  [default: 128]")
    ] = None,
    max_seq_length: Annotated[
        int | None,
        typer.Option(rich_help_panel=DATA, help="Tokens in a window.  [default: the model's context, up to 2048]"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(rich_help_panel=DATA, help="Picks windows and samples.  [default: 0]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(rich_help_panel=RUN, help="Windows that go through a block together.  [default: 8]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(rich_help_panel=RUN, help="auto, cpu, cuda, cuda:1, ...  [default: auto]")
    ] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option(
            "--trust-remote-code", rich_help_panel=RUN, help="Run modelling code that comes with the checkpoint."
        ),
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            rich_help_panel=RUN,
            help="Measure perplexity before and after.  [default: measure]",
        ),
    ] = None,
    eval_text: Annotated[
        str | None,
        typer.Option(rich_help_panel=RUN, help="Text file to measure on.  [default: the Python language reference]"),
    ] = None,
    eval_windows: Annotated[
        int | None, typer.Option(rich_help_panel=RUN, help="Windows to measure on.  [default: 128]")
    ] = None,
    output_dir: Annotated[
        str | None,
        typer.Option(
            "--output-dir", "-o", rich_help_panel=OUT, help="Where the result goes.  [default: MODEL-METHOD-PERCENT]"
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", rich_help_panel=OUT, help="Replace the output directory if it holds something."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", rich_help_panel=OUT, help="Go on from what an interrupted run of the same command has finished."
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=OUT, help="dtype to write: auto (as it was), float32, bfloat16, float16.  [default: auto]"
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", rich_help_panel=OUT, help="Log what happens inside.")
    ] = False,
) -> None:
    """Make a model smaller.

    **slice** rotates the residual stream onto its principal directions and deletes the weakest, so every matrix gets
    smaller: fewer parameters, fewer bytes, less computation. The result is a directory with weights, config, tokenizer,
    a model card and `slimlm.json`, which says what was done and what was lost.

    Examples:

        slimlm compress --model llama --sparsity 0.25

        slimlm compress -m meta-llama/Llama-3.2-3B -s 0.2 --dataset wikitext2 -o smaller

        slimlm compress --recipe llama-slice-25
    """
    flags = {
        key: value
        for key, value in locals().items()
        if key not in ("recipe", "overwrite", "resume", "verbose") and value is not None
    }
    _run_compress(recipe, flags, overwrite, resume, verbose)


def _run_compress(recipe_name: str | None, flags: dict[str, Any], overwrite: bool, resume: bool, verbose: bool) -> None:
    from slimlm.errors import UserError
    from slimlm.recipe import load_recipe, make_recipe

    _set_verbosity(verbose)
    if recipe_name is None:
        for name in ("model", "sparsity"):
            if name not in flags:
                raise UserError(
                    f"--{name} is missing (or give --recipe): try `slimlm compress --model llama --sparsity 0.25`"
                )
    recipe = load_recipe(recipe_name, flags) if recipe_name else make_recipe(flags, "command line")
    with _progress() as progress:
        from slimlm.compress import compress

        result = compress(recipe, overwrite, resume, progress)
    _print_result(result, recipe.expected)


def _print_result(result: Any, expected: dict[str, float]) -> None:
    from rich.console import Console

    from slimlm.report.summary import compress_summary, expectation_lines
    from slimlm.report.table import comparison_table

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
    console = Console()
    console.print(comparison_table(sides))
    print(compress_summary(manifest))
    for line in expectation_lines(manifest, expected):
        print(line)
    print(f"written to {result.output_dir}")
    print(f'load it with AutoModelForCausalLM.from_pretrained("{result.output_dir}")')


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="Directory, hub id, or `llama`.", show_default=False)],
    against: Annotated[
        str | None, typer.Option(help="Dense model to compare with, on identical windows and questions.")
    ] = None,
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
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Measure a model: perplexity on fixed windows, and lm-eval tasks.

    Examples:

        slimlm eval llama-slice-25 --against llama

        slimlm eval DIR --against meta-llama/Llama-3.2-3B --tasks arc_easy,hellaswag --text test.txt --json result.json
    """
    from slimlm.errors import UserError
    from slimlm.evaluation.tasks import DEFAULT_TASKS

    _set_verbosity(verbose)
    if json_path is not None and (json_path.is_dir() or not json_path.absolute().parent.is_dir()):
        raise UserError(f"--json {json_path} cannot be written: give a file in a directory that exists")
    names = DEFAULT_TASKS if tasks is None else tuple(name.strip() for name in tasks.split(",") if name.strip())
    with _progress() as progress:
        from slimlm.evaluation.evaluate import evaluate

        evaluation = evaluate(
            model,
            against,
            () if names == ("none",) else names,
            text,
            num_windows or None,
            window,
            batch_size,
            dtype,
            device,
            device_map,
            limit,
            num_fewshot,
            trust_remote_code,
            progress,
        )
    _print_evaluation(evaluation.data, json_path)


def _print_evaluation(data: dict[str, Any], json_path: Path | None) -> None:
    from rich.console import Console

    from slimlm.report.summary import evaluation_summary
    from slimlm.report.table import comparison_table

    Console().print(comparison_table(data["models"]))
    print(evaluation_summary(data))
    if json_path is not None:
        json_path.write_text(json.dumps(data, indent=2) + "\n")
        print(f"written to {json_path}")


@app.command("models")
def models_command() -> None:
    """List the architectures slimlm knows, by `model_type`, and the bundled model."""
    from slimlm.families import FAMILIES

    for name in sorted(FAMILIES):
        print(name)
    print("bundled: `--model llama` is a 6.5M-parameter Llama that ships with slimlm")


@app.command("recipes")
def recipes_command() -> None:
    """List the recipes that ship with slimlm; each reproduces a result."""
    from slimlm.recipe import shipped_recipes

    for name, path in sorted(shipped_recipes().items()):
        print(f"{name}  {path}")


def _set_verbosity(verbose: bool) -> None:
    if verbose:
        logging.getLogger("slimlm").setLevel(logging.INFO)
    else:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


@contextmanager
def _progress() -> Iterator[Any]:
    """Bars while it runs; Ctrl-C as an error of our own, whose exit code the shell understands."""
    from slimlm.report.progress import progress_bars

    with progress_bars() as progress:
        try:
            yield progress
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; run the same command with --resume to go on") from error
