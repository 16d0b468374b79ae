"""One network with several sets of batch norms: everything else is shared, weight by weight.

A batch norm's statistics hold for inputs of the kind they were gathered on: of one width, one resolution, one domain.
"""

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynanet.core.errors import ConfigError


def norms_apart(net: nn.Module, count: int) -> nn.ModuleList:
    """So many views of a network that share all parameters but those of their batch norms.

    Yu et al. 2019, arXiv:1812.08928, section 3.2 (switchable batch norm); per resolution: Zhu et al. 2021,
    arXiv:2106.02898. Every view is a plain module: it trains, exports and folds like any other, and what trains one
    trains the shared weights of all. Buffers that are no batch norm's are each view's own.

    A state dict holds what is shared once per view. Move or convert all views together (`views.to(...)`), so that they
    go on sharing; `views.to("meta")` alone takes them apart.

    Args:
        net: the first view, as it is; the others start as copies of it.
        count: how many.

    Raises:
        ConfigError: a count below 1.
    """
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"{count!r} views of a network were asked for; expected a whole number of at least 1")
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    own = {id(parameter) for norm in norms for parameter in norm.parameters()}
    shared = {id(parameter): parameter for parameter in net.parameters() if id(parameter) not in own}
    return nn.ModuleList([net, *(copy.deepcopy(net, dict(shared)) for _ in range(count - 1))])
