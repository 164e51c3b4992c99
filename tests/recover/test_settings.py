"""Optimizers, teachers and losses that a recovery can be told to take, from directory to directory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from slimlm.check import How, check
from slimlm.checkpoint.kin import KIN, Kin, kin_files, read_kin
from slimlm.errors import RunFailure, UserError
from slimlm.families import family_of
from slimlm.progress import Progress
from slimlm.recipe import RecoverStep, load_recipe, one_step
from slimlm.recipe.recovering import HIDDEN_WEIGHT
from slimlm.recover.losses import StreamLoss
from slimlm.recover.training import Training
from slimlm.stages import compress
from tests.conftest import CONFIGS, build_tiny, in_steps, random_tokens
from tests.families.configs import family_config
from tests.recover.conftest import TRAINED, recovering, weights
from tests.test_resume import Killed, die_at, result

WAYS = {
    "mfac": {"optimizer": "mfac", "mfac_gradients": 4, "mfac_damping": 0.01, "learning_rate": 0.03},
    "mfac, low rank, in blocks": {
        "optimizer": "mfac", "mfac_gradients": 3, "mfac_block": 64, "mfac_damping": 0.01, "lora": 2,
        "learning_rate": 0.3,
    },
    "a teacher that is remembered": {"teacher_top_k": 64},
    "streams": {"hidden_weight": 0.5},
    "blocks computed again": {"gradient_checkpointing": True},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gets_better_keeps_zeros_and_goes_on_to_the_same_bytes(
    settings: dict,
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
):
    recipe = one_step(**recovering(settings, pruned, **WAYS[way], measure=False))
    expected = compress(recipe.updated(output_dir=str(tmp_path / "expected")))
    told = expected.manifest["method"]
    assert told["best_step"] > 0
    before, after = weights(pruned), weights(tmp_path / "expected")
    for name in before:
        assert "proj" not in name or torch.equal(before[name] == 0, after[name] == 0), name
    with monkeypatch.context() as patch:
        die_at(patch, Training, "_step", 5, True)
        with pytest.raises(Killed):
            compress(recipe)
    assert result(compress(recipe, resume=True).output_dir) == result(expected.output_dir)


def test_blocks_computed_again_give_the_same_weights(settings: dict, pruned: Path, tmp_path: Path):
    recipe = one_step(**recovering(settings, pruned, measure=False))
    again = recipe.updated(gradient_checkpointing=True, output_dir=str(tmp_path / "again"))
    assert result(compress(recipe).output_dir) == result(compress(again).output_dir)


@pytest.mark.parametrize(("tokens", "times"), [(32 * 24 * 6, "6.0"), (32 * 24 * 4 + 240, "4.3"), (32 * 24 * 4, None)])
def test_text_that_comes_again_is_said_only_where_that_is_often(
    settings: dict, pruned: Path, caplog: pytest.LogCaptureFixture, tokens: int, times: str | None
):
    asked = recovering(settings, pruned, tokens=tokens, self_share=0.0, measure=False)
    del asked["num_calibration_samples"]
    check(one_step(**asked).steps[0], How(progress=Progress()))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (times is not None)
    assert all(f"from {32 * 24:,}, so that each is seen up to {times} times" in line for line in said)


@pytest.mark.parametrize(
    ("asked", "given", "own", "times"),
    [
        ({"tokens": 24 * 40}, 30, 10, 1),
        ({"tokens": 24 * 100, "self_share": 0.5}, 40, 60, 1),
        ({"tokens": 24 * 200, "self_share": 0.5}, 40, 120, 2),
        ({"tokens": 24 * 800, "self_share": 0.5}, 40, 640, 4),
        ({"tokens": 24 * 800, "minutes": 1}, 40, 13, 1),
        ({"tokens": 24 * 100, "self_share": 0.0}, 40, 0, 2),
    ],
)
def test_the_teacher_writes_what_text_the_tokens_need(
    settings: dict, pruned: Path, asked: dict, given: int, own: int, times: int
):
    told = recovering(settings, pruned, measure=False, **asked)
    del told["num_calibration_samples"]
    job = check(one_step(**told).steps[0], How(progress=Progress()))
    assert isinstance(job.recipe, RecoverStep)
    assert len(job.windows.tokens) == given
    assert (job.recipe.own_windows, job.recipe.times(given)) == (own, times)


def test_a_teacher_is_asked_once(
    settings: dict,
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    recipe = one_step(**recovering(settings, pruned, teacher_top_k=8, measure=False))
    with monkeypatch.context() as patch:
        die_at(patch, Training, "_step", 1, False)
        with pytest.raises(Killed):
            compress(recipe)
    (kept,) = (tmp_path / "out.partial" / "work").glob("teacher.safetensors")
    assert load_file(kept)["tokens"].shape[1:] == (24, 8)
    monkeypatch.setattr("slimlm.recover.run.likeliest_of", None)
    compress(recipe, resume=True)


def test_a_run_that_lacked_memory_goes_on_with_blocks_computed_again(
    settings: dict, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = one_step(**recovering(settings, pruned, measure=False))
    expected = result(compress(recipe.updated(output_dir=str(tmp_path / "expected"))).output_dir)
    with monkeypatch.context() as patch:
        die_at(patch, Training, "_step", 5, True)
        with pytest.raises(Killed):
            compress(recipe)
    assert result(compress(recipe.updated(gradient_checkpointing=True), resume=True).output_dir) == expected


def test_another_basis_is_another_run(settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compress(
        one_step(**{**settings, "widths": "hidden=24,mlp=40", "output_dir": str(tmp_path / "sliced")}, method="slice")
    )
    recipe = one_step(**recovering(settings, tmp_path / "sliced", hidden_weight=0.3, measure=False))
    with monkeypatch.context() as patch:
        die_at(patch, Training, "_step", 1, True)
        with pytest.raises(Killed):
            compress(recipe)
    file = tmp_path / "sliced" / KIN
    kin = load_file(file)
    save_file({**kin, "basis": -kin["basis"]}, file)
    with pytest.raises(UserError, match="cannot resume: .*basis"):
        compress(recipe, resume=True)


def test_what_excludes_another_is_refused(settings: dict, pruned: Path):
    for more, said in (
        ({"hidden_weight": 0.1, "teacher_top_k": 8}, "leave out teacher_top_k"),
        ({"mfac_damping": 0.1}, "not read"),
        ({"mfac_gradients": 0, "optimizer": "mfac"}, "mfac_gradients"),
        ({"teacher_top_k": CONFIGS["llama"].vocab_size}, "tokens in all"),
    ):
        with pytest.raises(UserError, match=said):
            compress(one_step(**recovering(settings, pruned, **more)))


def test_streams_of_a_slice_are_compared_in_its_basis(settings: dict, tmp_path: Path):
    sliced = {**settings, "widths": "hidden=24", "refit": False, "method": "slice", "measure": False}
    recipe = in_steps(sliced, {"method": "recover", **TRAINED, "hidden_weight": 0.3})
    manifest = compress(recipe).manifest
    assert manifest["method"]["best_step"] > 0
    kin = read_kin(tmp_path / "out", 24, CONFIGS["llama"].num_hidden_layers)
    assert kin is not None
    assert kin.basis.shape == (32, 24)
    again = one_step(**recovering(settings, tmp_path / "out", hidden_weight=0.3, output_dir=str(tmp_path / "x")))
    save_file({"basis": kin.basis[:30], "blocks": kin.blocks}, tmp_path / "out" / KIN)
    with pytest.raises(UserError, match=r"--hidden-weight: .*basis\.safetensors is of a dense model of width 30"):
        compress(again)
    (tmp_path / "out" / KIN).unlink()
    with pytest.raises(UserError, match=r"--hidden-weight: no slimlm.basis\.safetensors in"):
        compress(again)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "opt tied", "granite", "falcon"])
def test_a_rotated_model_s_streams_are_the_dense_one_s_in_the_basis_it_keeps(settings: dict, tmp_path: Path, name: str):
    dense = build_tiny(family_config(name), tmp_path / "dense")
    own = {**settings, "model": str(dense), "output_dir": str(tmp_path / "rotated"), "dtype": "float32"}
    compress(one_step(**own, method="rotate"))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / one).float().eval() for one in ("rotated", "dense")]
    centred = family_of(models[1].config).centred
    kin = read_kin(
        tmp_path / "rotated", *(getattr(models[0].config, key) for key in ("hidden_size", "num_hidden_layers"))
    )
    assert kin is not None
    assert not is_same(kin)
    with torch.no_grad():
        tokens = random_tokens(2, 24)
        ends = [one(input_ids=tokens, output_hidden_states=True).hidden_states for one in models]
    assert float(StreamLoss(1.0, kin, centred)(*ends)) < 1e-3 * tokens.numel()
    other = Kin(kin.basis.roll(1, 1), kin.blocks)
    assert float(StreamLoss(1.0, other, centred)(*ends)) > 0.5 * tokens.numel()


def is_same(kin: Kin) -> bool:
    """Whether a stream is the dense one's."""
    return torch.equal(kin.basis, torch.eye(len(kin.basis))) and torch.equal(kin.blocks, torch.arange(len(kin.blocks)))


