"""Unlabelled sentences for the teachers of benchmarks to answer."""
import re

from ecomopt import Task, load_task
from ecomopt.compress.augment import without_near_copies


def held_out(task: Task) -> list[str]:
    """All texts that no training may see."""
    return [text for part in (task.valid, task.test, *task.tests.values()) for text in part["text"]]


def food_sentences(task: Task) -> list[str]:
    """Sentences of food reviews, without near copies of any that the task holds out."""
    sentences = [s for text in load_task("food").train["text"] for s in re.split(r"(?<=[.!?])\s+", text)]
    return without_near_copies([s for s in sentences if 20 < len(s) < 200], held_out(task))
