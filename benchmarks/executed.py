"""FLOPs of the matrix products that a step really executes, every trip of every loop counted."""

import math

import keras

from benchmarks.steps import compiled_step, jax_function


def executed_flops(layer, inputs):
    """FLOPs of one forward and backward pass, or None where nobody counts them.

    JAX and TensorFlow under XLA run the same blocks of rows: what is counted on JAX holds for both.
    """
    count = {"jax": _count_jax, "torch": _count_torch}.get(keras.backend.backend())
    return count and count(layer, inputs)


def _count_torch(layer, inputs):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        flops = 0

        # PyTorch's own counter does not work under `torch.autograd.grad`.
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            outputs = function(*args, **(kwargs or {}))
            formula = flop_registry.get(function._overloadpacket)
            if formula is not None:
                self.flops += formula(*args, **(kwargs or {}), out_val=outputs)
            return outputs

    step = compiled_step(layer, inputs)
    with Counter() as counter:
        step()
    return counter.flops


def _count_jax(layer, inputs):
    import jax

    function, arguments = jax_function(layer, inputs, backward=True, training=True)
    counter = _Interpreter()
    counter.run(jax.make_jaxpr(function)(*arguments), jax.tree.leaves(arguments))
    return counter.flops


class _Interpreter:
    """Runs a jaxpr operation by operation.

    The compiler's own analysis takes the body of a loop once, whatever the number of trips.
    """

    _CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}

    def __init__(self):
        self.flops = 0

    def run(self, closed, inputs):
        values = dict(zip(closed.jaxpr.constvars, closed.consts))
        values.update(zip(closed.jaxpr.invars, inputs))

        def read(atom):
            return atom.val if hasattr(atom, "val") else values[atom]

        for equation in closed.jaxpr.eqns:
            outputs = self._apply(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, outputs))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def _apply(self, equation, inputs):
        name, params = equation.primitive.name, equation.params
        if name in self._CALLS:
            return self.run(params[self._CALLS[name]], inputs)
        if name in ("while", "scan", "cond"):
            return getattr(self, f"_{name}")(params, inputs)
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            summed = math.prod(inputs[0].shape[axis] for axis in contracted)
            self.flops += 2 * math.prod(equation.outvars[0].aval.shape) * summed
        outputs = equation.primitive.bind(*inputs, **params)
        return outputs if equation.primitive.multiple_results else [outputs]

    def _while(self, params, inputs):
        test, body = params["cond_nconsts"], params["body_nconsts"]
        of_test, of_body, carry = inputs[:test], inputs[test : test + body], inputs[test + body :]
        while self.run(params["cond_jaxpr"], [*of_test, *carry])[0]:
            carry = self.run(params["body_jaxpr"], [*of_body, *carry])
        return carry

    def _cond(self, params, inputs):
        return self.run(params["branches"][int(inputs[0])], inputs[1:])

    def _scan(self, params, inputs):
        import jax.numpy as jnp

        consts, carried = params["num_consts"], params["num_carry"]
        fixed, carry = inputs[:consts], inputs[consts : consts + carried]
        sequences, stacks = inputs[consts + carried :], []
        steps = range(params["length"])
        for step in reversed(steps) if params["reverse"] else steps:
            outputs = self.run(params["jaxpr"], [*fixed, *carry, *(x[step] for x in sequences)])
            carry = outputs[:carried]
            stacks.append(outputs[carried:])
        if params["reverse"]:
            stacks.reverse()
        return [*carry, *map(jnp.stack, zip(*stacks))]
