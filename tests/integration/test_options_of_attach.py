"""Options of attach and YAML: bad ones are explained, good ones measure what measure does."""

import pytest
import torch
import yaml

import fimprobe
from fimprobe import FimprobeError
from tests.models.small import mlp
from tests.support.options import LABELS, inputs, measure, numbers

ESTIMATORS_MUST_BE = "`estimators` must be a list of at least one of 'i1', 'i2', 'ih', 'empirical'"
SECOND_ORDER_MUST_BE = "`second_order` must be 'auto', {probes: 2}, 'spot_checks', 'exact' or 'off'"
PROBES_MUST_BE = "`second_order.probes` must be an integer of at least 2"
DRAWS_MUST_BE = "`draws` must be a positive integer, 'exact' or 'auto'"
SAMPLING_MUST_BE = "`label_sampling` must be 'size_biased' or 'model'"
ENGINE_MUST_BE = "`engine` must be 'auto', 'autograd' or 'backpack'"
BAD_SETTINGS = [
    ("estimators: []", ESTIMATORS_MUST_BE, "got []."),
    ("estimators: 3", ESTIMATORS_MUST_BE, "got 3."),
    ("estimators: null", ESTIMATORS_MUST_BE, "got None."),
    ("estimators: [i3]", ESTIMATORS_MUST_BE, "got 'i3' at position 0."),
    ("estimators: i3", ESTIMATORS_MUST_BE, "got 'i3' at position 0."),
    ("estimators: [i1, 2]", ESTIMATORS_MUST_BE, "got 2 at position 1."),
    ("second_order: 'on'", SECOND_ORDER_MUST_BE, "got 'on'."),
    ("second_order: 2", SECOND_ORDER_MUST_BE, "got 2."),
    ("second_order: null", SECOND_ORDER_MUST_BE, "got None."),
    ("second_order: true", SECOND_ORDER_MUST_BE, "got True."),
    ("second_order: {probes: 1}", PROBES_MUST_BE, "got 1."),
    ("second_order: {probes: 2.0}", PROBES_MUST_BE, "got 2.0."),
    ("second_order: {probes: '2'}", PROBES_MUST_BE, "got '2'."),
    ("second_order: {probes: true}", PROBES_MUST_BE, "got True."),
    ("second_order: {probs: 2}", "`second_order.probs`", "Did you mean 'probes'?"),
    ("bounds: 1", "`bounds` must be true or false", "got 1."),
    ("bounds: 'yes'", "`bounds` must be true or false", "got 'yes'. Did you mean true?"),
    ("bounds: null", "`bounds` must be true or false", "got None."),
    ("engine: BackPACK", ENGINE_MUST_BE, "got 'BackPACK'. Did you mean 'backpack'?"),
    ("engine: null", ENGINE_MUST_BE, "got None."),
    ("engine: {a: 1}", ENGINE_MUST_BE, "got {'a': 1}."),
    ("draws: 0", DRAWS_MUST_BE, "got 0. Use 2 to estimate the label variance."),
    ("draws: 1.0", DRAWS_MUST_BE, "got 1.0."),
    ("draws: true", DRAWS_MUST_BE, "got True."),
    ("draws: many", DRAWS_MUST_BE, "got 'many'."),
    ("draws: null", DRAWS_MUST_BE, "got None."),
    ("label_sampling: exact", SAMPLING_MUST_BE, "got 'exact'."),
    ("label_sampling: true", SAMPLING_MUST_BE, "got True."),
    ("label_sampling: null", SAMPLING_MUST_BE, "got None."),
    ("label_samplng: model", "`label_samplng` is not", "Did you mean 'label_sampling'?"),
]


@pytest.mark.parametrize(
    ("text", "argument", "remedy"), BAD_SETTINGS, ids=[x[0] for x in BAD_SETTINGS]
)
def test_bad_settings_of_attach_and_yaml(text, argument, remedy, tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text(f"batch: 4\n{text}\n")
    net = mlp(hidden=5)
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
    if "samplng" not in text:  # an unknown keyword of a function is Python's own error
        with pytest.raises(FimprobeError) as of_measure:
            measure(net, **yaml.safe_load(text))
        assert str(of_measure.value) == message
    fimprobe.attach(net, tensorboard=False).detach()  # nothing was left attached


@pytest.mark.parametrize("name", ["labels", "mask", "output"])
@pytest.mark.parametrize("value", [3, LABELS, "labels"], ids=["3", "tensor", "text"])
def test_functions_of_attach_that_are_none(name, value):
    net = mlp(hidden=5)
    with pytest.raises(
        FimprobeError, match=f"^`{name}` must be a function, got {type(value).__name__}. Pass one"
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
    net = mlp(hidden=5)
    more = {"likelihood": "categorical", "tensorboard": False, "on_error": "raise"}
    want = numbers(measure(net, **options))
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
    net = mlp(hidden=5)
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
    for model, batch, draws in ((mlp(hidden=5), x, None), (Sequences(), tokens, 2)):
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
