"""The scripts and the commands behind them at toy size: run folders, resuming, results."""

import importlib.util
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers_tiny import make_tiny_folder
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from diffusion_align.commands import sources
from diffusion_align.commands.interrupt import Interruptible
from diffusion_align.data import write_pairs_parquet
from diffusion_align.data.images import encode_png
from diffusion_align.methods import dpo
from diffusion_align.methods.entry import About
from diffusion_align.methods.shared import plan
from diffusion_align.methods.shared.pair_losses import PairOutputs
from diffusion_align.models.lora import reference as reference_module
from diffusion_align.options import TrainDpo, read_yaml
from diffusion_align.options.train.dpo import metrics_of
from diffusion_align.schedule import Schedule
from diffusion_align.shapes import sample_captions
from diffusion_align.train import record

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
LORA = "pytorch_lora_weights.safetensors"
ABOUT = About(Schedule.from_config({"beta_start": 0.00085, "beta_end": 0.012}), (4, 64, 64), None, None, 1)


def script(name):
    """A script's `main`, loaded from its file as Python itself would."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps its first precision for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A random model of 64-pixel pictures, and a dozen pairs with one tie."""
    folder = tmp_path_factory.mktemp("toys")
    model = make_tiny_folder(folder / "model")
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 16}))
    source = torch.Generator().manual_seed(0)
    captions = sample_captions(12, 0, unique=True)
    pictures = [[encode_png(torch.rand(3, 64, 64, generator=source)) for _ in captions] for _ in range(2)]
    write_pairs_parquet(folder / "pairs.parquet", captions, *pictures, [1.0, 0.0] * 5 + [0.5, 1.0])
    return folder


def train(toys, run, *more):
    """Six short steps with the script that `accelerate launch` starts; returns its exit code."""
    argv = f"""--pretrained_model_name_or_path {toys / "model"} --train_data_dir {toys / "pairs.parquet"}
        --output_dir {run} --cache_dir {toys / "cache"} --max_train_steps 6 --checkpointing_steps 4 --learning_rate 1e-3
        --validation_sampling_steps 2 --validation_prompt circle --device cpu""".split()
    return script("finetune_diffusion_dpo")([*argv, *more])


@pytest.fixture(scope="module")
def finished(toys):
    run = toys / "finished"
    assert train(toys, run) == 0
    AcceleratorState._reset_state(True)
    return run


def test_a_run_folder_holds_what_it_promises(toys, finished):
    rows = record.read(finished / "metrics.jsonl")
    assert set().union(*rows) == {"step", "epoch", "threads", *metrics_of(TrainDpo())}
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["loss"] == pytest.approx(math.log(2)) and rows[0]["lr"] == 1e-3
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    config = read_yaml(finished / "config.yaml")
    assert config["train"]["max_train_steps"] == 6 and config["adapter"]["mode"] == "lora"
    with Image.open(finished / "samples" / "step-00000006.png") as grid:
        assert grid.width > 2 * 64


def test_diffusers_loads_the_result_without_more_arguments(toys, finished):
    pipe = StableDiffusionPipeline.from_pretrained(toys / "model", safety_checker=None)
    x, t, text = torch.ones(1, 4, 16, 16), torch.tensor([500]), torch.ones(1, 16, 32)
    with torch.no_grad():
        base = pipe.unet(x, t, text).sample
        pipe.load_lora_weights(finished)
        tuned = pipe.unet(x, t, text).sample
    assert 0 < (tuned - base).abs().max() < 1


def weights_of(run):
    """Every byte of a LoRA's file, its header too."""
    return (run / LORA).read_bytes()


