"""The key-value cache in few bits: static scales, and what each type costs."""
