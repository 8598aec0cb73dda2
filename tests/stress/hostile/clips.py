"""Hostile folders of reward models, for `reward score`."""

import json
import shutil
from pathlib import Path

import torch

from diffusion_align.rewards.step_aware_model import save_step_aware, start_step_aware
from stress.hostile.cases import ROOT, Trap, case, write
from stress.hostile.weights import VOCABULARY, saved, score


def clip_folder(home: Path) -> Path:
    """A copy of the embedded reward."""
    return Path(shutil.copytree(ROOT / "assets" / "tiny_clip", home / "clip"))


def with_program(folder: Path, trap: Trap) -> None:
    """A tokenizer whose class is code in the folder."""
    write(folder / "evil.py", trap.python + "from transformers import CLIPTokenizer\nclass Evil(CLIPTokenizer): pass\n")
    named = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    write(folder / "tokenizer_config.json", {"model_max_length": 24, **named})


def changed_clip(home: Path, text: dict, vision: dict | None = None) -> Path:
    folder = clip_folder(home)
    content = json.loads((folder / "open_clip_config.json").read_text())
    content["model_cfg"]["text_cfg"] |= text
    content["model_cfg"]["vision_cfg"] |= vision or {}
    write(folder / "open_clip_config.json", content)
    return folder


@case
def an_open_clip_folder_that_trusts_itself(home, trap):
    folder = changed_clip(home, {"tokenizer_kwargs": {"trust_remote_code": True}})
    with_program(folder, trap)
    return score(home, str(folder))


@case
def an_open_clip_folder_with_a_program(home, trap):
    with_program(clip_folder(home), trap)
    return score(home, str(home / "clip"))


@case
def an_open_clip_folder_of_a_billion_layers(home, trap):
    return score(home, str(changed_clip(home, {"layers": 10**9})))


@case
def an_open_clip_folder_with_a_pickle(home, trap):
    folder = clip_folder(home)
    (folder / "open_clip_model.safetensors").unlink()
    saved(folder / "open_clip_pytorch_model.bin", {"logit_scale": trap})
    return score(home, str(folder))


@case
def a_tokenizer_with_a_program_beside_image_reward(home, trap):
    with_program(home, trap)
    write(home / "vocab.txt", VOCABULARY)
    saved(home / "ImageReward.pt", {"a": torch.zeros(1)})
    return score(home, f"imagereward={home}")


def step_aware(home: Path, trap: Trap) -> Path:
    """A preference model of SPO whose tokenizer is code in its folder."""
    folder = save_step_aware(start_step_aware("tiny", device="cpu"), home / "spm")
    content = json.loads((folder / "open_clip_config.json").read_text())
    content["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    write(folder / "open_clip_config.json", content)
    with_program(folder, trap)
    return folder


@case
def a_preference_model_that_trusts_itself(home, trap):
    prompts = write(home / "prompts.txt", "a small red circle\n")
    return [*"train spo --model tiny --device cpu --num_rounds 1 --prompts_per_round 1 --steps 3 --children 2".split(),
            "--prompts", str(prompts), "--output_dir", str(home / "run"), "--start", "1",
            "--preference_model", str(step_aware(home, trap))]  # fmt: skip


@case
def a_reward_to_train_on_that_trusts_itself(home, trap):
    folder = changed_clip(home, {"tokenizer_kwargs": {"trust_remote_code": True}})
    with_program(folder, trap)
    return [*"reward train-spm --model tiny --dataset_name tiny --device cpu --max_train_samples 8".split(),
            "--max_train_steps", "1", "--held_out", "0", "--reward", str(folder),
            "--output_dir", str(home / "out")]  # fmt: skip
