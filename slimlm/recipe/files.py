"""Recipes in YAML files, one's own and those that ship with slimlm."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from slimlm.errors import UserError, nearest
from slimlm.plain import Json
from slimlm.recipe.recipe import SHARED, Recipe, flag_of, make_recipe, steps_of

ROOT = Path(__file__).parent.parent
RECIPE_DIRECTORIES = (ROOT / "recipes", ROOT.parent / "recipes")
RAN_REMOTE_CODE = "ran_remote_code"  # in place of a permission, in recipes that slimlm writes


def load_recipe(name: str | Path, overrides: Mapping[str, Json] | None = None) -> Recipe:
    """The recipe in a YAML file, or one shipped with slimlm by its name; `overrides`, settings by name, win.

    Raises UserError when there is no such recipe or it is not valid.
    """
    path, flags = find_recipe(str(name)), dict(overrides or {})
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"recipe {path} is not a mapping of keys to values")
    source = f"recipe {path}"
    _refuse_trust(values, flags, source)
    recipe, written = make_recipe(_overridden(values, flags, source), source), make_recipe(values, source)
    told = {name: getattr(written.steps[0], name) for name in ("output_dir", "trust_remote_code")}
    same = recipe.updated(**told) == written
    return recipe if same else recipe.model_copy(update={"expected": {}})  # another run's figures


def as_file(recipe: Mapping[str, Json]) -> dict[str, Json]:
    """What `dumped` gives without what a file need not say, or may not: nothing, and the sparsity that widths or a
    latency give."""
    settings = {name: value for name, value in recipe.items() if value is not None}
    steps = [{name: value for name, value in step.items() if value is not None} for step in steps_of(recipe)]
    for step in steps:
        if {"widths", "latency"} & step.keys():
            step.pop("sparsity", None)
    return {**settings, "steps": steps}


def _overridden(values: Mapping[str, Json], flags: Mapping[str, Json], source: str) -> dict[str, Json]:
    """A file's values with settings from elsewhere: for all steps, or for the only one there is."""
    steps = steps_of(values)
    shared = {name: value for name, value in flags.items() if name in SHARED}
    own = {name: value for name, value in flags.items() if name not in SHARED}
    if len(steps) > 1 and own:
        raise UserError(f"{flag_of(next(iter(own)))}: {source} has {len(steps)} steps; set it in that of the file")
    kept = [{name: value for name, value in step.items() if name not in shared} for step in steps]
    return {**values, **shared, "steps": [{**step, **own} for step in kept]}


def _refuse_trust(values: dict[str, Json], flags: Mapping[str, Json], source: str) -> None:
    """Whether code that comes with a model may run is for who runs it to say: recipes are handed on.

    Takes the note out that a recipe was run that way. Raises UserError for one that wants it without the flag.
    """
    if values.pop("trust_remote_code", False):
        raise UserError(
            f"{source}: trust_remote_code cannot be set in a file: take it out, and give --trust-remote-code"
        )
    if values.pop(RAN_REMOTE_CODE, False) and not flags.get("trust_remote_code"):
        raise UserError(
            f"{source} was run with code that comes with its model: read that, then add --trust-remote-code to run it"
        )


def find_recipe(name: str) -> Path:
    """Path of a recipe given as a path or as the name of one that ships with slimlm. Raises UserError for neither."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_recipes()
    key = name.removesuffix(".yaml")
    if key not in shipped:
        raise UserError(f"there is no recipe {name!r}{nearest(key, shipped)} (shipped: {', '.join(sorted(shipped))})")
    return shipped[key]


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with slimlm, by name."""
    return {path.stem: path for directory in RECIPE_DIRECTORIES for path in sorted(directory.glob("*.yaml"))}
