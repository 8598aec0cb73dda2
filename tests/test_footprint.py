"""Ranks and batches that cannot be: refused by arithmetic, which is held against what the networks really hold."""

import dataclasses
import json
from dataclasses import astuple

import pytest
import torch
from helpers_sdxl import make_tiny_sdxl_folder
from helpers_tiny import make_tiny_folder

from diffusion_align import cli
from diffusion_align.commands import footprint
from diffusion_align.commands.model_facts import read_model_facts
from diffusion_align.models import add_lora, load_pipeline
from diffusion_align.models.hub import asset
from diffusion_align.models.lora.rank import RankError, require_rank
from diffusion_align.options import TrainD3po, TrainDpo, TrainRankdpo, TrainSpo

MAKERS = {"small": make_tiny_folder, "sdxl": make_tiny_sdxl_folder, "embedded": lambda path: asset("tiny")}


@pytest.fixture(scope="module", params=MAKERS)
def facts_and_model(request, tmp_path_factory):
    folder = MAKERS[request.param](tmp_path_factory.mktemp("model") / "model")
    return read_model_facts(str(folder)), load_pipeline(folder, device="cpu")


def refused(capsys, *argv, code=2):
    assert cli.main([*"train dpo --data tiny --device cpu".split(), *argv]) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


def run(model):
    """One row through the network, as training does it."""
    x = torch.zeros(1, *model.latent_shape(None))
    return model.predict(x, torch.tensor([500]), model.empty_text)


def test_the_skip_connections_are_counted_exactly(facts_and_model):
    facts, model = facts_and_model
    held = []
    for block in model.unet.up_blocks:
        block.register_forward_pre_hook(
            lambda module, args, given: held.extend(given["res_hidden_states_tuple"]), with_kwargs=True
        )
    with torch.no_grad():
        run(model)
    for block in model.unet.up_blocks:
        block._forward_pre_hooks.clear()
    counted = footprint.activations(facts.unet, facts.latent_shape(None)[1], graph=False)
    assert counted == sum(tensor.numel() for tensor in held) > 0


def test_a_graph_holds_at_least_what_is_counted(facts_and_model):
    facts, model = facts_and_model
    add_lora(model.unet, 1)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.unet.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run(model)
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 4
    assert out.requires_grad
    counted = footprint.activations(facts.unet, facts.latent_shape(None)[1], graph=True)
    assert held / 15 < counted < held


def test_the_embedded_model_with_a_batch_of_100_000_is_refused_with_one_that_fits(capsys, monkeypatch):
    monkeypatch.setattr(footprint, "memory_of", lambda device: (24 * 10**9, "this machine"))
    said = refused(capsys, "--model=tiny", "--train_batch_size=100000")
    number = int(said.partition("this machine has 24 GB: ")[2].split()[0])
    assert "--train_batch_size 100000 needs" in said and "pairs at most" in said
    # By hand: 2 rows a pair; 6 copies of 4 x 16 x 16 latents; UNet of 32, 64, 96 channels, one layer a block, attention
    # in the lower two: up path 2 x 2 blocks' tensors and 4 of each of 3 attention blocks.
    numbers = 256 * 32 * 4 + 64 * 64 * (4 + 12) + 16 * 96 * (4 + 12)
    pair = 2 * (6 * 4 * 4 * 16 * 16 + 4 * numbers)
    weights = 2 * read_model_facts("tiny").full_parameters()
    assert number == (24 * 10**9 - weights) // pair
    footprint.require_memory(TrainDpo(train_batch_size=number), read_model_facts("tiny"))
    with pytest.raises(ValueError, match="needs at least"):
        footprint.require_memory(TrainDpo(train_batch_size=number + 1), read_model_facts("tiny"))


def test_what_saves_memory_is_counted():
    facts = read_model_facts("tiny")
    plain = footprint.picture_bytes(TrainDpo(), facts)
    assert footprint.picture_bytes(TrainDpo(gradient_checkpointing=True), facts) < plain
    assert footprint.picture_bytes(TrainDpo(mixed_precision="bf16"), facts) < plain
    assert footprint.picture_bytes(TrainDpo(resolution=128), facts) == 4 * plain
    full = footprint.weights_bytes(TrainDpo(mode="full"), facts)
    assert full == 18 * facts.full_parameters() == 9 * footprint.weights_bytes(TrainDpo(), facts)
    assert footprint.weights_bytes(TrainDpo(mode="full", use_8bit_adam=True), facts) == 12 * facts.full_parameters()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (TrainDpo(train_batch_size=3), ("train_batch_size", 3, "pairs", 2)),
        (TrainRankdpo(train_batch_size=3), ("train_batch_size", 3, "prompts", 2)),
        (TrainRankdpo(one_picture_at_a_time=True), ("train_batch_size", 4, "prompts", 1)),
        (TrainD3po(sample_chunk=1000, prompts_per_round=8), ("sample_chunk", 16, "pictures", 2)),
        (TrainSpo(sample_chunk=40, guidance=1.0), ("sample_chunk", 40, "pictures", 1)),
    ],
)
def test_what_is_in_the_network_at_once(options, expected):
    assert astuple(options.network_batch) == expected


