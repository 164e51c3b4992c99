"""Plain data, as JSON and YAML hold it."""

from collections.abc import Mapping, Sequence

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
Told = Json | Mapping[str, object]  # or a TypedDict, whose values no Mapping can tell
