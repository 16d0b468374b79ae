"""Networks from papers, one per file, each readable on its own; `load_reference` fills one from its authors' weights.

`MODELS` holds the functions that build them, by name.
"""

from dynanet.zoo.aig_nets import convnet_aig, convnet_aig_cifar, target_rates
from dynanet.zoo.blockdrop_nets import blockdrop, load_static
from dynanet.zoo.branchynet import branchy_alexnet, branchy_lenet, branchy_resnet
from dynanet.zoo.causal_transformers import causal_transformer, exits_loss
from dynanet.zoo.cgnets import cgnet
from dynanet.zoo.detector import detector_halting, detector_skip, detector_static
from dynanet.zoo.drnets import drnet, drnet_imagenet
from dynanet.zoo.ds_nets import ds_net, slimmable_mobilenet
from dynanet.zoo.fbs_nets import fbs, fbs_resnet, static_vgg
from dynanet.zoo.gfnets import gfnet, gfnet_imagenet
from dynanet.zoo.layer_cascades import layer_cascade, layer_cascade_static
from dynanet.zoo.moe import moe_encoder, moe_vit
from dynanet.zoo.msdnets import msdnet, msdnet_anytime, msdnet_imagenet
from dynanet.zoo.pretrained_text import TextTokenizer, TruncationWarning, packaged_minilm, pretrained_text_exits
from dynanet.zoo.ranets import ranet, ranet_cifar, ranet_imagenet
from dynanet.zoo.recurrent import recurrent_stop
from dynanet.zoo.reference import load_reference, macs_per_exit, paper_flops, reference_state_dict
from dynanet.zoo.skipnets import skipnet
from dynanet.zoo.spectral import scene_form, scene_macs, spectral_exit, spectral_static
from dynanet.zoo.staged_resnets import staged_resnet, static_resnet
from dynanet.zoo.text_encoder import exits_only, text_exits, with_confidence
from dynanet.zoo.token_vits import a_vit, dynamic_vit, evit, token_vit, tome
from dynanet.zoo.vit import vit_exits, vit_static

MODELS = {
    build.__name__: build
    for build in (
        branchy_alexnet, branchy_lenet, branchy_resnet, vit_exits, vit_static,
        msdnet, msdnet_anytime, msdnet_imagenet, spectral_exit, spectral_static, staged_resnet, static_resnet,
        moe_vit, moe_encoder,
        token_vit, dynamic_vit, evit, a_vit, tome,
        text_exits, causal_transformer, recurrent_stop,
        ds_net, fbs, fbs_resnet, static_vgg, cgnet,
        skipnet, convnet_aig, convnet_aig_cifar, blockdrop,
        ranet, ranet_cifar, ranet_imagenet,
        layer_cascade, layer_cascade_static,
        gfnet, gfnet_imagenet, drnet, drnet_imagenet,
        detector_static, detector_halting, detector_skip,
    )
}  # fmt: skip

__all__ = [
    *MODELS, "TextTokenizer", "TruncationWarning", "exits_loss", "exits_only", "load_reference", "load_static",
    "macs_per_exit", "packaged_minilm", "paper_flops", "pretrained_text_exits", "reference_state_dict", "scene_form",
    "scene_macs", "slimmable_mobilenet", "target_rates", "with_confidence",
]  # fmt: skip
