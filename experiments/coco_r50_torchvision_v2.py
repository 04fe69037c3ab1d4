"""The layout of torchvision's RetinaNet v2, to hold its weights.

    ghm-jax import retinanet_resnet50_fpn_v2_coco-5905b1c5.pth \\
        experiments/coco_r50_torchvision_v2.py
    ghm-jax evaluate runs/retinanet_resnet50_fpn_v2_coco-5905b1c5

GroupNorm in the heads, P6 from C5, a ReLU before P7, torchvision's anchors and matching. Published
(torchvision): 41.5 AP on val2017, trained for 26 epochs with a GIoU loss and stronger augmentation,
neither of which is here: this file is for imported weights. Not measured here.

Anchors of P6 and P7 are at torchvision's positions if the batch is padded as torchvision pads it;
see `ghm_jax.detection.anchors`.
"""

from ghm_jax.config import Anchors, Config, Loss, Model

config = Config(
    model=Model(
        backbone="resnet50",
        norm="frozen",
        head_norm="group",
        relu_before_p7=True,
        dtype="float32",
    ),
    anchors=Anchors(convention="torchvision"),
    loss=Loss(classification="focal", box="smooth_l1"),
)
