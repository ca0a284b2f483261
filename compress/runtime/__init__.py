"""Loading what the toolkit wrote."""
