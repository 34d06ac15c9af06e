"""A synthetic world with exact answers: scenes of a few objects, their pictures, and a reader of pictures.

Of the rest of the package this room imports nothing.
"""
