"""What slimlm does to a real LLM: SmolLM2-135M, calibrated on one kind of text, judged on that kind and on two others.

    python eval/real_model.py /tmp/smollm2
    python eval/real_quality.py --model /tmp/smollm2 --data ../shared/data --work /tmp/quality

Calibrates on 128 windows of 256 tokens of the first nine tenths of WikiText-2's validation text, seed 0, and judges on
its last tenth, on a novel and on documentation (64 windows of 512 tokens each, fp32, stock transformers in a process
that cannot import slimlm), and by PIQA and BLiMP: of what the dense model gets right beyond chance, the share that is
lost, with the standard error of the difference on the same questions. A row takes 2 to 60 minutes on two cores;
finished rows are kept in the work directory and not run again, and one that was interrupted is resumed. `--only ROW`
runs one, `--seeds` several times with other draws, `--print` just prints the table of those that are there. Rows
ending in `-recovered` train the result of another row, which has to be there.
"""

import argparse
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PLAIN = ["--self-share=0", "--refine=0"]
ROWS: dict[str, list[str] | None] = {  # flags of `slimlm compress`; None for the dense model itself
    "dense": None,
    "slice-25": ["--sparsity=0.25"],
    "slice-25-given": ["--sparsity=0.25", "--self-share=0"],
    "slice-25-closed": ["--sparsity=0.25", "--refine=0"],
    "slice-25-neither": ["--sparsity=0.25", *PLAIN],
    "slicegpt-25": ["--sparsity=0.25", "--set=basis=per-block", "--set=round_to=4"],
    "depth-25": ["--widths=blocks=21", "--no-refit"],
    "slimlm-50": ["--method=slimlm", "--sparsity=0.5"],
    "slimlm-50-neither": ["--method=slimlm", "--sparsity=0.5", *PLAIN],
    "slimlm-50-solved": ["--method=slimlm", "--sparsity=0.5", "--allocation=solved"],
    "sparsegpt-50": ["--method=sparsegpt", "--sparsity=0.5"],
    "wanda-50": ["--method=wanda", "--sparsity=0.5"],
    "random-50": ["--method=random", "--sparsity=0.5"],
    "slimlm-2-4": ["--method=slimlm", "--pattern=2:4"],
    "slimlm-2-4-neither": ["--method=slimlm", "--pattern=2:4", *PLAIN],
    "sparsegpt-2-4": ["--method=sparsegpt", "--pattern=2:4"],
    "wanda-2-4": ["--method=wanda", "--pattern=2:4"],
}
RECOVERED = {"slice-25-recovered": "slice-25", "slimlm-2-4-recovered": "slimlm-2-4"}  # from which row
ROWS |= {row: ["--tokens=600000"] for row in RECOVERED}  # of `slimlm recover`
TEXTS = ("wikitext2", "books_test", "docs_test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="wikitext2_valid.txt, books_test.txt, docs_test.txt")
    parser.add_argument("--work", type=Path, default=Path("/tmp/slimlm-quality"))
    parser.add_argument("--only", choices=ROWS, action="append", help="rows to run; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--no-choices", action="store_true", help="texts alone, in half of the time to judge")
    parser.add_argument("--print", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    calibration, texts = split_texts(arguments.data, arguments.work)
    for row, seed in [] if arguments.print else itertools.product(arguments.only or ROWS, arguments.seeds):
        (kept,) = paths(arguments.work, row, [seed])
        if not kept.exists():
            kept.write_text(json.dumps(measured(row, seed, arguments, calibration, texts), indent=2) + "\n")
            print(f"{row} done", flush=True)
    print(table(arguments.work, arguments.seeds))


def split_texts(data: Path, work: Path) -> tuple[Path, list[Path]]:
    """The text to calibrate on, and those to judge by: the last tenth of the calibration's kind first."""
    lines = (data / "wikitext2_valid.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    edge = len(lines) * 9 // 10
    calibration, test = work / "calibration.txt", work / f"{TEXTS[0]}.txt"
    for path, part in ((calibration, lines[:edge]), (test, lines[edge:])):
        path.write_text("".join(part), encoding="utf-8")
    return calibration, [test, *(data / f"{name}.txt" for name in TEXTS[1:])]


def measured(
    row: str, seed: int, arguments: argparse.Namespace, calibration: Path, texts: list[Path]
) -> dict[str, Any]:
    """Compress (in a process of its own, resumed where one was interrupted), and judge in another."""
    flags, directory, facts = ROWS[row], arguments.model, {}
    if flags is not None:
        directory = arguments.work / f"{row}-{seed}"
        command = [sys.executable, "-m", "slimlm"]
        if row in RECOVERED:
            command += ["recover", str(arguments.work / f"{RECOVERED[row]}-{seed}"), f"--teacher={arguments.model}"]
        else:
            command += ["compress", f"--model={arguments.model}", "--num-calibration-samples=128"]
        command += [f"--dataset={calibration}", "--max-seq-length=256", f"--seed={seed}"]
        command += ["--no-measure", "--resume", f"--output-dir={directory}", *flags]
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        facts = {
            "command": " ".join(command[1:]),
            "seconds": time.perf_counter() - started,
            "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "manifest": json.loads((directory / "slimlm.json").read_text()),
        }
    judge = [sys.executable, str(Path(__file__).with_name("stock.py")), str(directory), "--texts", *map(str, texts)]
    if not arguments.no_choices:
        judge += [f"--piqa={arguments.data / 'piqa.jsonl'}", f"--blimp={arguments.data / 'blimp'}"]
    if facts and facts["manifest"]["needs_remote_code"]:
        judge.append("--trust-remote-code")
    done = subprocess.run(judge, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout.splitlines()[-1]), **facts}


def table(work: Path, seeds: list[int]) -> str:
    """Perplexity on the three texts, the rise of its logarithm in brackets, what is lost of the choices, and what it
    took: means over seeds, a rise with their spread."""
    found = {row: [json.loads(path.read_text()) for path in paths(work, row, seeds) if path.exists()] for row in ROWS}
    dense = found["dense"][0] if found["dense"] else None
    heads = ("", "WikiText-2", "a novel", "documentation", "PIQA lost", "BLiMP lost", "parameters", "CPU s")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row, runs in found.items():
        if runs:
            cells = [text_cell(runs, None if runs[0] is dense else dense, text) for text in runs[0]["log_perplexity"]]
            cells += [lost_cell(runs, dense, task) for task in ("piqa", "blimp")]
            seconds = [run["cpu_seconds"] for run in runs if "cpu_seconds" in run]
            cells += [f"{runs[0]['parameters'] / 1e6:.1f}M", f"{statistics.mean(seconds):.0f}" if seconds else ""]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    for row, runs in found.items():
        for run in runs[:1]:
            lines += ["", f"{row}:"]
            lines += [f"    {prompt!r} -> {text!r}" for prompt, text in run["continuations"].items()]
    return "\n".join(lines)


def paths(work: Path, row: str, seeds: list[int]) -> list[Path]:
    """Where a row's results are."""
    return [work / f"{row}-{seed}.json" for seed in ([0] if row == "dense" else seeds)]


def text_cell(runs: list[dict[str, Any]], dense: dict[str, Any] | None, text: str) -> str:
    losses = [run["log_perplexity"][text] for run in runs]
    if dense is None:
        return f"{math.exp(statistics.mean(losses)):.1f}"
    rises = [loss - dense["log_perplexity"][text] for loss in losses]
    spread = f" ± {statistics.stdev(rises):.3f}" if len(rises) > 1 else ""
    return f"{math.exp(statistics.mean(losses)):.1f} (+{statistics.mean(rises):.2f}{spread})"


def lost_cell(runs: list[dict[str, Any]], dense: dict[str, Any] | None, task: str) -> str:
    """Percent of the dense model's lead over chance that is gone, with the paired standard error of the first run; for
    the dense model, percent that it gets right."""
    if dense is None or any(task not in run.get("right", {}) for run in (*runs, dense)):
        return ""
    before = [int(right) for right in dense["right"][task]]
    lead = statistics.mean(before) - 0.5
    if runs[0] is dense:
        return f"{100 * statistics.mean(before):.1f}%"
    gone = [[was - int(right) for was, right in zip(before, run["right"][task], strict=True)] for run in runs]
    error = statistics.stdev(gone[0]) / math.sqrt(len(before)) / lead
    return f"{100 * statistics.mean(map(statistics.mean, gone)) / lead:.0f}% ± {100 * error:.0f}"


if __name__ == "__main__":
    main()
