"""Functions with a backward pass of their own, on JAX."""

import jax

from keras_moe.backend.base import is_any_derivative, refuse_second_derivative


def differentiable(forward, backward, inputs, context):
    """See `Backend.differentiable`."""
    if is_any_derivative():
        return forward(inputs, context, save=False)[0]

    # The context is an argument: the rules may run in another trace than this one.
    @jax.custom_vjp
    def function(inputs, context):
        return forward(inputs, context, save=False)[0]

    def run_forward(inputs, context):
        output, saved = forward(inputs, context, save=True)
        return _once(output), (inputs, context, saved)

    def run_backward(residuals, upstream):
        return _once(backward(*residuals, upstream)), None

    function.defvjp(run_forward, run_backward)
    return function(inputs, context)


@jax.custom_jvp
def _once(values):
    """Return values whose derivative is an error: loops have none, nor rows past the groups."""
    return values


_once.defjvp(refuse_second_derivative)
