"""Whatever instant a run dies at, resuming it gives the bytes of an undisturbed run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import slimlm.checkpoint.output as output_module
import slimlm.checkpoint.staging as staging_module
from slimlm.checkpoint.journal import JOURNAL_NAME, Journal
from slimlm.checkpoint.manifest import read_manifest, versions
from slimlm.checkpoint.staging import Staging
from slimlm.checkpoint.writer import CheckpointWriter
from slimlm.errors import RunFailure, UserError
from slimlm.model.hidden import Spilled
from slimlm.model.result import Result
from slimlm.model.saving import Saver, Saving
from slimlm.model.streamed import StreamedModel
from slimlm.model.waiting import BatchFile
from slimlm.recipe import Recipe, one_step
from slimlm.stages import compress
from tests.conftest import CONFIGS, build_tiny, in_steps


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def saved_behind_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """And waited for, so that every record has its place; there are tests of saving beside the computing below."""
    monkeypatch.setattr(Saver, "seconds", 0.0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane, and nobody had lived there. " * 40)
    return tmp_path / "text.txt"


@pytest.fixture
def recipe(tmp_path: Path, text: Path) -> Recipe:
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    return one_step(
        model=str(path), sparsity=0.25, dataset=str(text), num_calibration_samples=6, max_seq_length=32, batch_size=4,
        eval_windows=2, eval_text=str(text), output_dir=str(tmp_path / "out"),
    )  # fmt: skip


def result(directory: Path) -> dict[str, bytes]:
    """Everything that must be the same: all files but those that hold times."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("slimlm.json", "slimlm.log.jsonl", "README.md", "recipe.yaml")
    }


@pytest.fixture
def undisturbed(recipe: Recipe, tmp_path: Path) -> dict[str, bytes]:
    return result(compress(recipe.updated(output_dir=str(tmp_path / "undisturbed"))).output_dir)


def die_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int, after: bool, die=None) -> None:
    """Let the number-th call of a function be the run's last, before or after it did its work."""
    original = getattr(owner, name)
    calls = iter(range(1, 10**6))

    def killed() -> None:
        raise Killed

    def dying(*args, **kwargs):
        last = next(calls) == number
        if last and not after:
            (die or killed)()
        answer = original(*args, **kwargs)
        if last:
            (die or killed)()
        return answer

    monkeypatch.setattr(owner, name, dying)


KILLED = 77


def dies_at_record(recipe: Recipe, number: int, after: bool) -> bool:
    """Run in a child process that is gone at once, threads and all, before or after its number-th journal record.

    False when it came to its end before that.
    """
    return dies_at(recipe, (Journal, "commit"), number, after)


def dies_at(recipe: Recipe, place: tuple[object, str], number: int, after: bool, **how) -> bool:
    """The same before or after the number-th call of a function, by its owner and name. how: of the run."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with pytest.MonkeyPatch.context() as patch:
                die_at(patch, *place, number, after, die=lambda: os._exit(KILLED))
                compress(recipe, overwrite=True, **how)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


@pytest.fixture
def one_thread():
    """A forked child has none of its parent's worker threads, which torch would wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def survives_death_at_every_record(recipe: Recipe, tmp_path: Path) -> int:
    """A run that dies before or after any of its records is resumed to the same bytes; how many records there are."""
    expected = result(compress(recipe.updated(output_dir=str(tmp_path / "expected"))).output_dir)
    output = Path(recipe.steps[0].output_dir or "")
    for number in range(1, 200):
        for after in (False, True):
            if not dies_at_record(recipe, number, after):
                assert not after
                assert result(output) == expected
                return number - 1
            assert not output.exists()
            assert result(compress(recipe, resume=True).output_dir) == expected
            assert not list(tmp_path.glob("out.*"))
            shutil.rmtree(output)
    pytest.fail("the run never ended")


@pytest.mark.slow
def test_death_on_both_sides_of_every_journal_record(recipe: Recipe, one_thread, tmp_path: Path):
    records = survives_death_at_every_record(recipe.updated(measure=False), tmp_path)
    # start, calibrated blocks, basis, widths, embedding, head twice, refitted blocks twice, end
    assert records == 1 + 3 + 1 + 1 + 1 + 2 + 2 * 3 + 1


