"""Quantization-aware training: quantizers, GABFusion, ADA, calibration and folding."""
