"""Penalties against singular values and dense operators; what they leave alone."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from fimprobe import penalties
from fimprobe.errors import FimprobeError
from fimprobe.penalties import frobenius, spectral


def mlp():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))


def largest(matrix):
    return float(torch.linalg.svdvals(matrix.detach())[0])


def exact(model):
    """Σ s_max² of a net of Linear layers, from singular value decompositions."""
    return sum(largest(m.weight) ** 2 for m in model.modules() if isinstance(m, nn.Linear))


# values


def test_frobenius_sums_squares_of_weights_only(double):
    class Conv1D(nn.Module):  # by its name, as transformers has it
        def __init__(self):
            super().__init__()
            self.nf, self.weight = 4, nn.Parameter(torch.randn(3, 4))

    layers = [nn.Linear(3, 4), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(2, 3, 2), Conv1D()]
    net = nn.ModuleList([*layers, nn.LayerNorm(4), nn.Embedding(3, 4), nn.GRU(2, 3)])
    value = frobenius(net)
    assert float(value) == pytest.approx(
        sum(float(m.weight.detach().norm()) ** 2 for m in layers), rel=1e-12
    )
    value.backward()
    for m in layers:
        assert torch.allclose(m.weight.grad, 2 * m.weight)
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {
        f"{i}.weight" for i in range(4)
    }


def test_transformers_conv1d_counts():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0
    )
    net = transformers.GPT2LMHeadModel(config)
    names = ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj", "lm_head")
    for name in names:
        weight = net.get_submodule(name).weight
        assert float(frobenius(net, include=name)) == pytest.approx(float(weight.norm()) ** 2)
        assert float(spectral(net, include=name)) == pytest.approx(largest(weight) ** 2, rel=0.02)
    assert net.lm_head.weight is net.transformer.wte.weight  # an embedding's too, and once
    assert float(frobenius(net)) == pytest.approx(
        sum(
            float(m.weight.detach().norm()) ** 2
            for n, m in net.named_modules()
            if n.split(".")[-1].startswith("c_") or n == "lm_head"
        )
    )


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (10, 500), (500, 10), (300, 300), (700, 1900)])
@pytest.mark.parametrize("seed", range(3))
def test_the_first_call_is_within_one_percent_on_random_matrices(shape, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(*shape)
    s = largest(layer.weight)
    assert 0.99 * s < float(spectral(layer)) ** 0.5 <= s * (1 + 1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(5, 8), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 2)])
def test_value_and_gradient_converge_to_those_of_the_singular_value(layer):
    layer = layer.double()
    value = spectral(layer, iterations=3000)
    matrix = layer.weight.detach().flatten(1).requires_grad_()
    u, s, vh = torch.linalg.svd(matrix)
    assert float(value) == pytest.approx(float(s[0]) ** 2, rel=1e-12)
    value.backward()
    want = 2 * s[0] * torch.outer(u[:, 0], vh[0])
    assert torch.allclose(layer.weight.grad.flatten(1), want, atol=1e-6)
    (auto,) = torch.autograd.grad(torch.linalg.svdvals(matrix)[0] ** 2, matrix)
    assert torch.allclose(layer.weight.grad.flatten(1), auto, atol=1e-6)


def test_the_gradient_is_that_of_the_value_with_u_held_fixed(double):
    layer = nn.Linear(6, 5)
    penalty = spectral(layer)
    (gradient,) = torch.autograd.grad(penalty, layer.weight)
    left, values, right = torch.linalg.svd(gradient)
    assert float(values[1]) < 1e-9 * float(values[0])  # rank one: 2 u (Wᵀu)ᵀ
    assert float(values[0]) == pytest.approx(2 * float(penalty) ** 0.5, rel=1e-12)
    image = layer.weight.detach().T @ left[:, 0]
    assert float(image.square().sum()) == pytest.approx(float(penalty), rel=1e-12)
    assert torch.allclose((image / image.norm()).abs(), right[0].abs(), atol=1e-9)


def operator(layer, size):
    """A convolution without bias as a dense matrix."""
    channels = layer.in_channels
    basis = torch.eye(channels * math.prod(size)).view(-1, channels, *size)
    with torch.no_grad():
        return layer(basis).flatten(1).T


CONVOLUTIONS = {
    "plain": (nn.Conv2d(2, 3, 3, bias=False), (6, 5)),
    "padded": (nn.Conv2d(2, 3, 3, padding=1, bias=False), (6, 5)),
    "circular": (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular", bias=False), (9,)),
    "strided": (nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), (7, 7)),
    "stride of the kernel": (nn.Conv2d(2, 3, 2, stride=2, bias=False), (6, 6)),
    "dilated": (nn.Conv1d(2, 3, 3, dilation=2, bias=False), (11,)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), (5, 5)),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4, padding=1, bias=False), (8,)),
    "3d": (nn.Conv3d(1, 2, 2, bias=False), (3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(3, 2, 3, bias=False), (4, 4)),
    "transposed, strided, groups": (
        nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, bias=False),
        (5,),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_norm_of_a_convolution_lies_where_the_docstring_says(name):
    layer, size = CONVOLUTIONS[name]
    layer = copy.deepcopy(layer).double()
    torch.set_default_dtype(torch.float64)
    kernel = float(spectral(layer, iterations=2000)) ** 0.5
    blocks = layer.weight.chunk(layer.groups)
    assert kernel == pytest.approx(max(largest(b.flatten(1)) for b in blocks), rel=1e-9)
    norm = largest(operator(layer, size))
    patches = math.prod(
        math.ceil(k / t) for k, t in zip(layer.kernel_size, layer.stride, strict=True)
    )
    assert kernel * (1 - 1e-9) <= norm <= kernel * patches**0.5 * (1 + 1e-9)
    if patches == 1:
        assert norm == pytest.approx(kernel, rel=1e-9)


def test_the_bound_on_a_convolution_is_attained(double):
    layer = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
    nn.init.ones_(layer.weight)
    assert float(spectral(layer)) ** 0.5 == pytest.approx(3**0.5)
    assert largest(operator(layer, (8,))) == pytest.approx(3)


def test_products_of_the_norms_are_held_by_the_sums(double):
    net = mlp()
    squares = [largest(net[i].weight) ** 2 for i in (0, 2, 4)]
    assert math.prod(squares) <= (float(spectral(net, iterations=500)) / 3) ** 3 * (1 + 1e-9)


# what persists


def test_one_iteration_a_call_follows_a_weight_that_an_optimizer_moves():
    net = mlp()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    for _ in range(150):
        before = exact(net)
        penalty = spectral(net)
        assert 0.99 * before < float(penalty) <= before * (1 + 1e-5)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(net(x), y) + 0.1 * penalty).backward()
        optimizer.step()


def test_the_penalty_lowers_what_it_penalises():
    found = {}
    for name, strength in {"none": 0.0, "weak": 0.01, "strong": 0.1}.items():
        torch.manual_seed(0)
        net = mlp()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        x, y = torch.randn(64, 6), torch.randint(3, (64,))
        for _ in range(200):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(net(x), y) + strength * spectral(net)).backward()
            optimizer.step()
        found[name] = exact(net)
    assert found["strong"] < found["weak"] < found["none"]


def test_a_call_costs_a_couple_of_products_with_each_weight():
    class Count(TorchDispatchMode):
        widths = None

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default and args[1].shape[1:].numel() == 900:
                self.widths.append(args[0].shape[1])
            return func(*args, **(kwargs or {}))

    layer = nn.Linear(25, 36)
    spectral(layer)
    for iterations in (1, 3):
        with Count() as count:
            count.widths = []
            spectral(layer, iterations=iterations)
        assert count.widths == [penalties.NUM_VECTORS] * 2 * iterations + [1]


def test_vectors_survive_dtypes_and_copies_start_afresh():
    layer = nn.Linear(40, 30)
    spectral(layer, iterations=300)
    kept = penalties._vectors[layer][0].double()
    layer.double()
    want = largest(layer.weight) ** 2
    assert float(spectral(layer)) == pytest.approx(want, rel=1e-5)
    now = penalties._vectors[layer][0]
    assert now.dtype == torch.float64
    assert torch.allclose(now.T @ now, kept.T @ kept, atol=1e-3)  # the same space, not a new one
    twin = copy.deepcopy(layer)
    assert twin not in penalties._vectors
    assert float(spectral(twin, iterations=300)) == pytest.approx(want, rel=1e-5)
    assert penalties._vectors[twin] is not penalties._vectors[layer]


def test_conversions_that_swap_tensors_still_work():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net = mlp()
        spectral(net).backward()
        net.zero_grad(set_to_none=True)
        net.double()
        assert float(spectral(net)) == pytest.approx(exact(net), rel=0.02)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_weight_of_another_shape_starts_afresh():
    layer = nn.Linear(4, 3)
    spectral(layer)
    layer.weight = nn.Parameter(torch.randn(3, 9))
    assert float(spectral(layer)) == pytest.approx(largest(layer.weight) ** 2, rel=0.02)


def test_vectors_die_with_the_model():
    gc.collect()
    before = len(penalties._vectors)
    net = mlp()
    spectral(net).backward()
    parametrised = parametrizations.weight_norm(nn.Linear(3, 3))
    spectral(parametrised).backward()
    assert len(penalties._vectors) == before + 4
    gone = weakref.ref(net[0].weight)
    del net, parametrised
    gc.collect()
    assert gone() is None
    assert len(penalties._vectors) == before


def test_the_basis_leaves_a_subspace_that_the_weight_keeps_apart():
    layer = nn.Linear(12, 12)
    large, small = torch.arange(12.0, 0, -1), torch.full((12,), 0.5)
    layer.weight.data = torch.diag(large)
    assert float(spectral(layer, iterations=300)) == pytest.approx(144, rel=1e-5)
    small[-1] = 2.0  # what the basis knew least of
    for dead in (small, torch.where(small > 1, small, 0.0)):
        layer.weight.data = torch.diag(large)
        spectral(layer, iterations=300)
        layer.weight.data = torch.diag(dead)
        for _ in range(30):
            penalty = spectral(layer)
        assert float(penalty) == pytest.approx(4, rel=1e-3)


def test_weights_of_zero_and_of_nan_do_no_lasting_harm():
    layer = nn.Linear(4, 3)
    weight = layer.weight.detach().clone()
    layer.weight.data.zero_()
    penalty = spectral(layer)
    penalty.backward()
    assert float(penalty) == 0 and not layer.weight.grad.any()
    layer.weight.data = weight.clone()
    for _ in range(5):
        spectral(layer)
    assert float(spectral(layer)) == pytest.approx(largest(weight) ** 2, rel=1e-4)
    for bad in (math.nan, math.inf):
        layer.weight.data[1, 2] = bad
        assert not math.isfinite(float(spectral(layer)))
        layer.weight.data = weight.clone()
        assert float(spectral(layer)) == pytest.approx(largest(weight) ** 2, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_empty_weight_counts_nothing():
    net = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2))
    for penalty in (frobenius, spectral):
        value = penalty(net)
        value.backward()
        assert float(value) == 0


# what is left alone


def test_nothing_on_the_model_changes_and_no_random_stream_moves():
    net = mlp()
    attributes = {n: set(vars(m)) for n, m in net.named_modules()}
    state, stream = pickle.dumps(net.state_dict()), torch.get_rng_state()
    spectral(net).backward()
    frobenius(net).backward()
    assert pickle.dumps(net.state_dict()) == state
    assert torch.equal(torch.get_rng_state(), stream)
    assert {n: set(vars(m)) for n, m in net.named_modules()} == attributes
    assert not any(vars(p) for p in net.parameters())
    assert not any(p._backward_hooks for p in net.parameters())
    assert net.training
    pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_do_not_change_training(guard):
    def train(watch):
        torch.manual_seed(0)
        net, values = mlp(), []
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(5):
            if watch:
                with guard():
                    assert not spectral(net, iterations=3).requires_grad
                    assert not frobenius(net).requires_grad
            optimizer.zero_grad()
            values.append(spectral(net))
            values[-1].backward()
            optimizer.step()
        return torch.stack(values)

    assert torch.equal(train(True), train(False))


def test_the_start_is_the_same_for_every_copy():
    net = mlp()
    torch.manual_seed(1)
    one = spectral(copy.deepcopy(net))
    torch.manual_seed(2)
    assert torch.equal(one, spectral(copy.deepcopy(net)))


def test_autocast_and_half_weights_are_computed_in_float32():
    net = mlp()
    want = {p: float(p(copy.deepcopy(net))) for p in (frobenius, spectral)}
    for penalty in (frobenius, spectral):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = penalty(copy.deepcopy(net))
        assert value.dtype == torch.float32 and float(value) == want[penalty]
        half = copy.deepcopy(net).bfloat16()
        value = penalty(half)
        value.backward()
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(want[penalty], rel=1e-2)
        assert half[0].weight.grad.dtype == torch.bfloat16
    assert frobenius(copy.deepcopy(net).double()).dtype == torch.float64


def test_complex_weights():
    layer = nn.Linear(5, 4, dtype=torch.complex128)
    value = spectral(layer, iterations=1000)
    assert float(value) == pytest.approx(largest(layer.weight) ** 2, rel=1e-9)
    assert float(frobenius(layer)) == pytest.approx(float(layer.weight.abs().square().sum()))
    value.backward()
    u, s, vh = torch.linalg.svd(layer.weight.detach())
    assert torch.allclose(layer.weight.grad, 2 * s[0] * torch.outer(u[:, 0], vh[0]), atol=1e-6)


# which weights


def test_tied_weights_count_once_and_frozen_ones_not():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    once = float(net[0].weight.norm()) ** 2
    last = float(net[3].weight.norm()) ** 2
    assert float(frobenius(net)) == pytest.approx(once + last)
    net[3].weight.requires_grad_(False)
    assert float(frobenius(net)) == pytest.approx(once)
    net[0].bias.requires_grad_(False)
    assert float(spectral(net)) == pytest.approx(largest(net[0].weight) ** 2, rel=0.02)


def test_include_takes_patterns_of_layer_names():
    net = nn.ModuleDict({"body": mlp(), "head": nn.Linear(3, 2)})
    head = float(net["head"].weight.norm()) ** 2
    first = float(net["body"][0].weight.norm()) ** 2
    assert float(frobenius(net, include="head")) == pytest.approx(head)
    assert float(frobenius(net, include=["head", "*.0"])) == pytest.approx(head + first)


def parametrised(kind):
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    make = {
        "weight norm": parametrizations.weight_norm,
        "spectral norm": parametrizations.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
        "old weight norm": nn.utils.weight_norm,
        "old spectral norm": nn.utils.spectral_norm,
        "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.4),
    }[kind]
    make(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.5).add_(0.1)
    return layer


@pytest.mark.parametrize(
    "kind",
    ["weight norm", "spectral norm", "orthogonal", "old weight norm", "old spectral norm", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_computed_weights_count_as_the_layer_uses_them(kind):
    layer = parametrised(kind)
    reference = copy.deepcopy(layer) if "old" not in kind and kind != "pruned" else parametrised(kind)
    reference.eval()(torch.zeros(1, 5))  # the old ones compute theirs in the forward
    weight = reference.weight.detach()
    state = pickle.dumps(layer.state_dict())
    for _ in range(3):  # again and again: every call needs a graph of its own
        value = frobenius(layer)
        assert float(value) == pytest.approx(float(weight.norm()) ** 2, rel=1e-5)
        assert float(spectral(layer, iterations=50)) == pytest.approx(largest(weight) ** 2, rel=0.01)
        value.backward()
        spectral(layer).backward()
    assert pickle.dumps(layer.state_dict()) == state  # spectral norm's vectors too
    sources = [n for n, p in layer.named_parameters() if "weight" in n and p.grad is not None]
    assert sources, kind
    assert layer.training
    for n, p in layer.named_parameters():
        if "weight" in n:
            p.requires_grad_(False)
    with pytest.raises(FimprobeError, match="frozen"):
        frobenius(layer)


def test_gradients_reach_what_a_weight_is_computed_from(double):
    layer = parametrised("weight norm").double()
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    frobenius(layer).backward()
    assert torch.allclose(g.grad, 2 * g)  # ‖W‖² = Σ g²
    assert torch.allclose(v.grad, torch.zeros_like(v), atol=1e-9)


def test_a_parametrisation_that_draws_does_not_move_the_random_stream():
    class Dropped(nn.Module):
        def forward(self, w):
            return nn.functional.dropout(w, 0.5, self.training)

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Dropped())
    stream = torch.get_rng_state()
    value = frobenius(layer)
    assert torch.equal(torch.get_rng_state(), stream)
    source = layer.parametrizations.weight.original
    assert float(value) == pytest.approx(float(source.norm()) ** 2)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            nn.Sequential(nn.Embedding(3, 4), nn.LSTM(4, 2)),
            {},
            "must have a layer to penalise .* got Sequential, which has none",
        ),
        (torch.relu, {}, "`model` must be a torch.nn.Module, got"),
        (mlp().requires_grad_(False), {}, r"weights of '0', '2', '4' are frozen"),
        (
            mlp(),
            {"include": "head.*"},
            r"`include` must match a layer .* got 'head.\*'.*'0', '2', '4'",
        ),
        (nn.LazyLinear(3), {}, r"\(LazyLinear\) is not initialised"),
        (nn.Sequential(nn.Linear(2, 2, device="meta")), {}, "'0' .* meta device"),
    ],
)
def test_errors_name_the_cause_and_the_remedy(model, options, message):
    for penalty in (frobenius, spectral):
        with pytest.raises(FimprobeError, match=message):
            penalty(model, **options)


@pytest.mark.parametrize("iterations", [0, -1, 1.5, True, "2"])
def test_iterations_must_be_a_positive_number(iterations):
    with pytest.raises(FimprobeError, match="`iterations` must be a positive integer"):
        spectral(mlp(), iterations=iterations)


# wrappers and transforms


def test_compiled_and_wrapped_models_count_as_what_they_wrap():
    net = mlp()
    want = float(frobenius(net))
    compiled = torch.compile(net, backend="eager")
    assert float(frobenius(compiled)) == want
    assert float(frobenius(nn.DataParallel(net), include="0")) < want
    inner = nn.Sequential(torch.compile(net, backend="eager"), nn.Tanh())
    assert float(frobenius(inner, include="0.0")) == float(frobenius(net, include="0"))
    assert float(spectral(compiled)) == pytest.approx(exact(net), rel=0.02)


def test_a_compiled_training_step_takes_the_penalty_with_one_break():
    import torch._dynamo

    torch._dynamo.reset()
    net = mlp()
    x, y = torch.randn(8, 6), torch.randint(3, (8,))

    def objective(net):
        return nn.functional.cross_entropy(net(x), y) + 0.1 * spectral(net) + 0.1 * frobenius(net)

    copies = [copy.deepcopy(net) for _ in range(2)]
    compiled = torch.compile(objective, backend="eager")
    for f, model in zip((objective, compiled), copies, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            f(model).backward()
            optimizer.step()
    for one, other in zip(copies[0].parameters(), copies[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(objective)(net)
    assert explained.graph_break_count <= 2  # one for each penalty
    torch._dynamo.reset()


def test_distributed_data_parallel_and_sharded_models(tmp_path):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = mlp()
        plain = copy.deepcopy(net)
        wrapped = nn.parallel.DistributedDataParallel(net)
        x = torch.randn(5, 6)
        (wrapped(x).square().mean() + spectral(wrapped) + frobenius(wrapped)).backward()
        (plain(x).square().mean() + spectral(plain) + frobenius(plain)).backward()
        for one, other in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad)

        from torch.distributed.fsdp import fully_shard

        sharded = copy.deepcopy(plain)
        sharded.zero_grad()
        fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        (sharded(x).square().mean() + spectral(sharded) + frobenius(sharded)).backward()
        for one, other in zip(sharded.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(one.grad.full_tensor(), other.grad, atol=1e-5)
    finally:
        dist.destroy_process_group()


def test_torch_func_sees_the_same_gradient():
    class Penalised(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self):
            return spectral(self.net)

    net = Penalised(mlp())
    values = {n: p.detach() for n, p in net.named_parameters()}
    first = torch.func.grad(lambda p: torch.func.functional_call(net, p, ()))(values)
    assert net.net[0] not in penalties._vectors
    net().backward()
    for n, p in net.named_parameters():
        if n.endswith("weight"):
            assert torch.allclose(first[n], p.grad, atol=1e-6)
    second = torch.func.grad(lambda p: torch.func.functional_call(net, p, ()))(values)
    assert torch.allclose(second["net.0.weight"], net.net[0].weight.grad, atol=1e-2)
    spectral(net.net)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_as_on_the_cpu():
    net = mlp()
    want = float(spectral(copy.deepcopy(net)))
    moved = copy.deepcopy(net).cuda()
    stream = torch.cuda.get_rng_state()
    assert float(spectral(moved)) == pytest.approx(want, rel=1e-5)
    assert torch.equal(torch.cuda.get_rng_state(), stream)
    moved.cpu()
    assert float(spectral(moved)) == pytest.approx(want, rel=1e-2)
    moved[2].cuda()  # a model spread over devices
    spectral(moved).backward()
    assert moved[2].weight.grad.is_cuda
