from pathlib import Path
from typing import Any

import pytest
import yaml

from slimlm.errors import UserError
from slimlm.recipe import (
    ROWS,
    PruneStep,
    Recipe,
    RotateStep,
    SliceStep,
    as_file,
    dumped,
    load_recipe,
    make_recipe,
    one_step,
    recipe_of_flags,
    shipped_recipes,
)

TWO = {
    "model": "llama",
    "num_calibration_samples": 64,
    "steps": [{"method": "slice", "sparsity": 0.25}, {"method": "slimlm", "pattern": "2:4", "dataset": "other.txt"}],
}


def test_yaml_and_flags_build_the_same_recipe(tmp_path: Path):
    values = {"model": "llama", "seed": 7, "steps": [{"method": "slice", "sparsity": 0.3}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    assert load_recipe(str(tmp_path / "r.yaml")) == recipe_of_flags({"model": "llama", "sparsity": 0.3, "seed": 7})


def test_each_step_has_what_its_method_reads_and_what_is_shared():
    first, second = make_recipe(TWO).steps
    assert isinstance(first, SliceStep)
    assert isinstance(second, PruneStep)
    assert (first.sparsity, first.num_calibration_samples, first.dataset) == (0.25, 64, None)
    assert (second.pattern_sizes, second.num_calibration_samples, second.dataset) == ((2, 4), 64, "other.txt")
    assert isinstance(one_step(model="x", method="rotate").steps[0], RotateStep)


@pytest.mark.parametrize("name", ROWS)
def test_a_method_is_its_row_where_a_step_does_not_say_otherwise(name: str):
    (step,) = one_step(model="x", method=name, sparsity=0.5).steps
    row = ROWS[name]
    assert (step.curvature, step.mask, step.update, step.swaps) == row[:4]
    assert (step.allocation, step.repairs) == (row.allocation, row.refits)
    (given,) = one_step(model="x", method=name, sparsity=0.5, mask="magnitude").steps
    assert (given.mask, given.curvature) == ("magnitude", row.curvature)
    assert one_step(model="x", method=name, pattern="2:4").steps[0].allocation == "uniform"


@pytest.mark.parametrize(
    "values",
    [
        TWO,
        {"model": "x", "steps": [{"method": "slice", "widths": "hidden=224,mlp=496"}]},
        {"model": "x", "steps": [{"method": "slice", "latency": 0.8}]},
        {"model": "x", "steps": [{"method": "rotate", "seed": 3}, {"method": "slice", "sparsity": 0.3, "seed": 4}]},
        {"model": "x", "skip": ["lm_head"], "steps": [{"method": "mfac", "sparsity": 0.5, "fisher_samples": 9}]},
        {"model": "x", "steps": [{"method": "sparsegpt", "sparsity": 0.6, "shots": 3}]},
        {"model": "x", "steps": [{"method": "slimlm", "sparsity": 0.5, "pattern": "4x4", "update": "none"}]},
    ],
)
def test_a_recipe_that_is_written_is_read_as_the_same(values: dict[str, Any]):
    recipe = make_recipe(values)
    assert make_recipe(as_file(dumped(recipe))) == recipe
    assert make_recipe(yaml.safe_load(yaml.safe_dump(as_file(dumped(recipe))))) == recipe


def test_what_is_the_same_in_all_steps_is_written_above_them():
    written = as_file(dumped(make_recipe(TWO)))
    assert (written["model"], written["num_calibration_samples"]) == ("llama", 64)
    assert "dataset" not in written
    assert [step.get("dataset") for step in written["steps"]] == [None, "other.txt"]
    assert [step["method"] for step in written["steps"]] == ["slice", "slimlm"]
    assert "allocation" not in written["steps"][1]  # a pattern's


def test_flags_override_a_recipe_and_drop_the_other_runs_figures(tmp_path: Path):
    file = tmp_path / "r.yaml"
    values = {"model": "llama", "steps": [{"method": "slice", "sparsity": 0.3}], "expected": {"perplexity": 50.0}}
    file.write_text(yaml.safe_dump(values))
    assert load_recipe(str(file)).expected == {"perplexity": 50.0}
    assert load_recipe(str(file), {"output_dir": "x"}).expected == {"perplexity": 50.0}
    assert load_recipe(str(file), {"eval_windows": 4}).expected == {}
    changed = load_recipe(str(file), {"sparsity": 0.2})
    assert (changed.steps[0].sparsity, changed.expected) == (0.2, {})


def test_flags_win_in_every_step_or_name_the_only_one(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({**TWO, "seed": 1, "steps": [{**TWO["steps"][0], "seed": 2}, TWO["steps"][1]]}))
    assert [step.seed for step in load_recipe(str(file)).steps] == [2, 1]
    assert [step.seed for step in load_recipe(str(file), {"seed": 3}).steps] == [3, 3]
    with pytest.raises(UserError, match="^--sparsity: recipe .* has 2 steps"):
        load_recipe(str(file), {"sparsity": 0.2})


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1, float("nan")])
@pytest.mark.parametrize("method", ["slice", "wanda"])
def test_sparsity_out_of_range_is_refused(method: str, value: float):
    with pytest.raises(UserError, match="above 0 and below 1"):
        one_step(model="llama", method=method, sparsity=value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsty": 0.2}, "unknown key 'sparsty'; did you mean 'sparsity'"),
        ({"zzz": 1}, r"unknown key 'zzz' \(slice reads sparsity, latency, widths, round_to, .*\)$"),
        ({"sparsity": "much"}, "sparsity: .*valid number"),
        ({"dtype": "float8"}, "dtype: .*bfloat16"),
        ({"batch_size": 0}, "batch_size: .*greater than or equal to 1"),
        ({"method": "wnda"}, "unknown method 'wnda'; did you mean 'wanda'"),
        ({"method": ["wanda"]}, "unknown method"),
        (
            {"pattern": "2:4"},
            r"slice does not read pattern, which is for slimlm, .* and magnitude \(it reads sparsity, .*\)$",
        ),
        (
            {"method": "wanda", "round_to": 8},
            r"wanda does not read round_to, which is for slice \(it reads sparsity, pattern, ",
        ),
        ({"method": "wanda", "swaps": 2}, "wanda does not read swaps here: only the mask of update joint"),
        (
            {"method": "obc", "refit": True},
            "obc does not read refit here: only slimlm with its joint .*; it is for slice and slimlm$",
        ),
        ({"method": "slimlm", "update": "none", "refit": False}, "slimlm does not read refit here"),
        ({"method": "slimlm", "fisher_samples": 9}, "slimlm does not read fisher_samples here: gradients are for"),
        (
            {"method": "sparsegpt", "allocation": "global", "fisher_damping": 0.2},
            "sparsegpt does not read fisher_damping",
        ),
        ({"method": "wanda", "reorder": False}, "wanda does not read reorder here: neurons are ordered for tiles"),
        ({"method": "mfac", "pattern": "4x4", "reorder": True}, "mfac does not read reorder here"),
        ({"method": "slice", "shots": 2}, "shots are for methods that set weights to zero, not for slice"),
        ({"method": "wanda", "pattern": "4x4", "shots": 2}, "a pattern is pruned in one shot"),
        ({"method": "wanda", "shots": 0}, "shots: .*greater than or equal to 1"),
        ({"method": "wanda", "schedule": "linear"}, "a schedule is of several shots"),
    ],
)
def test_a_bad_key_or_value_is_named(values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"^recipe: {message}"):
        one_step(**{"model": "llama", "sparsity": 0.2, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 0.2}, r"^recipe: 'steps' is not given: list them, as in steps: \["),
        ({"steps": []}, "'steps' is not given"),
        ({"steps": [3]}, "'steps' is not given"),
        ({"steps": [{"sparsity": 0.2}]}, r"^recipe: 'method' is not given \(known: slice, "),
        ({"steps": [{"method": "slice", "sparsity": 0.2, "output_dir": "x"}]}, "'output_dir' is of the whole recipe"),
        ({"steps": [{"method": "slice", "sparsity": 0.2, "expected": {}}]}, "'expected' is of the whole recipe"),
        ({"steps": [{"method": "slice", "sparsity": 0.2}, {"method": "wanda"}]}, "step 2: 'sparsity' is not given"),
        ({"steps": [{"method": "slice", "sparsity": 0.2}], "expected": {"perplexity": "low"}}, "expected.perplexity"),
        ({"seeed": 1, "steps": [{"method": "slice", "sparsity": 0.2}]}, "unknown key 'seeed'; did you mean 'seed'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        make_recipe({"model": "x", **values})


def test_flags_name_themselves():
    with pytest.raises(UserError, match="^slice does not read --set fisher_samples"):
        recipe_of_flags({"model": "x", "sparsity": 0.2, "fisher_samples": 9})


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="'sparsity' is not given"):
        one_step(model="llama")


