"""Several runs in one recipe, each on what the one before gave."""

from pathlib import Path

import numpy
import pytest
import yaml
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

from slimlm import compression, stages
from slimlm.checkpoint.journal import Journal
from slimlm.checkpoint.manifest import took, versions
from slimlm.checkpoint.pack import pack
from slimlm.errors import UserError
from slimlm.recipe import Recipe, make_recipe, one_step
from slimlm.report.summary import compress_summary
from slimlm.stages import compress
from tests.conftest import CONFIGS, build_tiny, in_steps, on_tokens, random_tokens
from tests.prune.test_run import LINEAR
from tests.test_resume import Killed, die_at


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> dict:
    return on_tokens(tiny_llama, tmp_path)


def weights(path: Path | str) -> bytes:
    return (Path(path) / "model.safetensors").read_bytes()


def test_slicing_then_pruning_is_what_two_commands_give(settings: dict, tmp_path: Path):
    settings["widths"] = "hidden=24,mlp=40"
    whole = in_steps(settings, {"method": "slimlm", "pattern": "2:4"})
    manifest = compress(whole).manifest
    first = compress(one_step(**{**settings, "output_dir": str(tmp_path / "first")})).manifest
    del settings["widths"]
    second = {**settings, "model": str(tmp_path / "first"), "output_dir": str(tmp_path / "second")}
    last = compress(one_step(**{**second, "method": "slimlm", "pattern": "2:4"})).manifest
    assert weights(tmp_path / "out") == weights(tmp_path / "second")
    assert not list(tmp_path.glob("out.*"))
    assert manifest["model"]["path"] == settings["model"]
    assert manifest["measured"]["dense"] == first["measured"]["dense"]
    assert manifest["measured"]["compressed"] == last["measured"]["compressed"]
    assert manifest["parameters"] == {
        "dense": first["parameters"]["dense"],
        "compressed": first["parameters"]["compressed"],
    }
    assert manifest["sparsity"]["zeros_in_pruned_matrices"] == 0.5
    assert [stage["recipe"]["steps"][0]["method"] for stage in manifest["stages"]] == ["slice"]
    both = [manifest["stages"][0]["run"], manifest["run"]]
    assert took(manifest)[0] == pytest.approx(sum(run["seconds"]["total"] for run in both))
    assert f"\n{took(manifest)[0]:.0f} s, peak memory: " in compress_summary(manifest)
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert [step["method"] for step in saved["steps"]] == ["slice", "slimlm"]
    compress(make_recipe({**saved, "output_dir": str(tmp_path / "repeat")}))
    assert weights(tmp_path / "repeat") == weights(tmp_path / "out")


