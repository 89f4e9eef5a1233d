"""The adapter to Hugging Face's Trainer: what it sees, writes, survives and leaves alone."""

import copy
import gc
import json
import os
import time
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import fimprobe
from tests.support.paths import EXAMPLES
from tests.support.trackers import WandbRun, install

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.integrations import TensorBoardCallback, WandbCallback  # noqa: E402

from fimprobe.integrations.huggingface import FimProbeCallback, _headlines  # noqa: E402
from tests.faults import callbacks  # noqa: E402
from tests.support import huggingface_worker  # noqa: E402
from tests.support.fresh_process import run_fresh  # noqa: E402
from tests.support.huggingface import LENGTH, TOKENS, arguments, gpt2, text, trainer_of  # noqa: E402
from tests.support.processes import free_port, start_processes  # noqa: E402
from tests.support.warnings import warnings_of  # noqa: E402

I1 = {"schedule": {"every": 1}, "estimators": "i1", "bounds": False}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.delenv("FIMPROBE_CONFIG", raising=False)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    gc.collect()  # the probes of an earlier test's models end here, and state why


def scalars(folder, tag):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}, [
        event.step for event in events.Scalars(tag)
    ]


def hooks(model):
    return len(model._forward_pre_hooks) + len(model._forward_hooks)


class Recording(Trainer):
    """Keeps what the model saw last before each optimizer step, and the weights of then."""

    seen = None

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen = self.seen or {}
        self.seen[self.state.global_step] = (
            {k: v.clone() for k, v in inputs.items()},
            copy.deepcopy({k: v.detach() for k, v in self.model.state_dict().items()}),
        )
        return super().training_step(model, inputs, *args, **kwargs)