def test_what_is_made_of_a_slice_says_what_it_is_of_the_first_model(settings: dict, tmp_path: Path):
    def made(model: Path, name: str, **how) -> Kin | None:
        own = {**settings, **how, "model": str(model), "output_dir": str(tmp_path / name), "measure": False}
        place = compress(one_step(**own)).output_dir
        config = AutoConfig.from_pretrained(place)
        return read_kin(place, config.hidden_size, config.num_hidden_layers)

    first = made(Path(settings["model"]), "first", method="slice", widths="hidden=24,mlp=40,blocks=2")
    assert first is not None
    torch.testing.assert_close(first.basis.T @ first.basis, torch.eye(24), atol=1e-5, rtol=0)
    blocks = CONFIGS["llama"].num_hidden_layers
    assert len(first.blocks) == 2 < blocks
    pruned_one = made(tmp_path / "first", "second", method="magnitude", sparsity=0.3)
    assert pruned_one is not None
    assert torch.equal(pruned_one.basis, first.basis)
    third = made(tmp_path / "second", "third", method="slice", widths="hidden=16,mlp=40,blocks=2")
    assert third is not None
    assert third.basis.shape == (32, 16)
    assert torch.equal(third.blocks, first.blocks)
    inside = first.basis @ (first.basis.T @ third.basis)
    torch.testing.assert_close(inside, third.basis, atol=1e-5, rtol=0)
    dense = build_tiny(CONFIGS["llama"], tmp_path / "other")
    assert is_same(made(dense, "zeros", method="magnitude", sparsity=0.3))
    assert not kin_files(tmp_path / "zeros")
    assert is_same(made(dense, "narrow", method="slice", widths="mlp=40"))
    assert made(dense, "per-block", method="slice", sparsity=0.27, basis="per-block") is None
    (tmp_path / "first" / KIN).unlink()
    assert made(tmp_path / "first", "fourth", method="slice", widths="hidden=16,mlp=40,blocks=2") is None


