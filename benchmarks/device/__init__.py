"""A GPU that is at hand for minutes: what is measured there, by ``scripts/device_bench.sh``."""