@pytest.mark.slow
def test_death_on_both_sides_of_every_record_of_several_runs(recipe: Recipe, one_thread, tmp_path: Path):
    (step,) = recipe.steps
    settings = step.model_dump(include=step.model_fields_set - {"sparsity"})
    then = {"method": "sparsegpt", "sparsity": 0.5}
    several = in_steps({**settings, "widths": "mlp=32", "measure": False}, then)
    records = survives_death_at_every_record(several, tmp_path)
    # a slice: start, blocks, influence, widths, embedding, norm with head, refitted blocks twice, head fitted, end;
    # pruning: start, embedding, norm and head, pruned blocks twice, end; and before both what they are together
    assert records == 1 + (1 + 3 + 1 + 1 + 1 + 1 + 2 * 3 + 1 + 1 + 1) + (1 + 3 + 2 * 3 + 1)


@pytest.mark.parametrize(("number", "after"), [(1, True), (5, False), (12, True), (15, False)])
def test_death_at_once_around_a_journal_record(
    recipe: Recipe, undisturbed, one_thread, tmp_path: Path, number: int, after: bool
):
    """Of a process that is gone with its threads; in the slow tests every record of every kind of run has its turn."""
    assert dies_at_record(recipe.updated(measure=False), number, after)
    assert result(compress(recipe.updated(measure=False), resume=True).output_dir) == undisturbed
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("memory", ["0", "1MB"])
@pytest.mark.parametrize(
    ("place", "number"), [((BatchFile, "write"), 6), ((Saving, "write"), 2), ((Saving, "write"), 5)]
)
def test_death_in_a_save_beside_the_computing(
    recipe: Recipe, undisturbed, one_thread, monkeypatch, tmp_path: Path, place, number: int, memory: str
):
    """A thread saves one block after another as fast as it can, and the process is gone in the middle of one."""
    monkeypatch.setattr(Saver, "seconds", 1e-9)
    recipe = recipe.updated(measure=False)
    assert dies_at(recipe, place, number, True, stream_memory=memory)
    assert result(compress(recipe, resume=True, stream_memory=memory).output_dir) == undisturbed
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize(
    "kind", [{}, {"method": "slimlm", "sparsity": 0.5}, {"basis": "per-block", "sparsity": 0.06, "round_to": 4}]
)
def test_blocks_written_since_the_last_save_are_computed_again_and_are_what_they_were(
    recipe: Recipe, monkeypatch, tmp_path: Path, kind: dict
):
    (step,) = recipe.steps
    fields = step.model_dump(include=step.model_fields_set - {"sparsity"})
    recipe = one_step(**{**fields, "sparsity": 0.25, "measure": False, **kind})
    undisturbed = compress(recipe.updated(output_dir=str(tmp_path / "undisturbed")))
    monkeypatch.setattr(Saver, "seconds", 1e9)
    with monkeypatch.context() as patch:
        original, calls = Result.write_block, iter(range(1, 10**6))

        def dying(self, block, tensors) -> None:
            if next(calls) == 3:
                self.settle()
                raise Killed
            original(self, block, tensors)

        patch.setattr(Result, "write_block", dying)
        with pytest.raises(Killed):
            compress(recipe)
    work = Staging(tmp_path / "out").work
    steps = [json.loads(line)["step"] for line in (work / JOURNAL_NAME).read_text().splitlines()]
    assert {"written model.layers.0", "written model.layers.1"} <= set(steps)
    assert not [step for step in steps if step.startswith("streams")]
    assert not list(work.glob("*.[012]"))  # no hidden states were on the disk at all
    resumed = compress(recipe, resume=True)
    assert result(resumed.output_dir) == result(undisturbed.output_dir)
    assert resumed.manifest["method"] == undisturbed.manifest["method"]


def test_memory_for_hidden_states_is_a_size_and_decides_no_bit(recipe: Recipe, undisturbed):
    with pytest.raises(UserError, match="--stream-memory: a size is like 5GB or 500MB, not 'much'"):
        compress(recipe, stream_memory="much")
    assert result(compress(recipe, stream_memory="80KB").output_dir) == undisturbed


