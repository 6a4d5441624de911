"""The quickstart's chain with three seeds, beside word counts."""
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from ecomopt import compare, distill, finetune, load_task, prune_structured, quantize
from tools.bench import report

SEEDS = [0, 1, 2]
NOTES = (
    "Reviews, test split, two threads. Accuracy: mean, smallest and largest of three seeds; retained: of the same seed's teacher. "
    "Throughput: ratio to the float32 teacher, measured in turns in one process, median of the seeds' medians. "
    "Distilled and shrunk models were chosen on the validation split."
)

rows, task = [], load_task("reviews")
for seed in SEEDS:
    sample = task.sample(transfer=6_000, seed=seed)
    teacher = finetune("minilm", sample, epochs=2, batch_size=16, seed=seed)
    start = prune_structured(
        teacher, layers=5, neurons=384, heads=8, first_token=True, importance="taylor", task=sample
    )
    student = distill(
        teacher, sample, quantize(start, embedding_bits=4, linear=False), augment=13_000, learning_rate=5e-5, seed=seed
    )
    models = {"teacher, float32": teacher, "student, float32": student, "student, int8": quantize(student)}
    comparison = compare(models, sample, seed=seed)
    for name, m in comparison.measurements.items():
        rows.append(
            {
                "model": name,
                "accuracy": m.accuracy,
                "retained": m.accuracy / comparison.measurements["teacher, float32"].accuracy,
                "× throughput": comparison.pairs[name].speedup,
                "p50 ms": m.latency_ms["p50"],
                "sentences/s": m.throughput,
                "MB": m.disk_bytes / 1e6,
                "memory MB": (m.memory_bytes or 0) / 1e6,
            }
        )

words = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))
words.fit(task.train["text"], task.train["label"])
rows.append({"model": "word counts", "accuracy": words.score(task.test["text"], task.test["label"])})

groups = pd.DataFrame(rows).groupby("model", sort=False)
table = groups.median().assign(**{"accuracy": groups["accuracy"].mean(), "smallest": groups["accuracy"].min(),
    "largest": groups["accuracy"].max(), "retained": groups["retained"].mean()}).round(4).reset_index()
report("quickstart", table, SEEDS, NOTES)
