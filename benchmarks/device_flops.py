"""FLOPs of the matrix products that each device really executes, every trip of every loop counted.

The program is rewritten so that it counts as it runs: each loop carries a count, and each device of
a `shard_map` returns its own. JAX only.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def device_flops(function, arguments):
    """FLOPs of `function(*arguments)` on each device, (devices,), and FLOPs of all together.

    The first counts what stands inside `shard_map`. The second counts what stands outside, where
    the compiler splits the work: here the products of the router, whose tokens are split.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    leaves = jax.tree.leaves(arguments)

    def count(*leaves):
        counter = _Counter()
        _, outside = counter.run(closed.jaxpr, closed.consts, leaves)
        return sum(counter.of_devices), outside

    inside, outside = jax.jit(count)(*leaves)
    return jax.device_get(inside), float(outside)


class _Counter:
    _CALLS = {
        "jit": "jaxpr",
        "pjit": "jaxpr",
        "custom_jvp_call": "call_jaxpr",
        "custom_vjp_call": "call_jaxpr",
    }

    def __init__(self):
        self.of_devices = []

    def run(self, jaxpr, consts, inputs):
        """Outputs and FLOPs of a program."""
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs)))
        flops = jnp.zeros((), "float32")

        def read(atom):
            return atom.val if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            outputs, more = self._apply(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, outputs))
            flops = flops + more
        return [read(atom) for atom in jaxpr.outvars], flops

    def _run_closed(self, closed, inputs):
        return self.run(closed.jaxpr, closed.consts, inputs)

    def _apply(self, equation, inputs):
        name, params = equation.primitive.name, equation.params
        if name in ("while", "scan", "cond", "shard_map"):
            return getattr(self, f"_{name}")(params, inputs)
        if name in self._CALLS:
            return self._run_closed(params[self._CALLS[name]], inputs)
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
            return self._run_closed(params["cond_jaxpr"], [*of_test, *state[0]])[0][0]

        def step(state):
            carry, flops = state
            carry, more = self._run_closed(params["body_jaxpr"], [*of_body, *carry])
            return carry, flops + more

        return jax.lax.while_loop(goes_on, step, (carry, jnp.zeros((), "float32")))

    def _scan(self, params, inputs):
        consts, carried = params["num_consts"], params["num_carry"]
        fixed, carry = inputs[:consts], inputs[consts : consts + carried]

        def step(state, xs):
            carry, flops = state
            outputs, more = self._run_closed(params["jaxpr"], [*fixed, *carry, *xs])
            return (outputs[:carried], flops + more), outputs[carried:]

        (carry, flops), stacks = jax.lax.scan(
            step,
            (carry, jnp.zeros((), "float32")),
            inputs[consts + carried :],
            length=params["length"],
            reverse=params["reverse"],
        )
        return [*carry, *stacks], flops

    def _cond(self, params, inputs):
        branches = [
            lambda *operands, branch=branch: self._run_closed(branch, operands)
            for branch in params["branches"]
        ]
        return jax.lax.switch(inputs[0], branches, *inputs[1:])

    def _shard_map(self, params, inputs):
        mesh = params["mesh"]

        def on_device(*inputs):
            outputs, flops = self.run(params["jaxpr"], (), inputs)
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
