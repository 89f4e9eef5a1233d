"""Vectors pulled back and directions pushed forward, against torch's own; and what they import."""

import pytest
import torch
import torch.nn.functional as F

from fimprobe.engines.primitives.products import jvp, vjp
from tests.support.fresh_process import run_fresh


def graph():
    x = torch.randn(3, 4, requires_grad=True)
    unused = torch.randn(2, requires_grad=True)
    middle = x.tanh() @ torch.randn(4, 5)
    outs = [middle.exp(), middle.sum(1), middle]
    return x, middle, unused, outs


def test_it_is_what_autograd_gives_for_several_outputs_and_places(double):
    x, middle, unused, outs = graph()
    vectors = [torch.randn_like(h) for h in outs]
    want = torch.autograd.grad(
        outs, [x, middle, unused], vectors, retain_graph=True, allow_unused=True
    )
    have = vjp(outs, vectors, [x, middle, unused])
    assert torch.equal(have[0], want[0]) and torch.equal(have[1], want[1])
    assert have[2] is None and want[2] is None and not have[0].requires_grad


def test_the_result_can_be_differentiated_also_without_grad_mode(double):
    x, _, _, outs = graph()
    vectors = [torch.randn_like(h) for h in outs]
    direction = torch.randn_like(x)

    def second(first):
        return torch.autograd.grad((first * direction).sum(), x, retain_graph=True)[0]

    (want,) = torch.autograd.grad(outs, x, vectors, create_graph=True)
    with torch.no_grad():
        (have,) = vjp(outs, vectors, [x], create_graph=True)
    torch.testing.assert_close(second(have), second(want), rtol=1e-14, atol=0)


def test_the_graph_is_freed_or_kept_as_asked():
    x, _, _, outs = graph()
    vector = torch.ones_like(outs[0])
    vjp([outs[0]], [vector], [x])
    vjp([outs[0]], [vector], [x], retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        vjp([outs[0]], [vector], [x])


FUNCTIONS = {
    "layer norm": lambda x, y: y * F.layer_norm(x, (4,)),
    "rms norm": lambda x, y: y * F.rms_norm(x, (4,)),
    "group norm": lambda x, y: F.group_norm(x, 2),
    "instance norm": lambda x, y: F.instance_norm(x.unsqueeze(0)) + y,
    "running norm": lambda x, y: F.batch_norm(x, torch.ones(4), torch.full((4,), 2.0)) * y.sum(),
    "prelu": lambda x, y: y.clamp(max=0) * x,
    "linear in both": lambda x, y: torch.einsum("bi,bj->bij", x, y),
    "of one only": lambda x, y: x.square(),
    "constant": lambda x, y: torch.ones(3),
    "without a second derivative": lambda x, y: 2 * x + 3 * y,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_direction_is_pushed_as_in_forward_mode(name, double):
    at, along = (torch.randn(3, 4), torch.randn(3, 4)), (torch.randn(3, 4), torch.randn(3, 4))
    want = torch.func.jvp(FUNCTIONS[name], at, along)[1]
    with torch.no_grad():
        have = jvp(FUNCTIONS[name], at, along)
    torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-14)
    assert not have.requires_grad


IMPORTS = """
import sys, torch, fimprobe
from torch import nn
net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.LayerNorm(48),
                    nn.Linear(48, 4))
optimizer = torch.optim.SGD(net.parameters())  # torch's own import of torch._dynamo
before = set(sys.modules)
fimprobe.measure(net, torch.randn(5, 1, 6, 6), likelihood="categorical")
with fimprobe.attach(net, tensorboard={"log_dir": sys.argv[1]}) as probe:
    for _ in range(3):
        nn.functional.cross_entropy(net(torch.randn(5, 1, 6, 6)), torch.zeros(5).long()).backward()
        optimizer.step()
    assert probe.history
    # at its end, when the training is over, the probe draws pictures
    slow = {"sympy", "torch._dynamo", "matplotlib", "torch._decomp.decompositions_for_jvp"}
    print(sorted(slow & (set(sys.modules) - before)))
"""


def test_a_first_measurement_imports_nothing_slow(tmp_path):
    done = run_fresh(f"import sys; sys.argv.append({str(tmp_path)!r})\n{IMPORTS}")
    assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr
