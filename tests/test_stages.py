"""Several runs in one recipe, each on what the one before gave."""

from pathlib import Path

import numpy
import pytest
import yaml
from safetensors.torch import load_file

from slimlm import compression
from slimlm.checkpoint.journal import Journal
from slimlm.checkpoint.manifest import took, versions
from slimlm.checkpoint.pack import pack
from slimlm.compression import compress
from slimlm.errors import UserError
from slimlm.recipe import Recipe, make_recipe
from slimlm.report.summary import compress_summary
from tests.conftest import CONFIGS, build_tiny, random_tokens
from tests.methods.test_prune import LINEAR
from tests.test_resume import Killed, die_at


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> dict:
    numpy.save(tmp_path / "tokens.npy", random_tokens(20, 24).numpy())
    return {
        "model": str(tiny_llama), "dataset": str(tmp_path / "tokens.npy"), "num_calibration_samples": 20,
        "max_seq_length": 24, "eval_windows": 2, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip


def weights(path: Path | str) -> bytes:
    return (Path(path) / "model.safetensors").read_bytes()


def test_slicing_then_pruning_is_what_two_commands_give(settings: dict, tmp_path: Path):
    settings["widths"] = "hidden=24,mlp=40"
    whole = make_recipe({**settings, "then": {"method": "slimlm", "pattern": "2:4"}})
    manifest = compress(whole).manifest
    first = compress(make_recipe({**settings, "output_dir": str(tmp_path / "first")})).manifest
    del settings["widths"]
    second = {**settings, "model": str(tmp_path / "first"), "output_dir": str(tmp_path / "second")}
    last = compress(make_recipe({**second, "method": "slimlm", "pattern": "2:4"})).manifest
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
    assert [stage["recipe"]["method"] for stage in manifest["stages"]] == ["slice"]
    both = [manifest["stages"][0]["run"], manifest["run"]]
    assert took(manifest)[0] == pytest.approx(sum(run["seconds"]["total"] for run in both))
    assert f"\n{took(manifest)[0]:.0f} s, peak memory: " in compress_summary(manifest)
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    compress(make_recipe({**saved, "output_dir": str(tmp_path / "repeat")}))
    assert weights(tmp_path / "repeat") == weights(tmp_path / "out")


def test_shots_grow_to_the_sparsity_and_a_dead_run_goes_on_where_it_was(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = make_recipe({**settings, "method": "sparsegpt", "sparsity": 0.6, "shots": 3, "measure": False})
    assert [stage.sparsity for stage in recipe.stages] == pytest.approx([0.6 * 19 / 27, 0.6 * 26 / 27, 0.6])
    manifest = compress(recipe).manifest
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.6, abs=1e-3)
    found = load_file(tmp_path / "out" / "model.safetensors")
    zeros = [int((tensor == 0).sum()) for name, tensor in found.items() if name.split(".")[-2] in LINEAR]
    sizes = [tensor.numel() for name, tensor in found.items() if name.split(".")[-2] in LINEAR]
    assert zeros == [round(0.6 * size) for size in sizes]

    ran, real = [], compression._carry_out

    def dying(job, *args):
        ran.append(job.recipe.sparsity)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return real(job, *args)

    again = recipe.model_copy(update={"output_dir": str(tmp_path / "again")})
    monkeypatch.setattr(compression, "_carry_out", dying)
    with pytest.raises(KeyboardInterrupt):
        compress(again)
    assert sorted(path.name for path in tmp_path.glob("again*")) == ["again.partial"]
    ran.clear()
    monkeypatch.setattr(
        compression, "_carry_out", lambda job, *args: ran.append(job.recipe.sparsity) or real(job, *args)
    )
    compress(again, resume=True)
    assert ran == pytest.approx([0.6])  # the first two were done
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    assert not list(tmp_path.glob("again.*"))


def interrupted_in_the_second_run(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compression._carry_out

    def dying(job, fingerprint, staging, how, several):
        if several.is_last:
            raise KeyboardInterrupt
        return real(job, fingerprint, staging, how, several)

    with monkeypatch.context() as patch:
        patch.setattr(compression, "_carry_out", dying)
        with pytest.raises(KeyboardInterrupt):
            compress(recipe)


def test_results_beside_the_output_are_never_touched(settings: dict, tmp_path: Path):
    """Whatever they are called: what several runs write on the way is in the place where the output is built."""
    bystanders = [tmp_path / name for name in ("out.stage-1", "out.stage-2", "out.1", "stages")]
    for place in bystanders:
        place.mkdir()
        (place / "slimlm.json").write_text('{"precious": true}')
    compress(make_recipe({**settings, "method": "magnitude", "sparsity": 0.6, "shots": 3, "measure": False}))
    assert all((place / "slimlm.json").read_text() == '{"precious": true}' for place in bystanders)
    assert {path.name for path in tmp_path.glob("out*")} == {"out", "out.stage-1", "out.stage-2", "out.1"}


def test_the_model_itself_is_never_the_output_of_several_runs(settings: dict, tiny_llama: Path):
    before = weights(tiny_llama)
    (tiny_llama / "slimlm.json").write_text("{}")
    recipe = make_recipe(
        {**settings, "output_dir": str(tiny_llama), "method": "magnitude", "sparsity": 0.6, "shots": 2}
    )
    with pytest.raises(UserError, match="is or holds an input of this run"):
        compress(recipe, overwrite=True)
    assert weights(tiny_llama) == before


TWO = {"method": "magnitude", "sparsity": 0.3, "measure": False, "then": {"method": "wanda", "sparsity": 0.5}}


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
    patch.setattr("slimlm.record.versions", lambda: {**versions(), "torch": "0.1"})


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
    recipe = make_recipe({**settings, **TWO})
    if done:
        compress(recipe)
    else:
        with monkeypatch.context() as patch:
            die_at(patch, Journal, "commit", 12, after=True)  # in the second run
            with pytest.raises(Killed):
                compress(recipe)
    then = dict(TWO["then"])
    change(settings, then, monkeypatch)
    with pytest.raises(UserError, match=f"cannot resume: {named}"):
        compress(make_recipe({**settings, **TWO, "then": then}), resume=True)


def test_several_finished_runs_are_complete_already_and_measured_if_they_were_not(settings: dict, tmp_path: Path):
    first = compress(make_recipe({**settings, **TWO}))
    again = compress(make_recipe({**settings, **TWO}), resume=True)
    assert again.manifest == first.manifest
    manifest = compress(make_recipe({**settings, **TWO, "measure": True}), resume=True).manifest
    whole = compress(make_recipe({**settings, **TWO, "measure": True, "output_dir": str(tmp_path / "whole")})).manifest
    assert manifest["measured"] == whole["measured"]


def test_an_interrupted_first_run_is_said_before_it_goes(settings: dict, monkeypatch, caplog):
    recipe = make_recipe({**settings, **TWO})
    interrupted_in_the_second_run(recipe, monkeypatch)
    compress(recipe)
    assert "discarding 0 finished steps and 1 finished runs" in caplog.text


def test_the_manifest_says_what_every_run_chose(settings: dict):
    manifest = compress(make_recipe({**settings, **TWO})).manifest
    assert manifest["recipe"]["then"] == {
        "method": "wanda", "sparsity": 0.5, "allocation": "uniform", "curvature": "diagonal", "mask": "wanda",
        "update": "none", "swaps": 0,
    }  # fmt: skip
    assert manifest["stages"][0]["recipe"]["curvature"] == manifest["recipe"]["curvature"] == "none"


def test_one_shot_is_the_linear_schedule_of_one():
    recipe = Recipe(model="x", method="wanda", sparsity=0.4, shots=4, schedule="linear")
    assert [stage.sparsity for stage in recipe.stages] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert len(Recipe(model="x", sparsity=0.4).stages) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sparsity": 0.2, "shots": 2}, "shots are for methods that set weights to zero, not for slice"),
        ({"method": "wanda", "pattern": "2:4", "shots": 2}, "a pattern is pruned in one shot"),
        (
            {"widths": "mlp=32", "then": {"method": "wanda", "sparsity": 0.5, "pattern": "16x16"}},
            "heads of 8 are not whole",
        ),
        (
            {"widths": "mlp=32", "then": {"method": "wanda", "sparsity": 0.5, "pattern": "7x4"}},
            "which pattern 7x4 does not divide",
        ),
        ({"sparsity": 0.2, "then": {"output_dir": "x"}}, "'output_dir' is no setting of a second run"),
        ({"sparsity": 0.2, "then": {"sparsty": 0.5}}, "'sparsty' is no setting of a second run"),
        ({"sparsity": 0.2, "then": {"method": "wanda"}}, "'sparsity' is not given"),
        ({"method": "magnitude", "sparsity": 0.2, "then": {"widths": "mlp=4000"}}, "mlp=4000: the model has 48"),
        (
            {"method": "magnitude", "sparsity": 0.2, "dataset": None, "then": {"method": "wanda", "sparsity": 0.5}},
            "no calibration data: .* for the wanda that comes later",
        ),
    ],
)
def test_what_cannot_be_done_in_stages_is_said_before_any_work(
    settings: dict, tmp_path: Path, more: dict, message: str
):
    with pytest.raises(UserError, match=message):
        compress(make_recipe({**settings, **more}))
    assert not list(tmp_path.glob("out*"))


