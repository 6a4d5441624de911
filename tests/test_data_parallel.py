"""Processes that work together: what they compute, what happens when one of them fails, and the training command."""
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import tiny
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import parameters_to_vector
from transformers import TrainerCallback

from ecomopt import EcomoptError
from ecomopt.accelerate import data_parallel
from ecomopt.accelerate.data_parallel import ShardSampler, launch
from ecomopt.core.artifact import load
from ecomopt.core.data import Task
from ecomopt.core.train import finetune

pytestmark = pytest.mark.xdist_group("data_parallel")  # its fixtures are costly

# the launcher

def total(rank, numbers):
    dist.all_reduce(numbers[rank])
    return rank, dist.get_world_size(), numbers[rank]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_process_works_with_the_others(processes):
    results = launch(total, processes, torch.arange(6.0).reshape(3, 2))
    expected = torch.arange(6.0).reshape(3, 2)[:processes].sum(0)
    assert [(rank, n) for rank, n, _ in results] == [(rank, processes) for rank in range(processes)]
    assert all(torch.equal(numbers, expected) for *_, numbers in results)


@pytest.mark.slow
def test_a_worker_may_be_made_on_the_spot(monkeypatch):
    """With what it uses, in today's environment, and with the threads it is given."""
    monkeypatch.setenv("SHOP", "open")
    factor = 3
    assert launch(lambda rank: [factor * rank, os.environ["SHOP"], torch.get_num_threads()], 2, threads=2) == [
        [0, "open", 2],
        [3, "open", 2],
    ]


def run_out(rank, worker, broken):
    worker() if rank == broken else dist.barrier()


def die(): psutil.Process().kill()
def leave(): os._exit(7)
def raise_it(): raise ValueError("no such sentence")


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("worker, message", [
    (die, "died: SIGKILL"), (leave, "died: exit code 7"), (raise_it, "failed: ValueError: no such sentence"),
])
def test_the_process_that_failed_first_is_named(worker, message, broken):
    with pytest.raises(EcomoptError, match=f"Process {broken} of 2 {message}") as caught:
        launch(run_out, 2, worker, broken)
    if worker is raise_it: assert "in raise_it" in str(caught.value.__cause__)


def left_behind() -> list[psutil.Process]:
    """Processes of the launcher that still run: all but the server that starts them and its helper."""
    return [child for server in psutil.Process().children() for child in server.children(recursive=True)]


@pytest.mark.slow
def test_nobody_waits_for_ever_and_nothing_is_left_behind():
    start = time.monotonic()
    with pytest.raises(EcomoptError, match="2 of 2 processes did not finish in 1 seconds"):
        launch(run_out, 2, signal.pause, 1, timeout=1)
    assert time.monotonic() - start < 60  # not the half hour that torch would wait
    assert left_behind() == []


@pytest.mark.slow
def test_bad_results_and_bad_numbers():
    with pytest.raises(EcomoptError, match="plain data"): launch(lambda rank: EcomoptError("", "", ""), 1)
    with pytest.raises(EcomoptError, match="0 processes"): launch(total, 0)


# the sampler

