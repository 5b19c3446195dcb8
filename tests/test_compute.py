"""Which arithmetic is chosen, and why; and a picture drawn with INT8 activations."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from l2p_lowvram import L2PPipeline, cli, compute
from l2p_lowvram.compute import Compute, LayerSize, check_kernel, choose_compute, fast_kernels, may_take_int8
from l2p_lowvram.families import PUBLISHED
from l2p_lowvram.int8_matmul import Int8Matmul, in_fp32
from l2p_lowvram.linear import Linear
from l2p_lowvram.tilings import PictureWork, device_activations, tilings
from tests import goldens

CPU, SIZE = torch.device("cpu"), LayerSize(512, 96)
PROMPT = "a large red circle on a blue background, left"
FAST = {"num_inference_steps": 4, "seed": 1, "output_type": "pt"}


@pytest.fixture(autouse=True)
def _measured_anew():
    compute._fastest.cache_clear()
    yield
    compute._fastest.cache_clear()


def wrong(q: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    return in_fp32(q, w).clamp(max=32767)


def failing(q: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    raise RuntimeError("no such kernel\nand more")


def with_kernels(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, tuple[Int8Matmul, float]], dequant: float = 1.0
) -> None:
    """Kernels by name that take so many seconds, as if this device had them."""
    times = dict(seconds.values())

    def measured(layer: Linear, x: Tensor, matmul: Int8Matmul | None) -> float:
        return dequant if matmul is None else times[matmul]

    monkeypatch.setattr(compute, "layer_seconds", measured)
    monkeypatch.setattr(compute, "fast_kernels", lambda device: {name: kernel for name, (kernel, _) in seconds.items()})


def choose(asked: str) -> Compute:
    return choose_compute(asked, CPU, torch.float32, SIZE)


def test_on_a_cpu_without_vnni_auto_dequantises_and_measures_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compute, "has_vnni", lambda: False)
    monkeypatch.setattr(compute, "layer_seconds", None)

    assert choose("auto") == Compute("dequant", None, "no INT8 kernel for a CPU without VNNI")
    assert choose("int8") == Compute("int8", in_fp32, "as asked for; no INT8 kernel for a CPU without VNNI")


def test_auto_never_measures_narrow_layers(monkeypatch: pytest.MonkeyPatch):
    """The demo's: a ratio close to the margin would draw other pictures from one run to the next."""
    with_kernels(monkeypatch, {"quick": (in_fp32, 0.1)})
    narrow = LayerSize(511, 96)

    found = choose_compute("auto", CPU, torch.float32, narrow)

    assert found == Compute("dequant", None, "layers of 511 columns gain nothing in INT8")
    assert choose_compute("int8", CPU, torch.float32, narrow).matmul is in_fp32


@pytest.mark.parametrize(
    ("dtype", "has_kernel", "name"),
    [(torch.bfloat16, False, "dequant"), (torch.bfloat16, True, "int8"), (torch.float32, False, "int8")],
)
def test_matrix_units_are_left_to_bf16_without_the_kernel_that_is_twice_as_fast(
    dtype: torch.dtype, has_kernel: bool, name: str, monkeypatch: pytest.MonkeyPatch
):
    with_kernels(monkeypatch, {"quick": (in_fp32, 0.5)})
    monkeypatch.setattr(compute, "has_amx", lambda: True)
    monkeypatch.setattr(compute, "multiplies", lambda dtype: has_kernel)

    assert choose_compute("auto", CPU, dtype, SIZE).name == name
    assert choose_compute("int8", CPU, dtype, SIZE).name == "int8"


