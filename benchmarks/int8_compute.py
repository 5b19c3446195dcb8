"""What the arithmetic of INT8 weights costs: `python benchmarks/int8_compute.py [--tokens 256 1024 4096] [--save]`.

One transformer block of the 1K model's size (width 3840, feed-forward 10240, 30 heads) with random weights, in float
weights of the activations' dtype, in dequantised INT8 weights, and in INT8 arithmetic by the kernel that
`--compute int8` takes here. Timed: the five linear layers, and the block as a step runs it, in slices. Ways are
measured in turns; of as many runs as fit in `--seconds` the best counts. A way of which one run would take
longer (bf16 on a CPU without it) is left out, and said to be.

oneDNN can be held to what older CPUs have: ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment is a CPU with VNNI
and without AMX.

With `--forward FILE` instead: one forward of a whole checkpoint, dequantised and in INT8, at 512 x 512 pixels with 64
caption tokens, and how far apart the two pictures are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from limited import as_command_line
from results import Figure, at_least, finish, parser
from torch import Tensor

from l2p_lowvram import L2PPipeline
from l2p_lowvram.choices import INT8
from l2p_lowvram.compute import Compute, LayerSize, choose_compute, has_vnni
from l2p_lowvram.families import PUBLISHED
from l2p_lowvram.int8_matmul import Int8Matmul, in_fp32
from l2p_lowvram.linear import Linear
from l2p_lowvram.model import TransformerBlock
from l2p_lowvram.quantization import Scheme
from l2p_lowvram.tilings import PictureWork, tilings

CONFIG = PUBLISHED["1k"]
# A CPU's first choice.
SLICES = next(tilings(CONFIG, PictureWork(1024, 1024, 1, False, 64, torch.bfloat16, on_cpu=True))).sizes
JUDGED_TOKENS = 1024
RUNS = 7
WHAT = ("five linear layers", "block")


@dataclass(frozen=True)
class Way:
    """dtype: of activations. int8_weights: or float ones of `dtype`. matmul: of INT8 arithmetic."""

    name: str
    dtype: torch.dtype
    int8_weights: bool
    matmul: Int8Matmul | None = None


def ways(int8: Compute) -> list[Way]:
    return [
        Way("fp32", torch.float32, False),
        Way("dequant, fp32", torch.float32, True),
        Way("int8, fp32", torch.float32, True, int8.matmul),
        Way("bf16", torch.bfloat16, False),
        Way("dequant, bf16", torch.bfloat16, True),
        Way("int8, bf16", torch.bfloat16, True, int8.matmul),
    ]


def make_block(way: Way) -> TransformerBlock:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        block = TransformerBlock(CONFIG, modulated=True)
    block = block.to_empty(device="cpu").to(way.dtype).requires_grad_(False)
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.02))
    for layer in linears(block) if way.int8_weights else ():
        weight = torch.randint(-127, 128, layer.weight.shape, dtype=torch.int8, generator=generator)
        layer.quantize_(weight, torch.full((layer.out_features, 1), 0.02 / 73))
    block.use_int8(way.matmul)
    return block


def linears(block: TransformerBlock) -> list[Linear]:
    attention, feed_forward = block.attention, block.feed_forward
    return [attention.qkv, attention.out, feed_forward.w1, feed_forward.w3, feed_forward.w2]


def jobs(block: TransformerBlock, way: Way, tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The five linear layers, and the whole block, on `tokens`."""
    x = torch.randn(1, tokens, CONFIG.dim).to(way.dtype)
    hidden = torch.randn(1, tokens, CONFIG.ffn_dim).to(way.dtype)
    rope = torch.polar(torch.ones(tokens, CONFIG.head_dim // 2), torch.rand(tokens, CONFIG.head_dim // 2))
    embedding = torch.randn(1, CONFIG.timestep_dim).to(way.dtype)

    def multiply() -> None:
        attention, feed_forward = block.attention, block.feed_forward
        for rows in qkv_rows():
            projections = attention.qkv.rows(rows, way.dtype, tokens)
            for part in x.split(SLICES.tokens, 1):
                read = attention.qkv.read(part)
                for project in projections:
                    project(read)
        for part, wide in zip(x.split(SLICES.tokens, 1), hidden.split(SLICES.tokens, 1), strict=True):
            attention.out(part)
            read = feed_forward.w1.read(part)  # for two layers, as in the block
            feed_forward.w1(read)
            feed_forward.w3(read)
            feed_forward.w2(wide)

    return multiply, lambda: block.update_(x, rope, embedding, SLICES.slices())


def qkv_rows() -> list[list[slice]]:
    """Of the fused projection, for each group of heads in turn: rows of q, of k and of v."""
    group = SLICES.heads * CONFIG.head_dim
    starts = range(0, CONFIG.dim, group)
    return [
        [slice(part * CONFIG.dim + at, part * CONFIG.dim + min(at + group, CONFIG.dim)) for part in range(3)]
        for at in starts
    ]


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(tokens: Sequence[int], chosen: Sequence[Way], limit: float) -> dict[tuple[str, str, int], float]:
    """Seconds by what, way and tokens; absent where one run would take longer than `limit`."""
    found: dict[tuple[str, str, int], float] = {}
    blocks, rates = {way.name: make_block(way) for way in chosen}, dict.fromkeys((way.name for way in chosen), 0.0)
    for count in sorted(tokens):
        quick = [way for way in chosen if rates[way.name] * count <= limit]
        works = {way.name: jobs(blocks[way.name], way, count) for way in quick}
        for index, what in enumerate(WHAT):
            spent = alternated({name: work[index] for name, work in works.items()}, limit)
            for name, seconds in spent.items():
                found[what, name, count] = min(seconds)
                rates[name] = max(rates[name], min(seconds) / count)
    return found


def alternated(works: dict[str, Callable[[], object]], limit: float) -> dict[str, list[float]]:
    """Seconds of up to RUNS runs each, as many as fit in `limit` but at least one, in turns, so that a disturbance
    meets all."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(RUNS):
        for name, work in works.items():
            if not spent[name] or sum(spent[name]) + spent[name][-1] < limit:
                spent[name].append(seconds_of(work))
    return spent


def figures(found: dict[tuple[str, str, int], float], tokens: Sequence[int], int8: Compute) -> list[Figure]:
    result = [Figure("INT8 arithmetic", int8.told())]
    for count in tokens:
        for what in WHAT:
            result += [
                Figure(f"{what}, {count} tokens, {way}", seconds, "s")
                for (other, way, at), seconds in found.items()
                if (other, at) == (what, count)
            ]
            result += [ratio for ratio in ratios(found, what, count) if ratio is not None]
    return result


def ratios(found: dict[tuple[str, str, int], float], what: str, count: int) -> list[Figure | None]:
    def ratio(way: str, to: str, target: float | None) -> Figure | None:
        if (what, way, count) not in found or (what, to, count) not in found:
            return None
        value, name = found[what, to, count] / found[what, way, count], f"{what}, {count} tokens, {way} / {to}, speed"
        return Figure(name, value) if target is None else at_least(name, value, target)

    # Targets of INT8 are for CPUs that multiply int8 in vectors.
    judged = has_vnni() and count >= JUDGED_TOKENS
    wanted = (1.5 if what == WHAT[0] else 1.3) if judged else None
    return [
        ratio("dequant, fp32", "fp32", 0.9),
        ratio("int8, fp32", "dequant, fp32", None),
        ratio("dequant, bf16", "bf16", 0.9),
        ratio("int8, bf16", "bf16", wanted),
    ]


def errors() -> list[Figure]:
    """Relative L2 errors of one layer against float64, of bf16 activations without and with outliers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, CONFIG.dim, generator=generator) * 0.02
    layer = Linear(CONFIG.dim, 256, bias=False)
    layer.quantize_(*Scheme.parse("row").quantize(weight))
    plain = torch.randn(64, CONFIG.dim, generator=generator)
    outliers = torch.where(torch.arange(CONFIG.dim) % 37 == 0, 30.0, 1.0)
    result = []
    for name, rows in (("normal activations", plain), ("every 37th column x 30", plain * outliers)):
        x = rows.bfloat16()
        exact = x.double() @ layer.dequantized().double().T
        for way, matmul in (("dequant, bf16", None), ("int8, bf16", in_fp32)):
            layer.int8_matmul = matmul
            error = float((layer(x).double() - exact).norm() / exact.norm())
            result.append(Figure(f"error of one layer, {name}, {way}", error))
    return result


def forward(path: str) -> list[Figure]:
    """One forward of a file, without guidance, both ways."""
    features = torch.randn(64, CONFIG.caption_dim, generator=torch.Generator().manual_seed(1))
    pictures: dict[str, Tensor] = {}
    result = []
    for name in ("dequant", INT8):
        with L2PPipeline.from_pretrained(path, compute=name) as pipe:
            settings = {"width": 512, "height": 512, "num_inference_steps": 1, "cfg_scale": 1.0, "seed": 1}

            def draw(pipe: L2PPipeline = pipe, settings: dict = settings) -> Tensor:
                return pipe(prompt_embeds=features, **settings, output_type="pt").images

            started = time.perf_counter()
            pictures[name] = draw()
            result.append(Figure(f"one forward, 512x512, {pipe.compute.told()}", time.perf_counter() - started, "s"))
    error = (pictures[INT8] - pictures["dequant"]).norm() / pictures["dequant"].norm()
    return [*result, Figure("int8 against dequant, relative L2 of the picture", float(error))]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    options.add_argument("--seconds", type=float, default=20.0, help="the longest that one way may take for one figure")
    options.add_argument("--dtype", choices=("fp32", "bf16"), help="only ways with these activations")
    options.add_argument("--forward", metavar="FILE", help="a whole forward of this checkpoint instead")
    arguments = options.parse_args()
    if arguments.forward is not None:
        finish("int8_forward", forward(arguments.forward), arguments)
        return
    size = LayerSize(CONFIG.dim, CONFIG.ffn_dim)
    int8 = choose_compute(INT8, torch.device("cpu"), torch.float32, size)
    chosen = [way for way in ways(int8) if arguments.dtype in (None, way.name[-4:])]
    found = measure(arguments.tokens, chosen, arguments.seconds)
    missing = [
        f"{way.name} at {count}"
        for way in chosen
        for count in arguments.tokens
        if (WHAT[1], way.name, count) not in found
    ]
    shown = [*errors(), *figures(found, arguments.tokens, int8)]
    if missing:
        shown.append(Figure(f"left out, one run takes over {arguments.seconds:g} s", ", ".join(missing)))
    limits = [arguments.dtype, os.environ.get("ONEDNN_MAX_CPU_ISA", "").lower()]
    finish("_".join(["int8_compute", *filter(None, limits)]), shown, arguments)


if __name__ == "__main__":
    as_command_line()
    with torch.inference_mode():
        main()