def test_a_tokenizer_that_a_later_step_would_lose_is_found_before_the_first(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(source: Path, tokenizer: object, model_type: str, trusted: bool) -> None:
        raise UserError(f"not a {model_type}'s")

    monkeypatch.setattr("slimlm.check.check_tokenizer", refused)
    monkeypatch.setattr(stages, "carry_out", lambda *args: pytest.fail("it began"))
    recipe = in_steps({**settings, "method": "magnitude", "sparsity": 0.3}, {"method": "slice", "sparsity": 0.25})
    with pytest.raises(UserError, match="not a mistral's"):
        compress(recipe)


def test_shots_grow_to_the_sparsity_and_a_dead_run_goes_on_where_it_was(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = one_step(**{**settings, "method": "sparsegpt", "sparsity": 0.6, "shots": 3, "measure": False})
    assert [step.sparsity for step in recipe.steps] == pytest.approx([0.6 * 19 / 27, 0.6 * 26 / 27, 0.6])
    manifest = compress(recipe).manifest
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.6, abs=1e-3)
    found = load_file(tmp_path / "out" / "model.safetensors")
    zeros = [int((tensor == 0).sum()) for name, tensor in found.items() if name.split(".")[-2] in LINEAR]
    sizes = [tensor.numel() for name, tensor in found.items() if name.split(".")[-2] in LINEAR]
    assert zeros == [round(0.6 * size) for size in sizes]

    ran, real = [], stages.carry_out

    def dying(job, *args):
        ran.append(job.recipe.sparsity)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return real(job, *args)

    again = recipe.updated(output_dir=str(tmp_path / "again"))
    monkeypatch.setattr(stages, "carry_out", dying)
    with pytest.raises(KeyboardInterrupt):
        compress(again)
    assert sorted(path.name for path in tmp_path.glob("again*")) == ["again.partial"]
    ran.clear()
    monkeypatch.setattr(stages, "carry_out", lambda job, *args: ran.append(job.recipe.sparsity) or real(job, *args))
    compress(again, resume=True)
    assert ran == pytest.approx([0.6])  # the first two were done
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    assert not list(tmp_path.glob("again.*"))


def interrupted_in_the_second_run(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stages.carry_out

    def dying(job, fingerprint, staging, how):
        if staging.output == Path(recipe.steps[0].output_dir):
            raise KeyboardInterrupt
        return real(job, fingerprint, staging, how)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "carry_out", dying)
        with pytest.raises(KeyboardInterrupt):
            compress(recipe)


def test_results_beside_the_output_are_never_touched(settings: dict, tmp_path: Path):
    """Whatever they are called: what several runs write on the way is in the place where the output is built."""
    bystanders = [tmp_path / name for name in ("out.stage-1", "out.stage-2", "out.1", "stages")]
    for place in bystanders:
        place.mkdir()
        (place / "slimlm.json").write_text('{"precious": true}')
    compress(one_step(**{**settings, "method": "magnitude", "sparsity": 0.6, "shots": 3, "measure": False}))
    assert all((place / "slimlm.json").read_text() == '{"precious": true}' for place in bystanders)
    assert {path.name for path in tmp_path.glob("out*")} == {"out", "out.stage-1", "out.stage-2", "out.1"}


def test_the_model_itself_is_never_the_output_of_several_runs(settings: dict, tiny_llama: Path):
    before = weights(tiny_llama)
    (tiny_llama / "slimlm.json").write_text("{}")
    recipe = one_step(**{**settings, "output_dir": str(tiny_llama), "method": "magnitude", "sparsity": 0.6, "shots": 2})
    with pytest.raises(UserError, match="is or holds an input of this run"):
        compress(recipe, overwrite=True)
    assert weights(tiny_llama) == before


FIRST = {"method": "magnitude", "sparsity": 0.3, "measure": False}
THEN = {"method": "wanda", "sparsity": 0.5}


def two(settings: dict, **more) -> Recipe:
    return in_steps({**settings, **FIRST, **more}, THEN)


def changed_weight(settings: dict, then: dict, patch: pytest.MonkeyPatch) -> None:
    path = Path(settings["model"]) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))


def other_data(settings: dict, then: dict, patch: pytest.MonkeyPatch) -> None:
    numpy.save(settings["dataset"], random_tokens(20, 24, seed=7).numpy())


def other_seed_later(settings: dict, then: dict, patch: pytest.MonkeyPatch) -> None:
    then["seed"] = 3


def other_version(settings: dict, then: dict, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("slimlm.manifest.versions", lambda: {**versions(), "torch": "0.1"})


@pytest.mark.parametrize("done", [False, True], ids=["interrupted", "finished"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed_weight, r"model model\.safetensors was"),
        (other_data, "calibration sha256"),
        (other_seed_later, "recipe seed.* was 0, is now 3"),
        (other_version, r"version torch was '.*', is now '0\.1'"),
    ],
)
def test_several_runs_are_resumed_only_where_one_would_be(
    settings: dict, monkeypatch: pytest.MonkeyPatch, change, named: str, done: bool
):
    recipe = two(settings)
    if done:
        compress(recipe)
    else:
        with monkeypatch.context() as patch:
            die_at(patch, Journal, "commit", 12, after=True)  # in the second run
            with pytest.raises(Killed):
                compress(recipe)
    then = dict(THEN)
    change(settings, then, monkeypatch)
    with pytest.raises(UserError, match=f"cannot resume: {named}"):
        compress(in_steps({**settings, **FIRST}, then), resume=True)


def test_several_finished_runs_are_complete_already_and_measured_if_they_were_not(settings: dict, tmp_path: Path):
    first = compress(two(settings))
    again = compress(two(settings), resume=True)
    assert again.manifest == first.manifest
    manifest = compress(two(settings, measure=True), resume=True).manifest
    whole = compress(two(settings, measure=True, output_dir=str(tmp_path / "whole"))).manifest
    assert manifest["measured"] == whole["measured"]


