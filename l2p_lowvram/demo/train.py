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

from ..config import DecoderConfig, DecoderLevel, ModelConfig, SamplingDefaults, TextEncoderConfig
from ..linear import Linear
from ..model import L2PTransformer
from ..sampling import add_noise, model_time, shift_sigmas
from ..text import PromptTokenizer, TextEncoder
from .scenes import CLASSES, Scene, draw_scenes, phrase, render

STATE_FILE, ENCODER_FILE, TOKENIZER_FILE = "state.safetensors", "encoder.safetensors", "tokenizer.json"
AVERAGE, SKETCH = "average.", "sketch."  # prefixes in the state file: averaged weights, training's own layer

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
    dim=192,
    n_heads=6,
    n_layers=6,
    n_noise_refiner=1,
    n_context_refiner=1,
    ffn_dim=512,
    caption_dim=ENCODER.hidden_size,
    timestep_hidden=256,
    rope_axes=(8, 12, 12),
    decoder=DecoderConfig(
        levels=(
            DecoderLevel("1", 16, 16, 16),
            DecoderLevel("2", 32, 32, 16),
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

    sizes: (width, height, batch) choices, one drawn a step. rate: learning rate
    at the start and end of the stage (linear in between). sketch_only: train the
    transformer alone, at high noise, without the decoder: twice as many pictures
    a second of what the prompt decides.
    """

    steps: int
    sizes: tuple[tuple[int, int, int], ...]
    rate: tuple[float, float]
    sketch_only: bool = False


_SMALL, _NATIVE = (64, 64, 32), (128, 128, 16)
_MIXED = (*[_NATIVE] * 4, *[(256, 256, 4)] * 2, (192, 128, 12), (128, 192, 12))
# Small pictures first: sixteen tokens learn what the words mean at half the price.
RECIPE = (
    Stage(600, (_SMALL,), (1e-3, 1e-3)),
    Stage(400, (_NATIVE,), (1e-3, 1e-3)),
    Stage(700, (_SMALL, _NATIVE), (1e-3, 1e-3)),
    Stage(700, (_NATIVE,), (1e-3, 1e-3)),
    Stage(400, ((128, 128, 32),), (1e-3, 1e-3), sketch_only=True),
    Stage(550, _MIXED, (1e-3, 1e-5)),
)
WARMUP = 100
# A linear layer paints the picture coarsely from the transformer's own tokens, in training only: what a
# prompt means reaches the transformer directly, not just through nine convolutions that remove noise.
SKETCH_CHANNELS, SKETCH_SHARE = 48, 1.5
DROPPED_PROMPTS = 0.1  # trained without a prompt, for guidance
AVERAGE_DECAY = 0.99


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

    def __init__(self, tokenizer: PromptTokenizer, encoder: TextEncoder, limit: int = 200_000) -> None:
        self._tokenizer, self._encoder, self._limit = tokenizer, encoder, limit
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompt: str) -> Tensor:
        if prompt not in self._known:
            if len(self._known) >= self._limit:
                self._known.clear()
            self._known[prompt] = self._encoder(torch.tensor([self._tokenizer(prompt)]))[0]
        return self._known[prompt]


def draw_sigmas(count: int, generator: torch.Generator, *, only_high: bool = False) -> Tensor:
    """Noise levels (count,): half spread by the sampler's shift, a quarter near pure noise, a quarter at it.

    Only there does the prompt decide anything: a background fills so many pixels that its colour shows
    through the noise from sigma 0.97 down, and a shape's place and colour from about 0.9.
    """
    uniform = torch.rand(count, generator=generator)
    ranges = torch.stack([shift_sigmas(uniform, 3.0), 0.88 + 0.12 * uniform, 0.97 + 0.03 * uniform])
    turns = torch.tensor([1, 2] if only_high else [0, 1, 0, 2])
    choice = turns[torch.arange(count) % len(turns)]
    return ranges.gather(0, choice[None])[0].clamp_min(0.01)


def training_loss(run: Run, features: Features, stage: Stage, step: int) -> Tensor:
    """Weighted squared error of the velocity and of the sketch on one fresh batch.

    A function of the weights, the run's seed and the step alone.
    """
    rng = random.Random(f"{run.seed}/{step}")
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    width, height, batch = rng.choice(stage.sizes)
    scenes = draw_scenes(rng, batch)
    prompts = ["" if rng.random() < DROPPED_PROMPTS else phrase(scene, rng) for scene in scenes]
    pictures = render(scenes, width, height, generator)
    noise = torch.randn(pictures.shape, generator=generator)
    sigma = draw_sigmas(batch, generator, only_high=stage.sketch_only)
    pixels = add_noise(pictures, noise, sigma[:, None, None, None]).contiguous(memory_format=torch.channels_last)

    model = run.model
    state = model.prelude(pixels, model_time(sigma), model.encode_caption([features(prompt) for prompt in prompts]))
    for block in model.blocks():
        state = block.visit(state)
    sketch = run.sketch(model.feature_map(state, pixels).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    weight = figure_weight(pictures)
    sketch_loss = ((sketch - coarse(pictures)).square() * F.avg_pool2d(weight, 16)).mean()
    if stage.sketch_only:
        return sketch_loss
    velocity = model.epilogue(state, pixels)
    error = (velocity - (noise - pictures)).square() * weight
    # Weighted by sigma: the error of the velocity is that of the picture divided by sigma, so the last,
    # nearly clean steps would otherwise outweigh those that decide what is painted.
    return (sigma * error.mean(dim=(1, 2, 3))).mean() + SKETCH_SHARE * sketch_loss


def coarse(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 48, H/16, W/16): each patch as 4x4 mean colours."""
    return F.pixel_unshuffle(F.avg_pool2d(pictures, 4), 4)


def figure_weight(pictures: Tensor, extra: float = 5.0, rim: int = 5) -> Tensor:
    """(B, 1, H, W), mean about 1: the figure and its outline count more than the plain background.

    A shape covers a tenth of its picture, yet four of the five things a prompt says are about it.
    """
    background = pictures[:, :, :1, :1]  # no shape reaches the corner
    figure = ((pictures - background).abs().amax(1, keepdim=True) > 0.05).float()
    weight = 1 + extra * F.max_pool2d(figure, rim, stride=1, padding=rim // 2)
    return weight / (1 + 0.15 * extra)


def locate(step: int, recipe: tuple[Stage, ...] = RECIPE) -> tuple[Stage, float]:
    """The stage that step belongs to and its learning rate."""
    start = 0
    for stage in recipe:
        if step < start + stage.steps:
            share = (step - start) / stage.steps
            rate = stage.rate[0] + share * (stage.rate[1] - stage.rate[0])
            return stage, rate * min(1.0, (step + 1) / WARMUP)
        start += stage.steps
    raise IndexError(f"step {step} is past the recipe's {start}")


class Run:
    """Weights, their running average and the optimiser, kept in one safetensors file."""

    def __init__(self, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.path, self.seed = folder / STATE_FILE, seed
        self.model = L2PTransformer(MODEL).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        initialise(self.model)
        self.sketch = Linear(MODEL.dim, SKETCH_CHANNELS)
        self.parameters = dict(self.model.named_parameters())
        self.parameters |= {f"{SKETCH}{name}": p for name, p in self.sketch.named_parameters()}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimiser = torch.optim.AdamW(self.parameters.values(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
        self.step = 0

    def advance(self, loss: Tensor, rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimiser.step()
        decay = min(AVERAGE_DECAY, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - decay)
        self.step += 1

    def save(self) -> None:
        tensors = {f"model.{n}": p.detach().contiguous() for n, p in self.parameters.items()}
        tensors |= {f"{AVERAGE}{n}": p.contiguous() for n, p in self.average.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"optimiser.{key}.{name}"] = value.contiguous()
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
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimiser.state[parameter] = {k: tensors[f"optimiser.{k}.{name}"].clone() for k in keys}
        return True


def initialise(model: L2PTransformer) -> None:
    """Open gates, variance-preserving convolutions, and a zero output layer.

    The decoder has no normalisation: with torch's default convolutions the features would
    reach the picture a hundred thousand times weaker than the noise beside them.
    """
    for name, parameter in model.named_parameters():
        if "adaLN" in name:
            nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.constant_(parameter, 0.3)
        elif "pad_token" in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() == 4:
            gain = 1.0 if ".up" in name else 2.5
            nn.init.normal_(parameter, std=(gain / parameter[0].numel()) ** 0.5)
        elif name.startswith("local_decoder"):
            nn.init.zeros_(parameter)
    nn.init.zeros_(model.local_decoder.out_conv.weight)


def prepare_text(folder: Path, seed: int) -> Features:
    """Tokenizer and encoder of the run, trained on first use."""
    tokenizer_path, encoder_path = folder / TOKENIZER_FILE, folder / ENCODER_FILE
    if not tokenizer_path.exists():
        train_tokenizer(tokenizer_path, seed)
    tokenizer = PromptTokenizer.from_file(str(tokenizer_path))
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
            stage, rate = locate(step)
            loss = training_loss(run, features, stage, step)
            run.advance(loss, rate)
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
