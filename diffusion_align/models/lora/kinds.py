"""The kinds of adapters in the wild: which tensors a layer of each has, and which kinds cannot be taken.

The last column is the paper, with its number on arXiv.

    LoRA       lora_down, lora_up               W + s up down                     Hu et al. 2021, 2106.09685
    LoCon      and lora_mid                     the same for convolutions; `mid` is the core of a Tucker decomposition
    LoHa       hada_w1_a ... hada_w2_b          W + s (w1_a w1_b) * (w2_a w2_b)   Hyeon-Woo et al. 2021, 2108.06098
    LoKr       lokr_w1, lokr_w2, or factors     W + s w1 (x) w2                   Yeh et al. 2023, 2309.14859
    DoRA       any of these and dora_scale      magnitude times direction         Liu et al. 2024, 2402.09353
    difference diff, diff_b; w_norm, b_norm     W + diff
    IA3        weight, on_input                 rows or columns of W scaled       Liu et al. 2022, 2205.05638
    GLoRA      a1, a2, b1, b2                   W + s (W a1 a2 + b1 b2)           Chavan et al. 2023, 2306.07967
    OFT, BOFT  oft_blocks, rescale              rotations of W                    Qiu et al. 2023, 2306.07280;
                                                                                  Liu et al. 2023, 2311.06243

All of these are exact updates of a weight, so they can be merged. Only LoRA, and DoRA as peft has it, can be trained.
"""

from __future__ import annotations

from collections.abc import Collection

# ending, part, program
ENDINGS: tuple[tuple[str, str, str], ...] = (
    (".lora_mid.weight", "mid", "lycoris"),
    (".dora_scale", "dora_scale", "lycoris"),
    (".lora_magnitude_vector", "magnitude", "peft"),
    (".lora_magnitude_vector.weight", "magnitude", "peft"),
    (".lora_magnitude_vector.default.weight", "magnitude", "peft"),
    *((f".hada_{part}", f"hada_{part}", "lycoris") for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(
        (f".lokr_{part}", f"lokr_{part}", "lycoris")
        for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    ),
    *((f".{part}", part, "lycoris") for part in ("diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "rescale")),
    *((f".{part}.weight", part, "lycoris") for part in ("a1", "a2", "b1", "b2", "bm")),
    (".on_input", "on_input", "lycoris"),
)  # fmt: skip

# The parts without which a layer of a kind is incomplete; several alternatives of LoKr.
_NEEDED: dict[str, tuple[frozenset[str], ...]] = {
    "LoRA": (frozenset({"down", "up"}),),
    "LoHa": (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
    "LoKr": tuple(
        frozenset({*first, *second})
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    "full difference": (frozenset({"diff"}), frozenset({"diff_b"})),
    "norm difference": (frozenset({"w_norm"}),),
    "IA3": (frozenset({"scales", "on_input"}),),
    "GLoRA": (frozenset({"a1", "a2", "b1", "b2"}),),
    "OFT": (frozenset({"oft_blocks"}),),
}
_ALSO = {
    "LoRA": {"mid", "alpha", "dora_scale", "magnitude", "diff_b"},
    "LoHa": {"hada_t1", "hada_t2", "alpha", "dora_scale", "diff_b"},
    "LoKr": {"lokr_t2", "alpha", "dora_scale", "diff_b"},
    "full difference": {"diff_b", "alpha"},
    "norm difference": {"b_norm"},
    "IA3": set[str](),
    "GLoRA": {"bm", "alpha"},
    "OFT": {"rescale", "alpha"},
}
TRAINABLE = ("LoRA", "DoRA")

# What a key of a kind that is not taken contains, and what it is. The first that fits counts.
_MERGE_THERE = "merge it with the program that made it, and give the merged model"
_OTHERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("lora_E", "lora_ranknum"), "AdaLoRA of peft", _MERGE_THERE),
    (("ia3_l",), "IA3 of peft", _MERGE_THERE),
    (("boft_R", "boft_s"), "BOFT of peft", _MERGE_THERE),
    (("oft_R", "oft_r."), "OFT of peft", _MERGE_THERE),
    (("vera_lambda",), "VeRA", _MERGE_THERE),
    (("fourierft_spectrum",), "FourierFT", _MERGE_THERE),
    (("hra_u",), "HRA", _MERGE_THERE),
    (("vblora_",), "VB-LoRA", _MERGE_THERE),
    (("lora_embedding_",), "a LoRA of embeddings", _MERGE_THERE),
    (("lora_B.bias", "lora_up.bias"), "a LoRA with biases (lora_bias)", _MERGE_THERE),
    (("modules_to_save", ".base_layer."), "a LoRA with layers trained in full (modules_to_save)", _MERGE_THERE),
    (("oft_diag",), "OFT of an old kohya or lycoris", _MERGE_THERE),
    (("lokr_t1",), "LoKr with lokr_t1", _MERGE_THERE),
    (("set_weight", "reshape_weight"), "a patch of ComfyUI", "merge it there, and give the merged model"),
    (("lllite_",), "ControlNet-LLLite", "it belongs to ControlNet, not to the model: leave it out"),
    (("to_k_ip", "to_v_ip", "ip_adapter", "image_proj"), "an IP-Adapter", "it reads pictures: leave it out"),
    (("string_to_param", "emb_params", "clip_g", "clip_l"), "a textual inversion", "it is a word, not a LoRA"),
    (("double_blocks", "single_transformer_blocks", "lora_transformer_", "transformer."),
     "a LoRA of a transformer such as Flux or Stable Diffusion 3", "give one of Stable Diffusion 1.x, 2.x or XL"),
    (("first_stage_model.", "cond_stage_model.", "conditioner.embedders."), "a whole model", "give it as the model"),
)  # fmt: skip


def kind_of(parts: Collection[str]) -> str | None:
    """The kind of a layer with these parts, without regard to missing ones; None if they are of several kinds."""
    if set(parts) <= {"diff_b", "alpha"}:
        return "full difference"
    own = {kind: frozenset().union(*needed) for kind, needed in _NEEDED.items()}
    found = [kind for kind, names in own.items() if names & (set(parts) - {"diff_b"})]
    found = found or ["LoRA"]  # an alpha or a magnitude alone
    return found[0] if len(found) == 1 and set(parts) <= own[found[0]] | _ALSO[found[0]] else None


def missing_parts(kind: str, parts: Collection[str]) -> list[str]:
    """The parts that a layer of a kind still needs, of the alternative that needs fewest."""
    return sorted(min((needed - set(parts) for needed in _NEEDED[kind]), key=len))


def describe_other(key: str) -> str:
    """What a key that cannot be read belongs to, and what to do."""
    for words, what, cure in _OTHERS:
        if any(word in key for word in words):
            return f"is of {what}, which cannot be taken: {cure}"
    return "is of no known kind of LoRA: convert the file to a plain LoRA"
