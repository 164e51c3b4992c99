"""Tables of speed: a model beside the dense one, a section for each batch size."""

from collections.abc import Callable, Iterator, Sequence

from rich.table import Table
from rich.text import Text

from slimlm.checkpoint.manifest import versions
from slimlm.evaluation.speed.contenders import AS_STORED
from slimlm.evaluation.speed.figures import Bench, ModelSpeed
from slimlm.evaluation.speed.timing import BatchSpeed, Ratio, Spread, decode_ratio, prefill_ratio
from slimlm.report.terminal import sentences

FEW = 0.005  # zeros, which are not worth a row
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def speed_shown(found: Bench) -> list[Table | Text]:
    """For the terminal: tables, what there is to say of each, and how it was measured."""
    shown: list[Table | Text] = []
    for table, verdict in speed_tables(found):
        shown += [table, *sentences(*verdict)]
    return [*shown, *sentences(*speed_lines(found))]


def speed_tables(found: Bench) -> Iterator[tuple[Table, list[str]]]:
    """For each model a table, and what there is to say of it. Columns: the dense model, the model as it is stored and,
    where it was run so, with sparse kernels; then, of each but the first, how many times the dense model's."""
    for group in _groups(found.models):
        yield _table(group, found.dense), [line for one in group for line in one.verdict]


def speed_lines(found: Bench) -> list[str]:
    """How it was measured."""
    every = [*found.models, *([found.dense] if found.dense else [])]
    lines = [
        f"{found.engine}, prompts of {found.prompt_tokens} random tokens and {found.new_tokens} new ones, greedy: "
        f"medians of {found.rounds} rounds in turns by the {found.clock} clock, ± half the width of their middle half"
    ]
    if found.dense:
        lines.append("~: rounds do not agree about which of the two is faster")
    if any(batch.memory for one in every for batch in one.batches):
        on_gpu = found.device.startswith("cuda")
        lines.append("memory: " + ("what the GPU's allocator gave out" if on_gpu else "weights, keys and values"))
    if any(prediction for one in found.models for prediction in one.predicted):
        lines.append("predicted: its shapes' products, timed alone, and what the dense model's blocks take besides")
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [*lines, found.machine, f"versions: {named}"]


def _groups(models: Sequence[ModelSpeed]) -> list[list[ModelSpeed]]:
    """Each model as it is stored, with what follows it of the same."""
    groups: list[list[ModelSpeed]] = []
    for one in models:
        if one.kernels == AS_STORED:
            groups.append([])
        groups[-1].append(one)
    return groups


def _table(group: Sequence[ModelSpeed], dense: ModelSpeed | None) -> Table:
    columns = [*([dense] if dense else []), *group]
    table = Table(title=group[0].name, title_justify="left", title_style="bold")
    table.add_column("")
    for one in columns:
        label = "dense" if one is dense else "model" if len(group) == 1 else one.kernels
        table.add_column(label, justify="right")
    for one in group if dense else []:
        table.add_column("ratio" if len(group) == 1 or one.kernels == AS_STORED else "ratio, sparse", justify="right")
    for label, cells in _whole(columns):
        table.add_row(label, *cells, *_ratios(label, group, dense))
    for place, batch in enumerate(columns[0].batches):
        table.add_section()
        table.add_row(f"batch of {batch.batch_size}", style="bold")
        for row in _batch_rows([one.batches[place] for one in columns], dense is not None):
            table.add_row(*row)
        if any(one.predicted and one.predicted[place] for one in group):
            table.add_row(*_prediction_row(columns, place))
    return table


def _whole(columns: Sequence[ModelSpeed]) -> Iterator[tuple[str, list[str]]]:
    """Rows of what holds at every batch size."""
    yield "dtype", [one.dtype for one in columns]
    yield "parameters", [_short(one.parameters) for one in columns]
    yield "bytes on disk", [_short(one.bytes) for one in columns]
    yield "FLOPs a token", [_short(one.flops) for one in columns]
    if any((one.zeros or 0) >= FEW for one in columns):
        yield "zeros", [f"{one.zeros:.0%}" if one.zeros is not None else "-" for one in columns]
    if any(one.density is not None for one in columns):
        yield "multiplied", [f"{one.density:.0%}" if one.density is not None else "all" for one in columns]


def _ratios(label: str, group: Sequence[ModelSpeed], dense: ModelSpeed | None) -> list[str]:
    of: dict[str, Callable[[ModelSpeed], float | None]] = {
        "parameters": lambda one: one.parameters,
        "bytes on disk": lambda one: one.bytes,
        "FLOPs a token": lambda one: one.flops,
    }
    if dense is None or label not in of:
        return []
    whole, own = of[label](dense), [of[label](one) for one in group]
    return [f"{value / whole:.2f}" if value and whole else "" for value in own]


def _batch_rows(columns: Sequence[BatchSpeed], has_dense: bool) -> Iterator[list[str]]:
    dense, models = columns[0], columns[1:] if has_dense else []
    prefills = [_times(prefill_ratio(one, dense)) for one in models]
    decodes = [_times(decode_ratio(one, dense)) for one in models]
    yield ["prefill tok/s", *(_rate(one.prefill) for one in columns), *prefills]
    yield ["first token ms", *(_milliseconds(one.first_token.median) for one in columns)]
    yield ["decode tok/s", *(_rate(one.decode) for one in columns), *decodes]
    yield ["ms a step", *(_milliseconds(one.step.median) for one in columns)]
    if any(one.memory is not None for one in columns):
        memories = [f"{one.memory / dense.memory:.2f}" if one.memory and dense.memory else "" for one in models]
        yield ["memory", *(_short(one.memory) for one in columns), *memories]


def _prediction_row(columns: Sequence[ModelSpeed], place: int) -> list[str]:
    """Milliseconds a step of decoding should take, and how far off that is; the dense model's is what it rests on."""
    cells = [""]
    for one in columns[1:]:
        predicted, measured = one.predicted[place], one.batches[place].step.median
        if predicted is None:
            cells.append("")
        else:
            cells.append(f"{_milliseconds(predicted.seconds)} {predicted.seconds / measured - 1:+.0%}")
    return ["predicted ms", *cells]


def _times(ratio: Ratio) -> str:
    return f"{'' if ratio.is_sure else '~'}{ratio.of_medians:.2f}"


def _rate(spread: Spread) -> str:
    share = f" ±{spread.share:.0%}" if spread.low < spread.high else ""  # of one round there is none
    return f"{spread.median:,.{0 if spread.median >= 100 else 1}f}{share}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.{1 if seconds >= 0.1 else 2}f}"


def _short(number: float | None) -> str:
    if number is None:
        return "-"
    return next((f"{number / size:.1f} {unit}" for size, unit in UNITS if number >= size), f"{number:.0f}")
