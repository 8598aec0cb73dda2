"""Guidance by hand arithmetic, in one call, with the right gradient."""

import pytest
import torch

from diffusion_align.models import set_attention
from diffusion_align.models.guidance import guided


def test_guidance_is_one_call_and_matches_hand_arithmetic():
    calls = []

    def predict(x, t, text):
        calls.append(len(x))
        return x * text.mean((1, 2))[:, None] + t[:, None]

    x, t = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0])
    text, negative = torch.full((2, 3, 4), 2.0), torch.full((1, 3, 4), 0.5)
    # with text 2x + t, without 0.5x + t: 0.5x + t + 3 (1.5x) = 5x + t
    assert torch.equal(guided(predict, x, t, text, negative, 3.0), 5 * x + t[:, None])
    assert calls == [4]
    assert torch.equal(guided(predict, x, t, text, negative, 1.0), 2 * x + t[:, None])
    assert calls == [4, 2]
    assert torch.equal(guided(predict, x, t, text, negative, 0.0), 0.5 * x + t[:, None])


def test_gradient_goes_through_both_halves():
    weight = torch.tensor(1.0, requires_grad=True)

    def predict(x, t, text):
        return weight * x * text[:, 0]

    x, t = torch.ones(1, 1), torch.zeros(1)
    guided(predict, x, t, torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), 1.0), 4.0).sum().backward()
    assert weight.grad.item() == 1 + 4 * (3 - 1)


def test_xformers_where_it_cannot_run_says_so_in_one_line(model):
    with pytest.raises(ValueError, match="xformers is not installed.*use PyTorch's own attention") as error:
        set_attention(model.unet, xformers=True)
    assert "\n" not in str(error.value)


def test_gradient_checkpointing_changes_no_gradient(model):
    x, t, text = torch.ones(1, 4, 8, 8), torch.tensor([5]), model.empty_text
    model.unet.requires_grad_(True)
    gradients, saved = [], []
    for checkpointing in (False, True):
        set_attention(model.unet, gradient_checkpointing=checkpointing)
        model.unet.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, kept=kept: kept.append(v.numel()) or v, lambda v: v):
            loss = model.predict(x, t, text).square().sum()
        saved.append(sum(kept))
        loss.backward()
        gradients.append([p.grad.clone() for p in model.unet.parameters() if p.grad is not None])
    assert saved[1] < saved[0] / 2  # it does recompute
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