def test_the_bundled_model_is_measured_on_the_same_windows_and_needs_no_data_in_any_stage(tmp_path: Path):
    settings = {"num_calibration_samples": 5, "eval_windows": 4, "batch_size": 4, "output_dir": str(tmp_path / "out")}
    then = {"method": "wanda", "sparsity": 0.5, "eval_text": str(tmp_path / "text.txt")}
    (tmp_path / "text.txt").write_text("The cat sat on the mat and looked at the dog. " * 400)
    recipe = make_recipe({**settings, "model": "llama", "method": "magnitude", "sparsity": 0.3, "then": then})
    manifest = compress(recipe).manifest
    assert manifest["stages"][0]["measured"]["window"] == manifest["measured"]["window"] == 256
    assert manifest["calibration"]["source"] == "self"
    assert manifest["calibration"]["window"] == 256
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert Path(saved["then"]["eval_text"]).is_absolute()


def test_peaks_are_of_all_runs_on_whichever_device():
    runs = [{"seconds": {"total": 2.0}, "peak_memory_bytes": peaks} for peaks in ({"host": 5, "gpu": 3}, {"host": 7})]
    assert took({"stages": [{"run": runs[0]}], "run": runs[1]}) == (4.0, {"host": 7, "gpu": 3})


def test_text_the_model_writes_is_the_same_for_every_stage(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "self")
    recipe = make_recipe(
        {"model": str(path), "dataset": "self", "num_calibration_samples": 20, "max_seq_length": 16, "sparsity": 0.2,
         "then": {"method": "wanda", "sparsity": 0.5}, "measure": False, "output_dir": str(tmp_path / "out")}
    )  # fmt: skip
    manifest = compress(recipe).manifest
    assert manifest["calibration"]["source"] == "self"
    assert not (tmp_path / "out" / compression.CALIBRATION_NAME).exists()


