"""Estimators: pure functions from moments to estimates."""
