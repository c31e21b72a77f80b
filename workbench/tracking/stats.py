"""How far a comparison can be trusted: intervals, differences, ties, fronts, budgets, learning rates.

A measured value has two sources of noise. The examples are a sample of all that there might be, and a run is one of
many that other seeds would have given. Both count here; `docs/compare.md` explains the formulas.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy import stats as scipy_stats
from statsmodels.nonparametric.smoothers_lowess import lowess
from statsmodels.stats.multitest import multipletests

from workbench.errors import DataError

Array = NDArray[np.float64]
Goal = Literal["maximize", "minimize"]

LEVEL = 0.95  # of intervals
ALPHA = 0.05  # rate at which any two methods that are alike may be told apart
DRAWS = 2000
CHUNK = 1 << 22  # numbers of a resample at once
RATES_TO_SMOOTH = 10  # different learning rates; of fewer a robust regression takes the best for an outlier


@dataclass(frozen=True)
class Scores:
    """What the runs of one configuration scored on the same examples.

    Attributes:
        values: (runs, examples), such that the mean over the examples is a run's metric: 1.0 and 0.0 for accuracy,
            jackknife pseudo-values for metrics that are no mean.
        seeds: of each run, those of initialisation and order.

    Raises:
        DataError: there is no run, fewer than two examples, a value that is no finite number, or no seeds for a run.
    """

    values: Array
    seeds: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or len(self.values) == 0 or self.values.shape[1] < 2:
            raise DataError(f"Scores of shape {self.values.shape} have no spread: it takes a run and two examples.")
        if len(self.seeds) != len(self.values):
            raise DataError(f"There are {len(self.values)} runs, but seeds of {len(self.seeds)}.")
        if not np.isfinite(self.values).all():
            raise DataError("Scores of examples must be finite numbers.")

    @property
    def examples(self) -> Array:
        """Each example's mean over the runs."""
        return self.values.mean(axis=0)

    @property
    def runs(self) -> Array:
        """Each run's mean over the examples: its metric."""
        return self.values.mean(axis=1)


@dataclass(frozen=True)
class Estimate:
    """A metric as one expects it on new examples after training with new seeds.

    Attributes:
        value: mean over runs and examples.
        low, high: ends of the interval.
        se: standard error.
        df: degrees of freedom of the interval.
        runs: number of runs.
        sd_initialisation, sd_order: spread (standard deviation) over seeds of either kind; NaN where unknown. Where
            runs differ in one kind of seeds alone, the whole spread is of that kind.
        seeds_known: whether the interval holds the noise of the seeds; one run alone says nothing of it.
    """

    value: float
    low: float
    high: float
    se: float
    df: float
    runs: int
    sd_initialisation: float
    sd_order: float
    seeds_known: bool


