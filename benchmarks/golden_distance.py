"""How far our fp32 results are from other people's: `python benchmarks/golden_distance.py`.

One row per set of reference tensors: the largest absolute difference, and the tolerance the tests hold.
Reads tests/golden and, where it exists, ../shared/golden.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

from l2p_lowvram import L2PPipeline, sampling
from l2p_lowvram.linear import Linear, Rotation
from tests import goldens, test_golden_model, test_golden_sampling
from tests.test_golden_text import open_encoder


def forward(name: str, folder: Path) -> float:
    """Largest difference of a velocity over all cases."""
    model = test_golden_model.load(goldens.write_checkpoint(name, folder))
    worst = 0.0
    for pixels, features, sigma, outputs in test_golden_model.forward_cases(name):
        velocity = model(pixels, sampling.model_time(sigma), model.encode_caption(features))
        (key,) = [key for key in outputs if key.startswith("velocity")]
        rows = int(re.sub(r"\D", "", key) or 1)
        worst = max(worst, float((velocity[:, :, ::rows] - outputs[key]).abs().max()))
    return worst


def trajectory(model: str, name: str, folder: Path) -> float:
    """Largest difference of the sample after any stored step."""
    run = test_golden_sampling.Trajectory(name)
    run.run(L2PPipeline.from_pretrained(goldens.write_checkpoint(model, folder), dtype="fp32"))
    if "latents" in run.stored:
        pairs = list(zip(run.seen, run.stored["latents"][1:], strict=True))
    else:
        pairs = [(run.seen[-1], run.stored["latents_first_mid_last"][2])]
    return max(float((seen - stored).abs().max()) for seen, stored in pairs)


def text(folder: Path) -> float:
    from safetensors.torch import save_file

    save_file(goldens.weights("te_a"), folder / "te.safetensors")
    encoder, stored = open_encoder(folder / "te.safetensors"), goldens.tensors("te_a.goldens")
    worst = 0.0
    for index in range(4):
        ids = stored[f"case{index}.input_ids"][stored[f"case{index}.attention_mask"].bool()][None]
        worst = max(worst, float((encoder(ids)[0] - stored[f"case{index}.prompt_embeds"]).abs().max()))
    return worst


def int8(name: str) -> float:
    """Largest difference of a dequantised weight over all modes; 0 means equal to the last bit, which
    rotated ones are where the processor sums as the reference's did."""
    stored, worst = goldens.tensors(name), 0.0
    for case in goldens.values(name)["cases"]:
        mode = case["mode"]
        rotation = Rotation(case["convrot_groupsize"]) if case.get("convrot") else None
        weight = stored[f"{mode}.weight"]
        linear = Linear(weight.shape[1], weight.shape[0])
        linear.quantize_(weight, stored[f"{mode}.weight_scale"], rotation)
        worst = max(worst, float((linear.dequantized() - stored[f"{mode}.dequantized"]).abs().max()))
    return worst


@torch.inference_mode()
def main() -> None:
    print(f"{'reference':40}{'largest difference':>20}{'tolerance':>12}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [(f"{s}: velocity", lambda s=s: forward(s, folder), t) for s, t in test_golden_model.TOLERANCE.items()]
        rows += [(n, lambda m=m, n=n: trajectory(m, n, folder), t) for m, n, t in test_golden_sampling.CASES]
        rows += [("te_a: text features", lambda: text(folder), 3e-5)]
        rows += [(f"{n}: dequantised weights", lambda n=n: int8(n), 1e-6) for n in ("int8_a", "int8_ragged")]
        for label, measure, tolerance in rows:
            try:
                print(f"{label:40}{measure():20.1e}{tolerance:12.0e}")
            except pytest.skip.Exception:
                print(f"{label:40}{'set not here':>20}")


if __name__ == "__main__":
    main()
