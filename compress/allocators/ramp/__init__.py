"""RAMP: a policy learns, unit by unit, which choice to take."""
