"""One network with several sets of batch norms; all other weights are shared.

Statistics of a batch norm are valid for the kind of inputs that they were measured on: one width, resolution or domain.
"""

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynanet.core.errors import check_sizes


def norms_apart(net: nn.Module, count: int) -> nn.ModuleList:
    """Views of a network that share all parameters except those of their batch norms.

    Yu et al. 2019, arXiv:1812.08928, section 3.2 (switchable batch norm); per resolution: Zhu et al. 2021,
    arXiv:2106.02898. Every view is a plain module that trains, exports and folds like any other; training one
    trains the shared weights of all. Every view has its own buffers.

    A state dict contains shared weights once per view. Move or convert all views together (`views.to(...)`), so that
    they keep sharing; `views.to("meta")` ends it.

    Args:
        net: the first view itself; the others start as copies of it.
        count: number of views.

    Raises:
        ConfigError: a count below 1.
    """
    check_sizes(count=count)
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    own = {id(parameter) for norm in norms for parameter in norm.parameters()}
    shared = {id(parameter): parameter for parameter in net.parameters() if id(parameter) not in own}
    return nn.ModuleList([net, *(copy.deepcopy(net, dict(shared)) for _ in range(count - 1))])
