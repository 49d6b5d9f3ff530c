"""The page and the figures of a result, drawn from its JSON object by the commands of launch/ and tools/ alone.

A machine that only trains needs neither Matplotlib nor Jinja.
"""