@dataclass(frozen=True)
class Difference:
    """By how much one metric is above another, with the interval and the two-sided p-value of no difference."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Interval:
    """Ends of an interval, and how it was found."""

    low: float
    high: float
    method: Literal["BCa", "percentile"]


@dataclass(frozen=True)
class Ties:
    """Who can be told from the best.

    Attributes:
        best: index of the finalist with the best value.
        tied: of each, whether it is not significantly worse than the best.
        p: (finalists, finalists), corrected p-values of all pairs; 1 on the diagonal.
    """

    best: int
    tied: list[bool]
    p: Array


@dataclass(frozen=True)
class Sensitivity:
    """How a metric depends on the learning rate.

    Attributes:
        rates, curve: the smoothed metric at each rate that was tried, by rate.
        best: the rate with the best smoothed value.
        low, high: the range around it whose smoothed values are all near the best one.
        smoothed: whether the curve is a local regression; otherwise it is the mean at each rate.
    """

    rates: Array
    curve: Array
    best: float
    low: float
    high: float
    smoothed: bool

    @property
    def decades(self) -> float:
        """Width of the range in powers of ten."""
        return float(np.log10(self.high / self.low))


# -------------------------------------------------------------------- values and differences


def estimate(scores: Scores, level: float = LEVEL) -> Estimate:
    """The metric with an interval for both sources of noise.

    The variance is that of the mean over examples plus that of the mean over seeds; what runs scatter on single
    examples is in both, so it is taken out once. Degrees of freedom by Welch and Satterthwaite.

    Raises:
        DataError: the scores have no spread to measure.
    """
    noise = _seed_noise(scores)
    variance, df = _total(_variance_of_mean(scores.examples), scores.values.shape[1], noise)
    value = float(scores.values.mean())
    half = _half_width(variance, df, level)
    return Estimate(
        value=value,
        low=value - half,
        high=value + half,
        se=float(np.sqrt(variance)),
        df=df,
        runs=len(scores.values),
        sd_initialisation=noise.sd_initialisation,
        sd_order=noise.sd_order,
        seeds_known=len(scores.values) > 1,
    )


def difference(a: Scores, b: Scores, level: float = LEVEL) -> Difference:
    """The metric of `a` less that of `b`, paired on examples; the seeds of the two count as independent.

    Raises:
        DataError: they were not measured on equally many examples.
    """
    return _difference(_paired(a, b), (_seed_noise(a), _seed_noise(b)), level)


def _difference(paired: Array, noises: Sequence[_SeedNoise], level: float = LEVEL) -> Difference:
    variance, df = _total(_variance_of_mean(paired), len(paired), *noises)
    value, half = float(paired.mean()), _half_width(variance, df, level)
    p = 2 * float(special.stdtr(df, -abs(value) / np.sqrt(variance))) if variance > 0 else float(value == 0)
    return Difference(value, value - half, value + half, p)


def paired_bootstrap(a: Scores, b: Scores, level: float = LEVEL, resamples: int = 9999, seed: int = 0) -> Interval:
    """Interval of the mean difference of these very runs over other examples, all of them resampled in pairs.

    Bias-corrected and accelerated (Efron 1987), percentiles where that is degenerate. It knows nothing of seeds.

    Raises:
        DataError: they were not measured on equally many examples.
    """
    paired = _paired(a, b)
    if np.ptp(paired) == 0:
        return Interval(float(paired[0]), float(paired[0]), "percentile")
    batch = max(1, CHUNK // len(paired))

    def interval(method: Literal["BCa", "percentile"]) -> Interval:
        found = scipy_stats.bootstrap(
            (paired,),
            np.mean,
            confidence_level=level,
            n_resamples=resamples,
            batch=batch,
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        return Interval(float(found.low), float(found.high), method)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy_stats.DegenerateDataWarning)
        found = interval("BCa")
    return found if np.isfinite([found.low, found.high]).all() else interval("percentile")


def tied_with_best(finalists: Sequence[Scores], goal: Goal, alpha: float = ALPHA) -> Ties:
    """Who cannot be told from the finalist with the best value.

    The best is chosen by the same scores, so any pair might have become a comparison with it: all pairs are tested and
    corrected together (Holm 1979). Among methods that are all alike, one is called worse in at most a share `alpha` of
    studies.
    """
    values = np.array([scores.values.mean() for scores in finalists])
    best = int(values.argmax() if goal == "maximize" else values.argmin())
    p = np.eye(len(finalists))
    pairs = list(combinations(range(len(finalists)), 2))
    if pairs:
        noises = [_seed_noise(scores) for scores in finalists]
        raw = [_difference(_paired(finalists[i], finalists[j]), (noises[i], noises[j])).p for i, j in pairs]
        corrected = multipletests(raw, alpha=alpha, method="holm")[1]
        for (i, j), value in zip(pairs, corrected, strict=True):
            p[i, j] = p[j, i] = value
    return Ties(best, [bool(p[best, i] > alpha) for i in range(len(finalists))], p)


@dataclass(frozen=True)
class _SeedNoise:
    """What seeds add to the variance of the mean over runs, beyond what the examples' variance has of it already."""

    variance: float
    df: float
    sd_initialisation: float
    sd_order: float


def _seed_noise(scores: Scores) -> _SeedNoise:
    """The noise of the seeds from the scatter of the runs' means.

    All I initialisations with all J orders: the two-way random-effects analysis of variance without replicates. The
    variance of the mean is (MS_I + MS_O - MS_E) / IJ, never less than MS_E / IJ. One kind of seeds alone: s^2 / runs.
    With holes: the variances of the mean of initialisations and of the mean of orders are added, so what belongs to
    neither counts twice; the spread by kind is then unknown.
    """
    runs = scores.runs
    if len(runs) == 1:
        return _SeedNoise(0.0, np.inf, np.nan, np.nan)
    levels = [np.unique(column, return_inverse=True)[1] for column in np.array(scores.seeds).T]
    shape = (levels[0].max() + 1, levels[1].max() + 1)
    if len(runs) != shape[0] * shape[1] or len(set(map(tuple, scores.seeds))) != len(runs):
        variance, df = _with_holes(runs, levels)
        sds = (np.nan, np.nan)
    elif 1 in shape:
        variance, df = runs.var(ddof=1) / len(runs), len(runs) - 1
        sd = float(runs.std(ddof=1))
        sds = (sd, np.nan) if shape[1] == 1 else (np.nan, sd)
    else:
        grid = np.empty(shape)
        grid[levels[0], levels[1]] = runs
        variance, df, sds = _crossed(grid)
    return _SeedNoise(max(0.0, float(variance) - _shared_noise(scores)), float(df), *sds)


