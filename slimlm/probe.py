"""`python -m slimlm.probe [--trust-remote-code] RECIPE [WORK_DIR]`: what `--dry-run` runs on a model's first blocks.

The recipe lies in a directory of the probe's own, and so is the one where hidden states wait.

Standard input is a pipe that the dry run holds open; when it dies, even by `kill -9`, that ends, and so does the probe.
"""

import _thread
import os
import shutil
import sys
import threading
from pathlib import Path

from slimlm.compression import compress
from slimlm.errors import SlimlmError
from slimlm.recipe import load_recipe

ended = threading.Event()  # whether the dry run is over before the probe is


def end_with_parent() -> None:
    """Wait for the end of standard input, then have the main thread stop and take the probe's directories along."""
    while os.read(0, 1):
        pass
    ended.set()
    _thread.interrupt_main()


if __name__ == "__main__":
    trust = sys.argv[1] == "--trust-remote-code"
    recipe, *work_dir = map(Path, sys.argv[1 + trust :])
    try:
        threading.Thread(target=end_with_parent, daemon=True).start()
        chosen = load_recipe(str(recipe), {"trust_remote_code": True} if trust else None)
        compress(chosen, is_probe=True, work_dir=work_dir[0] if work_dir else None)
    except SlimlmError as error:
        sys.exit(str(error))
    finally:
        for place in (recipe.parent, *work_dir) if ended.is_set() else ():
            shutil.rmtree(place, ignore_errors=True)
