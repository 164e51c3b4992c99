import warnings
from collections.abc import Iterator

import pytest
from transformers import DynamicCache, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.conftest import CONFIGS, random_tokens
from tests.deprecation import HEARD, PACKAGES, Deprecations


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What is heard of uses of ours in a test, which is not failed for them."""
    listener = Deprecations()
    with listener.watching(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = listener.warned
        yield listener.ours
    HEARD.ours.clear()


def by_log() -> object:
    return CausalLMOutputWithPast(cache=DynamicCache()).past_key_values


def by_warning() -> object:
    return LlamaForCausalLM(CONFIGS["llama"])(input_ids=random_tokens(1, 4), past_key_values=None)


@pytest.mark.parametrize("call", [by_log, by_warning])
def test_a_use_of_ours_is_heard_with_its_line(heard: list[str], call):
    """Behind a module's call and decorators, from the log and from warnings."""
    call()
    assert heard
    assert all(line.startswith(f"{__file__}:{call.__code__.co_firstlineno + 1}: `past_key_values`") for line in heard)


@pytest.mark.parametrize("call", [by_log, by_warning])
def test_a_use_of_another_librarys_is_its_own_affair(heard: list[str], call):
    elsewhere = call.__code__.replace(co_filename=str(PACKAGES / "lm_eval" / "models.py"))
    type(call)(elsewhere, call.__globals__)()
    assert heard == []
