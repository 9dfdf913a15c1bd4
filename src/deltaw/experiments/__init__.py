"""Studies: several trainings on the same rows, side by side (compare) or one after the other (tune).

A study lives in a folder, writes each piece of its work there as soon as it is done, and goes on from there.
"""
