"""`--set NAME=VALUE`: the settings of a recipe that have no flag of their own."""

from collections.abc import Mapping, Sequence

import yaml

from slimlm.cli.options import Value
from slimlm.errors import UserError, nearest, one_line
from slimlm.recipe import FIELDS, FLAGS, flag_of


def with_assigned(settings: Mapping[str, Value], assignments: Sequence[str]) -> dict[str, Value]:
    """The settings of flags, and those assigned. Raises UserError for an unknown name, or one that is given twice."""
    found = dict(settings)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UserError(f"--set {assignment}: give NAME=VALUE, as in --set round_to=64")
        if name not in FIELDS:
            own = ", ".join(sorted(FIELDS.keys() - FLAGS))
            near = nearest(name, FIELDS) or f" (without a flag of their own are {own})"
            raise UserError(f"--set {assignment}: there is no setting {name!r}{near}")
        if name in found:
            raise UserError(f"{flag_of(name)} is given twice")
        found[name] = _value(name, text)
    return found


def _value(name: str, text: str) -> Value:
    """As YAML has it, but that words stay words: 2:4 is a number of base sixty there."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {name}={text}: {one_line(error)}") from error
    if value is None or isinstance(value, list) or FIELDS[name].annotation in (int, float, bool, int | None):
        found: Value = value
        return found
    return text.strip() if not isinstance(value, str) else value
