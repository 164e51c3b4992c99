import math
from pathlib import Path

import lm_eval.utils
import pytest
import torch
from jinja2 import Environment, Template
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.errors import UserError
from slimlm.evaluation import harness
from slimlm.evaluation.evaluate import evaluate
from slimlm.evaluation.perplexity import LogLikelihood, counted
from slimlm.evaluation.streamed import compare_streamed, relative_error
from slimlm.evaluation.tasks import TASKS_PATH, continuation
from slimlm.evaluation.text import load_test_windows
from slimlm.evaluation.tokens import measure_tokens
from slimlm.linalg.likelihood import window_nll
from slimlm.model.hidden import InMemory
from slimlm.model.stream import Stream
from slimlm.progress import LogProgress
from tests.conftest import CONFIGS, build_tiny, random_tokens, stream


def straight_loop(path: Path, windows: torch.Tensor, dtype: str = "auto") -> float:
    """The perplexity anyone would write down: one window at a time, mean over all predicted tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    losses = []
    with torch.no_grad():
        for window in windows:
            log_probabilities = model(window[None]).logits[0].double().log_softmax(-1)
            losses += [-log_probabilities[t, window[t + 1]].item() for t in range(len(window) - 1)]
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return load_test_windows(None, AutoTokenizer.from_pretrained(BUNDLED["llama"]), 8, 64).tokens


def test_perplexity_is_that_of_a_straight_loop(windows):
    data = evaluate("llama", tasks=(), num_windows=8, window=64).data
    assert data["models"][0]["texts"]["python-reference"]["perplexity"] == pytest.approx(
        straight_loop(BUNDLED["llama"], windows), rel=1e-4
    )
    assert data["texts"][0]["predicted_tokens"] == 8 * 63
    assert data["texts"][0]["stride"] == 64


def test_streamed_and_whole_model_perplexity_are_the_same_number(windows):
    model = stream(BUNDLED["llama"], torch.bfloat16)
    comparison = compare_streamed((model, model), list(windows.split(4)), LogProgress())
    whole = AutoModelForCausalLM.from_pretrained(BUNDLED["llama"], dtype=torch.bfloat16).eval()
    assert (
        comparison.dense.nll
        == comparison.compressed.nll
        == counted(measure_tokens(whole, None, windows, 4)[:, 0], whole.dtype).nll
    )
    assert comparison.block_errors == [0.0] * 6


def test_chunking_the_loss_does_not_change_it(monkeypatch):
    logits, tokens = torch.randn(3, 9, 11), torch.randint(0, 11, (3, 9))
    whole = window_nll(logits[:, :-1], tokens[:, 1:])
    monkeypatch.setattr("slimlm.linalg.likelihood.CACHED", 5)
    assert torch.allclose(window_nll(logits[:, :-1], tokens[:, 1:]), whole, atol=1e-12)
    expected = torch.nn.functional.cross_entropy(logits[1, :-1].double(), tokens[1, 1:], reduction="sum")
    assert whole[1].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_standard_error_is_that_of_the_mean_over_windows():
    likelihood, logits, tokens = LogLikelihood(torch.float32), torch.randn(6, 9, 11), torch.randint(0, 11, (6, 9))
    likelihood.count(window_nll(logits[:, :-1], tokens[:, 1:]), 8)
    means = torch.stack([torch.nn.functional.cross_entropy(logits[n, :-1].double(), tokens[n, 1:]) for n in range(6)])
    assert likelihood.mean == pytest.approx(means.mean().item(), rel=1e-6)
    assert likelihood.stderr == pytest.approx((means.var(unbiased=True) / 6).sqrt().item(), rel=1e-6)


def test_the_relative_error_is_the_mean_over_tokens_of_what_the_basis_does_not_give_back():
    basis, _ = torch.linalg.qr(torch.randn(8, 5))
    x, small = torch.randn(2, 3, 8), torch.randn(2, 3, 5)
    errors = [(a - basis @ b).norm() / a.norm() for a, b in zip(x.reshape(-1, 8), small.reshape(-1, 5), strict=True)]
    dense, compressed = Stream([], InMemory([x])), Stream([], InMemory([small]))
    assert relative_error(dense, compressed, basis) == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert relative_error(dense, dense, None) == 0


def test_a_broken_manifest_does_not_break_the_evaluation(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    (path / "slimlm.json").write_text("{}")
    assert evaluate(str(path), tasks=(), num_windows=1).data["texts"][0]["window"] == 128
    (path / "slimlm.json").write_text("[1]")
    with pytest.raises(UserError, match="not a manifest"):
        evaluate(str(path), tasks=(), num_windows=1)


def test_a_model_that_says_nan_is_not_given_a_perplexity():
    from slimlm.errors import RunFailure

    with pytest.raises(RunFailure, match="NaN"):
        LogLikelihood(torch.float32).count(window_nll(torch.full((1, 2, 5), float("nan")), torch.zeros(1, 2).long()), 2)


def test_windows_are_evenly_spaced_and_the_same_every_time():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    everything = load_test_windows(None, tokenizer, None, 64).tokens
    some = load_test_windows(None, tokenizer, 10, 64).tokens
    assert torch.equal(some, everything[torch.arange(10) * everything.shape[0] // 10])
    assert load_test_windows(None, tokenizer, 10**9, 64).tokens.shape == everything.shape


def test_models_with_different_tokenizers_are_not_compared(tmp_path: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = build_tiny(CONFIGS["llama"], tmp_path / "other")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for file in path.glob("tokenizer*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<unk>").save_pretrained(path)
    with pytest.raises(UserError, match="tokenise the test text differently"):
        evaluate(str(path), "llama", tasks=(), num_windows=2, window=32, dtype="float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ("arc_eazy",)}, "unknown task 'arc_eazy'; did you mean 'arc_easy'"),
        ({"tasks": ("missing.yaml",)}, "does not exist"),
        ({"text": "/nowhere.txt"}, "cannot be read: there is no such file"),
        ({"device": "cuda:9"}, "device 'cuda:9' is not available"),
        ({"window": 10**7}, "beyond the models' context"),
        ({"limit": 0, "tasks": ("arc_easy",)}, "--limit 0"),
    ],
)
def test_bad_requests_are_one_clear_line(arguments, message):
    with pytest.raises(UserError, match=message):
        evaluate("llama", num_windows=2, **{"tasks": (), "window": 32, **arguments})


def test_a_task_whose_data_is_out_of_reach_says_which():
    with pytest.raises(UserError, match="data of task 'arc_easy' could not be fetched.*python_reference_continuation"):
        evaluate("llama", tasks=("arc_easy",), num_windows=2, window=32)


def test_questions_have_one_answer_that_really_follows():
    import pydoc_data.topics

    built = continuation.questions()
    assert len(built) == continuation.QUESTIONS
    assert built == continuation.questions()
    texts = [
        " ".join(word for word in text.split() if len(word) <= continuation.MAX_WORD)
        for text in pydoc_data.topics.topics.values()
    ]
    for question in built[:50]:
        assert len(set(question["continuations"])) == 4
        follows = [any(question["passage"] + option in text for text in texts) for option in question["continuations"]]
        assert follows[question["answer"]]
        assert sum(follows) == 1
    answers = [question["answer"] for question in built]
    assert all(80 < answers.count(choice) < 170 for choice in range(4))


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch):
    """lm-eval's own tasks, which take half a minute to list, must not be listed."""
    made = harness._task_manager

    def manager(with_lm_evals: bool):
        assert not with_lm_evals
        return made(with_lm_evals)

    monkeypatch.setattr(harness, "_task_manager", manager)


