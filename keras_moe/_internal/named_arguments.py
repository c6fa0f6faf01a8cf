"""Arguments of constructors that are misspelt, and constructors that were not called."""

import inspect
from typing import Any

from keras_moe._internal.validation import closest, shortened

# What `keras.Layer` takes beside the arguments in its signature.
_OF_LAYERS = ("input_shape", "input_dim")


class NamedArguments:
    """Abstract: a class whose constructor refuses arguments by names that it does not have.

    Before any other class in the bases. A constructor with `**kwargs` may take any, unless
    `serialization.register` has spelled out what that is.
    """

    # Those that the constructor refuses by itself, with a reason.
    _refused_arguments: tuple[str, ...] = ()

    def __new__(cls, *args, **kwargs):
        if kwargs:
            _check_names(cls, kwargs)
        make: Any = super().__new__
        return make(cls) if make is object.__new__ else make(cls, *args, **kwargs)


def _check_names(cls, arguments):
    parameters = dict(inspect.signature(cls.__init__).parameters)
    rest = [each for each in parameters.values() if each.kind is each.VAR_KEYWORD]
    if rest and not _is_spelled_out(cls):
        return
    own = [name for name in parameters if name not in ("self", *(each.name for each in rest))]
    known = {*own, *cls._refused_arguments, *(_of_base(cls) if rest else ())}
    for name, value in arguments.items():
        if name not in known:
            meant = closest(name, own)
            fix = f"Did you mean `{meant}`?" if meant else f"There are {', '.join(own)}."
            raise TypeError(
                f"`{cls.__name__}` takes no argument `{name}`. Received: "
                f"{name}={shortened(value)}. {fix}"
            )


def _of_base(cls):
    """What the first base outside of this package takes, where ours end in `**kwargs`."""
    bases = [base for base in cls.__mro__ if "__init__" in vars(base)]
    base = next(base for base in bases if not _is_spelled_out(base))
    return [*inspect.signature(base.__init__).parameters, *_OF_LAYERS]


def _is_spelled_out(cls):
    return hasattr(cls.__init__, "__signature__")


def check_is_made(instance):
    """Refuse an object whose class, the user's, does not call the constructor of its base here.

    Each constructor of this package keeps its first argument under its name.
    """
    package = __name__.partition(".")[0]
    for base in type(instance).__mro__:
        if base.__module__.partition(".")[0] != package or "__init__" not in vars(base):
            continue
        _, first, *_ = inspect.signature(vars(base)["__init__"]).parameters
        if not hasattr(instance, first):
            raise TypeError(
                f"`__init__` of `{type(instance).__name__}` must call that of its base class, "
                f"`{base.__name__}`. Received: an object without `{first}`. Call "
                f"`super().__init__({first}, ...)` in it, first of all."
            )
        return
