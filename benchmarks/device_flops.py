"""FLOPs of the matrix products that each device really executes, every trip of every loop counted.

The program is rewritten so that it counts as it runs: each loop carries a count, and each device of
a `shard_map` returns its own. JAX only. The compiler's own analysis takes the body of a loop once.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def device_flops(function, arguments):
    """FLOPs of `function(*arguments)` on each device, (devices,), and FLOPs of all together.

    The first counts what stands inside `shard_map`. The second counts what stands outside, where
    the compiler splits the work: here the products of the router, whose tokens are split.
    """
    closed = jax.make_jaxpr(function)(*arguments)

    def count(*leaves):
        counter = _Counter()
        _, outside = counter.run(closed, leaves)
        return sum(counter.of_devices), outside

    inside, outside = jax.jit(count)(*jax.tree.leaves(arguments))
    return jax.device_get(inside), float(outside)


class _Counter:
    def __init__(self):
        self.of_devices = []

    def run(self, closed, inputs):
        """Outputs and FLOPs of a program."""
        jaxpr = getattr(closed, "jaxpr", closed)
        consts = getattr(closed, "consts", ())
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs)))
        flops = jnp.zeros((), "float32")

        def read(atom):
            return atom.val if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            outputs, more = self._apply(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, outputs))
            flops = flops + more
        return [read(atom) for atom in jaxpr.outvars], flops

    def _apply(self, equation, inputs):
        name, params = equation.primitive.name, equation.params
        if name in ("while", "cond", "shard_map"):
            return getattr(self, f"_{name}")(params, inputs)
        if name in _CALLS:
            return self.run(params[_CALLS[name]], inputs)
        if name == "scan":
            raise NotImplementedError("products in a scan are not counted")
        flops = 0.0
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            summed = math.prod(inputs[0].shape[axis] for axis in contracted)
            flops = 2.0 * math.prod(equation.outvars[0].aval.shape) * summed
        outputs = equation.primitive.bind(*inputs, **params)
        return (outputs if equation.primitive.multiple_results else [outputs]), flops

    def _while(self, params, inputs):
        test, body = params["cond_nconsts"], params["body_nconsts"]
        of_test, of_body, carry = inputs[:test], inputs[test : test + body], inputs[test + body :]

        def goes_on(state):
            return self.run(params["cond_jaxpr"], [*of_test, *state[0]])[0][0]

        def step(state):
            carry, more = self.run(params["body_jaxpr"], [*of_body, *state[0]])
            return carry, state[1] + more

        return jax.lax.while_loop(goes_on, step, (carry, jnp.zeros((), "float32")))

    def _cond(self, params, inputs):
        branches = [
            lambda *operands, branch=branch: self.run(branch, operands)
            for branch in params["branches"]
        ]
        return jax.lax.switch(inputs[0], branches, *inputs[1:])

    def _shard_map(self, params, inputs):
        mesh = params["mesh"]

        def on_device(*inputs):
            outputs, flops = self.run(params["jaxpr"], inputs)
            return outputs, flops[None]

        outputs, flops = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=tuple(params["in_specs"]),
            out_specs=(list(params["out_specs"]), PartitionSpec(tuple(mesh.axis_names))),
            check_vma=False,
        )(*inputs)
        self.of_devices.append(flops)
        return outputs, 0.0
