"""The README's program runs as it stands, and the files that it names exist."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_program_runs():
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict = {}
    exec(program, names)
    assert names["picture"].shape == (1, 3, 64, 64) and names["run"].log_prob.shape == (10, 1)
    gradients = [p.grad for p in names["model"].unet.parameters()]
    assert all(g is not None for g in gradients) and any(bool(torch.any(g != 0)) for g in gradients)


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert links and all((ROOT / link).exists() for link in links), links
