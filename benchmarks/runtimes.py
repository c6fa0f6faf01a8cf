"""Exported programs in their own runtimes, without Keras's layers or ours.

    python benchmarks/runtimes.py FORMAT PROGRAM INPUTS.npz OUTPUTS.npz

Each loader takes the path of a program and returns a function of a NumPy array.
"""

import os
import sys

import numpy as np


def saved_model(path):
    import tensorflow as tf

    program = tf.saved_model.load(path)
    return lambda x: program.serve(tf.constant(x)).numpy()


def onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # By default there is one for each core of the machine, which wait for each other in a loop.
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(path, options)
    (argument,) = session.get_inputs()
    return lambda x: session.run(None, {argument.name: x})[0]


def litert(path):
    # The interpreter of this package has no operations of TensorFlow, called Flex.
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path)

    def run(x):
        place = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(place, x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(place, x)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    return run


def torch(path):
    import torch

    program = torch.export.load(path).module()
    return lambda x: program(torch.tensor(x)).detach().numpy()


def jax(path):
    import jax

    with open(path, "rb") as file:
        program = jax.export.deserialize(file.read())
    return lambda x: np.asarray(program.call(x))


LOADERS = {"saved_model": saved_model, "onnx": onnx, "litert": litert, "torch": torch, "jax": jax}

if __name__ == "__main__":
    form, program_path, inputs_path, outputs_path = sys.argv[1:]
    function = LOADERS[form](program_path)
    with np.load(inputs_path) as inputs:
        np.savez(outputs_path, **{name: function(x) for name, x in inputs.items()})
    assert "keras_moe" not in sys.modules
