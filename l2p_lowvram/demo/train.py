"""Train the demo model: `python -m l2p_lowvram.demo.train RUN_DIR`.

Three parts, each from the project's own modules: a byte-level BPE tokenizer, a
Qwen3-shaped text encoder that learns what a prompt says, and a miniature L2P
that learns to paint it by flow matching. Step n depends on the seed and n
alone, so an interrupted run continues as if it had never stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..config import IMAGE_CHANNELS, DecoderConfig, DecoderLevel, ModelConfig, SamplingDefaults, TextEncoderConfig
from ..decoder import LocalDecoder
from ..linear import Linear
from ..model import L2PTransformer
from ..sampling import add_noise, model_time
from ..text import PromptTokenizer, TextEncoder
from ..tokenizer_file import read_tokenizer
from .muon import Muon
from .scenes import CLASSES, Scene, colours, covers, draw_scenes, paint, phrase

STATE_FILE, ENCODER_FILE, TOKENIZER_FILE = "state.safetensors", "encoder.safetensors", "tokenizer.json"
# Prefixes in the state file: averaged weights, training's own layer, what the optimisers remember.
AVERAGE, SKETCH, OPTIMISER = "average.", "sketch.", "optimiser."

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 512
TEMPLATE_TAIL = 5  # tokens after the prompt: they have read all of it

ENCODER = TextEncoderConfig(
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=320,
    vocab_size=VOCABULARY,
)
MODEL = ModelConfig(
    patch_size=16,
    dim=128,
    n_heads=4,
    n_layers=6,
    n_noise_refiner=1,
    n_context_refiner=1,
    ffn_dim=384,
    caption_dim=ENCODER.hidden_size,
    timestep_hidden=256,
    rope_axes=(8, 12, 12),
    decoder=DecoderConfig(
        levels=(
            DecoderLevel("1", 16, 16, 24),
            DecoderLevel("2", 32, 32, 24),
            DecoderLevel("3", 64, 64, 32),
            DecoderLevel("4", 128, 128, 64),
        ),
        bottleneck=128,
    ),
    defaults=SamplingDefaults(width=128, height=128, steps=20, cfg_scale=2.0, shift=3.0),
)


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one setting.

    sizes: (width, height, batch) choices, one drawn a step. rate: Muon's learning rate for the
    transformer at the start and end of the stage (linear in between); Adam's, for what is no inner
    matrix, is half of it. decoder_rate: Adam's for the decoder. A part whose rate is 0 rests; without
    the decoder the transformer learns through its sketch alone. high, low: shares of the noise levels
    that are near pure noise and near none. jitter: `scenes.JITTER` for the stage. window: side in
    pixels of the part of each picture that the decoder paints. restart: begin with a new decoder, which
    reads what the sketch layer has learnt to read, and with the transformer's average.
    """

    steps: int
    sizes: tuple[tuple[int, int, int], ...]
    rate: tuple[float, float] = (0.0, 0.0)
    decoder_rate: tuple[float, float] = (0.0, 0.0)
    high: float = 0.5
    low: float = 0.0
    jitter: float = 0.015
    window: int = 64
    restart: bool = False


