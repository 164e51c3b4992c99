"""`python -m slimlm.probe RECIPE`: what `--dry-run` runs on the first blocks of a model, in a directory of its own.

Standard input is a pipe that the dry run holds open; when it dies, even by `kill -9`, that ends, and so does the probe.
"""

import os
import shutil
import sys
import threading
from pathlib import Path

from slimlm.compression import compress
from slimlm.errors import SlimlmError
from slimlm.recipe import load_recipe


def end_with_parent(scratch: Path) -> None:
    """Wait for the end of standard input, then take the probe's directory along."""
    while os.read(0, 1):
        pass
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, args=(Path(sys.argv[1]).parent,), daemon=True).start()
    try:
        compress(load_recipe(sys.argv[1]), is_probe=True)
    except SlimlmError as error:
        sys.exit(str(error))
