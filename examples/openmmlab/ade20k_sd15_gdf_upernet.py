"""GDF on Stable Diffusion 1.5, UPerNet, ADE20K. Crops of 512 px are the size of the network."""

_base_ = "_base_/ade20k.py"

model = dict(
    backbone=dict(name="sd15_gdf"),
    decode_head=dict(in_channels=[320, 640, 2560], in_index=[0, 1, 2], pool_scales=(1, 2, 3)),
    auxiliary_head=dict(in_channels=640, in_index=1),
)
