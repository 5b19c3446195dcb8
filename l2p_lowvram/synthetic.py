"""Seeded stand-ins for real checkpoints: right names, shapes, dtypes and magnitudes, random values.

    python -m l2p_lowvram.synthetic OUT.safetensors                  the published 1K INT8 file, 7.19 GB
    python -m l2p_lowvram.synthetic OUT.safetensors --original       the 1K original, 19.57 GB
    python -m l2p_lowvram.synthetic OUT.safetensors --family 4k --layers 4 --dim 512
    python -m l2p_lowvram.synthetic OUT.safetensors --mini           under a megabyte

The values come from one small random tile, read from another place for every tensor, so that a file is
made as fast as it is written. A forward through such a model stays finite.
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from tqdm import tqdm

from offload import format_bytes

from .config import DEFAULT_ROPE_AXES, DecoderConfig, DecoderLevel, ModelConfig
from .export import (
    DEFAULT_TARGETS,
    ORIGINAL,
    LayoutStyle,
    LazyTensor,
    QuantizedWeight,
    is_target,
    model_entries,
    save_model,
)
from .families import PUBLISHED, with_family_defaults
from .model import L2PTransformer
from .naming import PREFIXES
from .quantization import Scheme

# A prime, so that the tile meets the rows of a weight at another column each time round.
_TILE_ELEMENTS = 4_194_301
_UNIFORM_INT8_STD = 127 / math.sqrt(3)


def mini_config(
    patch_size: int = 16,
    *,
    dim: int = 64,
    n_heads: int = 2,
    rope_axes: tuple[int, int, int] | None = None,
    n_layers: int = 2,
    n_noise_refiner: int = 1,
    n_context_refiner: int = 1,
    caption_dim: int = 48,
    ffn_dim: int | None = None,
    timestep_hidden: int = 64,
) -> ModelConfig:
    """A small model of a published family: its decoder with an eighth of the channels, the rest as named."""
    published = next(config for config in PUBLISHED.values() if config.patch_size == patch_size)
    levels = tuple(
        DecoderLevel(level.name, _eighth(level.encoder), _eighth(level.up), _eighth(level.out))
        for level in published.decoder.levels
    )
    return with_family_defaults(
        replace(
            published,
            dim=dim,
            n_heads=n_heads,
            n_layers=n_layers,
            n_noise_refiner=n_noise_refiner,
            n_context_refiner=n_context_refiner,
            ffn_dim=ffn_dim or 8 * dim // 3,
            caption_dim=caption_dim,
            timestep_hidden=timestep_hidden,
            rope_axes=rope_axes or split_axes(dim // n_heads),
            decoder=DecoderConfig(levels, _eighth(published.decoder.bottleneck)),
        )
    )


def split_axes(head_dim: int) -> tuple[int, int, int]:
    """RoPE axes for a head width nobody has published: about a quarter for the sequence, the rest halved."""
    if head_dim in DEFAULT_ROPE_AXES:
        return DEFAULT_ROPE_AXES[head_dim]
    if head_dim < 6 or head_dim % 2:
        raise ValueError(f"head width must be even and at least 6, got {head_dim}")
    image = max(head_dim * 3 // 8 // 2, 1) * 2
    return head_dim - 2 * image, image, image


def random_state_dict(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """A random fp32 model as `L2PTransformer.state_dict()` gives it."""
    tile = RandomTile(seed, elements=65_521)
    shapes = parameter_shapes(config)
    return {name: tile.floats(name, shape, torch.float32) for name, shape in shapes.items()}


def synthetic_state(
    config: ModelConfig,
    *,
    scheme: str | None = "row",
    targets: Sequence[str] = DEFAULT_TARGETS,
    keep_f32: bool = True,
    seed: int = 0,
) -> dict[str, LazyTensor | QuantizedWeight]:
    """A random model as the published files store it: `targets` quantised, the rest BF16.

    With keep_f32 the middle two thirds of the layers are F32 where they are not quantised, as in the
    original. scheme None quantises nothing.
    """
    tile = RandomTile(seed)
    parsed = Scheme.parse(scheme) if scheme else None
    state: dict[str, LazyTensor | QuantizedWeight] = {}
    for name, shape in parameter_shapes(config).items():
        dtype = torch.float32 if keep_f32 and _is_middle_layer(name, config.n_layers) else torch.bfloat16
        if parsed is not None and is_target(name, targets):
            state[name] = _quantized(name, shape, parsed, tile)
        else:
            state[name] = LazyTensor(dtype, shape, _floats(tile, name, shape, dtype))
    return state


@lru_cache(maxsize=8)
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = L2PTransformer(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class RandomTile:
    """Random numbers of which every tensor takes a run, from a place its name and the seed choose."""

    seed: int
    elements: int = _TILE_ELEMENTS

    @cached_property
    def _uniform(self) -> Tensor:
        """fp32, mean 0, standard deviation 1."""
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.rand(self.elements, generator=generator) * 2 - 1) * math.sqrt(3)

    @cached_property
    def _scaled(self) -> Callable[[float, float, torch.dtype], Tensor]:
        """Cached: a 40-million-element weight costs a copy, not arithmetic."""
        return lru_cache(maxsize=8)(lambda mean, std, dtype: (self._uniform * std + mean).to(dtype))

    def int8(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform from -127 to 127."""
        return self._fill(self._scaled(0.0, _UNIFORM_INT8_STD, torch.int8), name, shape)

    def floats(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        mean, std = _magnitude(name, shape)
        return self._fill(self._scaled(mean, std, dtype), name, shape)

    def scales(self, name: str, shape: tuple[int, ...], columns: int) -> Tensor:
        """fp32 scales that give a weight with `columns` inputs a standard deviation of 1/sqrt(columns)."""
        typical = 1 / math.sqrt(columns) / _UNIFORM_INT8_STD
        return self._fill(self._scaled(typical, typical / 20, torch.float32), name, shape)

    def _fill(self, tile: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
        result = torch.empty(math.prod(shape), dtype=tile.dtype)
        start = zlib.crc32(f"{self.seed} {name}".encode()) % self.elements
        done = 0
        while done < result.numel():
            count = min(self.elements - start, result.numel() - done)
            result[done : done + count] = tile[start : start + count]
            done, start = done + count, 0
        return result.reshape(shape)


def _magnitude(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a float parameter."""
    if "norm" in name or name == "cap_embedder.0.weight":
        return 1.0, 0.1
    if len(shape) < 2 or "pad_token" in name:
        return 0.0, 0.02
    if "adaLN" in name or name.startswith("t_embedder"):
        return 0.0, 0.3 / math.sqrt(shape[1])
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))


def _floats(tile: RandomTile, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: tile.floats(name, shape, dtype)


def _quantized(name: str, shape: tuple[int, ...], scheme: Scheme, tile: RandomTile) -> QuantizedWeight:
    rows, columns = shape
    if scheme.float8:
        raise ValueError("synthetic weights are INT8 or floats, not FP8")
    scheme = scheme.fitting(columns)
    block = scheme.block
    if block and (rows % block or columns % block):
        raise ValueError(f"{name} of shape {list(shape)} has no whole number of blocks of {block}")
    grid: tuple[int, ...] = () if block is None else (rows // block, columns // block) if block else (rows, 1)
    return QuantizedWeight(
        LazyTensor(torch.int8, (rows, columns), lambda: tile.int8(name, shape)),
        LazyTensor(torch.float32, grid, lambda: tile.scales(name, grid, columns)),
        scheme.rotation,
    )


def _is_middle_layer(name: str, n_layers: int) -> bool:
    head, _, tail = name.partition(".")
    edge = n_layers // 6
    return head == "layers" and edge <= int(tail.partition(".")[0]) < n_layers - edge


def _eighth(channels: int) -> int:
    return max(channels // 8, min(channels, 3))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m l2p_lowvram.synthetic",
        description="Write a checkpoint with random weights, for tests and benchmarks. "
        "Without options: the published 1K INT8 file, 777 tensors, 7,187,907,602 bytes.",
    )
    result.add_argument("out", help="the safetensors file to write")
    result.add_argument(
        "--family", choices=PUBLISHED, default="1k", help="patch size, decoder, dimensions (default 1k)"
    )
    result.add_argument("--mini", action="store_true", help="start from a tiny model of the family")
    result.add_argument("--layers", type=int, metavar="N", help="blocks of the main stack")
    result.add_argument("--refiners", type=int, metavar="N", help="blocks of each refiner")
    result.add_argument("--dim", type=int, metavar="N", help="token width")
    result.add_argument("--heads", type=int, metavar="N", help="attention heads (default: of the same width)")
    result.add_argument("--ffn-dim", type=int, metavar="N", help="feed-forward width")
    result.add_argument("--caption-dim", type=int, metavar="N", help="width of the text features")
    result.add_argument("--scheme", default="row", help="row, tensor, block128, convrot256, ... or none (default row)")
    result.add_argument("--all-blocks", action="store_true", help="quantise the refiners as well")
    result.add_argument("--bf16", action="store_true", help="no F32 tensors in the middle layers")
    result.add_argument(
        "--original", action="store_true", help="names and dtypes of the original; implies --scheme none"
    )
    result.add_argument("--prefix", choices=PREFIXES, help="before every tensor name")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--overwrite", action="store_true")
    return result


def config_from(args: argparse.Namespace) -> ModelConfig:
    """The family's model with the sizes that were named; raises ValueError for sizes that do not fit."""
    config = PUBLISHED[args.family]
    if args.mini:
        config = mini_config(config.patch_size)
    dim = args.dim or config.dim
    heads = args.heads or max(dim // config.head_dim, 1)
    if dim % heads:
        raise ValueError(f"--dim {dim} is no multiple of --heads {heads}")
    refiners = config.n_noise_refiner if args.refiners is None else args.refiners
    return replace(
        config,
        dim=dim,
        n_heads=heads,
        n_layers=args.layers or config.n_layers,
        n_noise_refiner=refiners,
        n_context_refiner=refiners,
        ffn_dim=args.ffn_dim or 8 * dim // 3,
        caption_dim=args.caption_dim or config.caption_dim,
        rope_axes=split_axes(dim // heads),
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser()
    args = arguments.parse_args(argv)
    style = ORIGINAL if args.original else LayoutStyle()
    style = style if args.prefix is None else replace(style, prefix=args.prefix)
    targets = tuple(f"*{target.removeprefix('layers.')}" for target in DEFAULT_TARGETS)
    try:
        config = config_from(args)
        state = synthetic_state(
            config,
            scheme=None if args.original or args.scheme == "none" else args.scheme,
            targets=targets if args.all_blocks else DEFAULT_TARGETS,
            keep_f32=not args.bf16,
            seed=args.seed,
        )
        entries, _ = model_entries(state, style, config.patch_size)
        total = sum(entry.nbytes for entry in entries)
        with tqdm(total=total, unit="B", unit_scale=True, desc=args.out) as bar:
            nbytes = save_model(args.out, state, config, style=style, overwrite=args.overwrite, progress=bar.update)
    except (ValueError, OSError) as error:
        arguments.exit(1, f"error: {error}\n")
    print(f"{args.out}: {len(entries)} tensors, {nbytes} bytes ({format_bytes(nbytes)})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
