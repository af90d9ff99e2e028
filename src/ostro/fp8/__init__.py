"""FP8 weights: pure quantise and dequantise functions."""
