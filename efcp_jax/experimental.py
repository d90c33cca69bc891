"""What a later JAX may move or lack: the one file that reaches for it.

Pallas, in which kernels for TPUs are written, and the operation that stops the
partitioner are not promised to stay. What is missing, whole or by a name, is replaced
by what every JAX has, slower but with the same numbers, and one warning says so.
"""

from collections.abc import Callable
import operator
from typing import Any
import warnings

import jax


# Every name of Pallas that is used, of modules that are None where one is missing.
_PALLAS = (
    *("BlockSpec", "ds", "multiple_of", "num_programs", "pallas_call"),
    *("program_id", "when"),
)
_PALLAS_TPU = ("CompilerParams", "HBM", "SMEM", "VMEM", "with_memory_space_constraint")


def _pallas() -> Any:
    from jax.experimental import pallas

    operator.attrgetter(*_PALLAS)(pallas)
    return pallas


def _tpu() -> Any:
    from jax.experimental.pallas import tpu

    operator.attrgetter(*_PALLAS_TPU)(tpu)
    return tpu


def _barrier() -> Callable[[Any], Any]:
    """Return an identity that shardings do not spread through."""
    from jax.extend.core import Primitive
    from jax.extend.mlir.dialects import sdy
    from jax.interpreters import ad, batching, mlir

    operation = sdy.PropagationBarrierOp

    def lower(context: Any, value: Any) -> list[Any]:
        del context
        if not getattr(jax.config, "jax_use_shardy_partitioner", True):
            return [value]
        # 0 is `sdy.PropagationDirection.NONE`, which has no name in Python.
        return [operation(value, 0).result]

    barrier = Primitive("efcp_jax_barrier")
    barrier.def_impl(lambda value: value)
    barrier.def_abstract_eval(lambda value: value)
    ad.deflinear2(barrier, lambda cotangent, _: [cotangent])
    batching.defvectorized(barrier)
    mlir.register_lowering(barrier, lower)
    return barrier.bind


def _or(otherwise: Any, make: Callable[[], Any], loss: str) -> Any:
    """Return what `make` returns, or `otherwise` and a warning of the `loss`."""
    try:
        return make()
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"JAX {jax.__version__} lacks a part that efcp_jax uses where there is one"
            f" ({error}). Without it {loss}. Results are the same.",
            stacklevel=2,
        )
        return otherwise


_SLOWER = "TPUs make a step in more passes, all by XLA"

pl = _or(None, _pallas, _SLOWER)
pltpu = pl and _or(None, _tpu, _SLOWER)
propagation_barrier = _or(
    lambda value: value,
    _barrier,
    "parameters on Auto mesh axes may be moved by the partitioner: pass `sharding`",
)
