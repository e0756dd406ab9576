"""What is optimised: one LitModule an objective, and the pure losses."""