def test_a_first_run_from_another_machine_is_recorded_where_it_is_accepted(settings: dict, monkeypatch):
    recipe = make_recipe({**settings, **TWO})
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
    recipe = make_recipe({**settings, **TWO})
    interrupted_in_the_second_run(recipe, monkeypatch)
    measured = compress(make_recipe({**settings, **TWO, "measure": True}), resume=True).manifest["measured"]
    whole = compress(make_recipe({**settings, **TWO, "measure": True, "output_dir": str(tmp_path / "whole")})).manifest
    assert measured == whole["measured"]


def test_pruning_then_slicing_is_measured_later(settings: dict, tmp_path: Path):
    more = {"method": "magnitude", "sparsity": 0.3, "then": {"method": "slice", "widths": "hidden=24"}}
    compress(make_recipe({**settings, **more, "measure": False}))
    manifest = compress(make_recipe({**settings, **more}), resume=True).manifest
    whole = compress(make_recipe({**settings, **more, "output_dir": str(tmp_path / "whole")})).manifest
    assert manifest["measured"] == whole["measured"]
    assert manifest["blocks"] == []


@pytest.mark.parametrize("several_first", [False, True])
def test_one_run_is_no_part_of_several_nor_the_other_way_round(settings: dict, monkeypatch, several_first: bool):
    one = make_recipe({**settings, "method": "magnitude", "sparsity": 0.3, "measure": False})
    recipes = [one, make_recipe({**settings, **TWO})]
    with monkeypatch.context() as patch:
        die_at(patch, Journal, "commit", 4, after=True)
        with pytest.raises(Killed):
            compress(recipes[several_first])
    monkeypatch.setattr(compression, "_carry_out", lambda *args: pytest.fail("work was done"))
    with pytest.raises(UserError, match="cannot resume: .* holds a (single run|recipe of several runs)"):
        compress(recipes[not several_first], resume=True)


def test_packing_into_a_place_where_runs_were_interrupted_is_refused(settings: dict, tiny_llama: Path, monkeypatch):
    recipe = make_recipe({**settings, **TWO})
    interrupted_in_the_second_run(recipe, monkeypatch)
    with pytest.raises(UserError, match="holds what `slimlm compress` did not finish"):
        pack(tiny_llama, Path(settings["output_dir"]))
    monkeypatch.undo()
    compress(recipe, resume=True)
