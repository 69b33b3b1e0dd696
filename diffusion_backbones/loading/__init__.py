"""Where weights, configs and prompts come from: folders, the hub, single files, the prompt cache."""
