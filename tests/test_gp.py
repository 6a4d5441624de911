"""Gaussian processes: the same numbers as scikit-learn and skopt, for all kinds of points; and bad input."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel
from sklearn.model_selection import cross_val_score
from skopt.acquisition import gaussian_ei

from ecomopt import EcomoptError
from ecomopt.tune.gp import (
    GaussianProcess,
    _matern52,
    _objective,
    expected_improvement,
    expected_improvement_gradient,
    log_expected_improvement,
)


def points(seed: int, n: int = 15, d: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.random((n, d))
    return X, np.sin(5 * X[:, 0]) + 0.1 * rng.normal(size=n)


def reference(kernel: str, s2: float, lengths, noise: float) -> GaussianProcessRegressor:
    shape = RBF(lengths) if kernel == "rbf" else Matern(lengths, nu=2.5)
    covariance = ConstantKernel(s2) * shape + WhiteKernel(noise)
    return GaussianProcessRegressor(covariance, alpha=0, optimizer=None, normalize_y=True)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), n=st.integers(1, 20), d=st.integers(1, 5), kernel=st.sampled_from(["rbf", "matern52"]))
def test_equals_scikit_learn(seed, n, d, kernel):
    rng = np.random.default_rng(seed)
    X, y, new = rng.random((n, d)), rng.normal(size=n), rng.random((7, d))
    lengths, s2, noise = rng.uniform(0.1, 3, d), rng.uniform(0.1, 3), 0.01
    if n == 1: y[:] = 0.0  # scikit-learn divides by a standard deviation of 0 elsewhere
    ours = GaussianProcess(kernel, theta=np.log([s2, *lengths, noise])).fit(X, y)
    theirs = reference(kernel, s2, lengths, noise).fit(X, y)
    mean, std = ours.predict(new, return_std=True)
    expected, noisy = theirs.predict(new, return_std=True)
    scale = y.std() or 1.0
    assert np.allclose(mean, expected, atol=1e-6) and np.allclose(std**2 + noise * scale**2, noisy**2, atol=1e-6)
    assert abs(ours.log_likelihood_ - theirs.log_marginal_likelihood_value_) < 1e-6


@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
def test_maximum_of_the_likelihood_is_scikit_learns(kernel):
    X, y = points(0, 25)
    ours = GaussianProcess(kernel, prior=False, n_starts=6, random_state=0).fit(X, y)
    shape = RBF([1] * 3, [(1e-2, 1e2)] * 3) if kernel == "rbf" else Matern([1] * 3, [(1e-2, 1e2)] * 3, nu=2.5)
    kernel = ConstantKernel(1, (1e-3, 1e3)) * shape + WhiteKernel(1e-2, (1e-8, 1))
    theirs = GaussianProcessRegressor(kernel, alpha=0, normalize_y=True, n_restarts_optimizer=6, random_state=0)
    theirs.fit(X, y)
    assert abs(ours.log_likelihood_ - theirs.log_marginal_likelihood_value_) < 1e-6


@pytest.mark.parametrize("prior", [True, False])
def test_gradient_of_the_likelihood(prior):
    X, y = points(1)
    D2, theta = np.square(X.T[:, :, None] - X.T[:, None, :]), np.log([0.8, 0.3, 1.0, 2.0, 0.02])
    slope = _objective(theta, D2, y, _matern52, prior)[1]
    for i in range(5):
        step = np.eye(5)[i] * 1e-5
        above, below = (_objective(at, D2, y, _matern52, prior)[0] for at in (theta + step, theta - step))
        numeric = (above - below) / 2e-5
        assert abs(numeric - slope[i]) < 1e-5 * max(1, abs(numeric))


@pytest.mark.parametrize("gap", [0.0, 1e-14, 1e-9, 1e-6])
@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
def test_duplicates_and_near_duplicates(gap, kernel):
    X, y = points(2, 8)
    many = np.concatenate([X + i * gap for i in range(6)])
    process = GaussianProcess(kernel).fit(many, np.tile(y, 6))
    mean, std = process.predict(X, return_std=True)
    assert np.isfinite(mean).all() and (std >= 0).all() and np.allclose(mean, y, atol=0.2)
    no_noise = np.log([1.0, 1.0, 1.0, 1.0, 1e-300])  # jitter is needed
    fixed = GaussianProcess(kernel, theta=no_noise).fit(many, np.tile(y, 6))
    assert np.allclose(fixed.predict(X), y, atol=0.05)


@pytest.mark.parametrize("X, y", [
    ([[0.5, 0.5]], [2.0]),
    ([[0.1], [0.2], [0.9]], [3.0, 3.0, 3.0]),
    ([[0.1], [0.1]], [1.0, 5.0]),
])
def test_few_or_equal_values(X, y):
    mean, std = GaussianProcess().fit(X, y).predict(X, return_std=True)
    assert np.allclose(mean, np.mean(y), atol=0.1) and np.isfinite(std).all()


@settings(max_examples=50)
@given(st.floats(-3, 3), st.floats(1e-3, 3), st.floats(-3, 3))
def test_improvement_is_skopts_and_so_is_its_logarithm(mean, std, best):
    class Fixed:
        def predict(self, X, return_std): return np.array([mean]), np.array([std])
    ours = expected_improvement(np.array([mean]), np.array([std]), best)
    assert np.allclose(ours, gaussian_ei([[0.0]], Fixed(), best, xi=0.0), atol=1e-8, rtol=0) and ours[0] >= 0
    logarithm = log_expected_improvement(np.array([mean]), np.array([std]), best)
    if ours[0] > 1e-200: assert np.isclose(logarithm[0], np.log(ours[0]), rtol=1e-3, atol=1e-5)


def test_logarithm_falls_without_bound():
    z = np.linspace(-1e6, 5, 20_001)
    values = log_expected_improvement(-z, np.ones_like(z), 0.0)
    assert np.isfinite(values).all() and (np.diff(values) > 0).all()


def test_gradient_of_the_improvement():
    X, y = points(3)
    process = GaussianProcess().fit(X, y)
    for point in np.random.default_rng(0).random((5, 3)):
        mean, std, *slopes = process.predict(point[None], return_std=True, return_mean_grad=True, return_std_grad=True)
        ours = expected_improvement_gradient(mean[0], std[0], *slopes, y.min())
        theirs = gaussian_ei(point[None], process, y.min(), xi=0.0, return_grad=True)[1]
        assert np.allclose(ours, theirs, atol=1e-8, rtol=0)


def test_without_uncertainty_the_improvement_is_that_of_the_mean():
    assert expected_improvement(np.array([1.0, -1.0]), np.array([0.0, 0.0]), 0.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("X, y, options, what", [
    ([[0.1], [0.2]], [1.0, float("nan")], {}, "finite"),
    ([[float("inf")], [0.2]], [1.0, 2.0], {}, "finite"),
    ([[0.1], [0.2]], [1.0], {}, "shapes"),
    ([0.1, 0.2], [1.0, 2.0], {}, "shapes"),
    (np.empty((0, 2)), [], {}, "shapes"),
    ([[0.1]], [1.0], {"kernel": "cubic"}, "kernel"),
])
def test_bad_input(X, y, options, what):
    with pytest.raises(EcomoptError, match=what): GaussianProcess(**options).fit(X, y)


def test_is_an_estimator_and_repeats_itself():
    X, y = points(4)
    process = GaussianProcess("rbf", random_state=3)
    assert clone(process).get_params() == process.get_params()
    assert np.array_equal(process.fit(X, y).predict(X), clone(process).fit(X, y).predict(X))


def test_scores_by_name():
    X, y = points(5, 40)
    scores = cross_val_score(GaussianProcess(), X, y, cv=2, scoring="neg_mean_squared_error", error_score="raise")
    assert (scores > -0.1).all()