def test_a_local_task_file_runs_by_path(tmp_path: Path, no_index):
    source = (TASKS_PATH / "python_reference_continuation.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(source.replace("python_reference_continuation\n", "my_own_task\n"))
    (tmp_path / "continuation.py").write_text((TASKS_PATH / "continuation.py").read_text())
    data = evaluate("llama", tasks=(str(tmp_path / "mine.yaml"),), num_windows=1, window=32, limit=4).data
    assert set(data["models"][0]["tasks"]) == {"my_own_task"}


def test_a_group_in_a_file_may_name_lm_evals_own_tasks(tmp_path: Path):
    (tmp_path / "group.yaml").write_text("group: mine\ntask: [python_reference_continuation, copa]\n")
    with pytest.raises(UserError, match=r"data of task '.*group.yaml' could not be fetched"):  # that of copa
        harness.load_task_manager([str(tmp_path / "group.yaml")])


@pytest.mark.parametrize("text", ["task: [", "- 1", "task: mine\nmetric_list: 3\n", "\x00"])
def test_a_broken_task_file_is_one_clear_line(tmp_path: Path, text: str):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(UserError, match=r"task '.*broken.yaml' cannot be loaded: ") as caught:
        harness.load_task_manager([str(tmp_path / "broken.yaml")])
    assert "\n" not in str(caught.value)


def test_lm_eval_neither_compiles_a_template_again_nor_describes_the_machine(tmp_path: Path, no_index, monkeypatch):
    compiled, described, actual = list[str](), list[bool](), Environment.from_string

    def spy(self: Environment, source: str) -> Template:
        compiled.append(source)
        return actual(self, source)

    monkeypatch.setattr(Environment, "from_string", spy)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: described.append(True))
    build_tiny(CONFIGS["llama"], tmp_path / "model")
    evaluate(str(tmp_path / "model"), limit=4, text=(), generate=0)
    assert not described
    assert compiled
    assert len(compiled) <= 2 * len(set(compiled))  # once more where the task is loaded
    assert lm_eval.utils.env.from_string.__func__ is spy  # as it was


