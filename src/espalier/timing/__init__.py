"""Time as a cost: what every layer takes in a runtime, learned in context from whole networks that were measured there."""
