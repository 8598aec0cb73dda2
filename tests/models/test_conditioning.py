"""The layout of SDXL's text, by hand."""

import pytest
import torch

from diffusion_align.models.prompts.conditioning import pack, unpack, with_sizes_of

HIDDEN = torch.arange(2 * 3 * 7, dtype=torch.float64).view(2, 3, 7)
POOLED = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0]], dtype=torch.float64)
SIZES = (1200, 1000, 30, 40, 1024, 768)


def test_packed_rows_match_hand_arithmetic():
    text = pack(HIDDEN, POOLED, SIZES)
    assert text.dtype == torch.float64 and torch.equal(text[:, :3], HIDDEN)
    assert text[1, 3:].tolist() == [[-5, -6, -7, -8, 0, 0, 0], [1200, 1000, 30, 40, 1024, 768, 0]]
    hidden, pooled, sizes = unpack(text, 4, 640, 512)
    assert torch.equal(hidden, HIDDEN) and torch.equal(pooled, POOLED)
    assert sizes.dtype == torch.float32 and sizes.tolist() == [list(SIZES)] * 2


def test_a_text_without_sizes_gets_those_of_its_picture():
    mixed = torch.cat([pack(HIDDEN[:1], POOLED[:1]), pack(HIDDEN[1:], POOLED[1:], SIZES)]).to(torch.bfloat16)
    sizes = unpack(mixed, 4, 1000, 1336)[2]
    assert sizes[0].tolist() == [1000, 1336, 0, 0, 1000, 1336]  # exact, though the text is in bfloat16
    assert sizes[1].tolist() == [1200, 1000, 30, 40, 1024, 768]


def test_gradients_reach_the_packed_tensors():
    hidden, pooled = HIDDEN.clone().requires_grad_(), POOLED.clone().requires_grad_()
    back = unpack(pack(hidden, pooled), 4, 8, 8)
    (back[0].sum() * 2 + back[1].sum() * 3).backward()
    assert bool((hidden.grad == 2).all()) and bool((pooled.grad == 3).all())


def test_a_negative_keeps_its_own_sizes_and_takes_only_missing_ones():
    text = torch.cat([pack(HIDDEN[:1], POOLED[:1], SIZES), pack(HIDDEN[1:], POOLED[1:])])
    negative = pack(HIDDEN[:1] + 100, POOLED[:1] + 100)
    both = with_sizes_of(text, negative)
    assert torch.equal(both[:, :-1], negative[:, :-1].expand(2, -1, -1))
    assert both[:, -1, :6].tolist() == [list(SIZES), [0] * 6]
    own = pack(HIDDEN[:1], POOLED[:1], (8, 8, 0, 0, 8, 8))
    assert with_sizes_of(text, own)[:, -1, :6].tolist() == [[8, 8, 0, 0, 8, 8]] * 2


@pytest.mark.parametrize(
    "sizes", [(), (8, 8), (8, 8, 0, 0, 8), (0, 8, 0, 0, 8, 8), (8, 8, 0, 0, 8, 0), (8, 8, -1, 0, 8, 8)]
)
def test_wrong_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="original height, width"):
        pack(HIDDEN, POOLED, sizes)


def test_a_pooled_embedding_wider_than_the_rows_is_refused():
    with pytest.raises(ValueError, match="no room"):
        pack(HIDDEN, torch.zeros(2, 8, dtype=torch.float64))
