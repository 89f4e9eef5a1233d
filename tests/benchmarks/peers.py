"""Other libraries' ways to a Fisher or Gauss-Newton diagonal, as their documentation has them.

Each maker gets a problem of its own (models are rewritten by some) and imports its package itself:
one that is not installed, or cannot, is a row that says so. Nothing is corrected: what a peer gets
wrong, and its scale, is found by ``truth.judge``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from problems import Problem, loss_of, sample_labels
from rows import Contender, Diagonal, Row
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel


def contender(
    run: Callable[[], Any],
    read: Callable[[Any], Diagonal],
    forget: Callable[[], Any] = lambda: None,
) -> Contender:
    return Contender(run, lambda: read(run()), forget)


def by_parameter(model: nn.Module, read: Callable[[str, nn.Module], dict[str, Tensor]]) -> Diagonal:
    """What a peer keeps by module, by parameter; what tied modules hold is summed."""
    names = {id(p): n for n, p in model.named_parameters()}
    found: Diagonal = {}
    for path, module in model.named_modules():
        for local, value in read(path, module).items():
            name = names[id(module._parameters[local])]
            found[name] = found.get(name, 0) + value.reshape(module._parameters[local].shape)
    return found


def by_order(model: nn.Module, flat: Tensor) -> Diagonal:
    """A flat vector in the order of ``parameters()``."""
    parameters = dict(model.named_parameters())
    parts = flat.split([p.numel() for p in parameters.values()])
    return {n: d.view(p.shape) for (n, p), d in zip(parameters.items(), parts, strict=True)}


class ClassesSecond(nn.Module):
    """[B, C] as it is, [B, T, C] as [B, C, T]: torch's cross-entropy takes the classes there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).movedim(-1, 1)


def asdl(kind: str, draws: int = 1) -> Callable[[Problem], Contender]:
    def make(problem: Problem) -> Contender:
        from asdl.fisher import FisherConfig, get_fisher_maker

        model = problem.model
        config = FisherConfig(
            fisher_type=kind,
            fisher_shapes=["diag"],
            loss_type="cross_entropy",
            n_mc_samples=draws,
            data_size=1,
            ignore_index=-100,
        )

        def run() -> None:
            maker = get_fisher_maker(model, config)
            maker.setup_model_call(model, problem.x)
            maker.forward_and_backward()

        def held(path: str, module: nn.Module) -> dict[str, Tensor]:
            diag = getattr(getattr(module, "fisher", None), "diag", None)
            found = {n: getattr(diag, n, None) for n in ("weight", "bias")}
            return {n: d for n, d in found.items() if d is not None}

        def forget() -> None:
            for module in model.modules():
                module.__dict__.pop("fisher", None)

        return contender(run, lambda _: by_parameter(model, held), forget)

    return make


def nngeometry(draws: int | None) -> Callable[[Problem], Contender]:
    def make(problem: Problem) -> Contender:
        from nngeometry.layercollection import LayerCollection
        from nngeometry.metrics import FIM, FIM_MonteCarlo
        from nngeometry.object import PMatDiag
        from torch.utils.data import DataLoader, TensorDataset

        model, x = problem.model, problem.x
        layers = LayerCollection.from_model(model, ignore_unsupported_layers=True)
        options: dict[str, Any] = {"device": "cpu", "layer_collection": layers}
        if problem.x.is_floating_point():
            options |= {"variant": "classif_logits", "function": lambda *d: model(d[0])}
        else:  # it differentiates by its inputs: embedded tokens, and a map of one column
            embed, places = model.lm.get_input_embeddings(), torch.arange(x.shape[1]).expand_as(x)
            options |= {"variant": "segmentation_logits"}

            def logits(*batch: Tensor) -> Tensor:
                h = model.lm(inputs_embeds=batch[0], position_ids=places).logits
                return h.movedim(-1, 1).unsqueeze(-1)

            options |= {"function": logits}
            x = embed(x).detach()
        loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=len(x))

        def run() -> Any:
            if draws is None:
                return FIM(model, loader, PMatDiag, **options)
            return FIM_MonteCarlo(model, loader, PMatDiag, trials=draws, **options)

        def read(matrix: Any) -> Diagonal:
            flat = matrix.get_diag()

            def held(path: str, module: nn.Module) -> dict[str, Tensor]:
                start, found = layers.p_pos.get(path), {}
                if start is not None:
                    for local, p in module._parameters.items():
                        if p is not None:
                            found[local] = flat[start : start + p.numel()]
                            start += p.numel()
                return found

            return by_parameter(model, held)

        return contender(run, read)

    return make