def test_an_interrupted_run_resumes_as_if_never_stopped(toys, finished, monkeypatch, capsys):
    """Ctrl-C in step 3: the step is finished and saved, exit code 130, the command to type; then equal to the bit."""
    run, append = toys / "interrupted", record.append

    def ctrl_c(path, row):
        append(path, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(record, "append", ctrl_c)
        assert train(toys, run) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"step 3 is saved; continue with: diffusion-align train dpo --config {run}/config.yaml" in said
    AcceleratorState._reset_state(True)
    # As if killed after a later step: a row without a checkpoint.
    append(run / "metrics.jsonl", {"step": 4, "loss": 9.0})
    assert script("finetune_diffusion_dpo")(said.partition(" train dpo ")[2].split()) == 0
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert weights_of(run) == weights_of(finished)
    assert (run / "samples/step-00000006.png").read_bytes() == (finished / "samples/step-00000006.png").read_bytes()


def test_averaged_weights_are_exported_and_survive_an_interruption(toys, finished, tmp_path, monkeypatch):
    ema = ("--use_ema", "--ema_decay", "0.9")
    assert train(toys, tmp_path / "whole", *ema) == 0
    AcceleratorState._reset_state(True)
    run, append = tmp_path / "cut", record.append

    def ctrl_c(path, row):
        append(path, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(record, "append", ctrl_c)
        assert train(toys, run, *ema) == 130
    AcceleratorState._reset_state(True)
    assert train(toys, run, *ema, "--resume_from_checkpoint", "latest") == 0
    assert weights_of(run) == weights_of(tmp_path / "whole") != weights_of(finished)
    rows = [(folder / "metrics.jsonl").read_bytes() for folder in (run, tmp_path / "whole", finished)]
    assert rows[0] == rows[1] == rows[2]  # the average looks on; it does not steer


def test_other_settings_are_not_resumed(toys, finished, tmp_path, capsys):
    assert train(toys, finished) == 1
    assert "holds a run already (metrics.jsonl)" in capsys.readouterr().err
    assert train(toys, tmp_path / "new", "--resume_from_checkpoint", "latest") == 1
    assert "no checkpoint to resume" in capsys.readouterr().err
    before = (finished / "metrics.jsonl").read_bytes()
    assert train(toys, finished, "--resume=latest", "--beta=100") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "this run is not the one that was saved: beta was 2.44" in said and "unexpected" not in said
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_micro_batches_make_the_same_step(toys, finished, tmp_path):
    """4 pairs at once, and 2 pairs twice: one effective batch; scale_lr multiplies by it."""
    rate = 1e-3 / 4
    more = ["--train_batch_size=2", "--gradient_accumulation_steps=2", f"--learning_rate={rate}", "--scale_lr"]
    assert train(toys, tmp_path / "run", *more) == 0
    rows, whole = (record.read(run / "metrics.jsonl") for run in (tmp_path / "run", finished))
    assert [row["samples"] for row in rows] == [4, 8, 12, 16, 20, 24]
    for key in ("loss", "lr", "winner_error_gap"):
        np.testing.assert_allclose([r[key] for r in rows], [r[key] for r in whole], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "kto", "kto_pairs"])
def test_losses_start_where_the_plan_says(toys, tmp_path, loss_type):
    flip = ["--label_smoothing=0.1"] if loss_type in ("sigmoid", "robust") else []
    argv = ["--max_train_steps=2", "--mixed_precision=bf16", f"--loss_type={loss_type}", *flip]
    assert train(toys, tmp_path / "run", *argv) == 0
    start = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 0.25, "robust": math.log(2)}.get(loss_type, 0.5)
    assert record.read(tmp_path / "run" / "metrics.jsonl")[0]["loss"] == pytest.approx(start, rel=1e-6)
    o = TrainDpo(loss_type=loss_type, label_smoothing=0.1 if flip else 0.0)
    text = next(line for line in dpo.constants(o, ABOUT) if line.startswith("loss "))
    words = {"hinge": "starts at 1,", "ipo": "starts at 1/4,", "kto": "starts at 1/2,", "kto_pairs": "starts at 1/2,"}
    assert words.get(loss_type, f"{start:.4f}") in text


