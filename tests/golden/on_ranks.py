"""Carry out cases on as many ranks as torchrun starts, and write down what each gives.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.golden.on_ranks PLACE RESULTS.json [CASE ...]

PLACE is a directory, or one a machine where these have disks of their own.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimlm.progress import Progress
from slimlm.ranks import Ranks, start_ranks
from slimlm.stages import compress
from tests.golden.cases import CASES, Case
from tests.golden.models import write_data
from tests.golden.run import files_of, manifest_of, model_at, recipe_of, tensors_of

BATCHES = {"num_calibration_samples": 23, "batch_size": 3}  # eight, the last one smaller; lanes of two
FEWER = {"num_calibration_samples": 17, "batch_size": 2}  # where the text is short


def on_ranks(case: Case) -> Case:
    """The case, its calibration in batches that several ranks have some of each."""
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
    compress(recipe_of(place, model, case.steps, case.shared, output), progress=Progress())
    return output


def main(place: str, results: str, *names: str) -> None:
    with start_ranks("cpu") as ranks:
        carry_out_all(ranks, Path(place), Path(results), names)


def carry_out_all(ranks: Ranks, home: Path, results: Path, names: Sequence[str]) -> None:
    found = {}
    cases = [on_ranks(case) for case in CASES.values() if not case.stops and (not names or case.name in names)]
    home.mkdir(exist_ok=True, parents=True)
    if ranks.local == 0:
        write_data(home)
        for case in cases:
            model_at(home, case.model)
    ranks.meet()
    for number, case in enumerate(cases):
        print(f"{ranks.rank}: {case.name}", file=sys.stderr, flush=True)
        output = carry_out(case, home, f"out-{ranks.size}-{number}")
        if ranks.first:
            manifest = json.loads((output / "slimlm.json").read_text())
            figures = {key: value for key, value in manifest_of(output, home).items() if "fingerprint" not in key}
            found[case.name] = {"files": files_of(output), "manifest": figures, "ranks": shares(manifest)}
            found[case.name]["tensors"] = {key: str(tensor.shape) for key, tensor in tensors_of(output).items()}
    ranks.meet()
    if ranks.first:
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
