"""What accelerate's launcher asks for in the environment, beside the options of the command."""

from __future__ import annotations

from collections.abc import Mapping

from diffusion_align.options import TrainCommon, UsageError

_PLUGINS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def overruled(o: TrainCommon, environment: Mapping[str, str]) -> list[str]:
    """A line for each setting of `accelerate launch` (or its config file) that an option of this command overrules.

    Raises:
        UsageError: a plugin that shards the model. Here every process holds the whole model.
    """
    for name, plugin in _PLUGINS.items():
        if environment.get(name, "false").lower() in ("true", "1", "yes"):
            raise UsageError(
                f"the launcher asks for {plugin}, and here every process holds the whole model: launch with "
                "`accelerate launch --multi_gpu --num_processes N`, or answer no in `accelerate config`"
            )
    asked = {
        "mixed_precision": environment.get("ACCELERATE_MIXED_PRECISION"),
        "gradient_accumulation_steps": environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    }
    lines = []
    for name, value in asked.items():
        used = getattr(o, name, None)
        if value in (None, "", "no", "auto", "1", str(used)):
            continue
        if not hasattr(o, name):
            wins = "this method has its own steps"
        elif used is None:
            wins = f"--{name} is not given, so it is what the batch sizes of this command need"
        else:
            wins = f"--{name} {used} of this command is used"
        lines.append(f"launcher         asks for {name} {value}; {wins}")
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        lines.append("launcher         asks for torch.compile; nothing is compiled here")
    return lines
