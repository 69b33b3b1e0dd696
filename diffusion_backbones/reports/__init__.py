"""Reports on backbones and checkpoints: cards, summaries, costs, measured numbers. No torch at import."""