_NATIVE, _LARGE = (128, 128, 32), (256, 256, 8)
_MIXED = (*[_NATIVE] * 4, *[_LARGE] * 2, (192, 128, 24), (128, 192, 24), (192, 192, 16))
# First what the words mean, without the decoder at half the price; then the painting, most of it by a
# decoder that learns alone, at half the price again; last both together. The shipped weights took this way
# but for the third stage: its decoder was narrower and Muon's, and nothing of it is left after the restart.
RECIPE = (
    Stage(200, (_NATIVE,), (4e-3, 4e-3), high=1.0),
    Stage(600, _MIXED, (4e-3, 4e-3), high=1.0),
    Stage(1000, _MIXED, (4e-3, 4e-3), (2e-3, 2e-3)),
    Stage(1600, _MIXED, decoder_rate=(2e-3, 2e-3), high=0.4, restart=True),
    Stage(100, _MIXED, (1.5e-3, 1.393571e-3), (2e-3, 1.857857e-3), high=0.3),
    Stage(150, _MIXED, (1.5e-3, 1.2765e-3), (2e-3, 1.7015e-3), high=0.3, low=0.3, jitter=0.005),
    Stage(200, _MIXED, (1.2765e-3, 8.86808e-4), (1.7015e-3, 1.181038e-3), high=0.3, low=0.3, jitter=0.005),
    Stage(300, _MIXED, (8.86808e-4, 1e-5), (1.181038e-3, 1e-5), high=0.3, low=0.3, jitter=0.005),
)
WARMUP = 50
# A linear layer reads the picture's plan from the transformer's own tokens, in training only: per patch the
# figure's cover in CELLS x CELLS cells, and both colours. What a prompt means so reaches the transformer
# directly, not just through nine convolutions that remove noise.
CELLS = 8
COVER_SHARE, COLOUR_SHARE = 4.0, 1.0  # of these in the loss, beside the velocity's 1
DROPPED_PROMPTS = 0.06  # trained without a prompt, for guidance
AVERAGE_DECAY = 0.99
LOWEST_SIGMA = 0.06  # the sampler takes its last step from above this


def train_tokenizer(path: Path, seed: int) -> None:
    """Write a byte-level BPE `tokenizer.json` whose merges come from the demo's own phrases."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [phrase(scene, rng) for scene in draw_scenes(rng, 20000)]
    tokenizer.train_from_iterator(texts + ["user\n", "\nassistant\n"] * 2000, trainer)
    tokenizer.save(str(path))


class Reader(nn.Module):
    """Classifiers over the encoder's features, used only to train the encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Linear(width, count) for count in CLASSES)

    def forward(self, features: Tensor) -> list[Tensor]:
        return [head(F.rms_norm(features, features.shape[-1:])) for head in self.heads]


def batches_of_ids(
    tokenizer: PromptTokenizer, scenes: list[Scene], rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, labels) grouped by length, as the encoder takes no padding."""
    groups: dict[int, list[tuple[list[int], tuple[int, ...]]]] = {}
    for scene in scenes:
        ids = tokenizer(phrase(scene, rng))
        groups.setdefault(len(ids), []).append((ids, scene.labels()))
    for group in groups.values():
        yield torch.tensor([ids for ids, _ in group]), torch.tensor([labels for _, labels in group])


def train_encoder(tokenizer: PromptTokenizer, seed: int, steps: int = 700, batch: int = 128) -> TextEncoder:
    """An encoder whose last template tokens all know shape, colours, size and position."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    encoder, reader = TextEncoder(ENCODER), Reader(ENCODER.hidden_size)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="text encoder", unit="step")
    for _ in bar:
        right = total = 0
        optimiser.zero_grad()
        for ids, labels in batches_of_ids(tokenizer, draw_scenes(rng, batch), rng):
            tail = encoder(ids)[:, -TEMPLATE_TAIL:]
            logits = reader(tail)
            losses = [
                F.cross_entropy(out.flatten(0, 1), labels[:, k].repeat_interleave(TEMPLATE_TAIL), reduction="sum")
                for k, out in enumerate(logits)
            ]
            (torch.stack(losses).sum() / (batch * TEMPLATE_TAIL)).backward()
            right += sum(int((out[:, -1].argmax(-1) == labels[:, k]).sum()) for k, out in enumerate(logits))
            total += labels.numel()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(accuracy=f"{right / total:.3f}")
    return encoder.eval().requires_grad_(False)