@pytest.mark.parametrize("number", [1, 7, 20, 28])
def test_death_inside_a_tensors_write(recipe: Recipe, undisturbed, monkeypatch, tmp_path: Path, number: int):
    with monkeypatch.context() as patch:
        original, calls = CheckpointWriter.write, iter(range(1, 10**6))

        def torn(self, name, tensor):
            if next(calls) == number:
                original(self, name, torch.full(self.places[name].shape, 7.0))  # where half a tensor would be
                raise Killed
            return original(self, name, tensor)

        patch.setattr(CheckpointWriter, "write", torn)
        with pytest.raises(Killed):
            compress(recipe)
    assert not (tmp_path / "out").exists()
    assert result(compress(recipe, resume=True).output_dir) == undisturbed


@pytest.mark.parametrize("step", ["before", "after"])
def test_death_around_the_final_rename(recipe: Recipe, undisturbed, monkeypatch, tmp_path: Path, step: str):
    with monkeypatch.context() as patch:
        if step == "before":
            patch.setattr(output_module, "_publish", lambda *args: (_ for _ in ()).throw(Killed()))
        else:
            patch.setattr(output_module, "_remove", lambda staging: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            compress(recipe)
    assert (tmp_path / "out").exists() == (step == "after")
    assert result(compress(recipe, resume=True).output_dir) == undisturbed
    assert not Staging(tmp_path / "out").root.exists()


def killed_halfway(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, number: int = 7) -> Staging:
    with monkeypatch.context() as patch:
        die_at(patch, Journal, "commit", number, after=True)
        with pytest.raises(Killed):
            compress(recipe)
    return Staging(Path(recipe.steps[0].output_dir or ""))


def test_what_is_damaged_meanwhile_is_noticed_and_computed_again(recipe: Recipe, undisturbed, monkeypatch):
    staging = killed_halfway(recipe, monkeypatch, 8)
    steps = [json.loads(line)["step"] for line in (staging.work / JOURNAL_NAME).read_text().splitlines()]
    assert steps[-1] == "written model.layers.0"
    shard = staging.model / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(bytes(content))
    assert {file.name for file in staging.work.glob("*-dense.?")} == {"calibration-dense.0", "calibration-dense.1"}
    for name in ("basis.safetensors", "calibration-state.0.safetensors", "calibration-dense.1"):
        (staging.work / name).write_bytes(b"damaged")
    assert result(compress(recipe, resume=True).output_dir) == undisturbed


def test_a_torn_last_line_of_the_journal_is_dropped(recipe: Recipe, undisturbed, monkeypatch):
    staging = killed_halfway(recipe, monkeypatch)
    with (staging.work / JOURNAL_NAME).open("a") as file:
        file.write('{"step": "written model.layers.2", "sha2')
    with monkeypatch.context() as patch:
        die_at(patch, Journal, "commit", 2, after=True)
        with pytest.raises(Killed):
            compress(recipe, resume=True)
    lines = (staging.work / JOURNAL_NAME).read_text().splitlines()
    assert all(json.loads(line)["step"] for line in lines)
    assert result(compress(recipe, resume=True).output_dir) == undisturbed


def test_finished_blocks_are_not_computed_again(recipe: Recipe, monkeypatch):
    killed_halfway(recipe, monkeypatch, 11)
    written: list[str] = []
    original = CheckpointWriter.write
    monkeypatch.setattr(
        CheckpointWriter, "write", lambda self, name, tensor: written.append(name) or original(self, name, tensor)
    )
    compress(recipe, resume=True)
    assert {name.split(".")[2] for name in written if "layers" in name} == {"2"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sparsity": 0.5}, "recipe sparsity was 0.25, is now 0.5"),
        ({"seed": 3}, "recipe seed was 0, is now 3"),
        ({"num_calibration_samples": 5}, "recipe num_calibration_samples was 6, is now 5 .*calibration sha256"),
        ({"dtype": "float16"}, "recipe dtype was 'auto', is now 'float16'"),
    ],
)
def test_another_recipe_is_refused_with_the_difference_named(recipe: Recipe, monkeypatch, change, named: str):
    staging = killed_halfway(recipe, monkeypatch)
    before = (staging.work / JOURNAL_NAME).read_bytes()
    with pytest.raises(UserError, match=named):
        compress(recipe.updated(**change), resume=True)
    assert (staging.work / JOURNAL_NAME).read_bytes() == before
    compress(recipe, resume=True)


