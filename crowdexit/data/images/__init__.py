"""Image files from outside, read to 8-bit RGB: bounded, upright, and with a warning wherever the count may suffer.

``reader`` is the way in. ``limits`` has what is refused, ``tiff``, ``netpbm`` and ``jpeg`` what their formats need
beyond Pillow, ``ranges`` how more than eight bits become eight. What users may rely on is in docs/inputs.md.
"""
