"""`--lora` in train, sample and evaluate: a LoRA to start from, to draw with, and to evaluate by itself."""

import contextlib
import io
import json
import math
import re

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from stress.lora.faults import write
from stress.lora.kinds import KINDS, Dice
from stress.runs import differences, end_of, flags, make_world, stop_at, train

from diffusion_align import cli
from diffusion_align.commands.evaluate.contenders import base_contender, contender
from diffusion_align.commands.trained_weights import load_tuned
from diffusion_align.data.images import decode_image
from diffusion_align.models import load_lora, load_pipeline, merge_lora
from diffusion_align.models.lora.opening import adapter_digest
from diffusion_align.options import Evaluate
from diffusion_align.options.lora import NewLora, target_layers
from diffusion_align.rng import normal
from diffusion_align.train import record

SHORT = ("--run_validation=false", "--max_train_steps=4", "--lr_scheduler=constant", "--lr_warmup_steps=0")
MODES = ("continue", "beneath", "merge")
DRAW = ("--prompt", "a red circle", "--steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def kohya_file(world, path, kind="LoRA", scale=1.0, layers=("attn1.to_q", "attn2.to_v", "mlp.fc1")):
    model, tensors = load_pipeline(world / "model", device="cpu"), {}
    for prefix, network in (("lora_unet", model.unet), ("lora_te_text_model", model.text_encoder)):
        for layer, module in network.named_modules():
            if layer.endswith(layers):
                parts = KINDS[kind].make(module.weight.detach(), Dice(prefix, layer))
                name = f"{prefix}_{layer.removeprefix('text_model.').replace('.', '_')}"
                tensors |= {f"{name}.{part}": v * scale if part != "alpha" else v for part, v in parts.items()}
    return write(path, tensors)


@pytest.fixture(scope="module")
def style(world):
    return kohya_file(world, world / "style.safetensors")


@pytest.fixture(scope="module")
def runs(world, style):
    """A run of four steps in each mode."""
    for mode in MODES:
        run = world / mode
        code, said = train(flags(world, "dpo", run, *SHORT, f"--lora={style}", f"--lora_mode={mode}"))
        assert code == 0, said
    return world


def drawn(model, seed=0):
    x, t = normal((1, *model.latent_shape()), seed, "x"), torch.tensor([500])
    with torch.no_grad():
        return model.predict(x, t, model.encode_text(["a red circle"]))


def of(who):
    return drawn(who.load(Evaluate(device="cpu")))


def with_style(world, style):
    model = load_pipeline(world / "model", device="cpu")
    merge_lora(model, style)
    return model


@pytest.mark.parametrize("mode", MODES)
def test_training_starts_from_the_lora_with_margin_zero(runs, style, mode):
    rows = record.read(runs / mode / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["margin_p05"] == rows[0]["margin_p95"] == 0 != rows[-1]["margin_p95"]
    due = drawn(with_style(runs, style))
    assert torch.allclose(of(base_contender(contender(str(runs / mode)))), due, atol=1e-5)
    assert not torch.allclose(of(contender(str(runs / mode))), due, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_result_is_the_same_from_the_run_its_checkpoint_and_its_file(runs, style, mode):
    run = runs / mode
    tuned = of(contender(str(run)))
    (step,) = (run / "checkpoints").iterdir()
    assert torch.allclose(of(contender(str(step))), tuned, atol=1e-5)
    model = with_style(runs, style) if mode == "merge" else load_pipeline(runs / "model", device="cpu")
    load_lora(model, run)
    assert torch.allclose(drawn(model), tuned, atol=1e-6)
    with safe_open(run / "pytorch_lora_weights.safetensors", "pt") as file:
        header, keys = json.loads(file.metadata()["lora_adapter_metadata"]), list(file.keys())
    assert header["unet.r"] == {"continue": 3, "beneath": 7, "merge": 4}[mode]
    assert any(key.startswith("text_encoder.") for key in keys) == (mode != "merge")


def test_an_interrupted_run_continues_to_the_same_end(runs, world, style, tmp_path):
    argv = flags(world, "dpo", tmp_path / "run", *SHORT, f"--lora={style}", "--lora_mode=continue")
    assert train(argv, stop_at(2))[0] == 128 + 15
    assert train([*argv, "--resume_from_checkpoint=latest"])[0] == 0
    assert list(differences(tmp_path / "run", end_of(runs / "continue"))) == []


def test_another_lora_is_not_resumed_and_the_run_keeps_its_copy(runs, world, style, tmp_path):
    path = tmp_path / "style.safetensors"
    path.write_bytes(style.read_bytes())
    argv = flags(world, "dpo", tmp_path / "run", *SHORT, f"--lora={path}", "--lora_mode=merge")
    assert train(argv, stop_at(2))[0] == 128 + 15
    kohya_file(world, path, scale=0.5)
    code, said = train([*argv, "--resume_from_checkpoint=latest"])
    assert code == 1 and f"the LoRA of --lora changed: other content under --lora {path}" in said
    without = [word for word in argv if not word.startswith("--lora")]
    code, said = train([*without, "--resume_from_checkpoint=latest"])
    assert code == 1 and "the LoRA of --lora changed" in said
    code, said = train([*argv, f"--lora={tmp_path / 'run' / 'starting_lora'}", "--resume_from_checkpoint=latest"])
    assert code == 0, said
    path.unlink()
    assert torch.equal(of(contender(str(tmp_path / "run"))), of(contender(str(runs / "merge"))))


@pytest.fixture(scope="module")
def plain(world):
    run = world / "plain"
    assert train(flags(world, "dpo", run, *SHORT))[0] == 0
    return run


def test_text_encodings_of_another_encoder_are_others(runs, plain, style):
    """The cache is shared, so its key must tell the text encoders apart."""
    manifests = [json.loads(path.read_text()) for path in runs.glob("cache-dpo/encoded/*/manifest.json")]
    base = load_pipeline(runs / "model", device="cpu").fingerprint()
    assert {entry["identity"]["model"] for entry in manifests} >= {base, f"{base}+{adapter_digest(style)}"}


def test_a_lora_for_a_merged_model_is_loaded_on_that_model_only(runs, style, tmp_path):
    model = load_pipeline(runs / "model", device="cpu")
    with pytest.raises(ValueError, match="was trained on a model with another LoRA merged into it"):
        load_lora(model, runs / "merge")
    argv = ("sample", "--model", runs / "model", *DRAW, "--lora", runs / "merge", "--out", tmp_path / "out")
    code, _, said = run_quietly(*argv)
    assert code == 1 and adapter_digest(style) in said and "starting_lora" in said
    argv = flags(runs, "dpo", runs / "merge", *SHORT, f"--lora={runs / 'merge'}", "--overwrite_output_dir=true")
    assert cli.main(argv) == 2 and (runs / "merge" / "starting_lora").is_dir()


def test_full_training_and_other_kinds_merge_first(world, tmp_path):
    path = kohya_file(world, tmp_path / "loha.safetensors", "LoHa")
    code, said = train(flags(world, "dpo", tmp_path / "run", *SHORT, f"--lora={path}"))
    assert code == 1 and "is of LoHa" in said and "--lora_mode merge trains on the merged model" in said
    argv = flags(world, "dpo", tmp_path / "run", *SHORT, f"--lora={path}", mode="full")
    code, said = train(argv)
    assert code == 2 and "give --lora_mode merge" in said
    assert train([*argv, "--lora_mode=merge"])[0] == 0
    rows = record.read(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    due = load_pipeline(world / "model", device="cpu")
    merge_lora(due, path)
    assert torch.equal(of(base_contender(contender(str(tmp_path / "run")))), drawn(due))
    model = load_pipeline(world / "model", device="cpu")
    load_tuned(model, tmp_path / "run")
    assert torch.equal(model.encode_text(["a"]), due.encode_text(["a"]))


@pytest.mark.parametrize("method", ["d3po", "prdp"])
def test_online_methods_start_with_ratio_one(world, style, tmp_path, method):
    code, said = train(flags(world, method, tmp_path / "run", *SHORT[:2], f"--lora={style}", "--max_train_steps=2"))
    assert code == 0, said  # which checks that both ratios are 1 before the first update


def test_names_of_layers_dora_and_rslora(world, tmp_path):
    more = ("--lora_targets=attention,conv_in,ff.net.2", "--use_dora=true", "--use_rslora=true", "--rank=4")
    code, said = train(flags(world, "dpo", tmp_path / "run", *SHORT, *more))
    assert code == 0, said
    with safe_open(tmp_path / "run" / "pytorch_lora_weights.safetensors", "pt") as file:
        header, keys = json.loads(file.metadata()["lora_adapter_metadata"]), list(file.keys())
    assert (header["unet.r"], header["unet.lora_alpha"], header["unet.use_dora"]) == (4, 8.0, True)
    assert "unet.conv_in.lora_magnitude_vector" in keys
    (step,) = (tmp_path / "run" / "checkpoints").iterdir()
    run, saved = contender(str(tmp_path / "run")), contender(str(step))
    assert torch.allclose(of(run), of(saved), atol=1e-6)
    assert not torch.allclose(of(run), of(base_contender(run)), atol=1e-6)


def test_the_lora_of_options_has_the_strength_and_layers_of_pefts():
    from peft import LoraConfig, get_peft_model

    new = NewLora(rank=9, network_alpha=6.0, use_rslora=True)
    with torch.random.fork_rng():
        network = torch.nn.Sequential(torch.nn.Linear(16, 16))
        theirs = get_peft_model(network, LoraConfig(r=9, lora_alpha=6, use_rslora=True, target_modules=["0"]))
    assert new.alpha / new.rank == pytest.approx(theirs.base_model.model[0].scaling["default"])
    assert NewLora(rank=4).alpha == 4 and NewLora.of({"rank": 2, "mode": "lora"}) == NewLora(2)
    assert target_layers("conv_in, to_q,conv_in") == ("conv_in", "to_q")
    assert target_layers("wide") == target_layers("wide,attention") and "conv1" in target_layers("wide")


@pytest.mark.parametrize(
    "more, words",
    [
        (["--lora_targets=attention,"], "an empty name beside a comma"),
        (["--lora_targets=to_qq"], "is named to_qq; similar are .*to_q"),
        (["--lora_targets=norm1"], "no linear layer and no convolution of the UNet is named norm1"),
        (["--lora_targets=attn1"], "no linear layer and no convolution of the UNet is named attn1"),
        (["--lora=/nowhere/x.safetensors"], "is not there: give a file, a folder of peft, or a run"),
        (["--lora_partial=true"], "--lora_partial is about the file of --lora"),
        (["--lora_file_alpha=4"], "--lora_file_alpha is about the file of --lora"),
        (["--mode=full", "--use_dora=true"], "are for --mode lora"),
        (["--lora={style}", "--lora_mode=beneath", "--use_dora=true"], "leave out --use_dora"),
        (["--lora_mode=stack"], "continue, beneath, merge"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(world, style, tmp_path, capsys, more, words):
    argv = flags(world, "dpo", tmp_path / "run", *SHORT, *(word.format(style=style) for word in more))
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and re.search(words, said), said
    assert not (tmp_path / "run").exists()


def run_quietly(*argv):
    out, log = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
        return cli.main([str(word) for word in argv]), out.getvalue(), log.getvalue()


def picture(folder):
    return torch.tensor(list(decode_image((folder / "0000-00.png").read_bytes()).getdata())).float()


def test_sample_draws_with_a_lora_and_its_text_encoder(world, style, runs, tmp_path):
    model = ("sample", "--model", world / "model", *DRAW)
    assert run_quietly(*model, "--out", tmp_path / "base")[0] == 0
    code, said, _ = run_quietly(*model, "--lora", style, "--out", tmp_path / "style")
    assert code == 0 and f"lora {style}: LoRA, merged" in said
    about = json.loads((tmp_path / "style" / "samples.json").read_text())
    assert about["lora"] == str(style) and about["weights"].startswith("base+") and "+" in about["fingerprint"]
    assert (picture(tmp_path / "style") - picture(tmp_path / "base")).abs().max() > 8
    for other in ((), ("--lora", runs / "continue")):
        code, _, said = run_quietly(*model, *other, "--out", tmp_path / "style")
        assert code == 1 and "holds pictures made with other" in said and "weights" in said
    # A run that was trained on the merged model draws with it by itself.
    assert run_quietly("sample", "--run", runs / "merge", *DRAW, "--out", tmp_path / "run")[0] == 0
    assert (picture(tmp_path / "run") - picture(tmp_path / "style")).abs().max() < 64


def test_a_file_that_needs_help_names_the_option(world, style, tmp_path):
    tensors = load_file(style)
    first = sorted(tensors)[0].split(".")[0]
    some = write(tmp_path / "some.safetensors", {k: v for k, v in tensors.items() if not k.startswith(first)})
    argv = ("sample", "--model", world / "model", *DRAW, "--lora", some, "--out", tmp_path / "out")
    code, _, said = run_quietly(*argv)
    assert code == 1 and "--lora_partial true takes what fits" in said and "load_lora" not in said
    assert run_quietly(*argv, "--lora_partial=true")[0] == 0
    model = load_pipeline(world / "model", device="cpu")
    names = {"lora_unet_" + n.replace(".", "_"): n for n, _ in model.unet.named_modules()}
    halves = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    renamed = {
        f"base_model.model.{names[stem]}.{halves[part]}": value
        for key, value in tensors.items()
        for stem, _, part in [key.partition(".")]
        if stem in names and part in halves
    }
    peft = write(tmp_path / "peft" / "adapter_model.safetensors", renamed)
    argv = ("sample", "--model", world / "model", *DRAW, "--lora", peft.parent, "--out", tmp_path / "peft out")
    code, _, said = run_quietly(*argv)
    assert code == 1 and "alpha is unknown" in said and "--lora_file_alpha NUMBER" in said
    assert run_quietly(*argv, "--lora_file_alpha=2")[0] == 0
    code, _, said = run_quietly("sample", "--run", style, *DRAW, "--out", tmp_path / "run")
    assert code == 1 and "--lora takes the file of a LoRA" in said


QUICK = ("--num_prompts", "2", "--steps", "1", "--sampler", "ddim", "--reward", "none", "--features", "none",
         "--device", "cpu")  # fmt: skip


def test_evaluate_takes_the_file_of_a_lora(world, style, tmp_path):
    code, _, said = run_quietly("evaluate", style, *QUICK, "--output_dir", tmp_path / "out")
    assert code == 2 and "is a LoRA: --model says which model it belongs to" in said
    argv = ("evaluate", style, "--model", world / "model", *QUICK, "--output_dir", tmp_path / "out")
    assert run_quietly(*argv)[0] == 0
    models = json.loads((tmp_path / "out" / "report.json").read_text())["facts"]["models"]
    assert models["base"]["weights"] == "base" and models["base"]["fingerprint"] + "+" in models["tuned"]["fingerprint"]


def test_evaluate_gives_every_model_the_lora(style, plain, tmp_path):
    assert yaml.safe_load((plain / "config.yaml").read_text())["adapter"]["lora"] is None
    argv = ("evaluate", plain, "--lora", style, *QUICK, "--output_dir", tmp_path / "out")
    assert run_quietly(*argv)[0] == 0
    models = json.loads((tmp_path / "out" / "report.json").read_text())["facts"]["models"]
    assert models["base"]["fingerprint"] == models["tuned"]["fingerprint"] and "+" in models["base"]["fingerprint"]
