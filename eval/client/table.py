"""Rows of models and clients as Markdown."""

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]], clients: Sequence[str]) -> str:
    """A line for a model, a column for a client; errors in full below; then quantised files."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["model"], row["client"]): row for row in rows}
    columns = [name for name in clients if any(row["client"] == name for row in rows)]
    lines = [f"| model | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    for model in models:
        cells = [cell(found.get((model, name))) for name in columns]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    said: dict[str, list[str]] = {}
    for row in rows:
        for note in notes(row):
            said.setdefault(f"{row['client']}: {note}", []).append(row["model"])
    lines += ["", *(f"* {note} ({', '.join(models)})" for note, models in sorted(said.items()))]
    return "\n".join([*lines, "", *quantised(rows)])


def cell(row: dict[str, Any] | None) -> str:
    """How near it is or what is wrong, with a star where there is more to say."""
    if row is None:
        return ""
    said = []
    if "error" in row:
        said.append("fails")
    if "difference" in row:
        said.append(f"{row['difference']:.0e}" if row["difference"] < 1e-2 else f"{row['difference']:.2f}")
    if row.get("equal") != row.get("of"):
        said.append(f"{row['equal']}/{row['of']} tokens")
    if row.get("tokenizer", "same") != "same":
        said.append("tokenizer")
    said += [
        f"{name} {value:.2f}" for name, value in row.items() if name in {"int8", "int4"} and isinstance(value, float)
    ]
    parts = ["ok" if row["passes"] else "**no**", ", ".join(said), "\\*" if notes(row) else ""]
    return " ".join(part for part in parts if part)


def notes(row: dict[str, Any]) -> list[str]:
    """What does not fit into a cell."""
    said = [row["error"]] if "error" in row else []
    if row.get("tokenizer", "same") != "same":
        said.append(f"tokenizer: {row['tokenizer']}")
    said += [f"{name}: {row[name]}" for name in ("int8", "int4") if isinstance(row.get(name), str)]
    said += [f"{key}: {value}" for key, value in row.get("loading", {}).items()]
    return said + ([row["notes"]] if row.get("notes") else [])


def quantised(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of llama.cpp's formats, and torchao's."""
    lines = [
        "| model | format | MB | not quantised | KL to f32 | perplexity | tokens/s | to dense |",
        f"|{' --- |' * 8}",
    ]
    for row in rows:
        for name, facts in row.get("formats", {}).items():
            speed, dense = facts.get("tokens_per_second"), facts.get("dense_tokens_per_second")
            left = "" if name == "f32" else f"{facts['in F16 or F32']} of {facts['matrices']}"
            cells = [row["model"], name, f"{facts['bytes'] / 1e6:.1f}", left]
            cells += [f"{facts['divergence']:.4f}", f"{facts['perplexity']:.2f}"]
            cells += [f"{speed:.1f}", f"{speed / dense:.2f}"] if speed else ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
        for name, facts in row.get("quantised", {}).items():
            cells = [
                row["model"],
                f"torchao {name}",
                "",
                "",
                f"{facts['divergence']:.4f}",
                f"{facts['perplexity']:.2f}",
            ]
            lines.append(f"| {' | '.join([*cells, '', ''])} |")
    return lines if len(lines) > 2 else []
