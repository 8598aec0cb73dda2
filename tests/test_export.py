"""The command `export`: what it takes, what it refuses with which cure, and the files that it leaves."""

import hashlib
import os
import shutil
import stat

import pytest
import torch
from helpers_export import RANK, Family, a1111, make_run, read_file, sd15, sdxl, update_of
from helpers_model_files import make_model, single
from helpers_tiny import make_tiny_folder
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from diffusion_align import cli
from diffusion_align.models import add_lora, load_lora, load_pipeline, save_lora, save_unet
from diffusion_align.models.export import write
from diffusion_align.models.prompts.reading import Reading
from diffusion_align.rng import normal
from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.vocabulary import LORA_TARGETS

TO = ("diffusers", "kohya", "comfyui", "peft", "merged", "single-file")
FILES = ("diffusers", "kohya", "comfyui", "single-file")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return Family("tiny", make_tiny_folder(tmp_path_factory.mktemp("export") / "model"), ())


def export(capsys, *words):
    """Exit code and stderr."""
    capsys.readouterr()
    code = cli.main(["export", *map(str, words)])
    return code, capsys.readouterr().err


def name_of(to, place):
    return place / (f"{to}.safetensors" if to in FILES else to)


def files_of(path):
    return {file.relative_to(path): file.read_bytes() for file in ([path] if path.is_file() else path.rglob("*"))
            if file.is_file()}  # fmt: skip


@pytest.mark.parametrize("to", TO)
def test_equal_runs_make_equal_files_with_the_mode_of_the_umask(family, tmp_path, capsys, to):
    before = os.umask(0o027)
    try:
        for run in ("one", "two"):
            make_run(family, tmp_path / run, 8.0)
            assert export(capsys, tmp_path / run, "--to", to, "--output", name_of(to, tmp_path / f"out-{run}"))[0] == 0
    finally:
        os.umask(before)
    one, two = (files_of(name_of(to, tmp_path / f"out-{run}")) for run in ("one", "two"))
    assert one == two and one
    for file in (tmp_path / "out-one").rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) == (0o640 if file.is_file() else 0o750), file
    assert not list(tmp_path.rglob(".*"))


def test_the_diffusers_file_of_a_run_is_the_run_s_own(family, tmp_path, capsys):
    """Of the layers that a training knows by name."""
    model = load_pipeline(family.folder, device="cpu")
    add_lora(model.unet, RANK, targets=LORA_TARGETS["wide"])
    own = save_lora(model.unet, tmp_path)
    words = ("--model", family.folder, "--to", "diffusers", "--output", tmp_path / "again.safetensors")
    assert export(capsys, own, *words)[0] == 0
    assert (tmp_path / "again.safetensors").read_bytes() == own.read_bytes()


