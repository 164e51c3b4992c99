"""`python -m slimlm.probe RECIPE`: what `--dry-run` runs on the first blocks of a model."""

import sys

from slimlm.compression import compress
from slimlm.errors import SlimlmError
from slimlm.recipe import load_recipe

if __name__ == "__main__":
    try:
        compress(load_recipe(sys.argv[1]), is_probe=True)
    except SlimlmError as error:
        sys.exit(str(error))
