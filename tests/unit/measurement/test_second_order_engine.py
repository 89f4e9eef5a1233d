"""``second_order="auto"``: exact where that is cheap, probes where they are enough, else spot checks."""

import sys

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.backpack import estimate_work
from fimprobe.measurement import second_order_engine
from tests.models.cases import Lambda, lively, lstm
from tests.support.agreement import make_problem


def smooth(width=5):
    torch.manual_seed(0)
    return lively(nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)))


def measure(model, inputs, **options):
    return fimprobe.measure(model, inputs, likelihood="categorical", **options)


def sources(report):
    """What Î₂ comes from, by its coverage."""
    return {how.partition("; Î₂: ")[2] for how in report.coverage.values()}


def test_exact_diagonals_are_taken_where_they_are_cheap():
    model, x = smooth(), torch.randn(8, 4)
    plan = fimprobe.Plan()
    auto = [measure(model, x, plan=plan) for _ in range(2)]
    exact = measure(model, x, second_order="exact")
    assert plan.second_order == "exact"
    assert sources(auto[0]) == sources(exact) == {"exact, by BackPACK", "no second derivative"}
    for report in auto:
        assert report.total.i2.label_variance == exact.total.i2.label_variance
        assert report.total.i2.probe_error is None


def test_the_default_type_of_all_threads_is_not_changed(monkeypatch):
    """BackPACK's pooling builds its kernels in it: a model of another type is measured otherwise."""
    types = []
    set_default = torch.set_default_dtype
    monkeypatch.setattr(torch, "set_default_dtype", lambda d: (types.append(d), set_default(d)))
    report = measure(smooth().double(), torch.randn(8, 4, dtype=torch.float64))
    assert "exact, by BackPACK" not in sources(report) and types == []
    measure(smooth(), torch.randn(8, 4))
    assert set(types) == {torch.get_default_dtype()}


def test_spot_checks_replace_probes_that_are_too_noisy():
    case = lstm()
    auto = measure(case.model, case.inputs)
    assert sources(auto) == {"spot checks", "no second derivative"}
    checked = measure(case.model, case.inputs, second_order="spot_checks", plan=fimprobe.Plan())
    assert auto.total.i2.label_variance == checked.total.i2.label_variance
    again = measure(case.model, case.inputs, diagonals=True)  # these have no single entries
    assert sources(again) == {"2 random probes", "no second derivative"}
    assert again.total.i2.diagonal_label_variance is not None


def test_coverage_names_probes_that_are_propagated():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)]
    report = measure(nn.Sequential(*layers), torch.randn(8, 4), second_order={"probes": 2})
    assert "2 random probes by curvature propagation" in sources(report)
    assert "2 random probes" not in sources(report)


def test_probes_stay_where_they_are_enough(monkeypatch):
    model, x, plan = smooth(), torch.randn(8, 4), fimprobe.Plan()
    monkeypatch.setitem(sys.modules, "fimprobe.engines.backpack", None)
    monkeypatch.delattr("fimprobe.engines.backpack")
    monkeypatch.setattr(second_order_engine, "TOTAL_ERROR", 1e3)
    monkeypatch.setattr(second_order_engine, "LAYER_ERROR", 1e3)
    auto = measure(model, x, plan=plan)
    assert plan.second_order == "probes"
    assert sources(auto) == {"2 random probes", "no second derivative"}
    probed = measure(model, x, second_order={"probes": 2})
    assert auto.total.i2.label_variance == probed.total.i2.label_variance


def test_half_precision_keeps_probes():
    plan = fimprobe.Plan()
    report = measure(smooth().bfloat16(), torch.randn(4, 4).bfloat16(), plan=plan)
    assert plan.second_order == "probes"
    assert sources(report) <= {"2 random probes", "no second derivative"}


def test_a_batch_outside_of_the_domain_leaves_it():
    def f(self, x):  # another way through the modules for long sequences
        y = self.parts[1](self.parts[0](x))
        return self.parts[2](y * 2 if x.shape[1] > 2 else y)

    torch.manual_seed(0)
    parts = lively(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    model, plan = Lambda(f, *parts), fimprobe.Plan()
    assert "exact, by BackPACK" in sources(measure(model, torch.randn(4, 2, 4), plan=plan))
    report = measure(model, torch.randn(4, 3, 4), plan=plan)
    assert plan.second_order == "probes" and "2 random probes" in sources(report)
    with pytest.raises(fimprobe.FimprobeError, match="unlike when the model was checked"):
        plan.second_order = ""
        measure(model, torch.randn(4, 3, 4), second_order="exact", plan=plan)


def test_the_work_is_that_of_unit_vectors_through_earlier_modules():
    model = nn.Sequential(
        nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)
    )
    work = estimate_work(make_problem(model, torch.randn(6, 7)))
    assert work.exact == 5 * 5  # the only module that bends, at the first layer
    assert work.forward == 35 + 5 + 20 + 4 + 12
    image = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 3))
    work = estimate_work(make_problem(image, torch.randn(2, 1, 4, 4)))
    assert work.exact == 8 * (8 * 9 + 3 * 20)
    assert (
        estimate_work(make_problem(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), torch.randn(2, 4)))
        is None
    )


def test_labels_that_miss_what_carries_f_do_not_enter_its_exact_norm(double):
    model, x = smooth(), torch.randn(8, 4)
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([12.0, 0.0, 0.0]))
    drawn = measure(model, x, label_sampling="model", second_order="exact")
    exact = measure(model, x, draws="exact", second_order="exact")
    assert drawn.seen_mass < 0.5
    assert drawn.total.i2.norm == pytest.approx(exact.total.i2.norm)
    assert drawn.total.i2.input_variance == pytest.approx(exact.total.i2.input_variance)


def test_a_changed_model_is_decided_anew():
    """A hook takes it out of BackPACK's domain: the plan that was kept holds no longer."""
    model, x = smooth(), torch.randn(8, 4)
    plan = fimprobe.Plan()
    assert "exact, by BackPACK" in sources(measure(model, x, plan=plan))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    later, fresh = measure(model, x, plan=plan), measure(model, x, plan=fimprobe.Plan())
    assert sources(later) == sources(fresh) and "exact, by BackPACK" not in sources(later)
    assert later.total.i2.label_variance == pytest.approx(fresh.total.i2.label_variance)


def stopped(self, x):
    h = self.parts[1](self.parts[0](x).mean(1)).tanh()
    return self.parts[2](h * h.detach())


def replaced(self, x):
    h = self.parts[1](self.parts[0](x).mean(1))
    return self.parts[2]((h + (h**3 - h).detach()).tanh())  # straight through


@pytest.mark.parametrize("forward", [stopped, replaced])
def test_a_stopped_gradient_is_not_measured_by_differences(forward):
    """Differences of the forward contain what autograd, and with it Î₁, leaves out."""
    torch.manual_seed(1)
    parts = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)
    model, x = Lambda(forward, *parts).double(), torch.randint(6, (32, 3))
    checked = measure(model, x, second_order="spot_checks", bounds=False)
    assert checked.total.i2.label_variance is None
    assert "stopped or replaced" in checked.total.i2.unknown["label_variance"]
    auto, probed = (measure(model, x, bounds=False, second_order=s) for s in ("auto", {"probes": 2}))
    assert sources(auto) == {"2 random probes", "no second derivative"}
    assert auto.total.i2.label_variance_error == probed.total.i2.label_variance_error is not None