@pytest.mark.parametrize(("pattern", "round_to"), [("2:4", None), ("8:16", 32), ("16x16", 32), ("7x4", 28)])
def test_widths_are_whole_groups_of_the_patterns_to_come(pattern: str, round_to: int | None):
    steps = [{"method": "slice", "sparsity": 0.2}, {"method": "slimlm", "pattern": pattern}]
    if "x" in pattern:
        steps[1]["sparsity"] = 0.5
    assert make_recipe({"model": "x", "steps": steps}).steps[0].round_to == round_to
    steps[0]["round_to"] = 4
    assert make_recipe({"model": "x", "steps": steps}).steps[0].round_to == 4
    steps[0] = {"method": "slice", "widths": "hidden=16"}
    assert make_recipe({"model": "x", "steps": steps}).steps[0].round_to is None


def test_a_path_that_does_not_exist_is_not_taken_for_a_shipped_recipe():
    with pytest.raises(UserError, match=r"there is no recipe '/nowhere/llama-slice-25\.yaml'"):
        load_recipe("/nowhere/llama-slice-25.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1", "", "1: x", "\udcff"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str):
    (tmp_path / "r.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="cannot be read|not a mapping"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_an_unknown_recipe_suggests_a_shipped_one():
    with pytest.raises(UserError, match="did you mean 'llama-slice-25'"):
        load_recipe("llama-slise-25")


def test_every_shipped_recipe_is_valid_and_found_by_name_and_path():
    assert "llama-slice-25" in shipped_recipes()
    for name in shipped_recipes():
        assert isinstance(load_recipe(name), Recipe)
        assert load_recipe(f"recipes/{name}.yaml") == load_recipe(name)


def test_widths_stand_in_for_a_sparsity_and_do_not_go_with_one():
    one, other = {"hidden": 224, "mlp": 496}, {"blocks": 5}
    assert SliceStep(model="llama", widths="hidden=224, mlp=496/blocks=5").width_choices == [one, other]
    with pytest.raises(UserError, match="leave out sparsity, or widths"):
        one_step(model="llama", widths="hidden=224", sparsity=0.2)
    with pytest.raises(UserError, match="widths are like hidden=224"):
        one_step(model="llama", widths="hiden=224")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latency": 0}, "latency is the share of the time that is left, above 0 and below 1, not 0$"),
        ({"latency": 1}, "above 0 and below 1, not 1$"),
        ({"latency": float("nan")}, "above 0 and below 1, not nan$"),
        ({"latency": 80}, "not 80: did you mean 0.8?"),
        ({"latency": 0.8, "sparsity": 0.2}, "latency says how much goes: leave out sparsity, or latency"),
        ({"latency": 0.8, "widths": "mlp=32"}, "latency says how much goes: leave out widths, or latency"),
        ({"latency": 0.8, "basis": "per-block"}, "latency is for one basis"),
        (
            {"latency": 0.8, "method": "wanda"},
            "wanda does not read latency, which is for slice .it reads sparsity, pattern",
        ),
    ],
)
def test_what_does_not_go_with_a_latency_is_refused(values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        one_step(model="x", **values)
    step = SliceStep(model="x", latency=0.8)
    assert (step.share, step.extent, step.described) == (None, "latency-80", "slice, latency 0.8")


@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("64KB", 64_000), ("0.5GB", 5 * 10**8)],
)
def test_a_shards_size_is_written_with_its_unit(size: str, expected: int):
    assert SliceStep(model="x", sparsity=0.5, max_shard_size=size).max_shard_bytes == expected


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "-1GB", "5 apples", "5Gb/s"])
def test_a_size_without_a_unit_is_refused(size: str):
    with pytest.raises(UserError, match="max_shard_size: a size is like 5GB"):
        one_step(model="x", sparsity=0.5, max_shard_size=size)


def test_of_several_sources_each_needs_its_share():
    with pytest.raises(UserError, match="of several sources each needs its share, as in a.txt:0.7,b.txt:0.3: a:0.5,b"):
        one_step(model="llama", sparsity=0.2, dataset="a:0.5,b")
    assert one_step(model="llama", sparsity=0.2, dataset="a, b").steps[0].dataset == "a, b"
