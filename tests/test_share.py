"""Weight sharing: clusters, codes, trainable codebooks, and models of few bits that are saved and loaded."""
import copy
import json
import subprocess
import sys
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from ecomopt import EcomoptError
from ecomopt.compress.distill import distill
from ecomopt.compress.quantize import Int8Linear, quantize
from ecomopt.compress.share import (
    SharedEmbedding,
    SharedInt8Linear,
    SharedLinear,
    _huffman_decode,
    _huffman_encode,
    _share,
    codebooks_to_int8,
    kmeans,
    pack_indices,
    share_weights,
    unpack_indices,
)
from ecomopt.compress.structured import prune_structured
from ecomopt.core.artifact import load, save
from ecomopt.core.measure import count_macs, count_parameters
from ecomopt.core.train import Classifier

TEXTS = tiny.task(12).train["text"][:]
MODELS = {
    "bert": tiny.classifier,
    "distilbert": tiny.distilbert,
    "uneven": lambda: prune_structured(tiny.classifier(), heads=[4, 2, 1], neurons=[90, 40, 7], first_token=True),
}


def random_weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shared_linear(bits: int = 3, group: int | None = None, bias: bool = True, **how) -> tuple[nn.Linear, SharedLinear]:
    torch.manual_seed(0)
    layer = nn.Linear(48, 64, bias=bias)
    return layer, _share(layer, bits, group or 48 * 64, **{"init": "linear", "huffman": True, "seed": 0, **how})


# k-means

