"""Run by test_fsdp.py in each of two processes: trainings of a sharded model, with and without.

Also reports of a model that is sure of its labels, sharded and under DDP.
"""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

import fimprobe
from fimprobe import FimprobeError
from fimprobe.distributed import processes as ranks
from fimprobe.estimators import reliability
from fimprobe.model.fsdp.shards import Shards

SIZE, STEPS = 12, 3
OPTIONS = {"estimators": ("i1",), "bounds": False, "tensorboard": False}


class Tokens(nn.Module):
    """Uneven shapes, a shared weight, attention, a frozen layer, a parameter smaller than a shard."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(6, 2, 9, dropout=0.1, batch_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.narrow = nn.Linear(6, 1)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)
        h = self.frozen(self.norm(h)).tanh()
        return self.head(h.mean(1)) * (1 + self.narrow(h.mean(1)))


class Sure(Tokens):
    """A label for each position, of which the model's own are always class 0."""

    def forward(self, tokens):
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)
        h = self.frozen(self.norm(h)).tanh()
        sure = torch.zeros(7, dtype=h.dtype)
        sure[0] = 16
        return self.head(h) * (1 + self.narrow(h).tanh() / 2) + sure


class Scaled(nn.Module):
    """Its parameters are under no rule."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, 1).double())

    def forward(self, h):
        return h @ self.scale.exp()


def net():
    torch.manual_seed(0)
    return Tokens().double()


def batch(step, rank=None):
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(7, (2 * SIZE, 4), generator=generator)
    y = torch.randint(7, (2 * SIZE,), generator=generator)
    rows = slice(None) if rank is None else slice(rank * SIZE, (rank + 1) * SIZE)
    return x[rows], y[rows]


def shard(model):
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model.narrow)
    return fully_shard(model)


def whole(model):
    """The weights of a sharded model in a plain one."""
    plain = net()
    state = {
        n: x.full_tensor() if hasattr(x, "full_tensor") else x for n, x in model.state_dict().items()
    }
    plain.load_state_dict(state)
    return plain


def inside(model):
    """What FSDP remembers: a probe must leave it as it was."""
    found = []
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            state = module._get_fsdp_state()
            found.append((state._training_state, len(state._state_ctx.all_states)))
            for group in state._fsdp_param_groups:
                found.append((group._sharded_state, group._training_state))
                found.append((group._post_forward_indices, len(group.comm_ctx.post_forward_order)))
    return str(found)


def train(rank, options):
    model = shard(net())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    probe = None if options is None else fimprobe.attach(model, on_error="raise", **options)
    trace, models = [], []
    for step in range(STEPS):
        torch.manual_seed(100 + step + rank)
        x, y = batch(step, rank)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        models.append(whole(model))
        optimizer.step()
        local = [p.to_local() for p in model.parameters()]
        grads = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
        trace.append([loss.detach(), *[x.clone() for x in (*local, *grads)], torch.get_rng_state()])
        trace.append(inside(model))
    if probe is not None:
        probe.detach()
        assert not any(
            type(h).__module__.startswith("fimprobe")
            for m in model.modules()
            for h in m._forward_hooks.values()
        )
    return trace, models, probe


def same(a, b):
    if isinstance(a, str):
        return a == b
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def values(report):
    """Numbers as they were computed: ``raw`` has none of them withheld."""
    found = {}
    for name, group in [("", report.total), *report.parameters.items()]:
        e = group.i1
        found[name] = [
            e.trace,
            e.norm,
            e.label_variance,
            e.label_variance_error,
            e.input_variance,
            e.total_variance,
            e.std_error,
            e.rel_error,
            e.effective_inputs,
            e.total_label_variance,
            e.total_label_variance_error,
            e.pair_variance.fourth,
            e.pair_variance.square,
            e.pair_variance.norm_square,
            float(group.numel),
        ]
    found["means"] = [report.outputs.fisher_trace, *(x for pair in report.convergence for x in pair)]
    found["how"] = [report.draws, report.label_sampling, report.seen_mass]
    return found


@contextmanager
def raw():
    withhold = reliability.withhold
    reliability.withhold = lambda estimate, **_: estimate
    yield
    reliability.withhold = withhold


def numbers(tree, path=""):
    """All numbers of a report's dictionary but the time it took; of what is unknown the names."""
    if isinstance(tree, dict):
        if path.endswith("/unknown"):
            return {path: sorted(tree)}
        return {k: v for key, x in tree.items() for k, v in numbers(x, f"{path}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, x in enumerate(tree) for k, v in numbers(x, f"{path}/{i}").items()}
    return {path: tree} if path != "/seconds" and not path.startswith("/advice") else {}


def sure(rank):
    """Both processes' reports, and what one process finds in the whole batch; labels from q and p."""
    torch.manual_seed(0)
    state = Sure().double().state_dict()

    def made():
        model = Sure().double()
        model.load_state_dict(state)
        return model

    generator = torch.Generator().manual_seed(3)
    x = torch.randint(7, (2 * SIZE, 4), generator=generator)
    keep = torch.rand(2 * SIZE, 4, generator=generator) > 0.3
    rows = slice(rank * SIZE, (rank + 1) * SIZE)
    found = {"exact": fimprobe.measure(
        made(), x, likelihood="categorical", draws="exact", estimators="i1", bounds=False, mask=keep
    ).total.i1.trace}  # fmt: skip
    for sampling in (None, "model"):
        more = {} if sampling is None else {"label_sampling": sampling}
        for way in ("ddp", "fsdp"):
            probes = {"probes": 2}  # each process draws checks of its own
            lean = OPTIONS if way == "fsdp" else {"tensorboard": False, "second_order": probes}
            model = shard(made()) if way == "fsdp" else DistributedDataParallel(made())
            options = {**lean, **more, "likelihood": "categorical", "on_error": "raise"}
            options["schedule"] = {"every": 1}
            if way == "fsdp":
                options["draws"] = "auto"  # never exact of a sharded model
            with fimprobe.attach(model, mask=lambda a, k: keep[rows], **options) as probe:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                model(x[rows]).square().mean().backward()
                optimizer.step()
                shared = probe.last
            alone = {k: v for k, v in lean.items() if k != "tensorboard"}
            whole = fimprobe.measure(made(), x, likelihood="categorical", mask=keep, **alone, **more)
            found[way, sampling] = [numbers(report.to_dict()) for report in (shared, whole)]
    found["lengths"] = other_lengths(rank, made())
    return found


def other_lengths(rank, model):
    """Texts of 4 tokens on one process, of 3 on the other: what each would find in its own."""
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(7, (SIZE, 4 - r), generator=generator) for r in range(2)]
    options = {"likelihood": "categorical", "estimators": "i1", "bounds": False}
    wrapped = DistributedDataParallel(model)  # a model that nobody holds would end the probe
    with fimprobe.attach(
        wrapped, tensorboard=False, on_error="raise", draws="auto", **options
    ) as probe:
        report = probe.step(texts[rank])
    alone = [fimprobe.measure(model, x, seed=15_485_863 * r, **options) for r, x in enumerate(texts)]
    return report.batch_size, report.draws, report.total.i1.trace, [r.total.i1.trace for r in alone]


def probe_once(model, x):
    """What is told, and whether probing goes on."""
    options = {**OPTIONS, "likelihood": "categorical", "schedule": {"every": 1}}
    probe = fimprobe.attach(model, on_error="raise", **options)
    try:
        probe.step(x)
    except FimprobeError as error:
        return type(error).__name__, str(error)
    finally:
        probe.detach()
    return None


def fails_alone(rank):
    """One process runs out of something in the middle: training goes on in all of them."""

    def train(options):
        model = shard(net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = options and fimprobe.attach(model, **options)
        for step in range(2):
            torch.manual_seed(step)
            x, y = batch(step, rank)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return probe, [p.to_local() for p in model.parameters()]

    _, without = train(None)
    scatter, calls = Shards.scatter, []

    def scattered(self, *args):
        calls.append(None)
        if rank == 1 and len(calls) == 9:
            raise MemoryError("no room")
        return scatter(self, *args)

    Shards.scatter = scattered
    probe, with_probe = train({**OPTIONS, "likelihood": "categorical", "schedule": {"every": 1}})
    Shards.scatter = scatter
    return same(with_probe, without), probe.active, list(probe.history), sorted(probe.errors.warned)


def main(rank, port, out):
    """All checks of one process; what it found goes into a file of the folder ``out``."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    held, most = [], [0]
    gather = Shards.gather

    def gathered(self, name):
        weight = gather(self, name)
        held[:] = [(storage, size) for storage, size in held if not storage.expired()]
        held.append((StorageWeakRef(weight.untyped_storage()), weight.numel()))
        most.append(sum(size for storage, size in held if not storage.expired()))
        return weight

    Shards.gather = gathered
    without, _, _ = train(rank, None)
    for name, options in {
        "auto": {"schedule": {"every": 1}},
        "chunks": {"schedule": {"every": 1}, "draws": 3, "memory_mb": 0.03, "batch": 64},
    }.items():
        with raw():
            with_probe, models, probe = train(rank, {**OPTIONS, **options})
        results[name, "identical"] = all(same(a, b) for a, b in zip(with_probe, without, strict=True))
        results[name, "mine"] = [values(r) for r in probe.history]
        results[name, "coverage"] = probe.coverage
        results[name, "chunk"] = probe._cycle.measurement.plan.chunk_size
        with raw():
            results[name, "want"] = [
                values(
                    fimprobe.measure(
                        model,
                        batch(step)[0],
                        likelihood="categorical",
                        estimators=("i1",),
                        bounds=False,
                        seed=1_000_003 * step,
                        step=step,
                        draws=options.get("draws", 2),
                    )
                )
                for step, model in enumerate(models)
            ]
    results["held"] = max(most), sum(p.numel() for p in net().parameters())
    results["sure"] = sure(rank)
    for name, options in {
        "estimators": {"bounds": False},
        "bounds": {"estimators": ("i1",)},
        "exact": {"estimators": ("i1",), "bounds": False, "draws": "exact"},
    }.items():
        try:
            fimprobe.attach(shard(net()), tensorboard=False, **options)
        except FimprobeError as error:
            results["refused", name] = str(error)
    results["uneven"] = probe_once(shard(net()), batch(0)[0][: 3 + rank])
    odd = net()
    odd.narrow = Scaled()
    results["raw"] = probe_once(shard(odd), batch(0)[0])
    ranks.WEIGHTS_TIMEOUT_SECONDS = 2.0
    results["one fails"] = fails_alone(rank)
    torch.save(results, out / f"{rank}.pt")
    dist.destroy_process_group()