@pytest.mark.parametrize("asked", ["auto", "dequant", "int8"])
@pytest.mark.parametrize("columns", [128, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vnni", [True, False])
def test_what_may_be_taken_is_known_without_measuring(
    asked: str, columns: int, dtype: torch.dtype, vnni: bool, monkeypatch: pytest.MonkeyPatch
):
    size = LayerSize(columns, 96)
    monkeypatch.setattr(compute, "has_vnni", lambda: vnni)
    monkeypatch.setattr(compute, "check_kernel", lambda kernel, weight: None)  # which only CPUs with VNNI pass
    monkeypatch.setattr(compute, "layer_seconds", None)
    may = may_take_int8(asked, CPU, dtype, size)
    monkeypatch.setattr(compute, "layer_seconds", lambda layer, x, matmul: 1.0 if matmul is None else 0.01)

    assert (choose_compute(asked, CPU, dtype, size).name == "int8") == may


def test_each_device_has_its_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compute, "has_vnni", lambda: True)
    monkeypatch.setattr(compute, "multiplies", lambda dtype: False)

    assert list(fast_kernels(torch.device("cuda"))) == ["torch._int_mm"]
    assert list(fast_kernels(CPU)) == ["torch._int_mm"]
    assert not fast_kernels(torch.device("meta"))


@pytest.mark.parametrize(
    ("device", "seconds", "name"),
    [
        *(("meta", 0.5, "int8"), ("meta", 0.79, "int8"), ("meta", 0.81, "dequant"), ("meta", 2.0, "dequant")),
        *(("cpu", 0.5, "int8"), ("cpu", 1.24, "int8"), ("cpu", 1.26, "dequant")),
    ],
)
def test_auto_takes_int8_where_it_is_clearly_faster(
    device: str, seconds: float, name: str, monkeypatch: pytest.MonkeyPatch
):
    """On a CPU with VNNI, where it is known to be, unless it is measured to be slower."""
    with_kernels(monkeypatch, {"quick": (in_fp32, seconds)})
    monkeypatch.setattr(compute, "check_kernel", lambda kernel, weight: None)

    found = choose_compute("auto", torch.device(device), torch.float32, SIZE)

    assert found.name == name
    assert found.matmul is (in_fp32 if name == "int8" else None)
    assert f"quick is {1 / seconds:.2f} x as fast as dequant" in found.reason


def test_asked_for_int8_is_taken_at_any_speed(monkeypatch: pytest.MonkeyPatch):
    with_kernels(monkeypatch, {"slow": (in_fp32, 4.0)})

    assert choose("int8") == Compute("int8", in_fp32, "as asked for: slow is 0.25 x as fast as dequant")


def test_a_kernel_with_wrong_sums_is_out_however_fast(monkeypatch: pytest.MonkeyPatch):
    with_kernels(monkeypatch, {"saturating": (wrong, 0.1), "right": (in_fp32, 0.5)})

    assert choose("auto").matmul is in_fp32


@pytest.mark.parametrize(
    ("kernel", "note"), [(wrong, "only gives wrong sums"), (failing, r"only fails \(no such kernel\)")]
)
def test_without_a_kernel_that_works_the_reference_is_there(kernel: Int8Matmul, note: str, monkeypatch):
    with_kernels(monkeypatch, {"only": (kernel, 0.1)})

    auto, asked = choose("auto"), choose("int8")

    assert (auto.name, auto.matmul, asked.name, asked.matmul) == ("dequant", None, "int8", in_fp32)
    assert auto.reason == f"no kernel computes right here: {note}".replace("\\", "")
    assert asked.reason.endswith(auto.reason)


def test_the_measurement_runs_and_draws_no_random_number_of_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compute, "fast_kernels", lambda device: {"here": in_fp32})
    state = torch.get_rng_state()

    found = choose("int8")

    assert found.matmul is in_fp32
    assert "here is " in found.reason
    assert torch.equal(torch.get_rng_state(), state)


def test_the_measured_kernel_is_checked_with_sums_that_saturate():
    weight = torch.randint(-127, 128, (64, 512), dtype=torch.int8, generator=torch.Generator().manual_seed(2))

    assert check_kernel(in_fp32, weight) is None
    assert check_kernel(wrong, weight) == "gives wrong sums"


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="compute must be one of auto, dequant, int8, got 'int4'"):
        L2PPipeline.from_pretrained("demo", compute="int4")


@pytest.mark.parametrize(("asked", "warned"), [("auto", False), ("int8", True)])
def test_a_file_without_int8_layers_is_never_multiplied_in_int8(tmp_path: Path, asked: str, warned: bool):
    path = goldens.write_checkpoint("a_mini", tmp_path)

    with L2PPipeline.from_pretrained(path, dtype="fp32", compute=asked) as pipe:
        assert pipe.compute == Compute("dequant", None, "no layer of this file can be multiplied in INT8")
        assert any("compute int8 has no effect" in warning for warning in pipe.warnings) is warned


def draw(name: str, dtype: str = "fp32") -> Tensor:
    with L2PPipeline.from_pretrained("demo", dtype=dtype, compute=name) as pipe:
        images: Tensor = pipe(PROMPT, **FAST).images
    return images


def test_the_demo_draws_nearly_the_same_in_int8_and_the_same_by_default():
    dequantised, int8 = draw("dequant"), draw("int8")

    assert torch.equal(draw("auto"), dequantised)
    assert int8.isfinite().all()
    error = (int8 - dequantised).square().mean()
    psnr = float(10 * torch.log10(4 / error))
    assert 30 < psnr < math.inf


def test_a_report_and_a_picture_tell_the_arithmetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["generate", "-p", "a circle", "--steps", "1", "--seed", "1", "--json", "--no-prompt-cache"]

    assert cli.main([*command, "--compute", "int8", "-o", str(tmp_path / "x.png")]) == 0

    told = capsys.readouterr()
    report = json.loads(told.out)
    assert report["compute"]["name"] == report["settings"]["compute"] == "int8"
    assert f"compute: int8 ({report['compute']['reason']})" in told.err


def test_the_command_line_knows_the_names(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["generate", "-p", "x", "--compute", "w8a8"]) == 2

    assert "--compute: invalid choice: 'w8a8'" in capsys.readouterr().err


def test_a_plan_counts_what_int8_takes():
    config = PUBLISHED["1k"]
    work = PictureWork(1024, 1024, 1, True, 64, torch.bfloat16)
    *_, tiling = tilings(config, work)  # with larger tiles the decoder is the widest moment

    dequantised, int8 = (device_activations(config, replace(work, int8=int8), tiling) for int8 in (False, True))

    assert dequantised < int8 < dequantised + (128 << 20)


def test_the_plan_command_takes_the_name(capsys: pytest.CaptureFixture[str]):
    for name in ("auto", "dequant", "int8"):
        assert cli.main(["plan", "--device-profile", "rtx3060-12g", "--json", "--compute", name]) == 0
    assert cli.main(["plan", "--compute", "fp8"]) == 2
