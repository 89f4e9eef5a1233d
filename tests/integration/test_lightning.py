"""The Lightning callback under a real Trainer: which batch, which step, nothing disturbed."""

import copy
import json
import logging
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fimprobe
from fimprobe import FimprobeError
from fimprobe.integrations.lightning import FimProbeCallback  # first: it hides a broken torchvision
from tests.faults import callbacks

pl = pytest.importorskip("lightning.pytorch")

EVERY = {"schedule": {"every": 1}, "on_error": "raise", "estimators": ["i1"], "bounds": False}
OUTPUT_OPTIONS = {**EVERY, "tensorboard": False}


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(pl.LightningModule):
    """Digits-like data through ``self(x)``; remembers what each optimizer step saw."""

    def __init__(self, by="self"):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.by, self.seen, self.losses, self.batch = by, [], [], None

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = self.batch = batch
        loss = F.cross_entropy(self(x) if self.by == "self" else self.model(x), y)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    def on_before_optimizer_step(self, optimizer):
        self.seen.append((self.trainer.global_step, self.batch[0], copy.deepcopy(self.model)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader(count=24, size=6, shuffle=False):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 4, generator=generator), torch.arange(count) % 3
    return torch.utils.data.DataLoader(list(zip(x, y)), size, shuffle=shuffle)


def trainer(tmp_path, *callbacks, **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def numbers(report):
    """The report without the time it took, whatever the parameters are called."""
    groups = [(report.total, "total")] + [(g, n) for n, g in report.parameters.items()]
    return report.step, [
        (n.removeprefix("model."), g.i1.trace, g.i1.label_variance) for g, n in groups
    ]


def expected(seen):
    """One measurement of the remembered model and batch, with the seed of the step."""
    step, x, model = seen
    options = {"likelihood": "categorical", "estimators": ("i1",), "bounds": False}
    return fimprobe.measure(model, x, seed=1_000_003 * step, step=step, **options)


@pytest.mark.parametrize(("module", "by"), [(None, "self"), ("model", "self"), ("model", "model")])
def test_each_step_is_measured_at_its_batch_and_parameters(tmp_path, module, by):
    net, callback = Net(by), FimProbeCallback(module=module, **OUTPUT_OPTIONS)
    trainer(tmp_path, callback, accumulate_grad_batches=2, max_epochs=2).fit(net, loader(), loader())
    assert [numbers(r) for r in callback.probe.history] == [numbers(expected(s)) for s in net.seen]
    assert [r.step for r in callback.probe.history] == [0, 1, 2, 3]
    assert callback.probe.likelihood.name == "categorical" and callback.probe.detached


def run(tmp_path, callback):
    pl.seed_everything(3, verbose=False)
    net, logger = Net(), pl.loggers.CSVLogger(tmp_path)
    fit = trainer(
        tmp_path, *([callback] if callback else []), logger=logger, max_epochs=3,
        accumulate_grad_batches=2, val_check_interval=2, log_every_n_steps=1, gradient_clip_val=0.5,
    )  # fmt: skip
    fit.fit(net, loader(shuffle=True), loader())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    logged = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    state = [*net.state_dict().values(), *fit.optimizers[0].state_dict()["state"][0].values()]
    return [x.tolist() for x in state], net.losses, logged, torch.get_rng_state().tolist(), hooks


def test_training_and_logging_are_bit_identical(tmp_path):
    callback = FimProbeCallback(schedule={"every": 1}, on_error="raise")
    assert run(tmp_path / "with", callback) == run(tmp_path / "without", None)
    assert [r.step for r in callback.probe.history] == list(range(6))
    assert callback.probe.last.total.i2 is not None
    written = tmp_path / "with/lightning_logs/version_0/fimprobe"
    first, *lines = (written / "fimprobe.jsonl").read_text().splitlines()
    assert json.loads(first)["run"]["first_step"] == 0
    assert [json.loads(line)["step"] for line in lines] == list(range(6))
    assert list(written.glob("events*"))


def test_a_resumed_training_goes_on_counting(tmp_path):
    def fit(epochs, **resume):
        pl.seed_everything(3, verbose=False)
        net, callback = Net(), FimProbeCallback(**{**OUTPUT_OPTIONS, "schedule": {"every": 3}})
        net.model[2] = nn.Identity()  # Lightning does not restore the random streams of dropout
        path = tmp_path / "last.ckpt"
        its = trainer(tmp_path, callback, max_epochs=epochs)
        its.fit(net, loader(), weights_only=False, **resume)
        its.save_checkpoint(path)
        return path, [numbers(r) for r in callback.probe.history]

    _, whole = fit(2)
    path, first = fit(1)
    _, second = fit(2, ckpt_path=path)
    assert [step for step, _ in first] == [0, 3] and [step for step, _ in second] == [6]
    assert first + second == whole


def test_a_forward_that_is_not_called_is_told(tmp_path, caplog):
    callback = FimProbeCallback(**{**OUTPUT_OPTIONS, "on_error": "warn"})
    trainer(tmp_path, callback).fit(Net(by="model"), loader())
    told = [r.getMessage() for r in caplog.records if r.name == "fimprobe"]
    assert len(told) == 1 and not callback.probe.history and callback.probe.detached
    assert "training_step of Net does not call its own forward, self(...)" in told[0]
    assert told[0].endswith("it calls self.model: pass FimProbeCallback(module='model')")
    with pytest.raises(FimprobeError, match="module='model'"):
        trainer(tmp_path, FimProbeCallback(**OUTPUT_OPTIONS)).fit(Net(by="model"), loader())


def test_a_compiled_sub_module_is_measured_a_compiled_training_step_is_told(tmp_path):
    class Bare(Net):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def on_before_optimizer_step(self, optimizer):
            pass

    net = Bare()
    net.model = torch.compile(net.model, backend="eager")
    callback = FimProbeCallback(module="model", **OUTPUT_OPTIONS)
    trainer(tmp_path, callback).fit(net, loader())
    assert len(callback.probe.history) == 4
    with pytest.raises(FimprobeError, match="training_step of Bare is compiled"):
        whole = torch.compile(Bare(), backend="eager")
        trainer(tmp_path, FimProbeCallback(**OUTPUT_OPTIONS)).fit(whole, loader())


def test_mistakes_are_told_before_training(tmp_path):
    with pytest.raises(FimprobeError, match="Did you mean 'schedule'"):
        FimProbeCallback(schedul={"every": 1})
    with pytest.raises(
        FimprobeError, match="module must name a sub-module of Net, got 'net'. Pass one of: 'model'"
    ):
        trainer(tmp_path, FimProbeCallback(module="net", **OUTPUT_OPTIONS)).fit(Net(), loader())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_detaches(tmp_path, error):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise error("stop")
            return super().training_step(batch, batch_idx)

    net, callback = Fails(), FimProbeCallback(**OUTPUT_OPTIONS)
    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        trainer(tmp_path, callback).fit(net, loader())
    assert callback.probe.detached and len(callback.probe.history) == 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Gan(pl.LightningModule):
    """Manual optimization: the discriminator's step on generated, then on real data."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(2, 4), nn.Linear(4, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        (real, _), (first, second) = batch, self.optimizers()
        fake = self.generator(torch.randn(len(real), 2))
        self.toggle_optimizer(first)
        loss = F.binary_cross_entropy_with_logits(self.discriminator(fake), torch.ones(len(real), 1))
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        second.zero_grad()
        for x, is_real in ((fake.detach(), 0.0), (real, 1.0)):
            y = torch.full((len(real), 1), is_real)
            self.manual_backward(F.binary_cross_entropy_with_logits(self.discriminator(x), y))
        self.seen.append((batch_idx, real, copy.deepcopy(self.discriminator)))
        second.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(m.parameters(), 0.1) for m in (self.generator, self.discriminator)]


def test_of_several_optimizers_those_of_the_module_count(tmp_path, caplog):
    caplog.set_level("INFO", "fimprobe")
    net = Gan()
    callback = FimProbeCallback(module="discriminator", likelihood="bernoulli", **OUTPUT_OPTIONS)
    trainer(tmp_path, callback).fit(net, loader())
    assert [r.step for r in callback.probe.history] == [0, 1, 2, 3]
    for report, (step, x, model) in zip(callback.probe.history, net.seen, strict=True):
        want = fimprobe.measure(
            model, x, likelihood="bernoulli", estimators=("i1",), bounds=False,
            seed=1_000_003 * step, step=step,
        )  # fmt: skip
        assert numbers(report) == numbers(want)
    assert any("2 optimizers; steps are counted for those" in r.getMessage() for r in caplog.records)


def test_where_files_go_and_what_loggers_get(tmp_path, monkeypatch):
    def fit(**options):
        log = options.pop("log", False)
        callback = FimProbeCallback(likelihood="categorical", log=log, **EVERY)
        trainer(tmp_path, callback, **options).fit(Net(), loader(6))
        return callback.probe

    board = pl.loggers.TensorBoardLogger(tmp_path / "board")
    assert fit(logger=board).log_dir == tmp_path / "board/lightning_logs/version_0/fimprobe"
    assert fit().log_dir.parent == tmp_path / "fimprobe"
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert fit(fast_dev_run=True).log_dir is None and sorted(tmp_path.rglob("*")) == before
    probe = fit(logger=pl.loggers.CSVLogger(tmp_path / "csv"), log=True)
    names, row = (tmp_path / "csv/lightning_logs/version_0/metrics.csv").read_text().splitlines()
    logged = dict(zip(names.split(","), row.split(","), strict=True))
    i1 = probe.last.total.i1
    wanted = {
        "trace": i1.trace,
        "rel_error": i1.rel_error,
        "one_label_error": probe.last.error_of("i1"),
        "label_variance": i1.label_variance,
    }
    assert {k for k in logged if k.startswith("fim/")} == {f"fim/i1/{name}" for name in wanted}
    for name, value in wanted.items():
        assert float(logged[f"fim/i1/{name}"]) == pytest.approx(value), name
    assert logged["step"] == "0"


def test_loggers_get_what_is_known_only(tmp_path):
    """Of both estimators; from four inputs no error is known, by labels of a sure model nothing."""

    class Sure(Net):
        def __init__(self, bias):
            super().__init__()
            with torch.no_grad():
                self.model[3].bias[0] += bias

    def fit(name, bias=0.0, size=12, **options):
        callback = FimProbeCallback(
            log=True, **{**OUTPUT_OPTIONS, "estimators": ["i1", "i2"], **options}
        )
        logger = pl.loggers.CSVLogger(tmp_path / name)
        trainer(tmp_path, callback, logger=logger).fit(Sure(bias), loader(size, size))
        path = tmp_path / name / "lightning_logs/version_0/metrics.csv"
        names, row = path.read_text().splitlines() if path.exists() else ("", "")
        logged = dict(zip(names.split(","), row.split(","), strict=True))
        return callback.probe.last, {k: float(v) for k, v in logged.items() if k.startswith("fim/")}

    report, logged = fit("known")
    for kind in ("i1", "i2"):
        estimate = getattr(report.total, kind)
        assert estimate.rel_error == pytest.approx(logged[f"fim/{kind}/rel_error"])
        assert estimate.trace == pytest.approx(logged[f"fim/{kind}/trace"])
        assert report.error_of(kind) == pytest.approx(logged[f"fim/{kind}/one_label_error"])
    few, logged = fit("few", size=4)
    assert few.batch_size == 4 and few.total.i1.rel_error is None
    assert {"fim/i1/trace", "fim/i2/trace"} <= set(logged)
    assert not any(name.endswith("error") for name in logged)
    options = {"label_sampling": "model", "likelihood": "categorical"}
    blind, logged = fit("blind", bias=20.0, **options)
    assert blind.total.i1.trace is None and "carry" in blind.total.i1.unknown["trace"]
    assert logged == {}


def test_a_wrapper_that_passes_training_step_through_forward(tmp_path):
    """DDP: the module's hooks see (batch, batch_idx) too."""
    try:
        net, callback = Net(), FimProbeCallback(**OUTPUT_OPTIONS)
        trainer(tmp_path, callback, strategy="ddp", devices=1).fit(net, loader())
        assert callback.probe.likelihood.name == "categorical"
        assert [numbers(r) for r in callback.probe.history] == [
            numbers(expected(s)) for s in net.seen
        ][-len(callback.probe.history) :]
        assert len(callback.probe.history) == 4
        with pytest.raises(FimprobeError, match="module='model'"):
            trainer(tmp_path, FimProbeCallback(**OUTPUT_OPTIONS), strategy="ddp", devices=1).fit(
                Net(by="model"), loader()
            )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_no_error_of_the_callback_reaches_the_training():
    outcome = callbacks.lightning([RuntimeError])
    assert outcome.injected == outcome.survived == outcome.told_once > 10, outcome.problems