class Fail(TrainerCallback):
    """An exception after some step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("the power went out")


def check_against_measure(trainer, probe, steps, model=None):
    """Each report is that of the batch and the weights which its step had."""
    assert [r.step for r in probe.history] == steps
    for report in probe.history:
        inputs, weights = trainer.seen[report.step]
        plain = gpt2() if model is None else model()
        plain.load_state_dict(weights)
        labels = inputs["labels"]
        mask = torch.cat([labels[:, 1:] != -100, torch.zeros_like(labels[:, :1], dtype=bool)], 1)
        wanted = fimprobe.measure(
            plain, {"input_ids": inputs["input_ids"]}, likelihood="categorical", draws=2,
            estimators="i1", bounds=False, mask=mask, seed=1_000_003 * report.step,
        )  # fmt: skip
        assert report.total.i1.trace == pytest.approx(wanted.total.i1.trace, rel=1e-5, abs=0)
        assert report.batch_size == len(labels)


# what is measured


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
        {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
        {"activation_checkpointing": True, "max_grad_norm": 0},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=["plain", "accumulation", "evaluation", "checkpointing", "compile"],
)
def test_each_report_belongs_to_its_step(tmp_path, options):
    torch._dynamo.reset()
    probing = FimProbeCallback(**I1)
    given = {"eval_dataset": text(8)} if "eval_steps" in options else {}
    trainer = trainer_of(tmp_path, probing, kind=Recording, given=given, max_steps=3, **options)
    trainer.train()
    check_against_measure(trainer, probing.probe, [0, 1, 2])
    assert hooks(trainer.model) == hooks(trainer.model_wrapped) == 0


def test_under_autocast_it_measures_in_full_precision(tmp_path):
    probing = FimProbeCallback(schedule={"every": 2})
    trainer = trainer_of(tmp_path, probing, kind=Recording, bf16=True)
    trainer.train()
    check_against_measure(trainer, probing.probe, [0, 2, 4])
    assert probing.probe.last.total.i2 is not None


def test_a_model_in_bfloat16(tmp_path):
    probing = FimProbeCallback(**I1)
    trainer_of(tmp_path, probing, model=gpt2().to(torch.bfloat16), max_steps=2).train()
    assert [r.step for r in probing.probe.history] == [0, 1]


def test_adapters_are_all_that_is_measured(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    probing = FimProbeCallback(schedule={"every": 3})
    model = peft.get_peft_model(gpt2(), config)
    trainer_of(tmp_path, probing, model=model).train()
    probe = probing.probe
    assert [r.step for r in probe.history] == [0, 3]
    assert set(probe.last.parameters) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert probe.last.total.i1.trace > 0


def test_sequence_to_sequence(tmp_path):
    from transformers import (
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=TOKENS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    probing = FimProbeCallback(**I1)
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments(
            tmp_path, Seq2SeqTrainingArguments, max_steps=3, predict_with_generate=True,
            eval_strategy="steps", eval_steps=1,
        ),
        train_dataset=text(),
        eval_dataset=text(4),
        callbacks=[probing],
    )  # fmt: skip
    trainer.train()
    assert [r.step for r in probing.probe.history] == [0, 1, 2]


def test_a_step_whose_batch_is_not_seen_is_left_out(tmp_path):
    class Around(Recording):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 2:
                hidden = model.transformer(input_ids=inputs["input_ids"])[0]
                return model.lm_head(hidden).square().mean()
            return super().compute_loss(model, inputs, *args, **kwargs)

    probing = FimProbeCallback(**I1)
    trainer = trainer_of(tmp_path, probing, kind=Around)
    trainer.train()
    check_against_measure(trainer, probing.probe, [0, 1, 3, 4, 5])


def test_a_batch_without_labels(tmp_path, caplog):
    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )

    probing = FimProbeCallback(**{**I1, "estimators": ["i1", "empirical"]})
    trainer_of(tmp_path, probing, given={"compute_loss_func": loss}).train()
    reports = probing.probe.history
    assert [r.step for r in reports] == [0, 1, 2, 3, 4, 5]
    assert all(r.total.i1.trace > 0 for r in reports)
    assert len(warnings_of(caplog)) <= 1


def test_two_processes_measure_together_and_one_writes(tmp_path):
    context = start_processes(huggingface_worker.main, (free_port(), tmp_path), 2)
    deadline = time.monotonic() + 120
    while not context.join(10):
        assert time.monotonic() < deadline
    first, second = ((tmp_path / f"rank{r}").read_text() for r in (0, 1))
    assert first.endswith("[0, 3] True\n") and second.endswith("[0, 3] False\n")
    assert first.split("]")[0] == second.split("]")[0]  # the same numbers on both
    assert "(0, 8, " in first
    (lines,) = (tmp_path / "out").glob("**/fimprobe.jsonl")
    written = map(json.loads, lines.read_text().splitlines())
    assert [line["step"] for line in written if "run" not in line] == [0, 3]


def test_outputs_of_ddp_that_have_no_gradient(tmp_path):
    """The loss is made inside: DDP hands None back to the logits that it returned."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(gpt2(), find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with fimprobe.attach(model, tensorboard=False, **I1) as probe:
            for row in text(3):
                optimizer.zero_grad()
                model(**{k: v[None] for k, v in row.items()}).loss.backward()
                optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    assert [r.step for r in probe.history] == [0, 1, 2]


# nothing else changes


def test_training_is_bit_identical(tmp_path):
    def run(*callbacks):
        options = {
            "lr_scheduler_type": "cosine",
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
        }
        given = {"eval_dataset": text(8)}
        trainer = trainer_of(
            tmp_path, *callbacks, given=given, eval_strategy="steps", eval_steps=2, **options
        )  # GPT-2 has dropout
        trainer.train()
        return trainer

    def series(trainer):
        keys = ("loss", "grad_norm", "learning_rate", "eval_loss")
        return [{k: x[k] for k in (*keys, "step") if k in x} for x in trainer.state.log_history
                if any(k in x for k in keys)]  # fmt: skip

    plain, probed = run(), run(FimProbeCallback(schedule={"every": 2}))
    assert series(plain) == series(probed) and len(series(plain)) == 9
    for (name, a), b in zip(plain.model.state_dict().items(), probed.model.state_dict().values()):
        assert torch.equal(a, b), name
    state = [t.optimizer.state_dict()["state"] for t in (plain, probed)]
    assert all(torch.equal(state[0][i]["exp_avg_sq"], state[1][i]["exp_avg_sq"]) for i in state[0])


def test_import_fimprobe_imports_no_transformers():
    code = "import sys, fimprobe; assert 'transformers' not in sys.modules"
    assert run_fresh(code).returncode == 0


# where it goes


HEADLINES = ("trace", "rel_error", "one_label_error")


