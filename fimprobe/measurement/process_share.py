"""One process's share of a measurement: checked, compared with the other processes, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.config.config import Config, load_config
from fimprobe.distributed.processes import MeasuredShare, ProcessGroup
from fimprobe.engines.autograd.curvature_verification import check_curvature
from fimprobe.engines.autograd.sample_checks import measure_and_check, samples_to_check
from fimprobe.engines.autograd.verification import (
    make_verified_plan,
)
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import BatchError, CoupledSamplesError, FimprobeError
from fimprobe.jacobian_bounds.layer_bounds import bound_layer_jacobians
from fimprobe.likelihoods import Joint, get_likelihood
from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.draws import Draws
from fimprobe.measurement.arguments import (
    check_backpack,
    check_labels,
    check_mask_and_output,
    check_model,
    choose_draws,
    make_request,
)
from fimprobe.measurement.failures import explain_failure, name_errors_of_output
from fimprobe.measurement.gradient_groups import sum_by_groups
from fimprobe.measurement.heads import bind_heads
from fimprobe.measurement.isolation import isolated_autograd
from fimprobe.measurement.kept_plans import kept_plan
from fimprobe.measurement.process_summary import (
    ProcessSummary,
    check_models_agree,
    float_buffers,
    summarize,
)
from fimprobe.measurement.second_order_cost import announce_second_order
from fimprobe.measurement.second_order_engine import (
    PROBES,
    choose_engine,
    describe_engine,
    note_of_failure,
    without_double_backward,
)
from fimprobe.measurement.tensor_checks import check_dense, check_inputs, check_readable
from fimprobe.model.batch import Batch
from fimprobe.model.fsdp.placement import check_sharded, is_sharded
from fimprobe.model.fsdp.sharded_twin import make_sharded_twin
from fimprobe.model.fsdp.shards import Shards
from fimprobe.model.input_roles import make_twin_for_batch
from fimprobe.model.outputs import JoinedOutputs, selector_for
from fimprobe.model.randomness import private_streams
from fimprobe.model.twin import unwrap
from fimprobe.statistics import Measured
from fimprobe.training.likelihood_inference.model_family import infer_family
from fimprobe.training.likelihood_inference.transformers_heads import label_mask

_RANK_STREAM = 15_485_863
"""Step between the seeds of processes with different inputs: a prime, unlike any user's step."""


