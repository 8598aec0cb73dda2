"""Flags and values of other tools: their equivalent here, or why there is none.

From the sources of diffusers' training scripts, the code of Diffusion-DPO's authors, kohya's sd-scripts, ddpo-pytorch,
SPO's code, trl, and accelerate's launcher. The nearest spelling would mislead: `--lora_rank` is most similar to
`--local_rank`, and `--center_crop` to its opposite. An entry is used only if the word is no option of the verb.
"""

# ruff: noqa: E501  (a table: one idea a line)
from __future__ import annotations

from collections.abc import Mapping

from ..schema import Option

# Options with another name here: the first name that the verb has. "option=value" if the flag implies a value.
MEANT: dict[str, tuple[str, ...]] = {
    # the LoRA
    "lora_rank": ("rank",), "lora_r": ("rank",), "lora_dim": ("rank",), "network_rank": ("rank",), "r": ("rank",), "dim": ("rank",),
    "lora_alpha": ("network_alpha",), "alpha": ("network_alpha",), "target_modules": ("lora_targets",), "lora_layers": ("lora_targets",), "lora_target_modules": ("lora_targets",),
    "use_lora": ("mode=lora",), "full_finetune": ("mode=full",), "train_unet": ("mode=full",), "unet_init": ("pretrained_model_name_or_path",),
    # model and data
    "vae": ("pretrained_vae_model_name_or_path",), "vae_path": ("pretrained_vae_model_name_or_path",), "v_parameterization": ("prediction_type=v_prediction",), "v_pred": ("prediction_type=v_prediction",),
    "base_model": ("pretrained_model_name_or_path", "base"), "model_name": ("pretrained_model_name_or_path",), "model_id": ("pretrained_model_name_or_path",),
    "model_name_or_path": ("pretrained_model_name_or_path",), "pretrained_model": ("pretrained_model_name_or_path",), "pretrained.model": ("pretrained_model_name_or_path",), "checkpoint": ("resume_from_checkpoint", "run"),
    "pretrained.revision": ("revision",), "lora_path": ("lora", "run"), "lora_weights": ("lora", "run"), "network_weights": ("lora",), "lora_weight": ("lora",), "adapter_path": ("lora",), "lora_name_or_path": ("lora",), "dora": ("use_dora",), "rslora": ("use_rslora",), "weight_decompose": ("use_dora",),
    "data_dir": ("train_data_dir",), "dataset": ("train_data_dir",), "dataset_path": ("train_data_dir",), "instance_data_dir": ("train_data_dir",), "dataset_split": ("dataset_split_name",),
    "prompt_file": ("prompts", "prompts_file"), "prompts_path": ("prompts", "prompts_file"), "from_file": ("prompts", "prompts_file"), "prompt_fn": ("prompts",), "dataset_cfg.meta_json_path": ("prompts",), "meta_json_path": ("prompts",),
    "caption_dropout_rate": ("proportion_empty_prompts",), "caption_dropout": ("proportion_empty_prompts",), "uncond_p": ("proportion_empty_prompts",),
    "image_size": ("resolution",), "height": ("resolution",), "width": ("resolution",), "size": ("resolution",),
    # steps, batches, rates
    "batch_size": ("train_batch_size", "sample_chunk"), "per_device_train_batch_size": ("train_batch_size", "sample_chunk"), "bs": ("train_batch_size", "batch_size"), "train.train_batch_size": ("sample_chunk", "train_batch_size"), "train.batch_size": ("sample_chunk", "train_batch_size"),
    "train_batch_size": ("sample_chunk", "batch_size"), "sample.batch_size": ("sample_chunk",), "sample_batch_size": ("sample_chunk",), "sample.sample_batch_size": ("sample_chunk",), "sample.num_batches_per_epoch": ("prompts_per_round",), "sample_num_batches_per_epoch": ("prompts_per_round",),
    "epochs": ("num_train_epochs", "num_rounds"), "num_epochs": ("num_train_epochs", "num_rounds"), "max_train_epochs": ("num_train_epochs", "num_rounds"), "num_train_epochs": ("num_rounds",), "max_steps": ("max_train_steps",), "num_train_steps": ("max_train_steps",), "iterations": ("max_train_steps",),
    "gradient_accumulation": ("gradient_accumulation_steps", "prompts_per_step"), "grad_accum": ("gradient_accumulation_steps", "prompts_per_step"), "gradient_accumulation_steps": ("prompts_per_step",), "train.gradient_accumulation_steps": ("prompts_per_step",), "train_gradient_accumulation_steps": ("prompts_per_step",),
    "train_num_inner_epochs": ("passes",), "warmup_steps": ("lr_warmup_steps",), "lr_warmup": ("lr_warmup_steps",), "scheduler": ("lr_scheduler", "solver"), "lr_scheduler_type": ("lr_scheduler",), "lr_scheduler_num_cycles": ("lr_num_cycles",), "lr_scheduler_power": ("lr_power",),
    "train_learning_rate": ("learning_rate",), "train_adam_beta1": ("adam_beta1",), "train_adam_beta2": ("adam_beta2",), "train_adam_weight_decay": ("adam_weight_decay",), "train_adam_epsilon": ("adam_epsilon",), "train_use_8bit_adam": ("use_8bit_adam",),
    "weight_decay": ("adam_weight_decay",), "beta1": ("adam_beta1",), "beta2": ("adam_beta2",), "epsilon": ("adam_epsilon",), "clip_grad_norm": ("max_grad_norm",), "gradient_clipping": ("max_grad_norm",), "train_max_grad_norm": ("max_grad_norm",), "ema": ("use_ema",), "ema_rate": ("ema_decay",), "random_seed": ("seed",),
    # objectives and rollouts
    "dpo_beta": ("beta_dpo", "beta"), "beta": ("kl_weight",), "train.eps": ("clip",), "eps": ("clip",), "clip_range": ("clip",), "train_clip_range": ("clip",), "train.clip_range": ("clip",), "kl_beta": ("kl_weight", "beta"), "kl_coef": ("kl_weight", "beta"),
    "num_steps": ("steps", "max_train_steps"), "sample.num_steps": ("steps",), "sample_num_steps": ("steps",), "sampling_steps": ("steps",), "ddim_steps": ("steps",), "sample.eta": ("eta",), "sample_eta": ("eta",), "ddim_eta": ("eta",),
    "cfg": ("guidance",), "cfg_scale": ("guidance",), "scale": ("guidance",), "sample.guidance_scale": ("guidance",), "sample_guidance_scale": ("guidance",), "guidance_scale": ("validation_guidance",), "sample.num_sample_each_step": ("children",), "num_sample_each_step": ("children",), "num_generations": ("group_size",), "num_image_per_prompt": ("group_size", "num_images_per_prompt"), "samples_per_prompt": ("group_size", "num_images_per_prompt"), "n_samples": ("num_images_per_prompt",),
    "train.divert_start_step": ("start",), "divert_start_step": ("start",), "compare_func_cfg.threshold": ("threshold",), "timestep_fraction": ("learn_steps",), "train.timestep_fraction": ("learn_steps",), "train_timestep_fraction": ("learn_steps",),
    "reward_fn": ("reward",), "reward_function": ("reward",), "reward_model": ("reward",), "rewards": ("reward", "held_out_reward"), "choice_model": ("reward",), "preference_model_func_cfg.ckpt_path": ("preference_model",), "sampler": ("solver",),
    # machine
    "precision": ("mixed_precision",), "dtype": ("mixed_precision",), "fp16": ("mixed_precision=fp16",), "bf16": ("mixed_precision=bf16",), "half": ("mixed_precision=fp16",), "tf32": ("allow_tf32",), "use_checkpointing": ("gradient_checkpointing",), "xformers": ("enable_xformers_memory_efficient_attention",), "use_xformers": ("enable_xformers_memory_efficient_attention",), "use_8bit_adamw": ("use_8bit_adam",),
    "gpu": ("device=cuda",), "cuda": ("device=cuda",), "cpu": ("device=cpu",), "no_cuda": ("device=cpu",), "use_cpu": ("device=cpu",), "gpu_id": ("device",), "gpu_ids": ("device",),
    # output
    "out_dir": ("output_dir", "out"), "output": ("output_dir", "out"), "outdir": ("output_dir", "out"), "save_dir": ("output_dir", "out"), "output_name": ("output_dir", "out"), "run_name": ("output_dir",), "logdir": ("output_dir",), "log_dir": ("logging_dir",), "o": ("output_dir", "out"),
    "save_steps": ("checkpointing_steps",), "save_every": ("checkpointing_steps",), "save_freq": ("checkpointing_steps",), "save_interval": ("checkpointing_steps",), "save_every_n_steps": ("checkpointing_steps",), "save_total_limit": ("checkpoints_total_limit",), "num_checkpoint_limit": ("checkpoints_total_limit",), "save_last_n_steps": ("checkpoints_total_limit",), "resume_from": ("resume_from_checkpoint",), "log_with": ("report_to",), "use_wandb": ("report_to=wandb",), "wandb_project_name": ("tracker_name",), "log_tracker_name": ("tracker_name",), "wandb_project": ("tracker_name",), "overwrite": ("overwrite_output_dir",),
    "sample_prompts": ("validation_prompts",), "sample_every_n_steps": ("validation_steps",), "sample_every": ("validation_steps",), "eval_interval": ("validation_steps",), "validation_epochs": ("validation_steps",),
    "config_file": ("config",), "c": ("config",), "yaml": ("config",), "debug": ("traceback",), "verbose": ("traceback",),
}  # fmt: skip

