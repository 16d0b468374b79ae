"""BlockDrop: a small policy network chooses, per image, which blocks of a large network run.

Wu, Nagarajan, Kumar, Rennie, Davis, Grauman, Feris: BlockDrop: Dynamic Inference Paths in Residual Networks, CVPR 2018,
https://arxiv.org/abs/1711.08393. Trained in two stages from a pretrained ResNet: the policy alone by REINFORCE, one
more block per epoch (`curriculum`); then both together, with the cross-entropy added.
"""

from collections.abc import Sequence

from torch import nn

from dynanet.core.architecture import architecture
from dynanet.core.gate import Gate
from dynanet.gates.rules import Bernoulli
from dynanet.mechanisms.policy_skip import Bounded, PolicySkip
from dynanet.nets.resnet import cifar_blocks, cifar_stem, head


@architecture
def blockdrop(
    *,
    num_classes: int,
    depth: int = 110,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 32, 64),
    policy_depth: int = 8,
    bound: float = 0.8,
) -> PolicySkip:
    """BlockDrop for small images: (B, C, H, W) to (B, num_classes).

    Args:
        num_classes: width of the logits.
        depth: of the network whose blocks are dropped, 6n + 2; the authors' are 32 and 110.
        in_channels: channels of the input.
        widths: channels at each resolution, of both networks.
        policy_depth: of the policy network, 6n + 2.
        bound: the largest probability of keeping a block in training (`Bounded`).

    Returns:
        One layer with a unit per block, 3n of them. `load_static` fills it from a pretrained `cifar_resnet`.

    Raises:
        ConfigError: a depth that is not 6n + 2, or a bound outside (0.5, 1].

    Example:
        >>> import torch
        >>> blockdrop(num_classes=10, depth=14).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    blocks = cifar_blocks(depth, widths)
    scorer = nn.Sequential(
        cifar_stem(in_channels, widths[0]), *cifar_blocks(policy_depth, widths), head(widths[-1], len(blocks))
    )
    return PolicySkip(
        Gate(Bounded(scorer, bound), Bernoulli(), units=len(blocks)),
        blocks,
        [block.shortcut for block in blocks],
        before=cifar_stem(in_channels, widths[0]),
        after=head(widths[-1], num_classes),
    )


def load_static(model: PolicySkip, static: nn.Sequential) -> PolicySkip:
    """Fill the stem, blocks and head of a `blockdrop` from a trained `nets.resnet.cifar_resnet` of the same size.

    Returns:
        The model, changed in place.

    Raises:
        RuntimeError: from torch, naming the tensors whose shapes differ.
    """
    stem, *blocks, last = static
    model.before.load_state_dict(stem.state_dict())
    model.blocks.load_state_dict(nn.ModuleList(blocks).state_dict())
    model.after.load_state_dict(last.state_dict())
    return model
