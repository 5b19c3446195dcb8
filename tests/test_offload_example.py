"""The example of the package's docstring, run as it stands on a Hugging Face-style decoder stack."""

import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import offload

WIDTH, HEADS, LAYERS = 64, 4, 6


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.down_proj = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attributes named as in Llama, Qwen and their kin."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(LAYERS))


def example() -> str:
    """The indented lines of the docstring."""
    assert offload.__doc__ is not None
    lines = [line for line in offload.__doc__.splitlines() if line.startswith("    ")]
    return textwrap.dedent("\n".join(lines))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_documented_example_streams_a_decoder_bit_for_bit(tmp_path: Path, share: float) -> None:
    model = Model()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(tensors | {"lm_head.weight": torch.randn(10, WIDTH)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        layer = DecoderLayer()
    x = torch.randn(2, 7, WIDTH)
    expected = x
    with torch.inference_mode():
        for _ in range(2):
            for plain in model.layers:
                expected = plain(expected)

        memory = str(int(share * sum(tensor.nbytes for tensor in tensors.values()) + 4096))
        names = {"path": tmp_path, "layer": layer, "layers": LAYERS, "hidden": x, "steps": 2, "memory": memory}
        scope = {**vars(offload), "torch": torch, **names}
        exec(example(), scope)

    assert torch.equal(scope["hidden"], expected)
    assert scope["plan"].device_bytes <= int(memory)
    assert (scope["plan"].count(offload.Tier.DISK) > 0) == (share < 1)


def test_the_example_takes_at_most_twenty_lines() -> None:
    assert len(example().splitlines()) <= 20


def test_all_public_names_exist_and_are_sorted() -> None:
    assert list(offload.__all__) == sorted(offload.__all__)
    assert all(hasattr(offload, name) for name in offload.__all__)
