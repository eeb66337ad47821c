"""The decision as data, the budget and the solver."""
