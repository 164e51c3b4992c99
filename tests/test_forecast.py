import io
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, LlamaConfig

import slimlm.forecast as forecast_module
import slimlm.probe as probe_module
from slimlm import prober
from slimlm.calibration import sources
from slimlm.check import How, Job, check, spilled
from slimlm.checkpoint.skeleton import parameter_count
from slimlm.device import _left_in_container
from slimlm.errors import RunFailure, UserError
from slimlm.few import FEW, REPAIRED, SEEN, as_they_go, few, filled
from slimlm.forecast import Forecast, _more_in_batches, forecast, require_room
from slimlm.methods import method_of
from slimlm.model.streamed import StreamedModel
from slimlm.probe import _shown_steps
from slimlm.prober import Prober
from slimlm.recipe import AnyStep, Recipe, make_recipe, one_step
from slimlm.stages import compress, later_steps
from tests.conftest import CONFIGS, SIZES, build_tiny, in_steps, random_tokens
from tests.families.configs import family_config

HOW = How()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane, and nobody had lived there. " * 40)
    return one_step(
        model=str(build_tiny(CONFIGS["mistral-sliding"], tmp_path / "model")), sparsity=0.25,
        dataset=str(tmp_path / "text.txt"), num_calibration_samples=6, max_seq_length=32, batch_size=4, eval_windows=2,
        eval_text=str(tmp_path / "text.txt"), output_dir=str(tmp_path / "out"),
    )  # fmt: skip


def forecast_of(job: Job, later: Sequence[AnyStep] = ()) -> Forecast:
    with closing(Prober()) as waiting:
        return forecast(job, list(later), HOW, waiting)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, list[dict]]]:
    """The manifest and the events of each probe of a test."""
    seen, actual = [], forecast_module.probe

    def spy(*arguments):
        seen.append(actual(*arguments))
        return seen[-1]

    monkeypatch.setattr(forecast_module, "probe", spy)
    return seen


def test_the_probe_runs_the_first_block_with_the_runs_own_tokens_and_choices(
    recipe: Recipe, tmp_path: Path, in_process
):
    job = check(recipe.updated(widths="hidden=24/mlp=40").steps[0], HOW)
    place = tmp_path / "probe"
    place.mkdir()
    manifest, events = probe_module.probe(job, [job.recipe], 1, place, HOW, Prober())
    config = json.loads((place / "model" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert manifest["parameters"]["dense"] < sum(p.numel() for p in job.model.model.parameters())
    assert {event["part"] for event in events} == {"model.layers.0", "lm_head"}
    assert manifest["calibration"]["windows"] == 6
    assert job.plan.widths == "hidden=24,mlp=48,groups=2/hidden=32,mlp=40,groups=2"
    assert manifest["method"]["widths"].removesuffix(",blocks=1") in job.plan.widths.split("/")
    assert manifest["sparsity"]["requested"] == manifest["sparsity"]["achieved"]
    assert [event["part"] for event in events if event["what"] == "measuring widths"] == ["model.layers.0"]


def test_what_makes_one_block_larger_may_make_the_model_smaller(recipe: Recipe, tmp_path: Path, in_process, probed):
    """Embeddings that are no longer tied, in a deep model."""
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 24, "vocab_size": 512}, tie_word_embeddings=True)
    path = build_tiny(config, tmp_path / "deep")
    numpy.save(tmp_path / "tokens.npy", random_tokens(8, 32).numpy() % 512)
    update = {"model": str(path), "widths": "hidden=24", "dataset": str(tmp_path / "tokens.npy"), "measure": False}
    job = check(recipe.updated(**update).steps[0], HOW)
    assert job.plan.parameters < parameter_count(job.model.model)
    found = forecast_of(job)
    ((manifest, _),) = probed
    assert manifest["parameters"]["compressed"] > manifest["parameters"]["dense"]
    assert found.disk >= 4 * job.plan.parameters


