"""The recipes that ship with slimlm, as a table."""

from rich.table import Table
from rich.text import Text
from typing_extensions import TypedDict

from slimlm.recipe import load_recipe, shipped_recipes
from slimlm.report.table import comparison_table
from slimlm.report.terminal import lines_of


class ShippedStep(TypedDict):
    """share: of the parameters or weights that is to go, null where widths say it; described: the step in words."""

    method: str
    share: float | None
    described: str


class ShippedRecipe(TypedDict):
    """expected: figures of the result that the recipe gave when it was written."""

    name: str
    path: str
    model: str
    steps: list[ShippedStep]
    expected: dict[str, float]


class Recipes(TypedDict):
    """All that `--recipe` takes by name."""

    recipes: list[ShippedRecipe]


def known_recipes() -> Recipes:
    """Read from their files. Raises UserError for one that is not valid."""
    found: list[ShippedRecipe] = []
    for name, path in sorted(shipped_recipes().items()):
        recipe = load_recipe(str(path))
        steps: list[ShippedStep] = [
            {"method": step.method, "share": step.share, "described": step.described} for step in recipe.steps
        ]
        model = recipe.steps[0].model
        found.append({"name": name, "path": str(path), "model": model, "steps": steps, "expected": recipe.expected})
    return {"recipes": found}


def recipes_shown() -> list[Table | Text]:
    """A table, and where the files are. Raises UserError for one that is not valid."""
    recipes = known_recipes()["recipes"]
    rows = []
    for one in recipes:
        figures = [f"{one['expected'][name]:,.10g}" if name in one["expected"] else "-" for name in EXPECTED]
        rows.append((one["name"], [one["model"], ", then ".join(step["described"] for step in one["steps"]), *figures]))
    table = comparison_table(("model", "what it does", *EXPECTED), rows)
    for column in table.columns[1:3]:
        column.justify, column.no_wrap = "left", False
    told = f"{' and '.join(EXPECTED)}: of the result, by the recipe's own run"
    return [table, Text(told), *lines_of(*(one["path"] for one in recipes))]


EXPECTED = ("parameters", "perplexity")