def test_mapo_keeps_no_frozen_copy_and_logs_nothing_that_needs_one(toys, tmp_path, monkeypatch, capsys):
    """In full mode, on 3 pairs of which 2 have too long captions: the messages at the start."""

    def refused(model, mode):
        raise AssertionError("a reference was made")

    monkeypatch.setattr(reference_module, "reference", refused)
    texts = ["circle", "circle " * 15, "circle " * 40]  # 16 tokens are read, begin and end among them
    source = torch.Generator().manual_seed(0)
    pictures = [[encode_png(torch.rand(3, 64, 64, generator=source)) for _ in texts] for _ in range(2)]
    write_pairs_parquet(tmp_path / "few.parquet", texts, *pictures, [1.0, 0.0, 1.0])
    flags = ["--mode=full", "--loss_type=mapo", "--max_train_steps=1", "--effective_batch_size=8"]
    flags += ["--train_batch_size=4", "--train_data_dir", str(tmp_path / "few.parquet")]
    assert train(toys, tmp_path / "run", *flags) == 0
    said = capsys.readouterr().out
    assert "captions         2 of 3 are longer than the 16 tokens that the text encoder reads" in said
    assert "4 per device x 1 device x 2 accumulation = 8 pairs" in said
    assert "each of the 3 pairs occurs 2.67 times within one step" in said
    assert "reference        none" in said and "mapo_beta        0.1" in said and "\nbeta " not in said
    (row,) = record.read(tmp_path / "run" / "metrics.jsonl")
    assert set(row) == {"step", "epoch", "threads", *metrics_of(TrainDpo(loss_type="mapo"))}
    assert not {"implicit_accuracy", "winner_error_gap", "loser_error_gap", "margin_p50"} & set(row)
    assert train(toys, tmp_path / "more", *flags, "--dry-run") == 0
    plan = capsys.readouterr().out
    assert "# reference        none" in plan and "2.67 times" in plan and "in the unit of" not in plan


