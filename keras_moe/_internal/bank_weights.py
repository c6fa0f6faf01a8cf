"""How the stacked weights of a bank are named, which is a part of the interface.

Regular expressions for whole paths. The first axis of these weights is the experts.
"""

# (E, D, H), with the factors of LoRA and the scales of integers.
KERNELS = r"(.*/)?(up|gate|down)_(kernel|scale|lora_a|lora_b)"
# (E, H).
BIASES = r"(.*/)?(up|gate|down)_bias"
# (C, D), of the constant experts of `ZeroComputationExperts`, which are on every device.
CONSTANTS = r"(.*/)?constant"
