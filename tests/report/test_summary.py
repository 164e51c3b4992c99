import math
from pathlib import Path

import pytest

import slimlm
from slimlm.evaluation.perplexity import USELESS, of_no_use


def test_what_lost_too_much_is_said_to_be_of_no_use(tmp_path: Path):
    recipe = slimlm.one_step(
        model="llama", method="magnitude", sparsity=0.98, output_dir=str(tmp_path / "out"), eval_windows=2,
        max_seq_length=64,
    )  # fmt: skip
    result = slimlm.compress(recipe)
    measured = result.manifest["measured"]
    assert measured is not None
    rise = math.log(measured["compressed"]["perplexity"] / measured["dense"]["perplexity"])
    for shown in (str(result), str(slimlm.inspect_model(str(result.output_dir)))):
        said = " ".join(shown.split()).partition("WARNING: it is of no use so far: log-perplexity on ")[2]
        assert f"rose by {rise:.2f} nats a token" in said
        assert "lower the sparsity" in said


@pytest.mark.parametrize("size", [10**8, 10**9, 7 * 10**9])
def test_the_line_is_what_a_tenth_of_the_size_costs(size: int):
    def by_size(count: float) -> float:
        return 406.4 / count**0.34

    assert of_no_use({"text": by_size(size / 10) - by_size(size)}) == []


def test_a_line_is_of_the_text_that_lost_most():
    assert of_no_use({}) == of_no_use({"a": USELESS, "b": -3.0}) == []
    (line,) = of_no_use({"a": 1.5, "b": 7.0}, "smaller")
    assert line.startswith("WARNING: smaller is of no use so far: log-perplexity on b rose by 7.00 nats")
