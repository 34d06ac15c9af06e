"""A synthetic world with exact answers: scenes of a few objects, their pictures, a reader of pictures, and the words,
questions and documents that go with them.

    rng = random.Random(0)
    scene = draw_scene(rng, "test")
    image = render_scene(scene, rng)
    read_scene(image) == scene  # the checker: no network; `measure_checker` says how often it is wrong

Of the rest of the package this room takes only how a folder is written whole.
"""
