"""The GPU check: its models have the real architectures, all checks run at tiny size, failures are in the table."""

from __future__ import annotations

import gpu_check
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from gpu import checks
from gpu.measure import matmul_peak
from gpu.random_models import SIZES, clip_tokenizer


@pytest.mark.parametrize(("size", "unet"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_architectures_have_the_published_number_of_weights(size: str, unet: int):
    with torch.device("meta"):
        networks = UNet2DConditionModel(**SIZES[size][0]), AutoencoderKL(**SIZES[size][1])
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [unet, 83_653_863]


@pytest.mark.parametrize("text", ["a small red circle left of a café, über-cool 1234 \U0001f600!", "  (best) 2nd's  "])
def test_the_tokenizer_is_clips(text: str):
    ours, theirs = clip_tokenizer(), open_clip.get_tokenizer("ViT-B-32")
    ids = theirs([text])[0].tolist()
    end = ids.index(49407) + 1
    assert len(ours) == 49408 and ours(text).input_ids == ids[:end]


def test_the_peak_counts_two_operations_a_product(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("gpu.measure.time.perf_counter", lambda: float(next(ticks)))
    assert matmul_peak("cpu", torch.float32, 8, repeats=3) == 2 * 8**3 * 3


def test_all_checks_run_at_tiny_size_and_only_once(tmp_path, monkeypatch, capsys):
    done = gpu_check.main(["--smoke", "--out", str(tmp_path)])
    assert not [facts["error"] for facts in done.values() if "error" in facts]
    for family in ("sd15", "sdxl"):
        for method in (*gpu_check.METHODS, "dpo-full"):
            facts = done[f"{family}-{method}"]
            assert facts["seconds"] > 0 and facts["tflop"] > 0 and facts["share"] > 0 and facts["peak_gb"] > 0
    assert done["resume-dpo"]["result"] == done["resume-d3po"]["result"] == "same bits"
    assert done["memory-prdp"]["halvings"] >= 1
    # Of one network in two sizes the operations are known: full training costs more than LoRA, SDXL more than SD1.5.
    assert done["sd15-dpo-full"]["tflop"] > done["sd15-dpo"]["tflop"]
    table = (tmp_path / "gpu_check.md").read_text()
    assert all(f"| {name} |" in table for name in done) and "torch" in table

    monkeypatch.setattr(gpu_check, "about", lambda s: pytest.fail("done already"))
    assert gpu_check.main(["--smoke", "--out", str(tmp_path)]) == done


def test_a_failure_is_a_row_of_the_table_and_is_tried_again(tmp_path, monkeypatch):
    def broken(s: checks.Setting) -> checks.Facts:
        raise RuntimeError("no such card\nat all")

    (tmp_path / "gpu_check.json").write_text("{}")
    monkeypatch.setattr(gpu_check, "about", broken)
    found = gpu_check.main(["--smoke", "--only", "versions", "peak", "--out", str(tmp_path)])
    assert found["versions"]["error"] == "FAILED: RuntimeError: no such card at all" and "error" not in found["peak"]
    assert "| versions | FAILED: RuntimeError: no such card at all |" in (tmp_path / "gpu_check.md").read_text()
    monkeypatch.setattr(gpu_check, "about", lambda s: {"result": "mended"})
    monkeypatch.setattr(gpu_check, "checks", lambda s, rate: {"versions": (0.1, lambda: gpu_check.about(s))})
    assert gpu_check.main(["--smoke", "--out", str(tmp_path)])["versions"]["result"] == "mended"


def test_no_check_starts_that_may_end_too_late(tmp_path, capsys):
    assert gpu_check.main(["--minutes", "0.05", "--device", "cpu", "--out", str(tmp_path)]) == {}
    assert "the same command continues here" in capsys.readouterr().out
    assert not (tmp_path / "gpu_check.json").exists()


def test_an_unknown_check_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "sd15-dop", "--out", str(tmp_path)])
    assert "there are versions, peak, parity-dpo" in capsys.readouterr().err


def test_parity_notices_a_different_result(tmp_path, monkeypatch):
    rows = {"cpu": 0.7, "other": 0.7}

    class Run:
        def __init__(self, device: str):
            self.rows = [{"loss": rows[device], "grad_norm": 1.0}] * 2

        def require(self) -> Run:
            return self

    monkeypatch.setattr(checks, "train", lambda argv, device: Run(device))
    s = checks.Setting("other", tmp_path, True, {}, (), gpu_check.Scale())
    assert checks.parity(s, "dpo")["result"].endswith("no 0.0e+00/0.0e+00")
    rows["other"] = 0.7 * 1.01
    with pytest.raises(RuntimeError, match="differs from the CPU"):
        checks.parity(s, "dpo")
