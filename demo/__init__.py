"""What `make demo` runs: real weights from packages, small real data, and the report."""