def headline_of(report, name):
    _, kind, value = name.split("/")
    if value == "one_label_error":
        return report.error_of(kind, labels=1)
    return getattr(getattr(report.total, kind), value)


class Log(TrainerCallback):
    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append((state.global_step, dict(logs)))


@pytest.mark.parametrize(
    "where",
    [
        "report_to",
        pytest.param("after ours", marks=pytest.mark.long),
        "own writer",
        pytest.param("environment", marks=pytest.mark.long),
        "none",
    ],
)
def test_beside_the_trainers_own_run_and_in_its_log(tmp_path, where, monkeypatch, capsys):
    monkeypatch.setattr(
        "fimprobe.probe.run_account.MIN_WALL_SECONDS", 0.0 if where == "none" else 1e9
    )
    probing, log = FimProbeCallback(schedule={"every": 2}), Log()
    callbacks = [log, probing]
    if where == "after ours":
        callbacks.append(TensorBoardCallback())
    if where == "own writer":
        callbacks.append(TensorBoardCallback(SummaryWriter(str(tmp_path / "mine"))))
    if where == "environment":
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    report_to = "tensorboard" if where in ("report_to", "environment") else "none"
    trainer = trainer_of(
        tmp_path, *callbacks, report_to=report_to, max_steps=5, per_device_train_batch_size=8
    )
    trainer.train()
    (folder,) = tmp_path.glob("**/fimprobe.jsonl")
    run = folder.parent.parent
    assert folder.parent.name == "fimprobe" and folder.parent == probing.probe.log_dir
    mine = where in ("own writer", "environment")
    assert run == tmp_path / "mine" if mine else run.parent == tmp_path / "runs"
    assert capsys.readouterr().out.count(f"fimprobe: tensorboard --logdir {run}\n") == 1
    reports = probing.probe.history
    assert scalars(folder.parent / "i1", "fim/log10_trace")[1] == [0, 2, 4]
    headlines = [f"fim/{k}/{n}" for k in ("i1", "i2") for n in HEADLINES]
    for name in (*headlines, "fim_probe/overhead"):
        history = [(x["step"], x[name]) for x in trainer.state.log_history if name in x]
        assert history == [(step, logs[name]) for step, logs in log.entries if name in logs]
        if name == "fim_probe/overhead":
            assert [step for step, _ in history] == ([0, 2, 4] if where == "none" else [])
            assert all(0 <= v < 1 for _, v in history)
        else:
            wanted = [(r.step, headline_of(r, name)) for r in reports]
            assert history == [(step, value) for step, value in wanted if value is not None]
            assert history and all(v > 0 for _, v in history), name
    if where != "none":  # no value stands twice under the Trainer's run
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        tags = events.Tags()["scalars"]
        assert "train/loss" in tags and not [tag for tag in tags if "fim" in tag]
    every = {x["step"] for x in trainer.state.log_history if "fim/i1/rel_error" in x}
    assert every == {0, 2, 4} and all(r.batch_size == 8 for r in reports)
    assert [x["step"] for x in trainer.state.log_history if "loss" in x] == [2, 4]
    fim = {key for x in trainer.state.log_history for key in x if key.startswith("fim")}
    assert fim == {*headlines, *(["fim_probe/overhead"] if where == "none" else [])}
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_headlines_are_finite_and_leave_out_what_is_not_known():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(16, 4)
    report = fimprobe.measure(net, x, likelihood="categorical")
    names = [f"fim/{k}/{n}" for k in ("i1", "i2") for n in HEADLINES]
    assert _headlines(report) == {name: headline_of(report, name) for name in names}
    # four inputs tell a trace, and no error
    few = fimprobe.measure(net, x[:4], likelihood="categorical")
    traces = {"fim/i1/trace": few.total.i1.trace, "fim/i2/trace": few.total.i2.trace}
    assert _headlines(few) == traces
    alone = fimprobe.measure(net, x, likelihood="categorical", estimators="i1", bounds=False)
    assert set(_headlines(alone)) == set(names[:3])

    def of(i1, i2):
        total = replace(
            report.total, i1=replace(report.total.i1, **i1), i2=replace(report.total.i2, **i2)
        )
        return _headlines(replace(report, total=total))

    whole = _headlines(report)
    assert of({"rel_error": None}, {"rel_error": 0.5}) == {
        **{n: v for n, v in whole.items() if n != "fim/i1/rel_error"}, "fim/i2/rel_error": 0.5
    }  # fmt: skip
    assert of({}, {"rel_error": 0.0})["fim/i2/rel_error"] == 0.0
    assert of({"pair_variance": None}, {}).keys() == whole.keys() - {"fim/i1/one_label_error"}
    nothing = {"trace": float("inf"), "rel_error": float("nan"), "pair_variance": None}
    assert of(nothing, nothing) == {}