def test_what_a_kohya_file_says_of_itself(tmp_path, capsys):
    real = sd15(tmp_path / "stable")
    make_run(real, tmp_path / "run", 2.0)
    (tmp_path / "run" / "config.yaml").write_text(
        f"verb: train dpo\nmodel:\n  pretrained_model_name_or_path: {real.folder}\n"
        "data:\n  resolution: 512\ntext:\n  clip_skip: 2\n"
        "train:\n  seed: 3\n  learning_rate: 0.0001\n  loss_type: ipo\n  use_ema: true\n"
    )
    path = tmp_path / "kohya.safetensors"
    assert export(capsys, tmp_path / "run", "--to", "kohya", "--output", path) == (0, "")
    tensors, header = read_file(path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert header.pop("sshs_model_hash") == hashlib.sha256(data[start:]).hexdigest()  # as A1111 computes it
    assert len(header.pop("sshs_legacy_hash")) == 8
    assert header == {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_network_args": '{"conv_dim": "4", "conv_alpha": "2"}',
        "ss_sd_model_name": "stable",
        "ss_resolution": "(512, 512)",
        "ss_seed": "3",
        "ss_clip_skip": "2",
        "ss_learning_rate": "0.0001",
        "ss_training_comment": "diffusion_align train dpo, loss_type ipo, moving average of the weights",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "512x512",
        "modelspec.title": "LoRA from stable, by train dpo",
    }
    assert all(tensor.dtype == torch.float32 and tensor.ndim == 0 for key, tensor in tensors.items() if "alpha" in key)


def test_sdxl_is_named_as_such_and_a_model_of_other_widths_is_not_named(family, tmp_path, capsys):
    make_run(sdxl(tmp_path / "xl"), tmp_path / "run", 4.0, targets=("to_q",))
    make_run(family, tmp_path / "tiny", 4.0, targets=("to_q",))
    for run in ("run", "tiny"):
        assert export(capsys, tmp_path / run, "--to", "kohya", "--output", tmp_path / f"{run}.safetensors")[0] == 0
    header = read_file(tmp_path / "run.safetensors")[1]
    assert header["ss_base_model_version"].startswith("sdxl_")  # how A1111 tells SDXL
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert "ss_network_args" not in header
    assert (
        not {"ss_base_model_version", "ss_v2", "modelspec.architecture"}
        & read_file(tmp_path / "tiny.safetensors")[1].keys()
    )


def test_an_earlier_export_stays_unless_it_is_to_be_replaced(family, tmp_path, capsys):
    make_run(family, tmp_path / "run", 8.0)
    for to in ("kohya", "peft", "merged"):
        path = name_of(to, tmp_path)
        words = (tmp_path / "run", "--to", to, "--output", path)
        assert export(capsys, *words)[0] == 0
        first = files_of(path)
        code, said = export(capsys, *words, "--dtype", "bf16")
        assert code == 2 and "--overwrite replaces it" in said and files_of(path) == first
        assert export(capsys, *words, "--dtype", "bf16", "--overwrite")[0] == 0
        assert files_of(path) != first and files_of(path).keys() == first.keys()
        if to != "kohya":
            (path / "mine.txt").write_text("kept")
            code, said = export(capsys, *words, "--overwrite")
            assert code == 2 and "holds mine.txt" in said and str(path / f"run-{to}-fp32") in said
            assert (path / "mine.txt").read_text() == "kept"
    assert not list(tmp_path.glob(".*"))


def test_a_failed_export_leaves_what_was_there(family, tmp_path, capsys, monkeypatch):
    make_run(family, tmp_path / "run", 8.0)

    def full(*args, **more):
        args[0].mkdir(exist_ok=True)
        (args[0] / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    for to in ("kohya", "merged"):
        path = name_of(to, tmp_path)
        assert export(capsys, tmp_path / "run", "--to", to, "--output", path)[0] == 0
        first = files_of(path)
        with monkeypatch.context() as patch:
            patch.setattr(write, "write_tensors", full)
            patch.setattr(write, "write_model", full)
            code, said = export(capsys, tmp_path / "run", "--to", to, "--output", path, "--overwrite", "--dtype=bf16")
        assert code == 1 and "No space left" in said and files_of(path) == first
    assert not list(tmp_path.glob(".*"))


def test_a_file_gets_a_name_of_its_own_in_a_folder(family, tmp_path, capsys, monkeypatch):
    make_run(family, tmp_path / "run", 8.0, targets=("to_q",))
    (tmp_path / "loras").mkdir()
    monkeypatch.chdir(tmp_path)
    assert export(capsys, "run", "--to", "comfyui", "--dtype", "bf16", "--output", "loras")[0] == 0
    assert export(capsys, "run", "--to", "comfyui")[0] == 0
    assert export(capsys, "run", "--to", "peft")[0] == 0
    assert (tmp_path / "loras" / "run-comfyui-bf16.safetensors").is_file()
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == [
        "run-comfyui-fp32.safetensors",
        "run-peft-fp32",
    ]
    code, said = export(capsys, "run", "--to", "comfyui", "--output", "mine.pt")
    assert code == 2 and "ends in .safetensors" in said
    code, said = export(
        capsys, "run", "--to", "peft", "--output", "exports/run-comfyui-fp32.safetensors", "--overwrite"
    )
    assert code == 2 and "is a file, and this export is a folder" in said


def save_checkpoint(family, run, model, ema=None):
    """A checkpoint of a run that was trained from the family's model, with long prompts in chunks."""
    base = load_pipeline(family.folder, device="cpu")
    base.reading = Reading("chunk", 3)
    state = {"identity": {"model": base.fingerprint()}}
    return checkpoint.save(run / "checkpoints", 20, {"model": model} | ({"ema": ema} if ema else {}), state)


def as_parameters(pairs):
    return {f"{layer}.lora_{half}.default.weight": tensor for layer, pair in pairs.items()
            for half, tensor in zip("AB", pair, strict=True)}  # fmt: skip


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_is_exported_as_its_run_would_be(family, tmp_path, capsys, ema):
    run = tmp_path / "run"
    pairs = make_run(family, run, 8.0, targets=("to_q", "to_k", "to_v", "to_out.0"))
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text() + f"adapter:\n  mode: lora\n  rank: {RANK}\n  network_alpha: 8.0\n"
        "  lora_targets: attention\n"
    )
    raw = {layer: (down, 2 * up) for layer, (down, up) in pairs.items()}
    place = save_checkpoint(family, run, as_parameters(raw), as_parameters(pairs) if ema else None)
    (run / "pytorch_lora_weights.safetensors").unlink()
    code, said = export(capsys, run, "--to", "kohya")
    assert code == 1 and "no trained weights yet" in said
    path = tmp_path / "out.safetensors"
    assert export(capsys, place, "--to", "diffusers", "--output", path)[0] == 0
    tensors = load_file(path)
    for layer, (_, up) in (pairs if ema else raw).items():
        assert torch.equal(tensors[f"unet.{layer}.lora.up.weight"], up)


def test_the_base_of_a_merge_is_the_one_of_the_training(tmp_path, capsys):
    family = Family("tiny", make_tiny_folder(tmp_path / "model"), ())
    run = tmp_path / "run"
    pairs = make_run(family, run, 8.0, targets=("to_q",))
    save_checkpoint(family, run, as_parameters(pairs))
    words = ("--to", "merged", "--output", tmp_path / "merged")
    assert export(capsys, run, *words)[0] == 0
    other = ["--pretrained_vae_model_name_or_path", str(family.folder), "--prediction_type", "v_prediction"]
    drawn = ["sample", "--run", str(run), "--prompt", "x", "--steps", "1", "--device", "cpu", *other]
    assert cli.main([*drawn, "--out", str(tmp_path / "other")]) == 0  # of the same files
    capsys.readouterr()
    scheduler = family.folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("epsilon", "v_prediction"))
    code, said = export(capsys, run, *words, "--overwrite")
    assert code == 1 and "its files differ" in said and f"--model {family.folder} takes this one" in said
    code, said = export(capsys, run, *words, "--overwrite", "--model", family.folder)
    assert code == 0 and "note:" in said and "--model names it" in said
    assert export(capsys, run, "--to", "kohya", "--output", tmp_path / "x.safetensors") == (0, "")  # no weights of it
    # Pictures are drawn with the model of the training, too.
    drawing = ["--prompt", "a circle", "--steps", "1", "--device", "cpu"]
    for argv in (
        ["sample", "--run", str(run), *drawing, "--out", str(tmp_path / "drawn")],
        ["evaluate", str(run), "--prompts", str(tmp_path / "prompts.txt"), "--num_prompts", "2", "--steps", "1"],
    ):
        (tmp_path / "prompts.txt").write_text("one\ntwo\n")
        assert cli.main(argv) == 1
        assert "its files differ; --model PATH names the right one" in capsys.readouterr().err
        assert cli.main([*argv, "--model", str(family.folder)]) == 0
        assert "it is taken because --model names it" in capsys.readouterr().err


