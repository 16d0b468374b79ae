"""Experiments: data, model and recipe as one configuration, and the run folder that holds the results."""
