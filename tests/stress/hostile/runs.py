"""Hostile adapters, configurations and checkpoints, for `sample` and `train`."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusion_align.train.checkpoints import store as room
from stress.hostile.cases import ROOT, case, write
from stress.hostile.models import sample

ADAPTER = "pytorch_lora_weights.safetensors"


def run(home: Path, config: str = "verb: train dpo\nmodel:\n  pretrained_model_name_or_path: tiny\n") -> Path:
    write(home / "run/config.yaml", config)
    return home / "run"


@case
def an_adapter_that_is_a_pickle(home, trap):
    write(run(home) / ADAPTER, pickle.dumps(trap))
    return sample(home, "--run", str(home / "run"))


@case
def an_adapter_under_its_old_name(home, trap):
    torch.save({"x": trap}, run(home) / "pytorch_lora_weights.bin")
    return sample(home, "--run", str(home / "run"))


@case
def an_adapter_with_a_hostile_header(home, trap):
    known = '{"unet.r": 1000000000, "unet.lora_alpha": 1, "unet.target_modules": ["to_q"], "a": ' + "[" * 5000
    tensors = {"unet.a.lora.down.weight": torch.zeros(1, 1)}
    save_file(tensors, run(home) / ADAPTER, {"lora_adapter_metadata": known})
    return sample(home, "--run", str(home / "run"))


@case
def an_adapter_with_a_hostile_key(home, trap):
    save_file({"\x1b[2J\n__import__('os')": torch.zeros(1, 1)}, run(home) / ADAPTER)
    return sample(home, "--run", str(home / "run"))


@case
def a_run_whose_configuration_is_a_program(home, trap):
    folder = run(home, f"model: !!python/object/apply:os.system ['{trap.command}']\n")
    write(folder / ADAPTER, b"")
    return sample(home, "--run", str(folder))


def planned(home: Path, text: str) -> list[str]:
    return ["train", "dpo", "--config", str(write(home / "c.yaml", text)), "--dry_run"]


@case
def yaml_that_calls_the_shell(home, trap):
    return planned(home, f"train: !!python/object/apply:os.system ['{trap.command}']\n")


@case
def yaml_that_makes_an_object(home, trap):
    return planned(home, f"train:\n  seed: !!python/object/new:os.system ['{trap.command}']\n")


@case
def yaml_that_imports(home, trap):
    write(home / "evil.py", trap.python)
    return planned(home, "train: !!python/module:evil\nmodel: !!python/name:evil.x\n")


@case
def yaml_that_unfolds(home, trap):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    return planned(home, bomb)


@case
def yaml_without_end(home, trap):
    return planned(home, "train: " + "[" * 100_000)


@case
def a_preset_by_a_path(home, trap):
    write(home / "evil.yaml", f"train: !!python/object/apply:os.system ['{trap.command}']\n")
    return ["train", "dpo", "--preset", f"../../../../../..{home / 'evil'}", "--dry_run"]


@case
def a_configuration_that_names_a_reward_in_python(home, trap):
    """It names a Python file as the reward, which only the command line may."""
    write(home / "mine.py", trap.python + "def f(images, prompts):\n    return [0.0] * len(prompts)\n")
    text = (
        f"verb: train ddpo\nmodel:\n  pretrained_model_name_or_path: tiny\nreward:\n  reward: python:{home}/mine.py:f\n"
    )
    write(home / "c.yaml", text)
    prompts = write(home / "prompts.txt", "a large red circle\n")
    words = "train ddpo --preset tiny --device cpu --max_train_steps 1 --config".split()
    return [*words, str(home / "c.yaml"), "--prompts", str(prompts), "--output_dir", str(home / "out")]


def checkpoint(home: Path) -> Path:
    """An intact checkpoint, to be changed."""
    run(home)
    return room.save(home / "run/checkpoints", 1, {"model": {"a": torch.zeros(2)}}, {"identity": {}, "progress": {}})


def resumed(home: Path, place: Path) -> list[str]:
    return ["train", "dpo", "--config", str(home / "run/config.yaml"), "--train_data_dir",
            str(ROOT / "assets/tiny_pairs.parquet"), "--output_dir", str(home / "run"), "--device", "cpu",
            "--resume_from_checkpoint", str(place)]  # fmt: skip


def resealed(place: Path, change) -> None:
    """Change a manifest's body and update its digest, as anyone who writes a checkpoint can."""
    manifest = json.loads((place / "manifest.json").read_text())
    change(manifest["body"])
    digest = hashlib.sha256(json.dumps(manifest["body"], sort_keys=True).encode()).hexdigest()
    write(place / "manifest.json", json.dumps(manifest | {"sha256": digest}, indent=1))


@case
def a_checkpoint_with_paths(home, trap):
    place = checkpoint(home)
    write(home / "secret.safetensors", b"x")
    seal = {"size": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    resealed(place, lambda body: body["files"].update({"../../../secret.safetensors": seal}))
    return resumed(home, place)


@case
def a_checkpoint_with_a_link(home, trap):
    place = checkpoint(home)
    tensors = next(place.glob("*.safetensors"))
    shutil.move(tensors, home / "elsewhere")
    tensors.symlink_to(home / "elsewhere")
    return resumed(home, place)


@case
def a_checkpoint_with_pickles_beside(home, trap):
    place = checkpoint(home)
    for name in ("optimizer.pt", "random_states_0.pkl", "scheduler.bin"):
        torch.save({"x": trap}, place / name)
    return resumed(home, place)


@case
def a_checkpoint_of_nonsense(home, trap):
    place = checkpoint(home)
    write(place / "manifest.json", {"body": {"format": [], "step": "1", "files": [1, 2]}, "sha256": 3})
    return resumed(home, place)


@case
def a_checkpoint_nested_without_end(home, trap):
    place = checkpoint(home)
    write(place / "manifest.json", "[" * 200_000)
    return resumed(home, place)


@case
def a_folder_of_pickles_for_a_checkpoint(home, trap):
    run(home)
    place = home / "run/checkpoints/checkpoint-1"
    place.mkdir(parents=True)
    torch.save({"x": trap}, place / "pytorch_model.bin")
    return resumed(home, place)