def _crossed(grid: Array) -> tuple[float, float, tuple[float, float]]:
    """Of a full design (I, J): variance of the mean, degrees of freedom, spread over initialisations and orders."""
    rows, columns = grid.shape
    by_row, by_column, mean = grid.mean(axis=1), grid.mean(axis=0), grid.mean()
    df_i, df_o, df_e = rows - 1, columns - 1, (rows - 1) * (columns - 1)
    ms_i = columns * by_row.var(ddof=1)
    ms_o = rows * by_column.var(ddof=1)
    ms_e = ((grid - by_row[:, None] - by_column + mean) ** 2).sum() / df_e
    both = ms_i + ms_o - ms_e
    if both > ms_e:
        df = both**2 / (ms_i**2 / df_i + ms_o**2 / df_o + ms_e**2 / df_e)
    else:
        both, df = ms_e, df_e
    sds = float(np.sqrt(max(0.0, (ms_i - ms_e) / columns))), float(np.sqrt(max(0.0, (ms_o - ms_e) / rows)))
    return both / grid.size, max(df, 1.0), sds


def _with_holes(runs: Array, levels: Sequence[NDArray[np.intp]]) -> tuple[float, float]:
    """Of runs that are no full design: a variance of the mean that is rather too large, and degrees of freedom."""
    parts, dfs = [], []
    for level in levels:
        counts = np.bincount(level)
        if len(counts) > 1:
            means = np.bincount(level, weights=runs) / counts
            parts.append(means.var(ddof=1) * ((counts / len(runs)) ** 2).sum())
            dfs.append(len(counts) - 1)
    variance, most = sum(parts), len(runs) - 1
    if not variance:
        return runs.var(ddof=1) / len(runs), most
    return variance, min(most, variance**2 / sum(part**2 / df for part, df in zip(parts, dfs, strict=True)))


def _shared_noise(scores: Scores) -> float:
    """Variance of the grand mean by what runs scatter on single examples, which both other variances contain."""
    runs, examples = scores.values.shape
    rest = scores.values - scores.runs[:, None] - scores.examples + scores.values.mean()
    return float((rest**2).sum() / ((runs - 1) * (examples - 1) * runs * examples))


def _total(of_examples: float, examples: int, *noises: _SeedNoise) -> tuple[float, float]:
    """The whole variance, and its degrees of freedom by Welch and Satterthwaite."""
    variance = of_examples + sum(noise.variance for noise in noises)
    parts = of_examples**2 / (examples - 1) + sum(noise.variance**2 / noise.df for noise in noises)
    return variance, float(max(1.0, variance**2 / parts)) if parts > 0 else float(examples - 1)


def _variance_of_mean(values: Array) -> float:
    return float(values.var(ddof=1) / len(values))


def _half_width(variance: float, df: float, level: float) -> float:
    return float(special.stdtrit(df, (1 + level) / 2) * np.sqrt(variance))


def _paired(a: Scores, b: Scores) -> Array:
    if a.values.shape[1] != b.values.shape[1]:
        raise DataError(
            f"Scores of {a.values.shape[1]} and {b.values.shape[1]} examples cannot be paired; they are of other data."
        )
    return a.examples - b.examples


# -------------------------------------------------------------------- the Pareto front


def front(values: Array, minimise: Sequence[bool]) -> NDArray[np.bool_]:
    """Of each row of `values` (rows, objectives), whether no other one is at least as good everywhere and better once.

    Rows that are alike are all on the front or none. What is NaN counts as worst.
    """
    costs = np.where(minimise, values, -values)
    costs = np.where(np.isnan(costs), np.inf, costs)
    at_least = (costs[:, None] <= costs).all(axis=2)
    better = (costs[:, None] < costs).any(axis=2)
    dominated: NDArray[np.bool_] = np.any(at_least & better, axis=0)
    return ~dominated