def test_another_model_or_version_is_refused_with_the_difference_named(recipe: Recipe, monkeypatch, tmp_path: Path):
    killed_halfway(recipe, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("slimlm.manifest.versions", lambda: {**versions(), "torch": "0.1"})
        with pytest.raises(UserError, match=r"version torch was '.*', is now '0\.1'; .*--resume-anyway"):
            compress(recipe, resume=True)
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"model model\.safetensors was"):
        compress(recipe, resume=True)


def test_resume_with_nothing_to_resume_starts_and_with_everything_done_ends(
    recipe: Recipe, undisturbed, tmp_path: Path
):
    assert result(compress(recipe, resume=True).output_dir) == undisturbed
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    compress(recipe, resume=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="--overwrite"):
        compress(recipe)


def test_resume_does_not_take_another_runs_output_for_its_own(recipe: Recipe, undisturbed, tmp_path: Path):
    compress(recipe)
    (tmp_path / "other.txt").write_text("Quite another text, about ships and the sea and the men who went there. " * 40)
    other = recipe.updated(dataset=str(tmp_path / "other.txt"))
    with pytest.raises(UserError, match="cannot resume: calibration sha256 was"):
        compress(other, resume=True)
    assert result(tmp_path / "out") == undisturbed
    assert result(compress(other, resume=True, overwrite=True).output_dir) != undisturbed


def test_without_resume_a_run_starts_over(recipe: Recipe, undisturbed, monkeypatch):
    staging = killed_halfway(recipe, monkeypatch)
    (staging.model / "stray").write_text("from before")
    assert result(compress(recipe).output_dir) == undisturbed


def test_what_a_killed_run_holds_of_the_disk_counts_as_free(recipe: Recipe, undisturbed, monkeypatch):
    staging = killed_halfway(recipe, monkeypatch)
    held = sum(file.stat().st_size for file in staging.root.rglob("*") if file.is_file())
    usage = staging_module.shutil.disk_usage(staging.root.parent)
    monkeypatch.setattr(staging_module.shutil, "disk_usage", lambda path: usage._replace(free=held // 2))
    monkeypatch.setattr("slimlm.check.spilled", lambda step, model: 0)
    assert result(compress(recipe, resume=True).output_dir) == undisturbed


def test_running_out_of_memory_is_one_clear_line(recipe: Recipe, monkeypatch):
    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory\nlots of detail")

    monkeypatch.setattr("slimlm.model.block.Block.advance", exhausted)
    with pytest.raises(RunFailure, match=r"^out of memory: lower --batch-size"):
        compress(recipe)


def test_a_full_disk_is_a_clear_error_and_resume_works(recipe: Recipe, undisturbed, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def refuse(original, name: str, number: int = 1):
        calls = iter(range(1, 10**6))

        def opened(path, mode="r", *args, **kwargs):
            if path.name.startswith(name) and mode != "r" and mode != "rb" and next(calls) >= number:
                full()
            return original(path, mode, *args, **kwargs)

        return opened

    with monkeypatch.context() as patch:
        patch.setattr("slimlm.checkpoint.writer.os.posix_fallocate", full)
        with pytest.raises(RunFailure, match=r"cannot write .*model\.safetensors: No space left on device"):
            compress(recipe)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", refuse(Path.open, "calibration-dense."))
        with pytest.raises(RunFailure, match=r"cannot write .*calibration-dense\.0: No space left on device"):
            compress(recipe)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", refuse(Path.open, "journal", 9))
        with pytest.raises(RunFailure, match=r"cannot write .*journal\.jsonl: No space left on device"):
            compress(recipe, resume=True)
    assert result(compress(recipe, resume=True).output_dir) == undisturbed


def test_sampled_calibration_text_is_not_sampled_twice(recipe: Recipe, monkeypatch):
    recipe = recipe.updated(dataset="self")
    whole = result(compress(recipe.updated(output_dir=str(recipe.steps[0].output_dir) + "2")).output_dir)
    killed_halfway(recipe, monkeypatch, 4)
    monkeypatch.setattr("slimlm.windows.sample_windows", lambda *args: pytest.fail("sampled again"))
    assert result(compress(recipe, resume=True).output_dir) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"basis": "per-block", "sparsity": 0.06, "round_to": 4},
        {"method": "rotate"},
        {"method": "slimlm", "sparsity": 0.5, "allocation": "global"},
    ],
)
def test_death_on_both_sides_of_every_record_of_another_kind_of_run(
    recipe: Recipe, one_thread, tmp_path: Path, settings: dict
):
    (step,) = recipe.steps
    fields = step.model_dump(include=step.model_fields_set - {"sparsity"})
    assert survives_death_at_every_record(one_step(**{**fields, **settings, "measure": False}), tmp_path) > 6


