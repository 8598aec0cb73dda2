"""The collapse alarm: when it is given, by hand-made rows, and that it hears the same after an interruption."""

import pytest

from diffusion_align.train.alarm import CollapseAlarm


def heard(alarm, rows):
    """The numbers of the rows at which something was said, and what."""
    said = [(i, alarm.check(row)) for i, row in enumerate(rows)]
    return [(i, message) for i, message in said if message]


def test_worse_winners_raise_one_alarm():
    """The mean of the last four passes 0.1 first with rows 4 to 7: (0 + 0.1 + 0.2 + 0.2) / 4 = 0.125."""
    rows = [{"winner_error_gap": gap} for gap in (0.0, 0.0, 0.1, 0.0, 0.1, 0.2, 0.2, 0.2, 0.2)]
    ((at, message),) = heard(CollapseAlarm(0.1, 0.5, 4), rows)
    assert at == 6 and "0.125 above the reference's, over 4 steps (more than 0.1)" in message
    assert "lower learning_rate" in message
    assert not heard(CollapseAlarm(0.3, 0.5, 4), rows)


def test_too_similar_pictures_raise_one_alarm():
    """First rows 2.0; the mean of three falls below a half with 1.6, 0.8, 0.4: 2.8 / 3 = 0.933."""
    rows = [{"diversity": 2 * d} for d in (0.8, 1.2, 1.0, 1.0, 1.0, 0.1, 0.9, 0.8, 0.4, 0.2, 0.1)]
    ((at, message),) = heard(CollapseAlarm(0.1, 0.5, 3), rows)
    assert at == 9 and "differ by 0.933, over 3 steps, where they differed by 2 at first" in message


def test_a_single_spike_and_non_finite_values_raise_no_alarm():
    spike = [{"winner_error_gap": 0.3 if i == 10 else 0.0} for i in range(30)]
    assert not heard(CollapseAlarm(0.1, 0.5, 5), spike)
    odd = [{"winner_error_gap": float("nan"), "diversity": None}, {"loss": 1.0}, {"winner_error_gap": None}] * 9
    assert not heard(CollapseAlarm(0.1, 0.5, 1), odd)


@pytest.mark.parametrize("cut", [0, 3, 6, 8])
def test_a_resumed_run_raises_the_same_alarms(cut):
    rows = [{"winner_error_gap": 0.05 * i, "diversity": 1 - 0.1 * i} for i in range(10)]
    whole = heard(CollapseAlarm(0.2, 0.6, 3), rows)
    assert len(whole) == 2
    resumed = CollapseAlarm(0.2, 0.6, 3, rows[:cut])
    assert heard(resumed, rows[cut:]) == [(i - cut, message) for i, message in whole if i >= cut]


def test_both_signs_in_one_row_are_both_told():
    rows = [{"diversity": 1.0, "winner_error_gap": 0.0}] * 5 + [{"diversity": 0.1, "winner_error_gap": 1.0}]
    ((at, message),) = heard(CollapseAlarm(0.1, 0.5, 1), rows)
    assert at == 5 and "preferred pictures" in message and "; and the pictures of a prompt" in message
