"""Pictures from text with L2P, the Z-Image diffusion transformer that works on pixels, on small machines.

    from l2p_lowvram import L2PPipeline
    pipe = L2PPipeline.from_pretrained("demo")
    pipe("a large red circle on a blue background, left", seed=1).images[0].save("circle.png")

Names are imported on first use, so that `import l2p_lowvram` (and `--help`) does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ModelConfig, SamplingDefaults
    from .errors import NonFiniteError
    from .pipeline import L2PPipeline, PipelineOutput

__version__ = "0.1.0"

_HOMES = {
    "L2PPipeline": "pipeline",
    "ModelConfig": "config",
    "NonFiniteError": "errors",
    "PipelineOutput": "pipeline",
    "SamplingDefaults": "config",
}

__all__ = ["L2PPipeline", "ModelConfig", "NonFiniteError", "PipelineOutput", "SamplingDefaults", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
