"""YAML and keywords: good ones are read, bad ones explained, all at once; the generated reference."""

from pathlib import Path

import pytest

import fimprobe
from fimprobe.config.config import Config, describe_options, load_config
from fimprobe.config.reference import generate_reference
from fimprobe.estimators.names import KEYS
from fimprobe.training.schedule import At, Budget, Every
from tests.support.paths import ROOT


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_documented_key_is_read(tmp_path):
    readme = ROOT / "README.md"
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
    assert f"{path}:1: `scedule` is not an option. Did you mean 'schedule'?" in message
    assert f"{path}:2: `draws` must be a positive integer, 'exact' or 'auto', got 'many'" in message
    assert f"{path}:4: `layers.topp` is not an option. Did you mean 'top'?" in message
    assert f"{path}:6: `batch` is given twice. Remove one." in message
    lines = [int(line.removeprefix(f"{path}:").split(":")[0]) for line in message.splitlines()]
    assert lines == sorted(lines) and len(lines) == 5


def messages(path: Path, text: str) -> list[str]:
    """What is said of a file, a line for each mistake."""
    with pytest.raises(fimprobe.FimprobeError) as error:
        load_config(write(path, text))
    return str(error.value).splitlines()


AT = "`schedule.at` must be a list of at least one step, each an integer of at least 0, got"
DRAWS = "`draws` must be a positive integer, 'exact' or 'auto', got"
SAMPLING = "`label_sampling` must be 'size_biased' or 'model', got"
SECOND = "`second_order` must be 'auto', {probes: 2}, 'spot_checks', 'exact' or 'off', got"
TENSORBOARD = "`tensorboard` must be false or a mapping with some of the keys log_dir, histograms and figures, got"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draws: 0", f"{DRAWS} 0. Use 2 to estimate the label variance."),
        ("draws: exct", f"{DRAWS} 'exct'. Did you mean 'exact'?"),
        ("draws: EXACT", f"{DRAWS} 'EXACT'. Did you mean 'exact'?"),
        ("draws: [1]", f"{DRAWS} [1]. Use 2 to estimate the label variance."),
        ("draws: Auto", f"{DRAWS} 'Auto'. Did you mean 'auto'?"),
        ("label_sampling: modle", f"{SAMPLING} 'modle'. Did you mean 'model'?"),
        (
            "label_sampling: 2",
            f"{SAMPLING} 2. Use 'size_biased' to see rare labels at any confidence of the model.",
        ),
        ("label_samplng: model", "`label_samplng` is not an option. Did you mean 'label_sampling'?"),
        ("second_order: of", f"{SECOND} 'of'. Did you mean 'off'?"),
        ("second_order: 4", f"{SECOND} 4. Use 'auto', which works for every model."),
        ("second_order: {probe: 2}", "`second_order.probe` is not an option. Did you mean 'probes'?"),
        (
            "second_order: {probes: 1}",
            "`second_order.probes` must be an integer of at least 2, got 1. Use 2 probes or more: the "
            "square of a single probe is biased.",
        ),
        (
            "tensorboard: yes",
            f"{TENSORBOARD} 'yes'. Leave the option out to write everything to the default folder.",
        ),
        ("tensorboard: off", f"{TENSORBOARD} 'off'. Did you mean false?"),
        (
            "tensorboard: {figures: on}",
            "`tensorboard.figures` must be true or false, got 'on'. Did you mean true?",
        ),
        ("bounds: 'True'", "`bounds` must be true or false, got 'True'. Did you mean true?"),
        ("jsonl: 3", "`jsonl` must be a path, false or null, got 3. Use null for the default file."),
        (
            "schedule: {at: 5}",
            f"{AT} 5. Use [0, 10, 100] to measure at these optimizer steps.",
        ),
        ("schedule: {at: []}", f"{AT} []. Use [0, 10, 100] to measure at these optimizer steps."),
        (
            "schedule: {at: [3, -1]}",
            f"{AT} -1 at position 1. Use [0, 10, 100] to measure at these optimizer steps.",
        ),
        (
            "draws: 1000000000000",
            "`draws` must be at most 1000000, got 1000000000000. Use 2 to estimate the label "
            "variance.",
        ),
        (
            "second_order: {probes: 1000000}",
            "`second_order.probes` must be at most 10000, got 1000000. Use 2 probes or more: the "
            "square of a single probe is biased.",
        ),
        (
            "memory_mb: 1e+305",
            "`memory_mb` must be at most 1000000000, got 1e+305. Use 512, or more where memory "
            "allows.",
        ),
        # keys that look like the names of pydantic's branches
        ("Draws: 2", "`Draws` is not an option. Did you mean 'draws'?"),
        ("schedule: {int: 2}", "`schedule.int` is not an option. Known keys: budget, every, at."),
        (
            'jsonl: "a\\0b"',
            r"`jsonl` must be a path, false or null, got 'a\x00b'. Use null for the "
            "default file.",
        ),
        ("on_error: rais", "`on_error` must be 'warn' or 'raise', got 'rais'. Did you mean 'raise'?"),
        (
            "estimators: [i1, empirica]",
            "`estimators` must be a list of at least one of 'i1', 'i2', 'ih', 'empirical', got "
            "'empirica' at position 1. Did you mean 'empirical'?",
        ),
        (
            "schedule: 5",
            "`schedule` must be a mapping with one of the keys budget, every and at, got 5. Use "
            "{budget: 0.02}, {every: 100} or {at: [0, 10, 100]}.",
        ),
        (
            "schedule: {every: 3, budget: 0.1}",
            "`schedule` must have exactly one of the keys budget, every and at, got budget and every. "
            "Use {budget: 0.02} for 2 % of the wall time.",
        ),
        ("schedule: {3: 4}", "`schedule.3` is not an option. Known keys: budget, every, at."),
        (
            "memory_mb: .inf",
            "`memory_mb` must be a finite number of megabytes above 0, got inf. Use 512, "
            "or more where memory allows.",
        ),
        (
            "seed: 18446744073709551616",
            "`seed` must be a 64-bit integer, got 18446744073709551616. Use 0.",
        ),
    ],
)
def test_a_value_that_fits_no_form_is_one_mistake(tmp_path, text, message):
    path = tmp_path / "f.yaml"
    assert messages(path, f"batch: 4\n{text}\n") == [f"{path}:2: {message}"]


