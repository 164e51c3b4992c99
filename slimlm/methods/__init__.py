"""The compression methods, by the name `--method` takes. A new one is a file and a line here."""

from typing import Any

from slimlm.errors import UserError, nearest
from slimlm.methods.magnitude import MAGNITUDE
from slimlm.methods.mfac import MFAC
from slimlm.methods.obc import OBC
from slimlm.methods.plan import Method
from slimlm.methods.slice import ROTATE, SLICE
from slimlm.methods.slimlm import SLIMLM
from slimlm.methods.sparsegpt import SPARSEGPT
from slimlm.methods.wanda import WANDA
from slimlm.methods.woodfisher import WOODFISHER

METHODS: dict[str, Method[Any]] = {
    "slice": SLICE,
    "rotate": ROTATE,
    "slimlm": SLIMLM,
    "sparsegpt": SPARSEGPT,
    "obc": OBC,
    "mfac": MFAC,
    "woodfisher": WOODFISHER,
    "wanda": WANDA,
    "magnitude": MAGNITUDE,
}


def method_named(name: str) -> Method[Any]:
    """Raises UserError naming the known methods."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)} (known: {', '.join(METHODS)})")
    return METHODS[name]
