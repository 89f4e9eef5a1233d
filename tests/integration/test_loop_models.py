"""The plain-loop adapter on compiled, wrapped and copied models, and on many ways to call one."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fimprobe
from tests.models.small import Tagger, mlp
from tests.support.loop import (
    EVERY,
    KNOWN,
    backward,
    data,
    equal,
    expected,
    sgd,
    train,
)
from tests.support.warnings import warnings_of


class Calls(nn.Module):
    """Takes and returns its tensors in one of many ways."""

    def __init__(self, takes, returns):
        super().__init__()
        self.net, self.takes, self.returns = mlp(), takes, returns

    def forward(self, *args, **kwargs):
        if self.takes == "tuple":
            x = args[0][0] + args[0][1]
        elif self.takes == "keywords":
            x = kwargs["x"] * kwargs["scale"]
        elif self.takes == "mapping":
            x = args[0]["x"] + args[0]["more"]["x"]
        else:
            x = args[0] + args[1] if len(args) > 1 else args[0]
        h = self.net(x)
        if self.returns == "tuple":
            return h, x
        if self.returns == "dict":
            return {"loss": h.mean(), "logits": h}
        if self.returns == "object":
            return SimpleNamespace(logits=h)
        return h


@pytest.mark.parametrize("likelihood", ["auto", "categorical"])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("how", ["wrapper", "method", "method later", "inside"])
def test_compiled_models(how, called, likelihood):
    torch._dynamo.reset()
    net = Calls("one", "tensor")  # torch never compiles the forward of nn.Sequential itself
    model = torch.compile(net, backend="aot_eager", fullgraph=True) if how == "wrapper" else net
    if how == "method":
        net.compile(backend="aot_eager", fullgraph=True)
    if how == "inside":
        net.net = torch.compile(net.net, backend="aot_eager")
    if called:
        backward(model)
    keys, call = sorted(net.__dict__), net._compiled_call_impl
    probe = fimprobe.attach(model, {**EVERY, "likelihood": likelihood})
    if how == "method later":
        net.compile(backend="aot_eager", fullgraph=True)
        keys, call = sorted(net.__dict__), net._compiled_call_impl
        train(model, 1)  # seen from its next step on
        assert probe.steps == 0
    for step in range(3):
        before = Calls("one", "tensor")
        before.load_state_dict({k.replace("_orig_mod.", ""): v for k, v in net.state_dict().items()})
        train(model, 1, first=step)
        equal(probe.last, expected(before, data(step)[0], step))
    assert probe.steps == len(probe.history) == 3
    probe.detach()
    train(model, 2)
    assert probe.steps == 3 and len(probe.history) == 3
    assert sorted(net.__dict__) == keys and net._compiled_call_impl is call
    assert not model._forward_pre_hooks and not model._forward_hooks
    with fimprobe.attach(model, **KNOWN) as again:
        train(model, 2)
    assert len(again.history) == 2


def test_compiling_again_while_attached():
    net = Calls("one", "tensor")
    net.compile(backend="eager")
    probe = fimprobe.attach(net, **KNOWN)
    train(net, 1)
    net.compile(backend="aot_eager", fullgraph=True)
    newest = net._compiled_call_impl
    train(net, 2)
    assert len(probe.history) == 2
    net.compile(backend="eager")
    last = net._compiled_call_impl
    probe.detach()
    assert net._compiled_call_impl is last is not newest


def test_distributed_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        net = mlp()
        model = nn.parallel.DistributedDataParallel(net)
        with fimprobe.attach(model, **EVERY) as probe:
            for step in range(3):
                before = copy.deepcopy(net)
                train(model, 1, first=step)
                equal(probe.last, expected(before, data(step)[0], step))
        assert probe.steps == 3
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("likelihood", ["auto", "categorical"])
@pytest.mark.parametrize("returns", ["tensor", "tuple", "dict", "object"])
@pytest.mark.parametrize("takes", ["two", "tuple", "keywords", "mapping"])
def test_ways_to_call(takes, returns, likelihood):
    model = Calls(takes, returns)
    optimizer = sgd(model)
    with fimprobe.attach(model, {**EVERY, "likelihood": likelihood, "batch": 8}) as probe:
        for step in range(2):
            x, y = data(step)
            before = {f"net.{k}": v.clone() for k, v in model.net.state_dict().items()}
            args, kwargs = {
                "two": ((x, x), {}),
                "tuple": (((x, x),), {}),
                "keywords": ((), {"x": x, "scale": 2.0}),
                "mapping": (({"x": x, "more": {"x": x}},), {}),
            }[takes]
            out = model(*args, **kwargs)
            h = {"tensor": lambda o: o, "tuple": lambda o: o[0], "dict": lambda o: o["logits"],
                 "object": lambda o: o.logits}[returns](out)  # fmt: skip
            F.cross_entropy(h, y).backward()
            optimizer.step()
            assert probe.last.batch_size == 8
            plain = Calls("two", "tensor")
            plain.load_state_dict(before)
            rows = torch.randperm(12, generator=torch.Generator().manual_seed(7919 * step))[:8]
            equal(probe.last, expected(plain, 2 * x[rows.sort()[0]], step))


class WholeGraph(torch.optim.Optimizer):
    """Its step has no break of the graph, other than those of torch's optimizers."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, WholeGraph])
