"""What GDF's segmentation models share (Meng et al., NeurIPS 2024; Darkbblue/generic-diffusion-feature at e4361a6,
segmentation/).

Head, losses, optimiser, schedule, crops and prompts are those of the release. Two defects of its head are not repeated:

1. The convolutions between backbone and head began at zero, weights and BatchNorm scales alike, so that no gradient
ever reached
   them: they were a learned offset per channel. Here the head reads the maps themselves.
2. UPerHead was given its levels coarse to fine. It pools the last map and fuses at the size of the first, so that the
pyramid
   pooling ran on the finest map and the logits came out at the coarsest stride. Here levels run fine to coarse.

Nor is padding a class here (seg_pad_val was 1), and an image that is smaller than a crop keeps its aspect ratio.
"""

custom_imports = dict(imports=["diffusion_backbones.integrations.openmmlab"])
default_scope = "mmseg"

norm_cfg = dict(type="BN")
sync_bn = "torch"  # over all GPUs, where there are several
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor", mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True, pad_val=0, seg_pad_val=255
    ),
    backbone=dict(type="DiffusionBackbone", pretrained=True, dtype="float16"),
    decode_head=dict(
        type="UPerHead",
        channels=512,
        dropout_ratio=0.1,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=[
            dict(type="CrossEntropyLoss", loss_weight=1.0),
            dict(type="LovaszLoss", reduction="none", loss_weight=1.0),
        ],
    ),
    auxiliary_head=dict(  # on the maps of stride 16
        type="FCNHead",
        channels=512,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4),
    ),
    train_cfg=dict(),
)

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1.6e-4, weight_decay=1e-3))
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=0, end=80000, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=80000, val_interval=2000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
val_evaluator = test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(
        type="CheckpointHook", by_epoch=False, interval=2000, max_keep_ckpts=1, save_best="mIoU"
    ),  # each holds the backbone too
)
log_processor = dict(by_epoch=False)
env_cfg = dict(cudnn_benchmark=True)
