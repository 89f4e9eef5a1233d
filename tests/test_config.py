"""YAML and keywords: good ones are taken, bad ones explained, all at once."""

import json
from pathlib import Path

import pytest

import fimprobe
from fimprobe.config.config import json_schema, load_config
from fimprobe.training.schedule import At, Budget, Every


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_documented_key_is_read(tmp_path):
    readme = Path(__file__).parent.parent / "README.md"
    text = readme.read_text().split("### Configure it")[1].split("```yaml\n")[1].split("```")[0]
    config = load_config(write(tmp_path / "f.yaml", text))
    assert set(config.model_fields_set) | {"estimators"} == set(type(config).model_fields)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("{every: 3}", Every), ("{at: [0, 10]}", At), ("{budget: 1e-3}", Budget)],
)
def test_schedules(tmp_path, text, kind):
    config = load_config(write(tmp_path / "f.yaml", f"schedule: {text}\n"))
    assert isinstance(config.schedule.build(), kind)


def test_exponent_is_a_number_and_no_is_text(tmp_path):
    config = load_config(write(tmp_path / "f.yaml", "memory_mb: 1e2\nlayers: {include: [no, on]}\n"))
    assert config.memory_mb == 100
    assert config.layers.include == ["no", "on"]


def test_keywords_win_over_the_file(tmp_path):
    path = write(tmp_path / "f.yaml", "draws: 3\nbatch: 5\n")
    config = load_config(path, draws="exact")
    assert (config.draws, config.batch) == ("exact", 5)


def test_how_labels_come_about(tmp_path):
    assert (load_config(None).draws, load_config(None).label_sampling) == (2, "size_biased")
    path = write(tmp_path / "f.yaml", "draws: auto\nlabel_sampling: model\n")
    config = load_config(path)
    assert (config.draws, config.label_sampling) == ("auto", "model")
    assert load_config(path, label_sampling="size_biased").label_sampling == "size_biased"


def test_all_mistakes_at_once_with_file_and_line(tmp_path):
    path = write(
        tmp_path / "f.yaml",
        "scedule: {every: 3}\ndraws: many\nlayers:\n  topp: 3\nbatch: 2\nbatch: 3\nlikelihood: softmax\n",
    )
    with pytest.raises(fimprobe.FimprobeError) as error:
        load_config(path)
    message = str(error.value)
    assert f"{path}:1: unknown key 'scedule'; did you mean 'schedule'?" in message
    assert f"{path}:2: draws='many'" in message
    assert f"{path}:4: unknown key 'layers.topp'; did you mean 'top'?" in message
    assert f"{path}:6: key 'batch' is given twice" in message
    lines = [int(line.removeprefix(f"{path}:").split(":")[0]) for line in message.splitlines()]
    assert lines == sorted(lines) and len(lines) == 5


def messages(path: Path, text: str) -> list[str]:
    """What is said of a file, a line for each mistake."""
    with pytest.raises(fimprobe.FimprobeError) as error:
        load_config(write(path, text))
    return str(error.value).splitlines()