def test_an_effective_batch_that_does_not_fit_is_refused_before_anything_is_loaded(toys, tmp_path, capsys):
    assert train(toys, tmp_path / "run", "--effective_batch_size=6", "--train_batch_size=4") == 2
    assert "effective_batch_size 6 is no multiple of train_batch_size 4 x 1 process = 4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_kto_on_single_pictures_runs_and_its_plan_explains_it(toys, tmp_path, capsys):
    flags = ["--loss_type=kto", "--max_train_steps=3", "--gradient_accumulation_steps=2", "--liked_share=0.5"]
    assert train(toys, tmp_path / "run", *flags) == 0
    said = capsys.readouterr().out
    assert "= 8 pairs, one picture of each" in said and "beta             1000 in the unit of diffusers" in said
    assert "liked_share      0.5 of the visits show the winner" in said
    rows = record.read(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["loss"] == 0.5 and rows[-1]["loss"] != 0.5
    assert set().union(*rows) == {"step", "epoch", "threads", *metrics_of(TrainDpo(loss_type="kto"))}
    again = ["--loss_type=kto", "--liked_share=0.8", "--max_train_steps=5", "--resume_from_checkpoint=latest"]
    assert train(toys, tmp_path / "run", *again, "--gradient_accumulation_steps=2") == 1
    assert "liked_share was 0.5 and is now 0.8" in capsys.readouterr().err


def test_full_training_writes_a_unet(toys, tmp_path):
    run = tmp_path / "run"
    more = ["--mode=full", "--max_train_steps=2", "--lr_scheduler=cosine", "--lr_warmup_steps=1", "--run_validation"]
    assert train(toys, run, *more, "--validation_steps=1", "--proportion_empty_prompts=0.5") == 0
    unet = UNet2DConditionModel.from_pretrained(run, subfolder="unet")
    base = load_file(toys / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert sum(not torch.equal(value, base[name]) for name, value in unet.state_dict().items()) > 50
    assert [row["lr"] for row in record.read(run / "metrics.jsonl")] == [
        0.0,
        1e-3,
    ]  # warm-up, then the top of the cosine
    assert (run / "samples" / "step-00000001.png").exists()
    out = tmp_path / "pictures"
    assert script("generate")(["--run", str(run), "--prompt=a", "--steps=2", f"--out={out}"]) == 0
    assert len(list(out.glob("*.png"))) == 1


def test_overwriting_a_run_needs_the_option(toys, tmp_path):
    run = tmp_path / "run"
    assert train(toys, run, "--max_train_steps=2") == 0
    (run / "mine.txt").write_text("kept")
    assert train(toys, run, "--max_train_steps=1", "--overwrite_output_dir") == 0
    assert len(record.read(run / "metrics.jsonl")) == 1
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000001"]
    assert (run / "mine.txt").exists()


def test_generate_depends_on_seed_and_place_only_and_records_its_settings(toys, finished, tmp_path):
    """The same pictures whatever the batch size; the JSON names prompt, seed and sampler; no prompt in a file name."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\n\n../../etc & <b>\n")
    argv = f"--run {finished} --prompts_file {prompts} --num_images_per_prompt 2 --steps 3 --seed 5".split()
    assert script("generate")([*argv, f"--out={tmp_path / 'a'}", "--batch_size=1"]) == 0
    assert script("generate")([*argv, f"--out={tmp_path / 'b'}", "--batch_size=3"]) == 0
    names = ["0000-00.png", "0000-01.png", "0001-00.png", "0001-01.png"]
    assert sorted(p.name for p in (tmp_path / "a").glob("*.png")) == names
    for name in names:
        one, three = (np.asarray(Image.open(tmp_path / side / name)).astype(int) for side in "ab")
        assert abs(one - three).max() <= 1
    about = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert (
        about["seed"] == 5 and about["sampler"]["solver"] == "dpmpp" and about["pictures"][2]["prompt"].startswith("..")
    )
    assert about["versions"]["torch"] == torch.__version__.partition("+")[0]
    pictures = {(tmp_path / "a" / name).read_bytes() for name in names}
    assert len(pictures) == 4


def test_evaluate_compares_base_and_tuned(toys, finished, capsys):
    argv = [str(finished), "--num_prompts=6", "--steps=2", "--reward=none", "--pictures=3"]
    assert script("evaluate")(argv) == 0
    said = capsys.readouterr().out
    assert "judge/all" in said and "judge/colour" in said and "n = 6" in said
    report = json.loads((finished / "report.json").read_text())
    assert report["n_prompts"] == 6 and report["metrics"]["judge/all"]["n"] == 6
    assert report["facts"]["seed"] == 0 and report["config"]["train"]["max_train_steps"] == 6
    assert "<html" in (finished / "report.html").read_text() and (finished / "pairs.png").exists()


def test_evaluate_and_generate_refuse_incomplete_folders(toys, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    cases = [
        ("evaluate", [str(tmp_path / "run")], "is not a run folder"),
        ("generate", ["--run", str(tmp_path / "run"), "--prompt=a"], "is not a run folder"),
        ("generate", ["--model", str(tmp_path / "run"), "--prompt=a"], "has no model_index.json"),
    ]
    for name, argv, message in cases:
        assert script(name)(argv) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "run" / "config.yaml").write_text("model: {pretrained_model_name_or_path: x}")
    assert script("evaluate")([str(tmp_path / "run")]) == 1
    assert "has no trained weights yet" in capsys.readouterr().err


def test_dry_run_prints_the_plan_which_is_a_config(toys, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = tmp_path / "run"
    assert train(toys, run, "--dry-run", "--scale_lr", "--gradient_accumulation_steps=3", "--num_train_epochs=7") == 0
    said = capsys.readouterr().out
    assert not run.exists()
    for line in (
        "4 per device x 2 devices x 3 accumulation = 24 pairs",
        "12 rows: 11 pairs, 1 ties dropped, 0 bad",
        "steps            6, 144 samples, 13.1 epochs of 11 pairs",
        "learning rate    0.024 = 0.001 x 24",
        "4 x 16 x 16 = 1024",
        "2500 in the unit of diffusers = 5000 in the unit of salesforce",
    ):
        assert line in said
    trained = sum(value.numel() for value in load_file(toys / "finished" / LORA).values())
    assert f"LoRA of rank 4, alpha 4: {trained:,} of " in said
    (tmp_path / "plan.yaml").write_text(said)
    for name, method in (("finetune_diffusion_dpo", []), ("finetune", ["dpo"])):
        assert script(name)([*method, "--config", str(tmp_path / "plan.yaml"), "--dry_run"]) == 0
        assert capsys.readouterr().out == said


def test_every_option_reaches_the_loop_and_the_optimizer(toys, tmp_path, monkeypatch):
    """Each option has a value of its own, which must reach the loop and the optimizer."""
    seen = {}

    def method(cache, networks, run, **settings):
        seen.update(settings, pairs=len(cache), **vars(run))

    def loop(method, run, **settings):
        seen.update(settings)
        return iter(())

    monkeypatch.setattr(dpo, "pairs_method", method)
    monkeypatch.setattr(dpo, "run_steps", loop)
    more = """--proportion_empty_prompts=0.3 --max_grad_norm=7 --seed=11 --adam_beta1=0.8 --adam_beta2=0.95
        --adam_epsilon=1e-5 --adam_weight_decay=0.2 --gradient_accumulation_steps=2 --train_batch_size=3
        --max_train_samples=5 --beta=100 --beta_convention=salesforce --rank=2 --network_alpha=6
        --lr_scheduler=constant_with_warmup --lr_warmup_steps=10"""
    assert train(toys, tmp_path / "run", *more.split()) == 0
    group = seen["optimizer"].param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-5, 0.2)
    assert (seen["caption_dropout"], seen["max_grad_norm"], seen["seed"], seen["pairs"]) == (0.3, 7.0, 11, 5)
    assert (seen["batch_size"], seen["accumulation"], seen["max_steps"]) == (6, 2, 6)
    assert seen["beta"] == pytest.approx(100 / 2 / 1024)
    same = PairOutputs(*[torch.zeros(2, 4, 16, 16)] * 3)
    assert seen["loss"](same).item() == pytest.approx(math.log(2))
    assert group["lr"] == 0 and group["initial_lr"] == 1e-3
    assert {min(p.shape[:2]) for p in seen["parameters"]} == {2}
    with safe_open(tmp_path / "run" / LORA, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 6


@pytest.mark.parametrize("method", ["dpo", "rankdpo", "d3po", "ddpo", "prdp", "spo"])
def test_every_method_has_a_launcher(method, capsys):
    older = {"dpo": "finetune_diffusion_dpo"}.get(method, f"finetune_{method}")
    assert script("finetune")([method, "--help"]) == script(older)(["--help"]) == 0
    assert capsys.readouterr().out.count(f"usage: diffusion-align train {method} ") == 2


def test_steps_from_epochs():
    assert plan.steps_of(4, 2, 3, 7, None, 11).steps == 4  # 7 x 11 = 77 pairs, 24 a step: 3.2 steps
    assert plan.steps_of(4, 2, 3, 7, 9, None).steps == 9
    assert plan.steps_of(4, 2, 3, 7, None, None).steps is None


UNITS = ((5000, "salesforce"), (2500, "diffusers"))


def test_beta_in_the_units_of_the_literature():
    """Per nat: a table worked out by hand from Stable Diffusion's betas, T omega = 6.53."""
    schedule = Schedule.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    assert plan.path_weight(schedule) == pytest.approx(6.53, abs=0.005)
    for beta, side, per_sum, per_nat in ((2000, 64, "0.06104", "0.00935"), (5000, 64, "0.1526", "0.0234")):
        o = TrainDpo(beta_dpo=beta, beta_convention="salesforce")
        said = " ".join(plan.describe_beta(o, About(schedule, (4, side, side), None, None, 1)))
        assert f"{per_sum} per squared error" in said and f"about {per_nat} per nat" in said
    about = About(schedule, (4, 64, 64), None, None, 1)
    paper, scripts = (plan.describe_beta(TrainDpo(beta_dpo=b, beta_convention=unit), about) for b, unit in UNITS)
    assert paper[2] == scripts[2]
    assert "= 2500 in the unit of diffusers" in paper[1] and "= 5000 in the unit of salesforce" in scripts[1]


@pytest.mark.parametrize(
    ("name", "local"),
    [("owner/name", False), ("./owner/name", True), ("pairs.jsonl", True), ("a/pairs.parquet", True), ("word", True)],
)
def test_names_and_paths_are_distinguished(name, local):
    assert (sources.pairs_on_disk(name) is not None) == local


def test_moved_repositories_are_found(tmp_path, monkeypatch):
    assert sources.present_pairs("yuvalkirstain/pickapic_v1") == "pickapic-anonymous/pickapic_v1"
    assert sources.present_model("runwayml/stable-diffusion-v1-5") == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert sources.present_model("owner/name") == "owner/name"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runwayml" / "stable-diffusion-v1-5").mkdir(parents=True)
    assert sources.present_model("runwayml/stable-diffusion-v1-5") == "runwayml/stable-diffusion-v1-5"


def test_pairs_on_the_hub_without_a_network(toys, tmp_path, capsys):
    """With HF_HUB_OFFLINE, as in all tests, one line says what to do; a dry run does not try the hub."""
    argv = ["--model", str(toys / "model"), "--dataset_name=nobody/nothing", "--output_dir", str(tmp_path / "run")]
    assert script("finetune_diffusion_dpo")(argv) == 1
    said = capsys.readouterr().err
    assert "give pairs on this disk with --train_data_dir" in said and len(said.splitlines()) == 1
    assert script("finetune_diffusion_dpo")([*argv, "--dry_run"]) == 0
    assert "on the hub: not counted" in capsys.readouterr().out


def test_a_second_signal_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), Interruptible(grace=0) as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal_number
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
