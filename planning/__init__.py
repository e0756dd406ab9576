"""Predicting what a run takes, before its first step."""
