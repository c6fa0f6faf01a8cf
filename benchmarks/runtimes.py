"""Runs an exported program in a process without Keras's layers or ours, for `test_export.py`.

python run_exported.py FORMAT PROGRAM INPUTS.npz OUTPUTS.npz
"""

import sys

import numpy as np


def saved_model(path):
    import tensorflow as tf

    program = tf.saved_model.load(path)
    return lambda x: program.serve(tf.constant(x)).numpy()


def onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
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


if __name__ == "__main__":
    form, program_path, inputs_path, outputs_path = sys.argv[1:]
    run = {"saved_model": saved_model, "onnx": onnx, "litert": litert, "torch": torch, "jax": jax}
    function = run[form](program_path)
    with np.load(inputs_path) as inputs:
        np.savez(outputs_path, **{name: function(x) for name, x in inputs.items()})
    assert "keras_moe" not in sys.modules