MACHINES = [
    ("torch.backends.cpu.get_cpu_capability", "SMALL", "machine instructions was '.*', is now 'SMALL'"),
    ("torch.get_num_threads", 77, r"machine threads was \d+, is now 77"),
    ("slimlm.device._processor", "Another CPU", "machine processor was '.*', is now 'Another CPU'"),
]


@pytest.mark.parametrize(("what", "value", "named"), MACHINES)
def test_another_machine_is_refused_unless_that_is_accepted_and_then_it_is_recorded(
    recipe: Recipe, monkeypatch, tmp_path: Path, what: str, value: object, named: str
):
    killed_halfway(recipe, monkeypatch)
    monkeypatch.setattr(what, lambda: value)
    with pytest.raises(UserError, match=f"{named}; repeat what was run, start over without --resume, or go on with"):
        compress(recipe, resume=True)
    manifest = compress(recipe, resume_anyway=True).manifest
    (differences,) = manifest["run"]["resumed_anyway"]
    assert [after for _, after in differences.values()] == [value]
    assert "resumed on another kind of machine" in (tmp_path / "out" / "README.md").read_text()
    assert compress(recipe, resume=True).manifest == manifest  # what stands there is from this machine now


def test_what_is_computed_is_never_accepted_from_another_run(recipe: Recipe, monkeypatch):
    killed_halfway(recipe, monkeypatch)
    with pytest.raises(UserError, match=r"recipe seed was 0, is now 3.*; repeat what was run, or start over"):
        compress(recipe.updated(seed=3), resume_anyway=True)


def test_a_finished_result_is_measured_later_and_only_then(recipe: Recipe, undisturbed, tmp_path: Path):
    unmeasured = compress(recipe.updated(measure=False))
    assert unmeasured.manifest["measured"] is None
    manifest = compress(recipe, resume=True).manifest
    whole = compress(recipe.updated(output_dir=str(tmp_path / "whole"))).manifest
    assert manifest["measured"] == whole["measured"]
    assert read_manifest(tmp_path / "out") == manifest
    assert manifest["recipe"]["measure"] is True
    assert f"{manifest['measured']['compressed']['perplexity']:.2f}" in (tmp_path / "out" / "README.md").read_text()
    assert result(tmp_path / "out") == undisturbed
    assert not list(tmp_path.glob("out.*"))
    stamp = (tmp_path / "out" / "slimlm.json").stat().st_mtime_ns
    compress(recipe, resume=True)
    assert (tmp_path / "out" / "slimlm.json").stat().st_mtime_ns == stamp


def test_what_is_thrown_away_of_an_interrupted_run_is_said(recipe: Recipe, undisturbed, monkeypatch, caplog):
    staging = killed_halfway(recipe, monkeypatch)
    assert result(compress(recipe).output_dir) == undisturbed
    assert f"discarding 6 finished steps in {staging.root}: --resume would have" in caplog.text
    caplog.clear()
    compress(recipe, overwrite=True)
    assert "discarding" not in caplog.text


