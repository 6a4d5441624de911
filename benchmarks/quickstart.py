"""The quickstart's chain with three seeds, beside word counts."""
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from ecomopt import compare, distill, finetune, load_task, prune_structured, quantize
from tools.bench import report

SEEDS, SIZES = [0, 1, 2], dict(layers=5, heads=2, neurons=128, first_token=True)
NOTES = (
    "Reviews, test split, two threads. Accuracy: mean, smallest and largest of three seeds; retained: of the same "
    "seed's teacher. Throughput: ratio to the float32 teacher, interleaved, median of the seeds' medians. "
    "The sizes were chosen on the validation split."
)

rows, task = [], load_task("reviews")
for seed in SEEDS:
    teacher = finetune("minilm", task, seed=seed)
    student = prune_structured(teacher, **SIZES, importance="taylor", task=task)
    student = distill(teacher, task, student, augment=20_000, epochs=4, learning_rate=2e-4, seed=seed)
    models = {"teacher": teacher, "student": student, "student, int8": quantize(student, embedding_bits=4)}
    comparison = compare(models, task, seed=seed)
    for name, m in comparison.measurements.items():
        rows.append({
            "model": name, "accuracy": m.accuracy, "retained": m.accuracy / comparison.measurements["teacher"].accuracy,
            "× throughput": comparison.pairs[name].speedup, "p50 ms": m.latency_ms["p50"],
            "sentences/s": m.throughput, "MB": m.disk_bytes / 1e6, "memory MB": (m.memory_bytes or 0) / 1e6,
        })

words = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))
words.fit(task.train["text"], task.train["label"])
rows.append({"model": "word counts", "accuracy": words.score(task.test["text"], task.test["label"])})

groups = pd.DataFrame(rows).groupby("model", sort=False)
accuracy = groups["accuracy"]
spread = {"accuracy": accuracy.mean(), "smallest": accuracy.min(), "largest": accuracy.max()}
table = groups.median().assign(**spread, retained=groups["retained"].mean()).round(4).reset_index()
report("quickstart", table, SEEDS, NOTES)
