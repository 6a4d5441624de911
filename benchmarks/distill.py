"""What distillation costs: a step beside a hand-written loop, an epoch beside plain fine-tuning."""
import copy
from time import perf_counter

import pandas as pd
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, Trainer, get_linear_schedule_with_warmup

from ecomopt import DistillationTrainer, finetune, load_task
from ecomopt.compress.distill import keep_layers, teacher_logits
from ecomopt.core.train import run, tokenized, training_arguments
from tools.bench import report

ROUNDS, STEPS, BATCH = 7, 30, 16
NOTES = (
    f"Three layers of the review classifier as the student, batches of {BATCH}, two threads. Step: {STEPS} steps "
    "with a forward pass of the teacher in each, by `DistillationTrainer` and by a loop of plain torch with the "
    "same batches, clipping, optimizer and schedule; start and end of the training included. Epoch: the same "
    f"{STEPS} steps with cached teacher logits, and plain fine-tuning on the labels by `Trainer`. Time-interleaved, "
    f"{ROUNDS} rounds after one warm-up round; ratios are medians and interquartile ranges of the rounds."
)

torch.set_num_threads(2)
task = load_task("reviews").sample(train=STEPS * BATCH, transfer=0)
teacher = finetune("minilm", task, epochs=1, batch_size=BATCH)
student = keep_layers(teacher, 3)
arguments = training_arguments(1, 1e-4, BATCH, 0, train_sampling_strategy="sequential", warmup_steps=0)
rows = tokenized(student, task.train)
cached = rows.add_column("teacher_logits", teacher_logits(teacher, task.train["text"], arguments.bf16).tolist())
collate = DataCollatorWithPadding(student.tokenizer)


def trainer(kind: type[Trainer], data: Dataset, **others) -> float:
    """Seconds of an epoch by a trainer."""
    ready = kind(copy.deepcopy(student.model), arguments, train_dataset=data, data_collator=collate, **others)
    start = perf_counter()
    run(ready)
    return perf_counter() - start


def loop() -> float:
    """Seconds of the same epoch by hand."""
    model = copy.deepcopy(student.model).train()
    model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    start = perf_counter()
    for batch in torch.utils.data.DataLoader(rows, BATCH, collate_fn=collate):
        labels = batch.pop("labels")
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            with torch.no_grad(): targets = teacher.model(**batch).logits.float()
            logits = model(**batch).logits.float()
        soft = F.kl_div(
            F.log_softmax(logits / 2, -1), F.log_softmax(targets / 2, -1), reduction="batchmean", log_target=True
        )
        (0.9 * 4 * soft + 0.1 * F.cross_entropy(logits, labels)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return perf_counter() - start


ways = {
    "step: hand-written loop": loop,
    "step: DistillationTrainer": lambda: trainer(DistillationTrainer, rows, teacher_model=teacher.model),
    "epoch: fine-tuning on labels": lambda: trainer(Trainer, rows),
    "epoch: distillation, cached logits": lambda: trainer(DistillationTrainer, cached),
}
seconds = pd.DataFrame([{name: way() for name, way in ways.items()} for _ in range(ROUNDS + 1)][1:])
names = list(ways)
# each is divided by the first of its pair
ratios = pd.DataFrame({name: seconds[name] / seconds[names[i - i % 2]] for i, name in enumerate(names)})
table = pd.DataFrame(
    {
        "what": names,
        "ms a step": 1000 * seconds.median().values / STEPS,
        "ratio": ratios.median().values,
        "lower quartile": ratios.quantile(0.25).values,
        "upper quartile": ratios.quantile(0.75).values,
    }
).round(3)
report("distill", table, [0], NOTES)