def test_how_labels_are_had_reaches_the_measurement(tmp_path):
    """By keyword and by YAML; a language model's labels are too many to be exact."""
    path = tmp_path / "f.yaml"
    path.write_text("label_sampling: model\ndraws: auto\nestimators: i1\nbounds: false\n")
    more = {"schedule": {"every": 1}}
    for number, (probing, sampling) in enumerate(
        [
            (FimProbeCallback(path, **more), "model"),
            (FimProbeCallback(**I1, draws="auto"), "size_biased"),
            (FimProbeCallback(**I1), "size_biased"),
        ]
    ):
        trainer_of(tmp_path / str(number), probing, max_steps=1).train()
        report = probing.probe.last
        assert (report.draws, report.label_sampling) == (2, sampling)
        assert (report.seen_mass is None) == (sampling == "size_biased")


def test_trainers_that_override_log_keep_their_metrics(tmp_path):
    class Metrics(Trainer):
        calls = 0

        def log(self, logs, start_time=None):
            self.calls += 1
            super().log({**logs, "mine": self.calls}, start_time)

    trainer = trainer_of(tmp_path, FimProbeCallback(**I1), kind=Metrics)
    trainer.train()
    assert [x["mine"] for x in trainer.state.log_history if "mine" in x] == [1, 2, 3, 4]


def test_a_loop_that_calls_the_events_itself(tmp_path):
    model, probing = gpt2(), FimProbeCallback(**I1)
    args, state, control = arguments(tmp_path), TrainerState(), TrainerControl()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probing.on_train_begin(args, state, control, model=model)
    probing.on_epoch_begin(args, state, control, model=model)
    for row in text(2):
        model(**{k: v[None] for k, v in row.items()}).loss.backward()
        probing.on_pre_optimizer_step(args, state, control, model=model)
        optimizer.step()
        state.global_step += 1
    probing.on_train_end(args, state, control, model=model)
    history = [(x["step"], x["fim/i1/trace"]) for x in state.log_history]
    assert (
        history == [(r.step, r.total.i1.trace) for r in probing.probe.history] and len(history) == 2
    )
    assert probing.probe.log_dir.parent.parent == tmp_path / "runs"


def test_what_others_ask_to_be_logged_is_logged(tmp_path):
    class LogNow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            control.should_log = True

    trainer = trainer_of(tmp_path, FimProbeCallback(**I1), LogNow(), logging_steps=100)
    trainer.train()
    assert [x["step"] for x in trainer.state.log_history if "loss" in x] == [1, 2, 3, 4, 5, 6]


def test_log_dir_and_no_files(tmp_path, capsys):
    probing = FimProbeCallback(log_dir=tmp_path / "here", **I1)
    trainer_of(tmp_path / "out", probing, max_steps=1).train()
    assert probing.probe.log_dir == tmp_path / "here"
    assert f"--logdir {tmp_path / 'here'}\n" in capsys.readouterr().out
    silent = FimProbeCallback(tensorboard=False, **I1)
    trainer_of(tmp_path / "other", silent, max_steps=1, report_to="none").train()
    assert silent.probe.last.step == 0
    assert not list((tmp_path / "other").glob("**/*tfevents*"))


def test_a_run_directory_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    probing = FimProbeCallback(log_dir=tmp_path / "file" / "run", **I1)
    trainer = trainer_of(tmp_path, probing)
    trainer.train()
    (line,) = warnings_of(caplog)
    assert "cannot be written" in line
    assert [x["step"] for x in trainer.state.log_history if "fim/i1/trace" in x] == [0, 1, 2, 3, 4, 5]


# resuming