CROP = "it is an option of train dpo and train rankdpo, which learn from given pictures"
BUCKETS = "--aspect_buckets makes shapes of 0.7 to 1 times the area of --resolution, and small pictures are enlarged"
DPO_LOSS = "every pair's loss is weighted alike at every timestep, as the methods are published"
DPO_ONLY = "the methods here learn from preferences or rewards"
LAUNCH = "it belongs to the launcher: `torchrun --nproc_per_node N scripts/finetune_*.py --flags`, or before the script's name in `accelerate launch`"
OPTIMIZER = "the optimizer is AdamW, --use_8bit_adam in 8 bits"
TEXT = "text encoders are not trained"
COLUMNS = "columns are recognised (`diffusion-align data inspect PATH` says how), or named with --columns OURS=THEIRS"
NO_DROPOUT = "a LoRA has no dropout here: before the first update policy and reference must be one function"
FAMILY = "the kind of model is read from its files"
GRIDS = "each prompt of a sample grid gets one picture, base beside tuned; --validation_prompts takes several"
NOT_HERE: dict[str, str] = {
    **dict.fromkeys(("center_crop", "random_crop", "random_flip", "flip_aug", "enable_bucket", "aspect_buckets", "bucket_reso_steps"), CROP),
    **dict.fromkeys(("min_bucket_reso", "max_bucket_reso", "bucket_no_upscale"), BUCKETS),
    **dict.fromkeys(("crops_coords_top_left_h", "crops_coords_top_left_w"), "--size_conditioning pictures of the methods on given pictures tells SDXL where each of them was cropped"),
    "image_interpolation_mode": "pictures are resized with Lanczos' filter",
    **dict.fromkeys(("color_aug", "face_crop_aug_range"), "pictures keep their colours; --random_crop and --random_flip are the only augmentations"),
    **dict.fromkeys(("snr_gamma", "min_snr_gamma", "noise_offset", "input_perturbation", "timestep_bias_strategy", "weighting_scheme", "debiased_estimation_loss", "debug_loss", "logit_mean", "multires_noise_iterations", "huber_c"), DPO_LOSS),
    **dict.fromkeys(("sft", "train_method", "with_prior_preservation", "prior_loss_weight", "class_data_dir", "class_prompt", "instance_prompt", "reg_data_dir", "do_edm_style_training"), DPO_ONLY),
    **dict.fromkeys(("num_processes", "multi_gpu", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "nproc_per_node", "nnodes", "node_rank", "master_port", "master_addr", "dynamo_backend", "num_cpu_threads_per_process", "num_gpus"), LAUNCH),
    **dict.fromkeys(("use_deepspeed", "deepspeed", "zero_stage", "use_fsdp", "fsdp"), "every process holds the whole model; the optimizer's state is not sharded"),
    **dict.fromkeys(("optimizer", "optimizer_type", "use_adafactor", "prodigy_beta3", "prodigy_decouple", "optimizer_args"), OPTIMIZER),
    **dict.fromkeys(("train_text_encoder", "text_encoder_lr", "learning_rate_te", "adam_weight_decay_text_encoder", "network_train_text_encoder_only", "stop_text_encoder_training"), TEXT),
    **dict.fromkeys(("image_column", "caption_column", "prompt_column", "label_column", "chosen_column", "rejected_column", "caption_extension"), COLUMNS),
    **dict.fromkeys(("lora_dropout", "network_dropout", "dropout"), NO_DROPOUT),
    **dict.fromkeys(("sdxl", "v2", "is_turbo"), FAMILY),
    **dict.fromkeys(("num_validation_images", "validation_images"), GRIDS),
    **dict.fromkeys(("network_module", "network_args", "lycoris_config", "conv_dim"), "this package trains a plain LoRA, or a DoRA with --use_dora; --lora_targets wide covers convolutions too"),
    **dict.fromkeys(("network_train_unet_only", "train_unet_only", "unet_only", "cache_latents", "cache_latents_to_disk", "pre_compute_text_embeddings", "cache_text_encoder_outputs", "set_grads_to_none", "sdpa", "xformers_sdpa", "foreach_ema", "safe_serialization", "save_state", "persistent_data_loader_workers"), "it is so always"),
    **dict.fromkeys(("use_peft_lora", "train.cfg", "train_cfg"), "it is so: guidance is the same in rollout and training"),
    **dict.fromkeys(("adv_clip_max", "train.adv_clip_max", "train_adv_clip_max", "per_prompt_stat_tracking", "per_prompt_stat_tracking_buffer_size"), "advantages are taken within the group of a prompt's pictures (--group_size) and not clipped"),
    **dict.fromkeys(("dreamlike_pairs_only", "hard_skip_resume"), "it is of the authors' code only; a resumed run reads no pair twice"),
    **dict.fromkeys(("save_precision", "save_model_as", "output_kohya_format", "upcast_before_saving", "no_metadata"), "a LoRA is saved in diffusers' format in float32"),
    **dict.fromkeys(("max_token_length", "tokenizer_max_length"), "--long_prompts chunk with --prompt_chunks 2 reads 150 tokens, 3 reads 225"),
    **dict.fromkeys(("weighted_captions", "prompt_weighting"), "--prompt_syntax a1111 reads weights of words"),
    **dict.fromkeys(("scale_weight_norms", "dim_from_weights"), "a LoRA starts at zero, or as that of --lora, whose rank it then has"),
    **dict.fromkeys(("dataset_config", "dataset_repeats", "num_repeats", "repeats"), "a data set is one folder or file, each pair once an epoch"),
    **dict.fromkeys(("fp8_base", "full_bf16", "full_fp16", "offload", "quantize"), "weights are float32, the network runs in --mixed_precision"),
    **dict.fromkeys(("compile", "torch_compile", "enable_npu_flash_attention", "attention_backend"), "attention is PyTorch's own, and nothing is compiled"),
}  # fmt: skip

