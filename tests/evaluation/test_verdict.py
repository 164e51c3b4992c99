"""Whether a model is called faster, and what is said where it is not."""

import re
from dataclasses import replace

import pytest

from slimlm.evaluation.speed.timing import Ratio
from slimlm.evaluation.speed.verdict import Facts, verdict

SURE = Ratio(1.3, 1.25, 1.35)
SAME = Ratio(1.01, 1.005, 1.015)
SLOWER = Ratio(0.5, 0.4, 0.6)
UNSURE = Ratio(1.02, 0.9, 1.1)
STOCK = Facts("m", SURE, SURE)


def test_a_faster_model_is_called_so_and_nothing_more_is_said():
    facts = replace(STOCK, widths=frozenset({100}), zeros=0.9, is_fast_dtype=False, beside=0.9)
    assert verdict(facts) == ["m: 1.30 times as fast as dense in prefill, 1.30 times as fast as dense in decode"]


def test_what_is_not_faster_is_named():
    first, *_ = verdict(replace(STOCK, decode=SAME))
    assert first.endswith("1.01 times as fast as dense in decode: not faster in decode")
    first, *_ = verdict(replace(STOCK, prefill=SLOWER, decode=SAME))
    assert first.endswith("not faster in prefill and decode")


def test_rounds_that_disagree_are_told():
    _, noise, *_ = verdict(replace(STOCK, decode=UNSURE))
    assert noise.startswith("noise: rounds do not agree about which is faster in decode")
    assert not any(line.startswith("noise") for line in verdict(replace(STOCK, decode=SAME)))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"zeros": 0.5}, "zeros: 50% of its linears' weights are zeros that a stock checkpoint stores"),
        ({"widths": frozenset({576, 216, 544})}, "widths: kernels want multiples of 32, .* not so: 216$"),
        ({"widths": frozenset({576, 544, 512})}, "widths: kernels want multiples of 64, .* not so: 544$"),
        (
            {"is_fast_dtype": False, "dtype": "float16", "dense_dtype": "float16"},
            "not known to have fast products in float16",
        ),
        ({"dense_dtype": "bfloat16"}, "computes in float32 and the dense model in bfloat16"),
        ({"beside": 0.8}, "size: 80% of a decoded token's time"),
        ({"flops": 1.0}, "work: a token takes 100% of the dense model's multiplications"),
        ({"kernels": "bsr 16x16"}, "kernels: bsr 16x16 kernels cost more here"),
        ({}, "none of the usual reasons"),
    ],
)
def test_each_reason_is_given_where_it_holds(facts: dict, reason: str):
    (_, found) = verdict(replace(STOCK, decode=SAME, **facts))
    assert re.search(reason, found), found


@pytest.mark.parametrize(
    "facts",
    [
        {"zeros": 0.1},
        {"widths": frozenset({576, 216}), "dense_widths": frozenset({216})},  # the dense model has it too
        {"beside": 0.3},
        {"flops": 0.7},
        {"zeros": 0.5, "kernels": "bsr 16x16"},  # which leave them out
    ],
)
def test_no_reason_is_given_where_it_does_not_hold(facts: dict):
    _, found = verdict(replace(STOCK, decode=SAME, **facts))
    assert found.startswith(("none of", "kernels:"))


def test_a_small_model_is_no_reason_for_a_slow_prompt():
    assert not any(line.startswith("size") for line in verdict(replace(STOCK, prefill=SAME, beside=0.9)))


def test_other_kernels_are_in_the_name():
    assert verdict(replace(STOCK, kernels="2:4"))[0].startswith("m with 2:4 kernels: 1.30 times")
