"""Predicts the peak GPU memory of a training from a model's configuration alone, and says what fits a device."""
