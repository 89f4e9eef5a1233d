"""Libraries that square per-sample gradients layer by layer: ASDL, nngeometry, BackPACK, kronfluence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from problems import Problem, loss_of, sample_labels
from readers import ClassesSecond, by_parameter, contender
from rows import Contender, Diagonal
from torch import Tensor, nn


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
