"""Data sets by name: those of this folder, and those of the catalogue of TensorFlow Datasets."""

import tensorflow_datasets as tfds


def find_builder(name, data_dir, built_in, hint):
    """The builder of a data set, which is not prepared yet.

    Args:
        name: a key of `built_in`, or a name in the catalogue of TFDS.
        data_dir: folder that keeps the data, or None for the one of TFDS.
        built_in: dict of names to classes of builders.
        hint: how the error goes on behind the address of the catalogue.

    Raises:
        ValueError: If there is no such data set.
    """
    if name in built_in:
        return built_in[name](data_dir=data_dir)
    if name.split("/")[0] not in tfds.list_builders(with_community_datasets=False):
        raise ValueError(
            f"There is no such data set. Received: {name!r}. Built in are {', '.join(built_in)}; "
            f"https://www.tensorflow.org/datasets/catalog {hint}"
        )
    print(f"{name} comes from TFDS: without internet its download hangs; Ctrl-C ends it.")
    return tfds.builder(name, data_dir=data_dir)


def prepared(make_builder):
    """The builder of a data set, once its data are there.

    TFDS prepares them in a folder of another name, and renames it at the end.

    Args:
        make_builder: function without arguments.
    """
    builder = make_builder()
    try:
        builder.download_and_prepare()
    except OSError:
        # Another run may have been faster: then its folder stands where this one was to go.
        builder = make_builder()
        if not builder.is_prepared():
            raise
    return builder
