"""How much a program multiplies: FLOPs of the products in its jaxpr, loops and recomputation counted as they run."""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def count(traced: ClosedJaxpr | Jaxpr, *, weights: bool = True, seen: float = 1.0) -> float:
    """FLOPs of all devices together: 2 for each multiplication with addition of a product or a convolution.

    Args:
      weights: whether products with one matrix for all rows count, or only those of rows with each other: attention.
      seen: the share of their blocks that attention kernels work on (`nn.splash.seen`), the rest being masked.

    What else a program computes is not counted, as in published figures, nor what nobody reads; of a branch the larger side is.
    A loop that does not say how often it runs counts once.
    """
    jaxpr: Any = traced.jaxpr if isinstance(traced, ClosedJaxpr) else traced
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return sum(_of(equation, weights, seen) for equation in used.eqns)


def _of(equation: Any, weights: bool, seen: float) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        if not weights and not batch:
            return 0.0
        depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    if name in ("ragged_dot", "ragged_dot_general"):
        if not weights:
            return 0.0
        # Each row meets the matrix of its own group; the kernels' gradient has the groups in front.
        return 2.0 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1]
    if name == "conv_general_dilated":
        kernel, dims = equation.invars[1].aval.shape, params["dimension_numbers"]
        per_output = math.prod(kernel) / kernel[dims.rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output
    inner = [sub for value in params.values() for sub in _jaxprs(value)]
    if name == "cond":
        return max((count(sub, weights=weights, seen=seen) for sub in inner), default=0.0)
    times = 1.0
    if name == "scan":
        times = params["length"]
    elif name == "pallas_call":
        # Attention, none of whose products is with weights.
        weights, times = True, seen * math.prod(params["grid_mapping"].grid)
    elif name == "shard_map":
        # Inside, shapes are one device's.
        mesh = params["mesh"]
        manual = params.get("manual_axes", mesh.axis_names)
        times = math.prod(mesh.shape[axis] for axis in manual)
    return times * sum(count(sub, weights=weights, seen=seen) for sub in inner)


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, ClosedJaxpr | Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [sub for each in value for sub in _jaxprs(each)]
    return []
