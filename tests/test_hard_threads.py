"""Models answer right in many threads at once, and in a process that was forked after they were used."""
import copy
import functools
import logging
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import tiny
import torch

from ecomopt import (
    EcomoptError,
    calibrate,
    codebooks_to_int8,
    convert,
    convert_language_model,
    load_model,
    prune,
    prune_structured,
    quantize,
    quantize_language_model,
    save,
    share_weights,
)
from ecomopt.accelerate import runtime
from ecomopt.core.generate import losses
from tools import architectures

pytestmark = pytest.mark.xdist_group("hard_threads")  # its fixtures are costly

WORDS = tiny.WORDS
TEXTS = [" ".join(WORDS[(i + j * j) % len(WORDS)] for j in range(1 + i % 13)) for i in range(32)]
PROMPTS = TEXTS[:12]


@functools.cache
def small(): return tiny.classifier(layers=1)


@functools.cache
def writer(): return tiny.language_model(num_hidden_layers=2)


def shared(): return share_weights(small(), bits=3, embedding_bits=3)


CLASSIFIERS = {
    "float": small,
    "distilbert": tiny.distilbert,
    "zeros": lambda: prune(small(), 0.5),
    "smaller": lambda: prune_structured(small(), neurons=64, heads=2, first_token=True),
    "int8": lambda: quantize(small()),
    "4-bit embeddings": lambda: quantize(small(), embedding_bits=4, linear=False),
    "static int8": lambda: calibrate(quantize(small()), TEXTS),
    "codebooks": shared,
    "codebooks in int8": lambda: codebooks_to_int8(shared()),
    "sdpa": lambda: convert(small(), "sdpa", "float32"),
    "sdpa int8": lambda: convert(small(), "sdpa", "int8"),
    "compile": lambda: convert(small(), "compile", "float32"),
    "openvino": lambda: convert(small(), "openvino", "float32"),
    "openvino int8": lambda: convert(small(), "openvino", "int8", TEXTS),
    "onnxruntime": lambda: convert(small(), "onnxruntime", "float32"),
    "onnxruntime int8": lambda: convert(small(), "onnxruntime", "int8"),
}
WRITERS = {
    "float": writer,
    "int8": lambda: quantize_language_model(writer(), 8),
    "int4": lambda: quantize_language_model(writer(), 4),
    **{f"OpenVINO, {bits} bits": lambda bits=bits: convert_language_model(writer(), bits) for bits in (32, 8, 4)},
}


@functools.cache
def classifier(kind: str):
    """A model, and its answers in one thread."""
    model = CLASSIFIERS[kind]()
    return model, [model.logits([text]) for text in TEXTS]


@functools.cache
def language_model(kind: str):
    """A model, and its answers in one thread."""
    lm = WRITERS[kind]()
    return lm, [lm.generate([prompt], 4) for prompt in PROMPTS]


def fresh(kind: str):
    """A copy that has not been used, with nothing unpacked or opened; compiling it again would take too long."""
    model, wanted = classifier(kind)
    return model if kind == "compile" else replace(model, model=copy.deepcopy(model.model)), wanted


def in_threads(call, inputs, threads: int = 8) -> list:
    with ThreadPoolExecutor(threads) as pool: return list(pool.map(call, inputs))


def wrong(found: list, wanted: list) -> int:
    """How many answers are another text's."""
    return sum(not torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


# ---------------------------------------------------------------- threads

@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_logits_in_threads_are_those_of_one_thread(kind):
    model, wanted = fresh(kind)
    assert wrong(wanted[1:], wanted[:-1]) > 20  # the texts have different answers
    assert wrong(in_threads(lambda text: model.logits([text]), TEXTS * 12), wanted * 12) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "int8", "compile", "openvino", "onnxruntime"])
def test_batches_in_threads_are_those_of_one_thread(kind):
    model, _ = classifier(kind)
    batches = [TEXTS[i:i + 1 + i % 5] for i in range(24)]
    wanted = [model.logits(batch, 2) for batch in batches]
    assert wrong(in_threads(lambda batch: model.logits(batch, 2), batches * 4), wanted * 4) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "int8", "openvino", "onnxruntime"])
def test_one_tokenizer_cuts_at_two_lengths_at_once(kind):
    """Two models with one tokenizer, which keeps the last length that it cut at."""
    model, _ = classifier(kind)
    models = [replace(model, max_length=length) for length in (3, 6, 128)]
    calls = [(m, text) for text in TEXTS for m in models]
    wanted = [m.logits([text]) for m, text in calls]
    assert wrong(in_threads(lambda call: call[0].logits([call[1]]), calls * 3), wanted * 3) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_texts_written_in_threads_are_those_of_one_thread(kind):
    lm, wanted = language_model(kind)
    lm = replace(lm, model=copy.deepcopy(lm.model))
    assert len({text for answer in wanted for text in answer}) > 6
    assert in_threads(lambda prompt: lm.generate([prompt], 4), PROMPTS * 8) == wanted * 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "int4", "OpenVINO, 32 bits", "OpenVINO, 4 bits"])
def test_losses_and_batches_of_prompts_in_threads(kind):
    """Answers that are written while others are judged."""
    lm, _ = language_model(kind)
    calls = [(PROMPTS[i:i + 3], i % 2) for i in range(9)]
    def call(one): return losses(lm, one[0]).tolist() if one[1] else lm.generate(one[0], 3)
    assert in_threads(call, calls * 8) == [call(one) for one in calls] * 8


