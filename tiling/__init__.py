"""Exact splits of tensor work into tiles; knows no file, no weight and no model.

A tile reads a little more than it keeps, so every kept value is computed from the same inputs as without
tiling; nothing is blended. So far this package only cuts one axis into spans; cutting attention, per-token
functions and convolutions along such spans builds on that.
"""

from tiling.spans import Span, spans

__all__ = ["Span", "spans"]