@pytest.mark.parametrize("init", ["linear", "random"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kmeans_is_scikit_learn_s(bits, init):
    values = random_weights(1, 2000, seed=bits).double()
    first = kmeans(values, bits, init, max_iter=0)[0]
    centroids, indices = kmeans(values, bits, init)
    reference = KMeans(2**bits, init=first.T.numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(values.T)
    assert np.allclose(centroids[0], np.sort(reference.cluster_centers_[:, 0]), atol=1e-9)
    rank = np.argsort(np.argsort(reference.cluster_centers_[:, 0]))
    assert np.array_equal(indices[0], rank[reference.labels_])


@given(
    groups=st.integers(1, 4), size=st.integers(16, 90), bits=st.integers(2, 4),
    init=st.sampled_from(["linear", "random"]), seed=st.integers(0, 999), whole=st.booleans(),
)
@settings(max_examples=50)
def test_groups_are_clustered_one_by_one_and_each_weight_has_the_nearest_centroid(
    groups, size, bits, init, seed, whole
):
    values = random_weights(groups, size, seed=seed).double() * 3
    if whole: values = values.round()  # many equal ones, and centroids without any
    centroids, indices = kmeans(values, bits, init, seed)
    assert centroids.shape == (groups, 2**bits) and (centroids.diff() >= 0).all()
    distance = (values[..., None] - centroids[:, None]).abs()
    assert torch.allclose(distance.gather(2, indices.long()[..., None])[..., 0], distance.amin(2))
    for row, centroid, index in zip(values, centroids, indices):
        alone = kmeans(row[None], bits, init, seed)
        assert torch.equal(alone[0][0], centroid) and torch.equal(alone[1][0], index)


@given(st.integers(0, 999), st.integers(2, 5), st.sampled_from(["linear", "random"]))
@settings(max_examples=30)
def test_no_iteration_raises_the_inertia(seed, bits, init):
    values = random_weights(1, 300, seed=seed).double() ** 3
    def inertia(max_iter):
        centroids, indices = kmeans(values, bits, init, seed, max_iter)
        return (centroids.gather(1, indices.long()) - values).square().sum()
    inertias = [inertia(n) for n in range(8)]
    assert all(b <= a * (1 + 1e-12) for a, b in zip(inertias, inertias[1:]))


def test_equal_weights_have_no_error():
    centroids, indices = kmeans(torch.full((2, 40), 0.3), bits=3)
    assert torch.equal(centroids.gather(1, indices.long()), torch.full((2, 40), 0.3))


@pytest.mark.parametrize("init", ["linear", "random"])
@pytest.mark.parametrize("values", [[1.0, 1.0, -2.0], [0.5], [0.0, -0.0, 3.0, 3.0, 3.0]])
def test_fewer_different_weights_than_centroids(values, init):
    values = torch.tensor([values])
    centroids, indices = kmeans(values, bits=4, init=init)
    found = centroids.gather(1, indices.long())
    assert centroids.isfinite().all() and found.isfinite().all()
    if init == "linear": assert torch.equal(found, values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(monkeypatch, bad):
    with pytest.raises(EcomoptError, match="not finite"): kmeans(torch.tensor([[1.0, bad, 2.0]]), bits=2)
    model = tiny.classifier()
    model.model.bert.pooler.dense.weight.data[3, 5] = bad
    monkeypatch.setattr(copy, "deepcopy", lambda model: pytest.fail("work was begun"))
    with pytest.raises(EcomoptError, match="not finite") as caught: share_weights(model)
    assert caught.value.where == "bert.pooler.dense"


def test_even_weights_are_found_exactly():
    values = torch.tensor([[-1.0, 0.0, 1.0, 2.0]]).repeat_interleave(50, 1)
    centroids, indices = kmeans(values, bits=2)
    assert torch.equal(centroids.gather(1, indices.long()), values)


# codes

INDICES = st.tuples(st.integers(2, 8), st.integers(1, 700), st.integers(0, 999), st.floats(0.1, 5))


def drawn(bits: int, count: int, seed: int, skew: float) -> torch.Tensor:
    """Indices of which the low ones are the more frequent, the larger the skew."""
    return (2**bits * np.random.default_rng(seed).random(count) ** skew).astype(np.uint8)


@given(INDICES)
def test_codes_lose_nothing(case):
    bits, count, *_ = case
    indices = torch.from_numpy(drawn(*case))
    packed = pack_indices(indices, bits)
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack_indices(packed, bits, count), indices)
    assert torch.equal(_huffman_decode(_huffman_encode(indices, bits), bits, count), indices)


@pytest.mark.parametrize("bits", range(2, 9))
def test_huffman_s_code_is_near_the_entropy(bits):
    count = 200_000
    indices = drawn(bits, count, seed=0, skew=2)
    p = np.bincount(indices) / count
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    several = 8 // bits  # indices that are coded together
    redundancy = (p.max() ** several + 0.086) / several  # Gallager's bound
    length = 8 * len(_huffman_encode(torch.from_numpy(indices), bits)) / count
    assert entropy - 0.01 <= length <= entropy + redundancy + 0.03


@pytest.mark.parametrize(
    "spoil", [lambda code: code[:-3], lambda code: code.flip(0), lambda code: code[:0], torch.zeros_like]
)
def test_a_damaged_code_is_refused(spoil):
    code = _huffman_encode(torch.from_numpy(drawn(4, 5000, 0, 2)), 4)
    with pytest.raises(EcomoptError, match="damaged"): _huffman_decode(spoil(code), 4, 5000)


@pytest.mark.parametrize("claimed", [10, 4998, 5002, 10**9])
def test_a_code_of_another_length_is_refused(claimed):
    code = _huffman_encode(torch.zeros(5000, dtype=torch.uint8), 4)
    with pytest.raises(EcomoptError, match="damaged"): _huffman_decode(code, 4, claimed)


# layers

@pytest.mark.parametrize("huffman", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits, group", [(2, None), (3, 48), (5, 1536), (8, None)])
def test_a_layer_is_a_linear_layer_of_its_centroids(bits, group, bias, huffman):
    layer, shared = shared_linear(bits, group, bias, huffman=huffman)
    x, group = random_weights(7, 48), group or 48 * 64
    centroids, indices = kmeans(layer.weight.detach().reshape(-1, group), bits)
    weight = centroids.gather(1, indices.long()).view(64, 48)
    assert torch.equal(shared.weight, weight) and shared.codebook.shape == (48 * 64 // group, 2**bits)
    with torch.no_grad(): assert torch.equal(shared(x), F.linear(x, weight, layer.bias))
    assert torch.equal(shared(x), F.linear(x, weight, layer.bias))
    packed = -(-48 * 64 * bits // 8)
    assert len(shared.packed) == shared.size == packed or huffman and shared.size < packed


@pytest.mark.parametrize("group", [24, 96, None])
def test_a_centroid_s_gradient_is_the_sum_over_its_weights(group):
    _, shared = shared_linear(bits=3, group=group)
    x, weight = random_weights(5, 48), shared.weight.detach().requires_grad_()
    F.linear(x, weight, shared.bias.detach()).pow(3).sum().backward()
    shared(x).pow(3).sum().backward()
    summed = torch.zeros_like(shared.codebook)
    for i, (index, gradient) in enumerate(zip(shared.indices().flatten().tolist(), weight.grad.flatten())):
        summed[i // shared.group, index] += gradient
    assert torch.allclose(shared.codebook.grad, summed, rtol=1e-4, atol=1e-3)


def test_training_moves_centroids_and_leaves_indices():
    _, shared = shared_linear()
    x, indices = random_weights(5, 48), shared.indices().clone()
    with torch.no_grad(): before = shared(x)
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.01)
    shared(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad(): after = shared(x)
    assert not torch.equal(before, after) and torch.equal(after, F.linear(x, shared.weight, shared.bias))
    assert torch.equal(shared.indices(), indices) and len(shared.weight.unique()) <= 8


def test_a_layer_that_has_answered_can_be_trained_through():
    """What was unpacked in inference mode serves a training, of its own codebook or of what comes before."""
    _, shared = shared_linear()
    x = random_weights(5, 48)
    with torch.inference_mode(): shared(x)
    shared(x).sum().backward()
    shared.requires_grad_(False)
    with torch.inference_mode(): shared(x)
    x.requires_grad_()
    shared(x).sum().backward()
    assert torch.allclose(x.grad, shared.weight.sum(0).expand(5, -1), atol=1e-5)


@pytest.mark.parametrize("group", [16, 48, 192, 4800])
def test_a_table_looks_up_its_rows(group):
    shared = _share(nn.Embedding(100, 48), bits=4, group=group, init="random", huffman=group > 48, seed=0)
    ids = torch.tensor([[0, 99, 7], [7, 7, 50]])
    assert isinstance(shared, SharedEmbedding) and torch.equal(shared(ids), shared.dequantize()[ids])
    shared(ids).sum().backward()
    assert shared.codebook.grad.sum() == ids.numel() * 48


def test_a_codebook_that_is_changed_is_noticed():
    """Between two answers without gradients, by an optimizer or by hand."""
    _, shared = shared_linear()
    x = random_weights(2, 48)
    with torch.no_grad():
        before = shared(x)
        shared.codebook.mul_(2)
        assert torch.allclose(shared(x) - shared.bias, 2 * (before - shared.bias), atol=1e-5)


def test_numbers_loaded_later_and_copies_start_anew():
    (_, first), other = shared_linear(bits=3, huffman=False), _share(nn.Linear(48, 64), 3, 48 * 64, "linear", False, 0)
    x = random_weights(2, 48)
    with torch.no_grad():
        first(x), other(x)
        twin = copy.deepcopy(first)
        assert twin._cache is None and twin._indices is None and torch.equal(twin(x), first(x))
        first.load_state_dict(other.state_dict())
        assert torch.equal(first(x), other(x)) and not torch.equal(twin(x), other(x))


def test_another_type_is_followed():
    _, shared = shared_linear()
    x = random_weights(2, 48)
    with torch.no_grad():
        expected = shared(x)
        assert torch.allclose(shared.double()(x.double()), expected.double())


# whole models

@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", [
    dict(bits=8, embedding_bits=8),
    dict(bits=4, group=32, huffman=False),
    dict(bits=2, embedding_bits=None, init="random"),
])
def test_artifacts_answer_the_same(tmp_path, kind, how):
    model = MODELS[kind]()
    if kind == "uneven": how = {name: value for name, value in how.items() if name != "group"}
    before = model.logits(TEXTS)
    small = share_weights(model, **how)
    again = load(save(small, tmp_path / "small"))
    assert torch.equal(model.logits(TEXTS), before)
    assert torch.equal(again.logits(TEXTS), small.logits(TEXTS))
    if how["bits"] == 8: assert (small.logits(TEXTS) - before).abs().max() < 0.02


@pytest.mark.slow
def test_a_fresh_process_says_the_same(tmp_path):
    shared = share_weights(tiny.classifier(), bits=3)
    models = {"float": shared, "int8": codebooks_to_int8(shared)}
    for name, model in models.items(): save(model, tmp_path / name)
    code = ("import json, sys, ecomopt; texts = json.loads(sys.argv[1]);"
            "print(json.dumps([ecomopt.load(path).logits(texts).tolist() for path in sys.argv[2:]]))")
    paths = [str(tmp_path / name) for name in models]
    command = [sys.executable, "-c", code, json.dumps(TEXTS), *paths]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    for model, there in zip(models.values(), json.loads(answer.stdout)):
        assert torch.allclose(torch.tensor(there), model.logits(TEXTS), atol=1e-6)


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_bytes_are_as_many_as_said(bits, group):
    model = tiny.classifier()
    state = share_weights(model, bits, bits, group, huffman=False).model.state_dict()
    expected = 0
    for name, p in model.model.named_parameters():
        b, g = (8, p.numel()) if "position" in name or "token_type" in name else (bits, group or p.numel())
        shared = -(-p.numel() * b // 8) + 4 * 2**b * (p.numel() // g)
        expected += 4 * p.numel() if p.dim() == 1 or shared >= 4 * p.numel() else shared
    assert sum(tensor.nbytes for tensor in state.values()) == expected
    coded = share_weights(model, bits, bits, group).model.state_dict()
    assert sum(tensor.nbytes for tensor in coded.values()) <= expected


def test_what_is_left_alone_stays():
    model = tiny.classifier()
    words = share_weights(model, bits=None, embedding_bits=3).model
    assert [type(m) for m in words.modules() if hasattr(m, "codebook")] == [SharedEmbedding]
    layers = share_weights(model, bits=3, embedding_bits=None).model
    assert type(layers.get_input_embeddings()) is nn.Embedding
    assert sum(isinstance(m, SharedLinear) for m in layers.modules()) == 3 * 6 + 2
    later = share_weights(replace(model, model=words), bits=3, embedding_bits=None).model
    # two types of token are too few weights for a codebook of 256
    assert sum(hasattr(m, "codebook") for m in later.modules()) == 3 * 6 + 2 + 2
    assert type(share_weights(model, bits=8).model.classifier) is nn.Linear  # 128 weights would need a codebook of 256


def test_small_tables_keep_eight_bits():
    tables = share_weights(tiny.classifier(), bits=2, embedding_bits=2).model.bert.embeddings
    assert tables.position_embeddings.entries == 256 and tables.word_embeddings.entries == 4


def test_what_can_be_counted_is_counted_as_before():
    model = tiny.classifier()
    shared = share_weights(model, bits=3)
    assert count_macs(shared.model) == count_macs(model.model)
    books = sum(m.codebook.numel() for m in shared.model.modules() if hasattr(m, "codebook"))
    assert count_parameters(shared.model) == count_parameters(model.model) + books


def test_random_starts_differ_by_seed_alone():
    one, same, other = (share_weights(tiny.classifier(), init="random", seed=seed).logits(TEXTS) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.slow
def test_distillation_trains_the_codebooks(monkeypatch, tmp_path):
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path))
    teacher, task = tiny.classifier(seed=3), tiny.task(32)
    teacher.model.classifier.weight.data *= 30  # answers that differ
    shared = share_weights(teacher, bits=2)
    trained = distill(teacher, task, shared, epochs=4, learning_rate=1e-3, alpha=1.0)
    wanted = teacher.logits(TEXTS).log_softmax(1)
    def far(c): return F.kl_div(c.logits(TEXTS).log_softmax(1), wanted, reduction="batchmean", log_target=True)
    assert far(trained) < far(shared)
    old, new = shared.model.state_dict(), trained.model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old if name.endswith("packed"))
    moved = [name for name in old if name.endswith("codebook") and not torch.equal(old[name], new[name])]
    assert len(moved) == 3 * 6 + 2 + 1  # all but the word embeddings


# in int8

@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "how", [dict(bits=2), dict(bits=4, group=32), dict(bits=5, embedding_bits=None, huffman=False)]
)
def test_a_quantized_model_keeps_its_codebooks(tmp_path, kind, how):
    if kind == "uneven": how = {name: value for name, value in how.items() if name != "group"}
    shared = share_weights(MODELS[kind](), **how)
    quantized = quantize(shared)
    small = codebooks_to_int8(shared)
    assert torch.equal(small.logits(TEXTS), quantized.logits(TEXTS))
    layers = [m for m in small.model.modules() if isinstance(m, Int8Linear)]
    assert layers and all(isinstance(m, SharedInt8Linear) for m in layers)
    again = load(save(small, tmp_path / "small"))
    assert torch.equal(again.logits(TEXTS), small.logits(TEXTS))
    sizes = [(save(c, tmp_path / "size") / "model.safetensors").stat().st_size for c in (small, quantized)]
    assert sizes[0] < sizes[1] or "group" in how


@pytest.mark.slow
def test_trained_codebooks_are_kept_too(monkeypatch, tmp_path):
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path))
    teacher = tiny.classifier()
    trained = distill(teacher, tiny.task(16), share_weights(teacher, bits=3), learning_rate=1e-2)
    quantized = quantize(trained)
    small = codebooks_to_int8(trained)
    assert all(isinstance(m, SharedInt8Linear) for m in small.model.modules() if isinstance(m, Int8Linear))
    assert torch.equal(small.logits(TEXTS), quantized.logits(TEXTS))


def test_layers_that_were_not_shared_stay_in_int8():
    shared = share_weights(tiny.classifier(), bits=8)  # the head is too small for eight bits
    small = codebooks_to_int8(shared)
    assert type(small.model.classifier) is Int8Linear and isinstance(small.model.bert.pooler.dense, SharedInt8Linear)


@pytest.mark.parametrize("make", [
    lambda c: c, quantize, lambda c: share_weights(c, bits=None), lambda c: codebooks_to_int8(share_weights(c)),
])
def test_there_must_be_codebooks_to_keep(make):
    model = make(tiny.classifier())
    with pytest.raises(EcomoptError, match="no linear layers with shared weights"): codebooks_to_int8(model)


# bad input

@pytest.mark.parametrize("wrong, what", [
    (dict(bits=1), "of 1 bits"),
    (dict(bits=9), "of 9 bits"),
    (dict(bits=2.5), "of 2.5 bits"),
    (dict(bits="4"), "of '4' bits"),
    (dict(bits=True), "of True bits"),
    (dict(embedding_bits=0), "argument embedding_bits"),
    (dict(embedding_bits=16), "argument embedding_bits"),
    (dict(group=0), "group is 0"),
    (dict(group=-32), "group is -32"),
    (dict(group=1.5), "group is 1.5"),
    (dict(group=37), "groups of 37"),
    (dict(group=4096), "groups of 4096"),
    (dict(bits=8, group=256), "more than 256 weights"),
    (dict(init="best"), "'best'"),
    (dict(bits=None, embedding_bits=None), "nothing to share"),
])
def test_bad_input_is_refused_before_any_work(monkeypatch, wrong, what):
    model = tiny.classifier()
    monkeypatch.setattr(copy, "deepcopy", lambda model: pytest.fail("work was begun"))
    with pytest.raises(EcomoptError, match=what): share_weights(model, **wrong)


@pytest.mark.parametrize("wrong", [tiny.language_model, lambda: tiny.classifier().model, lambda: "minilm"])
@pytest.mark.parametrize("work", [share_weights, codebooks_to_int8])
def test_only_classifiers_are_taken(work, wrong):
    with pytest.raises(EcomoptError, match="is no classifier"): work(wrong())


@pytest.mark.parametrize("make, how", [
    (lambda c: share_weights(c), {}), (lambda c: share_weights(c, embedding_bits=None), {}), (quantize, {}),
    (lambda c: quantize(c, linear=False), {}), (lambda c: share_weights(c, bits=None), dict(bits=None)),
])
def test_what_is_shared_or_quantized_is_refused(monkeypatch, make, how):
    model = make(tiny.classifier())
    monkeypatch.setattr(copy, "deepcopy", lambda model: pytest.fail("work was begun"))
    with pytest.raises(EcomoptError, match="cannot be shared"): share_weights(model, **how)


def test_an_unknown_layer_is_refused():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.zeros(3, 4))

    model = tiny.classifier()
    model.model.bert.pooler.dense = Strange()
    with pytest.raises(EcomoptError, match="unsupported architecture: .* Strange") as caught: share_weights(model)
    assert caught.value.where == "bert.pooler.dense"


def test_a_model_of_one_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.device = nn.Linear(48, 64), torch.device("cpu")
            self.config = BertConfig(vocab_size=len(tiny.tokenizer()), num_labels=64)

        def get_input_embeddings(self): return None

        def forward(self, input_ids, **others):
            ones = F.one_hot(input_ids % 48, 48).float().sum(1)
            return SequenceClassifierOutput(logits=self.linear(ones))

    small = share_weights(Classifier(Model(), tiny.tokenizer()), bits=2).model.linear
    assert isinstance(small, SharedLinear) and prod(small.shape) == 48 * 64
