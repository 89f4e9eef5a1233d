"""Says before second derivatives begin what they will cost, where that is hundreds of passes."""

from __future__ import annotations

from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.plan import Plan
from fimprobe.engines.tracing.replay_cost import estimate_replays
from fimprobe.errors import logger

WORTH_MENTIONING = 200.0
"""Forward and backward passes from which the cost is announced."""

_REMEDY = (
    "Pass second_order='spot_checks' or second_order='off' for less, or replace what has no rule by "
    "layers of torch.nn."
)


def announce_second_order(problem: Problem, plan: Plan) -> str:
    """Log the estimated cost of second derivatives by probes if it is high.

    Args:
        problem: The measurement.
        plan: A verified plan, whose ``second_order_limit`` may rule them out.

    Returns:
        Why they are left out; "" if they are measured.
    """
    request = problem.request
    if request.exact or problem.shards is not None:
        return ""
    cost = estimate_replays(problem, plan)
    limit = plan.second_order_limit
    passes = f"about {max(round(cost.passes, -1), 10):,.0f} forward+backwards"
    why = f"no rule covers parameters of {cost.place}, evaluated again for each probe"
    if limit is not None and cost.passes > limit:
        return (
            f"Î₂ was not measured: it would cost {passes}, more than the time budget allows for one "
            f"report, since {why}. Pass estimators=['i1', 'i2'] to measure it all the same."
        )
    if cost.passes >= WORTH_MENTIONING:
        logger.warning("fimprobe: Î₂ will cost %s: %s. %s", passes, why, _REMEDY)
    return ""
