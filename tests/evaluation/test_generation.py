from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.evaluation.evaluate import evaluate
from slimlm.evaluation.generation import (
    Habits,
    Writing,
    collapse,
    continuations,
    diverges_at,
    generation_pair,
    prompts_of,
    repetition,
)
from slimlm.evaluation.prompts import PROMPTS
from slimlm.ranks import ALONE


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["llama"])


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BUNDLED["llama"], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def written(model, tokenizer):
    prompts = prompts_of(tokenizer, False, None, 500)
    return continuations(model, model, tokenizer, Writing(prompts, 12, 0, 5), ALONE)


def test_greedy_text_is_what_generate_writes(model, tokenizer, written):
    prompts = prompts_of(tokenizer, False, None, 500)
    for prompt, found in zip(prompts, written[: len(PROMPTS)], strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
        assert found.tokens == whole[len(prompt) :]
        assert found.text == tokenizer.decode(found.tokens)


def test_drawn_text_is_the_same_every_time_and_another_of_another_seed(model, tokenizer, written):
    prompts = prompts_of(tokenizer, False, None, 500)
    again, other = (
        continuations(model, None, tokenizer, Writing(prompts, 12, seed, 5), ALONE)[len(PROMPTS) :] for seed in (0, 1)
    )
    drawn = [one.tokens for one in written[len(PROMPTS) :]]
    assert [one.tokens for one in again] == drawn
    assert [one.tokens for one in other] != drawn
    assert {one.surprise for one in again} == {None}


def test_surprise_is_what_the_dense_model_makes_of_the_text(model, tokenizer, written):
    prompt, found = prompts_of(tokenizer, False, None, 500)[3], written[3]
    logs = model(torch.tensor([prompt + found.tokens])).logits[0].double().log_softmax(-1)
    nll = [-logs[len(prompt) - 1 + place, token].item() for place, token in enumerate(found.tokens)]
    assert found.surprise == pytest.approx(sum(nll) / len(nll), rel=1e-4)


def test_text_ends_with_its_end(model, tokenizer, monkeypatch):
    """Whatever comes after EOS is not its."""
    prompts = prompts_of(tokenizer, False, None, 500)[:4]
    plain_text = continuations(model, None, tokenizer, Writing(prompts, 12, 0, 4), ALONE)
    end = plain_text[0].tokens[3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, 0])
    ended = continuations(model, None, tokenizer, Writing(prompts, 12, 0, 4), ALONE)
    assert ended[0].tokens == plain_text[0].tokens[: plain_text[0].tokens.index(end) + 1]


def test_chats_go_through_the_template(tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    found = tokenizer.decode(prompts_of(tokenizer, True, "be brief", 500)[4])
    assert found == f"<system>be brief<user>{PROMPTS[4]}<me>"


def test_repetition_is_the_share_of_runs_that_were_there():
    assert repetition(list(range(50))) == 0
    assert repetition([1, 2, 3]) == 0
    assert repetition([7] * 13) == pytest.approx(9 / 10)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("one", "other", "place"), [([1, 2], [1, 2], None), ([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [4], 0)]
)
def test_where_texts_part(one, other, place):
    assert diverges_at(one, other) == place


def of(repeats: float, surprise: float | None, tokens: float = 48.0, greedy: float = 0.2) -> dict[str, Habits]:
    return {"greedy": Habits(greedy, 48.0, None), "sampled": Habits(repeats, tokens, surprise)}


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (of(0.9, 3.0), "sampled text repeats 90%"),
        (of(0.0, 3.0, greedy=0.8), "greedy text repeats 80%"),
        (of(0.0, 9.0), "improbable: 9.0 nats a token, its own 3.0"),
        (of(0.0, 3.0, tokens=4.0), "ends after 4 tokens"),
    ],
)
def test_each_way_to_collapse_is_said(own: dict, words: str):
    (reason,) = collapse(own, of(0.0, 3.0))
    assert words in reason


def test_a_model_like_the_dense_one_has_not_collapsed():
    assert collapse(of(0.05, 3.4, greedy=0.35), of(0.0, 3.0)) == []
    assert collapse(of(0.05, None), of(0.0, None)) == []


def test_a_pair_tells_how_long_greedy_texts_are_the_same(written):
    other = [replace(one, tokens=[*one.tokens[:4], -1]) if number else one for number, one in enumerate(written)]
    pair = generation_pair(other, written)
    assert pair["same"] == 1 / len(PROMPTS)
    assert pair["diverges_at"] == 4
    assert pair["collapsed"] == []


def test_noise_for_weights_is_a_collapse(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BUNDLED["llama"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.model.layers:
            weight = block.mlp.down_proj.weight
            weight.copy_(weight.std() * 3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BUNDLED["llama"]).save_pretrained(tmp_path)
    found = evaluate(str(tmp_path), "llama", tasks=(), num_windows=1, window=32, generate=24)
    assert found.pairs[0]["generation"]["collapsed"]
    assert [one["model"] for one in found.data["written"]] == ["llama", str(tmp_path)]
