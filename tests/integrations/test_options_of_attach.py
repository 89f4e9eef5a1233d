"""Options of attach and YAML: bad ones are explained, good ones measure what measure does."""

import pytest
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
    ("draws: 0", "draws=0", "use 1, 2, ... or exact"),
    ("draws: 1.0", "draws=1.0", "use a whole number of labels from 1, or exact"),
    ("draws: true", "draws=True", "use a whole number of labels from 1, or exact"),
    ("draws: many", "draws='many'", "use a whole number of labels from 1, or exact"),
    ("draws: null", "draws=None", "use a whole number of labels from 1, or exact"),
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
