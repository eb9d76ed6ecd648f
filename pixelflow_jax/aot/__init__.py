"""Programs compiled ahead of time for chips that are not here: reading them, projecting their speed.

Nothing here runs a program, and no figure from here is a measurement.
"""
