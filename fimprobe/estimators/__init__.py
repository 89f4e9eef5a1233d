"""The estimators of the Fisher information: pure functions from statistics to estimates."""
