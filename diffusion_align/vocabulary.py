"""Words that both an option and the code it reaches know, each written here only. Imports nothing."""

SOLVERS = ("dpmpp", "ddim")
IN_TIME, IN_NOISE = ("trailing", "leading", "linspace"), ("karras", "lu", "exponential")
TUNED = ("ays", "ays_sdxl")
SPACINGS = (*IN_TIME, *IN_NOISE, *TUNED)  # of the steps of a vp schedule, which all UNets have
FINALS = ("zero", "sigma_min")

BETA_CONVENTIONS = ("diffusers", "salesforce", "sum")
PAIR_NORMS = ("sum", "sum_weights", "num_pairs")
DISCOUNTS = ("ln", "log2")

LONG_PROMPTS = ("truncate", "chunk", "chunk_kohya")
PROMPT_SYNTAXES = ("plain", "a1111", "a1111_no_norm")

PREDICTION_TYPES = ("epsilon", "v_prediction")  # what a network can be told to predict

MODES = ("lora", "full")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The feed-forward and projection layers of attention blocks, and the convolutions of residual blocks.
_REST = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj")
LORA_TARGETS = {"attention": _ATTENTION, "wide": (*_ATTENTION, *_REST)}
LORA_MODES = ("continue", "beneath", "merge")

LR_SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")
WITH_WARMUP = "constant_with_warmup"  # what diffusers' scripts call "constant" with a warm-up
