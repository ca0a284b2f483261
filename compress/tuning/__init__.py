"""Training that moves codes and tables of a quantized model."""
