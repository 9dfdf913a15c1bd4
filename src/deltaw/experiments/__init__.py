"""Experiments: several trainings on the same rows. compare trains methods, tune searches settings.

An experiment has a folder of its own. It writes each result there at once and resumes from what is there.
"""
