"""Carry out cases with whichever slimlm is imported, by nothing but `make_recipe` and `compress`."""

import hashlib
import importlib
import json
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slimlm
from slimlm import device
from slimlm.progress import Progress
from slimlm.recipe import Recipe, make_recipe
from slimlm.stages import compress
from tests.golden.cases import CASES, Case, Settings, flat, stepwise
from tests.golden.models import build, write_data

FORM = "steps" if "steps" in Recipe.model_fields else "flat"
# What tells of the time, the machine or the version, and files whose contents do.
UNLIKE = re.compile(
    r"(^|/)(run/(ranks|seconds|peak_memory_bytes|memory_before_bytes|machine|work_bytes|scratch_bytes)|versions"
    r"|fingerprint/version slimlm)(/|$)"
)
TIMED = ("slimlm.json", "slimlm.log.jsonl", "README.md", "recipe.yaml")
WINDOW = [[2, 9, 4, 30, 3, 17, 56, 5]]


class Stopped(BaseException):
    """An interruption."""


class Stopping(Progress):
    """Interrupts the run at so many of its steps, if it comes to as many."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.steps, self.checks = stop, 0, True

    def stage(self, name: str, total: int, first: int = 0) -> None:
        self.checks = name.startswith("checking")

    def step(self, count: int = 1) -> None:
        self.steps += not self.checks
        if self.steps == self.stop:
            raise Stopped


def model_at(place: Path, name: str) -> str:
    """What a recipe calls a model, made if it is not there yet."""
    if name == "bundled":
        return "llama"
    path = place / "models" / name.replace(" ", "-")
    return str(path if path.exists() else build(name, path))


def recipe_of(place: Path, model: str, steps: tuple[Settings, ...], shared: Settings, output: Path) -> Recipe:
    """Text of a model's own and refinement only where a case says so, of which older trees have none; all
    products in fp32 on any machine."""
    with suppress(ImportError):
        unasked = importlib.import_module("slimlm.unasked")
        unasked.EPOCHS = unasked.OWN_SHARE = 0  # type: ignore[attr-defined]
    device.product_dtype = lambda device, dtype=torch.float32: dtype
    files = {key: str(place / value) for key, value in shared.items() if (place / str(value)).is_file()}
    write = stepwise if FORM == "steps" else flat
    return make_recipe(write(steps, {**shared, **files, "model": model, "output_dir": str(output)}))


def carry_out(case: Case, place: Path) -> tuple[Path, list[bool]]:
    """Where the result of a case is, and of each of its interruptions whether it happened."""
    place.mkdir(exist_ok=True)
    if not (place / "tokens.npy").exists():
        write_data(place)
    model, output = model_at(place, case.model), place / "results" / case.name.replace(" ", "-").replace(":", "-")
    output.parent.mkdir(exist_ok=True)
    if case.before:
        before = output.with_name(f"{output.name}-before")
        compress(recipe_of(place, model, case.before, case.shared, before), progress=Progress())
        model = str(before)
    recipe, happened = recipe_of(place, model, case.steps, case.shared, output), []
    for stop in case.stops:
        try:
            compress(recipe, resume=bool(happened), progress=Stopping(stop))
            happened.append(False)
        except Stopped:
            happened.append(True)
    compress(recipe, resume=bool(case.stops), progress=Stopping(None))
    return output, happened


def tensors_of(output: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(output.glob("*.safetensors"))
        for name, tensor in sorted(load_file(file).items())
    }


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Every number and text in nested dictionaries and lists, by the way there; empty ones as they are."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {}
    for name, inner in pairs:
        found |= leaves(inner, f"{key}/{name}" if key else str(name))
    return found or {key: value}


def manifest_of(output: Path, place: Path) -> dict[str, Any]:
    """What the manifest says that does not depend on where and when it was written."""
    text = (output / "slimlm.json").read_text()
    for path, name in ((place, "PLACE"), (Path(slimlm.__file__).parent, "PACKAGE")):
        text = text.replace(json.dumps(str(path))[1:-1], name)
    return {key: value for key, value in leaves(json.loads(text)).items() if not UNLIKE.search(key)}


def files_of(output: Path) -> dict[str, str]:
    """SHA-256 of the files that are the same whenever they are written."""
    return {
        str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(output.rglob("*"))
        if file.is_file() and file.name not in TIMED
    }


@torch.no_grad()
def logits_of(output: Path) -> torch.Tensor:
    """[1, time, vocabulary] of one fixed window, in float32."""
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    return model(torch.tensor(WINDOW)).logits


def processor() -> str:
    """The kind of processor, by which libraries choose kernels."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def conditions() -> dict[str, str | int]:
    """What decides the bytes of a result, beside slimlm."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def account_of(case: Case, place: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """All there is to compare of a case: what can be said in JSON, and the tensors. An error, if it ends in one."""
    start = time.perf_counter()
    try:
        output, happened = carry_out(case, place)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - start}, {}
    seconds = time.perf_counter() - start
    config = leaves(json.loads((output / "config.json").read_text()))
    account = {"manifest": manifest_of(output, place), "config": config, "files": files_of(output)}
    return {**account, "interrupted": happened, "seconds": seconds}, tensors_of(output)


def main(target: str, place: str, *names: str) -> None:
    """Carry out cases by name, and write what they gave to one file."""
    transformers.utils.logging.disable_progress_bar()
    accounts, tensors = {}, {}
    for name in names:
        accounts[name], found = account_of(CASES[name], Path(place))
        accounts[name]["wording"] = CASES[name].wording
        tensors |= {f"{name}/{key}": tensor for key, tensor in found.items()}
        print(f"{accounts[name]['seconds']:6.1f} s  {name}", file=sys.stderr, flush=True)
    about = {"form": FORM, "conditions": conditions(), "cases": accounts}
    save_file(tensors, target, {"about": json.dumps(about)})