def next_second():
    """Event files are read in the order of their names, which hold the second."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.02)


RESUME = {
    "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1,
    "per_device_train_batch_size": 8,
}  # fmt: skip
CHARTED = {**I1, "layers": {"top": 2}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The callback of a run that is not interrupted."""
    probing = FimProbeCallback(**CHARTED)
    trainer_of(tmp_path_factory.mktemp("whole"), probing, **RESUME).train()
    return probing


@pytest.mark.parametrize("same_trainer", [False, True])
def test_an_interrupted_run_reads_as_one(tmp_path, same_trainer, whole):
    options = CHARTED
    first, fail = FimProbeCallback(**options), Fail(5)
    trainer = trainer_of(tmp_path / "out", first, fail, **RESUME)
    with pytest.raises(RuntimeError, match="power"):
        trainer.train()
    folder = first.probe.log_dir
    assert [r.step for r in first.probe.history] == [0, 1, 2, 3, 4]
    next_second()
    fail.step = None
    if not same_trainer:
        trainer = trainer_of(tmp_path / "out", FimProbeCallback(**options), **RESUME)
    trainer.train(resume_from_checkpoint=True)
    assert hooks(trainer.model) == 0
    assert [p.parent for p in (tmp_path / "out").glob("**/fimprobe.jsonl")] == [folder]
    wanted = [r.total.i1.trace for r in whole.probe.history]
    for name in ("", "i1"):
        events, wholes = (
            EventAccumulator(str(place / name), size_guidance={"scalars": 0})
            for place in (folder, whole.probe.log_dir)
        )
        events.Reload()
        wholes.Reload()
        tags = events.Tags()["scalars"]
        assert tags and set(tags) == set(wholes.Tags()["scalars"])
        for tag in tags:  # where a number is not known the uninterrupted run has the same gap
            steps = [event.step for event in events.Scalars(tag)]
            assert steps == [event.step for event in wholes.Scalars(tag)] == sorted(set(steps)), tag
            if not tag.startswith("fim_probe/"):
                values = [event.value for event in events.Scalars(tag)]
                wholes_values = [event.value for event in wholes.Scalars(tag)]
                assert values == pytest.approx(wholes_values, rel=1e-6, abs=0), tag
    assert len([t for t in tags if t.startswith("fim_layer_error/")]) == 2
    traces, steps = scalars(folder / "i1", "fim/log10_trace")
    assert steps == list(range(8))
    assert [10**x for x in traces.values()] == pytest.approx(wanted, rel=1e-5, abs=0)
    lines = [json.loads(line) for line in (folder / "fimprobe.jsonl").read_text().splitlines()]
    assert [line["run"]["first_step"] for line in lines if "run" in line] == [0, 3]
    lines = [line for line in lines if "run" not in line]
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["total"]["i1"]["trace"] for line in lines] == wanted
    history = [x for x in trainer.state.log_history if "fim/i1/trace" in x]
    assert [(x["step"], x["fim/i1/trace"]) for x in history] == list(enumerate(wanted))


def test_layers_charted_stay_the_same_after_resuming(tmp_path):
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    options = {
        "likelihood": "categorical",
        "estimators": ("i1",),
        "bounds": False,
        "log_dir": tmp_path,
    }
    with fimprobe.attach(net, layers={"top": 2, "include": ["[13]"]}, **options) as probe:
        probe.step(torch.randn(8, 4))
    next_second()
    config = fimprobe.load_config(
        {"tensorboard": {"log_dir": str(tmp_path)}, "likelihood": "categorical", "estimators": "i1"}
    )
    with fimprobe.Probe(net, config, first_step=1) as probe:
        assert probe.step(torch.randn(8, 4)).step == 1
        assert probe.step(torch.randn(8, 4), number=7).step == 7
    events = EventAccumulator(str(tmp_path / "i1"))
    events.Reload()
    charted = {t.split("/")[1] for t in events.Tags()["scalars"] if t.startswith("fim_layer_error")}
    assert charted == {"1 Linear", "3 Linear"}


