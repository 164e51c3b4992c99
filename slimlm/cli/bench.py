"""`slimlm bench`."""

from dataclasses import dataclass, fields

from slimlm.cli.options import FiguresFile, Verbosity, command
from slimlm.cli.running import ready_to_tell, require_there, running, tell
from slimlm.imports import importing
from slimlm.settings import BenchSettings


@dataclass(frozen=True)
class BenchOptions(BenchSettings, FiguresFile, Verbosity):
    """What is measured, and where the figures go."""


@command(BenchOptions)
def bench_command(options: BenchOptions) -> None:
    """Measure how fast models read a prompt and write on, in turns with the dense model.

    Where one is not faster, it says what may be why. A model pruned in tiles is run once more with kernels that leave
    its zeros out. The **predicted** time of decoding is made of times of its products' shapes.

    Examples:

        slimlm bench llama-slice-25 --against llama

        slimlm bench slice-20 slice-30 --against meta-llama/Llama-3.2-3B --batch-sizes 1,32 --json speed.json

        slimlm bench slice-q4.gguf --against dense-q4.gguf
    """
    require_there(*options.model, options.against)
    from slimlm.report.speed import speed_shown
    from slimlm.report.terminal import show

    ready_to_tell(options.json_path)
    settings = {field.name: getattr(options, field.name) for field in fields(BenchSettings)}
    with running(shown=options) as progress:
        with importing():
            from slimlm.evaluation.speed.bench import bench

        found = bench(**{**settings, "progress": progress})

    tell(found.describe(), options.json_path, lambda: show(speed_shown(found)))
