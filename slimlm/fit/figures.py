"""Figures of a run for the manifest, and what they warn of."""

import logging
import math
from collections.abc import Mapping

from slimlm.plain import Json

logger = logging.getLogger(__name__)


def by_kind(figures: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """Figures, named "<linear> <kind>", by kind; those of no kind are strengths of the ridge, null for an infinite one,
    which JSON has not."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in figures.items():
        name, _, kind = key.partition(" ")
        found.setdefault(kind or "ridge", {})[name] = value if math.isfinite(value) else None
    return found


def warn_of_starved(notes: Mapping[str, Json]) -> None:
    """Say that experts were treated by the size of their weights alone, if any were. notes: for the manifest."""
    starved = notes.get("starved_experts")
    if isinstance(starved, Mapping) and starved:
        logger.warning(
            "%d matrices of experts saw too few calibration tokens and were cut by magnitude: they are listed in "
            "slimlm.json under starved_experts; more --num-calibration-samples reach more of them",
            len(starved),
        )