def test_hidden_states_wait_where_they_are_told_to(recipe: Recipe, undisturbed, monkeypatch, tmp_path: Path):
    (tmp_path / "fast").mkdir()
    seen = set()

    class Watched(Spilled):
        def __init__(self, stem: Path, *args, **kwargs) -> None:
            seen.add(stem.parent)
            super().__init__(stem, *args, **kwargs)

    monkeypatch.setattr("slimlm.model.hidden.Spilled", Watched)
    with monkeypatch.context() as patch:
        die_at(patch, Journal, "commit", 12, after=True)
        with pytest.raises(Killed):
            compress(recipe, work_dir=tmp_path / "fast")
    (place,) = (tmp_path / "fast").iterdir()
    assert seen == {place}
    assert not [file for file in Staging(tmp_path / "out").work.iterdir() if file.suffix in (".0", ".1", ".2")]
    assert result(compress(recipe, resume=True, work_dir=tmp_path / "fast").output_dir) == undisturbed
    assert list((tmp_path / "fast").iterdir()) == []
    with pytest.raises(UserError, match="--work-dir .* does not exist"):
        compress(recipe, overwrite=True, work_dir=tmp_path / "nowhere")


@pytest.mark.parametrize("then", [None, "slow"])
def test_hidden_states_of_an_interrupted_run_are_found_or_cleared(
    recipe: Recipe, undisturbed, monkeypatch, tmp_path: Path, caplog, then: str | None
):
    """Resumed without --work-dir they are where they were; with another, they are computed again there."""
    for name in ("fast", "slow"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        die_at(patch, Journal, "commit", 12, after=True)
        with pytest.raises(Killed):
            compress(recipe, work_dir=tmp_path / "fast")
    manifest = compress(recipe, resume=True, work_dir=tmp_path / then if then else None)
    assert result(manifest.output_dir) == undisturbed
    assert ("are computed again" in caplog.text) == (then is not None)
    assert "gone or changed" not in caplog.text or then is not None
    assert list((tmp_path / "fast").iterdir()) == list((tmp_path / "slow").iterdir()) == []


def test_hidden_states_elsewhere_go_when_a_run_starts_over(recipe: Recipe, monkeypatch, tmp_path: Path):
    (tmp_path / "fast").mkdir()
    with monkeypatch.context() as patch:
        die_at(patch, Journal, "commit", 12, after=True)
        with pytest.raises(Killed):
            compress(recipe, work_dir=tmp_path / "fast")
    compress(recipe)
    assert list((tmp_path / "fast").iterdir()) == []


def test_streams_of_another_dtype_are_computed_again(recipe: Recipe, monkeypatch, caplog):
    """A CPU computes in fp32 what a GPU computes in the checkpoint's own dtype."""
    killed_halfway(recipe, monkeypatch, 12)
    original = StreamedModel.__init__

    def finer(self, checkpoint, config, device, dtype, *rest) -> None:
        original(self, checkpoint, config, device, torch.float64, *rest)

    monkeypatch.setattr(StreamedModel, "__init__", finer)
    compress(recipe, resume=True)
    assert "gone or changed: it is computed again" in caplog.text


def test_torchs_default_dtype_decides_nothing(recipe: Recipe, undisturbed):
    """Another thread that builds a model in bf16 changes it for the whole process meanwhile."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = result(compress(recipe.updated(measure=False)).output_dir)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == undisturbed


def test_a_scratch_disk_that_was_wiped_meanwhile_costs_time_alone(
    recipe: Recipe, undisturbed, monkeypatch, tmp_path: Path
):
    (tmp_path / "fast").mkdir()
    with monkeypatch.context() as patch:
        die_at(patch, Journal, "commit", 12, after=True)
        with pytest.raises(Killed):
            compress(recipe, work_dir=tmp_path / "fast")
    shutil.rmtree(next((tmp_path / "fast").iterdir()))
    assert result(compress(recipe, resume=True, work_dir=tmp_path / "fast").output_dir) == undisturbed
