"""Public names of earlier versions warn once, and still work."""

import importlib

import pytest

from keras_moe import losses, routers
from keras_moe._internal.former_names import FORMER

pytestmark = pytest.mark.backends("torch")


def former(name):
    """The object of a former name, whose first use warns and whose second does not."""
    part, _, name = name.rpartition(".")
    module = importlib.import_module(f"keras_moe.{part}")
    vars(module).pop(name, None)
    with pytest.warns(FutureWarning, match=f"`{part}.{name}` is deprecated. Use "):
        found = getattr(module, name)
    assert getattr(module, name) is found
    del vars(module)[name]
    return found


@pytest.mark.parametrize("name", FORMER)
def test_a_former_name_warns_once_and_is_not_listed(name):
    assert former(name) is not None
    part, _, name = name.rpartition(".")
    module = importlib.import_module(f"keras_moe.{part}")
    assert name not in dir(module)
    assert not hasattr(module, "no_such_name")


def test_former_names_are_those_of_now():
    assert former("losses.BY_NAME")["router_z"] is losses.RouterZ
    assert former("routers.SelectionRouter") is routers.TopKRouter
    assert isinstance(former("routers.ForcedRouter")(4), routers.Router)
