"""Sources, splits, batches, samplers and the DataModule."""
