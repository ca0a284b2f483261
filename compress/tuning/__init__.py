"""Training of codes, end to end, after they are made."""
