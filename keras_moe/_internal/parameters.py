"""What a layer has to learn, whether it is frozen or not."""


def parameters_of(layer):
    """The variables of a layer and of all layers in it that were created trainable.

    `trainable_variables` of a frozen layer are none, and its `non_trainable_variables` are all.
    """
    return [variable for part in layer._flatten_layers() for variable in part._trainable_variables]
