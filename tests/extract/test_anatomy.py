"""Finding the blocks of a decoder."""

import pytest
from torch import nn

from personaspace.extract.anatomy import UnsupportedModelError, find_blocks


def towers(*lengths: int) -> nn.Module:
    model = nn.Module()
    for number, length in enumerate(lengths):
        setattr(model, f"tower{number}", nn.ModuleList(nn.Identity() for _ in range(length)))
    return model


def test_shallowest_list_of_the_right_length() -> None:
    model = towers(3, 4)
    model.tower1[0] = towers(4)
    assert find_blocks(model, 4) is model.tower1


@pytest.mark.parametrize(("lengths", "found"), [((), 0), ((3,), 0), ((4, 4), 2)])
def test_no_guess(lengths: tuple[int, ...], found: int) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        find_blocks(towers(*lengths), 4)
    assert str(error.value) == (
        f"Module: found {found} lists of 4 blocks, expected one; this architecture is not supported."
    )
