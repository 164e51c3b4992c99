"""What training brings back, and by what: rates, optimizers, losses, low rank, and the dense model on the same text.

    python eval/recovery.py --dense ../shared/models/llama-6m --compressed slice pruned --tokens 1600000 \
        --calibration ../shared/data/calibration.txt --arms adamw=1e-4 adamw=2e-4 lora=2e-3 data mfac dense \
        --texts ../shared/data/books_test.txt ../shared/data/docs_test.txt

Half of the windows are of the given text, half are written by the dense model, once for all arms. An arm is a way and a
rate. `adamw`: towards the dense model's predictions and streams, the default of `slimlm recover`. `predictions`:
towards them alone. `likely`: its 64 likeliest tokens alone. `data`: towards the text. `lora`: changes of rank 16.
`mfac`: that optimizer. `isometric`: as `adamw`, after every matrix's root mean square singular value was set to what it
is in the dense model (dynamical isometry, arXiv 2105.05916). `dense`: the dense model itself towards the same text,
which is what more data gives where nothing was lost (arXiv 2210.13738). Held-out windows choose; `--texts` are looked
at last, where they are given (`eval/stock.py`). An arm that is done is kept in the work directory and not run again.
"""

import argparse
import hashlib
import json
import math
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from slimlm.calibration import Windows, load_windows, sample_windows
from slimlm.progress import LogProgress
from slimlm.ranks import ALONE
from slimlm.recipe import Meant, one_step
from slimlm.recover import training
from slimlm.recover.teacher import Beside
from slimlm.recover.text import Text
from slimlm.stages import compress

WAYS: dict[str, dict[str, object]] = {
    "adamw": {},
    "isometric": {},
    "predictions": {"hidden_weight": 0.0},
    "likely": {"teacher_top_k": 64},
    "data": {"objective": "cross-entropy"},
    "lora": {"lora": 16},
    "mfac": {"optimizer": "mfac"},
}
OF_TEXT = ("dense", "tokens", "window", "seed")  # what decides it, and, but for way, rate and model, an arm
OF_ARMS = (*OF_TEXT, "calibration", "texts", "judged", "set")
RATES = {"lora": 2e-3, "mfac": 1e-3}  # where an arm says none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--compressed", type=Path, nargs="*", default=[], help="directories that slimlm wrote")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="to judge by in the end")
    parser.add_argument("--work", type=Path, default=Path("/tmp/slimlm-recovery"))
    parser.add_argument("--tokens", type=int, default=1_600_000)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=["adamw=2e-4"], metavar="WAY=RATE")
    parser.add_argument("--judged", type=int, default=training.JUDGED, help="times that held-out windows are looked at")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of all arms")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    training.JUDGED = arguments.judged
    text = written_once(arguments)
    arms = [
        (way, float(rate) if rate else RATES.get(way, 2e-4))
        for way, _, rate in (a.partition("=") for a in arguments.arms)
    ]
    runs = [("", 0.0, arguments.dense), *(("as it is", 0.0, one) for one in arguments.compressed)]
    runs += [(way, rate, arguments.dense) for way, rate in arms if way == "dense"]
    runs += [(way, rate, one) for one in arguments.compressed for way, rate in arms if way != "dense"]
    rows = [kept(arguments, way, rate, model, text) for way, rate, model in runs]
    print(table(arguments, rows))


def written_once(arguments: argparse.Namespace) -> Path:
    """Windows that the dense model writes, half of all tokens: [n, window], in a file."""
    path: Path = arguments.work / f"written-{asked(arguments, OF_TEXT)}.npy"
    if not path.exists():
        model = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(arguments.dense)
        count = round(arguments.tokens / arguments.window / 2)
        windows = sample_windows(model, tokenizer, (count, arguments.window), arguments.seed)
        numpy.save(path, windows.tokens.numpy().astype(numpy.int32))
    return path


def asked(arguments: argparse.Namespace, names: tuple[str, ...]) -> str:
    """What decides it, in a few letters."""
    return hashlib.sha256(repr([str(getattr(arguments, name)) for name in names]).encode()).hexdigest()[:8]


def kept(arguments: argparse.Namespace, way: str, rate: float, model: Path, text: Path) -> dict:
    """A row of the table, from the work directory where it is there."""
    name = "-".join(
        filter(None, [model.name, way.replace(" ", "-"), f"{rate:g}" if rate else "", asked(arguments, OF_ARMS)])
    )
    place = arguments.work / name
    file = place.with_suffix(place.suffix + ".json")
    if not file.exists():
        before = resource.getrusage(resource.RUSAGE_SELF)
        notes = trained(arguments, way, rate, model, text, place) if rate else {}
        after = resource.getrusage(resource.RUSAGE_SELF)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found = {"model": model.name, "way": way or "dense", "rate": rate, "notes": notes, "cpu_seconds": seconds}
        found["log_perplexity"] = judged(place if rate else model, arguments.texts) if arguments.texts else {}
        file.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{name} done", flush=True)
    row: dict = json.loads(file.read_text())
    return row


