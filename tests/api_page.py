"""docs/api.md, made of what `import slimlm` offers: docstrings, and the settings each function takes.

    python -m tests.api_page

writes it.
"""

import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import slimlm
from slimlm.recipe import FIELDS
from slimlm.settings import BenchSettings, CompressSettings, EvalSettings, HubSettings, InspectSettings

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
SETTINGS = {
    "compress": CompressSettings,
    "evaluate": EvalSettings,
    "bench": BenchSettings,
    "inspect_model": InspectSettings,
}
BEGINNING = """# Python

What `import slimlm` offers. Whatever is wrong with a request raises `slimlm.UserError`, a run that fails
`slimlm.RunFailure`; both are `slimlm.SlimlmError`. What functions return prints as their command shows it, in notebooks
too. This page is made of docstrings by `python -m tests.api_page`.
"""


def page() -> str:
    """All of it."""
    names = [name for name in slimlm.__all__ if not name.startswith("_")]
    functions = [name for name in names if inspect.isroutine(getattr(slimlm, name))]
    parts = [BEGINNING, *map(section, [*functions, *(name for name in names if name not in functions)]), recipes()]
    return "\n".join(parts)


def section(name: str) -> str:
    """One name: its docstring, and what it takes."""
    thing = getattr(slimlm, name)
    rows = list(setting_rows(SETTINGS[name])) if name in SETTINGS else []
    table = ["| argument | default | what |\n| --- | --- | --- |", *rows, ""] if rows else []
    return "\n".join([f"## `slimlm.{name}`\n", inspect.getdoc(thing) or "", "", *table])


def setting_rows(settings: type[HubSettings]) -> Iterator[str]:
    """Of each that says what it is."""
    for field in sorted(fields(settings), key=lambda field: field.kw_only):
        description = field.metadata.get("description")
        if description:
            shown = field.metadata.get("shown") or as_default(field.default)
            yield row(field.name, shown, description)


def recipes() -> str:
    """The settings of steps."""
    rows = (row(name, as_default(info.default), info.description or "") for name, info in sorted(FIELDS.items()))
    head = [
        "## Settings of a recipe's steps\n",
        "As `slimlm.one_step`, `slimlm.compress(model, tokenizer, ...)` and files take them; which of them a step",
        "reads, its method says.\n",
        "| setting | default | what |\n| --- | --- | --- |",
    ]
    return "\n".join([*head, *rows, ""])


def row(name: str, default: str, description: str) -> str:
    """Of a table; what stands between columns is written out."""
    return f"| `{name}` | {default} | {description} |".replace("`|`", "`\\|`")


def as_default(value: Any) -> str:
    """In words; nothing where there is none, or it is filled in later."""
    return "" if value is None or type(value).__name__ in ("PydanticUndefinedType", "_MISSING_TYPE") else f"`{value!r}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
