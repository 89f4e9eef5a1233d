"""The twin shares no memory with the model, and computes what the model computes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from fimprobe import FimprobeError, measure
from fimprobe.model.twin import make_twin, trainable, unwrap


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mid = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.mid(self.embed(tokens)))).mean(1)


class Remembers(nn.Module):
    """Keeps non-leaf tensors of its last forward in an attribute, a list, a dict and a tuple."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.kept = []

    def forward(self, x):
        h = self.fc(x)
        self.hidden, self.pair = h, (h.relu(), {"deep": [h.exp()]})
        self.kept = [h * 2]
        return h


class WritesItsState(nn.Module):
    """Scales, in place, a tensor that a training forward left behind."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.state = None

    def forward(self, x):
        h = self.fc(x)
        if self.training:
            self.state = h.mean(0) * 1.0
        else:
            with torch.no_grad():
                self.state.mul_(0.5)
        return h


def snapshot(model):
    """What a module tree holds: values, identities, modes, hooks, attribute names."""
    seen = {}
    for path, module in model.named_modules():
        seen[path, "keys"] = sorted(module.__dict__)
        seen[path, "training"] = module.training
        for key, value in module.__dict__.items():
            if isinstance(value, dict):
                seen[path, key] = (id(value), [(k, id(v)) for k, v in value.items()])
            elif isinstance(value, (bool, int, float, str)) or value is None:
                seen[path, key] = value
    for kind, tensors in (("p", model.named_parameters()), ("b", model.named_buffers())):
        for name, t in tensors:
            seen[kind, name] = (id(t), t.data_ptr(), t._version, t.requires_grad, t.grad is None)
            seen[kind, name, "value"] = t.detach().clone().numpy().tobytes()
    return seen


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(48, 4),
    )  # fmt: skip


def test_nothing_shares_memory():
    net = convnet()
    net[5].weight.requires_grad_(False)
    net(torch.randn(5, 1, 6, 6)).sum().backward()
    twin = make_twin(net)
    for mine, its in zip(net.parameters(), twin.parameters(), strict=True):
        assert mine is not its and its.is_leaf and isinstance(its, nn.Parameter)
        assert mine.data_ptr() != its.data_ptr() and torch.equal(mine, its)
        assert mine.requires_grad == its.requires_grad
        assert its.grad is None
    for mine, its in zip(net.buffers(), twin.buffers(), strict=True):
        assert mine.data_ptr() != its.data_ptr() and torch.equal(mine, its)
    assert net[2].inplace and not twin[2].inplace
    assert all(m.training for m in net.modules()) and not any(m.training for m in twin.modules())


def test_ties_are_kept():
    net = Tied()
    twin = make_twin(net)
    assert twin.head.weight is twin.embed.weight
    assert len(list(twin.parameters())) == len(list(net.parameters())) == 3
    assert list(trainable(net)) == ["embed.weight", "mid.weight", "mid.bias"]


def test_a_module_used_twice_stays_one():
    layer = nn.Linear(3, 3)
    twin = make_twin(nn.Sequential(layer, nn.Tanh(), layer))
    assert twin[0] is twin[2]


def test_forward_hooks_come_along_as_copies_and_others_stay():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    calls = []
    for module in net.modules():
        module.register_forward_pre_hook(lambda *a: calls.append("pre"))
        module.register_forward_pre_hook(lambda *a, **k: calls.append("pre"), with_kwargs=True)
        module.register_forward_hook(lambda *a: calls.append("hook"), always_call=True)
        module.register_full_backward_hook(lambda *a: calls.append("back"))
        module.register_full_backward_pre_hook(lambda *a: calls.append("back"))
        module.register_state_dict_post_hook(lambda *a: calls.append("state"))
    net[0].weight.register_hook(lambda g: calls.append("grad"))
    before = snapshot(net)
    twin = make_twin(net)
    twin(torch.randn(4, 3)).sum().backward()
    twin.state_dict()
    hook = next(iter(twin[0]._forward_hooks.values()))
    assert set(hook.__closure__[0].cell_contents) == {"pre", "hook"}  # its own list
    assert calls == [] and net[0].weight.grad is None
    assert snapshot(net) == before
    net(torch.randn(4, 3)).sum().backward()
    assert set(calls) >= {"pre", "hook", "back", "grad"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hooks_that_compute_the_weight_come_along():
    net = nn.Sequential(
        torch.nn.utils.weight_norm(nn.Linear(3, 4)),
        torch.nn.utils.spectral_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4),
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)),
    )
    prune.l1_unstructured(net[2], "weight", amount=0.5)
    x = torch.randn(5, 3)
    net(x).sum().backward()
    net.eval()
    twin = make_twin(net)
    with torch.no_grad():
        for p in (*net.parameters(), *twin.parameters()):
            p.mul_(1.5)  # the weights are computed anew, not those of the copy's moment
    torch.testing.assert_close(twin(x), net(x))  # the twin writes weight norm out
    twin(x).sum().backward()
    grads = [p.grad.clone() for p in twin.parameters()]
    net.zero_grad()
    net(x).sum().backward()
    for mine, its in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(its, mine.grad)
    twin_hook = next(iter(twin[0]._forward_pre_hooks.values()))
    assert twin_hook is not next(iter(net[0]._forward_pre_hooks.values()))


def test_non_leaf_tensors_on_a_module():
    net = Remembers()
    x = torch.randn(4, 3)
    net(x)
    hidden = net.hidden
    with pytest.raises(RuntimeError):  # what the twin has to get around
        copy.deepcopy(net)
    twin = make_twin(net)
    assert torch.equal(twin.hidden, hidden) and not twin.hidden.requires_grad
    assert torch.equal(twin.pair[1]["deep"][0], net.pair[1]["deep"][0])
    twin(x)
    assert net.hidden is hidden
    assert measure(net, x, likelihood="categorical").total.numel == 16
    assert net.hidden is hidden and net.hidden.grad_fn is not None


def test_tensors_kept_by_a_forward_are_not_written_to():
    net = WritesItsState()
    net(torch.randn(4, 3))
    before, kept = net.state.detach().clone(), net.state
    twin = make_twin(net)
    twin(torch.randn(4, 3))
    assert not torch.equal(twin.state, before)
    assert net.state is kept and torch.equal(kept, before)


def test_compiled_wrappers_and_submodules_are_opened():
    inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    whole = nn.Sequential(torch.compile(inner, backend="eager"), nn.Linear(3, 2))
    whole[1].compile(backend="eager")
    x = torch.randn(4, 3)
    want = whole(x)
    twin = make_twin(whole)
    assert type(twin[0]) is nn.Sequential and twin[1]._compiled_call_impl is None
    assert torch.equal(twin[0][0].weight, inner[0].weight)
    assert torch.equal(twin(x), want)
    names = ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
    assert list(trainable(whole)) == names == [n for n, _ in twin.named_parameters()]
    outer = torch.compile(whole, backend="eager")
    assert unwrap(outer) is whole and list(trainable(outer)) == names
    assert torch.equal(make_twin(outer)(x), want)
    report = measure(outer, x, likelihood="categorical", draws="exact")
    assert list(report.parameters) == names
    plain = nn.Sequential(inner, nn.Linear(3, 2))
    plain[1].load_state_dict(whole[1].state_dict())
    want = measure(plain, x, likelihood="categorical", draws="exact")
    assert report.total.i1.trace == pytest.approx(want.total.i1.trace, rel=1e-6)


def test_max_norm_does_not_rewrite_the_users_weight():
    net = nn.Sequential(nn.Embedding(5, 4, max_norm=0.1), nn.Flatten(), nn.Linear(8, 3))
    tokens = torch.tensor([[0, 1], [2, 3], [3, 1]])
    before = snapshot(net)
    make_twin(net)(tokens)
    measure(net, tokens, likelihood="categorical")
    assert snapshot(net) == before
    net(tokens)
    assert snapshot(net) != before  # its own forward does


def test_lazy_layers_are_named():
    with pytest.raises(FimprobeError, match="LazyLinear.*run one forward pass"):
        make_twin(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize("draws", [2, "exact"])
def test_measure_leaves_the_model_as_it_was(draws):
    net = convnet()
    net.register_buffer("steps", torch.tensor(3))
    x = torch.randn(6, 1, 6, 6)
    F.cross_entropy(net(x), torch.arange(6) % 4).backward()
    before, grads = snapshot(net), [p.grad.clone() for p in net.parameters()]
    x_before = x.clone()
    measure(net, x, likelihood="categorical", draws=draws, memory_mb=1)
    assert snapshot(net) == before and torch.equal(x, x_before)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
