"""Options of attach and YAML: bad ones are explained, good ones measure what measure does."""

import pytest
import torch
import yaml
from test_options import LABELS, inputs, measure, mlp, numbers

import fimprobe
from fimprobe import FimprobeError

BAD_SETTINGS = [
    ("estimators: []", "estimators=[]", "use one or several of i1, i2, ih, empirical"),
    ("estimators: 3", "estimators=3", "use one or several of i1, i2, ih, empirical"),
    ("estimators: null", "estimators=None", "use one or several of i1, i2, ih, empirical"),
    ("estimators: [i3]", "estimators[0]='i3'", "use one or several of i1, i2, ih, empirical"),
    ("estimators: i3", "estimators[0]='i3'", "use one or several of i1, i2, ih, empirical"),
    ("estimators: [i1, 2]", "estimators[1]=2", "use one or several of i1, i2, ih, empirical"),
    ("second_order: 'on'", "second_order='on'", "use {probes: 2} (random probes), exact or off"),
    ("second_order: 2", "second_order=2", "use {probes: 2} (random probes), exact or off"),
    ("second_order: null", "second_order=None", "use {probes: 2} (random probes), exact or off"),
    ("second_order: true", "second_order=True", "use {probes: 2} (random probes), exact or off"),
    ("second_order: {probes: 1}", "second_order.probes=1", "use a whole number of probes from 2"),
    ("second_order: {probes: 2.0}", "second_order.probes=2.0", "use a whole number of probes from 2"),
    ("second_order: {probes: '2'}", "second_order.probes='2'", "use a whole number of probes from 2"),
    (
        "second_order: {probes: true}",
        "second_order.probes=True",
        "use a whole number of probes from 2",
    ),
    ("second_order: {probs: 2}", "second_order.probs", "did you mean 'probes'?"),
    ("bounds: 1", "bounds=1", "use true or false"),
    ("bounds: 'yes'", "bounds='yes'", "use true or false"),
    ("bounds: null", "bounds=None", "use true or false"),
    ("engine: BackPACK", "engine='BackPACK'", "use auto, autograd or backpack"),
    ("engine: null", "engine=None", "use auto, autograd or backpack"),
    ("engine: {a: 1}", "engine", "use auto, autograd or backpack"),
    ("draws: 0", "draws=0", "use 1, 2, ..., exact or auto"),
    ("draws: 1.0", "draws=1.0", "use a whole number of labels from 1, exact or auto"),
    ("draws: true", "draws=True", "use a whole number of labels from 1, exact or auto"),
    ("draws: many", "draws='many'", "use a whole number of labels from 1, exact or auto"),
    ("draws: null", "draws=None", "use a whole number of labels from 1, exact or auto"),
    ("label_sampling: exact", "label_sampling='exact'", "use size_biased or model"),
    ("label_sampling: true", "label_sampling=True", "use size_biased or model"),
    ("label_sampling: null", "label_sampling=None", "use size_biased or model"),
    ("label_samplng: model", "label_samplng", "did you mean 'label_sampling'?"),
]


