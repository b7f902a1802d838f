"""Networks: stages and exits, backbones, the registry of models, checkpoints."""
