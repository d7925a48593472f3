"""What the backends share that step all environments in one batch of tensors."""
