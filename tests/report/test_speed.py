"""Tables of speed, from figures that are made up."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from slimlm.evaluation.speed.figures import Bench, ModelSpeed
from slimlm.evaluation.speed.shape_times import Prediction
from slimlm.evaluation.speed.timing import speed_of
from slimlm.model.decoding import Taken
from slimlm.report.speed import speed_lines, speed_tables

WOBBLE = (0.9, 0.95, 1, 1.1, 1.2)


def speed(name: str, times: float, kernels: str = "as stored", memory: int | None = 100_000_000) -> ModelSpeed:
    """One whose rounds take so many times 10 ms for a prompt of 20 and 1 ms a step."""
    batches = tuple(
        speed_of(size, 20, [Taken(0.01 * times * size * wobble, (0.001 * times,), memory) for wobble in WOBBLE])
        for size in (1, 8)
    )
    predicted = tuple(Prediction(batch.batch_size, 0.0004, 0.0011 * times) for batch in batches)
    parameters, flops = int(1_345_000_000 * times), 2.0e9 * times
    return ModelSpeed(
        name, name, kernels, "bfloat16", parameters, 2 * parameters, flops, 0.0, None, None, batches, predicted,
        (f"{name} says",),
    )  # fmt: skip


SPARSE = replace(
    speed("slice", 2.0, "bsr 16x16"), zeros=0.6, density=0.3, flops=None, predicted=(None, None), verdict=("slow",)
)
BENCH = Bench(
    (speed("slice", 0.5), SPARSE, speed("other", 0.8)),
    speed("dense", 1.0), "transformers", 20, 2, 3, "wall", 0, "cpu", "a machine",
)  # fmt: skip


def shown(found: Bench) -> list[list[str]]:
    """Lines of every table, 80 columns wide."""
    tables = []
    for table, _ in speed_tables(found):
        console = Console(width=80, record=True, markup=False, file=StringIO())
        console.print(table)
        tables.append([line.rstrip() for line in console.export_text().splitlines()])
    return tables


def row(lines: list[str], label: str) -> list[str]:
    (found,) = [line for line in lines if f"│ {label} " in line][:1]
    return [cell.strip() for cell in found.strip("│").split("│")]


def test_a_table_for_each_model_beside_the_dense_one():
    first, second = shown(BENCH)
    assert first[0] == "slice"
    assert second[0] == "other"
    assert [cell.strip() for cell in second[2].strip("┃").split("┃")] == ["", "dense", "model", "ratio"]
    assert row(second, "decode tok/s") == ["decode tok/s", "1,000", "1,250", "1.25"]
    assert row(second, "prefill tok/s") == ["prefill tok/s", "2,000 ±7%", "2,500 ±7%", "1.25"]
    assert row(second, "first token ms") == ["first token ms", "10.00", "8.00", ""]
    assert row(second, "memory") == ["memory", "100.0 M", "100.0 M", "1.00"]
    assert row(second, "parameters") == ["parameters", "1.3 G", "1.1 G", "0.80"]
    assert row(second, "predicted ms") == ["predicted ms", "", "0.88 +10%", ""]
    assert [line for line in second if "batch of" in line][1].startswith("│ batch of 8")


def test_sparse_kernels_stand_beside_what_is_stored():
    first, _ = shown(BENCH)
    header = [cell.strip() for cell in first[2].strip("┃").split("┃")]
    assert header == ["", "dense", "as stored", "bsr 16x16", "ratio", "ratio, sparse"]
    assert row(first, "decode tok/s")[1:] == ["1,000", "2,000", "500", "2.00", "0.50"]
    assert row(first, "multiplied") == ["multiplied", "all", "all", "30%", "", ""]
    assert row(first, "zeros")[1:4] == ["0%", "0%", "60%"]
    assert row(first, "FLOPs a token")[1:] == ["2.0 G", "1.0 G", "-", "0.50", ""]
    assert row(first, "predicted ms")[1:4] == ["", "0.55 +10%", ""]


def test_tables_fit_into_80_columns():
    assert max(len(line) for lines in shown(BENCH) for line in lines) <= 80
    assert not any("…" in line for lines in shown(BENCH) for line in lines)


def test_what_is_said_of_a_model_is_said_below_its_table():
    assert [lines for _, lines in speed_tables(BENCH)] == [["slice says", "slow"], ["other says"]]


def test_a_ratio_that_rounds_do_not_agree_on_is_marked():
    dense = speed("dense", 1.0)
    wobbling = [Taken(0.02 * wobble, (0.001,), None) for wobble in (0.9, 1.1, 1.0)]
    batches = tuple(speed_of(batch.batch_size, 20, wobbling) for batch in dense.batches)
    ((lines),) = shown(replace(BENCH, models=(replace(dense, batches=batches),), dense=replace(dense, batches=batches)))
    assert row(lines, "decode tok/s")[-1] == "~1.00"


def test_without_a_dense_model_there_are_no_ratios():
    alone = replace(BENCH, models=BENCH.models[2:], dense=None)
    ((lines),) = shown(alone)
    assert row(lines, "decode tok/s") == ["decode tok/s", "1,250"]


@pytest.mark.parametrize(("device", "said"), [("cpu", "weights, keys and values"), ("cuda:0", "the GPU's allocator")])
def test_how_it_was_measured_is_said(device: str, said: str):
    lines = speed_lines(replace(BENCH, device=device))
    assert "prompts of 20 random tokens and 2 new ones" in lines[0]
    assert said in lines[2]
    assert any(line.startswith("predicted: ") for line in lines)
    unknown = replace(speed("x", 1.0, memory=None), predicted=(None, None))
    assert len(speed_lines(replace(BENCH, models=(unknown,), dense=None))) == 3
    assert lines[1].startswith("~: ")
