"""Numbers that callers give, checked in one place: Python's or NumPy's, never bool, never text."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any


def whole_number(value: Any, what: str, least: int, most: int | None = None) -> int:
    """Raises ValueError, naming `what`, unless value is a whole number from `least` (to `most`)."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least or (most is not None and found > most):
        span = f"from {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{what} must be a whole number {span}, got {value!r}")
    return found


def number(value: Any, what: str) -> float:
    """Raises ValueError, naming `what`, unless value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r}")
    return float(value)
