"""Faulty LoRAs in a run's folder, in a checkpoint, and in diffusers' own loader."""

import contextlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from diffusion_align import cli
from diffusion_align.models import add_lora, load_pipeline, save_lora
from diffusion_align.rng import normal
from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.train.checkpoints.manifest import write_manifest
from diffusion_align.train.checkpoints.state import pack, restore
from diffusion_align.train.run import Progress
from stress.lora.faults import ALPHA, DAMAGES, FORMATS, RANK, Tensors, damaged, in_half, read, without_alpha, write

VERBS: dict[str, tuple[str, ...]] = {
    "sample": ("--prompt", "a red circle", "--steps", "1", "--run"),
    "evaluate": ("--num_prompts", "2", "--steps", "1", "--reward", "none", "--features", "none", "--sampler", "ddim"),
}


def _lora(model: Path) -> Any:
    unet = load_pipeline(model, device="cpu").unet
    for i, parameter in enumerate(add_lora(unet, RANK, ALPHA)):
        parameter.data.add_(normal(parameter.shape, 0, "moved", i) * 0.1)
    return unet


def make_run(model: Path, run: Path) -> Path:
    """A minimal run folder for `sample` and `evaluate`: the base model's name and the trained weights."""
    path = save_lora(_lora(model), run)
    (run / "config.yaml").write_text(f"model:\n  pretrained_model_name_or_path: {model}\n")
    return path


def _output_of(argv: list[str]) -> tuple[int, str]:
    """The command's exit code, and its stderr and log."""
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    logging.getLogger("diffusion_align").addHandler(handler)
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()):
            return cli.main(argv), output.getvalue()
    finally:
        logging.getLogger("diffusion_align").removeHandler(handler)


def by_command(verb: str, model: Path, folder: Path, only: Collection[str] = ()) -> Iterator[tuple[str, bool]]:
    """(fault, whether the command is correct) for faults of a run's LoRA. Correct is exit code 1 with one line that
    names the file or, if the file can be repaired, pictures and a line that says so."""
    words = {"sample": "--out", "evaluate": "--output_dir"}
    faults: dict[str, Callable[[Path], None]] = {
        **{what: lambda path, damage=damage: damaged(path, damage) for what, damage in DAMAGES.items()},
        "empty file": lambda path: _emptied(path),
        "none": lambda path: None,
        "float16": in_half,
        "alpha missing": without_alpha,
    }
    for what, fault in faults.items():
        if only and what not in only:
            continue
        run, out = folder / f"{verb} {what}", folder / f"{verb} {what} out"
        path = make_run(model, run)
        fault(path)
        place = [*VERBS[verb], str(run)] if verb == "sample" else [str(run), *VERBS[verb]]
        code, said = _output_of([verb, *place, words[verb], str(out), "--device", "cpu"])
        drawn = bool(list(out.rglob("*.png")))
        if what in ("none", "float16", "alpha missing"):
            yield what, code == 0 and drawn and (str(path) in said) == (what != "none")
        else:
            lines = [line for line in said.splitlines() if line.startswith("diffusion-align: error:")]
            yield what, code == 1 and len(lines) == 1 and str(path) in lines[0] and (verb == "evaluate" or not drawn)


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def resumed(model: Path, folder: Path) -> Iterator[tuple[str, bool]]:
    """(fault, whether it was refused and changed nothing) for faults of a checkpoint's weights: first with the old
    digests, then with sizes and digests made to fit, as if the run had written them so."""
    unet = _lora(model)
    parameters = {key: value for key, value in unet.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(list(parameters.values()))
    tensors, state = pack(parameters, optimizer, None, Progress(step=3))
    faults: dict[str, Callable[[Tensors], None]] = {**DAMAGES, "float16": _halve}
    for fits in (False, True):
        for what, fault in faults.items():
            if fits and what in ("NaN", "infinite"):
                continue  # with new digests any numbers are allowed
            path = checkpoint.save(folder / f"{what} {fits}", 3, tensors, state)
            weights, _ = read(path / "model.safetensors")
            fault(weights)
            write(path / "model.safetensors", weights)
            if fits:
                (path / "manifest.json").unlink()
                write_manifest(path, 3)
            before = [value.detach().clone() for value in parameters.values()]
            try:
                restore(checkpoint.load(path), parameters, optimizer, None)
                refused = False
            except checkpoint.CheckpointError as error:
                refused = "model.safetensors" in str(error)
            same = all(torch.equal(a, b) for a, b in zip(before, parameters.values(), strict=True))
            yield f"{what}{', digests made to fit' if fits else ''}", refused and same


def _halve(tensors: Tensors) -> None:
    for key in tensors:
        tensors[key] = tensors[key].half()


def by_diffusers(model: Path, folder: Path) -> Counter[str]:
    """How many damaged files in the names of diffusers and kohya diffusers' own loader refuses and loads."""
    from diffusers import StableDiffusionPipeline

    found: Counter[str] = Counter()
    unet = _lora(model)
    for name in ("diffusers", "kohya"):
        for what, damage in DAMAGES.items():
            if what.startswith("text encoder"):
                continue  # which diffusers supports
            path = FORMATS[name][0](unet, folder / name / what)
            damaged(path, damage)
            pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
            try:
                pipe.load_lora_weights(str(path.parent), weight_name=path.name)
                found["loaded"] += 1
            except (ValueError, RuntimeError, KeyError, OSError, AttributeError, SafetensorError):
                found["raised"] += 1
    return found


def pictures_of_64(model: Path) -> Path:
    """Make the tiny model's pictures 64 pixels wide, the minimum of `evaluate`."""
    path = model / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 16}))
    return model