@dataclass(kw_only=True)
class ProcessShare:
    """The share of one process: :meth:`check`, then :meth:`compare`, then :meth:`measure`.

    Attributes:
        options: Those of :func:`fimprobe.measure` that are fields of ``Config``, not yet checked.
        labels: Labels of the data [B, ...] for the empirical Fisher.
        mask: Boolean, of the labels' shape; False leaves a position out.
        output: From what the model returns to the outputs [B, ...].
        diagonals: Whether diagonals are kept.
        processes: The group that measures together.
        plan: How parameters are reached; verified by the first measurement with it.
    """

    model: nn.Module
    inputs: Any
    options: Mapping[str, Any]
    labels: Tensor | None
    mask: Tensor | None
    output: Callable[[Any], Tensor] | None
    diagonals: bool
    processes: ProcessGroup
    plan: Plan = field(init=False)
    likelihood: Likelihood = field(init=False)
    request: Request = field(init=False)
    _decision: str = field(init=False, default="")
    _config: Config = field(init=False)
    _batch: Batch = field(init=False)
    _draws: Draws = field(init=False)
    _chooses_draws: bool = field(init=False)
    _buffers: Mapping[str, Tensor] = field(init=False)

    def check(self) -> ProcessSummary:
        """Check all arguments; return what the other processes need to know.

        Raises:
            FimprobeError: With the argument, its value and a remedy.
            BatchError: If the inputs are empty.
        """
        check_model(self.model)
        check_readable(self.model)
        self._config = load_config(None, **self.options)
        self.request = make_request(self._config, self.labels)
        check_mask_and_output(self.mask, self.output)
        if isinstance(self.labels, Tensor):
            check_dense(self.labels, "labels")
        if is_sharded(self.model):
            check_sharded(
                self.model,
                estimators=self._config.estimators,
                bounds=self._config.bounds,
                draws=self._config.draws,
                engine=self._config.engine,
                diagonals=self.diagonals,
                processes=self.processes.size,
            )
        check_inputs(self.inputs)
        self._batch = Batch.of(self.inputs)
        self._set_likelihood()
        if self.processes.size == 1:
            return ProcessSummary(size=self._batch.size)
        return summarize(self.model, self._batch, rank=self.processes.rank)

    def _set_likelihood(self) -> None:
        """Use the given family, or the one that the class of a transformers model implies.

        Raises:
            FimprobeError: If the model implies none.
        """
        if self._config.likelihood != "auto":
            self.likelihood = get_likelihood(self._config.likelihood)
            return
        args, kwargs = self._batch.args, self._batch.kwargs
        self.likelihood, self._decision = infer_family(self.model, args, kwargs)
        if self.mask is None and self.output is None:
            self.mask = label_mask(self.model, args, kwargs)

    def compare(self, summaries: Sequence[ProcessSummary]) -> None:
        """Check that the shares fit together, and place this process's samples among all.

        Args:
            summaries: What :meth:`check` returned in each process.

        Raises:
            FimprobeError: If the models differ.
            BatchError: If the sizes of batches rule a measurement out.
        """
        check_models_agree(summaries)
        sizes = [summary.size for summary in summaries]
        sharded = is_sharded(self.model)
        if sharded and len(set(sizes)) > 1:
            raise BatchError(
                f"the batches of all processes must have one size, got {sizes}: they run a sharded "
                "model (FSDP) in the same steps. Drop the last, smaller batch."
            )
        draws, seed, rank = self._config.draws, self._config.seed, self.processes.rank
        size_biased = self._config.label_sampling == "size_biased"
        count = {"exact": None, "auto": 2}[draws] if isinstance(draws, str) else draws
        if sum(sizes) == 1 and count == 1:
            raise BatchError(
                "a batch of one with draws=1 has no variance to measure; pass draws=2 or more inputs"
            )
        if all(summary.input_shapes == summaries[0].input_shapes for summary in summaries):
            # one stream for the whole batch: the number of processes changes no label
            first = sum(sizes[:rank])
            self._draws = Draws(
                count=count, seed=seed, first=first, total=sum(sizes), size_biased=size_biased
            )
            self._chooses_draws = draws == "auto" and not sharded
        else:
            # other lengths use other amounts of random numbers and other numbers of passes: each
            # process has a stream of its own, and all draw
            self._draws = Draws(count=count, seed=seed + _RANK_STREAM * rank, size_biased=size_biased)
            self._chooses_draws = False
        self._buffers = summaries[0].buffers

    @contextmanager
    def with_plan(self, plan: Plan | None) -> Iterator[None]:
        """Use a plan inside the context: by default the one that is kept for the model.

        Processes that measure together keep none: all verify a plan, or none does.
        """
        if plan is not None or self.processes.size > 1:
            self.plan = plan or Plan()
            yield
            return
        with kept_plan(self.model, self._batch, self.output, self._config.memory_mb) as self.plan:
            yield

    def measure(self) -> MeasuredShare:
        """Return the statistics of this process's samples, and the bounds of each layer.

        Raises:
            FimprobeError: If the model or the labels do not allow the measurement.
            BatchError: If outputs are not finite.
        """
        try:
            return self._measure()
        except CoupledSamplesError:
            # an input that held no sample's data so far may be a table that these samples read
            if self.processes.size > 1 or not self.plan.input_roles.forget_samples():
                raise
            self.plan.verified_samples = self.plan.curvature_verified_samples = 0
            return self._measure()
        except BatchError:
            raise
        except (FimprobeError, NotImplementedError):
            if not (self.request.auto and self.request.exact):
                raise
            self.plan.second_order = PROBES  # this batch is outside of BackPACK's domain
            return self._measure()

    def _measure(self) -> MeasuredShare:
        """The statistics and bounds with the roles that inputs have by now."""
        with isolated_autograd(self.model), ExitStack() as stack:
            problem = self._make_problem(stack)
            check_labels(problem)
            measured = self._measure_moments(problem)
            if self.request.backpack:
                _replace_i1_by_backpack(problem, measured)
            if self.plan.curvature_failure and self.request.double_backward:
                measured.notes.append(note_of_failure(self.plan, problem.request))
            if self._decision:
                measured.notes.append(f"likelihood='auto': {self._decision}.")
            if self.plan.twin is not None:
                measured.notes.extend(self.plan.twin.notes)
            if self.request.labels is not None and self.processes.size == 1:
                names = list(measured.moments["empirical"].parameters)
                measured.gradients = sum_by_groups(problem, self.plan.chunk_size, names)
            describe_engine(measured, problem.request, self.plan)
            bounds = bound_layer_jacobians(problem, problem.batch) if self.request.bounds else {}
            return measured, bounds

    def _measure_moments(self, problem: Problem) -> Measured:
        """Return the statistics of Î₁ and the other estimators.

        Raises:
            FimprobeError: Also in place of torch's errors, where model or outputs explain them.
        """
        try:
            self._verify_plan(problem)
            if self.request.backpack:
                check_backpack(problem, self.plan, second_order=False)
            if self.request.exact:
                check_backpack(problem, self.plan, second_order=True)
            return measure_and_check(problem, self.plan, samples_to_check(problem, self.plan))
        except (FimprobeError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            explained = None if problem.shards is not None else explain_failure(problem)
            if explained is None:
                raise
            raise explained from error

    def _make_problem(self, stack: ExitStack) -> Problem:
        """The question to the engine, about a twin of the model.

        Args:
            stack: Keeps the random numbers of the model in streams of their own.
        """
        output = None if self.output is None else name_errors_of_output(self.output)
        select, named = (selector_for(self.likelihood, o) for o in (self.output, output))
        if isinstance(self.likelihood, Joint):
            select = named = JoinedOutputs(paths=tuple(self.likelihood.families), output=output)
        batch = self._batch.to(next(unwrap(self.model).parameters()).dtype)
        shards = None
        if is_sharded(self.model):
            group = self.processes
            shards = Shards(group.weights_group(), group.rank, group.size)
            twin, batch = make_sharded_twin(self.model, shards), self.plan.input_roles.apply(batch)
        else:
            twin, self.plan.twin, batch = make_twin_for_batch(
                self.model, batch, named, self.plan.twin, self.plan.input_roles
            )
        self.plan.follow_model()
        known = self.plan.twin
        stack.enter_context(
            private_streams(
                self._config.seed,
                # the code of a family of the user's is not known either
                torch_draws=known is None or known.draws_random or not _is_builtin(self.likelihood),
                host_draws=known is not None and known.draws_from_host,
            )
        )
        if self._buffers:
            for name, buffer in float_buffers(twin).items():
                if name in self._buffers:
                    buffer.copy_(self._buffers[name])
        problem = Problem(
            twin=twin,
            batch=batch,
            likelihood=bind_heads(self.likelihood, twin, batch, select, shards),
            draws=self._draws,
            select_outputs=select,
            mask=self.mask,
            memory_mb=self._config.memory_mb,
            diagonals=self.diagonals,
            request=self.request,
            shards=shards,
        )
        if self._chooses_draws:
            problem.draws = replace(self._draws, count=choose_draws(problem))
        return problem

    def _verify_plan(self, problem: Problem) -> None:
        """Verify the plan if it is new, or if it was verified on a single sample only."""
        plan, several = self.plan, problem.batch.size > 1
        if not plan.verified_samples or (plan.verified_samples == 1 and several):
            verified = make_verified_plan(problem)
            verified.keep_settings(plan)
            for f in fields(plan):  # in place: the caller keeps the plan for later measurements
                setattr(plan, f.name, getattr(verified, f.name))
        problem.request = self.request = choose_engine(problem, plan)
        curvature_samples = plan.curvature_verified_samples
        unverified = not curvature_samples or (curvature_samples == 1 and several)
        if self.request.double_backward and unverified and not plan.curvature_failure:
            plan.curvature_failure = announce_second_order(problem, plan)
            if not plan.curvature_failure:
                check_curvature(problem, plan)
        if self.request.double_backward and plan.curvature_failure:
            problem.request = without_double_backward(problem, self.request, plan)


def _is_builtin(likelihood: Likelihood) -> bool:
    return type(likelihood).__module__.startswith("fimprobe.")


def _replace_i1_by_backpack(problem: Problem, measured: Measured) -> None:
    from fimprobe.engines import backpack

    autograd = measured.moments["i1"].parameters
    measured.moments["i1"] = backpack.measure_moments(problem, verified=True)
    for name, moments in measured.moments["i1"].parameters.items():
        # BackPACK computes neither the largest shares of labels nor coincidences of the same draws
        moments.powers[3] = autograd[name].powers[3]
