"""A synthetic world with exact answers: scenes of a few objects, their pictures, a reader of pictures, and the words,
questions and documents that go with them.

Of the rest of the package this room takes only how a folder is written whole.
"""