def test_a_run_of_all_weights(family, tmp_path, capsys):
    model = load_pipeline(family.folder, device="cpu")
    for i, parameter in enumerate(model.unet.parameters()):
        parameter.data.add_(normal(parameter.shape, 5, "moved", i) * 0.01)
    save_unet(model.unet, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(f"model:\n  pretrained_model_name_or_path: {family.folder}\n")
    wanted = {key: value.to(torch.bfloat16) for key, value in model.unet.state_dict().items()}
    for to in ("kohya", "comfyui", "peft"):
        code, said = export(capsys, tmp_path / "run", "--to", to)
        assert code == 2 and "not a LoRA" in said and "--to merged" in said
    for to, place in (("diffusers", "own"), ("merged", "whole")):
        words = ("--to", to, "--dtype", "bf16", "--output", tmp_path / place)
        assert export(capsys, tmp_path / "run", *words)[0] == 0
        found = load_file(tmp_path / place / "unet" / "diffusion_pytorch_model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["unet"]
    assert load_pipeline(tmp_path / "whole", device="cpu").prediction_type == "epsilon"
    path = tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "conv_in" not in key}, path)
    code, said = export(capsys, tmp_path / "run", "--to", "diffusers", "--output", tmp_path / "gap")
    assert code == 1 and "tensors are missing, the first is conv_in.bias" in said and not (tmp_path / "gap").exists()


