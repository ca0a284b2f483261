"""Training that gives a compressed model back what it lost."""
