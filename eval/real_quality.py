"""What slimlm does to a real LLM: SmolLM2-135M, calibrated on one kind of text, judged on that kind and on two others.

    python eval/real_model.py /tmp/smollm2
    python eval/real_quality.py --model /tmp/smollm2 --data ../shared/data --work /tmp/quality

Calibrates on 128 windows of 256 tokens of the first nine tenths of WikiText-2's validation text, seed 0, and judges on
its last tenth, on a novel and on documentation (64 windows of 512 tokens each, fp32, stock transformers in a process
that cannot import slimlm). A row takes 15 to 40 minutes on two cores; finished rows are kept in the work directory and
not run again. `--only ROW` runs one, `--print` just prints the table of those that are there.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROWS: dict[str, list[str] | None] = {  # flags of `slimlm compress`; None for the dense model itself
    "dense": None,
    "slice-20": ["--sparsity=0.2"],
    "slice-25": ["--sparsity=0.25"],
    "slimlm-50": ["--method=slimlm", "--sparsity=0.5"],
    "slimlm-50-solved": ["--method=slimlm", "--sparsity=0.5", "--allocation=solved"],
    "slimlm-2-4": ["--method=slimlm", "--pattern=2:4"],
    "sparsegpt-50": ["--method=sparsegpt", "--sparsity=0.5"],
}
TEXTS = ("wikitext2", "books_test", "docs_test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="wikitext2_valid.txt, books_test.txt, docs_test.txt")
    parser.add_argument("--work", type=Path, default=Path("/tmp/slimlm-quality"))
    parser.add_argument("--only", choices=ROWS, action="append", help="rows to run; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    calibration, texts = split_texts(arguments.data, arguments.work)
    for row in [] if arguments.print else arguments.only or ROWS:
        kept = arguments.work / f"{row}-{arguments.seed}.json"
        if not kept.exists():
            kept.write_text(json.dumps(measured(row, arguments, calibration, texts), indent=2) + "\n")
            print(f"{row} done", flush=True)
    print(table(arguments.work, arguments.seed))


def split_texts(data: Path, work: Path) -> tuple[Path, list[Path]]:
    """The text to calibrate on, and those to judge by: the last tenth of the calibration's kind first."""
    lines = (data / "wikitext2_valid.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    edge = len(lines) * 9 // 10
    calibration, test = work / "calibration.txt", work / f"{TEXTS[0]}.txt"
    for path, part in ((calibration, lines[:edge]), (test, lines[edge:])):
        path.write_text("".join(part), encoding="utf-8")
    return calibration, [test, *(data / f"{name}.txt" for name in TEXTS[1:])]


def measured(row: str, arguments: argparse.Namespace, calibration: Path, texts: list[Path]) -> dict[str, Any]:
    """Compress (in a process of its own, resumed where one was interrupted), and judge in another."""
    flags, directory, facts = ROWS[row], arguments.model, {}
    if flags is not None:
        directory = arguments.work / f"{row}-{arguments.seed}"
        command = [sys.executable, "-m", "slimlm", "compress", f"--model={arguments.model}", f"--dataset={calibration}"]
        command += ["--num-calibration-samples=128", "--max-seq-length=256", f"--seed={arguments.seed}"]
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
    done = subprocess.run(judge, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout.splitlines()[-1]), **facts}


def table(work: Path, seed: int) -> str:
    """Perplexity on the three texts, the rise of its logarithm in brackets, and what it took."""
    rows = {row: work / f"{row}-{seed}.json" for row in ROWS}
    found = {row: json.loads(path.read_text()) for row, path in rows.items() if path.exists()}
    dense = found.get("dense", {}).get("log_perplexity")
    lines = ["| | WikiText-2 | a novel | documentation | parameters | CPU s |", "| --- " * 6 + "|"]
    for row, facts in found.items():
        cells = []
        for text, loss in facts["log_perplexity"].items():
            rise = f" (+{loss - dense[text]:.2f})" if dense and row != "dense" else ""
            cells.append(f"{math.exp(loss):.1f}{rise}")
        cells += [f"{facts['parameters'] / 1e6:.1f}M", f"{facts['cpu_seconds']:.0f}" if "cpu_seconds" in facts else ""]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    for row, facts in found.items():
        lines += ["", f"{row}:"]
        lines += [f"    {prompt!r} -> {text!r}" for prompt, text in facts["continuations"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
