"""Rewards known by name: what each measures, what it needs, and its licence. Facts only, no torch.

Licences are those that the authors state for their repositories; sizes are parameters in float32.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One reward; `files` are its weights as published, the preferred one first."""

    about: str
    unit: str
    licence: str
    needs: str = "nothing"
    repo: str = ""  # on the hub
    files: tuple[str, ...] = ()
    weights: str = ""  # in words, if repo and files do not name them all
    gigabytes: float = 0.0
    reads_prompt: bool = True

    @property
    def origin(self) -> str:
        return self.weights or (f"{self.repo} {self.files[0]}" if self.repo else "none")


CATALOGUE = {
    "tiny": Entry(
        "the embedded world's own CLIP: small and fallible, for trials", "cosine, -1 to 1", "Apache-2.0",
        weights="in the package", gigabytes=0.01,
    ),
    "clipscore": Entry(
        "picture and prompt under CLIP ViT-L/14 (OpenAI)", "100 cosine, about 15 to 35", "MIT", "download",
        weights="open_clip ViT-L-14-quickgelu:openai", gigabytes=1.7,
    ),
    "pickscore": Entry(
        "CLIP-H tuned on Pick-a-Pic's choices", "exp(logit scale) cosine, about 17 to 25", "MIT", "download",
        repo="yuvalkirstain/PickScore_v1", files=("model.safetensors", "pytorch_model.bin"), gigabytes=3.9,
    ),
    "hpsv2": Entry(
        "CLIP-H tuned on HPD v2", "cosine, about 0.2 to 0.35", "Apache-2.0", "download",
        repo="xswu/HPSv2", files=("HPS_v2_compressed.pt",), gigabytes=3.9,
    ),
    "hpsv2.1": Entry(
        "CLIP-H tuned on HPD v2 of better quality; not comparable to hpsv2", "cosine, about 0.2 to 0.35",
        "Apache-2.0", "download", repo="xswu/HPSv2", files=("HPS_v2.1_compressed.pt",), gigabytes=3.9,
    ),
    "aesthetic": Entry(
        "LAION's aesthetic predictor v2 on CLIP ViT-L/14; does not read the prompt", "about 1 to 10", "Apache-2.0",
        "download", files=("sac+logos+ava1-l14-linearMSE.pth",),
        weights="sac+logos+ava1-l14-linearMSE.pth of christophschuhmann/improved-aesthetic-predictor, and clipscore's",
        gigabytes=1.7, reads_prompt=False,
    ),
    "imagereward": Entry(
        "BLIP-L tuned on ranked pictures", "standard deviations over its own training pictures, about -2 to 2",
        "Apache-2.0", "download", repo="zai-org/ImageReward", files=("ImageReward.pt",), gigabytes=1.8,
    ),
    "jpeg-small": Entry(
        "how small the JPEG is (DDPO's compressibility)", "minus kB at quality 95", "Apache-2.0", reads_prompt=False
    ),
    "jpeg-large": Entry(
        "how large the JPEG is (DDPO's incompressibility)", "kB at quality 95", "Apache-2.0", reads_prompt=False
    ),
    "judge": Entry("fraction of an embedded-world caption's attributes that the picture shows", "0 to 1", "Apache-2.0"),
    "random": Entry(
        "a control: random, but the same number for the same picture", "0 to 1", "Apache-2.0", reads_prompt=False
    ),
    "people": Entry(
        "you choose, in a page on this machine, while the run waits", "ranks", "Apache-2.0",
        "train d3po, prdp or ddpo",
    ),
}  # fmt: skip

FORMS = {
    "ARCHITECTURE:WEIGHTS": "an open_clip model with its tag or file: ViT-H-14:laion2b_s32b_b79k",
    "hf-hub:OWNER/NAME": "an open_clip model on the hub",
    "FOLDER": "an open_clip model on this disk",
    "python:FILE.py:FUNCTION": "your own function (images [B,3,H,W], prompts) -> B numbers",
    "http://HOST:PORT": "a reward in another environment or on another machine: reward serve, or your own server",
}
HOW = (
    "NAME@REVISION: another revision of its repository; NAME=PATH: its weights from a file or folder of this disk",
    "several: 0.5:pickscore,0.5:hpsv2.1 is the weighted sum; min:A,B the smallest; std:A,B standardises each first",
)