@pytest.mark.parametrize(
    ("text", "argument", "remedy"), BAD_SETTINGS, ids=[x[0] for x in BAD_SETTINGS]
)
def test_bad_settings_of_attach_and_yaml(text, argument, remedy, tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text(f"batch: 4\n{text}\n")
    net = mlp()
    for call in (
        lambda: fimprobe.attach(net, path),
        lambda: fimprobe.attach(net, **yaml.safe_load(text)),
        lambda: fimprobe.attach(net, yaml.safe_load(text)),
    ):
        with pytest.raises(FimprobeError) as error:
            call()
        message = str(error.value)
        assert argument in message and remedy in message, message
        if text.startswith("second_order: {"):
            assert "exact" not in message  # a mapping was meant
    with pytest.raises(FimprobeError, match=rf"{path.name}:2: "):
        fimprobe.attach(net, path)
    fimprobe.attach(net, tensorboard=False).detach()  # nothing was left attached


@pytest.mark.parametrize("name", ["labels", "mask", "output"])
@pytest.mark.parametrize("value", [3, LABELS, "labels"], ids=["3", "tensor", "text"])
def test_functions_of_attach_that_are_none(name, value):
    net = mlp()
    with pytest.raises(
        FimprobeError, match=f"^{name}={type(value).__name__} is no function; pass one"
    ):
        fimprobe.attach(net, tensorboard=False, **{name: value})
    fimprobe.attach(net, tensorboard=False).detach()


GOOD = [
    {"estimators": ["i1"], "bounds": False},
    {"estimators": ("i1", "ih")},
    {"estimators": "i2"},
    {"estimators": {"ih"}, "draws": 1},
    {"estimators": ["i2", "i2"], "second_order": {"probes": 3}},
    {"estimators": ["i2"], "second_order": "exact", "draws": "exact"},
    {"estimators": ["i2", "ih"], "second_order": "off"},
    {"engine": "backpack"},
    {"engine": "autograd", "bounds": False, "draws": 4},
    {"draws": "auto"},
    {"label_sampling": "model"},
    {"label_sampling": "size_biased", "draws": 3},
    {"label_sampling": "model", "draws": "exact"},
    {"second_order": {}},
]


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_attach_measures_what_measure_does(options, tmp_path):
    net = mlp()
    more = {"likelihood": "categorical", "tensorboard": False, "on_error": "raise"}
    same = {
        **options,
        **({"second_order": {"probes": 2}} if options.get("second_order") == {} else {}),
    }
    want = numbers(measure(net, **same))
    with fimprobe.attach(net, **more, **options) as probe:
        assert numbers(probe.step(inputs())) == want
    path = tmp_path / "f.yaml"
    plain = {k: sorted(v) if isinstance(v, (set, tuple)) else v for k, v in options.items()}
    path.write_text(yaml.safe_dump(plain | {k: more[k] for k in more}))
    with fimprobe.attach(net, path) as probe:
        assert numbers(probe.step(inputs())) == want


@pytest.mark.parametrize("by", ["attach", "mapping", "file"])
def test_the_way_labels_are_drawn_reaches_the_measurement(by, tmp_path):
    """A net so sure of its labels that those of the model never show what carries F."""
    net = mlp()
    with torch.no_grad():
        net[2].bias.copy_(torch.tensor([14.0, 0.0, 0.0]))
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    truth = fimprobe.measure(net, x, likelihood="categorical", draws="exact").total.i1.trace
    more = {"likelihood": "categorical", "tensorboard": False, "on_error": "raise"}
    path = tmp_path / "f.yaml"
    found = {}
    for given in ({}, {"label_sampling": "size_biased"}, {"label_sampling": "model"}):
        path.write_text(yaml.safe_dump(more | given))
        args, options = {
            "attach": ((), more | given), "mapping": ((more | given,), {}), "file": ((path,), {})
        }[by]  # fmt: skip
        with fimprobe.attach(net, *args, **options) as probe:
            report = probe.step(x)
        want = fimprobe.measure(net, x, likelihood="categorical", **given)
        assert numbers(report) == numbers(want)
        found[given.get("label_sampling")] = report
    default, biased, plain = found.values()
    assert numbers(default) == numbers(biased)
    assert (biased.label_sampling, plain.label_sampling) == ("size_biased", "model")
    i1 = biased.total.i1
    assert i1.rel_error < 0.5 and abs(i1.trace - truth) < 3 * i1.std_error
    assert biased.error_of("i1") > 10  # one label of the model's would tell nothing: it is said
    assert plain.seen_mass < 1e-3
    assert plain.total.i1.trace is None and plain.total.i2.trace is None
    assert "pass label_sampling='size_biased'" in plain.total.i1.unknown["trace"]


@pytest.mark.parametrize("by", ["attach", "file"])
def test_labels_are_exact_where_that_is_cheap(by, tmp_path):
    class Sequences(torch.nn.Module):
        """A language model: 10 labels to predict take 70 passes, more than 10."""

        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7)

        def forward(self, tokens):
            return self.head(torch.tanh(self.embed(tokens)))

    tokens = torch.randint(7, (16, 10), generator=torch.Generator().manual_seed(1))
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    more = {"likelihood": "categorical", "tensorboard": False, "on_error": "raise", "draws": "auto"}
    path = tmp_path / "f.yaml"
    path.write_text(yaml.safe_dump(more))
    args, options = ((), more) if by == "attach" else ((path,), {})
    for model, batch, draws in ((mlp(), x, None), (Sequences(), tokens, 2)):
        with fimprobe.attach(model, *args, **options) as probe:
            report = probe.step(batch)
        assert (report.draws, report.label_sampling) == (
            (None, "exact") if draws is None else (2, "size_biased")
        )
        asked = "exact" if draws is None else draws
        want = fimprobe.measure(model, batch, likelihood="categorical", draws=asked)
        assert numbers(report) == numbers(want)


@pytest.mark.parametrize(("classes", "draws"), [(10, None), (11, 2)])
def test_ten_classes_are_the_most_that_auto_takes_exactly(classes, draws):
    net = torch.nn.Linear(4, classes)
    options = {"likelihood": "categorical", "tensorboard": False, "estimators": "i1", "bounds": False}
    with fimprobe.attach(net, draws="auto", on_error="raise", **options) as probe:
        assert probe.step(inputs()).draws == draws
