"""Recovery as a step of a recipe and as a command, from directory to directory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimlm.checkpoint.card import recovered
from slimlm.checkpoint.journal import Journal
from slimlm.cli import app
from slimlm.errors import RunFailure, UserError
from slimlm.progress import Progress
from slimlm.recipe import one_step
from slimlm.recover import run as module
from slimlm.recover.training import Training
from slimlm.report.summary import compress_summary
from slimlm.stages import compress
from tests.conftest import CONFIGS, build_tiny, in_steps
from tests.families.configs import family_config
from tests.recover.conftest import TRAINED, recovering, weights
from tests.test_resume import Killed, die_at, result


def test_a_slice_is_trained_back_in_the_same_recipe(settings: dict, tmp_path: Path):
    sliced = in_steps({**settings, "widths": "hidden=24", "refit": False}).updated(output_dir=str(tmp_path / "sliced"))
    first = compress(sliced).manifest
    recipe = in_steps({**settings, "widths": "hidden=24", "refit": False}, {"method": "recover", **TRAINED})
    manifest = compress(recipe).manifest
    assert [stage["recipe"]["steps"][0]["method"] for stage in manifest["stages"]] == ["slice"]
    assert manifest["parameters"] == first["parameters"]
    assert manifest["sparsity"] == first["sparsity"]
    assert manifest["model"]["path"] == settings["model"]
    assert manifest["measured"]["dense"] == first["measured"]["dense"]
    told = manifest["method"]
    assert told["history"][0].keys() == {"step", "held out self", "held out tokens.npy"}
    assert told["best_step"] > 0
    assert told["trained_tokens"] == told["steps"] * 8 * 24
    held = {one["step"]: sum(value for name, value in one.items() if "held" in name) for one in told["history"]}
    assert held[told["best_step"]] < held[0]
    assert manifest["measured"]["compressed"]["log_perplexity"] != first["measured"]["compressed"]["log_perplexity"]
    (line,) = recovered(manifest)
    assert "tokens.npy" in line
    assert line in compress_summary(manifest)
    assert line in (tmp_path / "out" / "README.md").read_text()
    alone = compress(one_step(**recovering(settings, tmp_path / "sliced", output_dir=str(tmp_path / "alone"))))
    assert result(alone.output_dir) == result(tmp_path / "out")
    assert alone.manifest["sparsity"] == first["sparsity"]
    assert alone.manifest["method"]["teacher"] == settings["model"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.hidden_size == 24


def test_zeros_of_a_pattern_are_in_the_file_where_they_were(settings: dict, pruned: Path):
    manifest = compress(one_step(**recovering(settings, pruned))).manifest
    before, after = weights(pruned), weights(Path(settings["output_dir"]))
    assert before.keys() == after.keys()
    matrices = [name for name in before if "proj" in name]
    for name in before:
        assert not torch.equal(before[name], after[name]), name
    for name in matrices:
        assert torch.equal(before[name] == 0, after[name] == 0), name
    assert manifest["method"]["zeros_kept"] == sum(int((before[name] == 0).sum()) for name in matrices)
    assert manifest["sparsity"]["zeros_in_pruned_matrices"] == 0.5


def test_low_rank_changes_keep_zeros_and_all_else_as_it_is(settings: dict, pruned: Path):
    manifest = compress(one_step(**recovering(settings, pruned, lora=2, learning_rate=0.03))).manifest
    before, after = weights(pruned), weights(Path(settings["output_dir"]))
    assert manifest["method"]["best_step"] > 0
    for name in before:
        assert torch.equal(before[name], after[name]) == ("proj" not in name), name
        assert "proj" not in name or torch.equal(before[name] == 0, after[name] == 0), name


def test_low_rank_changes_are_resumed_to_the_same_bytes(
    settings: dict, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = one_step(**recovering(settings, pruned, lora=2, measure=False))
    expected = result(compress(recipe.updated(output_dir=str(tmp_path / "expected"))).output_dir)
    with monkeypatch.context() as patch:
        die_at(patch, Training, "_step", 5, True)
        with pytest.raises(Killed):
            compress(recipe)
    assert result(compress(recipe, resume=True).output_dir) == expected


def test_skipped_linears_stay_as_they_are(settings: dict, pruned: Path):
    compress(one_step(**recovering(settings, pruned, skip=["*.down_proj"])))
    before, after = weights(pruned), weights(Path(settings["output_dir"]))
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if "down_proj" in name
    }


def test_a_run_that_makes_it_worse_gives_back_what_went_in(settings: dict, pruned: Path, capsys):
    class Told(Progress):
        lines: list[str] = []  # noqa: RUF012

        def line(self, text: str) -> None:
            self.lines.append(text)

    recipe = one_step(**recovering(settings, pruned, learning_rate=30.0))
    manifest = compress(recipe, progress=Told()).manifest
    before, after = weights(pruned), weights(Path(settings["output_dir"]))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert manifest["method"]["best_step"] == 0
    assert any("no better" in line for line in Told.lines)
    assert "nothing was better" in recovered(manifest)[0]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, bytes]:
    """What the first of many runs gives that are alike but for where they are."""
    return {}


@pytest.mark.parametrize("number", [3, 7, 12, 20, 30])
@pytest.mark.parametrize("after", [False, True])
def test_a_run_that_dies_goes_on_to_the_same_bytes(
    settings: dict,
    pruned: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    after: bool,
):
    recipe = one_step(**recovering(settings, pruned, tokens=24 * 8 * 4, measure=False))
    if not undisturbed:
        undisturbed |= result(compress(recipe.updated(output_dir=str(tmp_path / "expected"))).output_dir)
    with monkeypatch.context() as patch:
        die_at(patch, Journal, "commit", number, after)
        with pytest.raises(Killed):
            compress(recipe)
    assert result(compress(recipe, resume=True).output_dir) == undisturbed


def test_what_was_kept_and_is_damaged_is_trained_again(
    settings: dict, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = one_step(**recovering(settings, pruned, tokens=24 * 8 * 4, measure=False))
    expected = result(compress(recipe.updated(output_dir=str(tmp_path / "expected"))).output_dir)
    with monkeypatch.context() as patch:
        die_at(patch, Training, "_step", 3, False)
        with pytest.raises(Killed):
            compress(recipe)
    for file in tmp_path.glob("out.partial/work/exp_avg-*"):
        file.write_bytes(file.read_bytes()[:-1])
    assert result(compress(recipe, resume=True).output_dir) == expected


def test_so_many_steps_as_there_is_time_for(settings: dict, pruned: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Training, "seconds", lambda self: (6.0, 1.0))
    manifest = compress(one_step(**recovering(settings, pruned, minutes=0.5, measure=False))).manifest
    assert manifest["method"]["steps"] == 3


def test_timing_changes_nothing(settings: dict, pruned: Path, tmp_path: Path):
    asked = recovering(settings, pruned, measure=False, tokens=24 * 8 * 6)
    recipe, plain = one_step(**asked, minutes=1e6), one_step(**{**asked, "output_dir": str(tmp_path / "plain")})
    assert result(compress(recipe).output_dir) == result(compress(plain).output_dir)


def test_without_data_the_dense_model_writes_it(settings: dict, pruned: Path):
    del settings["dataset"], settings["num_calibration_samples"]
    own = recovering(settings, pruned, measure=False, tokens=128 * 8, max_seq_length=None)
    del own["self_share"]
    manifest = compress(one_step(**own)).manifest
    assert manifest["calibration"]["source"] == "self"
    assert manifest["calibration"]["window"] == CONFIGS["llama"].max_position_embeddings


def test_it_wants_a_teacher_that_can_be_one(settings: dict, pruned: Path, tmp_path: Path):
    dense = settings["model"]
    with pytest.raises(UserError, match=r"no slimlm\.json says what .* was made of: give --teacher"):
        compress(one_step(**recovering(settings, Path(dense))))
    with pytest.raises(UserError, match="towards itself"):
        compress(one_step(**recovering(settings, pruned, teacher=str(pruned))))
    with pytest.raises(UserError, match=r"nowhere"):
        compress(one_step(**recovering(settings, pruned, teacher=str(tmp_path / "nowhere"))))
    config = type(CONFIGS["llama"])(**{**CONFIGS["llama"].to_dict(), "vocab_size": 4100})
    other = build_tiny(config, tmp_path / "other")
    with pytest.raises(UserError, match="has other tokens"):
        compress(one_step(**recovering(settings, pruned, teacher=str(other))))
    few = recovering(settings, pruned, num_calibration_samples=3, self_share=0)
    with pytest.raises(UserError, match="held out and there are 3 of a source: raise --tokens"):
        compress(one_step(**few))
    assert not (tmp_path / "out").exists()


def test_a_chain_of_results_leads_to_the_dense_model(settings: dict, pruned: Path, tmp_path: Path):
    again = {**settings, "model": str(pruned), "output_dir": str(tmp_path / "again"), "measure": False}
    compress(one_step(**again, method="magnitude", sparsity=0.6))

    class Told(Progress):
        lines: list[str] = []  # noqa: RUF012

        def line(self, text: str) -> None:
            self.lines.append(text)

    compress(one_step(**recovering(settings, tmp_path / "again", measure=False)), progress=Told())
    assert any(line.startswith("towards: ") and settings["model"] in line for line in Told.lines)


def test_results_that_are_made_of_one_another_are_told(settings: dict, pruned: Path, tmp_path: Path):
    own = {**settings, "measure": False}
    compress(
        one_step(
            **{**own, "model": str(pruned), "output_dir": str(tmp_path / "again")}, method="magnitude", sparsity=0.6
        )
    )
    compress(
        one_step(
            **{**own, "model": str(tmp_path / "again"), "output_dir": str(pruned)}, method="magnitude", sparsity=0.7
        ),
        overwrite=True,
    )
    with pytest.raises(UserError, match="was made of itself"):
        compress(one_step(**recovering(settings, pruned)))


def test_a_teacher_is_not_overwritten(settings: dict, pruned: Path, tmp_path: Path):
    compress(one_step(**recovering(settings, pruned, measure=False)))
    again = recovering(settings, pruned, teacher=settings["output_dir"], measure=False)
    with pytest.raises(UserError, match="is or holds an input"):
        compress(one_step(**again), overwrite=True)


def test_what_a_dense_model_gone_was_is_said(settings: dict, pruned: Path):
    shutil.rmtree(settings["model"])
    with pytest.raises(UserError, match=r"slimlm\.json names what it was made of: .* give --teacher"):
        compress(one_step(**recovering(settings, pruned)))


def test_a_later_step_s_teacher_is_checked_first_and_decides(settings: dict, tmp_path: Path):
    first = {**settings, "method": "magnitude", "sparsity": 0.3, "measure": False}
    with pytest.raises(UserError, match="nowhere"):
        compress(in_steps(first, {"method": "recover", **TRAINED, "teacher": str(tmp_path / "nowhere")}))
    assert not (tmp_path / "out.partial").exists()
    compress(in_steps(first, {"method": "recover", **TRAINED}))
    with pytest.raises(UserError, match="cannot resume"):
        compress(in_steps(first, {"method": "recover", **TRAINED, "teacher": settings["model"]}), resume=True)


def test_a_recipe_on_a_result_trains_towards_its_dense_model(settings: dict, pruned: Path, tmp_path: Path):
    more = {"method": "recover", **TRAINED}
    manifest = compress(in_steps({**settings, "model": str(pruned), "measure": False, **more}, more)).manifest
    assert manifest["method"]["teacher"] == settings["model"]
    assert manifest["recipe"]["steps"][1]["teacher"] is None


def test_blocks_that_are_gone_do_not_matter(settings: dict, tmp_path: Path):
    cut = {**settings, "widths": "hidden=32,mlp=48,blocks=2", "output_dir": str(tmp_path / "cut")}
    compress(one_step(**cut, method="slice"))
    manifest = compress(one_step(**recovering(settings, tmp_path / "cut"))).manifest
    assert manifest["measured"]["dense"]["perplexity"] > 0


@pytest.mark.parametrize(
    ("name", "skip", "stay"),
    [
        ("gpt2", "*.c_proj", "c_proj"),
        ("gpt2 tied", "lm_head", "wte"),
        ("mixtral", "*.experts.*", "experts"),
    ],
)
def test_what_is_skipped_stays_in_every_kind_of_model(settings: dict, tmp_path: Path, name: str, skip: str, stay: str):
    dense = build_tiny(family_config(name), tmp_path / "other")
    own = {**settings, "model": str(dense), "output_dir": str(tmp_path / "pruned"), "measure": False}
    compress(one_step(**own, method="magnitude", sparsity=0.3))
    own = recovering(settings, tmp_path / "pruned", skip=[skip], measure=False, learning_rate=3e-4)
    assert compress(one_step(**own)).manifest["method"]["best_step"]
    before, after = weights(tmp_path / "pruned"), weights(Path(settings["output_dir"]))
    assert {name for name in before if torch.equal(before[name], after[name])} == {n for n in before if stay in n}


def test_a_teacher_that_is_broken_or_of_another_kind_is_refused(settings: dict, pruned: Path, tmp_path: Path):
    file = Path(settings["model"]) / "model.safetensors"
    whole = load_file(file)
    save_file({**whole, "model.norm.weight": whole["model.norm.weight"] * torch.nan}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN"):
        compress(one_step(**recovering(settings, pruned)))
    save_file(whole, file, metadata={"format": "pt"})
    config = type(CONFIGS["llama"])(**{**CONFIGS["llama"].to_dict(), "max_position_embeddings": 16})
    short = build_tiny(config, tmp_path / "short")
    with pytest.raises(UserError, match="context of 16"):
        compress(one_step(**recovering(settings, pruned, teacher=str(short))))


def test_the_card_says_what_training_brought_even_unmeasured(settings: dict, pruned: Path):
    result = compress(one_step(**recovering(settings, pruned, measure=False)))
    assert recovered(result.manifest)[0] in (result.output_dir / "README.md").read_text()


def test_too_little_memory_is_said_before_training(settings: dict, pruned: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "available_memory", lambda device: {"host": 1000})
    with pytest.raises(RunFailure, match="are free"):
        compress(one_step(**recovering(settings, pruned)))


def test_the_command(settings: dict, pruned: Path, tmp_path: Path):
    words = ["recover", str(pruned), "--dataset", settings["dataset"], "--tokens", "768", "--no-measure"]
    words += ["--max-seq-length", "24", "--self-share", "0", "-o", str(tmp_path / "out")]
    app(words, standalone_mode=False)
    manifest = json.loads((tmp_path / "out" / "slimlm.json").read_text())
    assert manifest["method"]["trained_tokens"] == 768
    with pytest.raises(UserError, match="slimlm recover --help"):
        app(["compress", "-m", str(pruned), "--method", "recover"], standalone_mode=False)