def test_a_model_too_large_for_full_training_is_refused(monkeypatch):
    shapes = {"conv.weight": (1 << 16, 1 << 15)}  # 2.1 billion weights, SDXL's size
    facts = dataclasses.replace(read_model_facts("tiny"), unet_shapes=shapes)
    monkeypatch.setattr(footprint, "memory_of", lambda device: (24 * 10**9, "cuda:0"))
    footprint.require_memory(TrainDpo(), facts)
    with pytest.raises(ValueError, match="needs 38.7 GB for its weights alone and cuda:0 has 24 GB; --mode lora"):
        footprint.require_memory(TrainDpo(mode="full"), facts)


def test_memory_of_a_gpu_is_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 80 * 10**9 + (device.index or 0)))
    assert footprint.memory_of("cuda:3") == (80 * 10**9 + 3, "cuda:3")
    assert footprint.memory_of(None) == (80 * 10**9, "cuda")
    assert footprint.memory_of("cpu")[1] == "this machine" and 1 << 28 < footprint.memory_of("cpu")[0]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_rank_above_a_layers_width_is_refused_before_the_model_is_loaded(tmp_path, capsys, dry, monkeypatch):
    monkeypatch.setattr("diffusion_align.options.verb._function", None)
    folder = make_tiny_folder(tmp_path / "model")
    capsys.readouterr()  # diffusers' own
    said = refused(capsys, f"--model={folder}", "--rank=100000", *dry)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k (32 to 32)" in said
    assert "adapter.rank: rank 100000 is above the width of" in said and said.endswith("give --rank 32 at most")
    assert "--rank 16 at most" in refused(capsys, f"--model={folder}", "--rank=17", "--lora_targets=wide", *dry)
    monkeypatch.undo()
    said = refused(capsys, "--model=tiny", "--rank=65", "--resolution=64", "--dry-run")
    assert said.endswith("give --rank 64 at most")


def test_add_lora_refuses_it_too(tmp_path):
    model = load_pipeline(make_tiny_folder(tmp_path / "model"), device="cpu")
    with pytest.raises(RankError, match="has rank 32 or less") as caught:
        add_lora(model.unet, 33)
    assert caught.value.largest == 32
    assert not getattr(model.unet, "peft_config", None)  # nothing has been put in
    assert len(add_lora(model.unet, 32)) > 0


def test_the_narrower_side_counts_and_a_kernel_counts_its_places():
    shapes = {"a.to_q.weight": (320, 768), "b.conv1.weight": (32, 4, 3, 3), "conv1.bias": (4,), "other.weight": (2, 2)}
    require_rank(shapes, 320, ["to_q"])
    require_rank(shapes, 32, ["to_q", "conv1"])
    with pytest.raises(ValueError, match=r"rank 33 is above the width of b\.conv1 \(36 to 32\)"):
        require_rank(shapes, 33, ["to_q", "conv1"])
    require_rank({}, 10**6, ["to_q"])  # of a model on the hub nothing is known


@pytest.mark.parametrize(
    "words",
    ["train dpo --data tiny", "train d3po --prompts tiny --reward judge", "sample --prompt a",
     "reward train-spm --data tiny"],
)  # fmt: skip
def test_a_plan_refuses_a_model_that_the_run_refuses(words, tmp_path, capsys):
    (tmp_path / "one.safetensors").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    broken = make_tiny_folder(tmp_path / "broken")
    (broken / "unet" / "config.json").write_text(json.dumps({"_class_name": "Flux"}))
    capsys.readouterr()  # diffusers' own
    for name, told in (
        (tmp_path / "one.safetensors", "is not a complete safetensors file"),
        (tmp_path / "none", "no model at"),
        (tmp_path / "empty", "has no model_index.json"),
        (broken, "is of the class 'Flux'"),
    ):
        said = []
        for dry in ([], ["--dry-run"]):
            assert cli.main([*words.split(), "--model", str(name), f"--out{'' if 'sample' in words else 'put_dir'}",
                             str(tmp_path / "out"), *dry]) == 1  # fmt: skip
            said += capsys.readouterr().err.splitlines()
        assert len(said) == 2 and said[0] == said[1] and told in said[0]
    assert not (tmp_path / "out").exists()
