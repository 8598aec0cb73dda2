"""transformers' CLIP weights under open_clip's names.

The network is the same. open_clip keeps a block's query, key and value in one matrix, transformers in three; open_clip
multiplies by a projection from the right, so its projections are the transposes of transformers' Linears.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_PLAIN = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
}
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_NORMS = {  # transformers spells the first one so
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.final_layer_norm": "ln_final",
}
_BLOCKS = {
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.encoder.layers.": "transformer.resblocks.",
}
_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# Old releases of transformers saved these counters with the weights.
_COUNTERS = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")


def from_transformers(weights: Mapping[str, Tensor], source: object = "weights") -> dict[str, Tensor]:
    """The weights of a `CLIPModel` as those of open_clip's `CLIP`.

    Raises:
        ValueError: a key that a CLIPModel does not have, or a block without one of query, key and value.
    """
    out: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for key, weight in weights.items():
        if key in _COUNTERS:
            continue
        stem, _, kind = key.rpartition(".")
        if key in _PLAIN:
            out[_PLAIN[key]] = weight
        elif key in _TRANSPOSED:
            out[_TRANSPOSED[key]] = weight.T.contiguous()
        elif stem in _NORMS:
            out[f"{_NORMS[stem]}.{kind}"] = weight
        else:
            block, layer = _block(stem, key, source)
            if layer in _LAYERS:
                out[f"{block}.{_LAYERS[layer]}.{kind}"] = weight
            elif layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                thirds.setdefault(f"{block}.attn.in_proj_{kind}", {})[layer[10]] = weight
            else:
                raise ValueError(f"{source}: unknown key {key!r} for a CLIP of transformers")
    for name, third in thirds.items():
        if set(third) != set("qkv"):
            raise ValueError(f"{source}: {name} has only {', '.join(sorted(third))} of q, k and v")
        out[name] = torch.cat([third[letter] for letter in "qkv"])
    return out


def _block(stem: str, key: str, source: object) -> tuple[str, str]:
    """open_clip's name of a block, and transformers' name of the layer in it."""
    for old, new in _BLOCKS.items():
        number, _, layer = stem.removeprefix(old).partition(".")
        if stem.startswith(old) and number.isdecimal():
            return f"{new}{number}", layer
    raise ValueError(f"{source}: unknown key {key!r} for a CLIP of transformers")
