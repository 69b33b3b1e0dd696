"""GDF on SDXL, UPerNet, Cityscapes. Crops of 1024 px are the size of the network."""

_base_ = "_base_/cityscapes.py"

model = dict(
    backbone=dict(name="sdxl_gdf"),
    decode_head=dict(in_channels=[1280, 2560], in_index=[0, 1], pool_scales=(1, 2)),
    auxiliary_head=dict(in_channels=1280, in_index=0),
)
