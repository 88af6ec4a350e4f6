"""Intervals of means against scipy, and whether they hold what they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from negengine.metrics.intervals import Interval, difference_interval, mean_interval, share_interval, student_quantile, units_of

# no variances below the smallest float, of which scipy's interval is nan
values_of = st.floats(-5, 5).map(lambda x: round(x, 9))
numbers = st.integers(2, 9).flatmap(lambda n: st.lists(values_of, min_size=n, max_size=n)).map(np.array)


@given(st.integers(1, 60), st.floats(0.5, 0.9995))
@settings(deadline=None)
def test_student_s_quantiles(freedom, probability):
    assert student_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9, abs=1e-12)


@given(numbers)
@settings(deadline=None)
def test_few_values_have_student_s_interval(values):
    found = mean_interval(values)
    low, high = (
        stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values)) if np.ptp(values) else (values.mean(),) * 2
    )
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


@given(numbers, numbers)
@settings(deadline=None)
def test_few_unpaired_values_have_welch_s_interval_or_a_wider_one(values, base):
    found = difference_interval(values, base, paired=False)
    assert found.mean == pytest.approx(values.mean() - base.mean())
    if np.ptp(values) + np.ptp(base) > 1e-3:
        expected = stats.ttest_ind(values, base, equal_var=False).confidence_interval(0.95)
        assert found.low <= expected.low + 1e-6
        assert found.high >= expected.high - 1e-6


def test_many_values_have_scipy_s_percentiles():
    values = np.random.default_rng(3).gamma(2, size=60)
    found = mean_interval(values, resamples=20_000)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)
    other = np.random.default_rng(4).gamma(3, size=40)
    found = difference_interval(values, other, paired=False, resamples=20_000)
    expected = stats.bootstrap(
        (values, other), lambda a, b, axis: a.mean(axis) - b.mean(axis), n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03)


@pytest.mark.parametrize("n", [3, 5, 9, 12, 30])
def test_intervals_hold_the_mean_as_often_as_they_say(n):
    generator = np.random.default_rng(n)
    held = [(found := mean_interval(generator.normal(size=n), resamples=400)).low <= 0 <= found.high for _ in range(600)]
    assert np.mean(held) >= 0.95 - 0.05  # the percentile bootstrap of 12 normal values holds it in 92 %


def test_paired_values_take_out_what_both_share():
    shared = np.random.default_rng(0).normal(0, 10, size=40)
    values, base = shared + 1 + np.random.default_rng(1).normal(0, 0.1, size=40), shared
    paired, alone = (difference_interval(values, base, paired=p) for p in (True, False))
    assert paired.low > 0.9
    assert alone.low < 0 < alone.high


def test_the_same_seed_gives_the_same_interval_and_one_value_none():
    values = np.random.default_rng(0).normal(size=20)
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5) != mean_interval(values, seed=6)
    assert mean_interval(np.array([2.0])) == Interval(2.0, None, None)
    assert difference_interval(np.array([2.0]), np.array([1.5]), paired=False) == Interval(0.5, None, None)


def test_an_interval_stays_within_what_is_possible():
    assert Interval(0.5, -0.2, 1.2).within(0, 1) == Interval(0.5, 0, 1)
    assert Interval(0.5, None, None).within(0, 1) == Interval(0.5, None, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval(np.array([])), "N >= 1"),
        (lambda: mean_interval(np.array([1, np.nan])), "NaN"),
        (lambda: mean_interval(np.array([1.0, 2.0]), level=1), "level"),
        (lambda: difference_interval(np.array([1.0, 2.0]), np.array([1.0]), paired=True), "equally many"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("n", [2, 5, 12, 30])
def test_shares_that_are_all_0_or_all_1_have_wilson_s_interval(n):
    for hits in (0, n):
        found = share_interval(np.full(n, hits / n))
        expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert found.units == n
    assert share_interval(np.array([0.0])) == Interval(0, None, None)
    mixed = np.array([0.0] * 11 + [1.0])
    assert share_interval(mixed) == mean_interval(mixed).within(0, 1)


def test_prompts_are_the_units_where_there_are_eight():
    values = {f"{prompt}{seed}": float(prompt + seed) for prompt in range(8) for seed in (0, 2)}
    prompts = {key: key[0] for key in values}
    assert units_of(values, prompts) == ({str(prompt): prompt + 1 for prompt in range(8)}, True)
    few = {key: value for key, value in values.items() if key[0] != "7"}
    assert units_of(few, prompts) == (few, False)
    assert units_of(values, {**prompts, "70": None}) == (values, False)


def test_the_interval_of_the_mean_over_prompts_holds_it_although_seeds_repeat_them():
    """Resampling the groups singly would hold it in some 70 % of cases."""
    generator = np.random.default_rng(0)
    held = []
    for _ in range(300):
        of_prompts, noise = generator.normal(size=20), generator.normal(0, 0.2, size=(20, 3))
        values = {f"{k}/{seed}": of_prompts[k] + noise[k, seed] for k in range(20) for seed in range(3)}
        found, _ = units_of(values, {key: key.partition("/")[0] for key in values})
        interval = mean_interval(np.array(list(found.values())), resamples=400)
        held.append(interval.low <= 0 <= interval.high)
    assert np.mean(held) > 0.88


def test_an_interval_may_have_one_bound_alone():
    assert Interval(0.5, -0.2, 1.2).within(0, None) == Interval(0.5, 0, 1.2)
    assert Interval(0.5, -0.2, 1.2).within(None, 1) == Interval(0.5, -0.2, 1)
