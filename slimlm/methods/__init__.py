"""The compression methods, by the name `--method` takes. A new one is a file and a line here."""

from slimlm.errors import UserError, nearest
from slimlm.methods.plan import Method
from slimlm.methods.prune import MAGNITUDE, WANDA
from slimlm.methods.slice import ROTATE, SLICE

METHODS: dict[str, Method] = {"slice": SLICE, "rotate": ROTATE, "magnitude": MAGNITUDE, "wanda": WANDA}


def method_named(name: str) -> Method:
    """Raises UserError naming the known methods."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)} (known: {', '.join(METHODS)})")
    return METHODS[name]