def test_files_of_other_programs(family, tmp_path, capsys):
    """A LoRA for UNet and text encoder, without a run: its model must be named."""
    config = LoraConfig(r=RANK, lora_alpha=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    with torch.random.fork_rng():
        encoder = get_peft_model(CLIPTextModel.from_pretrained(family.folder / "text_encoder"), config)
    texts = get_peft_model_state_dict(encoder)
    tensors = {}
    for key, value in texts.items():
        layer = key.removeprefix("base_model.model.").partition(".lora_")[0].replace(".", "_")
        half = "lora_down" if ".lora_A" in key else "lora_up"
        tensors[f"lora_te_text_model_{layer}.{half}.weight"] = value.contiguous()
    tensors |= {key.replace("lora_down.weight", "alpha"): torch.tensor(2.0) for key in tensors if "down" in key}
    pairs = make_run(family, tmp_path / "run", 8.0, targets=("to_q",))
    for layer, (down, up) in pairs.items():
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(8.0)}
    theirs = tmp_path / "theirs.safetensors"
    save_file(tensors, theirs)
    code, said = export(capsys, theirs, "--to", "kohya")
    assert code == 2 and "--model says which model" in said
    model = ("--model", family.folder)
    path = tmp_path / "kohya.safetensors"
    assert export(capsys, theirs, *model, "--to", "kohya", "--output", path)[0] == 0
    found = load_file(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in found)
    code, said = export(capsys, theirs, *model, "--to", "peft")
    assert code == 1 and "layers for text_encoder, unet" in said and "--to diffusers" in said
    assert export(capsys, theirs, *model, "--to", "diffusers", "--output", tmp_path / "d.safetensors")[0] == 0
    assert export(capsys, theirs, *model, "--to", "merged", "--output", tmp_path / "merged")[0] == 0
    a, b, merged = (load_pipeline(place, device="cpu") for place in (family.folder, family.folder, tmp_path / "merged"))
    load_lora(a, theirs)
    load_lora(b, tmp_path / "d.safetensors")
    prompts = ["a red circle", "a blue square"]
    assert torch.equal(a.encode_text(prompts), b.encode_text(prompts))
    assert torch.allclose(a.encode_text(prompts), merged.encode_text(prompts), atol=1e-5)
    before = load_pipeline(family.folder, device="cpu")
    assert not torch.allclose(before.encode_text(prompts), merged.encode_text(prompts), atol=1e-2)
    for layer, pair in pairs.items():
        old, new = (m.unet.get_parameter(f"{layer}.weight").double() for m in (before, merged))
        assert torch.allclose(new, old + update_of(*pair, 2.0), rtol=2**-23, atol=1e-9)


