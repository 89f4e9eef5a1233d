"""Fallback calls evaluated once for all their parameters, in place of once for each."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from fimprobe.engines.tracing.chunk import Chunk
from fimprobe.engines.tracing.tape import FallbackCall

_BYTES_PER_ENTRY = 8


class SharedEvaluations:
    """Results of evaluations that wait for the turn of their parameter.

    The parameters take turns, and each asks for the same evaluations of its call. The first one
    evaluates for as many of the parameters after it as fit into memory; each result is handed out
    once.
    """

    def __init__(self, chunk: Chunk, kinds: int) -> None:
        """Prepare for one chunk.

        Args:
            chunk: The recorded forward pass.
            kinds: Number of evaluations of a call whose results are alive together.
        """
        self._names = {id(a.call): list(a.parameters) for a in chunk.fallbacks}
        self._parameters = {id(a.call): a.parameters for a in chunk.fallbacks}
        self._chunk_size = chunk.size
        self._entries = chunk.workspace_bytes / (_BYTES_PER_ENTRY * kinds * chunk.size)
        self._waiting: dict[Hashable, tuple[Any, dict[str, Tensor]]] = {}

    def get(
        self,
        call: FallbackCall,
        local_name: str,
        samples: slice,
        question: tuple[Any, ...],
        evaluate: Callable[[list[str]], dict[str, Tensor]],
    ) -> Tensor:
        """Return the result for one parameter.

        Args:
            call: The call.
            local_name: The parameter's name inside the module.
            samples: The samples.
            question: The objects that determine the result, compared by identity.
            evaluate: Maps names of parameters of the call to their results.
        """
        key = (id(call), samples.start, samples.stop, *map(id, question))
        waiting = self._waiting.get(key)
        if waiting is not None and local_name in waiting[1]:
            return waiting[1].pop(local_name)
        results = evaluate(self._group(call, local_name, samples))
        result = results.pop(local_name)
        # the objects are kept: an identity is unique only while its object exists
        self._waiting[key] = (question, results)
        return result

    def clear(self) -> None:
        """Forget what nobody asked for."""
        self._waiting.clear()

    def _group(self, call: FallbackCall, local_name: str, samples: slice) -> list[str]:
        """The parameter and those after it whose results fit into memory together."""
        if samples.stop - samples.start < self._chunk_size:
            return [local_name]  # a large parameter, whose samples are cut as no other's
        names = self._names[id(call)]
        names = names[names.index(local_name) :]
        total = 0
        group: list[str] = []
        for name in names:
            total += self._parameters[id(call)][name].numel()
            if group and total > self._entries:
                break
            group.append(name)
        return group
