"""The key-value cache in few bits: static scales for engines, and what each type costs."""
