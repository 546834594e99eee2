"""From a scheduler's responses to the coefficients of a linear multistep rule of the least order."""

from __future__ import annotations

import numpy as np

from mc_export.sampler.drive import Array, Drive

MAX_ORDER = 5
LAG_TOLERANCE = 1e-7


def solve(run: Drive, min_order: int = 1) -> Array | None:
    """Finds `[E, 1 + 2*order]` = `[input_scale, a_0.., b_0..]`, order at least `min_order`; None where order 5 is not enough.

    The rule is `x[i+1] = sum_k a_k x[i-k] + sum_k b_k v[i-k]`. A scheduler that keeps only past inputs shows its coefficients
    directly. One that keeps a corrected sample (UniPC) answers with every input since the start; its previous response,
    which *is* the sample it was given, cancels that tail exactly.
    """
    for order in range(min_order, MAX_ORDER + 1):
        rows = [_within(run, i, order) for i in range(run.evaluations)]
        if all(row is not None for row in rows):
            return np.column_stack([run.input_scale, np.stack([row for row in rows if row is not None])])
    return None


def residual(run: Drive, coefficients: Array) -> float:
    """The largest one-step error of `coefficients` on the random trajectory, relative to the size of the terms it sums."""
    order = (coefficients.shape[1] - 1) // 2
    worst = 0.0
    for i in range(run.evaluations):
        terms = [
            weight * values[i - k]
            for weights, values in (
                (coefficients[i, 1 : 1 + order], run.samples),
                (coefficients[i, 1 + order :], run.predictions),
            )
            for k, weight in enumerate(weights)
            if i >= k
        ]
        size = np.sum(np.abs(terms), axis=0).max() + np.abs(run.samples[i + 1]).max()
        worst = max(worst, float(np.abs(np.sum(terms, axis=0) - run.samples[i + 1]).max() / size))
    return worst


def _within(run: Drive, i: int, order: int) -> Array | None:
    """Step i as `[a_0..a_{order-1}, b_0..b_{order-1}]`, or None where older inputs are needed."""
    row = run.response[i]
    old = _older_than(run, row, i, order)
    limit = LAG_TOLERANCE * np.abs(row).max()
    if np.abs(old).max(initial=0.0) > limit:
        relation = run.response[i - 1].copy()
        relation[i] -= 1.0
        tail = _older_than(run, relation, i, order)
        power = float(tail @ tail)
        if power == 0.0:
            return None
        row = row - (float(old @ tail) / power) * relation
        if np.abs(_older_than(run, row, i, order)).max(initial=0.0) > limit:
            return None
    window = np.zeros(2 * order)
    lags = np.arange(min(order, i + 1))
    window[lags], window[order + lags] = row[i - lags], row[run.evaluations + i - lags]
    return window


def _older_than(run: Drive, row: Array, i: int, order: int) -> Array:
    """The entries of `row` at the samples and predictions of steps before `i - order + 1`."""
    end = max(0, i - order + 1)
    return np.concatenate([row[:end], row[run.evaluations : run.evaluations + end]])