def test_an_interrupted_first_run_is_said_before_it_goes(settings: dict, monkeypatch, caplog):
    recipe = two(settings)
    interrupted_in_the_second_run(recipe, monkeypatch)
    compress(recipe)
    assert "discarding 0 finished steps and 1 finished runs" in caplog.text


def test_the_manifest_says_what_every_run_chose(settings: dict):
    manifest = compress(two(settings)).manifest
    first, last = manifest["recipe"]["steps"]
    assert last == {
        "method": "wanda", "sparsity": 0.5, "pattern": None, "allocation": "uniform", "curvature": "diagonal",
        "mask": "wanda", "update": "none", "dataset": settings["dataset"],
    }  # fmt: skip
    assert first["curvature"] == "none"
    assert manifest["stages"][0]["recipe"]["steps"] == [{key: first[key] for key in first if key != "dataset"}]


def test_one_shot_is_the_linear_schedule_of_one():
    recipe = one_step(model="x", method="wanda", sparsity=0.4, shots=4, schedule="linear")
    assert [step.sparsity for step in recipe.steps] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert len(one_step(model="x", sparsity=0.4).steps) == 1


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [{"widths": "mlp=32"}, {"method": "wanda", "sparsity": 0.5, "pattern": "16x16"}],
            "heads of 8 are not whole",
        ),
        (
            [{"widths": "mlp=32"}, {"method": "wanda", "sparsity": 0.5, "pattern": "7x4"}],
            "which pattern 7x4 does not divide",
        ),
        (
            [{"method": "magnitude", "sparsity": 0.2}, {"method": "slice", "widths": "mlp=4000"}],
            "mlp=4000: the model has 48",
        ),
        (
            [{"method": "magnitude", "sparsity": 0.2, "dataset": None}, {"method": "wanda", "sparsity": 0.5}],
            "no calibration data: .* for the wanda that comes later",
        ),
    ],
)
def test_what_cannot_be_done_in_stages_is_said_before_any_work(
    settings: dict, tmp_path: Path, steps: list[dict], message: str
):
    with pytest.raises(UserError, match=message):
        compress(in_steps({**settings, **steps[0]}, *steps[1:]))
    assert not list(tmp_path.glob("out*"))


def test_tiles_are_checked_against_every_slice_before_them(settings: dict):
    steps = [{"method": "slice", "widths": "mlp=32"}, {"method": "wanda", "sparsity": 0.5, "pattern": "16x16"}]
    with pytest.raises(UserError, match="heads of 8 are not whole"):
        compress(in_steps({**settings, "method": "magnitude", "sparsity": 0.2}, *steps))


def test_the_bundled_model_is_measured_on_the_same_windows_and_needs_no_data_in_any_stage(tmp_path: Path):
    settings = {"num_calibration_samples": 5, "eval_windows": 4, "batch_size": 4, "output_dir": str(tmp_path / "out")}
    then = {"method": "wanda", "sparsity": 0.5, "eval_text": str(tmp_path / "text.txt")}
    (tmp_path / "text.txt").write_text("The cat sat on the mat and looked at the dog. " * 400)
    recipe = in_steps({**settings, "model": "llama", "method": "magnitude", "sparsity": 0.3}, then)
    manifest = compress(recipe).manifest
    assert manifest["stages"][0]["measured"]["window"] == manifest["measured"]["window"] == 256
    assert manifest["calibration"]["source"] == "self"
    assert manifest["calibration"]["window"] == 256
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert Path(saved["steps"][1]["eval_text"]).is_absolute()


def test_peaks_are_of_all_runs_on_whichever_device():
    runs = [{"seconds": {"total": 2.0}, "peak_memory_bytes": peaks} for peaks in ({"host": 5, "gpu": 3}, {"host": 7})]
    assert took({"stages": [{"run": runs[0]}], "run": runs[1]}) == (4.0, {"host": 7, "gpu": 3})


def test_text_the_model_writes_is_the_same_for_every_stage(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "self")
    recipe = in_steps(
        {"model": str(path), "dataset": "self", "num_calibration_samples": 20, "max_seq_length": 16, "sparsity": 0.2,
         "measure": False, "output_dir": str(tmp_path / "out")},
        THEN,
    )  # fmt: skip
    manifest = compress(recipe).manifest
    assert manifest["calibration"]["source"] == "self"
    assert not (tmp_path / "out" / stages.CALIBRATION_NAME).exists()


