"""From a config and a model to a plan, and the exact bytes of that plan."""
