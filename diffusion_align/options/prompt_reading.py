"""Help texts of the options that say how prompts are read; training and drawing have the same four."""

# ruff: noqa: E501  (a table: one text a line)

LONG = "prompts that are longer than the text encoder reads: truncate; chunk (encoded in chunks of its length, 75 tokens for CLIP, as A1111 and ComfyUI do), or chunk_kohya (one begin and end of text around all chunks, as kohya trains SD1.x)"
CHUNKS = "with long_prompts chunk: chunks of every prompt (3: 225 tokens, kohya's max_token_length 225); what is longer is truncated"
SYNTAX = "plain (brackets are text), a1111 (weights as (word:1.2) and [word], and BREAK), or a1111_no_norm (the same without A1111's correction of the mean, which it advises for SDXL)"
SKIP = "layer of the text encoder that is read, as A1111 and kohya count: 1 is the layer that the model was trained with, 2 the one before it (diffusers counts from 0)"
AS_RUN = " (default: as the run was trained)"
