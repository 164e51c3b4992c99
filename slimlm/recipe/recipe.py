"""A list of steps, each on what the one before gave, and the two forms it is written in: a file's, and flags."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, ValidationError
from pydantic.fields import FieldInfo

from slimlm.errors import UserError, nearest
from slimlm.plain import Json
from slimlm.recipe.pruning import ROWS, PruneStep
from slimlm.recipe.recovering import RecoverStep
from slimlm.recipe.slicing import RotateStep, SliceStep
from slimlm.recipe.step import HasSteps, Step

AnyStep = SliceStep | PruneStep | RotateStep | RecoverStep
METHODS: dict[str, type[AnyStep]] = {
    "slice": SliceStep,
    **dict.fromkeys(ROWS, PruneStep),
    "rotate": RotateStep,
    "recover": RecoverStep,
}
Setting = Json | HasSteps | Path  # a method may be given itself
SHARED = [name for name in Step.model_fields if name != "method"]
OF_THE_WHOLE = ("model", "revision", "trust_remote_code", "output_dir", "expected")


class Recipe(BaseModel):
    """Steps, the first of which gets the model, and all others what the one before gave."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: SkipValidation[list[AnyStep]]  # valid ones, in which a run may have filled in what no file may say
    expected: dict[str, float] = Field({}, description="figures this recipe gave when it was written")

    def updated(self, **settings: Json) -> Self:
        """The recipe with these settings in every step."""
        return self.model_copy(update={"steps": [step.model_copy(update=settings) for step in self.steps]})


class Shots(BaseModel):
    """How a pruning step of a file becomes several."""

    model_config = ConfigDict(extra="forbid")

    shots: int = Field(
        1, ge=1, description="pruning: times that curvature is estimated anew, on the way to the sparsity"
    )
    schedule: Literal["cubic", "linear"] = Field(
        "cubic", description="pruning in several shots: how the sparsity grows; cubic prunes most of it at first"
    )

    @property
    def grown(self) -> list[float]:
        """Shares of the sparsity s: s (1 - (1 - i / k)^3) over k shots (Zhu & Gupta, arXiv 1710.01878, eq. 1), or
        linearly."""
        power = 3 if self.schedule == "cubic" else 1
        return [1 - (1 - shot / self.shots) ** power for shot in range(1, self.shots + 1)]


FIELDS: dict[str, FieldInfo] = {  # what a setting is, of whichever steps have it
    **Shots.model_fields,
    **PruneStep.model_fields,
    **SliceStep.model_fields,
    **RecoverStep.model_fields,
    **Step.model_fields,
}
FLAGS = {*Step.model_fields, "sparsity", "latency", "pattern", "widths", "refit", "refine", "allocation"}
OF_RECOVERY = {
    "teacher", "objective", "tokens", "minutes", "lora", "learning_rate", "optimizer", "hidden_weight", "teacher_top_k",
    "gradient_checkpointing",
}  # fmt: skip


def flag_of(name: str) -> str:
    """How a setting is given at the command line: most by a flag of their own, those of experts by `--set`."""
    return f"--{name.replace('_', '-')}" if name in FLAGS | OF_RECOVERY else f"--set {name}"


def make_recipe(values: Mapping[str, Json], source: str = "recipe") -> Recipe:
    """The recipe in a file's form: `steps`, and beside them what holds for all steps that do not say it themselves.

    source: where the values stand. Raises UserError naming the step, the key, the nearest known one, and the reason.
    """
    shared = {name: value for name, value in values.items() if name not in ("steps", "expected")}
    steps = steps_of(values)
    if not steps:
        raise UserError(f"{source}: 'steps' is not given: list them, as in steps: [{{method: wanda, sparsity: 0.5}}]")
    found: list[AnyStep] = []
    for number, own in enumerate(steps, start=1):
        where = f"{source}: step {number}" if len(steps) > 1 else source
        for name in OF_THE_WHOLE:
            if name in own:
                raise UserError(f"{where}: {name!r} is of the whole recipe: put it above the steps")
        if "method" not in {**shared, **own}:
            raise UserError(f"{where}: 'method' is not given (known: {', '.join(METHODS)})")
        found += _shots_of({**shared, **own}, where)
    return _recipe(found, source, values.get("expected", {}))


def steps_of(values: Mapping[str, Json]) -> list[Mapping[str, Json]]:
    """The steps of a recipe in a file's form; none where they are not a list of mappings."""
    steps = values.get("steps")
    found = [step for step in steps if isinstance(step, Mapping)] if isinstance(steps, list) else []
    return found if isinstance(steps, list) and len(found) == len(steps) else []


def recipe_of_flags(settings: Mapping[str, Setting], source: str = "") -> Recipe:
    """The recipe of one step, or of one in several shots, from all its settings.

    source: where they stand; none for flags, which name themselves. Raises UserError as `make_recipe`.
    """
    return _recipe(_shots_of(dict(settings), source), source, {})


