"""Steps: the arithmetic of one expert, written once for all engines.

A step multiplies by `Products`, which an engine makes from kernels and biases. Between two products
is an elementwise function, such as an activation. The step passes it to the product before it, and
an engine whose kernels can fuse it computes it there.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from keras import ops

from keras_moe.backend import backend


class Products(NamedTuple):
    """Products of rows with the kernels of their experts; kernels go by their number.

    - `multiply(rows, numbers, then)`: `then` of one tensor `rows @ kernel + bias` for each number.
    - `pull(gradient, number, then, *extras)`: `then` of `gradient @ transposed kernel` and of
      the extras, tensors of the same shape.
    - `remakes`: whether the engine's kernels can make the left factor of a kernel's gradient
      themselves, from a `Remade`.

    `then` is elementwise and returns a tuple of tensors; `multiply` and `pull` return that tuple.
    Everything has the dtype of the rows.
    """

    multiply: Callable
    pull: Callable
    remakes: bool = False


class Remade(NamedTuple):
    """Rows that need not exist as a tensor: `function(*inputs)`, elementwise, or the one input."""

    function: Callable | None
    inputs: tuple


class Step(NamedTuple):
    """The arithmetic of the experts on rows that are all their own.

    - `forward(rows, products, keep) -> (output_rows, saved)`: `saved` is a list of tensors of
      rows for the backward pass, empty unless `keep`.
    - `backward(rows, products, saved, output_gradient) -> (row_gradient, factors)`. For each
      kernel, `factors` has the rows that were multiplied by it and the gradient of their product;
      the engine makes the gradients of kernel and bias from them. Where `products.remakes`, these
      rows may be `Remade`.
    - `saved_widths`: the width of each tensor in `saved`.
    - `output_width`: the width of `output_rows`.
    """

    forward: Callable
    backward: Callable
    saved_widths: tuple
    output_width: int


def products_of(project, pull):
    """`Products` from the affine map and its pullback, of rows and the number of a kernel."""

    def multiply(rows, numbers, then):
        return then(*(project(rows, number) for number in numbers))

    def pull_then(gradient, number, then, *extras):
        return then(pull(gradient, number), *extras)

    return Products(multiply, pull_then)


# Equal networks share one step, and so what is compiled for it.
@functools.lru_cache
def step_of(network, widths):
    """The step of a `Network` whose projections have the output `widths`, a tuple."""
    activation, clip, up_shift, low_rank_scale = network
    if len(widths) == 1:
        step = product_step(*widths)
    else:
        step = feed_forward_step(activation, widths, clip, up_shift)
    if low_rank_scale is not None:
        step = low_rank_step(step, len(widths), low_rank_scale)
    return step


@functools.lru_cache
def feed_forward_step(activation, widths, clip=None, up_shift=0.0):
    """The step of two or three projections, the gate first: see `Network`.

    Only pre-activations are saved; activations are computed again.
    """
    *ups, down = range(len(widths))
    activation = backend.activation(activation)

    def hidden_of(*pre_activations):
        *gates, up = pre_activations
        if not gates:
            return _activate(up)
        (gate,) = gates
        if clip is not None:
            gate, up = ops.minimum(gate, clip), ops.clip(up, -clip, clip)
        if up_shift:
            up = up + up_shift
        return _activate(gate) * up

    def _activate(values):
        activated = activation(values)
        if tuple(activated.shape) != tuple(values.shape):
            raise ValueError(
                "An activation must keep the shape of its input. Received: one that turned shape "
                f"{tuple(values.shape)} into {tuple(activated.shape)}"
            )
        # An activation may compute in float32; products need one dtype.
        if activated.dtype == values.dtype:  # a cast is an operation of a program, even if idle
            return activated
        return ops.cast(activated, values.dtype)

    def forward(rows, products, keep):
        def then(*pre_activations):
            return hidden_of(*pre_activations), *(pre_activations if keep else ())

        hidden, *saved = products.multiply(rows, ups, then)
        (output,) = products.multiply(hidden, [down], _unchanged)
        return output, saved

    def backward(rows, products, pre_activations, gradient):
        def pre_gradients_and_hidden(hidden_gradient, *pre_activations):
            hidden, pullback = backend.vjp(hidden_of, pre_activations)
            return *pullback(hidden_gradient), hidden

        def pre_gradients_alone(*tensors):
            return pre_gradients_and_hidden(*tensors)[:-1]

        if products.remakes:
            pre_gradients = products.pull(gradient, down, pre_gradients_alone, *pre_activations)
            hidden = Remade(hidden_of, tuple(pre_activations))
        else:
            then = pre_gradients_and_hidden
            *pre_gradients, hidden = products.pull(gradient, down, then, *pre_activations)
        row_gradient = sum(
            products.pull(pre, number, _unchanged)[0] for number, pre in zip(ups, pre_gradients)
        )
        return row_gradient, [*((rows, pre) for pre in pre_gradients), (hidden, gradient)]

    return Step(forward, backward, saved_widths=widths[:-1], output_width=widths[-1])


@functools.lru_cache
def product_step(width):
    """The step of a single product."""

    def forward(rows, products, keep):
        (output,) = products.multiply(rows, [0], _unchanged)
        return output, []

    def backward(rows, products, saved, gradient):
        (row_gradient,) = products.pull(gradient, 0, _unchanged)
        return row_gradient, [(rows, gradient)]

    return Step(forward, backward, saved_widths=(), output_width=width)


@functools.lru_cache
def low_rank_step(step, num_kernels, scale):
    """A step whose kernels W each have a correction of low rank: `x W + scale (x A) B`.

    The corrections are products of their own: no full kernel is made, and only the factors of the
    experts that have rows are touched. After the kernels come all A, then all B. Hu et al. 2021
    (arXiv:2106.09685), section 4.1.
    """

    def corrected(products):
        def project(rows, number):
            base, low = products.multiply(rows, [number], _unchanged), down(rows, number, products)
            (high,) = products.multiply(low, [2 * num_kernels + number], _unchanged)
            return base[0] + scale * high

        def pull(gradient, number):
            (base,) = products.pull(gradient, number, _unchanged)
            low = pull_up(gradient, number, products)
            (high,) = products.pull(low, num_kernels + number, _unchanged)
            return base + high

        return products_of(project, pull)

    def down(rows, number, products):
        (low,) = products.multiply(rows, [num_kernels + number], _unchanged)
        return low

    def pull_up(gradient, number, products):
        (low,) = products.pull(scale * gradient, 2 * num_kernels + number, _unchanged)
        return low

    def forward(rows, products, keep):
        return step.forward(rows, corrected(products), keep)

    def backward(rows, products, saved, gradient):
        row_gradient, factors = step.backward(rows, corrected(products), saved, gradient)
        numbered = list(enumerate(factors))
        of_downs = [(left, pull_up(right, number, products)) for number, (left, right) in numbered]
        of_ups = [
            (down(left, number, products), scale * right) for number, (left, right) in numbered
        ]
        return row_gradient, [*factors, *of_downs, *of_ups]

    return step._replace(forward=forward, backward=backward)


def _unchanged(product):
    return (product,)