# Values of options with choices: the value here, or a hint.
VALUES: dict[str, dict[str, str]] = {
    "loss_type": {"dpo": "sigmoid", "diffusion_dpo": "sigmoid", "diffusion-dpo": "sigmoid", "logistic": "sigmoid", "bce": "sigmoid", "kto_pair": "kto", "rpo": "sigmoid",
                  "sdpo": "sigmoid, with --winner_share", "diffusion_kto": "kto", "cdpo": "sigmoid, with --label_smoothing", "d3po": "the verb `train d3po`", "spo": "the verb `train spo`", "rankdpo": "the verb `train rankdpo`", "ddpo": "the verb `train ddpo`", "prdp": "the verb `train prdp`"},
    "mixed_precision": {"fp32": "no", "float32": "no", "32": "no", "none": "no", "full": "no", "float16": "fp16", "half": "fp16", "16": "fp16", "bfloat16": "bf16", "fp8": "bf16"},
    "lr_scheduler": {"warmup": "constant_with_warmup", "cosine_annealing": "cosine", "cosine_with_warmup": "cosine", "linear_with_warmup": "linear", "none": "constant"},
    "solver": {"ddpm": "ddim, whose eta 1 is its noise", "dpmsolver++": "dpmpp", "dpm++": "dpmpp", "dpmsolver": "dpmpp", "dpmpp_2m": "dpmpp", "dpm": "dpmpp", "sde": "dpmpp"},
    "mode": {"unet": "full", "all": "full", "adapter": "lora", "peft": "lora", "dora": "lora"},
}  # fmt: skip


def flag_hint(word: str, names: Mapping[str, Option]) -> str | None:
    """The end of an error message about a flag of another tool: its equivalent here, or why there is none; else None.

    `names`: the options of the current verb. Equivalents in other verbs do not count.
    """
    for prefix in ("", "config.", "train."):
        key = word.removeprefix(prefix) if word.startswith(prefix) else ""
        for meant in MEANT.get(key, ()):
            name, _, value = meant.partition("=")
            if name in names and (not value or value in (names[name].choices or (value,))):
                return f"here it is --{meant.replace('=', ' ')}"
        if key in NOT_HERE:
            return f"not here: {NOT_HERE[key]}"
    return _switched_off(word, names)


def _switched_off(word: str, names: Mapping[str, Option]) -> str | None:
    """A hint for flags such as `--no_scale_lr`, whose nearest spelling is its opposite."""
    for prefix in ("no_", "disable_", "dont_", "without_", "not_"):
        rest = word.removeprefix(prefix)
        if rest != word and rest in names:
            return f"use --{rest}=false"
    return None


def value_hint(option: str, value: object) -> str | None:
    """The equivalent of a value of another tool; None for other values."""
    values: Mapping[str, str] = VALUES.get(option, {})
    return values.get(str(value).lower())
