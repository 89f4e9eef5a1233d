"""YAML and keywords: good ones are taken, bad ones explained, all at once."""

import json
from pathlib import Path

import pytest

import fimprobe
from fimprobe.config import json_schema, load_config
from fimprobe.schedule import At, Budget, Every


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
