"""The mathematics of a step: advantages, losses, and how sequences go through the model for them."""