def test_a_first_run_from_another_machine_is_recorded_where_it_is_accepted(settings: dict, monkeypatch):
    recipe = two(settings)
    interrupted_in_the_second_run(recipe, monkeypatch)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "SMALL")
    with pytest.raises(UserError, match="machine instructions was .*, is now 'SMALL'"):
        compress(recipe, resume=True)
    manifest = compress(recipe, resume_anyway=True).manifest
    (differences,) = manifest["stages"][0]["run"]["resumed_anyway"]
    assert differences["machine instructions"][1] == "SMALL"
    assert manifest["run"]["resumed_anyway"] == []  # the second run began here


def test_runs_that_are_measured_only_after_they_were_resumed_are_measured_against_the_dense_model(
    settings: dict, tmp_path: Path, monkeypatch
):
    recipe = two(settings)
    interrupted_in_the_second_run(recipe, monkeypatch)
    measured = compress(two(settings, measure=True), resume=True).manifest["measured"]
    whole = compress(two(settings, measure=True, output_dir=str(tmp_path / "whole"))).manifest
    assert measured == whole["measured"]


def test_pruning_then_slicing_is_measured_later(settings: dict, tmp_path: Path):
    more, then = {"method": "magnitude", "sparsity": 0.3}, {"method": "slice", "widths": "hidden=24"}
    compress(in_steps({**settings, **more, "measure": False}, then))
    manifest = compress(in_steps({**settings, **more}, then), resume=True).manifest
    whole = compress(in_steps({**settings, **more, "output_dir": str(tmp_path / "whole")}, then)).manifest
    assert manifest["measured"] == whole["measured"]
    assert manifest["blocks"] == []


@pytest.mark.parametrize("several_first", [False, True])
def test_one_run_is_no_part_of_several_nor_the_other_way_round(settings: dict, monkeypatch, several_first: bool):
    one = one_step(**{**settings, "method": "magnitude", "sparsity": 0.3, "measure": False})
    recipes = [one, two(settings)]
    with monkeypatch.context() as patch:
        die_at(patch, Journal, "commit", 4, after=True)
        with pytest.raises(Killed):
            compress(recipes[several_first])
    for module in (stages, compression):
        monkeypatch.setattr(module, "carry_out", lambda *args: pytest.fail("work was done"))
    with pytest.raises(UserError, match="cannot resume: .* holds a (single run|recipe of several runs)"):
        compress(recipes[not several_first], resume=True)


def test_packing_into_a_place_where_runs_were_interrupted_is_refused(settings: dict, tiny_llama: Path, monkeypatch):
    recipe = two(settings)
    interrupted_in_the_second_run(recipe, monkeypatch)
    with pytest.raises(UserError, match="holds what `slimlm compress` did not finish"):
        pack(tiny_llama, Path(settings["output_dir"]))
    monkeypatch.undo()
    compress(recipe, resume=True)


def test_what_is_said_of_hub_datasets_does_not_hold_for_text_that_a_step_before_wrote(settings: dict, tmp_path: Path):
    text = Dataset.from_dict({"text": ["The old house stood at the end of the lane. " * 200]})
    DatasetDict(test=text).save_to_disk(tmp_path / "saved")
    steps = [{"method": "slice", "widths": "mlp=40", "self_share": 0.5}, {"method": "wanda", "sparsity": 0.5}]
    steps[1]["dataset"] = "self"
    more = {"dataset": str(tmp_path / "saved"), "dataset_split": "test", "steps": steps}
    manifest = compress(make_recipe({**settings, **more})).manifest
    assert manifest["stages"][0]["recipe"]["dataset_split"] == "test"
    assert manifest["sparsity"]["zeros_in_pruned_matrices"] == pytest.approx(0.5, abs=0.01)


def test_whoever_may_read_one_file_of_a_result_may_read_all(settings: dict, tmp_path: Path):
    made = compress(one_step(**{**settings, "widths": "hidden=24"})).output_dir
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.rglob("*") if path.is_file()}
    assert "basis.safetensors" in modes
    assert len(set(modes.values())) == 1, modes
