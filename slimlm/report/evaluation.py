"""What `slimlm eval` found, for the terminal: a table for each model, and what it means in lines of text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from slimlm.evaluation.perplexity import of_no_use
from slimlm.report.summary import windows_line
from slimlm.report.table import Row, comparison_table, percent, size_rows
from slimlm.report.terminal import lines_of, sentences

ROOM = 80  # characters of a line that shows a text
WIDEST = 18  # characters of a model's name above its column
SHOWN = 3  # prompts whose continuations are shown
MANY = 1e6  # times, from which on digits mean nothing
SURE = 2  # standard errors, up to which a change may be chance
Figures = Mapping[str, Any]


def evaluation_shown(data: Figures) -> list[Table | Text]:
    """For the terminal: tables, what was lost, what was written, what it means, and the lm-eval commands that give the
    same scores."""
    lines = (*fragile_lines(data), *writing_lines(data["written"]), evaluation_summary(data))
    commands = [entry["lm_eval_command"] for entry in data["models"] if "lm_eval_command" in entry]
    return [*evaluation_tables(data), *sentences(*lines), *lines_of(*(f"same scores by: {one}" for one in commands))]


def evaluation_tables(data: Figures) -> list[Table]:
    """One for each model beside the dense one; without a dense one, of each by itself."""
    if not data["pairs"]:
        return [comparison_table((_end(entry["name"]),), list(_alone(entry))) for entry in data["models"]]
    *models, dense = data["models"]
    columns = ("dense", "{}", "change")
    return [
        comparison_table(
            [column.format(_end(entry["name"]) if len(models) > 1 else "compressed") for column in columns],
            list(_beside(entry, dense, pair)),
        )
        for entry, pair in zip(models, data["pairs"], strict=True)
    ]


def _alone(entry: Figures) -> Iterator[Row]:
    yield from size_rows([entry["parameters"]], [entry["bytes"]])
    for name, text in entry["texts"].items():
        yield f"perplexity, {name}", [_perplexity(text)]
        yield "  bits per byte", [_bits(text)]
    for task, metrics in entry["tasks"].items():
        yield task, []
        for metric, score in metrics.items():
            yield f"  {metric}", [_score(score)]
    if entry["generation"]:
        yield "writing", []
        for way, figures in entry["generation"].items():
            yield f"  {way}: repeats", [_share(figures["repetition"])]


def _beside(entry: Figures, dense: Figures, pair: Figures) -> Iterator[Row]:
    yield from size_rows(*([side[name] for side in (dense, entry)] for name in ("parameters", "bytes")))
    for name, change in pair["texts"].items():
        yield from _text_rows(name, dense["texts"][name], entry["texts"][name], change)
    for task, metrics in entry["tasks"].items():
        yield task, []
        for metric, score in metrics.items():
            yield from _task_rows(metric, dense["tasks"][task][metric], score, pair["tasks"][task][metric])
    if pair["generation"]:
        yield from _writing_rows(entry["generation"], dense["generation"], pair["generation"])


def _text_rows(name: str, before: Figures, text: Figures, change: Figures) -> Iterator[Row]:
    yield name, []
    # of a ratio of perplexities r = exp(d) the standard error is that of d times r
    ratio, error = change["perplexity_ratio"], change["stderr"]
    cells = _changed(ratio) + ("" if error is None or ratio > MANY else f" ± {100 * ratio * error:.1f}%")
    yield "  perplexity", [_perplexity(before), _perplexity(text), cells]
    yield "  bits per byte", [_bits(before), _bits(text), ""]
    if "kl" in change:
        kl, same = change["kl"], change["same_top"]
        yield "  KL, in nats", ["", f"{kl['mean']:.4f}{_plus_minus(kl['stderr'])}", ""]
        yield "    median, 99.9%", ["", f"{kl['median']:.4f}, {kl['p99.9']:.2f}", ""]
        error = "" if same["stderr"] is None else f" ± {100 * same['stderr']:.1f}%"
        yield "  same top token", ["", f"{same['value']:.1%}{error}", ""]


def _task_rows(metric: str, before: Figures, score: Figures, change: Figures) -> Iterator[Row]:
    yield f"  {metric}", [_score(before), _score(score), f"{change['change']:+.4f}{_plus_minus(change['stderr'])}"]
    if change["percent_of_dense"] is not None:
        yield "    of dense", ["", f"{change['percent_of_dense']:.1f}%", ""]
    if "flips" in change:
        yield "    flips: lost, won", ["", f"{change['lost']:.1%}, {change['won']:.1%}", f"{change['flips']:.1%}"]


def _writing_rows(own: Figures, dense: Figures, pair: Figures) -> Iterator[Row]:
    yield "writing", []
    for way, figures in own.items():
        yield f"  {way}: repeats", [_share(dense[way]["repetition"]), _share(figures["repetition"]), ""]
    surprises = [_number(side["sampled"]["surprise"]) for side in (dense, own)]
    yield "  nats/token to dense", [*surprises, ""]
    yield "  greedy: as dense", ["", _share(pair["same"]), ""]
    yield "    else for tokens", ["", _number(pair["diverges_at"]), ""]


def _perplexity(text: Figures) -> str:
    value, error = text["perplexity"], text["perplexity"] * text["log_perplexity_stderr"]
    if value > MANY:
        return f"{value:.3g}"
    return f"{value:.2f}" + (f" ± {error:.2f}" if error else "")


def _changed(ratio: float) -> str:
    return f"{ratio:.3g} times" if ratio > MANY else percent(ratio - 1)


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


def _bits(text: Figures) -> str:
    return _number(text["bits_per_byte"], "{:.4f}")


def _score(score: Figures) -> str:
    return f"{score['value']:.4f}{_plus_minus(score['stderr'])}"


def _share(value: float | None) -> str:
    return _number(value, "{:.0%}")


def _number(value: float | None, form: str = "{:.1f}") -> str:
    return "-" if value is None else form.format(value)


def evaluation_summary(data: Figures) -> str:
    """Verdicts, warnings, texts, and versions."""
    dtypes = " and ".join(dict.fromkeys(entry["dtype"] for entry in data["models"]))
    return "\n".join(
        [
            *verdict_lines(data),
            *warning_lines(data),
            *(windows_line(text, dtypes) for text in data["texts"]),
            *_method_lines(data),
            "versions: " + ", ".join(f"{name} {version}" for name, version in data["versions"].items()),
        ]
    )


def verdict_lines(data: Figures) -> list[str]:
    """Of each pair, in a line: what was lost on texts, on tasks, and in writing."""
    return [f"{pair['model']}: " + "; ".join(_verdict(pair)) for pair in data["pairs"]]


def _verdict(pair: Figures) -> Iterator[str]:
    ratios = sorted(change["perplexity_ratio"] for change in pair["texts"].values())
    if ratios:
        ends = dict.fromkeys(map(_changed, (ratios[0], ratios[-1])))
        yield f"perplexity {' to '.join(ends)}"
    for task, metrics in pair["tasks"].items():
        name, change = next(iter(metrics.items()))
        error = change["stderr"]
        is_sure = error is not None and abs(change["change"]) > SURE * error
        yield f"{task} {name} {change['change']:+.4f}{_plus_minus(error)}" + (
            "" if is_sure else ", which may be chance"
        )
    if pair["generation"]:
        yield "its own text has " + ("COLLAPSED" if pair["generation"]["collapsed"] else "not collapsed")


def warning_lines(data: Figures) -> list[str]:
    """What is wrong with a model, or with a figure."""
    lines = [f"WARNING: {line}" for line in data["notes"]]
    lines += [f"WARNING: {entry['name']}: {line}" for entry in data["models"] for line in entry["warnings"]]
    for pair in data["pairs"]:
        rises = {name: change["log_perplexity_change"] for name, change in pair["texts"].items()}
        lines += of_no_use(rises, pair["model"])
        collapsed = (pair["generation"] or {}).get("collapsed", [])
        lines += [f"WARNING: {pair['model']}: its own text has collapsed: {reason}" for reason in collapsed]
    return lines


def _method_lines(data: Figures) -> list[str]:
    if not data["pairs"]:
        return []
    kinds = dict.fromkeys(
        f"{change['clusters']['count']} {change['clusters']['of']}" for change in data["pairs"][0]["texts"].values()
    )
    clusters = f", of texts over {' and '.join(kinds)}" if kinds else ""
    return [f"± is one standard error; of a change, that of differences on the same documents{clusters}"]


def fragile_lines(data: Figures) -> list[str]:
    """The documents that each model lost, worst first."""
    lines = []
    for pair in data["pairs"]:
        for name, windows in pair.get("fragile", {}).get("texts", {}).items():
            lines.append(f"{pair['model']} lost most on {name}, in nats a token:")
            lines += [f"  window {one['window']}, document {one['document']}: {one['change']:+.3f}" for one in windows]
        for task, questions in pair.get("fragile", {}).get("tasks", {}).items():
            lines.append(
                f"{pair['model']} lost most on {task}, log-likelihood of the right answer over the best other:"
            )
            lines += [
                _cut(f"  question {one['document']}: {_number(one['margin_change'], '{:+.2f}')}  ", one["question"])
                for one in questions
            ]
    return lines


def writing_lines(written: Sequence[Figures]) -> list[str]:
    """Greedy continuations of some prompts, by each model, side by side."""
    greedy = [(one["model"], [text for text in one["texts"] if text["way"] == "greedy"]) for one in written]
    lines = []
    for number, one in enumerate(greedy[0][1][:SHOWN] if greedy else []):
        lines.append(_cut("prompt: ", one["prompt"]))
        lines += [_cut(f"  {_end(name)}: ", texts[number]["text"]) for name, texts in greedy]
    return lines


def _end(name: str) -> str:
    """Of a name, as much as leaves figures, labels and texts their room."""
    return name if len(name) <= WIDEST else f"...{name[3 - WIDEST :]}"


def _cut(label: str, text: str) -> str:
    """A line, and as much of a text as there is room for."""
    shown = label + " ".join(text.split())
    return shown if len(shown) <= ROOM else f"{shown[: ROOM - 3]}..."