def front_probability(
    finalists: Sequence[Scores], costs: Array, goal: Goal, draws: int = DRAWS, seed: int = 0
) -> Array:
    """How probable it is for each finalist to lie on the Pareto front of the metric and `costs` (finalists, costs).

    Costs are minimised and taken as they are. The metrics of all finalists are drawn together: a bootstrap over the
    examples, the same for all, and normal noise of the seeds for each. The result is the share of draws in which no
    other finalist is at least as good in everything and better in something.
    """
    rng = np.random.default_rng(seed)
    means = np.array([scores.examples for scores in finalists])
    examples = means.shape[1]
    metrics = np.empty((draws, len(finalists)))
    for part in np.array_split(np.arange(draws), max(1, draws * examples // CHUNK)):
        metrics[part] = rng.multinomial(examples, np.full(examples, 1 / examples), len(part)) @ means.T / examples
    noise = np.sqrt([_seed_noise(scores).variance for scores in finalists])
    metrics += noise * rng.standard_normal(metrics.shape)
    to_minimise = metrics if goal == "minimize" else -metrics
    known = np.where(np.isnan(costs), np.inf, costs)
    at_least = (known[:, None] <= known).all(axis=2)
    cheaper = (known[:, None] < known).any(axis=2)
    mine, other = to_minimise[:, None, :], to_minimise[:, :, None]
    dominated = at_least & (other <= mine) & (cheaper | (other < mine))
    return 1 - dominated.any(axis=1).mean(axis=0)


# -------------------------------------------------------------------- the search


def expected_best(values: Sequence[float] | Array, goal: Goal) -> Array:
    """Expected best value of n = 1 ... N of these N trials, drawn without replacement (Dodge et al. 2019,
    arXiv:1909.03004, in the unbiased form of Tang et al. 2020, arXiv:2004.13705).

    The k-th smallest of N is the largest of n drawn with probability C(k - 1, n - 1) / C(N, n).
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if goal == "minimize":
        ordered = -ordered[::-1]
    number = len(ordered)
    k = np.arange(1.0, number + 1)
    n = k[:, None]
    log_chance = _log_choose(np.maximum(k, n) - 1, n - 1) - _log_choose(number, n)
    drawn = np.where(k >= n, np.exp(log_chance), 0.0)
    best = drawn @ ordered
    return -best if goal == "minimize" else best


def sensitivity(
    rates: Sequence[float] | Array, values: Sequence[float] | Array, goal: Goal, drop: float
) -> Sensitivity:
    """How a metric depends on the learning rate, whatever else was searched along.

    The curve is a robust local linear regression (lowess, Cleveland 1979) over the logarithm of the rate, from ten
    different rates on; with fewer, the mean at each rate. The range holds the neighbouring rates, to both sides of the
    best one, whose curve is no more than `drop` worse: it never reaches beyond what was tried.

    Args:
        rates, values: of each trial that was measured.
        drop: in the units of the metric.

    Raises:
        DataError: no trial has both numbers.
    """
    pairs = np.column_stack([np.asarray(rates, dtype=np.float64), np.asarray(values, dtype=np.float64)])
    pairs = pairs[np.isfinite(pairs).all(axis=1) & (pairs[:, 0] > 0)]
    if not len(pairs):
        raise DataError("No trial has both a learning rate and a value.")
    tried, level = np.unique(pairs[:, 0], return_inverse=True)
    curve = np.bincount(level, weights=pairs[:, 1]) / np.bincount(level)
    smoothed = len(tried) >= RATES_TO_SMOOTH
    if smoothed:
        x = np.log10(tried)
        fitted = lowess(curve, x, frac=2 / 3, it=3, return_sorted=False)
        # where neighbours coincide lowess has no slope to fit, and says so by NaN
        curve = np.where(np.isfinite(fitted), fitted, curve)
    loss = curve if goal == "minimize" else -curve
    at = int(loss.argmin())
    far = np.flatnonzero(loss > loss[at] + drop)
    low = far[far < at].max(initial=-1) + 1
    high = far[far > at].min(initial=len(tried)) - 1
    return Sensitivity(tried, curve, float(tried[at]), float(tried[low]), float(tried[high]), smoothed)


def _log_choose(n: Array | int, k: Array) -> Array:
    logarithm: Array = special.gammaln(np.add(n, 1)) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return logarithm