def trained(arguments: argparse.Namespace, way: str, rate: float, model: Path, text: Path, place: Path) -> dict:
    """Train one arm, its result at `place`; what the manifest says of it."""
    if way == "dense":
        return on_data(arguments, rate, text, place)
    settings = {**WAYS[way], **dict(pair.split("=", 1) for pair in arguments.set)}
    if way == "isometric":
        model = restored(arguments.dense, model, place.with_name(f"{place.name}-start"))
    step = one_step(
        model=str(model), method="recover", teacher=str(arguments.dense), tokens=arguments.tokens, learning_rate=rate,
        dataset=[{"source": str(arguments.calibration), "share": 0.5}, {"source": str(text), "share": 0.5}],
        num_calibration_samples=round(arguments.tokens / arguments.window), max_seq_length=arguments.window,
        seed=arguments.seed, measure=False, output_dir=str(place), **settings,
    )  # fmt: skip
    notes: dict = compress(step, overwrite=True).manifest["method"]
    return notes


def on_data(arguments: argparse.Namespace, rate: float, text: Path, place: Path) -> dict:
    """The dense model towards the text, to the end: further from itself is what it is to come to."""
    models = [load(arguments.dense, dtype) for dtype in (torch.float32, "auto")]
    tokenizer, size = AutoTokenizer.from_pretrained(arguments.dense), (arguments.window, arguments.seed)
    count = round(arguments.tokens / arguments.window / 2)
    given = load_windows(str(arguments.calibration), tokenizer, count, *size, Meant("text")).tokens
    own = torch.from_numpy(numpy.load(text).astype(numpy.int64))
    names = ("given",) * len(given) + ("self",) * len(own)
    windows = Windows(torch.cat([given, own]), "both", None, names)
    schedule = training.Schedule(arguments.tokens // (8 * arguments.window), 8, rate, arguments.seed, is_kl=False)
    training.PATIENCE = schedule.steps
    done = training.Training(models[0], Beside(models[1]), Text.of(windows), schedule, ALONE)
    done.run(lambda: None, LogProgress())
    models[0].save_pretrained(place)
    tokenizer.save_pretrained(place)
    return {"history": done.state.history, "best_step": done.state.best_step, "steps": done.state.step}


def load(model: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()


def restored(dense: Path, model: Path, place: Path) -> Path:
    """A copy of a model whose matrices [out, in] are as long as the dense one's: the mean of their squared singular
    values, of which there are min(out, in), is the same."""
    shutil.copytree(model, place, dirs_exist_ok=True)
    whole = load_file(dense / "model.safetensors")
    tensors = load_file(place / "model.safetensors")
    for name, tensor in tensors.items():
        if name in whole and tensor.dim() == 2 and "embed" not in name and "lm_head" not in name:
            gains = [float(one.float().norm()) / math.sqrt(min(one.shape)) for one in (whole[name], tensor)]
            tensors[name] = (tensor.float() * (gains[0] / gains[1])).to(tensor.dtype)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def judged(model: Path, texts: list[Path]) -> dict[str, float]:
    """Log-perplexity of each text in stock transformers."""
    command = [sys.executable, str(Path(__file__).with_name("stock.py")), str(model), "--texts", *map(str, texts)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["log_perplexity"]
    return found


def table(arguments: argparse.Namespace, rows: list[dict]) -> str:
    """Held-out divergences before and after, and rises of log-perplexity over the dense model's."""
    heads = ["model", "arm", "rate", "best step", *(f"{text.stem}" for text in arguments.texts), "held out", "CPU s"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        rises = [f"{value - rows[0]['log_perplexity'][name]:.3f}" for name, value in row["log_perplexity"].items()]
        notes = row["notes"]
        ends = (
            [notes["history"][0], next(h for h in notes["history"] if h["step"] == notes["best_step"])] if notes else []
        )
        held = " -> ".join(" / ".join(f"{value:.4f}" for key, value in end.items() if "held" in key) for end in ends)
        steps = f"{notes['best_step']} of {notes['steps']}" if notes else ""
        cells = [row["model"], row["way"], f"{row['rate']:g}" if row["rate"] else "", steps, *rises, held]
        lines.append(f"| {' | '.join(cells)} | {row['cpu_seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