def one_step(**settings: Setting) -> Recipe:
    """The recipe of one step. Raises UserError as `make_recipe`."""
    return recipe_of_flags(settings, "recipe")


def dumped(recipe: Recipe) -> dict[str, Any]:
    """The recipe in a file's form, with every setting that is read: above, what is the same in all steps."""
    steps = [step.settings for step in recipe.steps]
    same = [name for name in SHARED if all(name in step and step[name] == steps[0][name] for step in steps)]
    own = [{name: value for name, value in step.items() if name not in same} for step in steps]
    return {**{name: steps[0][name] for name in same}, "steps": own}


def _recipe(steps: list[AnyStep], source: str, expected: Json) -> Recipe:
    for place, step in enumerate(steps):
        if isinstance(step, SliceStep) and not step.widths and step.round_to is None:
            granule = _granule([later for later in steps[place:] if isinstance(later, PruneStep)])
            if granule is not None:
                steps[place] = step.model_copy(update={"round_to": granule})
    try:
        return Recipe.model_validate({"steps": steps, "expected": expected})
    except ValidationError as error:
        raise _refusal(error, source, Recipe) from error


def _granule(later: list[PruneStep]) -> int | None:
    """What widths are to be multiples of, so that patterns to come find whole groups; None where they are anyway."""
    group = math.lcm(*(size for step in later for size in (step.tile or step.pattern_sizes[1:]) if size))
    if 8 % group == 0:  # of what divides 8 the widths taken by default are multiples
        return None
    return 32 if 32 % group == 0 else group


def _shots_of(values: dict[str, Setting], source: str) -> list[AnyStep]:
    """The step, or as many as it has shots."""
    given = {name: values.pop(name) for name in Shots.model_fields if name in values}
    try:
        shots = Shots.model_validate(given)
    except ValidationError as error:
        raise _refusal(error, source, Shots) from error
    step = _step(values, source)
    if shots.shots == 1:
        if "schedule" in given:
            raise _error("a schedule is of several shots: give shots, too", source)
        return [step]
    if not isinstance(step, PruneStep):
        raise _error(f"shots are for methods that set weights to zero, not for {step.method}", source)
    if step.pattern:
        raise _error("a pattern is pruned in one shot: leave out shots", source)
    return [step.model_copy(update={"sparsity": step.sparsity * share}) for share in shots.grown]


def _step(values: Mapping[str, Setting], source: str) -> AnyStep:
    method = values.get("method", "slice")
    # A method that is not in the table brings the class of its steps.
    kind: type[AnyStep] | None = getattr(method, "steps", None) or METHODS.get(str(method))
    if kind is None:
        near = nearest(str(method), METHODS)
        raise _error(f"unknown method {method!r}{near} (known: {', '.join(METHODS)})", source)
    name = str(getattr(method, "name", method))
    if not isinstance(method, str) and name in METHODS:
        raise _error(f"there is a method {name!r}: a method of one's own needs another name", source)
    try:
        return kind.model_validate({**values, "method": name})
    except ValidationError as error:
        raise _refusal(error, source, kind, name) from error


def _read_by(kind: type[BaseModel], method: str) -> list[str]:
    """The settings of a method's own that it reads where nothing else is said."""
    share = {"sparsity": 0.5} if "sparsity" in kind.model_fields else {}
    step = kind.model_validate({"model": "any", "method": method, **share}) if issubclass(kind, Step) else None
    needless = {*SHARED, "method", *(step.unread if step else ())}
    return [name for name in kind.model_fields if name not in needless]


def _readers(key: str) -> str:
    """The methods that read a setting where nothing else is said; nothing where there is none."""
    *others, last = [name for name, kind in METHODS.items() if key in _read_by(kind, name)] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def _error(message: str, source: str) -> UserError:
    return UserError(f"{source}: {message}" if source else message)


def _refusal(error: ValidationError, source: str, kind: type[BaseModel], method: str = "") -> UserError:
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")  # what is missing may be misspelt
    context = first.get("ctx", {})
    key = str(context.get("key") or ".".join(str(part) for part in first["loc"]))
    named = key if source or not key else flag_of(key)
    own, readers = ", ".join(_read_by(kind, method)), _readers(key)
    if first["type"] == "unread":
        others = f"; it is for {readers}" if readers and method not in readers else ""
        return _error(f"{method} does not read {named} here: {context['why']}{others}", source)
    if first["type"] == "extra_forbidden" and any(key in known.model_fields for known in METHODS.values()):
        others = f", which is for {readers}" if readers else ""
        return _error(f"{method} does not read {named}{others} (it reads {own}, and what every method does)", source)
    if first["type"] == "extra_forbidden":
        near = nearest(key, (*kind.model_fields, *Shots.model_fields))
        return _error(f"unknown key {named!r}{near or f' ({method} reads {own}, and what every method does)'}", source)
    if first["type"] == "missing":
        return _error(f"{named!r} is not given", source)
    message = str(first["msg"]).removeprefix("Value error, ")
    return _error(f"{named}: {message}" if named else message, source)
