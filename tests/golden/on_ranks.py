"""Carry out cases on as many ranks as torchrun starts, and write down what each gives.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.golden.on_ranks PLACE RESULTS.json [CASE ...]

PLACE is a directory, or one a machine where these have disks of their own. With DIE_AT=3 in the environment the last
rank is gone at once when streams are to be saved for the third time, which they are behind every block; RESUME=1 goes
on.
"""

import dataclasses
import json
import os
import sys
from itertools import count
from pathlib import Path
from typing import Any

from slimlm.linalg import regression
from slimlm.meeting import start_ranks
from slimlm.model.saving import Saver
from slimlm.model.walk import Streams
from slimlm.progress import Progress
from slimlm.stages import compress
from slimlm.started import local_rank
from tests.golden.cases import CASES, SHARED, Case, step
from tests.golden.models import write_data
from tests.golden.run import files_of, manifest_of, model_at, recipe_of

BATCHES = {"num_calibration_samples": 23, "batch_size": 3}  # eight, the last one smaller; lanes of two
FEWER = {"num_calibration_samples": 17, "batch_size": 2}  # where the text is short


EXPERTS = [
    Case("slice qwen2_moe", "qwen2_moe", (step("slice", 0.189),)),
    Case("slimlm qwen2_moe", "qwen2_moe", (step("slimlm", 0.5),)),
    Case("sparsegpt mixtral", "mixtral", (step("sparsegpt", 0.5),)),
]


TWO_BATCHES = Case("slice two batches", "llama", (step("slice", 0.25, refine=1),), {**SHARED, "batch_size": 12})


def on_ranks(case: Case) -> Case:
    """The case, its calibration in batches that several ranks have some of each; but one, for ranks without any."""
    if case is TWO_BATCHES:
        return case
    batches = {"text.txt": FEWER, None: {}}.get(case.shared.get("dataset"), BATCHES)
    return dataclasses.replace(case, shared={**case.shared, **batches})


def shares(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank did, in all steps."""
    return [entry["run"]["ranks"] for entry in manifest.get("stages", [])] + [manifest["run"]["ranks"]]


def carry_out(case: Case, place: Path, name: str) -> Path:
    model, output = model_at(place, case.model), place / name
    if case.before:
        before = output.with_name(f"{name}-before")
        compress(recipe_of(place, model, case.before, case.shared, before), progress=Progress())
        model = str(before)
    resume = "RESUME" in os.environ
    compress(recipe_of(place, model, case.steps, case.shared, output), progress=Progress(), resume=resume)
    return output


def die_at(number: int) -> None:
    """Have this process be gone, threads and all, instead of saving streams for the number-th time."""
    save, calls = Streams.save, count(1)

    def dying(streams: Streams, index: int) -> None:
        if next(calls) == number:
            os._exit(1)
        save(streams, index)

    Streams.save = dying


def main(place: str, results: str, *names: str) -> None:
    home = Path(place)
    known = [case for case in [*CASES.values(), *EXPERTS, TWO_BATCHES] if not case.stops]
    cases = [on_ranks(case) for case in known if not names or case.name in names]
    if local_rank() == 0:  # before there are ranks: transformers saves a model on the first of them only
        home.mkdir(exist_ok=True, parents=True)
        write_data(home)
        for case in cases:
            model_at(home, case.model)
    Saver.seconds = 0.0
    regression.JUDGING_EVERY, regression.LEAST_JUDGING = 10, 1  # so that of few windows several ranks have some
    with start_ranks("cpu") as ranks:
        if "DIE_AT" in os.environ and ranks.rank == ranks.size - 1:
            die_at(int(os.environ["DIE_AT"]))
        found = {case.name: of_ranks(case, home, f"out-{ranks.size}-{number}") for number, case in enumerate(cases)}
        if ranks.first:
            Path(results).write_text(json.dumps(found))


def of_ranks(case: Case, home: Path, name: str) -> dict[str, Any]:
    """What a case gives."""
    output = carry_out(case, home, name)
    manifest = json.loads((output / "slimlm.json").read_text())
    figures = {key: value for key, value in manifest_of(output, home).items() if "fingerprint" not in key}
    return {"files": files_of(output), "manifest": figures, "ranks": shares(manifest)}


if __name__ == "__main__":
    main(*sys.argv[1:])
