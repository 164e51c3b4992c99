"""What decoding should take by shapes alone, with clocks that say what they are told."""

from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slimlm.evaluation.speed.shape_times import WithShapes, product_shapes
from slimlm.model.decoding import Taken
from slimlm.model.shape_times import Shape, ShapeTimes, block_constant, predicted_decode, products_seconds
from tests.conftest import random_tokens

CPU = torch.device("cpu")


def test_a_step_multiplies_with_every_linear_once(tiny: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    linears = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
    assert product_shapes(model, random_tokens(1, 5)) == Counter(tuple(one.weight.shape) for one in linears)


def test_gpt2s_transposed_products_are_found():
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    found = product_shapes(model, torch.arange(5)[None])
    assert found == Counter({(96, 32): 2, (32, 32): 2, (128, 32): 2, (32, 128): 2, (64, 32): 1})


def test_weights_of_a_shape_are_as_many_bytes_as_a_models():
    """A clock that ticks once a reading: a pass takes 1, whatever number of products is in it."""
    shapes, ticks = {(4, 8): 2, (16, 8): 3}, count()
    times = ShapeTimes(shapes, 2, torch.float32, CPU, lambda: float(next(ticks)))
    for _ in range(3):
        times.measure()
    assert times.memory.numel() == 4 * 8 * 2 + 16 * 8 * 3
    assert times.seconds == {(4, 8): 1 / 14, (16, 8): 1 / 3}
    assert {shape: len(taken) for shape, taken in times.taken.items()} == {(4, 8): 3, (16, 8): 3}


PASSES = 7


def linear_seconds(shapes: dict[Shape, int], rows: int, dtype: torch.dtype, device: torch.device) -> dict[Shape, float]:
    times = ShapeTimes(shapes, rows, dtype, device)
    for _ in range(1 + PASSES):
        times.measure()
    return times.seconds


def test_no_shapes_take_no_time():
    assert linear_seconds({}, 1, torch.float32, CPU) == {}


def test_every_shape_has_a_time():
    found = linear_seconds({(4, 8): 1, (8, 4): 2}, 3, torch.bfloat16, CPU)
    assert found.keys() == {(4, 8), (8, 4)}
    assert min(found.values()) > 0


def test_the_first_pass_warms_up_and_medians_ignore_an_interruption():
    readings = iter([0.0, 50.0, *(value for one in range(PASSES) for value in (one * 100.0, one * 100.0 + 2))])
    times = ShapeTimes({(2, 2): 1}, 1, torch.float32, CPU, lambda: next(readings))
    for _ in range(1 + PASSES):
        times.measure()
    assert times.seconds == {(2, 2): 2.0}


def test_shapes_are_timed_whenever_their_model_ran():
    class Fixed:
        def run(self, prompts: torch.Tensor, new_tokens: int) -> Taken:
            return Taken(1.0, (2.0,))

    times = ShapeTimes({(2, 2): 1}, 1, torch.float32, CPU)
    runner = WithShapes(Fixed(), times)
    assert [runner.run(random_tokens(1, 2), 2) for _ in range(2)] == [Taken(1.0, (2.0,))] * 2
    assert len(times.taken[2, 2]) == 2


def test_a_prediction_is_products_and_a_constant_a_block():
    """Times made by the very model that is fitted come out again, for another model of it too."""
    seconds = {(4, 8): 0.5, (16, 8): 0.25, (4, 4): 0.125}
    dense = products_seconds({(4, 8): 2, (16, 8): 4}, seconds)
    assert dense == 2.0
    constant = block_constant(measured=2.0 + 6 * 0.75, products=dense, blocks=6)
    assert constant == 0.75
    narrow = products_seconds({(4, 4): 2, (16, 8): 4}, seconds)
    assert predicted_decode(dense, 6, constant) == pytest.approx(6.5)
    assert predicted_decode(narrow, 5, constant) == pytest.approx(1.25 + 3.75)


def test_in_short_turns_all_of_the_memory_is_gone_through():
    """Shapes go on where the last one ended, and begin anew where there is no room for a whole weight."""
    times = ShapeTimes({(4, 8): 2, (16, 8): 1}, 1, torch.float32, CPU, turn=4 * 64)
    assert times.memory.numel() == 2 * 32 + 128
    places = []
    for _ in range(2):
        times.measure()
        places.append(times.place)
    assert places == [64 + 128, 64 + 128]
    assert [times._weights(32).storage_offset() // 32 for _ in range(4)] == [0, 2, 4, 0]
