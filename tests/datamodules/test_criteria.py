"""Scores of criteria added up by hand, and what follows for pairs."""

import math

import pytest

from datamodules.criteria import (
    CriteriaUse,
    RewardCriterion,
    Term,
    difference,
    pair_margin,
    pair_weight,
    terms_of,
    totals,
)
from datamodules.relevance import RelevanceScorer

TERMS = {"a": Term(weight=3.0), "b": Term(weight=1.0, floor=0.5), "c": Term(weight=0.0, floor=0.2)}


def test_the_score_is_the_mean_by_weights() -> None:
    assert totals([{"a": 0.8, "b": 0.6, "c": 0.3}], TERMS) == [pytest.approx((3 * 0.8 + 0.6) / 4)]


def test_below_a_floor_nothing_else_helps() -> None:
    assert totals([{"a": 1.0, "b": 0.49, "c": 1.0}, {"a": 1.0, "b": 0.5, "c": 0.1}], TERMS) == [0.0, 0.0]
    assert totals([{"a": 1.0, "b": 0.5, "c": 0.2}], TERMS) == [pytest.approx(3.5 / 4)]  # at the floor is not below it


def test_none_is_left_out_and_never_0() -> None:
    assert totals([{"a": 0.8, "b": None, "c": None}], TERMS) == [pytest.approx(0.8)]
    # what says nothing about one of them says nothing about which is better
    assert totals([{"a": 0.8, "b": None}, {"a": 0.4, "b": 0.9}], TERMS) == [pytest.approx(0.8), pytest.approx(0.4)]
    assert totals([{"a": None, "b": 0.9, "c": 1.0}, {"a": 1.0, "b": None, "c": 1.0}], TERMS) is None
    assert difference({"a": None}, {"a": 0.3}, TERMS) is None
    assert difference({"a": 0.9}, {"a": 0.3}, TERMS) == pytest.approx(0.6)


def test_weights_and_margins_of_pairs() -> None:
    assert pair_weight(None, 0.1) == pair_weight(0.0, 0.1) == 1.0
    for gain in (-0.3, 0.05, 0.4):
        assert pair_weight(gain, 0.1) == pytest.approx(2 / (1 + math.exp(-gain / 0.1)))
    assert (pair_margin(None), pair_margin(0.4), pair_margin(-0.4)) == (None, 0.4, 0.0)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="weight of a reward criterion is a number, at least 0, got -1"):
        RewardCriterion(RelevanceScorer(), weight=-1)
    with pytest.raises(ValueError, match=r"floor of a reward criterion is a score, in \[0, 1\], got 2"):
        RewardCriterion(RelevanceScorer(), floor=2)
    with pytest.raises(ValueError, match=r"min_difference is a difference of scores, in \[0, 1\], got -0\.1"):
        CriteriaUse(min_difference=-0.1)
    with pytest.raises(ValueError, match="temperature is a difference of scores, above 0, got 0"):
        CriteriaUse(temperature=0)
    with pytest.raises(ValueError, match="has 2 criteria called a: give them a name"):
        terms_of([("a", Term()), ("a", Term())], "data.reward_criteria")
    with pytest.raises(ValueError, match="has the name 'a b': a name is of letters"):
        terms_of([("a b", Term())], "data.reward_criteria")
    with pytest.raises(ValueError, match="none of a has a weight above 0"):
        terms_of([("a", Term(weight=0))], "data.reward_criteria")
    assert RewardCriterion(RelevanceScorer()).label == "relevance"
    assert RewardCriterion(RelevanceScorer(), name="words").label == "words"
