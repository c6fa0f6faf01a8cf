"""Arguments of constructors: misspelt, changed later to what they cannot be, or not given."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras

from keras_moe._internal.validation import closest, shortened

_PACKAGE = __name__.partition(".")[0]

# Arguments of Keras's own classes that are worth showing.
OF_KERAS = ("trainable", "dtype", "name")

# What `keras.Layer` takes beside the arguments in its signature.
_OF_LAYERS = ("input_shape", "input_dim")


class _Rules(NamedTuple):
    """What holds for the attributes of a class: checks by name, and names."""

    checks: dict
    kept: set
    fixed: set
    without_effect: set


class NamedArguments:
    """Abstract: a class whose constructor refuses arguments by names that it does not have.

    Attributes keep the rules of the arguments they come from. Before any other class in the bases.
    A constructor with `**kwargs` may take any, unless `serialization.register` has spelled out what
    that is.
    """

    # Those that the constructor refuses by itself, with a reason.
    _refused_arguments: tuple[str, ...] = ()
    # Arguments that are attributes, checked whenever they are set: functions of the name and the
    # value that return what is kept. Those of the bases count too.
    _attribute_checks: dict = {}
    # Those that others are computed from, which stay as they were given.
    _kept_attributes: tuple[str, ...] = ()
    # Those that weights were made for, which stay as they are once `_is_settled`.
    _fixed_attributes: tuple[str, ...] = ()
    # What to do instead of setting one that stays.
    _instead_of_setting = "Make another one, or pass it to the constructor."
    # What `_rules_of` makes of these.
    _attribute_rules = _Rules({}, set(), set(), set())

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._attribute_rules = _rules_of(cls)

    def __new__(cls, *args, **kwargs):
        if kwargs:
            _check_names(cls, kwargs)
        make: Any = super().__new__
        return make(cls) if make is object.__new__ else make(cls, *args, **kwargs)

    def __setattr__(self, name, value):
        rules = self._attribute_rules
        if name in rules.checks:
            value = rules.checks[name](name, value)
        if name in rules.kept or (name in rules.fixed and self._is_settled()):
            _check_is_kept(self, name, value)
        if not name.startswith("_"):
            _check_keeps_weight(self, name, value)
        if name in rules.without_effect:
            raise TypeError(
                f"`{name}` must be given to a constructor, or set on what has it. Received: "
                f"{name}={shortened(value)} for a `{type(self).__name__}`, which would have no "
                f"effect. {_meant(name, rules.checks)}"
            )
        super().__setattr__(name, value)

    def _is_settled(self):
        """Whether its weights are made: Keras has then locked the state of a layer."""
        return getattr(getattr(self, "_tracker", None), "locked", False)


def _rules_of(cls):
    checks: dict = {}
    kept: set = set()
    fixed: set = set()
    arguments = set(cls._refused_arguments)
    for base in reversed(cls.__mro__):
        own = vars(base)
        checks.update(own.get("_attribute_checks", {}))
        kept.update(own.get("_kept_attributes", ()))
        fixed.update(own.get("_fixed_attributes", ()))
        if _is_ours(base) and "__init__" in own:
            arguments.update(inspect.signature(own["__init__"]).parameters)
    # A class of the user's has attributes of its own.
    without_effect = arguments - {*checks, *OF_KERAS} if _is_ours(cls) else set()
    return _Rules(checks, kept, fixed, without_effect)


def _is_ours(cls):
    return cls.__module__.partition(".")[0] == _PACKAGE


def _check_is_kept(instance, name, value):
    old = getattr(instance, name, value)
    if old is value or old == value:
        return
    raise TypeError(
        f"`{name}` of a `{type(instance).__name__}` must stay as it is, as others depend on it. "
        f"Received: {name}={shortened(value)} in place of {shortened(old)}. "
        f"{instance._instead_of_setting}"
    )


def _check_keeps_weight(instance, name, value):
    """An array in the place of a weight would be neither trained nor saved."""
    if isinstance(vars(instance).get(name), keras.Variable) and not (
        value is None or isinstance(value, keras.Variable)
    ):
        raise TypeError(
            f"`{name}` of a `{type(instance).__name__}` must stay a weight. Received: {name}="
            f"{shortened(value)} (of type {type(value).__name__}). Call `{name}.assign(...)`."
        )


def check_config(cls, config):
    """What an object is made of again."""
    if not isinstance(config, Mapping):
        raise TypeError(
            f"`config` of a `{cls.__name__}` must be a dict. Received: config={shortened(config)} "
            f"(of type {type(config).__name__}). Pass what its `get_config()` returned."
        )
    return config


def _check_names(cls, arguments):
    parameters = dict(inspect.signature(cls.__init__).parameters)
    rest = [each for each in parameters.values() if each.kind is each.VAR_KEYWORD]
    if rest and not _is_spelled_out(cls):
        return
    own = [name for name in parameters if name not in ("self", *(each.name for each in rest))]
    known = {*own, *cls._refused_arguments, *(_of_base(cls) if rest else ())}
    for name, value in arguments.items():
        if name not in known:
            raise TypeError(
                f"`{cls.__name__}` takes no argument `{name}`. Received: "
                f"{name}={shortened(value)}. {_meant(name, own)}"
            )


def _meant(name, names):
    meant = closest(name, names)
    return f"Did you mean `{meant}`?" if meant else f"There are {', '.join(names)}."


def _of_base(cls):
    """What the first base outside of this package takes, where ours end in `**kwargs`."""
    bases = [base for base in cls.__mro__ if "__init__" in vars(base)]
    base = next(base for base in bases if not _is_spelled_out(base))
    return [*inspect.signature(base.__init__).parameters, *_OF_LAYERS]


def _is_spelled_out(cls):
    return hasattr(cls.__init__, "__signature__")


def of_package(cls, method):
    """Whether a class has a method from this package, and not from a class of the user's."""
    return _is_ours(next(base for base in cls.__mro__ if method in vars(base)))


