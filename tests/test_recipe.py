from pathlib import Path

import pytest
import yaml

from slimlm.errors import UserError
from slimlm.recipe import Recipe, load_recipe, make_recipe, shipped_recipes


def test_yaml_and_flags_build_the_same_recipe(tmp_path: Path):
    values = {"model": "llama", "sparsity": 0.3, "seed": 7}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    assert load_recipe(str(tmp_path / "r.yaml")) == make_recipe(values)


def test_flags_override_a_recipe_and_drop_the_other_runs_figures(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"model": "llama", "sparsity": 0.3, "expected": {"perplexity": 50.0}}))
    assert load_recipe(str(file)).expected == {"perplexity": 50.0}
    assert load_recipe(str(file), {"output_dir": "x"}).expected == {"perplexity": 50.0}
    assert load_recipe(str(file), {"eval_windows": 4}).expected == {}
    changed = load_recipe(str(file), {"sparsity": 0.2})
    assert (changed.sparsity, changed.expected) == (0.2, {})


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1, float("nan")])
def test_sparsity_out_of_range_is_refused(value: float):
    with pytest.raises(UserError, match="above 0 and below 1"):
        make_recipe({"model": "llama", "sparsity": value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsty": 0.2}, "unknown key 'sparsty'; did you mean 'sparsity'"),
        ({"zzz": 1}, "unknown key 'zzz'$"),
        ({"sparsity": "much"}, "sparsity: .*valid number"),
        ({"dtype": "float8"}, "dtype: .*bfloat16"),
        ({"batch_size": 0}, "batch_size: .*greater than or equal to 1"),
    ],
)
def test_a_bad_key_or_value_is_named(values, message):
    with pytest.raises(UserError, match=message):
        make_recipe({"model": "llama", "sparsity": 0.2, **values})


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="'sparsity' is not given"):
        make_recipe({"model": "llama"})


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
    assert make_recipe({"model": "llama", "widths": "hidden=224, mlp=496/blocks=5"}).width_choices == [one, other]
    assert make_recipe({"model": "llama", "method": "rotate"}).sparsity == 0
    with pytest.raises(UserError, match="leave out sparsity, or widths"):
        make_recipe({"model": "llama", "widths": "hidden=224", "sparsity": 0.2})
    with pytest.raises(UserError, match="widths are like hidden=224"):
        make_recipe({"model": "llama", "widths": "hiden=224"})


@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("64KB", 64_000), ("0.5GB", 5 * 10**8)],
)
def test_a_shards_size_is_written_with_its_unit(size: str, expected: int):
    assert Recipe(model="x", sparsity=0.5, max_shard_size=size).max_shard_bytes == expected


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "-1GB", "5 apples", "5Gb/s"])
def test_a_size_without_a_unit_is_refused(size: str):
    with pytest.raises(UserError, match="max_shard_size: a size is like 5GB"):
        make_recipe({"model": "x", "sparsity": 0.5, "max_shard_size": size})