def test_compiled_steps(make_optimizer, given, caplog):
    torch._dynamo.reset()
    net = mlp()
    plain = copy.deepcopy(net)
    optimizer = make_optimizer(net.parameters(), lr=0.1)
    probe = fimprobe.attach(net, **KNOWN, optimizer=optimizer if given else None)
    whole = make_optimizer is WholeGraph  # a break would end the training
    step = torch.compile(optimizer.step, backend="eager", fullgraph=whole)
    for number in range(5):
        optimizer.zero_grad()
        backward(net, number)
        step()
    probe.detach()
    train(plain, 5)
    assert torch.equal(net[0].weight, plain[0].weight)
    told = [line for line in warnings_of(caplog) if "Profiler record function" not in line]
    if not whole:
        assert [report.step for report in probe.history] == list(range(5)) and not told
        return
    # changes of the parameters count as steps, each measured after it, unless others may make them
    assert [report.step for report in probe.history] == ([] if given else [2, 3])
    (line,) = told
    assert "compiled" in line and "probe.step()" in line


@pytest.mark.parametrize("first", ["attach", "compile"])
def test_a_wrapper_called_in_the_models_place_is_told(first, caplog):
    torch._dynamo.reset()
    net, plain = Calls("one", "tensor"), Calls("one", "tensor")
    plain.load_state_dict(net.state_dict())
    wrapper = torch.compile(net, backend="aot_eager", fullgraph=True)
    if first == "compile":
        wrapper(data()[0])
    with fimprobe.attach(net, **EVERY):
        train(wrapper, 5)  # no graph is broken by the probe
    (line,) = warnings_of(caplog)
    assert "attach to the object that the loop calls, after torch.compile" in line
    train(plain, 5)
    assert torch.equal(net.net[0].weight, plain.net[0].weight)


def test_copies_of_a_probed_model_are_not_probed(tmp_path):
    net = mlp()
    with fimprobe.attach(net, KNOWN, log_dir=tmp_path / "run") as probe:
        torch.save(net, tmp_path / "net.pt")
        copies = [
            copy.copy(net),
            copy.deepcopy(net),
            torch.load(tmp_path / "net.pt", weights_only=False),
            torch.optim.swa_utils.AveragedModel(net).module,
        ]
        before = copy.deepcopy(net)
        backward(net, 0)
        for other in copies:
            other(data(1)[0])
        probe.step()
        equal(probe.last, expected(before, data(0)[0], 0))
        with fimprobe.attach(copies[1], **KNOWN) as second:
            train(copies[1], 2)
        assert second.steps == 2 and probe.steps == 1


@pytest.mark.parametrize("channels_first", [False, True])
def test_ignored_positions_are_left_out(channels_first):
    net = Tagger(channels_first)
    tokens, targets = torch.randint(11, (12, 7)), torch.randint(5, (12, 7))
    for row in range(5):
        targets[row, 6 - row :] = -100
    optimizer = sgd(net)
    with fimprobe.attach(net, **EVERY) as probe:
        for step in range(2):
            before = copy.deepcopy(net)
            out = net(tokens)
            logits = out if channels_first else out.transpose(1, 2)
            F.cross_entropy(logits, targets, ignore_index=-100).backward()
            optimizer.step()
            family = fimprobe.likelihoods.Categorical(class_dim=1 if channels_first else -1)
            want = expected(before, tokens, step, likelihood=family, mask=targets != -100)
            equal(probe.last, want)
            with pytest.raises(AssertionError):
                equal(probe.last, expected(before, tokens, step, likelihood=family))


def test_a_mask_of_ones_own():
    net = Tagger(False)
    tokens = torch.randint(11, (12, 7))
    options = {**KNOWN, "batch": 8}
    with fimprobe.attach(net, options, mask=lambda args, kwargs: args[0] > 3) as probe:
        net(tokens).sum().backward()
        report = probe.step()
        rows = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:8].sort()[0]
        equal(report, expected(net, tokens[rows], 0, mask=tokens[rows] > 3))
