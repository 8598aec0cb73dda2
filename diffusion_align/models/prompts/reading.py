"""How prompts are read: what happens to long ones, whether words have weights, and which layer's states count."""

from __future__ import annotations

from dataclasses import dataclass

from ...vocabulary import LONG_PROMPTS, PROMPT_SYNTAXES


@dataclass(frozen=True)
class Reading:
    """How the text encoders of a model read prompts; the default is how Stable Diffusion was trained.

    Attributes:
        long_prompts: "truncate"; "chunk", with begin and end of text around each chunk, as A1111 and ComfyUI have it;
            "chunk_kohya", with one begin and one end around all chunks, as kohya's sd-scripts have it for SD1.x.
        chunks: how many chunks of the text encoder's length every prompt becomes; 1 if long prompts are truncated.
        syntax: "plain", or "a1111" with `(word:1.2)`, `[word]` and BREAK, where the mean of a prompt's states stays as
            it was; "a1111_no_norm" leaves out that correction, as A1111's option of that name.
        clip_skip: 1 reads the layer that the model was trained with, 2 the one before it, as A1111 and kohya count.
    """

    long_prompts: str = "truncate"
    chunks: int = 1
    syntax: str = "plain"
    clip_skip: int = 1

    def __post_init__(self) -> None:
        if self.long_prompts not in LONG_PROMPTS or self.syntax not in PROMPT_SYNTAXES:
            raise ValueError(f"no such way to read prompts: {self.long_prompts}, {self.syntax}")
        if self.chunks < 1 or self.clip_skip < 1:
            raise ValueError("chunks and clip_skip are at least 1")
        if self.chunks > 1 and self.long_prompts == "truncate":
            raise ValueError("prompts that are truncated have one chunk")

    def __str__(self) -> str:
        return f"{self.long_prompts} {self.chunks}, {self.syntax}, layer {self.clip_skip}"


DEFAULT = Reading()
