"""JSON schemas of what commands write with `--json`, made of the types in slimlm/report/outputs.py.

    python -m tests.schemas

writes them all to docs/schema/.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from slimlm.report.outputs import OUTPUTS

PLACE = Path(__file__).parents[1] / "docs" / "schema"
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema_of(command: str) -> dict[str, Any]:
    """As its file has it."""
    found = TypeAdapter(OUTPUTS[command]).json_schema(mode="serialization")
    title = f"slimlm {command} --json".replace("-dry-run", " --dry-run")
    return {"$schema": DRAFT, **found, "title": title}


def differences(command: str, text: str) -> list[str]:
    """Where output has more or less than its type. Raises ValidationError for a value of another type."""
    adapter = TypeAdapter(OUTPUTS[command])
    known = adapter.dump_python(adapter.validate_json(text, strict=True), mode="json")
    return list(_differences(json.loads(text), known, command))


def _differences(own: Any, known: Any, where: str) -> Iterator[str]:
    if isinstance(own, dict) and isinstance(known, dict):
        yield from (f"{where}.{name}" for name in own.keys() ^ known.keys())
        for name in own.keys() & known.keys():
            yield from _differences(own[name], known[name], f"{where}.{name}")
    elif isinstance(own, list) and isinstance(known, list) and len(own) == len(known):
        for number, (one, other) in enumerate(zip(own, known, strict=True)):
            yield from _differences(one, other, f"{where}[{number}]")
    elif own != known:
        yield f"{where}: {own!r} is read as {known!r}"


def main() -> None:
    PLACE.mkdir(exist_ok=True)
    for command in OUTPUTS:
        (PLACE / f"{command}.json").write_text(json.dumps(schema_of(command), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
