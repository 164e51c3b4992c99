"""Results that print as their command shows them, and in notebooks."""

from html import escape
from importlib import import_module


class Shown:
    """What `report/shown.py` knows to show. report/ stands above all that it shows, and is asked by name only when
    somebody looks."""

    def __str__(self) -> str:
        text: str = import_module("slimlm.report.shown").text_of(self)
        return text

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"
