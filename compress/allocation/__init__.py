"""From a budget to a plan: levels, sensitivities, the search, and what they measure."""
