"""Experiments: several trainings on the same rows. ``compare`` trains methods, ``tune`` searches settings.

An experiment stores each result in its folder immediately, so that it can be resumed.
"""
