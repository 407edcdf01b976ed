"""What optax's wrappers do to a method that needs the loss closure, wrapper by wrapper.

A wrapper either leaves the method's path as it is ("same"; one of several mini-steps, if their batches are equal,
and else it learns), changes it in its own way but still learns ("learns"), or fails with an error that the table names.
Known costs stand in the comments.
"""

import dataclasses
from collections.abc import Callable

import jax
import optax

from tests.cases import Case


@dataclasses.dataclass(frozen=True)
class Wrapper:
    name: str
    wrap: Callable[[Case], optax.GradientTransformationExtraArgs | optax.MultiSteps]
    holds: str = "same"
    mini_steps: int = 1
    error: type[Exception] | None = None
    message: str = ""


def labels(params):
    return jax.tree.map(lambda _: "all", params)


def everywhere(params):
    return jax.tree.map(lambda _: True, params)


def always(step, **_):
    return step >= 0


def inject(case):
    return optax.inject_hyperparams(case.factory, static_args=case.static)(**case.options)


WRAPPERS = [
    Wrapper("chain", lambda case: optax.chain(optax.identity(), case.make())),
    Wrapper("named_chain", lambda case: optax.named_chain(("method", case.make()))),
    # masked and partition: with leaves left out, the closure of all parameters fails; use optcurv.masked.
    Wrapper("masked", lambda case: optax.masked(case.make(), everywhere)),
    Wrapper("partition", lambda case: optax.partition({"all": case.make()}, labels)),
    Wrapper("multi_transform", lambda case: optax.multi_transform({"all": case.make()}, labels)),
    Wrapper("inject_hyperparams", inject),
    # A lax.cond around the method: convolutions inside are slow on CPU, and the gradient is not shared with the caller.
    Wrapper("apply_if_finite", lambda case: optax.apply_if_finite(case.make(), 5)),
    Wrapper("conditionally_transform", lambda case: optax.conditionally_transform(case.make(), always)),
    # The inner update runs, and pays for its products, on every mini-step, and sees the mini-batch's closure.
    Wrapper("MultiSteps", lambda case: optax.MultiSteps(case.make(), 2), mini_steps=2),
    Wrapper("schedule_free", lambda case: optax.contrib.schedule_free(case.make(), 0.5), holds="learns"),
    Wrapper("mechanize", lambda case: optax.contrib.mechanize(case.make()), holds="learns"),
    # The extra arguments are dropped on the way; our error says so.
    Wrapper(
        "chain-around-MultiSteps",
        lambda case: optax.chain(optax.MultiSteps(case.make(), 2).gradient_transformation()),
        error=TypeError,
        message="needs the extra argument value_fn",
    ),
    Wrapper(
        "sam",
        lambda case: optax.contrib.sam(case.make(), optax.sgd(0.1)),
        error=TypeError,
        message="unexpected keyword",
    ),
    # The method sees one flat vector; `grad` and what the closure wants are trees. The check of the arguments says so,
    # also for a method that calls no closure.
    Wrapper("flatten", lambda case: optax.flatten(case.make()), error=ValueError, message="unpack|structure"),
]
