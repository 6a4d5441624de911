"""The estimator: scikit-learn's own checks, searches, pipelines; and bad input."""
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import tiny
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, PredefinedSplit, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.validation import validate_data
from skopt import BayesSearchCV

from ecomopt import EcomoptError, save
from ecomopt.core.assets import cache_dir
from ecomopt.tune.estimator import SPACE, TransformerClassifier

TEXTS = tiny.task(40).train["text"][:]
LABELS = np.array(["bad", "good"])[tiny.task(40).train["label"][:]]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A tiny model in a directory."""
    return str(tiny.written(tiny.classifier(layers=1, hidden=32), tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def make(model: str, **others) -> TransformerClassifier:
    return TransformerClassifier(model, **{"epochs": 1, "learning_rate": 5e-3, "batch_size": 8} | others)


# scikit-learn's checks hand over tables of numbers: here a row becomes a text, nothing else changes

FOLDER = []


class OnRows(TransformerClassifier):
    """The estimator, for rows of numbers: each number a word for its tens, halves and sign."""

    def __init__(
        self,
        model=None,
        learning_rate=5e-3,
        weight_decay=0.01,
        epochs=1,
        batch_size=8,
        max_length=128,
        random_state=0,
        cache=False,
    ):
        super().__init__(model, learning_rate, weight_decay, epochs, batch_size, max_length, random_state, cache)

    def fit(self, X, y):
        if y is None: return super().fit(["a"], None)
        X, y = validate_data(self, X, y)
        return clone_into(self, words(X), y)

    def predict_proba(self, X):
        if not hasattr(self, "classifier_"): return super().predict_proba(["a"])
        return super().predict_proba(words(validate_data(self, X, reset=False)))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array, tags.input_tags.one_d_array = False, True, False
        return tags


def clone_into(estimator: OnRows, texts: list[str], y) -> OnRows:
    """Fit with the tiny model, whose path the constructor does not know."""
    estimator.model, before = estimator.model or FOLDER[0], estimator.model
    try: return TransformerClassifier.fit(estimator, texts, y)
    finally: estimator.model = before


def words(X: np.ndarray) -> list[str]:
    return [" ".join(tiny.WORDS[int(np.clip(np.round(2 * value) + 10, 0, 19))] for value in row) for row in X]


NOT_APPLICABLE = {
    "check_classifiers_train": "asks for 83 % on clouds of points, after one epoch of a tiny model; see test_it_learns",
    "check_array_api_input": "texts are no arrays of numbers; it skips itself unless SCIPY_ARRAY_API is set",
}
ALL_CHECKS = [
    (estimator, check, getattr(check, "func", check).__name__)
    for estimator, check in estimator_checks_generator(OnRows())
]
CHECKS = [(estimator, check) for estimator, check, name in ALL_CHECKS if name not in NOT_APPLICABLE]


def test_what_does_not_apply_is_there_and_all_else_is_checked():
    assert NOT_APPLICABLE.keys() <= {name for _, _, name in ALL_CHECKS} and len(CHECKS) > 40


def name_of(value) -> str:
    return getattr(getattr(value, "func", value), "__name__", "OnRows")


@pytest.mark.slow
@pytest.mark.parametrize("estimator, check", CHECKS, ids=name_of)
def test_checks_of_scikit_learn(estimator, check, model):
    FOLDER[:] = [model]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


# texts

@pytest.mark.slow
@pytest.mark.parametrize("kind", [list, np.array, pd.Series])
def test_texts_in_any_container(model, kind):
    classifier = make(model).fit(kind(TEXTS), kind(LABELS))
    assert classifier.classes_.tolist() == ["bad", "good"]
    assert set(classifier.predict(kind(TEXTS[:5]))) <= {"bad", "good"}
    probability = classifier.predict_proba(TEXTS)
    assert probability.shape == (40, 2) and np.allclose(probability.sum(1), 1)


@pytest.mark.slow
def test_it_learns(model):
    assert make(model, epochs=15).fit(TEXTS, LABELS).score(TEXTS, LABELS) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("labels", [np.arange(40) % 3, (np.arange(40) % 2).astype(bool), np.array(["ä", "b"] * 20)])
def test_labels_come_back_as_they_went(model, labels):
    classifier = make(model).fit(TEXTS, labels)
    assert classifier.predict(TEXTS).dtype == labels.dtype
    assert classifier.predict_proba(TEXTS).shape[1] == len(set(labels.tolist()))


@pytest.mark.slow
def test_same_seed_same_model(model):
    def probability(seed): return make(model, random_state=seed).fit(TEXTS, LABELS).predict_proba(TEXTS)
    one, other, third = map(probability, (0, np.int64(0), 1))
    assert np.array_equal(one, other) and not np.allclose(one, third)
    make(model, random_state=None).fit(TEXTS, LABELS)


@pytest.mark.slow
def test_pickles_and_saves(model, tmp_path):
    classifier = make(model).fit(TEXTS, LABELS)
    assert np.array_equal(pickle.loads(pickle.dumps(classifier)).predict_proba(TEXTS), classifier.predict_proba(TEXTS))
    save(classifier.classifier_, tmp_path / "artifact")
    code = "import ecomopt, sys; print(*ecomopt.load(sys.argv[1]).predict(sys.argv[2:]), sep='|')"
    program = [sys.executable, "-c", code, tmp_path / "artifact", *TEXTS[:5]]
    answer = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert answer.strip().split("|") == classifier.predict(TEXTS[:5]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("stored", [True, False])
def test_the_cache_does_not_fill_up(model, stored, monkeypatch, tmp_path):
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path))
    make(model, cache=stored).fit(TEXTS, LABELS)
    assert len([path for path in (cache_dir() / "finetune").glob("*") if path.is_dir()]) == stored


@pytest.mark.parametrize("X, y, what", [
    ("a text", ["good"], "single string"),
    ([1.0, 2.0], ["good", "bad"], "not a text"),
    (["a", None], ["good", "bad"], "not a text"),
    ([["a"], ["b"]], ["good", "bad"], "not a text"),
    ([], [], "no texts"),
    (["a", "b"], None, "y is None"),
    (["a", "b"], ["good", "good"], "one class"),
])
def test_bad_input(model, X, y, what):
    with pytest.raises(EcomoptError, match=what) as caught: make(model).fit(X, y)
    assert isinstance(caught.value, ValueError)


def test_bad_input_that_scikit_learn_finds(model):
    with pytest.raises(ValueError, match="inconsistent"): make(model).fit(["a", "b"], ["good"])
    with pytest.raises(ValueError, match="continuous"): make(model).fit(["a", "b"], [0.5, 0.7])
    with pytest.raises(NotFittedError): make(model).predict(["a"])
    with pytest.raises(EcomoptError, match="learning_rate"): make(model, learning_rate=0.0).fit(TEXTS, LABELS)


# searches

SPLIT = PredefinedSplit([-1] * 30 + [0] * 10)


@pytest.mark.slow
def test_bayes_search(model):
    options = dict(n_points=1, random_state=0, optimizer_kwargs={"n_initial_points": 2})
    found = BayesSearchCV(make(model), SPACE, n_iter=3, cv=SPLIT, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.fit(TEXTS, LABELS)
    assert all(value in SPACE[name] for name, value in found.best_params_.items()) and len(found.predict(TEXTS)) == 40


@pytest.mark.slow
def test_grid_search_in_a_pipeline(model):
    pipeline = Pipeline([("clean", FunctionTransformer(func=strip)), ("model", make(model))])
    grid = {"model__learning_rate": [1e-5, 5e-3], "model__weight_decay": [0.0]}
    found = GridSearchCV(pipeline, grid, cv=2).fit(TEXTS, LABELS)
    assert len(found.cv_results_["params"]) == 2 and set(found.predict(TEXTS)) <= {"bad", "good"}


@pytest.mark.slow
@pytest.mark.parametrize("scoring", [None, "f1_macro", "neg_log_loss", "roc_auc"])
def test_scores_by_name(model, scoring):
    assert np.isfinite(cross_val_score(make(model), TEXTS, LABELS, cv=2, scoring=scoring, error_score="raise")).all()


def strip(X): return [x.strip() for x in X]


def test_hyperparameters_are_the_constructors():
    classifier = TransformerClassifier(learning_rate=1e-4)
    assert clone(classifier).get_params() == classifier.get_params() and classifier.set_params(epochs=2).epochs == 2
