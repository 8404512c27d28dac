"""What stages are assembled from: tensors, arrays and records in, the same out; nothing here writes results."""
