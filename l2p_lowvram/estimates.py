"""What plans assume of machines that nobody measured, and of libraries that do not tell.

Rough, and the same on every run, so that plans are. None of it was measured on a card.
"""

from __future__ import annotations

# Of slow machines: on a faster one a block more than necessary stays, which costs nothing.
DISK_RATE, CACHED_RATE, LINK_RATE = 1.5e9, 5e9, 6e9
# Operations a second: of one CPU core, and of a fast card. On a slower one copies hide behind more computing than was
# thought, and memory is filled that could have stayed free.
CPU_FLOPS, CARD_FLOPS = 60e9, 200e12
# Of a prompt that nobody has tokenised yet.
PROMPT_TOKENS = 64
# The CUDA context of a card that is not at hand (`context` measures those that are), and what cuBLAS and cuDNN take
# from torch's allocator.
CONTEXT_BYTES = 512 << 20
WORKSPACE_BYTES = 128 << 20


def default_vram(free: int, context: int) -> int:
    """The budget where none is given. free: of a card, in bytes, the context's share being taken already."""
    return free // 20 * 19 + context
