"""Stages of a pipeline: together they are the model, in every schedule; what is predicted of them; bad input."""
import pytest
import tiny
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

from ecomopt import EcomoptError
from ecomopt.accelerate.data_parallel import launch
from ecomopt.accelerate.pipeline import (
    RecordedStage,
    Stage,
    bubble_fraction,
    idle_fraction,
    plot_schedule,
    split_layers,
)

IDS = torch.arange(5, 5 + 48).reshape(8, 6)
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2] * 4)
LABELS = torch.tensor([0, 1] * 4)


def model(layers=4): return tiny.classifier(layers=layers).model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_stages_in_a_row_are_the_model(stages, attention):
    whole = model()
    whole.set_attn_implementation(attention)
    h, parts = IDS, split_layers(whole, stages)
    for stage in parts: h = stage(h, MASK)
    assert torch.allclose(h, whole(input_ids=IDS, attention_mask=MASK).logits, atol=1e-6)
    held = [p for stage in parts for p in stage.parameters()]
    assert len(held) == len(set(held)) and set(held) == set(whole.parameters())


def train(rank, whole, kind, m, steps):
    p = dist.get_world_size()
    stage = RecordedStage(split_layers(whole, p)[rank], rank, p)
    schedule = kind(stage, m, loss_fn=F.cross_entropy)
    optimizer = torch.optim.SGD(stage.submod.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        schedule.step(*[IDS] * (rank == 0), mask=MASK, **({"target": LABELS} if rank == p - 1 else {}))
        optimizer.step()
    return {name: weight.detach() for name, weight in stage.submod.named_parameters()}, stage.events


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, stages, m", [(ScheduleGPipe, 2, 1), (ScheduleGPipe, 2, 4), (Schedule1F1B, 2, 8), (Schedule1F1B, 4, 4)]
)
def test_a_pipeline_trains_the_model_that_one_process_trains(kind, stages, m):
    whole = model()
    parts = launch(train, stages, whole, kind, m, 2)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(whole(input_ids=IDS, attention_mask=MASK).logits, LABELS).backward()
        optimizer.step()
    for stage, (weights, events) in zip(split_layers(whole, stages), parts):
        assert all(torch.allclose(weights[name], weight, atol=1e-6) for name, weight in stage.named_parameters())
        assert sorted(event[1:3] for event in events) == sorted(
            [("F", i) for i in range(m)] * 2 + [("B", i) for i in range(m)] * 2
        )
        assert all(before[4] <= after[3] for before, after in zip(events, events[1:]))


@pytest.mark.slow
def test_a_dead_stage_is_an_error_and_no_hang():
    def stumble(rank, whole):
        if rank == 1: raise MemoryError("no room for the second half")
        train(rank, whole, ScheduleGPipe, 2, 1)
    with pytest.raises(EcomoptError, match="Process 1 of 2 failed: MemoryError"): launch(stumble, 2, model())


@pytest.mark.parametrize("stages, which", [(3, "1, 2, 4"), (5, "1, 2, 4"), (0, "1, 2, 4"), (-2, "1, 2, 4")])
def test_layers_that_do_not_divide(stages, which):
    with pytest.raises(EcomoptError, match=f"(?s)4 layers do not divide into {stages} stages.*{which}"):
        split_layers(model(), stages)


def test_other_models_are_refused():
    with pytest.raises(EcomoptError, match="DistilBertForSequenceClassification cannot be split"):
        split_layers(tiny.distilbert().model, 2)
    with pytest.raises(EcomoptError, match="BertModel cannot be split"): split_layers(model().bert, 2)


@given(p=st.integers(1, 9), m=st.integers(1, 30))
def test_the_bubble_of_equal_stages(p, m):
    """Forward passes of one second, backward passes of two, each as early as it can be: idle is what is predicted."""
    forward = [(s, "F", i, float(s + i), float(s + i + 1)) for s in range(p) for i in range(m)]
    last = p + m - 1
    backward = [
        (s, "B", i, float(last + 2 * (p - 1 - s + i)), float(last + 2 * (p - s + i)))
        for s in range(p)
        for i in range(m)
    ]
    assert idle_fraction(forward + backward) == pytest.approx(bubble_fraction(p, m))
    assert 0 <= bubble_fraction(p, m) < 1 and bubble_fraction(p, m + 1) <= bubble_fraction(p, m) <= bubble_fraction(
        p + 1, m
    )


def test_every_pass_is_drawn():
    events = [(0, "F", 0, 10.0, 10.1), (1, "F", 0, 10.1, 10.3), (1, "B", 0, 10.3, 10.6), (0, "B", 0, 10.6, 10.7)]
    ax = plot_schedule(events)
    assert sorted((round(bar.get_x()), round(bar.get_width())) for bar in ax.patches) == [
        (0, 100),
        (100, 200),
        (300, 300),
        (600, 100),
    ]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stage 0", "stage 1"]


def test_a_middle_stage_has_neither_embeddings_nor_head():
    stage = Stage(model(), range(1, 3))
    assert (
        stage.embeddings is None and stage.head is None and stage(torch.zeros(2, 6, 64), MASK[:2]).shape == (2, 6, 64)
    )