class Features:
    """Prompt features by text; the encoder is frozen, so each wording is encoded once."""

    def __init__(self, tokenizer: PromptTokenizer, encoder: TextEncoder, limit: int = 100_000) -> None:
        self._tokenizer, self._encoder, self._limit = tokenizer, encoder, limit
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> list[Tensor]:
        """One (tokens, width) tensor a prompt."""
        if len(self._known) > self._limit:
            self._known.clear()
        groups: dict[int, dict[str, list[int]]] = {}
        for prompt in prompts:
            if prompt not in self._known:
                ids = self._tokenizer(prompt)
                groups.setdefault(len(ids), {})[prompt] = ids
        for group in groups.values():  # one length at a time, as the encoder takes no padding
            features = self._encoder(torch.tensor(list(group.values())))
            self._known.update(zip(group, features, strict=True))
        return [self._known[prompt] for prompt in prompts]


def draw_sigmas(count: int, generator: torch.Generator, high: float, low: float = 0.0) -> Tensor:
    """Noise levels (count,): shares `high` near pure noise and `low` near none, the others uniform.

    Only near pure noise does the prompt decide anything: a background fills so many pixels that its
    colour shows through the noise from sigma 0.97 down, and a shape's place and colour from about 0.9.
    """
    near_noise, near_none = round(high * count), round(low * count)
    starts = [(0.85, 0.97)[k % 2] for k in range(near_noise)] + [LOWEST_SIGMA] * (count - near_noise)
    ends = [1.0] * (count - near_none) + [0.35] * near_none
    start, end = torch.tensor(starts), torch.tensor(ends)
    return start + (end - start) * torch.rand(count, generator=generator)


@dataclass(frozen=True)
class Example:
    """A batch: prompts and what is to be painted. cover (B, 1, H, W), the rest (B, 3, H, W)."""

    prompts: list[str]
    scenes: list[Scene]
    cover: Tensor
    pictures: Tensor
    noise: Tensor


def draw_example(stage: Stage, rng: random.Random, generator: torch.Generator) -> Example:
    width, height, batch = rng.choice(stage.sizes)
    scenes = draw_scenes(rng, batch)
    prompts = ["" if rng.random() < DROPPED_PROMPTS else phrase(scene, rng) for scene in scenes]
    cover = covers(scenes, width, height, generator, stage.jitter)
    pictures = paint(scenes, cover)
    return Example(prompts, scenes, cover, pictures, torch.randn(pictures.shape, generator=generator))