@pytest.mark.slow
def test_random_weights_answer_at_chance_and_the_trained_model_above_it(tmp_path: Path, no_index):
    path = build_tiny(CONFIGS["llama"], tmp_path / "random")
    data = evaluate(str(path), "llama", num_windows=1, window=32, limit=100, dtype="float32", generate=0).data
    random, trained = (entry["tasks"]["python_reference_continuation"]["acc"] for entry in data["models"])
    assert abs(random["value"] - 0.25) < 4 * random["stderr"]
    assert trained["value"] - random["value"] > 2 * trained["stderr"]


def test_tokens_of_the_test_text_are_not_disturbed_by_batching():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED["llama"]).eval()
    tokens = random_tokens(5, 16)
    few, many = (counted(measure_tokens(model, None, tokens, size)[:, 0], model.dtype) for size in (2, 5))
    assert few.mean == pytest.approx(many.mean, rel=1e-3)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_model_that_goes_by_block_has_the_same_perplexity(dtype: str):
    few = {"tasks": (), "generate": 0, "num_windows": 7, "window": 64, "batch_size": 3, "dtype": dtype}
    (whole,), (streamed,) = (evaluate("llama", stream=stream, **few).models for stream in (False, True))
    assert (whole["streamed"], streamed["streamed"]) == (False, True)
    assert {**whole, "streamed": None, "seconds": 0} == {**streamed, "streamed": None, "seconds": 0}


def test_a_model_that_does_not_fit_goes_by_block(monkeypatch: pytest.MonkeyPatch):
    few = {"tasks": (), "num_windows": 3, "window": 32}
    monkeypatch.setattr("slimlm.evaluation.by_block.available_memory", lambda device: {"host": 10**6})
    monkeypatch.setattr("slimlm.evaluation.measuring.load_model", lambda *_: pytest.fail("loaded as a whole"))
    assert evaluate("llama", **few).models[0]["streamed"]


@pytest.mark.parametrize("more", [{"tasks": None}, {"tasks": (), "device_map": "auto"}])
def test_only_perplexity_is_streamed(more: dict[str, object]):
    with pytest.raises(UserError, match="--stream is for texts on one device"):
        evaluate("llama", stream=True, **more)
