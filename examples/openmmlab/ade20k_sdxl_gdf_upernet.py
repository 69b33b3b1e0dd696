"""GDF on SDXL, UPerNet, ADE20K. Crops of 512 px are enlarged to the 1024 px of the network."""

_base_ = "_base_/ade20k.py"

model = dict(
    backbone=dict(name="sdxl_gdf", input_scale=2),
    decode_head=dict(in_channels=[1280, 2560], in_index=[0, 1], pool_scales=(1, 2)),
    auxiliary_head=dict(in_channels=1280, in_index=0),
)