@given(
    rows=st.integers(0, 60),
    processes=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
    batch=st.integers(1, 7),
)
def test_every_row_once_in_the_batches_that_one_process_would_take(rows, processes, seed, epoch, batch):
    def part(rank, of):
        sampler = ShardSampler(rows, rank, of, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
        return list(sampler)

    parts, alone = [part(rank, processes) for rank in range(processes)], part(0, 1)
    assert sorted(alone) == list(range(rows)) and max(map(len, parts)) - min(map(len, parts)) <= 1
    for start in range(0, max(map(len, parts)), batch):
        together = [row for own in parts for row in own[start:start + batch]]
        assert sorted(together) == sorted(alone[processes * start:processes * (start + batch)])


def test_epochs_and_seeds_shuffle():
    sampler = ShardSampler(50, 0, 2)
    first = list(sampler)
    assert first == list(sampler) != list(ShardSampler(50, 0, 2, seed=1))
    sampler.set_epoch(1)
    assert first != list(sampler)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_none(rank):
    with pytest.raises(EcomoptError, match=f"no process {rank} of 2"): ShardSampler(10, rank, 2)


# training

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A model that drops nothing out, and a shop's file: 140 rows to train on."""
    folder = tmp_path_factory.mktemp("shop")
    model = tiny.classifier(layers=2)
    model.model.config.update(dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    tiny.written(model, folder / "model")
    tiny.task(200).train.to_csv(folder / "shop.csv")
    return folder


class Stop(TrainerCallback):
    """Fails at a step, as often as the file says."""
    def on_step_end(self, args, state, control, **others):
        if state.global_step == 13 and os.environ.get("STOP"): raise RuntimeError("stopped")


def trained(rank, folder, cache, **settings):
    os.environ["ECOMOPT_CACHE"] = str(folder / cache)
    settings = dict(
        epochs=3, batch_size=20, bf16=False, save_strategy="steps", save_steps=5, callbacks=[Stop()], **settings
    )
    model = finetune(folder / "model", Task.from_csv(folder / "shop.csv", "text", "label"), **settings).model
    return parameters_to_vector(model.parameters()).detach(), [
        str(path) for path in (folder / cache / "trainer").glob("*")
    ]


@pytest.fixture(scope="module")
def undisturbed(shop): return launch(trained, 1, shop, "one")[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_that_was_stopped_becomes_the_same_model(shop, undisturbed, processes, monkeypatch):
    """In one process to the last bit, in two up to the order in which sums are rounded; no checkpoints are left."""
    monkeypatch.setenv("STOP", "yes")
    with pytest.raises(EcomoptError, match="stopped"): launch(trained, processes, shop, f"stopped{processes}")
    monkeypatch.delenv("STOP")
    assert list((shop / f"stopped{processes}" / "trainer").glob("*/checkpoint-10/complete"))
    for weights, checkpoints in launch(trained, processes, shop, f"stopped{processes}"):
        assert torch.allclose(weights, undisturbed, atol=1e-6 if processes > 1 else 0) and checkpoints == []


@pytest.mark.slow
def test_a_finished_training_is_found_by_all(shop):
    def twice(rank, folder):
        first = trained(rank, folder, "found")[0]
        return torch.equal(first, trained(rank, folder, "found")[0])
    assert launch(twice, 2, shop) == [True, True]


def test_a_batch_that_cannot_be_shared(shop):
    def odd(rank, folder):
        finetune(folder / "model", Task.from_csv(folder / "shop.csv", "text", "label"), batch_size=15)
    with pytest.raises(EcomoptError, match="2 processes cannot share a batch of 15"): launch(odd, 2, shop)


# the command

def torchrun(folder, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words]
    environment = {**os.environ, "ECOMOPT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_is_restarted_and_the_model_is_the_same(shop, undisturbed):
    run = torchrun(
        shop,
        "--standalone",
        "--max-restarts",
        "1",
        "-m",
        "ecomopt.core.train",
        "finetune",
        "model",
        "shop.csv",
        "--out",
        "out",
        "--epochs",
        "3",
        "--batch-size",
        "20",
        "--bf16",
        "false",
        "--save-steps",
        "5",
    )
    end = time.monotonic() + 200
    while (
        not (checkpoints := list(shop.glob("cache/trainer/*/checkpoint-5/complete")))
        and time.monotonic() < end
        and run.poll() is None
    ):
        time.sleep(0.01)
    assert checkpoints, run.communicate(timeout=60)[1][-2000:]
    next(
        child for child in psutil.Process(run.pid).children(recursive=True) if child.environ().get("RANK") == "1"
    ).kill()
    messages = run.communicate(timeout=200)[1]
    assert run.returncode == 0, messages[-2000:]
    assert "exitcode: -9" in messages and "Training goes on from" in messages
    weights = parameters_to_vector(load(shop / "out").model.parameters())
    assert torch.allclose(weights, undisturbed, atol=1e-6)


@pytest.mark.slow
def test_a_port_in_use_is_said_at_once(shop):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        run = torchrun(
            shop,
            "--master-port",
            str(taken.getsockname()[1]),
            "-m",
            "ecomopt.core.train",
            "finetune",
            "model",
            "shop.csv",
            "--out",
            "never",
        )
        messages = run.communicate(timeout=100)[1]
    assert run.returncode and "EADDRINUSE" in messages


def test_a_process_that_died_before_the_wait_is_named_at_once(tmp_path):
    ended = [SimpleNamespace(sentinel=None, exitcode=code) for code in (-9, 0)]
    with pytest.raises(EcomoptError, match="died: SIGKILL"): data_parallel._wait(ended, 60, str(tmp_path))
