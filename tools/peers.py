"""Other tools as classifiers with labels and logits, for the benchmarks: only compared with, no dependency."""
import pickle
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from ecomopt import Classifier, Task
from ecomopt.core.artifact import disk_bytes

sys.path.append(".peers")  # where `make bench` puts it
from model2vec.distill import distill_from_model  # noqa: E402
from model2vec.train import StaticModelForClassification  # noqa: E402


def log_probabilities(found: np.ndarray) -> torch.Tensor:
    """As logits, [texts, classes]."""
    return torch.from_numpy(np.log(np.maximum(found, 1e-12))).float()


class TfIdf:
    """Words and pairs of words, and logistic regression, on the labelled texts."""

    def __init__(self, task: Task):
        self.labels = task.labels
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        self.pipeline = make_pipeline(words, LogisticRegression(C=10, max_iter=1000))
        self.pipeline.fit(task.train["text"][:], task.train["label"][:])

    def logits(self, texts: list[str], batch_size: int = 32) -> torch.Tensor:
        """Log probabilities, [texts, classes]."""
        parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        return log_probabilities(np.concatenate([self.pipeline.predict_proba(list(part)) for part in parts]))

    def bytes(self, path: Path) -> int:
        """On disk."""
        return len(pickle.dumps(self.pipeline))


class Model2Vec:
    """model2vec: distilled from the encoder of a teacher, and fine-tuned on the labelled texts."""

    def __init__(self, teacher: Classifier, task: Task, seed: int):
        static = distill_from_model(teacher.model.base_model, teacher.tokenizer, device="cpu")
        model = StaticModelForClassification.from_static_model(model=static)
        names = [[task.labels[i] for i in rows["label"]] for rows in (task.train, task.valid)]
        model.fit(task.train["text"][:], names[0], X_val=task.valid["text"][:], y_val=names[1], device="cpu",
                  random_seed=seed)
        self.pipeline = model.to_pipeline()
        self.labels = tuple(map(str, self.pipeline.classes_))

    def logits(self, texts: list[str], batch_size: int = 32) -> torch.Tensor:
        """Log probabilities, [texts, classes]."""
        return log_probabilities(self.pipeline.predict_proba(list(texts), batch_size=batch_size))

    def bytes(self, path: Path) -> int:
        """On disk."""
        self.pipeline.save_pretrained(str(path))
        return disk_bytes(path)
