"""Files that are no YAML, too large or never end: one sentence with file and line, at once."""

import random
import sys
import time

import pytest

import fimprobe
from fimprobe.cli.commands import main
from fimprobe.config.config import MAX_MISTAKES, load_config
from fimprobe.config.yaml_source import MAX_DEPTH, MAX_FILE_BYTES, MAX_VALUES, read_yaml
from tests.support.paths import ROOT

LAUGHS = "estimators:\n- &a [lol,lol,lol,lol,lol,lol,lol,lol,lol]\n" + "".join(
    f"- &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)

BROKEN = {
    "null character": (b"batch: 2\ndraws: 2\0\n", 2, r"the character '\x00' is not allowed"),
    "bell": (b"draws: 2 # \x07\n", 1, r"the character '\x07' is not allowed"),
    "no integer": (b"batch: 2\ndraws: !!int 2.5\n", 2, "'2.5' is not a value of the type int"),
    "no boolean": (b"bounds: !!bool maybe\n", 1, "'maybe' is not a value of the type bool"),
    "no float": (b"memory_mb: !!float abc\n", 1, "'abc' is not a value of the type float"),
    "no date": (b"seed: 2024-13-45\n", 1, "'2024-13-45' is not a value of the type timestamp"),
    "no time": (b"seed: !!timestamp foo\n", 1, "'foo' is not a value of the type timestamp"),
    "5000 digits": (b"seed: " + b"9" * 5000 + b"\n", 1, "is not a value of the type int"),
    "5000 hexadecimal digits": (b"seed: 0x" + b"f" * 5000 + b"\n", 1, "`seed` must be a 64-bit"),
    "no digit": (b"draws: 0x_\n", 1, "'0x_' is not a value of the type int"),
    "list as key": (b"draws: 2\n[a, b]: 2\n", 2, "a key must be a word, got a collection"),
    "list as nested key": (b"layers: {[a]: 2}\n", 1, "a key must be a word, got a collection"),
    "nothing as key": (b"draws: 2\nnull: 3\n", 2, "a key must be a word, got 'null'"),
    "line break in a key": (b'"a\\nb": 3\n', 1, r"`a\nb` is not an option"),
    "list in itself": (b"estimators: &a [*a]\n", 1, "a value must not contain itself"),
    "file in itself": (b"&a\ndraws: *a\n", 2, "a value must not contain itself"),
    "mapping in itself": (b"schedule: &a {at: *a}\n", 1, "a value must not contain itself"),
    "deep lists": (b"- " * 3000 + b"a\n", 1, f"nested at most {MAX_DEPTH} deep"),
    "deep brackets": (b"[" * 3000, 1, f"nested at most {MAX_DEPTH} deep"),
    "deep mappings": (b"{a: " * 3000, 1, f"nested at most {MAX_DEPTH} deep"),
    "nested aliases": (LAUGHS.encode(), 6, f"at most {MAX_VALUES} values"),
    "large": (b"#" * (MAX_FILE_BYTES + 1), 1, f"at most {MAX_FILE_BYTES} bytes"),
    "no alias": (b"draws: *a\n", 1, "found undefined alias 'a'"),
    "merged number": (b"<<: 3\n", 1, "expected a mapping"),
    "Python object": (b"seed: !!python/object:os.system x\n", 1, "could not determine"),
    "two documents": (b"draws: 2\n---\ndraws: 3\n", 2, "but found another document"),
    "Latin-1": (b"draws: 2\n# \xe9\n", 2, "the byte 0xe9, which is not UTF-8"),
    "UTF-16": ("draws: 2".encode("utf-16"), 1, "the byte 0xff, which is not UTF-8"),
    "set": (b"!!set {a}\n", 1, "the file must be a mapping, got {'a'}"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_end_in_one_sentence_with_the_line(name, tmp_path, capsys):
    content, line, words = BROKEN[name]
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    started = time.process_time()
    assert main(["check", str(path)]) == 1
    assert time.process_time() - started < 10
    message = capsys.readouterr().err
    assert message.startswith(f"fimprobe check: {path}:{line}: "), message
    assert words in message
    assert message.count("\n") == 1


def test_aliases_within_the_limits_are_read(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("layers: {include: &names [a, b], exclude: *names}\nschedule: {at: [&n 3, *n]}\n")
    config = load_config(path)
    assert config.layers.include == config.layers.exclude == ["a", "b"]
    assert config.schedule.at == [3, 3]


def test_a_long_list_of_mistakes_is_cut(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text(f"estimators: [{'x, ' * 5000}x]\n")
    with pytest.raises(fimprobe.FimprobeError) as error:
        load_config(path)
    lines = str(error.value).splitlines()
    assert len(lines) == MAX_MISTAKES + 1
    assert lines[-1] == f"and {5001 - MAX_MISTAKES} more mistakes."


@pytest.mark.parametrize("path", ["/dev/zero", "a\0b", "/"])
def test_what_is_no_file(path):
    with pytest.raises(fimprobe.FimprobeError, match="`config` must be a readable text file"):
        load_config(path)


@pytest.mark.parametrize("seed", range(30))
def test_mutated_files_raise_no_other_error(seed, tmp_path):
    readme = (ROOT / "README.md").read_text()
    text = readme.split("### Configure it")[1].split("```yaml\n")[1].split("```")[0]
    generator, path = random.Random(seed), tmp_path / "f.yaml"
    for _ in range(10):
        content = bytearray(text.encode())
        for _ in range(generator.randint(1, 6)):
            place = generator.randrange(len(content))
            content[place] = generator.choice(b"[]{}:&*!|>-#?,\"'\0\t\n 0a\xff%@`")
        path.write_bytes(bytes(content))
        try:
            load_config(path)
        except fimprobe.FimprobeError as error:
            assert str(path) in str(error)


def test_the_lines_of_values(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("draws: 2\nlayers:\n  top: 3\n")
    assert read_yaml(path).lines[("layers", "top")] == f"{path}:3"


@pytest.mark.parametrize("option", ["engine: backpack", "second_order: exact"])
def test_check_needs_what_a_training_needs(option, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fimprobe.engines.backpack", None)
    monkeypatch.delattr("fimprobe.engines.backpack", raising=False)
    path = tmp_path / "f.yaml"
    path.write_text(f"{option}\n")
    assert main(["check", str(path)]) == 1
    assert "need BackPACK" in capsys.readouterr().err