def backpack(extension: str, field: str, **options: Any) -> Callable[[Problem], Contender]:
    def make(problem: Problem) -> Contender:
        from backpack import backpack, extend, extensions

        model = extend(problem.model)
        outputs = ClassesSecond(model)  # first order only needs the layers to be extended
        loss_layer = extend(nn.CrossEntropyLoss(reduction="sum"))

        def forget() -> None:
            model.zero_grad(set_to_none=True)
            for p in model.parameters():
                p.__dict__.pop(field, None)

        def run() -> None:
            forget()
            h = outputs(problem.x)
            labels = sample_labels(h.movedim(1, -1))
            with backpack(getattr(extensions, extension)(**options)):
                loss_layer(h, labels).backward()

        def read(_: None) -> Diagonal:
            held = {n: getattr(p, field, None) for n, p in model.named_parameters()}
            total = field == "diag_h_batch"  # one for each sample
            return {n: d.sum(0) if total else d.clone() for n, d in held.items() if d is not None}

        return contender(run, read, forget)

    return make


def kronfluence(problem: Problem) -> Contender:
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader
    from kronfluence.task import Task
    from kronfluence.utils.state import State
    from torch.utils.data import DataLoader, TensorDataset

    class Labels(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            h = model(batch[0])
            return loss_of(h, sample_labels(h))

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            raise NotImplementedError

    x = problem.x
    names = {id(p): n for n, p in problem.model.named_parameters()}
    names = {n: names[id(p)] for n, p in problem.model.named_parameters(remove_duplicate=False)}
    shapes = {n: p.shape for n, p in problem.model.named_parameters()}
    loader = DataLoader(TensorDataset(x), batch_size=len(x))
    task, state = Labels(), State(cpu=True)
    model = prepare_model(problem.model, task)
    arguments = FactorArguments(strategy="diagonal", has_shared_parameters=False)

    def run() -> Any:
        return fit_lambda_matrices_with_loader(
            model, state, task, loader, arguments, disable_tqdm=True
        )[1]["lambda_matrix"]

    def read(factors: dict[str, Tensor]) -> Diagonal:
        found = {}
        for path, table in factors.items():
            weight, bias = names[f"{path}.weight"], f"{path}.bias"
            if bias in names:
                found[bias], table = table[:, -1], table[:, :-1]
            found[weight] = table.reshape(shapes[weight])
        return found

    return contender(run, read)


def curvlinops(operator: str) -> Callable[[Problem], Contender]:
    def make(problem: Problem) -> Contender:
        import curvlinops as package

        model, x = problem.model, problem.x
        with torch.no_grad():
            labels = sample_labels(model(x))
        parameters, outputs = list(model.parameters()), ClassesSecond(model)

        def run() -> Tensor:
            seed = {"seed": int(torch.randint(2**31, ()))} if "MC" in operator else {}
            matrix = getattr(package, operator)(
                outputs,
                nn.CrossEntropyLoss(reduction="sum"),
                parameters,
                [(x, labels)],
                check_deterministic=False,
                **seed,
            )
            with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivative
                return package.hutchinson_diag(matrix, 1)

        return contender(run, lambda flat: by_order(model, flat))

    return make


def laplace(backend: str, **options: Any) -> Callable[[Problem], Contender]:
    def make(problem: Problem) -> Contender:
        import laplace.curvature as package

        model, x = problem.model, problem.x
        with torch.no_grad():
            h = model(x)
        if backend == "CurvlinopsGGN":
            size = 4 * h.numel() * problem.parameters  # dense Jacobians
            if size > 2**31:
                raise MemoryError(f"dense Jacobians of {size / 2**30:.1f} GB")
        labels = sample_labels(h)
        model.output_size = h.shape[-1]
        interface = getattr(package, backend)(model, "classification", **options)
        run = functools.partial(interface.diag, x, labels, N=len(x))
        return contender(run, lambda found: by_order(model, found[1]))

    return make


def vmap_grad(problem: Problem) -> Contender:
    model, x = problem.model, problem.x

    def loss(parameters: dict[str, Tensor], one: Tensor, y: Tensor) -> Tensor:
        return loss_of(functional_call(model, parameters, (one[None],)), y[None])

    def run() -> Diagonal:
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        with torch.no_grad():
            y = sample_labels(model(x))
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
        return {n: g.square_().sum(0) for n, g in gradients.items()}

    return contender(run, lambda found: found)


def batch_summed(problem: Problem) -> Contender:
    """Sun 2026: one backward of Σ_b ⟨L_b ξ_b, h_b⟩, squared; L = diag √p − p √pᵀ, ξ signs."""
    model, x = problem.model, problem.x
    parameters = dict(model.named_parameters())

    def run() -> Diagonal:
        h = model(x)
        p = h.detach().softmax(-1)
        root = p.sqrt() * torch.randint_like(p, 2).mul_(2).sub_(1)
        seed = root - p * root.sum(-1, keepdim=True)
        found = torch.autograd.grad(h, list(parameters.values()), seed)
        return {n: g.square_() for n, g in zip(parameters, found, strict=True)}

    return contender(run, lambda found: found)


PEERS = [
    Row("ASDL `fisher_mc`, 1 draw", asdl("fisher_mc"), "asdfghjkl"),
    Row("ASDL `fisher_mc`, 2 draws", asdl("fisher_mc", 2), "asdfghjkl"),
    Row("ASDL `fisher_exact`", asdl("fisher_exact"), "asdfghjkl", exact=True),
    Row("nngeometry `FIM_MonteCarlo`, 1 draw", nngeometry(1), "nngeometry", mean=True),
    Row("nngeometry `FIM_MonteCarlo`, 2 draws", nngeometry(2), "nngeometry", mean=True),
    Row("nngeometry `FIM` (exact)", nngeometry(None), "nngeometry", exact=True, mean=True),
    Row(
        "BackPACK `SumGradSquared`",
        backpack("SumGradSquared", "sum_grad_squared"),
        "backpack-for-pytorch",
    ),
    Row(
        "BackPACK `DiagGGNMC`, 1 draw",
        backpack("DiagGGNMC", "diag_ggn_mc", mc_samples=1),
        "backpack-for-pytorch",
    ),
    Row(
        "BackPACK `DiagGGNExact`",
        backpack("DiagGGNExact", "diag_ggn_exact"),
        "backpack-for-pytorch",
        exact=True,
    ),
    Row(
        "BackPACK `BatchDiagHessian` (Î₂)",
        backpack("BatchDiagHessian", "diag_h_batch"),
        "backpack-for-pytorch",
    ),
    Row("kronfluence, strategy `diagonal`", kronfluence, "kronfluence"),
    Row(
        "curvlinops `hutchinson_diag` of the GGN, 1 probe",
        curvlinops("GGNLinearOperator"),
        "curvlinops-for-pytorch",
    ),
    Row(
        "curvlinops `hutchinson_diag` of `FisherMC`, 1 probe",
        curvlinops("FisherMCLinearOperator"),
        "curvlinops-for-pytorch",
    ),
    Row(
        "Laplace `BackPackGGN`, stochastic",
        laplace("BackPackGGN", stochastic=True),
        "laplace-torch",
    ),
    Row("Laplace `AsdlGGN`, stochastic", laplace("AsdlGGN", stochastic=True), "laplace-torch"),
    Row(
        "Laplace `CurvlinopsGGN` (its default)", laplace("CurvlinopsGGN"), "laplace-torch", exact=True
    ),
    Row("`torch.func` `vmap(grad)`", vmap_grad, "torch"),
    Row("one batch-summed backward (Hutchinson)", batch_summed, "torch"),
]