def training_loss(run: Run, features: Features, stage: Stage, step: int) -> Tensor:
    """Error of the sketch, of the velocity within a window, or of both, on one fresh batch.

    A function of the weights, the run's seed and the step alone.
    """
    rng = random.Random(f"{run.seed}/{step}")
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    example = draw_example(stage, rng, generator)
    sigma = draw_sigmas(len(example.scenes), generator, stage.high, stage.low)
    pixels = add_noise(example.pictures, example.noise, sigma[:, None, None, None])

    learns = any(stage.rate)
    with torch.set_grad_enabled(learns):
        tokens = final_tokens(run.model, pixels, sigma, features(example.prompts))
    losses = []
    if learns:
        losses.append(sketch_loss(run.sketch(tokens.permute(0, 2, 3, 1)), example))
    if any(stage.decoder_rate):
        places = draw_windows(example.cover, stage.window // MODEL.patch_size, rng)
        losses.append(velocity_loss(run.model, pixels, tokens, example, places, stage.window))
    return torch.stack(losses).sum()


def final_tokens(model: L2PTransformer, pixels: Tensor, sigma: Tensor, features: list[Tensor]) -> Tensor:
    """The picture's tokens after the last block, (B, D, h, w)."""
    state = model.prelude(pixels, model_time(sigma), model.encode_caption(features))
    for block in model.blocks():
        state = block.visit(state)
    return model.feature_map(state, pixels)


def velocity_loss(
    model: L2PTransformer,
    pixels: Tensor,
    tokens: Tensor,
    example: Example,
    places: list[tuple[int, int]],
    window: int,
) -> Tensor:
    """Squared error of what the decoder makes of each picture's window."""
    patch = MODEL.patch_size
    patches = window // patch
    view = cut(pixels, places, patches, patch).contiguous(memory_format=torch.channels_last)
    velocity = -model.local_decoder(view, cut(tokens, places, patches, 1))
    wanted = cut(example.noise - example.pictures, places, patches, patch)
    weight = figure_weight(cut(example.cover, places, patches, patch))
    return ((velocity - wanted).square() * weight).mean()


def sketch_loss(sketch: Tensor, example: Example) -> Tensor:
    """sketch (B, h, w, CELLS^2 + 6), per patch: logits of the cover's cells, the figure's and the background's RGB."""
    cells = F.pixel_unshuffle(F.avg_pool2d(example.cover, MODEL.patch_size // CELLS), CELLS).permute(0, 2, 3, 1)
    wanted = colours(example.scenes).flatten(1)[:, None, None]
    cover_loss = F.binary_cross_entropy_with_logits(sketch[..., : CELLS**2], cells)
    colour_loss = (sketch[..., CELLS**2 :] - wanted).square().mean()
    return COVER_SHARE * cover_loss + COLOUR_SHARE * colour_loss


def draw_windows(cover: Tensor, patches: int, rng: random.Random) -> list[tuple[int, int]]:
    """Top left corner of a window of `patches` patches a side per picture, in patches.

    Every second one is centred on some pixel of the figure, the others lie anywhere.
    """
    rows, columns = (side // MODEL.patch_size - patches for side in cover.shape[-2:])
    places = []
    for index, picture in enumerate(cover[:, 0]):
        row, column = rng.randint(0, rows), rng.randint(0, columns)
        if index % 2:
            inside = (picture > 0.5).nonzero()
            y, x = (inside[rng.randrange(len(inside))] / MODEL.patch_size - patches / 2).round().int().tolist()
            row, column = min(max(y, 0), rows), min(max(x, 0), columns)
        places.append((row, column))
    return places


def cut(maps: Tensor, places: list[tuple[int, int]], patches: int, unit: int) -> Tensor:
    """The windows at `places` of maps (B, C, H, W) whose patches are `unit` pixels wide: (B, C, side, side)."""
    side = patches * unit
    return torch.stack(
        [
            item[:, row * unit : row * unit + side, column * unit : column * unit + side]
            for item, (row, column) in zip(maps, places, strict=True)
        ]
    )


def figure_weight(cover: Tensor, extra: float = 2.0, rim: int = 5) -> Tensor:
    """(B, 1, H, W), mean 1: the figure and its outline count more than the plain background."""
    weight = 1 + extra * F.max_pool2d((cover > 0).float(), rim, stride=1, padding=rim // 2)
    return weight / weight.mean()


@dataclass(frozen=True)
class Place:
    """Where in the recipe a step is. first: it is its stage's first; the rates are those of this step."""

    stage: Stage
    first: bool
    rate: float
    decoder_rate: float


def locate(step: int, recipe: tuple[Stage, ...]) -> Place:
    start = 0
    for stage in recipe:
        within = step - start
        if within < stage.steps:
            warm = min(1.0, (within + 1) / WARMUP) if step < WARMUP or stage.restart else 1.0
            rate, decoder_rate = (
                warm * (first + within / stage.steps * (last - first))
                for first, last in (stage.rate, stage.decoder_rate)
            )
            return Place(stage, within == 0, rate, decoder_rate)
        start += stage.steps
    raise IndexError(f"step {step} is past the recipe's {start}")


class Run:
    """Weights, their running average and the optimisers, kept in one safetensors file."""

    def __init__(self, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.path, self.seed = folder / STATE_FILE, seed
        self.model = L2PTransformer(MODEL).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.sketch = Linear(MODEL.dim, CELLS**2 + 2 * IMAGE_CHANNELS)
        initialise(self.model)
        initialise_decoder(self.model.local_decoder, self.sketch)
        self.parameters = dict(self.model.named_parameters())
        self.parameters |= {f"{SKETCH}{name}": p for name, p in self.sketch.named_parameters()}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        groups: dict[str, list[nn.Parameter]] = {"muon": [], "adam": [], "decoder": []}
        for name, parameter in self.parameters.items():
            groups[trained_by(name, parameter)].append(parameter)
        self.optimisers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(groups["muon"], lr=1e-3, decay=0.02),
            "adam": adam(groups["adam"]),
            "decoder": adam(groups["decoder"]),
        }
        self.step = 0

    def restart_decoder(self) -> None:
        """A new decoder that reads the sketch's plan; the transformer goes on from its average."""
        torch.manual_seed(self.seed + self.step)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])
        initialise_decoder(self.model.local_decoder, self.sketch)
        for name, parameter in self.parameters.items():
            if trained_by(name, parameter) == "decoder":
                self.average[name].copy_(parameter.detach())
        self.optimisers["decoder"].state.clear()

    def advance(self, loss: Tensor, rate: float, decoder_rate: float) -> None:
        rates = {"muon": rate, "adam": rate / 2, "decoder": decoder_rate}
        for parameter in self.parameters.values():
            parameter.grad = None
        loss.backward()
        for name, optimiser in self.optimisers.items():
            if rates[name]:
                group = optimiser.param_groups[0]
                group["lr"] = rates[name]
                if name != "muon":  # its steps have one length, whatever the gradient's
                    torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
                optimiser.step()
        decay = min(AVERAGE_DECAY, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - decay)
        self.step += 1

    def save(self) -> None:
        tensors = {f"model.{n}": p.detach().contiguous() for n, p in self.parameters.items()}
        tensors |= {f"{AVERAGE}{n}": p.contiguous() for n, p in self.average.items()}
        for name, parameter in self.parameters.items():
            for key, value in self._optimiser_state(name).get(parameter, {}).items():
                tensors[f"{OPTIMISER}{name}.{key}"] = value.contiguous()
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"step": str(self.step), "seed": str(self.seed)})
        partial.replace(self.path)

    def resume(self) -> bool:
        """Continue from the saved state, if there is one."""
        if not self.path.exists():
            return False
        tensors = load_file(self.path)
        with safe_open(self.path, "pt") as file:
            about = file.metadata()
        if about["seed"] != str(self.seed):
            raise ValueError(f"{self.path}: was begun with seed {about['seed']}; continue with that, not {self.seed}")
        self.step = int(about["step"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
                self.average[name].copy_(tensors[f"{AVERAGE}{name}"])
        for key, value in tensors.items():
            if key.startswith(OPTIMISER):
                name, _, entry = key.removeprefix(OPTIMISER).rpartition(".")
                self._optimiser_state(name)[self.parameters[name]][entry] = value.clone()
        return True

    def _optimiser_state(self, name: str) -> dict[Tensor, dict[str, Tensor]]:
        return self.optimisers[trained_by(name, self.parameters[name])].state


def adam(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)


def trained_by(name: str, parameter: Tensor) -> str:
    """Which optimiser has a parameter: Muon the matrices inside the transformer's blocks, not those at its ends."""
    if name.startswith("local_decoder"):
        return "decoder"
    inner = ".attention." in name or ".feed_forward." in name
    return "muon" if inner and parameter.dim() == 2 else "adam"


def initialise(model: L2PTransformer) -> None:
    """Open gates, and something in the pads."""
    for name, parameter in model.named_parameters():
        if "adaLN" in name:
            nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.constant_(parameter, 0.3)
        elif "pad_token" in name:
            nn.init.normal_(parameter, std=0.02)


@torch.no_grad()
def initialise_decoder(decoder: LocalDecoder, sketch: Linear) -> None:
    """Variance-preserving convolutions that read the sketch's plan and hand the noisy pixels through.

    The decoder has no normalisation: with torch's default convolutions the features would reach the
    picture a hundred thousand times weaker than the noise beside them.
    """
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 1:
            nn.init.zeros_(parameter)
        else:
            gain = 1.0 if name.startswith("up") else 2.5  # SiLU's; none follows `up`
            nn.init.normal_(parameter, std=(gain / parameter[0].numel()) ** 0.5)
    _read_plan(decoder, sketch)
    _pass_pixels(decoder)


def _read_plan(decoder: LocalDecoder, sketch: Linear) -> None:
    """The bottleneck's first channels: the sketch's covers, and its colours with either sign; the rest stay random."""
    convolution = decoder.get_submodule("bottleneck.0")
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    assert sketch.bias is not None
    deepest = decoder.config.levels[-1].encoder
    convolution.weight[:, deepest:] /= 2.5  # about the features' root mean square
    cover, colour = slice(0, CELLS**2), slice(CELLS**2, None)
    rows = torch.cat([0.25 * sketch.weight[cover], sketch.weight[colour], -sketch.weight[colour]])
    biases = torch.cat([0.25 * sketch.bias[cover], sketch.bias[colour], -sketch.bias[colour]])
    count = min(len(rows), len(convolution.weight))
    convolution.weight[:count] = 0
    convolution.weight[:count, deepest:, 0, 0] = rows[:count]
    convolution.bias[:count] = biases[:count]


def _pass_pixels(decoder: LocalDecoder, scale: float = 0.5) -> None:
    """Pairs of channels that carry a colour's value: SiLU(z) - SiLU(-z) = z. The decoder's output begins as -pixels."""
    first = decoder.config.levels[0]
    encode, decode = decoder.get_parameter("enc1.0.weight"), decoder.get_parameter("dec1.0.weight")
    output = decoder.out_conv.weight
    pairs = 2 * IMAGE_CHANNELS
    encode[:pairs] = 0
    decode[:pairs] *= 0.3
    decode[:pairs, first.up :] = 0
    output.zero_()
    for channel in range(IMAGE_CHANNELS):
        for sign, index in ((1, 2 * channel), (-1, 2 * channel + 1)):
            encode[index, channel, 1, 1] = sign * scale
            decode[index, first.up + 2 * channel, 1, 1] = sign
            decode[index, first.up + 2 * channel + 1, 1, 1] = -sign
            output[channel, index] = -sign / scale


def prepare_text(folder: Path, seed: int) -> Features:
    """Tokenizer and encoder of the run, trained on first use."""
    tokenizer_path, encoder_path = folder / TOKENIZER_FILE, folder / ENCODER_FILE
    if not tokenizer_path.exists():
        train_tokenizer(tokenizer_path, seed)
    tokenizer = read_tokenizer(tokenizer_path)
    if encoder_path.exists():
        encoder = TextEncoder(ENCODER)
        encoder.load_state_dict(load_file(encoder_path))
        encoder.eval().requires_grad_(False)
    else:
        encoder = train_encoder(tokenizer, seed)
        save_file(encoder.state_dict(), encoder_path)
    return Features(tokenizer, encoder)


def train(folder: Path, seed: int, save_every: int) -> None:
    """Train from where `folder` stands to the end of the recipe; the state is saved every `save_every` steps."""
    folder.mkdir(parents=True, exist_ok=True)
    features = prepare_text(folder, seed)
    run = Run(folder, seed)
    run.resume()
    total = sum(stage.steps for stage in RECIPE)
    bar = tqdm(range(run.step, total), initial=run.step, total=total, desc="demo model", unit="step")
    smooth = 1.0
    with (folder / "loss.jsonl").open("a") as log:
        for step in bar:
            place = locate(step, RECIPE)
            if place.first and place.stage.restart:
                run.restart_decoder()
            loss = training_loss(run, features, place.stage, step)
            run.advance(loss, place.rate, place.decoder_rate)
            smooth += 0.02 * (loss.item() - smooth)
            bar.set_postfix(loss=f"{smooth:.4f}")
            if step % 20 == 0:
                log.write(json.dumps({"step": step, "loss": loss.item(), "time": time.time()}) + "\n")
                log.flush()
            if run.step % save_every == 0:
                run.save()
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the run keeps its state; name it again to continue")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.folder, arguments.seed, arguments.save_every)


if __name__ == "__main__":
    main()