def test_checkpoints_made_without_the_callback_and_from_elsewhere(tmp_path):
    trainer_of(tmp_path, **RESUME).train()
    probing = FimProbeCallback(**I1)
    trainer = trainer_of(tmp_path, probing, **RESUME)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert [r.step for r in probing.probe.history] == [6, 7]
    assert scalars(probing.probe.log_dir / "i1", "fim/log10_trace")[1] == [6, 7]
    # a checkpoint with a note, resumed into another output_dir, by a Trainer without and with it
    trainer_of(tmp_path / "plain", **RESUME).train(str(tmp_path / "checkpoint-8"))
    (tmp_path / "checkpoint-6" / "fimprobe.json").write_text("torn")
    again = FimProbeCallback(**I1)
    trainer_of(tmp_path / "other", again, **RESUME).train(str(tmp_path / "checkpoint-6"))
    assert again.probe.log_dir.is_relative_to(tmp_path / "other")
    os.replace(tmp_path / "checkpoint-8", tmp_path / "checkpoint-moved")
    next_second()
    last = FimProbeCallback(**I1)
    trainer_of(tmp_path / "third", last, **{**RESUME, "max_steps": 9}).train(
        str(tmp_path / "checkpoint-moved")
    )
    assert last.probe.log_dir == probing.probe.log_dir
    assert scalars(last.probe.log_dir / "i1", "fim/log10_trace")[1] == [6, 7, 8]


def test_a_torn_line_goes_when_resuming(tmp_path):
    path = tmp_path / "fimprobe.jsonl"
    path.write_text('{"step": 0}\n{"step": 5}\n{"step": 9, "to')
    fimprobe.Probe(
        nn.Linear(2, 2),
        fimprobe.load_config({"tensorboard": False, "jsonl": str(path), "likelihood": "categorical"}),
        first_step=5,
    ).detach()
    assert path.read_text() == '{"step": 0}\n'


# one training after the other


def test_a_second_training_has_a_folder_of_its_own(tmp_path):
    probing = FimProbeCallback(**I1)
    trainer = trainer_of(tmp_path, probing, max_steps=2)
    trainer.train()
    first = probing.probe
    assert first.detached and hooks(trainer.model) == 0
    trainer.train()
    assert probing.probe.detached and hooks(trainer.model) == 0
    assert [r.step for r in probing.probe.history] == [0, 1]
    assert (first.log_dir.name, probing.probe.log_dir.name) == ("fimprobe", "fimprobe-2")
    for probe in (first, probing.probe):
        assert scalars(probe.log_dir / "i1", "fim/log10_trace")[1] == [0, 1]


def test_after_an_exception_another_training_probes(tmp_path, caplog):
    model, data = gpt2(), text()
    failing = FimProbeCallback(**I1)
    trainer = trainer_of(tmp_path, failing, Fail(2), model=model, data=data)
    with pytest.raises(RuntimeError, match="power"):
        trainer.train()
    trainer.evaluate(data[:4])
    probing = FimProbeCallback(**I1)
    trainer_of(tmp_path, probing, model=model, data=data, max_steps=2).train()
    assert [r.step for r in probing.probe.history] == [0, 1]
    assert failing.probe.detached and hooks(model) == 0 and not warnings_of(caplog)


def test_hooks_go_with_the_callback(tmp_path):
    model = gpt2()
    trainer = trainer_of(tmp_path, FimProbeCallback(**I1), Fail(2), model=model)
    with pytest.raises(RuntimeError, match="power"):
        trainer.train()
    assert hooks(model) > 0
    model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.sum().backward()  # harmless
    del trainer
    gc.collect()
    assert hooks(model) == 0
    again = FimProbeCallback(**I1)
    with pytest.raises(RuntimeError, match="power"):
        trainer_of(tmp_path, again, Fail(1), model=model).train()
    again.detach()
    again.detach()
    assert hooks(model) == 0


# mistakes


def test_two_callbacks_make_one_probe(tmp_path, caplog):
    first, second = FimProbeCallback(**I1), FimProbeCallback(**I1)
    trainer = trainer_of(tmp_path, first, second)
    trainer.train()
    (line,) = warnings_of(caplog)
    assert "two FimProbeCallbacks" in line
    assert second.probe is None and len(first.probe.history) == 6
    assert [x["step"] for x in trainer.state.log_history if "fim/i1/trace" in x] == [0, 1, 2, 3, 4, 5]


def test_a_model_that_has_a_probe(tmp_path, caplog):
    model = gpt2()
    with fimprobe.attach(model, tensorboard=False, **I1) as probe:
        trainer_of(tmp_path, FimProbeCallback(**I1), model=model).train()
    (line,) = warnings_of(caplog)
    assert "already has a probe" in line and len(probe.history) == 6


