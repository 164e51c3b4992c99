"""A recipe says everything about its runs. YAML files and command-line flags both become one."""

from slimlm.recipe.files import RAN_REMOTE_CODE, as_file, load_recipe, shipped_recipes
from slimlm.recipe.pruning import (
    FISHERS,
    GRAMS,
    ROWS,
    Allocation,
    CurvatureName,
    PruneStep,
    Row,
)
from slimlm.recipe.recipe import (
    FIELDS,
    FLAGS,
    OF_RECOVERY,
    AnyStep,
    Recipe,
    Setting,
    dumped,
    flag_of,
    make_recipe,
    one_step,
    recipe_of_flags,
    steps_of,
)
from slimlm.recipe.recovering import RecoverStep
from slimlm.recipe.slicing import RotateStep, SliceStep
from slimlm.recipe.step import OF_HUB, SELF, Meant, Source, Step

__all__ = [
    "FIELDS",
    "FISHERS",
    "FLAGS",
    "GRAMS",
    "OF_HUB",
    "OF_RECOVERY",
    "RAN_REMOTE_CODE",
    "ROWS",
    "SELF",
    "Allocation",
    "AnyStep",
    "CurvatureName",
    "Meant",
    "PruneStep",
    "Recipe",
    "RecoverStep",
    "RotateStep",
    "Row",
    "Setting",
    "SliceStep",
    "Source",
    "Step",
    "as_file",
    "dumped",
    "flag_of",
    "load_recipe",
    "make_recipe",
    "one_step",
    "recipe_of_flags",
    "shipped_recipes",
    "steps_of",
]
