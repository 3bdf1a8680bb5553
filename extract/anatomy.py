"""Where a decoder keeps its blocks, found from the module tree."""

from torch import nn

from personaspace.store.errors import PersonaspaceError


class UnsupportedModelError(PersonaspaceError):
    """The model's structure is not that of a decoder whose residual stream can be read."""


def find_blocks(backbone: nn.Module, layers: int) -> nn.ModuleList:
    """The list of transformer blocks: the shallowest ModuleList with one entry per layer.

    Raises UnsupportedModelError naming the model class where there is none, or more than one at that depth.
    """
    candidates = [
        (name.count("."), module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    depth = min((depth for depth, _ in candidates), default=0)
    found = [module for module_depth, module in candidates if module_depth == depth]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(backbone).__name__}: found {len(found)} lists of {layers} blocks, expected one; "
            "this architecture is not supported."
        )
    return found[0]
