"""`python -m l2p_lowvram`."""

from .cli import entry

entry()