@pytest.mark.parametrize(
    "settings",
    [
        {
            "steps": [
                {"method": "magnitude", "sparsity": 0.25},
                {"method": "slice", "widths": "mlp=40,blocks=2", "num_calibration_samples": 5},
            ]
        },
        {
            "dataset": "self",
            "steps": [
                {"method": "magnitude", "sparsity": 0.25, "shots": 2},
                {"method": "wanda", "sparsity": 0.5},
            ],
        },
    ],
    ids=["two", "shots"],
)
def test_every_run_of_several_is_probed(recipe: Recipe, tmp_path: Path, in_process, probed, settings: dict):
    (step,) = recipe.steps
    shared = step.model_dump(include=step.model_fields_set - {"sparsity"})
    whole = make_recipe({**shared, **settings})
    assert len(whole.steps) == 2 + ("dataset" in settings)
    job = check(whole.steps[0], HOW)
    found = forecast_of(job, later_steps(job, whole))
    ((manifest, events),) = probed
    runs = [stage["run"] for stage in (*manifest["stages"], manifest)]
    assert len(runs) == len(whole.steps)
    assert found.seconds > sum(run["seconds"]["total"] for run in runs)
    assert found.memory["host"] >= max(run["peak_memory_bytes"]["host"] for run in runs)
    assert sum(event["part"] == "model.layers.0" for event in events) >= len(runs)
    compressed = compress(whole).manifest
    for stage, probed in zip(compressed["stages"], manifest["stages"], strict=True):
        assert stage["recipe"]["steps"][0]["sparsity"] == probed["recipe"]["steps"][0]["sparsity"]
    for what in ("windows", "window"):
        assert manifest["calibration"][what] == compressed["calibration"][what]
    assert manifest["measured"]["window"] == compressed["measured"]["window"] == step.max_seq_length
    log = (tmp_path / "out" / "slimlm.log.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["part"] == "model.layers.2" for line in log) >= len(runs)
    assert found.disk >= sum(stage["bytes"]["compressed"] for stage in (*compressed["stages"], compressed))


def test_a_block_of_each_kind_is_probed_and_stands_for_those_like_it(
    recipe: Recipe, tmp_path: Path, in_process, probed
):
    """In a mixture of experts whose first block has none."""
    config = family_config("qwen3_moe")
    config.mlp_only_layers = [0]
    path = build_tiny(config, tmp_path / "moe")
    job = check(recipe.updated(model=str(path)).steps[0], HOW)
    found = forecast_of(job)
    ((manifest, events),) = probed
    parts = {event["part"] for event in events}
    assert parts == {"model.layers.0", "model.layers.1", "lm_head"}
    run = manifest["run"]["seconds"]
    second = sum(event["seconds"] for event in events if event["part"] == "model.layers.1")
    assert found.seconds == pytest.approx(run["total"] + second + not_shown(job, 2) * run["checking"])


def not_shown(job: Job, shown: int) -> float:
    """Bytes of the tensors of all blocks but the first so many, as a share of all others'."""
    sizes = {name: tensor.nbytes for name, tensor in job.model.checkpoint.tensors.items()}
    later = [f"model.layers.{block}." for block in range(shown, len(job.model.blocks))]
    hidden = sum(size for name, size in sizes.items() if name.startswith(tuple(later)))
    return hidden / (sum(sizes.values()) - hidden)


def test_a_forecast_writes_nothing_and_says_what_the_run_then_takes(recipe: Recipe, tmp_path: Path, probed):
    found = forecast_of(check(recipe.steps[0], HOW))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]
    run = compress(recipe).manifest
    assert found.disk >= run["run"]["work_bytes"] + 4 * run["parameters"]["compressed"]
    ((manifest, _),) = probed
    assert found.memory == manifest["run"]["peak_memory_bytes"]
    assert found.memory["host"] > 10**8  # PyTorch alone
    assert found.seconds > manifest["run"]["seconds"]["total"]


