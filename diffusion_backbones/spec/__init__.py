"""What a backbone is, in plain data: checkpoints, recipes, activation ids, configs and the registry. No torch."""
