"""How every command loads a model: the base of a run or one by name, with what its options say of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffusion_align.models.diffusers_folder.weights import NoWeights
from diffusion_align.models.single_file.contents import NotAModel

if TYPE_CHECKING:
    import torch

    from diffusion_align.models import TextToImage

FIELDS = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "pretrained_vae_model_name_or_path",
    "prediction_type",
)
CURES = {
    "prediction": "give --prediction_type v_prediction or --prediction_type epsilon",
    "no VAE": "--pretrained_vae_model_name_or_path FILE",
    "vae": "--model MODEL --pretrained_vae_model_name_or_path THIS_FILE",
    "lora": "--model MODEL --lora THIS_FILE, or diffusion-align model merge MODEL --lora THIS_FILE --output_dir FOLDER",
}


def base_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a base model, of the section `model` of a run's configuration."""
    return {key: section.get(key) for key in FIELDS}


def as_given(base: Mapping[str, Any], o: Any) -> dict[str, Any]:
    """The base with what the options say of it, beside its name, in place of what it was trained with."""
    return dict(base) | {key: getattr(o, key) for key in FIELDS[1:] if getattr(o, key, None) is not None}


def load_base(
    base: Mapping[str, Any], device: str | torch.device | None, dtype: torch.dtype | None = None
) -> TextToImage:
    """Load a model by its `base_fields`, in float32 by default.

    Raises as `load_pipeline`, with the options that help.
    """
    import torch

    from diffusion_align.models import load_pipeline  # takes seconds, so it follows all checks

    with names_options():
        return load_pipeline(
            base["pretrained_model_name_or_path"],
            device=device,
            dtype=dtype or torch.float32,
            revision=base.get("revision"),
            variant=base.get("variant"),
            vae=base.get("pretrained_vae_model_name_or_path"),
            prediction_type=base.get("prediction_type"),
        )


@contextmanager
def names_options() -> Iterator[None]:
    """Errors about a model's files also name the options or the command that help."""
    try:
        yield
    except NotAModel as error:
        if error.kind not in CURES:
            raise
        raise ValueError(f"{error}: {CURES[error.kind]}") from error
    except NoWeights as error:
        if not error.variants:
            raise
        raise FileNotFoundError(f"{error}: --variant {error.variants[0]}") from error
