"""The layout of torchvision's RetinaNet (v1), to hold its weights.

    ghm-jax import retinanet_resnet50_fpn_coco-eeacb38b.pth experiments/coco_r50_torchvision.py
    ghm-jax evaluate runs/retinanet_resnet50_fpn_coco-eeacb38b

P6 comes from P5, a ReLU stands before P7, anchors and matching are torchvision's. Published
(torchvision): 36.4 AP on val2017, with focal and L1 losses over 26 epochs. Not measured here.
Estimated, not run: 26 hours on one A100 at an MFU of 30 %.

Anchors of P6 and P7 are at torchvision's positions if the batch is padded as torchvision pads it;
see `ghm_jax.detection.anchors`.
"""

from ghm_jax.config import Anchors, Config, Loss, Model, Optimizer

config = Config(
    model=Model(
        backbone="resnet50",
        norm="frozen",
        norm_epsilon=0.0,  # as the published weights were trained
        frozen_stages=1,
        p6_from="p5",
        relu_before_p7=True,
        dtype="float32",
    ),
    anchors=Anchors(convention="torchvision"),
    loss=Loss(classification="focal", box="smooth_l1"),
    optimizer=Optimizer(steps=190_580, drops=(117_280, 161_260)),  # drops at epochs 16 and 22
)