def check_config_is_whole(instance):
    """Refuse to save an object of the user's class whose config would lack arguments."""
    cls = type(instance)
    if of_package(cls, "__init__") or not of_package(cls, "get_config"):
        return
    base = next(base for base in cls.__mro__ if _is_ours(base) and "__init__" in vars(base))
    known = inspect.signature(vars(base)["__init__"]).parameters
    taken = inspect.signature(cls.__init__).parameters.values()
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [parameter.name for parameter in taken if parameter.kind not in rest]
    lost = [name for name in named if name not in known]
    if lost:
        entries = ", ".join(f'"{name}": self.{name}' for name in lost)
        raise NotImplementedError(
            f"`get_config` of `{cls.__name__}` must return all arguments of its constructor, to "
            f"be saved. Received: the one of `{base.__name__}`, without {', '.join(lost)}. Add "
            f"`def get_config(self): return {{**super().get_config(), {entries}}}`."
        )


class Saved(NamedArguments):
    """Abstract: a class that Keras saves by its config."""

    def get_config(self):
        check_config_is_whole(self)
        base: Any = super()
        return base.get_config()

    @classmethod
    def from_config(cls, config):
        base: Any = super()
        return base.from_config(check_config(cls, config))


def check_is_made(instance):
    """Refuse an object whose class, the user's, does not call the constructor of its base here.

    Each constructor of this package keeps its first argument under its name.
    """
    if getattr(instance, "built", False):
        return
    for base in type(instance).__mro__:
        if not _is_ours(base) or "__init__" not in vars(base):
            continue
        _, first, *_ = inspect.signature(vars(base)["__init__"]).parameters
        is_layer_unmade = isinstance(instance, keras.Layer) and not hasattr(instance, "built")
        if is_layer_unmade or not hasattr(instance, first):
            raise TypeError(
                f"`__init__` of `{type(instance).__name__}` must call that of its base class, "
                f"`{base.__name__}`. Received: an object for which it was not called. Call "
                f"`super().__init__({first}, ...)` in it, first of all."
            )
        return