def test_other_kinds_are_merged_or_refused(family, tmp_path, capsys):
    before = load_pipeline(family.folder, device="cpu")
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    names = [name for name, _ in before.unet.named_modules() if name.endswith("attn1.to_q")]
    tensors = {}
    for name in names:
        out, into = before.unet.get_parameter(f"{name}.weight").shape
        for part, shape in (("w1_a", (out, 2)), ("w1_b", (2, into)), ("w2_a", (out, 2)), ("w2_b", (2, into))):
            tensors[f"lora_unet_{name.replace('.', '_')}.hada_{part}"] = normal(shape, 1, name, part)
        tensors[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(1.0)
    path = tmp_path / "loha.safetensors"
    save_file(tensors, path)
    for to in ("kohya", "comfyui", "peft", "diffusers"):
        code, said = export(capsys, path, "--model", family.folder, "--to", to)
        assert code == 1 and "is of LoHa" in said and "--to merged" in said
    assert export(capsys, path, "--model", family.folder, "--to", "merged", "--output", tmp_path / "m")[0] == 0
    stem = f"lora_unet_{layer.replace('.', '_')}.hada_"
    product = (tensors[stem + "w1_a"] @ tensors[stem + "w1_b"]) * (tensors[stem + "w2_a"] @ tensors[stem + "w2_b"])
    after = load_pipeline(tmp_path / "m", device="cpu").unet.get_parameter(f"{layer}.weight")
    assert torch.allclose(after, before.unet.get_parameter(f"{layer}.weight") + product / 2, atol=1e-5)


@pytest.mark.parametrize("mode", ["merge", "beneath"])
def test_a_run_that_started_from_a_lora(family, tmp_path, capsys, mode):
    """With "merge" its file is an update of the merged model; otherwise the file holds both."""
    run, first = tmp_path / "run", tmp_path / "first"
    start = make_run(family, first, 4.0, targets=("to_q",), size=0.2)
    pairs = make_run(family, run, 8.0, targets=("to_q", "to_k"))
    config = (run / "config.yaml").read_text() + f"adapter:\n  mode: lora\n  lora: {first}\n  lora_mode: {mode}\n"
    (run / "config.yaml").write_text(config)
    shutil.copytree(first, run / "starting_lora")
    code, said = export(capsys, run, "--to", "kohya", "--output", tmp_path / "kohya.safetensors")
    assert code == 0 and ("use that LoRA beside this file" in said) == (mode == "merge")
    assert export(capsys, run, "--to", "merged", "--output", tmp_path / "merged")[0] == 0
    before, after = (load_pipeline(place, device="cpu").unet for place in (family.folder, tmp_path / "merged"))
    for layer, pair in pairs.items():
        wanted = before.get_parameter(f"{layer}.weight").double() + update_of(*pair, 2.0)
        wanted = wanted + update_of(*start[layer], 1.0) if layer in start and mode == "merge" else wanted
        assert torch.allclose(after.get_parameter(f"{layer}.weight").double(), wanted, rtol=2**-22, atol=1e-7)
    place = save_checkpoint(family, run, as_parameters(pairs))
    code, said = export(capsys, place, "--to", "diffusers")
    assert mode == "merge" or (code == 2 and "export the run itself" in said)


def test_a_dora_goes_where_it_is_read(family, tmp_path, capsys):
    model = load_pipeline(family.folder, device="cpu")
    for i, parameter in enumerate(add_lora(model.unet, RANK, 8.0, ("to_q", "conv1"), dora=True)):
        parameter.data.mul_(1.5).add_(normal(parameter.shape, 9, "moved", i) * 0.1)
    own = save_lora(model.unet, tmp_path)
    words = (own, "--model", family.folder)
    for to in ("kohya", "comfyui"):
        code, said = export(capsys, *words, "--to", to)
        assert code == 1 and "is of DoRA" in said and "--to merged" in said
    for to in ("diffusers", "peft", "merged"):
        assert export(capsys, *words, "--to", to, "--output", name_of(to, tmp_path / "out"))[0] == 0
    assert {key: value.tolist() for key, value in load_file(own).items()} == {
        key: value.tolist() for key, value in load_file(tmp_path / "out" / "diffusers.safetensors").items()
    }
    with torch.random.fork_rng():
        base = load_pipeline(family.folder, device="cpu").unet
        theirs = PeftModel.from_pretrained(base, tmp_path / "out" / "peft")
    x, t, text = normal((1, 4, 8, 8), 0, "x"), torch.tensor([500]), normal((1, 16, 32), 0, "text")
    with torch.no_grad():
        wanted = model.unet(x, t, text).sample
        merged = load_pipeline(tmp_path / "out" / "merged", device="cpu").unet
        assert not torch.allclose(load_pipeline(family.folder, device="cpu").unet(x, t, text).sample, wanted, atol=1e-2)
        assert torch.allclose(theirs(x, t, text).sample, wanted, atol=1e-5)
        assert torch.allclose(merged(x, t, text).sample, wanted, atol=1e-5)


def test_a_precision_that_cannot_hold_the_values_is_refused(family, tmp_path, capsys):
    make_run(family, tmp_path / "small", 8.0, targets=("to_q",), size=1e-7)
    make_run(family, tmp_path / "large", 8.0, targets=("to_q",), size=1e5)
    for run, words in (("small", "too small"), ("large", "which float16 cannot hold")):
        code, said = export(capsys, tmp_path / run, "--to", "kohya", "--dtype", "fp16")
        assert code == 1 and words in said and "give --dtype bf16 or --dtype fp32" in said
        assert (
            export(capsys, tmp_path / run, "--to=kohya", "--dtype=bf16", f"--output={tmp_path / run}.safetensors")[0]
            == 0
        )
    code, said = export(capsys, tmp_path / "large", "--to", "merged", "--dtype", "fp16")
    assert code == 1 and "cannot hold" in said and "unet: down_blocks" in said


def test_what_is_asked_for_is_said_in_one_line(family, tmp_path, capsys):
    for words, cure in (
        ([], "which run? diffusion-align export RUN_FOLDER"),
        ([tmp_path], "to which format? --to diffusers, kohya"),
        ([tmp_path, "--to", "khoya"], "did you mean kohya?"),
        ([tmp_path / "none", "--to", "kohya"], "no such run, checkpoint or model"),
        ([tmp_path, "--to", "kohya"], "is not a run folder"),
        ([family.folder, "--to", "kohya"], "is a model that was not trained here"),
    ):
        code, said = export(capsys, *words)
        assert code in (1, 2) and cure in said and said.count("\n") == 1, said


def test_layers_that_kohya_does_not_train_are_told(tmp_path, capsys):
    real = sd15(tmp_path / "model")
    pairs = make_run(real, tmp_path / "run", 8.0, targets=("conv_in", "time_embedding.linear_1", "to_q"))
    path = tmp_path / "kohya.safetensors"
    code, said = export(capsys, tmp_path / "run", "--to", "kohya", "--output", path)
    assert code == 0 and "note: 2 layers, such as conv_in, have no LoRA in kohya's own scripts" in said
    assert a1111(real, load_file(path)).keys() == pairs.keys()


def test_an_alpha_that_nothing_tells_is_asked_for(family, tmp_path, capsys):
    pairs = make_run(family, tmp_path / "run", 8.0, targets=("to_q",))
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.{layer}.lora_{half}.weight": tensor for layer, pair in pairs.items()
               for half, tensor in zip("AB", pair, strict=True)}, path)  # fmt: skip
    words = (path, "--model", family.folder, "--to", "kohya", "--output", tmp_path / "out.safetensors")
    code, said = export(capsys, *words)
    assert code == 1 and "alpha is unknown" in said and "or give --alpha" in said and "load_lora" not in said
    assert export(capsys, *words, "--alpha", "6")[0] == 0
    assert {float(value) for key, value in load_file(words[-1]).items() if key.endswith(".alpha")} == {6.0}
    left = {key: value for key, value in load_file(words[-1]).items() if "mid_block" not in key}
    save_file(left, tmp_path / "part.safetensors")
    code, said = export(capsys, tmp_path / "part.safetensors", "--model", family.folder, "--to", "comfyui")
    assert code == 1 and "completely or not at all" in said and "allow_partial" not in said


def test_the_base_may_be_a_single_file(tmp_path, capsys):
    """Everything is as from the folder of the same model."""
    folder = make_model(tmp_path / "model", "SDXL")
    file = single(folder, tmp_path / "model.safetensors", "SDXL", torch.float32)
    make_run(Family("SDXL", folder, ()), tmp_path / "run", 8.0, targets=("to_q",))
    for to in ("kohya", "merged", "single-file"):
        made = []
        for number, base in enumerate((folder, file)):
            place = name_of(to, tmp_path / f"{to}-{number}")
            assert export(capsys, tmp_path / "run", "--model", base, "--to", to, "--output", place)[0] == 0
            files = place.parent.rglob("*.safetensors")
            made.append({path.relative_to(place.parent): load_file(path) for path in files})
        one, other = made
        assert one.keys() == other.keys() and len(one) == (4 if to == "merged" else 1)
        for name, tensors in one.items():
            assert tensors.keys() == other[name].keys()
            assert all(torch.equal(tensor, other[name][key]) for key, tensor in tensors.items())
