"""Classes derived at run time."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from ubn_zoo.utils.derived import Derived, derive


class Base(nn.Module):
    absent: torch.jit.Final[bool]

    def __init__(self) -> None:
        super().__init__()
        self.absent = False
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.absent:
            x = self.missing(x)  # TorchScript skips this only if it knows the constant.
        return self.layer(x)


class First(Derived):
    other: int

    def __len__(self) -> int:
        return 3


class Second(Derived):
    prefix = "Second"


def made() -> nn.Module:
    model = Base()
    model.__class__ = derive(Second, derive(First, Base))
    return model


def test_class_is_created_once() -> None:
    assert derive(First, Base) is derive(First, Base)
    assert derive(First, Base) is not derive(Second, Base)
    assert derive(Second, derive(First, Base)).__name__ == "SecondUbnBase"
    assert len(made()) == 3


def test_copies() -> None:
    model = made()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 (own bytes)
        assert type(twin) is type(model)
        assert torch.equal(twin.layer.weight, model.layer.weight)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_script_sees_the_constants_of_the_base() -> None:
    model, x = made(), torch.ones(1, 2)
    assert torch.equal(torch.jit.script(model)(x), model(x))


def test_classes_are_freed() -> None:
    class Temporary(nn.Module):
        pass

    reference = weakref.ref(derive(First, Temporary))
    del Temporary
    gc.collect()
    assert reference() is None
