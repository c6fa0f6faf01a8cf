"""Checks of what stands on a command line, before anything is computed."""

from keras_moe.validation import check_positive_integer


def check_numbers(options, *names):
    """Refuse what is not a positive integer.

    Raises:
        ValueError: If an option is 0 or less.
    """
    for name in names:
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            check_positive_integer(f"--{name.replace('_', '-')}", number)
