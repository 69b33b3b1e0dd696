"""GDF on Stable Diffusion 1.5, UPerNet, Cityscapes. Crops of 1024 px are reduced to the 512 px of the network."""

_base_ = "_base_/cityscapes.py"

model = dict(
    backbone=dict(name="sd15_gdf", input_scale=0.5),
    decode_head=dict(in_channels=[320, 640, 2560], in_index=[0, 1, 2], pool_scales=(1, 2, 3)),
    auxiliary_head=dict(in_channels=640, in_index=1),
)