def test_the_forecast_scales_what_the_probe_took_to_all_blocks(recipe: Recipe, monkeypatch):
    manifest = {
        "bytes": {"dense": 1000, "compressed": 600},
        "parameters": {"dense": 10},
        "run": {
            "seconds": {"checking": 1.0, "total": 20.0},
            "peak_memory_bytes": {"host": 500},
            "work_bytes": 7,
            "scratch_bytes": 3,
        },
    }
    took = {"model.layers.0": 7.0, "model.layers.1": 2.0, "lm_head": 50.0}
    events = [{"what": "refitting", "part": part, "seconds": seconds} for part, seconds in took.items()] * 2
    monkeypatch.setattr(forecast_module, "probe", lambda *_: (manifest, events))
    job = check(recipe.steps[0], HOW)
    found = forecast_of(job)
    assert found.seconds == pytest.approx(20 + (7 + 7) + not_shown(job, 2) * 1)
    assert found.memory == {"host": 500}
    waiting = spilled(job.recipe, job.model)
    assert found.scratch == waiting
    assert found.result == 4 + sum(spec.nbytes for spec in job.plan.tensors.values())
    earlier = {"bytes": {"compressed": 800}, "run": {**manifest["run"], "peak_memory_bytes": {"host": 900}}}
    manifest["stages"] = [earlier]
    (step,) = recipe.steps
    then = {"method": "slimlm", "sparsity": 0.5, "curvature": "gram+fisher", "num_calibration_samples": 500}
    whole = in_steps(step.model_dump(include=step.model_fields_set), then)
    (last,) = later_steps(job, whole)
    more = spilled(last, job.model)
    assert more > waiting
    found = forecast_of(job, later_steps(job, whole))
    assert found.seconds == pytest.approx(2 * (20 + not_shown(job, 2) * 1) + (7 + 7))
    waits = 32 * 32 * 4 * (500 + method_of(last).scratch(last, job.model)) * (1 - REPAIRED // 32 / 500)  # in fp32
    assert found.memory == {"host": pytest.approx(900 + waits)}
    assert found.scratch == more
    assert found.result == 4 + sum(spec.nbytes for spec in job.plan.tensors.values()) * 1400 // 800
    del manifest["stages"]
    manifest["run"]["seconds"]["sampling"] = 4.0
    assert forecast_of(job).seconds == pytest.approx(20 + 7 + 7 + not_shown(job, 2) * (1 + 4))
    others = sum(parameter.numel() for parameter in job.model.model.parameters()) - 10
    config = job.model.config
    job.recipe = job.recipe.model_copy(update={"dataset": "self"})
    cached = 2 * config.num_key_value_heads * config.head_dim * 7 * 32  # keys and values of the windows written for 6
    assert forecast_of(job).memory == {"host": 500 + 4 * (others + cached)}


def test_too_little_memory_or_disk_is_an_error_that_says_what_to_change(recipe: Recipe, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(forecast_module, "available_memory", lambda device: {"host": 10**6})
    job = check(recipe.steps[0], HOW)
    with pytest.raises(UserError, match=r"needs 2\.00 GB of host memory and 0\.00 GB are free: lower --batch-size"):
        require_room(job, Forecast({"host": 2 * 10**9}, 0, 0, 0.0))
    require_room(job, Forecast({"host": 10**5}, 0, 0, 0.0))
    with pytest.raises(UserError, match=r"needs 1000000000\.00 GB in .* and its disk has .* free: free some space"):
        require_room(job, Forecast({"host": 10**5}, 10**18, 0, 0.0))
    require_room(job, Forecast({"host": 10**5}, 0, 0, 0.0), tmp_path)
    with pytest.raises(UserError, match=r"needs 1000000000\.00 GB in .* free some space or choose .* --work-dir"):
        require_room(job, Forecast({"host": 10**5}, 0, 10**18, 0.0), tmp_path)


def test_a_probe_that_is_killed_says_so(recipe: Recipe, monkeypatch):
    start = subprocess.Popen
    dying = [sys.executable, "-c", "import os; input(); os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(prober.subprocess, "Popen", lambda _, **pipes: start(dying, **pipes))
    with pytest.raises(RunFailure, match="killed by signal 9, probably for want of memory"):
        forecast_of(check(recipe.steps[0], HOW))


def test_directories_go_with_a_dry_run_that_dies_before_it_asks(tmp_path: Path):
    (tmp_path / "probe" / "model").mkdir(parents=True)
    waiting = Prober()
    waiting.owns([tmp_path / "probe"])
    waiting._process.communicate(timeout=120)  # closes the pipe, as a death does
    assert waiting._process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_probe_that_fails_says_why(recipe: Recipe, tmp_path: Path):
    job = check(recipe.steps[0], HOW)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(RunFailure, match="probe of the first blocks failed: .*tokenizer"):
        forecast_of(job)


@pytest.mark.parametrize("prefix", ["memory.{}", "memory/memory.{}"])
def test_a_containers_limit_counts_less_what_is_taken_but_for_cached_files(tmp_path: Path, prefix: str):
    old = "/" in prefix
    files = {"limit_in_bytes" if old else "max": "1000", "usage_in_bytes" if old else "current": "700"}
    files["stat"] = "anon 5\n" + ("inactive_file 1\ntotal_inactive_file 300" if old else "inactive_file 300")
    for name, text in files.items():
        path = tmp_path / prefix.format(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert _left_in_container(tmp_path) == 600
    assert _left_in_container(tmp_path / "none") > 2**60


def test_a_split_is_forgotten_where_the_probe_has_tokens_in_place_of_a_dataset(
    recipe: Recipe, tmp_path: Path, in_process, probed
):
    text = Dataset.from_dict({"text": [(tmp_path / "text.txt").read_text()]})
    DatasetDict(test=text).save_to_disk(tmp_path / "saved")
    more = {"dataset": str(tmp_path / "saved"), "dataset_split": "test"}
    forecast_of(check(recipe.updated(**more).steps[0], HOW))
    ((manifest, _),) = probed
    assert manifest["calibration"]["windows"] == 6


def test_steps_that_would_read_standard_input_anew_are_refused(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, in_process
):
    stream = SimpleNamespace(buffer=io.BytesIO(b"The old house stood at the end of the lane. " * 200), isatty=bool)
    monkeypatch.setattr(sys, "stdin", stream)
    sources._piped.cache_clear()
    (step,) = recipe.updated(dataset="-").steps
    then = {"method": "sparsegpt", "sparsity": 0.5, "num_calibration_samples": 7}
    whole = in_steps(step.model_dump(include=step.model_fields_set), then)
    job = check(whole.steps[0], HOW)
    with pytest.raises(UserError, match="different windows of standard input"):
        forecast_of(job, later_steps(job, whole))
    sources._piped.cache_clear()


def test_what_the_probe_took_is_multiplied_by_tokens_and_what_they_attend_to(recipe: Recipe, monkeypatch):
    """By hand, for windows that are six times as long in the run."""
    job = check(recipe.updated(widths="mlp=40").steps[0], HOW)
    more = {"dataset": "no file", "num_calibration_samples": 100, "max_seq_length": 2048, "refine": 3}
    job.recipe, job.windows = job.recipe.model_copy(update=more), None
    run = {"seconds": {"checking": 0.0, "total": 30.0}, "peak_memory_bytes": {"host": 0}, "work_bytes": 0}
    manifest = {"bytes": {"compressed": 1}, "run": {**run, "scratch_bytes": 0}}
    parts = [f"model.layers.{index}" for index in range(2)]
    stages = {"calibrating": 1.0, "refitting": 10.0}
    events = [{"what": what, "part": part, "seconds": seconds} for part in parts for what, seconds in stages.items()]
    monkeypatch.setattr(forecast_module, "probe", lambda *_: (manifest, events))
    config = job.model.config
    weights = sum(one.numel() for one in job.model.model.model.layers[0].parameters() if one.dim() == 2)
    attended = 1.5 * config.num_attention_heads * config.head_dim / weights
    run_pass, probe_pass = (length * (1 + length * attended) for length in (2048, 341))
    calibrating = 100 * run_pass / (6 * probe_pass)
    once = 6 * config.intermediate_size
    refitting = ((3.8 + 3 * 1.7) * 100 * run_pass + once) / ((3.8 + 1.7) * 6 * probe_pass + once)
    blocks = config.num_hidden_layers
    assert forecast_of(job).seconds == pytest.approx(8 + blocks * (calibrating + 10 * refitting))


def test_every_step_leaves_out_what_it_skips_itself(recipe: Recipe, in_process, probed):
    (step,) = recipe.steps
    shared = step.model_dump(include=step.model_fields_set - {"sparsity", "method"})
    steps = [
        {"method": "wanda", "sparsity": 0.5, "skip": "*.down_proj"},
        {"method": "sparsegpt", "sparsity": 0.6, "skip": "*.q_proj"},
    ]
    whole = make_recipe({**shared, "steps": [*steps, {"method": "magnitude", "sparsity": 0.7}]})
    job = check(whole.steps[0], HOW)
    forecast_of(job, later_steps(job, whole))
    ((manifest, _),) = probed
    skipped = [" ".join(step["skip"]) for step in manifest["recipe"]["steps"]]
    assert ["down_proj" in names for names in skipped] == [True, False, False]
    assert ["q_proj" in names for names in skipped] == [False, True, False]


def test_a_probe_tries_what_is_likely_to_be_taken(recipe: Recipe, tmp_path: Path):
    job = check(recipe.updated(widths="hidden=24/mlp=40/mlp=24").steps[0], HOW)
    (step,) = _shown_steps(job, [job.recipe], 1, tmp_path / "tokens.npy")
    assert [(choice["hidden"], choice["mlp"]) for choice in step.width_choices] == [(32, 40), (32, 24)]
    job = check(recipe.updated(widths="hidden=24/mlp=40").steps[0], HOW)
    (step,) = _shown_steps(job, [job.recipe], 1, tmp_path / "tokens.npy")
    assert [(choice["hidden"], choice["mlp"]) for choice in step.width_choices] == [(24, 48), (32, 40)]


def test_windows_count_as_far_as_the_text_goes(recipe: Recipe):
    job = check(recipe.updated(num_calibration_samples=1000, self_share=0.5).steps[0], HOW)
    there = len(job.windows.tokens)
    assert there < 1000
    (step,) = filled(job, [])
    assert step.num_windows == there + step.own_windows
    assert few(step, job.model).num_windows == step.num_windows  # 32 tokens each


def test_a_later_step_goes_by_what_the_model_wrote_in_an_earlier_one(recipe: Recipe):
    own = [{"source": "a", "windows": 5}, {"source": "self", "windows": 7}]
    first, then, last = (
        one_step(model="m", method=method, sparsity=0.5, dataset=data, max_seq_length=length).steps[0]
        for method, data, length in (("slice", own, 256), ("sparsegpt", own, 2048), ("wanda", own[:1], 2048))
    )
    found = list(as_they_go([first, then, last]))
    assert found[0] == first
    assert (found[1].num_windows, found[1].own_windows, found[1].max_seq_length) == (12, 0, 256)
    assert found[2] == last


def on(device: str) -> StreamedModel:
    config = SimpleNamespace(_attn_implementation="sdpa")
    return cast(StreamedModel, SimpleNamespace(device=torch.device(device), config=config))


@pytest.mark.parametrize(("batch", "kept"), [(4, 6), (8, 8), (16, 16), (64, 50)])
def test_a_probe_on_a_gpu_has_a_whole_batch_of_windows_and_some_to_hold_out(recipe: Recipe, batch: int, kept: int):
    (step,) = recipe.updated(num_calibration_samples=50, batch_size=batch, refine=3, max_seq_length=2048).steps
    assert (few(step, on("cuda")).num_windows, few(step, on("cuda")).max_seq_length) == (kept, 2048)
    (pruned,) = one_step(**of_text(recipe), method="sparsegpt", sparsity=0.5, num_calibration_samples=50).steps
    assert few(pruned, on("cuda")).num_windows == 50


@pytest.mark.parametrize(
    ("length", "count", "kept", "of"), [(256, 128, 8, 256), (2048, 128, 6, 341), (2048, 4, 4, 341), (16, 400, 128, 16)]
)
def test_a_probe_on_a_cpu_has_as_many_tokens_as_soon_go_through(
    recipe: Recipe, length: int, count: int, kept: int, of: int
):
    (step,) = recipe.updated(num_calibration_samples=count, max_seq_length=length, refine=3).steps
    shown = few(step, on("cpu"))
    assert (shown.num_windows, shown.max_seq_length, shown.refine) == (kept, of, 1)
    (pruned,) = one_step(**of_text(recipe), method="mfac", sparsity=0.5, num_calibration_samples=count).steps
    assert few(pruned, on("cpu")).num_windows == count  # its solves take as long for fewer


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_what_more_tokens_in_a_batch_need_is_about_what_a_block_keeps_for_its_gradients(recipe: Recipe, family: str):
    config = LlamaConfig(**SIZES) if family == "llama" else family_config(family)
    path = build_tiny(config, Path(recipe.steps[0].model).parent / family)
    job = check(recipe.updated(model=str(path)).steps[0], HOW)
    longer = job.recipe.model_copy(update={"num_calibration_samples": 50, "max_seq_length": 2048, "batch_size": 3})
    tokens = 3 * 2048 - 3 * (REPAIRED // FEW)
    assert _more_in_batches(longer, job) == pytest.approx(tokens * kept_for_gradients(path), rel=0.25)
    seen = longer.model_copy(update={"refit": False})
    assert _more_in_batches(seen, job) < _more_in_batches(longer, job) * (3 * 2048 - 3 * SEEN // FEW) / tokens


def kept_for_gradients(path: Path, tokens: int = 64) -> float:
    """Bytes for each token that the first block's backward pass needs, but for its weights."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    found: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden = torch.randn(1, tokens, model.config.hidden_size, requires_grad=True)
    places = model.model.rotary_emb(hidden, torch.arange(tokens)[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.layers[0](hidden, position_embeddings=places)
    return sum(found.values()) / tokens


def of_text(recipe: Recipe) -> dict[str, Any]:
    return recipe.steps[0].model_dump(include={"model", "dataset", "eval_windows"})
