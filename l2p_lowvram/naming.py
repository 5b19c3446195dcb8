"""Tensor names: how files spell them, and the one spelling used inside.

Inside, a tensor has the name of the module attribute that holds it (`layers.0.attention.qkv.weight`):
ComfyUI's spelling without a prefix. Files also use the original's, in which q, k and v are three
tensors, and put one of five prefixes before either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# The longer ones first: `model.` also starts `model.diffusion_model.`.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.", "")

QKV = "attention.qkv"
QKV_PARTS = ("to_q", "to_k", "to_v")  # rows of the fused weight, in this order

SCALE, MARKER = "weight_scale", "comfy_quant"
SCALE_SPELLINGS = ("weight_scale", "scale_weight")
# Activation scales are made on the fly, and these say nothing about the weights.
IGNORED_SIDECARS = frozenset({"input_scale", "scale_input"})
IGNORED_ENTRIES = frozenset({"scaled_fp8", "scaled_int8", "int8_quantized", "int8_model_type"})

_QUIP = "a QuIP or SmoothQuant weight, stored in a transformed space that only its own loader undoes"
_BITSANDBYTES = "a bitsandbytes weight; export the model as safetensors with weight_scale tensors"
_PACKED = "a packed 4-bit weight"
# Sidecar tensors that tell a format which is refused.
_REFUSED_SIDECARS = (
    (re.compile(r"quip_|sign_|smooth_factor"), _QUIP),
    (re.compile(r"weight_(s_rel|s_channel|codebook|scale_2)$|qweight$|qzeros$"), _PACKED),
    (re.compile(r"_data$|_scale$"), "an optimum-quanto weight; convert it to weight and weight_scale"),
    (re.compile(r"SCB$|weight_format$|quant_map|absmax|quant_state"), _BITSANDBYTES),
)

_EMBEDDER = re.compile(r"all_x_embedder\.(\d{1,9})-1$")
# (inside, original) for modules that only differ in name.
_MODULES = (
    ("attention.out", "attention.to_out.0"),
    ("attention.q_norm", "attention.norm_q"),
    ("attention.k_norm", "attention.norm_k"),
)


@dataclass(frozen=True)
class TensorName:
    """A file's tensor in inside spelling.

    module: "" for a parameter of the root. leaf: "weight", "bias", a sidecar such as "weight_scale".
    part: which of q, k, v it is, when the file keeps them apart.
    """

    module: str
    leaf: str
    part: int | None = None

    @property
    def parameter(self) -> str:
        return f"{self.module}.{self.leaf}" if self.module else self.leaf


def find_prefix(names: Iterable[str]) -> str | None:
    """The prefix under which the transformer stands, or None where none is in sight."""
    starts = {prefix: (prefix + "x_embedder.", prefix + "all_x_embedder.") for prefix in PREFIXES}
    names = list(names)
    for prefix, signs in starts.items():
        if any(name.startswith(signs) for name in names):
            return prefix
    return None


def strip_any_prefix(name: str) -> str:
    return next(name[len(prefix) :] for prefix in PREFIXES if name.startswith(prefix))


def parse_name(name: str) -> TensorName:
    """A file's name, without prefix, in inside spelling. Names of neither scheme pass unchanged."""
    module, _, leaf = name.rpartition(".")
    if leaf in SCALE_SPELLINGS:
        leaf = SCALE
    if _EMBEDDER.match(module):
        return TensorName("x_embedder", leaf)
    for part, spelling in enumerate(QKV_PARTS):
        if module.endswith(f".attention.{spelling}"):
            return TensorName(module.removesuffix(f"attention.{spelling}") + QKV, leaf, part)
    for inside, original in _MODULES:
        if module.endswith(f".{original}"):
            return TensorName(module.removesuffix(original) + inside, leaf)
    if module.endswith(".adaLN_modulation.1"):
        return TensorName(module[:-1] + "0", leaf)
    return TensorName(module, leaf)


def is_original(name: str) -> bool | None:
    """Whether a name (without prefix) is the original's, ComfyUI's (False), or the same in both (None)."""
    module = name.rpartition(".")[0]
    parsed = parse_name(name)
    if parsed.part is not None or _EMBEDDER.match(module) or module.endswith(tuple(o for _, o in _MODULES)):
        return True
    comfyui = (QKV, "x_embedder", *(inside for inside, _ in _MODULES))
    return False if module.endswith(comfyui) else None


def embedder_patch(name: str) -> int | None:
    """The patch size that `all_x_embedder.P-1.weight` (without prefix) spells out."""
    match = _EMBEDDER.match(name.rpartition(".")[0])
    return int(match.group(1)) if match else None


def original_module(module: str, patch_size: int) -> str:
    """An inside module name in the original's spelling; a fused qkv keeps its name."""
    if module == "x_embedder":
        return f"all_x_embedder.{patch_size}-1"
    for inside, original in _MODULES:
        if module.endswith(f".{inside}"):
            return module.removesuffix(inside) + original
    return module


def refused_sidecar(name: str) -> str | None:
    """What the tensor's name says it belongs to, if that is a format that is refused."""
    leaf = name.rpartition(".")[2]
    return next((what for pattern, what in _REFUSED_SIDECARS if pattern.match(leaf)), None)


def foreign_model(names: Iterable[str]) -> str | None:
    """What the file is instead of an L2P transformer, as far as its names tell; None if it may be one."""
    names = list(names)
    if _any(r"lora_(A|B|down|up|unet)\b|lora_unet_", names):
        return "a LoRA, not a whole model; merge it into an L2P checkpoint first"
    if _any(r"(^|\.)dec_net\.", names):
        return "zimage_pixel, another pixel-space Z-Image with a dec_net decoder, not L2P"
    if _any(r"(^|\.)local_decoder\.", names):
        return None
    for pattern, what in _FOREIGN:
        if _any(pattern, names):
            return what
    return None


_FOREIGN = (
    (r"(^|\.)(double_blocks|single_transformer_blocks)\.", "FLUX, not L2P"),
    (r"(^|\.)(input_blocks|down_blocks)\.\d+\.", "Stable Diffusion (or its VAE), not L2P"),
    (r"(^|\.)(joint_blocks|transformer_blocks)\.", "another diffusion transformer, not L2P"),
    (r"(^|\.)embed_tokens\.weight$", "a text encoder, not a model; name it with --text-encoder"),
    (r"(^|\.)(decoder|encoder)\.(conv_in|up|down|mid)\b", "a VAE, not L2P, which needs none"),
    (r"(^|\.)(noise|context)_refiner\.", "latent Z-Image (or Lumina 2), not L2P: it has no local_decoder"),
)


def _any(pattern: str, names: list[str]) -> bool:
    search = re.compile(pattern).search
    return any(search(name) for name in names)