def test_chats_and_plain_texts_in_threads():
    lm = copy.deepcopy(writer())
    lm.tokenizer.chat_template = "{% for m in messages %}very {{ m.content }} was{% endfor %}"
    lm = replace(lm, max_length=16)
    calls = [(text, chat) for text in TEXTS for chat in (True, False)]
    wanted = [lm.encode([text], chat) for text, chat in calls]
    assert in_threads(lambda call: lm.encode([call[0]], call[1]), calls * 8) == wanted * 8


def test_conversions_in_threads_leave_the_process_as_it_was(monkeypatch):
    """Output, logging and environment are the process's: to silence two conversions at once could silence it."""
    seconds = iter([0.05, 0.1, 0.2, 0.3])  # the first to begin ends first
    monkeypatch.setattr(runtime, "_make", lambda *arguments: time.sleep(next(seconds)))
    before = state()
    in_threads(lambda _: convert(small(), "eager", "float32"), range(4))
    assert state() == before


def state() -> list:
    """What a process has once, and a converter may change."""
    root = logging.root
    return [sys.stdout, root.manager.disable, root.level, root.filters[:], root.handlers[:], dict(os.environ),
            warnings.filters[:]]


@pytest.mark.slow
def test_a_conversion_that_fails_leaves_the_process_as_it_was(tmp_path, caplog):
    """OpenVINO left the root logger at ERROR where it could not convert a model, and nobody's warnings were seen."""
    model = load_model(architectures.checkpoint("GPT-2", tmp_path / "model"), architectures.LABELS, max_length=64)
    before = state()
    with pytest.raises(EcomoptError, match="openvino cannot"): convert(model, "openvino", "float32")
    assert state() == before
    logging.getLogger("a shop").warning("out of stock")
    assert "out of stock" in caplog.text


# ---------------------------------------------------------------- forks

def forked(call, seconds: float = 60) -> bool:
    """What a call returns in a forked process; one that hangs is killed and an error."""
    child = os.fork()
    if not child:
        try: is_right = bool(call())
        except BaseException as error:
            print("in the fork:", repr(error), file=sys.stderr)
            is_right = False
        os._exit(0 if is_right else 1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid: return status == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise TimeoutError("the forked process hangs")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_logits_after_a_fork(kind):
    model, wanted = classifier(kind)
    def answers(): return [model.logits([text]) for text in TEXTS[:8]]
    assert forked(lambda: wrong(answers(), wanted[:8]) == 0)
    assert wrong(answers(), wanted[:8]) == 0  # also here, afterwards


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("kind", WRITERS)
def test_texts_after_a_fork(kind):
    lm, wanted = language_model(kind)
    assert forked(lambda: [lm.generate([prompt], 4) for prompt in PROMPTS[:4]] == wanted[:4])
    assert lm.generate(PROMPTS[:1], 4) == wanted[0]


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("kind", ["float", "int8", "openvino", "onnxruntime"])
def test_threads_after_a_fork(kind):
    model, wanted = classifier(kind)
    assert forked(lambda: wrong(in_threads(lambda text: model.logits([text]), TEXTS), wanted) == 0)


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("kind", ["float", "openvino", "onnxruntime"])
def test_a_fork_while_other_threads_compute(kind):
    model, wanted = classifier(kind)
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(model.logits, TEXTS) for _ in range(24)]
        assert forked(lambda: wrong([model.logits([text]) for text in TEXTS[:4]], wanted[:4]) == 0)
        assert all(job.result().isfinite().all() for job in busy)


@pytest.mark.slow
@needs_fork
def test_a_model_that_is_dropped_after_a_fork():
    """To close a runtime of the parent would wait for threads that are not there."""
    models = [replace(classifier(kind)[0], model=copy.deepcopy(classifier(kind)[0].model)) for kind in
              ("openvino", "onnxruntime")]
    for model in models: model.logits(TEXTS[:1])
    def drop():
        models.clear()
        return True
    assert forked(drop)


@needs_fork
def test_a_text_goes_on_in_its_own_process_alone():
    lm, _ = language_model("OpenVINO, 32 bits")
    ids = torch.tensor(lm.encode(PROMPTS[1:2]))
    past = lm.model(ids).past_key_values
    def goes_on():
        try: lm.model(ids[:, :1], past_key_values=past)
        except Exception as error: return "another" in str(error) and "forgotten" in str(error)
    assert forked(goes_on)


SEVERAL_THREADS = """
import sys
sys.path[:0] = ["tests"]
import torch, ecomopt, test_hard_threads as t
torch.set_num_threads(2)
for path in sys.argv[1:]:
    model = ecomopt.load(path)
    wanted = [model.logits([text]) for text in t.TEXTS]
    model.logits(t.TEXTS * 4)
    assert t.forked(lambda: t.wrong([model.logits([text]) for text in t.TEXTS], wanted) == 0), path
print("right")
"""


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("kind", ["float", "int8", "openvino", "onnxruntime"])
def test_a_fork_of_a_process_that_computes_with_several_threads(kind, tmp_path):
    """OpenMP's threads are not there after a fork."""
    path = save(classifier(kind)[0], tmp_path / "model")
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", SEVERAL_THREADS, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.stdout.strip().endswith("right"), done.stderr[-2000:]