DRAWS = "use a whole number of labels from 1, exact or auto"
SAMPLING = "use size_biased or model"
SECOND = "use {probes: 2} (random probes), exact or off"
BOARD = (
    "use {log_dir: ..., histograms: ..., figures: ...} or some of these keys, or false; without the "
    "key it is on"
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("draws: exct", f"draws='exct': {DRAWS}; did you mean 'exact'?"),
        ("draws: EXACT", f"draws='EXACT': {DRAWS}; did you mean 'exact'?"),
        ("draws: [1]", f"draws=[1]: {DRAWS}"),
        ("draws: Auto", f"draws='Auto': {DRAWS}; did you mean 'auto'?"),
        ("label_sampling: modle", f"label_sampling='modle': {SAMPLING}; did you mean 'model'?"),
        ("label_sampling: 2", f"label_sampling=2: {SAMPLING}"),
        ("label_samplng: model", "unknown key 'label_samplng'; did you mean 'label_sampling'?"),
        ("second_order: of", f"second_order='of': {SECOND}; did you mean 'off'?"),
        ("second_order: 4", f"second_order=4: {SECOND}"),
        ("second_order: {probe: 2}", "unknown key 'second_order.probe'; did you mean 'probes'?"),
        ("second_order: {probes: 1}", "second_order.probes=1: use a whole number of probes from 2"),
        ("tensorboard: yes", f"tensorboard='yes': {BOARD}"),
        ("tensorboard: off", f"tensorboard='off': {BOARD}; did you mean false?"),
        (
            "tensorboard: {figures: on}",
            "tensorboard.figures='on': use true or false; did you mean true?",
        ),
        ("bounds: 'True'", "bounds='True': use true or false; did you mean true?"),
        ("jsonl: 3", "jsonl=3: use a path, false, or null for <log_dir>/fimprobe.jsonl"),
        ("schedule: {at: 5}", "schedule.at=5: use a list of steps, such as [0, 10, 100]"),
        ("on_error: rais", "on_error='rais': use warn or raise; did you mean 'raise'?"),
        (
            "estimators: [i1, empirica]",
            "estimators[1]='empirica': use one or several of i1, i2, ih, empirical, such as [i1, i2]; "
            "did you mean 'empirical'?",
        ),
        (
            "schedule: 5",
            "schedule=5: use {budget: 0.02} (a share of the wall time), {every: 100} or "
            "{at: [0, 10, 100]} (steps)",
        ),
        ("schedule: {3: 4}", "unknown key 'schedule[3]'; known keys: budget, every, at"),
    ],
)
def test_a_value_that_fits_no_form_is_one_mistake(tmp_path, text, told):
    path = tmp_path / "f.yaml"
    assert messages(path, f"batch: 4\n{text}\n") == [f"{path}:2: {told}"]


def test_a_key_that_is_no_word(tmp_path):
    path = tmp_path / "f.yaml"
    (told,) = messages(path, "3: 4\n")
    assert told.startswith(f"{path}:1: unknown key '3'; known keys: schedule, likelihood,")


def test_a_likelihood_that_was_meant(tmp_path):
    (told,) = messages(tmp_path / "f.yaml", "likelihood: gausian\n")
    assert told.endswith("; did you mean 'gaussian'?") and told.count("likelihood=") == 1


def test_a_keyword_is_no_line_of_the_file(tmp_path):
    path = write(tmp_path / "f.yaml", "draws: 2\n")
    with pytest.raises(fimprobe.FimprobeError) as error:
        load_config(path, draws="exct")
    assert str(error.value).startswith("draws='exct': ")


def test_every_option_says_what_it_takes():
    from fimprobe.config.config import ALLOWED_VALUES, SECTIONS

    keys = {
        f"{section}.{key}".lstrip(".")
        for section, model in SECTIONS.items()
        for key in model.model_fields
    }
    assert set(ALLOWED_VALUES) == keys


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ":1: the file is empty"),
        ("- 1\n- 2\n", "write keys and values"),
        ("draws: [1\n", "not YAML"),
        ("draws: 0\n", "draws=0"),
        ("draws: 2.5\n", "draws=2.5"),
        ("likelihood: softmax\n", "'softmax' is unknown; use one of"),
        ("schedule: {every: 3, budget: 0.1}\n", "exactly one of"),
        ("schedule: {budget: 2}\n", "schedule.budget"),
        ("estimators: [i3]\n", "estimators"),
        ("memory_mb: -1\n", "memory_mb"),
        ("on_error: ignore\n", "on_error"),
    ],
)
def test_one_mistake(tmp_path, text, words):
    path = write(tmp_path / "f.yaml", text)
    with pytest.raises(fimprobe.FimprobeError) as error:
        load_config(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_missing_file_and_wrong_kind():
    with pytest.raises(fimprobe.FimprobeError, match="cannot be read"):
        load_config("/nowhere/f.yaml")
    with pytest.raises(fimprobe.FimprobeError, match="is no configuration"):
        load_config(3)
    with pytest.raises(fimprobe.FimprobeError, match="did you mean 'draws'"):
        load_config(None, draw=3)


def test_shipped_schema_is_current():
    shipped = Path(fimprobe.__file__).with_name("config.schema.json")
    assert json.loads(shipped.read_text()) == json_schema()
