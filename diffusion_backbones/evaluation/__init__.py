"""Measurements of backbones: speed, memory, deviations, pictures, and the scenes that they are made on."""