def test_configuration(tmp_path, monkeypatch):
    path = tmp_path / "f.yaml"
    path.write_text("draws: 3\nschedule: {every: 5}\nseed: 4\n")
    assert FimProbeCallback().config.draws == 2
    for given in (path, str(path), {"draws": 3, "seed": 4}, fimprobe.Config(draws=3, seed=4)):
        config = FimProbeCallback(given, seed=7).config
        assert (config.draws, config.seed) == (3, 7)
    monkeypatch.setenv("FIMPROBE_CONFIG", str(path))
    assert FimProbeCallback().config.schedule.every == 5
    assert FimProbeCallback(draws=9).config.draws == 9
    assert FimProbeCallback({"seed": 1}).config.draws == 2
    path.write_text("draws: 3\n\nshedule: {every: 5}\n")
    for make in (FimProbeCallback, lambda: FimProbeCallback(path)):
        with pytest.raises(fimprobe.FimprobeError, match=r"f\.yaml:3: .*Did you mean 'schedule'"):
            make()
    monkeypatch.setenv("FIMPROBE_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(fimprobe.FimprobeError, match="must be a readable text file"):
        FimProbeCallback()


def test_the_examples_configuration_is_right():
    FimProbeCallback(EXAMPLES / "fimprobe.yaml")


class Odd(nn.Module):
    """A model whose loss is no likelihood's."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(LENGTH, 2)

    def forward(self, input_ids, labels=None):
        logits = self.net(input_ids.float())
        log_p = logits.log_softmax(1)[:, 0]
        return {"loss": -((1 - log_p.exp()) ** 2 * log_p).mean(), "logits": logits}  # focal


def test_an_unknown_head_is_told_once_and_trained_on(tmp_path, caplog):
    probing = FimProbeCallback(**I1)
    trainer = trainer_of(tmp_path, probing, model=Odd())
    trainer.train()
    (line,) = warnings_of(caplog)
    assert "likelihood=" in line and trainer.state.global_step == 6
    failing = FimProbeCallback(**I1, on_error="raise")
    with pytest.raises(fimprobe.FimprobeError, match="likelihood="):
        trainer_of(tmp_path, failing, model=Odd()).train()


def test_a_failing_logger_does_not_end_the_training(tmp_path, caplog):
    class Broken(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "fim/i1/trace" in logs:
                raise OSError("no route to host")

    trainer = trainer_of(tmp_path, FimProbeCallback(**I1), Broken())
    trainer.train()
    (line,) = warnings_of(caplog)
    assert "no route to host" in line and trainer.state.global_step == 6


class Tracked(WandbCallback):
    """The Trainer's callback of W&B without W&B: it keeps what it is asked to log."""

    def __init__(self):
        self.logs = []

    def setup(self, *args, **kwargs):
        pass

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)

    def on_train_begin(self, *args, **kwargs):
        pass

    on_train_end = on_save = on_predict = on_train_begin


@pytest.mark.parametrize("off", [False, True])
def test_the_numbers_go_where_report_to_says(tmp_path, monkeypatch, off):
    """All of them to the Trainer's run, and none twice; an option of the user wins."""
    run = WandbRun()
    install(monkeypatch, "wandb", run=run)
    probing, tracked = FimProbeCallback(**I1, **({"wandb": False} if off else {})), Tracked()
    trainer = trainer_of(tmp_path, tracked, probing, max_steps=3)
    trainer.args.report_to = ["wandb"]
    trainer.train()
    history = probing.probe.history
    wanted = [] if off else [r.scalars(layers=()) for r in history]
    assert [{k: v for k, v in row.items() if k != "fim_probe/step"} for row in run.rows] == wanted
    headlines = [logs for logs in tracked.logs if any(name.startswith("fim") for name in logs)]
    assert len(headlines) == (len(history) if off else 0)
    assert not run.finished  # it is the Trainer's
    assert len([x for x in trainer.state.log_history if "fim/i1/trace" in x]) == len(history) > 0


def test_no_error_of_the_callback_reaches_the_training():
    outcome = callbacks.huggingface([RuntimeError], share=0.12)
    assert outcome.injected == outcome.survived == outcome.told_once > 2, outcome.problems