def test_a_key_that_is_no_word(tmp_path):
    path = tmp_path / "f.yaml"
    (line,) = messages(path, "3: 4\n")
    assert line.startswith(f"{path}:1: `3` is not an option. Known keys: schedule, likelihood,")


def test_a_likelihood_that_was_meant(tmp_path):
    (line,) = messages(tmp_path / "f.yaml", "likelihood: gausian\n")
    assert line.endswith(" Did you mean 'gaussian'?") and line.count("gausian") == 1


def test_a_keyword_is_no_line_of_the_file(tmp_path):
    path = write(tmp_path / "f.yaml", "draws: 2\n")
    with pytest.raises(fimprobe.FimprobeError) as error:
        load_config(path, draws="exct")
    assert str(error.value).startswith("`draws` must be ")


def test_every_option_has_one_description():
    options = describe_options()
    assert {name for name in options if "." not in name} == set(Config.model_fields)
    for option in options.values():
        assert option.must_be and option.effect
        assert option.remedy.endswith(".") and option.remedy[0].isupper()


def test_the_estimators_are_those_of_the_table_of_estimators():
    assert load_config(None, estimators=KEYS).estimators == list(KEYS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ":1: the file is empty"),
        ("- 1\n- 2\n", "Write keys and values"),
        ("draws: [1\n", "must be YAML"),
        ("draws: 0\n", "got 0"),
        ("draws: 2.5\n", "got 2.5"),
        ("likelihood: softmax\n", "'softmax'"),
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
    with pytest.raises(fimprobe.FimprobeError, match="must be a readable text file"):
        load_config("/nowhere/f.yaml")
    with pytest.raises(
        fimprobe.FimprobeError,
        match="`config` must be a YAML path, a mapping or a fimprobe.Config, got 3",
    ):
        load_config(3)
    with pytest.raises(fimprobe.FimprobeError, match="Did you mean 'draws'"):
        load_config(None, draw=3)


def test_the_generated_reference_is_current():
    """``python -m fimprobe.config.reference`` writes both files."""
    for path, text in generate_reference(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, path