def test_the_rate_goes_by_what_was_done_and_in_how_many_steps(settings: dict, pruned: Path, tmp_path: Path):
    def rate(model: Path, **more) -> float:
        told = recovering(settings, model, output_dir=str(tmp_path / "new"), measure=False)
        del told["learning_rate"]
        found = compress(one_step(**{**told, **more}), overwrite=True)
        again = load_recipe(found.output_dir / "recipe.yaml").updated(output_dir=str(tmp_path / "again"))
        method = found.manifest["method"]
        assert compress(again, overwrite=True).manifest["method"]["learning_rate"] == method["learning_rate"]
        return method["learning_rate"] / (method["steps"] ** 0.5)

    sliced = {**settings, "output_dir": str(tmp_path / "sliced"), "method": "slice", "sparsity": 0.25, "refit": False}
    compress(one_step(**sliced))
    again = recovering(settings, pruned, output_dir=str(tmp_path / "recovered"), measure=False)
    compress(one_step(**again))
    assert rate(tmp_path / "sliced") == pytest.approx(2e-5, rel=0.05)
    assert rate(pruned) == rate(tmp_path / "recovered") == pytest.approx(6e-5, rel=0.05)
    assert rate(pruned, tokens=24 * 8) == pytest.approx(6e-5, rel=0.05)
    assert rate(pruned, tokens=10**7, minutes=1e-9) == pytest.approx(6e-5, rel=0.05)  # which leaves one step
    assert recover_step(settings, learning_rate=1e-5).rate(1000, 0.5) == 1e-5
    assert recover_step(settings).rate(10**6, 0.5) == 4 * 6e-4
    assert recover_step(settings, lora=4).rate(7, None) == 2e-3
    assert recover_step(settings, optimizer="mfac").rate(7, 0.5) == 1e-3


def recover_step(settings: dict, **more) -> RecoverStep:
    (step,) = one_step(model=settings["model"], method="recover", **more).steps
    assert isinstance(step, RecoverStep)
    return step


def test_streams_count_where_the_teacher_is_beside_and_they_are_known(settings: dict, pruned: Path, tmp_path: Path):
    def weight(model: Path, **more) -> float:
        told = recovering(settings, model, output_dir=str(tmp_path / "new"), **more)
        return check(one_step(**told).steps[0], How(progress=Progress())).recipe.hidden_weight

    sliced = {**settings, "output_dir": str(tmp_path / "sliced"), "method": "slice", "sparsity": 0.25, "refit": False}
    compress(one_step(**sliced))
    assert weight(pruned) == weight(tmp_path / "sliced") == HIDDEN_WEIGHT
    assert weight(pruned, hidden_weight=0.0) == 0
    assert weight(pruned, hidden_weight=3.0) == 3
    assert weight(pruned, teacher_top_k=8) == weight(pruned, objective="cross-entropy") == 0
    assert weight(pruned, teacher=settings["model"]) == HIDDEN_WEIGHT
    deeper = CONFIGS["llama"].__class__(**{**CONFIGS["llama"].to_dict(), "num_hidden_layers": 5})
    assert weight(pruned, teacher=str(build_tiny(deeper, tmp_path / "deeper"))) == 0
    other = str(build_tiny(CONFIGS["llama"], tmp_path / "other"))
    assert weight(pruned, teacher=other) == 0
    assert weight(pruned, teacher=other, hidden_weight=3.0) == 3
    (tmp_path / "sliced" / KIN).unlink()
    assert weight(tmp_path / "sliced") == 0


def test_code_that_gives_no_hidden_states_is_told_so():
    kin = Kin(torch.eye(4), torch.arange(3))
    with pytest.raises(RunFailure, match="does not give its hidden states: use --hidden-weight 0"):
        StreamLoss(1.0, kin, False)((), [torch.zeros(1, 2, 4)] * 4)
